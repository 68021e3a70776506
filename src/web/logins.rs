//! Who is logged in to the web UI.
//!
//! A login is a random 256-bit token in a cookie; nothing about it is stored on disk, so a restart logs everybody out.
//! Checking the password itself is the hub's business (`hub::access`), how often it may be guessed `throttle`'s.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Logins at a time; the one idle for longest makes room.
const MAX_LOGINS: usize = 64;
/// A login that is not used for this long ends. An open page uses its login all the time.
const IDLE: Duration = Duration::from_secs(30 * 60);
/// A login ends after this long even when it is used.
const MAX_AGE: Duration = Duration::from_secs(7 * 24 * 3600);
/// The value of the session cookie: 64 hexadecimal digits.
pub type Token = Arc<str>;

/// All logins.
#[derive(Default)]
pub struct Logins(Mutex<HashMap<Token, Login>>);

struct Login {
    user: Arc<str>,
    since: Instant,
    used: Instant,
}

impl Logins {
    /// Starts a login of `user`.
    ///
    /// # Errors
    /// The operating system gave no random numbers.
    pub fn start(&self, user: &str, now: Instant) -> Result<Token, getrandom::Error> {
        let mut random = [0; 32];
        getrandom::fill(&mut random)?;
        let token: Token = random.iter().map(|byte| format!("{byte:02x}")).collect::<String>().into();
        let mut logins = self.0.lock();
        logins.retain(|_, login| !login.is_over(now));
        if logins.len() >= MAX_LOGINS {
            let idlest = logins.iter().min_by_key(|(_, login)| login.used).map(|(token, _)| token.clone());
            idlest.and_then(|token| logins.remove(&token));
        }
        logins.insert(token.clone(), Login { user: user.into(), since: now, used: now });
        Ok(token)
    }

    /// The user behind `token`, if the login has not ended; counts as use of it.
    pub fn user(&self, token: &str, now: Instant) -> Option<Arc<str>> {
        let mut logins = self.0.lock();
        let login = logins.get_mut(token)?;
        if login.is_over(now) {
            logins.remove(token);
            return None;
        }
        login.used = now;
        Some(login.user.clone())
    }

    pub fn end(&self, token: &str) {
        self.0.lock().remove(token);
    }
}

impl Login {
    fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.used) > IDLE || now.saturating_duration_since(self.since) > MAX_AGE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_ends_when_idle_or_old_or_ended() {
        let logins = Logins::default();
        let start = Instant::now();
        let token = logins.start("anna", start).unwrap();
        assert_eq!(token.len(), 64);
        assert_eq!(logins.user(&token, start + IDLE).as_deref(), Some("anna"));
        assert_eq!(logins.user(&token, start + IDLE * 2).as_deref(), Some("anna"), "use keeps it");
        assert_eq!(logins.user(&token, start + IDLE * 3 + Duration::from_secs(1)), None);

        let token = logins.start("anna", start).unwrap();
        let mut now = start;
        while now < start + MAX_AGE {
            assert!(logins.user(&token, now).is_some());
            now += IDLE;
        }
        assert_eq!(logins.user(&token, now + IDLE), None, "even a busy login ends");

        let token = logins.start("anna", start).unwrap();
        logins.end(&token);
        assert_eq!(logins.user(&token, start), None);
    }

    #[test]
    fn the_idlest_login_makes_room() {
        let logins = Logins::default();
        let start = Instant::now();
        let first = logins.start("first", start).unwrap();
        let second = logins.start("second", start + Duration::from_secs(1)).unwrap();
        for _ in 0..MAX_LOGINS - 1 {
            logins.start("more", start + Duration::from_secs(2)).unwrap();
        }
        assert_eq!(logins.user(&first, start + Duration::from_secs(3)), None);
        assert!(logins.user(&second, start + Duration::from_secs(3)).is_some());
    }
}
