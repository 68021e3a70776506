//! Mosquitto's password and ACL files, as mosquitto_passwd(1) writes the one and mosquitto.conf(5), "acl_file",
//! describes the other. Parsing and checking only; the files are read by `config`.
//!
//! Deliberately different: a line that cannot be understood is an error, where Mosquitto skips some and allows more
//! than was meant.

use std::collections::HashSet;
use std::num::NonZeroU32;

use ring::{digest, pbkdf2};
use thiserror::Error;

use super::{Pattern, Rule, Subject, User};

/// The most rounds of PBKDF2: some seconds per check. Mosquitto makes 101 by default.
const MAX_ROUNDS: u32 = 10_000_000;
/// The longest salt; Mosquitto makes 12 bytes.
const MAX_SALT_BYTES: usize = 64;

/// What is wrong with which line, counted from 1.
#[derive(Debug, PartialEq, Eq, Error)]
#[error("line {line}: {what}")]
pub struct FileError {
    pub line: usize,
    pub what: String,
}

/// Reads a password file: lines `name:$6$salt$hash` or `name:$7$rounds$salt$hash`.
///
/// # Errors
/// [`FileError`] for the first line that is neither, or names a user again.
pub fn parse_passwords(text: &str) -> Result<Vec<User>, FileError> {
    let mut names = HashSet::new();
    let mut parse = |line: &str| {
        let (name, hash) = line.split_once(':').ok_or("it must be `name:hash`, as mosquitto_passwd writes it")?;
        if name.is_empty() {
            return Err("the user name is empty".to_owned());
        }
        if Hash::parse(hash).is_none() {
            // The line may hold a password in plain text, which is not repeated.
            let what = "what follows the name is no hash of mosquitto_passwd, `$7$…` or `$6$…`; \
                        `mosquitto_passwd -U FILE` turns a file of plain passwords into one of hashes";
            return Err(what.to_owned());
        }
        if !names.insert(name.to_owned()) {
            return Err(format!("the user `{name}` stands in the file twice"));
        }
        Ok(User { name: name.into(), password_hash: hash.into() })
    };
    lines(text).map(|(line, text)| parse(text).map_err(|what| FileError { line, what })).collect()
}

/// Reads an ACL file: `topic`, `user` and `pattern` lines.
///
/// Topics before the first `user` are for anonymous clients, those after it for that user, patterns for everyone.
///
/// # Errors
/// [`FileError`] for the first line that is none of these.
pub fn parse_rules(text: &str) -> Result<Vec<Rule>, FileError> {
    let mut subject = Subject::Anonymous;
    let mut rules: Vec<Rule> = Vec::new();
    for (number, line) in lines(text) {
        let wrong = |what: String| FileError { line: number, what };
        let (word, rest) = split_word(line);
        let is_pattern = match word {
            "user" if rest.is_empty() => return Err(wrong("the user name is missing".into())),
            "user" => {
                subject = Subject::User(rest.into());
                continue;
            }
            "topic" => false,
            "pattern" => true,
            _ => return Err(wrong(format!("`{word}` is unknown; lines begin with topic, pattern or user"))),
        };
        let concerned = if is_pattern { Subject::Everyone } else { subject.clone() };
        let last = rules.len().checked_sub(1).filter(|last| rules[*last].subject == concerned);
        let index = last.unwrap_or_else(|| {
            rules.push(Rule { subject: concerned, read: Vec::new(), write: Vec::new(), deny: Vec::new() });
            rules.len() - 1
        });
        add_topic(&mut rules[index], rest, is_pattern).map_err(wrong)?;
    }
    Ok(rules)
}

fn add_topic(rule: &mut Rule, text: &str, is_pattern: bool) -> Result<(), String> {
    let (word, rest) = split_word(text);
    let (access, topic) = if rest.is_empty() { ("readwrite", word) } else { (word, rest) };
    if topic.is_empty() {
        return Err("the topic is missing".into());
    }
    let pattern = if is_pattern { Pattern::new(topic) } else { Pattern::literal(topic) };
    let pattern = pattern.map_err(|error| format!("`{topic}` is no topic filter: {error}"))?;
    match access {
        "read" => rule.read.push(pattern),
        "write" => rule.write.push(pattern),
        "readwrite" => {
            rule.read.push(pattern.clone());
            rule.write.push(pattern);
        }
        "deny" => rule.deny.push(pattern),
        _ => {
            return Err(format!(
                "`{access}` is unknown; the access is read, write, readwrite or deny, and must be given where the topic \
                 holds a blank"
            ));
        }
    }
    Ok(())
}

/// Whether `hash` is one that [`verify`] can check.
pub(super) fn is_hash(hash: &str) -> bool {
    hash.starts_with("$6$") || hash.starts_with("$7$")
}

pub(super) fn verify(password: &[u8], hash: &str) -> bool {
    match Hash::parse(hash) {
        Some(Hash::Salted { salt, digest: expected }) => {
            let mut context = digest::Context::new(&digest::SHA512);
            context.update(password);
            context.update(&salt);
            let made = context.finish();
            // All bytes are looked at, so that the time tells nothing about how many are right.
            let differing = made.as_ref().iter().zip(&expected).fold(0, |bits, (a, b)| bits | (a ^ b));
            differing == 0 && expected.len() == made.as_ref().len()
        }
        Some(Hash::Pbkdf2 { rounds, salt, digest }) => {
            pbkdf2::verify(pbkdf2::PBKDF2_HMAC_SHA512, rounds, &salt, password, &digest).is_ok()
        }
        None => false,
    }
}

/// A line's second half.
enum Hash {
    /// SHA-512 of the password and then the salt.
    Salted {
        salt: Vec<u8>,
        digest: Vec<u8>,
    },
    Pbkdf2 {
        rounds: NonZeroU32,
        salt: Vec<u8>,
        digest: Vec<u8>,
    },
}

impl Hash {
    fn parse(text: &str) -> Option<Self> {
        let bytes = |text: &str| decode_base64(text).filter(|bytes| !bytes.is_empty());
        let salt = |text: &str| bytes(text).filter(|salt| salt.len() <= MAX_SALT_BYTES);
        let digest = |text: &str| bytes(text).filter(|digest| digest.len() == digest::SHA512_OUTPUT_LEN);
        match text.split('$').collect::<Vec<_>>().as_slice() {
            ["", "6", a, b] => Some(Self::Salted { salt: salt(a)?, digest: digest(b)? }),
            ["", "7", rounds, a, b] => {
                let rounds = rounds.parse().ok().filter(|rounds: &NonZeroU32| rounds.get() <= MAX_ROUNDS)?;
                Some(Self::Pbkdf2 { rounds, salt: salt(a)?, digest: digest(b)? })
            }
            _ => None,
        }
    }
}

/// Base64 with padding (RFC 4648 §4).
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(4) {
        return None;
    }
    let digits = text.trim_end_matches('=');
    if text.len() - digits.len() > 2 {
        return None;
    }
    let (mut bytes, mut pending, mut bits) = (Vec::with_capacity(text.len() / 4 * 3), 0_u32, 0);
    for digit in digits.bytes() {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        pending = (pending << 6 | u32::from(value)) & 0xFFFF;
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push((pending >> bits) as u8);
        }
    }
    Some(bytes)
}

/// The lines that say something, with their numbers.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let numbered = text.lines().enumerate().map(|(index, line)| (index + 1, line.trim_end()));
    numbered.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
}

/// The first word of a line, and what follows the blanks after it.
fn split_word(line: &str) -> (&str, &str) {
    let line = line.trim_start();
    let (word, rest) = line.split_once([' ', '\t']).unwrap_or((line, ""));
    (word, rest.trim_start())
}

#[cfg(test)]
mod tests {
    use super::super::{Access, Identity, Settings};
    use super::*;
    use crate::topic::TopicFilter;

    // Made by mosquitto_passwd 2.0.11.
    const PASSWORDS: &str = "# people
ann:$7$101$SSiWp7m0MVPyj41m$w8p5vrdBdcQABMito9BmvNdls6LzcB9HRXR3eGc96AHRb/3to5iqbclKl3rwsM5MM7MdPEK4xuEN8+Ptr7tctA==

bob:$6$Vjtl5b0Kxp9BADwc$z8pp6TbiD34mYhP+tEBVUWKJXQVRjVfHhEH7GYyz1qnTe3n+Z+dnC5MpeVg2R7c7ZjICaRkLaYmBmInOTHqT7Q==
";

    #[test]
    fn passwords_hashed_by_mosquitto_are_checked() {
        let users = parse_passwords(PASSWORDS).unwrap();
        let access = Access::new(Settings { users, ..Settings::default() });
        let check = |user, password: &[u8]| access.authenticate(Some(user), Some(password), true).is_ok();
        assert!(check("ann", b"secret") && check("bob", b"secret2"));
        assert!(
            !check("ann", b"secret2") && !check("bob", b"secret") && !check("ann", b"") && !check("eve", b"secret")
        );
    }

    #[test]
    fn a_password_line_that_cannot_be_understood_is_named_and_not_repeated() {
        let check = |text: &str, line, part: &str| {
            let error = parse_passwords(text).unwrap_err();
            assert!(error.line == line && error.what.contains(part), "{text}: {error}");
            assert!(!error.what.contains("s3cret"), "{error}");
        };
        check("# x\n\nann:s3cret\n", 3, "mosquitto_passwd -U");
        check("ann", 1, "`name:hash`");
        check(":$6$YQ==$YQ==", 1, "user name is empty");
        check("ann:$6$Vjtl5b0Kxp9BADwc$YQ==", 1, "no hash");
        check("ann:$7$0$SSiWp7m0MVPyj41m$YQ==", 1, "no hash");
        check(&format!("{PASSWORDS}{}", PASSWORDS.lines().nth(1).unwrap()), 5, "twice");
    }

    #[test]
    fn base64_is_decoded() {
        for (text, bytes) in [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("Zm9vYmFy", "foobar")] {
            assert_eq!(decode_base64(text).as_deref(), Some(bytes.as_bytes()), "{text}");
        }
        assert_eq!([decode_base64("Zg"), decode_base64("Z==="), decode_base64("Zm9-")], [None, None, None]);
    }

    fn rights(text: &str, user: Option<&str>, client: &str) -> super::super::Rights {
        let access = Access::new(Settings { rules: parse_rules(text).unwrap(), ..Settings::default() });
        access.rights(&Identity { user: user.map(Into::into), trusted: false, certified: false }, client)
    }

    #[test]
    fn topics_are_for_who_stands_above_them_and_patterns_for_everyone() {
        let text = "topic read public/#\n\nuser ann\ntopic home/ann/#\n  topic  write  with blank\ntopic read %u\n\
                    # more\npattern readwrite own/%u/%c\nuser bob smith\ntopic write b\n";
        let nobody = rights(text, None, "c1");
        assert!(nobody.may_read("public/x") && !nobody.may_write("public/x") && !nobody.may_read("home/ann/x"));
        let ann = rights(text, Some("ann"), "c1");
        assert!(ann.may_read("home/ann/x") && ann.may_write("home/ann/x") && ann.may_write("with blank"));
        assert!(ann.may_write("own/ann/c1") && !ann.may_write("own/ann/c2") && !ann.may_read("public/x"));
        assert!(ann.may_read("%u") && !ann.may_read("ann"), "only patterns hold placeholders");
        assert!(rights(text, Some("bob smith"), "c").may_write("b"));
    }

    #[test]
    fn what_is_denied_is_denied_whatever_the_order_and_topics_come_before_patterns() {
        let text = "user ann\ntopic readwrite a/#\ntopic deny a/secret/#\npattern deny a/%u\npattern read +/secret/x\n\
                    pattern deny p/%c\npattern write p/#\n";
        let ann = rights(text, Some("ann"), "c");
        assert!(ann.may_read("a/x") && !ann.may_read("a/secret/x") && !ann.may_write("a/secret/x"));
        assert!(ann.may_read("a/ann"), "her own topics have allowed it before the pattern is asked");
        assert!(ann.may_read("b/secret/x") && ann.may_write("p/d") && !ann.may_write("p/c"));
        let subscribe = |text: &str| ann.may_subscribe(&TopicFilter::new(text).unwrap());
        assert!(subscribe("a/#") && !subscribe("a/secret/x") && !subscribe("nothing"));
        // A name that the pattern cannot hold must not slip past what it denies.
        assert!(!rights(text, Some("ann"), "c/d").may_write("p/c/d"));
    }

    #[test]
    fn an_acl_line_that_cannot_be_understood_is_named() {
        let check = |text: &str, line, part: &str| {
            let error = parse_rules(text).unwrap_err();
            assert!(error.line == line && error.what.contains(part), "{text}: {error}");
        };
        check("# x\nuser\n", 2, "name is missing");
        check("topic\n", 1, "topic is missing");
        check("topic a b\n", 1, "`a` is unknown");
        check("topic read a/#/b\n", 1, "no topic filter");
        check("topics read a\n", 1, "`topics` is unknown");
    }
}
