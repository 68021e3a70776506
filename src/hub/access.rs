//! Who may connect, and which topics they may read and write (MQTT 5.0 §5.4.2).
//!
//! Rules are topic filters with Mosquitto's `%u` and `%c` for the user name and client id. Without users everybody is
//! anonymous; without rules everybody who may connect may do everything; with rules, what no rule allows is denied.
//! Mosquitto's own files are understood by [`mosquitto`].

pub mod mosquitto;

use std::collections::HashMap;
use std::sync::Arc;

use argon2::Argon2;
use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use thiserror::Error;

use crate::topic::TopicFilter;

/// Users and rules as configured.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    pub users: Vec<User>,
    pub rules: Vec<Rule>,
    pub anonymous: Anonymous,
    pub denied_publish: DeniedPublish,
    pub denied_subscribe: DeniedSubscribe,
}

/// What a client is told whose PUBLISH the rules do not allow; the message goes nowhere in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeniedPublish {
    /// 5.0 clients see reason code 0x87. The older versions have no word for it, and get their acknowledgement.
    #[default]
    Refuse,
    /// Nothing: the message is acknowledged like any other.
    Acknowledge,
    /// The connection is closed, with reason code 0x87 for 5.0 clients (MQTT 3.1.1 §3.3.5 allows it).
    Disconnect,
}

/// What a client is told whose SUBSCRIBE the rules give nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeniedSubscribe {
    /// Reason code 0x87, 0x80 in the older versions.
    #[default]
    Refuse,
    /// Nothing, as with Mosquitto: the subscription is granted and brings nothing.
    Grant,
}

#[derive(Clone, PartialEq)]
pub struct User {
    pub name: Arc<str>,
    /// In PHC form, `$argon2id$…`, as [`hash_password`] makes it, or as mosquitto_passwd does, `$7$…` or `$6$…`.
    pub password_hash: Arc<str>,
}

/// The hash is not for logs.
impl std::fmt::Debug for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("User").field("name", &self.name).finish_non_exhaustive()
    }
}

/// From where a client may connect without a user name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Anonymous {
    Never,
    /// From this machine only.
    #[default]
    Loopback,
    Always,
}

impl Anonymous {
    /// A client without a user name.
    ///
    /// # Errors
    /// [`AuthError::AnonymousRefused`] from where that is not allowed.
    pub fn admit(self, from_loopback: bool) -> Result<Identity, AuthError> {
        let allowed = match self {
            Self::Never => false,
            Self::Loopback => from_loopback,
            Self::Always => true,
        };
        let identity = Identity { user: None, trusted: false, certified: false };
        if allowed { Ok(identity) } else { Err(AuthError::AnonymousRefused) }
    }
}

/// What a rule's subjects may do. Several rules add up, and what one denies is denied.
///
/// The rules for everyone are asked last, and only where those for the client itself neither allow nor deny: this is
/// how Mosquitto orders topics and patterns (mosquitto.conf(5), "acl_file").
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    pub subject: Subject,
    pub read: Vec<Pattern>,
    pub write: Vec<Pattern>,
    /// Neither, whatever else is allowed.
    pub deny: Vec<Pattern>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    Everyone,
    Anonymous,
    User(Arc<str>),
    Client(Arc<str>),
}

/// A topic filter that may hold `%u` and `%c`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    text: Arc<str>,
    /// `%u` and `%c` stand for nothing but themselves.
    literal: bool,
}

impl Pattern {
    /// Checks `text` and makes a pattern of it.
    ///
    /// # Errors
    /// As [`TopicFilter::new`].
    pub fn new(text: &str) -> Result<Self, crate::topic::TopicError> {
        TopicFilter::new(text)?;
        Ok(Self { text: text.into(), literal: false })
    }

    /// As [`Pattern::new`], for a filter in which `%u` and `%c` have no meaning.
    ///
    /// # Errors
    /// As [`TopicFilter::new`].
    pub fn literal(text: &str) -> Result<Self, crate::topic::TopicError> {
        TopicFilter::new(text)?;
        Ok(Self { text: text.into(), literal: true })
    }

    /// The filter for one client; `None` where the pattern names a user and there is none, or where the name would
    /// change the filter's levels: a client called `+` must not read everybody's topics.
    fn expand(&self, user: Option<&str>, client_id: &str) -> Option<TopicFilter> {
        if self.literal {
            return TopicFilter::new(&self.text).ok();
        }
        let mut text = self.text.to_string();
        for (placeholder, name) in [("%u", user), ("%c", Some(client_id))] {
            if text.contains(placeholder) {
                let name = name.filter(|name| !name.is_empty() && !name.contains(['+', '#', '/']))?;
                text = text.replace(placeholder, name);
            }
        }
        TopicFilter::new(&text).ok()
    }
}

/// Who a client turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub user: Option<Arc<str>>,
    trusted: bool,
    /// Its name rests on something else than the list of users.
    certified: bool,
}

impl Identity {
    /// The gateway itself: adapters, bridge, web UI. No rule binds it.
    pub fn gateway() -> Self {
        Self { user: None, trusted: true, certified: false }
    }

    /// A client whose certificate, which the listener has checked, says that it is `user`.
    pub fn certified(user: Arc<str>) -> Self {
        Self { user: Some(user), trusted: false, certified: true }
    }
}

/// Why a client may not connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AuthError {
    #[error("a user name and password are required from this address")]
    AnonymousRefused,
    #[error("unknown user name or wrong password")]
    BadCredentials,
}

/// Users and rules, ready to be asked.
#[derive(Debug, Default)]
pub struct Access {
    settings: Settings,
    users: HashMap<Arc<str>, Arc<str>>,
    /// What is checked for users that do not exist, so that the time of an answer does not tell which names do.
    decoy: Option<Arc<str>>,
}

impl Access {
    pub fn new(settings: Settings) -> Self {
        let users = settings.users.iter().map(|user| (user.name.clone(), user.password_hash.clone())).collect();
        // A hash of the same make takes the same time; nobody is let in by it.
        let decoy = settings.users.first().map(|user| user.password_hash.clone());
        Self { settings, users, decoy }
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Checks a client's credentials. Takes tens of milliseconds when there is a password to check: call it where a
    /// thread may block.
    ///
    /// # Errors
    /// [`AuthError::AnonymousRefused`] without a user name from where that is not allowed;
    /// [`AuthError::BadCredentials`] for an unknown user or a wrong password, after the same time for both.
    pub fn authenticate(
        &self,
        user: Option<&str>,
        password: Option<&[u8]>,
        from_loopback: bool,
    ) -> Result<Identity, AuthError> {
        let Some(name) = user else { return self.settings.anonymous.admit(from_loopback) };
        let known = self.users.get_key_value(name);
        let decoy = self.decoy.as_deref().unwrap_or(UNKNOWN_USER_HASH);
        let hash = known.map_or(decoy, |(_, hash)| hash);
        let verified = verify_password(password.unwrap_or_default(), hash);
        match known {
            Some((name, _)) if verified => Ok(Identity { user: Some(name.clone()), trusted: false, certified: false }),
            _ => Err(AuthError::BadCredentials),
        }
    }

    /// A client, with the user it proved to be when it first attached, as the journal kept it.
    pub(super) fn restore(&self, user: Option<Arc<str>>) -> Identity {
        // Whom the list does not know can come back with a certificate only.
        let certified = user.as_ref().is_some_and(|user| !self.users.contains_key(user));
        Identity { user, trusted: false, certified }
    }

    /// Whether a client that was let in before would still be, as far as its user goes.
    pub(super) fn knows(&self, identity: &Identity) -> bool {
        identity.certified || identity.user.as_ref().is_none_or(|user| self.users.contains_key(user))
    }

    /// What one client may do.
    pub fn rights(&self, identity: &Identity, client_id: &str) -> Rights {
        if identity.trusted || self.settings.rules.is_empty() {
            return Rights(None);
        }
        let user = identity.user.as_deref();
        let (mut own, mut everyones) = (Stage::default(), Stage::default());
        for rule in &self.settings.rules {
            let concerned = match &rule.subject {
                Subject::Everyone => true,
                Subject::Anonymous => user.is_none(),
                Subject::User(name) => user == Some(name),
                Subject::Client(name) => client_id == &**name,
            };
            if concerned {
                let stage = if rule.subject == Subject::Everyone { &mut everyones } else { &mut own };
                stage.add(rule, user, client_id);
            }
        }
        Rights(Some(Arc::new([own, everyones])))
    }
}

/// What one client may read and write; cheap to clone.
#[derive(Clone, Debug)]
pub struct Rights(Option<Arc<[Stage; 2]>>);

/// Rules that are asked together: what they deny first, then what they allow.
#[derive(Debug, Default)]
struct Stage {
    read: Vec<TopicFilter>,
    write: Vec<TopicFilter>,
    deny: Vec<TopicFilter>,
    /// Something is denied to this client that cannot be spelled as a filter: nothing is allowed here.
    closed: bool,
}

#[derive(Clone, Copy)]
enum Asked {
    Read,
    Write,
}

impl Stage {
    fn add(&mut self, rule: &Rule, user: Option<&str>, client_id: &str) {
        let expand = |pattern: &Pattern| pattern.expand(user, client_id);
        self.read.extend(rule.read.iter().filter_map(expand));
        self.write.extend(rule.write.iter().filter_map(expand));
        for pattern in &rule.deny {
            match expand(pattern) {
                Some(filter) => self.deny.push(filter),
                // Without a user name, what is denied to user names is not denied.
                None if user.is_none() && pattern.text.contains("%u") => {}
                None => self.closed = true,
            }
        }
    }

    /// `None` where these rules say nothing about `topic`.
    fn judge(&self, asked: Asked, topic: &str) -> Option<bool> {
        let any = |filters: &[TopicFilter]| filters.iter().any(|filter| filter.matches(topic));
        let allowed = match asked {
            Asked::Read => &self.read,
            Asked::Write => &self.write,
        };
        if self.closed || any(&self.deny) {
            return Some(false);
        }
        any(allowed).then_some(true)
    }
}

impl Rights {
    pub fn may_write(&self, topic: &str) -> bool {
        self.judge(Asked::Write, topic)
    }

    pub fn may_read(&self, topic: &str) -> bool {
        self.judge(Asked::Read, topic)
    }

    /// Whether a subscription can give this client anything at all.
    pub fn may_subscribe(&self, wanted: &TopicFilter) -> bool {
        if !wanted.has_wildcard() {
            return self.may_read(wanted.as_str());
        }
        let gives = |stage: &Stage| !stage.closed && stage.read.iter().any(|filter| overlap(filter, wanted));
        self.0.as_ref().is_none_or(|stages| stages.iter().any(gives))
    }

    fn judge(&self, asked: Asked, topic: &str) -> bool {
        let Some(stages) = &self.0 else { return true };
        stages.iter().find_map(|stage| stage.judge(asked, topic)).unwrap_or(false)
    }
}

/// Whether some topic matches both filters.
fn overlap(a: &TopicFilter, b: &TopicFilter) -> bool {
    let (mut left, mut right) = (a.as_str().split('/'), b.as_str().split('/'));
    let mut first = true;
    loop {
        match (left.next(), right.next()) {
            (Some("#"), other) | (other, Some("#")) => {
                return !(first && other.is_some_and(|level| level.starts_with('$')));
            }
            (Some("+"), Some(level)) | (Some(level), Some("+")) if !(first && level.starts_with('$')) => {}
            (Some(left), Some(right)) if left == right => {}
            (None, None) => return true,
            _ => return false,
        }
        first = false;
    }
}

/// Hashes a password with argon2id and a fresh salt, to the PHC form that the configuration holds.
///
/// # Errors
/// [`HashError`] when the operating system gives no random bytes for the salt.
pub fn hash_password(password: &[u8]) -> Result<String, HashError> {
    Argon2::default().hash_password(password).map(|hash| hash.to_string()).map_err(HashError)
}

/// Tells whether `text` is a hash as [`hash_password`] makes it.
pub fn is_password_hash(text: &str) -> bool {
    text.starts_with("$argon2id$") && PasswordHash::new(text).is_ok()
}

#[derive(Debug, Error)]
#[error("the password cannot be hashed")]
pub struct HashError(#[source] argon2::password_hash::Error);

fn verify_password(password: &[u8], hash: &str) -> bool {
    if mosquitto::is_hash(hash) {
        return mosquitto::verify(password, hash);
    }
    PasswordHash::new(hash).is_ok_and(|hash| Argon2::default().verify_password(password, &hash).is_ok())
}

/// Checked where there are no users at all. Nobody knows a password for it: it is the hash of random bytes that were thrown away.
const UNKNOWN_USER_HASH: &str =
    "$argon2id$v=19$m=19456,t=2,p=1$bm8gc3VjaCB1c2VyIQ$Hw9mS4oVtq2Yt0n3o6bS1sU0w7k9c5qj1x8rZ2aLpE4";

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> Pattern {
        Pattern::new(text).unwrap()
    }

    fn user(name: &str, password: &[u8]) -> User {
        User { name: name.into(), password_hash: hash_password(password).unwrap().into() }
    }

    #[test]
    fn passwords_are_checked_and_unknown_users_are_not_told_apart() {
        let access = Access::new(Settings {
            users: vec![user("ann", b"secret")],
            anonymous: Anonymous::Never,
            ..Settings::default()
        });
        let check = |user, password: Option<&[u8]>| access.authenticate(user, password, true);
        assert_eq!(check(Some("ann"), Some(b"secret")).unwrap().user.as_deref(), Some("ann"));
        assert_eq!(check(Some("ann"), Some(b"wrong")), Err(AuthError::BadCredentials));
        assert_eq!(check(Some("ann"), None), Err(AuthError::BadCredentials));
        assert_eq!(check(Some("bob"), Some(b"secret")), Err(AuthError::BadCredentials));
        assert_eq!(check(None, None), Err(AuthError::AnonymousRefused));
        assert!(PasswordHash::new(UNKNOWN_USER_HASH).is_ok(), "it must cost as much as a real one");
    }

    #[test]
    fn anonymous_clients_connect_from_loopback_by_default() {
        let access = Access::new(Settings::default());
        assert!(access.authenticate(None, None, true).is_ok());
        assert_eq!(access.authenticate(None, None, false), Err(AuthError::AnonymousRefused));
    }

    #[test]
    fn rules_add_up_and_what_none_allows_is_denied() {
        let rule = |subject, read: &[&str], write: &[&str]| Rule {
            subject,
            read: read.iter().map(|text| pattern(text)).collect(),
            write: write.iter().map(|text| pattern(text)).collect(),
            deny: Vec::new(),
        };
        let access = Access::new(Settings {
            rules: vec![
                rule(Subject::Everyone, &["public/#"], &[]),
                rule(Subject::User("ann".into()), &["home/%u/#"], &["home/%u/+"]),
                rule(Subject::Client("c1".into()), &[], &["raw/%c"]),
            ],
            ..Settings::default()
        });
        let ann = Identity { user: Some("ann".into()), trusted: false, certified: false };
        let rights = access.rights(&ann, "c1");
        assert!(rights.may_read("public/x") && rights.may_read("home/ann/a/b") && rights.may_write("raw/c1"));
        assert!(!rights.may_read("home/bob/x") && !rights.may_write("home/ann/a/b") && !rights.may_write("public/x"));
        let filter = |text: &str| rights.may_subscribe(&TopicFilter::new(text).unwrap());
        assert!(filter("#") && filter("home/+/a") && filter("public/+/x"));
        assert!(!filter("private/#") && !filter("home/bob/#") && !filter("$SYS/#"));
        let nobody = access.rights(&Identity { user: None, trusted: false, certified: false }, "x");
        assert!(nobody.may_read("public/x") && !nobody.may_read("home/ann/x"));
        assert!(access.rights(&Identity::gateway(), "x").may_write("anything"));
    }

    #[test]
    fn a_name_with_wildcards_or_levels_widens_no_pattern() {
        let check = |client: &str| pattern("a/%c").expand(None, client);
        assert_eq!(check("x").unwrap().as_str(), "a/x");
        for name in ["+", "#", "x/y", ""] {
            assert_eq!(check(name), None, "{name}");
        }
        assert_eq!(pattern("a/%u").expand(None, "x"), None);
    }
}
