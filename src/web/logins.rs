//! Who is logged in to the web UI, and how often an address may guess a password.
//!
//! A login is a random 256-bit token in a cookie; nothing about it is stored on disk, so a restart logs everybody out.
//! Checking the password itself is the hub's business (`hub::access`).

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Logins at a time; the one idle for longest makes room.
const MAX_LOGINS: usize = 64;
/// A login that is not used for this long ends. An open page uses its login all the time.
const IDLE: Duration = Duration::from_secs(30 * 60);
/// A login ends after this long even when it is used.
const MAX_AGE: Duration = Duration::from_secs(7 * 24 * 3600);
/// Wrong passwords an address may give before it has to wait.
const FREE_FAILURES: u32 = 3;
/// The longest wait between two guesses of one address.
const MAX_DELAY: Duration = Duration::from_secs(300);
/// An address's wrong passwords are forgotten after this long without another.
const FORGET: Duration = Duration::from_secs(900);
/// Addresses remembered for their wrong passwords; the one that was quiet for longest makes room.
const MAX_ADDRESSES: usize = 1024;

/// The value of the session cookie: 64 hexadecimal digits.
pub type Token = Arc<str>;

/// All logins and all wrong passwords of late.
#[derive(Default)]
pub struct Logins {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    logins: HashMap<Token, Login>,
    failures: HashMap<IpAddr, Failures>,
}

struct Login {
    user: Arc<str>,
    since: Instant,
    used: Instant,
}

struct Failures {
    count: u32,
    last: Instant,
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
        let mut inner = self.inner.lock();
        inner.forget_logins(now);
        if inner.logins.len() >= MAX_LOGINS {
            let idlest = inner.logins.iter().min_by_key(|(_, login)| login.used).map(|(token, _)| token.clone());
            idlest.and_then(|token| inner.logins.remove(&token));
        }
        inner.logins.insert(token.clone(), Login { user: user.into(), since: now, used: now });
        Ok(token)
    }

    /// The user behind `token`, if the login has not ended; counts as use of it.
    pub fn user(&self, token: &str, now: Instant) -> Option<Arc<str>> {
        let mut inner = self.inner.lock();
        let login = inner.logins.get_mut(token)?;
        if login.is_over(now) {
            inner.logins.remove(token);
            return None;
        }
        login.used = now;
        Some(login.user.clone())
    }

    pub fn end(&self, token: &str) {
        self.inner.lock().logins.remove(token);
    }

    /// How long `address` has to wait before its next guess; `None` when it may guess now.
    pub fn delay(&self, address: IpAddr, now: Instant) -> Option<Duration> {
        let inner = self.inner.lock();
        let failures = inner.failures.get(&network(address))?;
        let left = (failures.last + failures.delay()).saturating_duration_since(now);
        (!left.is_zero()).then_some(left)
    }

    /// Notes a wrong password from `address`. Called before the check of a password too, so that guesses made at the
    /// same time count; [`Logins::succeeded`] takes it back.
    pub fn failed(&self, address: IpAddr, now: Instant) {
        let mut inner = self.inner.lock();
        let network = network(address);
        inner.failures.retain(|_, failures| now.saturating_duration_since(failures.last) < FORGET);
        if inner.failures.len() >= MAX_ADDRESSES && !inner.failures.contains_key(&network) {
            let quietest = inner.failures.iter().min_by_key(|(_, failures)| failures.last).map(|(address, _)| *address);
            quietest.and_then(|address| inner.failures.remove(&address));
        }
        let failures = inner.failures.entry(network).or_insert(Failures { count: 0, last: now });
        failures.count = failures.count.saturating_add(1);
        failures.last = now;
    }

    /// The password noted by [`Logins::failed`] was wrong indeed: the wait begins now, not before the check.
    pub fn refused(&self, address: IpAddr, now: Instant) {
        if let Some(failures) = self.inner.lock().failures.get_mut(&network(address)) {
            failures.last = now;
        }
    }

    pub fn succeeded(&self, address: IpAddr) {
        self.inner.lock().failures.remove(&network(address));
    }
}

impl Inner {
    fn forget_logins(&mut self, now: Instant) {
        self.logins.retain(|_, login| !login.is_over(now));
    }
}

impl Login {
    fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.used) > IDLE || now.saturating_duration_since(self.since) > MAX_AGE
    }
}

impl Failures {
    /// 1, 2, 4, … seconds, from the first failure that is not free.
    fn delay(&self) -> Duration {
        match self.count.checked_sub(FREE_FAILURES) {
            None => Duration::ZERO,
            Some(over) => Duration::from_secs(1 << over.min(16)).min(MAX_DELAY),
        }
    }
}

/// An IPv6 subscriber owns a whole /64 and could guess from each of its addresses.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6((address.to_bits() & !u128::from(u64::MAX)).into()),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 7));

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

    #[test]
    fn wrong_passwords_make_an_address_wait_longer_and_longer() {
        let logins = Logins::default();
        let now = Instant::now();
        let delays: Vec<_> = (0..14)
            .map(|_| {
                logins.failed(PEER, now);
                logins.delay(PEER, now).map_or(0, |delay| delay.as_secs())
            })
            .collect();
        assert_eq!(delays, [0, 0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]);
        assert_eq!(logins.delay("192.0.2.8".parse().unwrap(), now), None, "another address");
        assert_eq!(logins.delay(PEER, now + MAX_DELAY), None);
        logins.failed(PEER, now + FORGET * 2);
        assert_eq!(logins.delay(PEER, now + FORGET * 2), None, "forgotten");
        logins.succeeded(PEER);
        assert_eq!(logins.delay(PEER, now), None);
    }

    #[test]
    fn addresses_of_one_ipv6_network_count_as_one_and_the_table_is_bounded() {
        let logins = Logins::default();
        let now = Instant::now();
        for host in 0..4u128 {
            logins.failed(IpAddr::V6((0x2001_0db8_u128 << 96 | host).into()), now);
        }
        assert!(logins.delay(IpAddr::V6((0x2001_0db8_u128 << 96 | 99).into()), now).is_some());
        for host in 0..2 * MAX_ADDRESSES as u32 {
            logins.failed(IpAddr::V4(host.into()), now + Duration::from_secs(1));
        }
        assert_eq!(logins.inner.lock().failures.len(), MAX_ADDRESSES);
    }
}
