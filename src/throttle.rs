//! What one address may do: how often it may connect, how many connections it may have, how often it may guess a
//! password.
//!
//! Pure: addresses and `now` in, decisions out. Addresses behind one NAT share a budget, and an IPv6 network of 64 bits
//! counts as one address, for its owner has all of them. The tables are bounded: the address that was quiet for longest
//! makes room.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Addresses remembered for their connections, and as many for their wrong passwords.
const MAX_ADDRESSES: usize = 4096;
/// The wait after the first wrong password that is not free; it doubles with each further one.
const FIRST_DELAY: Duration = Duration::from_secs(1);
/// An address's wrong passwords are forgotten after this long without another, or after its longest wait if that is
/// longer.
const FORGET: Duration = Duration::from_secs(900);

/// What one address may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressLimits {
    /// Connections at a time.
    pub max_connections: usize,
    /// Connections per second in the long run; 0 for no limit.
    pub connection_rate: u32,
    /// Connections at once, from an address that was quiet; at least 1.
    pub connection_burst: u32,
    /// Wrong passwords before the address has to wait.
    pub login_failures: u32,
    /// The longest wait between two guesses; zero for no waits.
    pub max_login_delay: Duration,
    /// Whether the limits hold for this machine too. A proxy on it has the connections of everybody.
    pub limit_loopback: bool,
}

impl Default for AddressLimits {
    fn default() -> Self {
        Self {
            max_connections: 5000,
            connection_rate: 200,
            connection_burst: 2000,
            login_failures: 5,
            max_login_delay: Duration::from_secs(300),
            limit_loopback: false,
        }
    }
}

impl AddressLimits {
    /// What `address` is counted under; `None` for who is not limited, and for a Unix socket, whose peers have none.
    pub fn network(&self, address: Option<IpAddr>) -> Option<Network> {
        let address = address?.to_canonical();
        if address.is_loopback() && !self.limit_loopback {
            return None;
        }
        Some(Network(match address {
            IpAddr::V6(address) => IpAddr::V6((address.to_bits() & !u128::from(u64::MAX)).into()),
            v4 => v4,
        }))
    }
}

/// An address as far as it is told apart from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Network(IpAddr);

/// How often each address has connected of late.
#[derive(Debug)]
pub struct Rates {
    limits: AddressLimits,
    buckets: Mutex<HashMap<Network, Bucket>>,
}

/// A token bucket: what may still be spent, which grows with time up to a capacity. Who holds many keeps rate and
/// capacity once for all of them.
#[derive(Debug)]
pub struct Bucket {
    /// As of `filled`; below zero where more was spent than there was.
    pub level: f64,
    pub filled: Instant,
}

impl Bucket {
    /// Adds what has come since the last time; what there is now.
    pub fn fill(&mut self, now: Instant, per_second: f64, capacity: f64) -> f64 {
        let gained = now.saturating_duration_since(self.filled).as_secs_f64() * per_second;
        self.level = (self.level + gained).min(capacity);
        self.filled = now;
        self.level
    }
}

impl Rates {
    pub fn new(limits: AddressLimits) -> Self {
        Self { limits, buckets: Mutex::default() }
    }

    /// Counts a connection from `address`; false for one too many.
    pub fn admit(&self, address: Option<IpAddr>, now: Instant) -> bool {
        let Some(network) = self.limits.network(address).filter(|_| self.limits.connection_rate > 0) else {
            return true;
        };
        let (rate, burst) = (f64::from(self.limits.connection_rate), f64::from(self.limits.connection_burst.max(1)));
        let mut buckets = self.buckets.lock();
        if !buckets.contains_key(&network) {
            make_room(&mut buckets, |bucket| bucket.filled);
        }
        let bucket = buckets.entry(network).or_insert(Bucket { level: burst, filled: now });
        let admitted = bucket.fill(now, rate, burst) >= 1.0;
        if admitted {
            bucket.level -= 1.0;
        }
        admitted
    }
}

/// How often each address has guessed a password wrong of late.
#[derive(Debug)]
pub struct Guesses {
    limits: AddressLimits,
    failures: Mutex<HashMap<Network, Failures>>,
}

#[derive(Debug)]
struct Failures {
    count: u32,
    last: Instant,
}

impl Guesses {
    pub fn new(limits: AddressLimits) -> Self {
        Self { limits, failures: Mutex::default() }
    }

    /// How long `address` has to wait before its next guess; `None` when it may guess now.
    pub fn delay(&self, address: Option<IpAddr>, now: Instant) -> Option<Duration> {
        let network = self.limits.network(address)?;
        let failures = self.failures.lock();
        let failures = failures.get(&network)?;
        let left = (failures.last + self.delay_after(failures.count)).saturating_duration_since(now);
        (!left.is_zero()).then_some(left)
    }

    /// Notes a wrong password. Returns the wait that begins with it.
    pub fn failed(&self, address: Option<IpAddr>, now: Instant) -> Duration {
        let Some(network) = self.limits.network(address) else { return Duration::ZERO };
        let mut failures = self.failures.lock();
        let forget = FORGET.max(self.limits.max_login_delay);
        if failures.get(&network).is_none_or(|known| now.saturating_duration_since(known.last) >= forget) {
            failures.remove(&network);
            make_room(&mut failures, |known| known.last);
        }
        let known = failures.entry(network).or_insert(Failures { count: 0, last: now });
        known.count = known.count.saturating_add(1);
        known.last = now;
        self.delay_after(known.count)
    }

    /// A good password makes good.
    pub fn succeeded(&self, address: Option<IpAddr>) {
        if let Some(network) = self.limits.network(address) {
            self.failures.lock().remove(&network);
        }
    }

    /// 1, 2, 4, … seconds, from the first failure that is not free.
    fn delay_after(&self, failures: u32) -> Duration {
        match failures.checked_sub(self.limits.login_failures.saturating_add(1)) {
            None => Duration::ZERO,
            Some(doublings) => (FIRST_DELAY * (1 << doublings.min(20))).min(self.limits.max_login_delay),
        }
    }
}

fn make_room<T>(table: &mut HashMap<Network, T>, used: impl Fn(&T) -> Instant) {
    if table.len() >= MAX_ADDRESSES {
        let quietest = table.iter().min_by_key(|(_, entry)| used(entry)).map(|(network, _)| *network);
        quietest.and_then(|network| table.remove(&network));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: Option<IpAddr> = Some(IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 7)));

    fn address(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    #[test]
    fn an_address_may_open_a_burst_and_then_so_many_per_second() {
        let limits = AddressLimits { connection_rate: 2, connection_burst: 3, ..AddressLimits::default() };
        let rates = Rates::new(limits);
        let start = Instant::now();
        let at = |millis| rates.admit(PEER, start + Duration::from_millis(millis));
        assert_eq!([at(0), at(0), at(0)], [true; 3]);
        assert_eq!([at(0), at(400)], [false; 2]);
        assert_eq!([at(500), at(500)], [true, false]);
        assert!(rates.admit(address("192.0.2.8"), start), "another address");
        assert!(![at(60_000), at(60_000), at(60_000), at(60_000)][3], "no more than a burst is saved");
    }

    #[test]
    fn no_rate_means_no_limit_and_this_machine_has_none_by_default() {
        let start = Instant::now();
        let strict = AddressLimits { connection_rate: 1, connection_burst: 1, ..AddressLimits::default() };
        let check = |limits: &AddressLimits, peer: Option<IpAddr>| {
            let rates = Rates::new(limits.clone());
            (0..3).all(|_| rates.admit(peer, start))
        };
        assert!(check(&AddressLimits { connection_rate: 0, ..strict.clone() }, PEER));
        assert!(check(&strict, address("127.0.0.1")) && check(&strict, address("::ffff:127.0.0.1")));
        assert!(check(&strict, None), "a Unix socket's peers have no address");
        assert!(!check(&strict, PEER));
        assert!(!check(&AddressLimits { limit_loopback: true, ..strict }, address("::1")));
    }

    #[test]
    fn wrong_passwords_make_an_address_wait_longer_and_longer_up_to_a_bound() {
        let guesses = Guesses::new(AddressLimits { login_failures: 2, ..AddressLimits::default() });
        let now = Instant::now();
        let delays: Vec<_> = (0..13).map(|_| guesses.failed(PEER, now).as_secs()).collect();
        assert_eq!(delays, [0, 0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        assert_eq!(guesses.delay(PEER, now + Duration::from_secs(299)), Some(Duration::from_secs(1)));
        assert_eq!(guesses.delay(PEER, now + Duration::from_secs(300)), None);
        assert_eq!(guesses.delay(address("192.0.2.8"), now), None, "another address");
        assert_eq!(guesses.failed(PEER, now + FORGET), Duration::ZERO, "forgotten");
        guesses.failed(PEER, now + FORGET);
        guesses.succeeded(PEER);
        assert_eq!(guesses.failed(PEER, now + FORGET), Duration::ZERO, "a good password makes good");
    }

    #[test]
    fn a_longest_wait_of_zero_means_no_waits() {
        let limits = AddressLimits { login_failures: 0, max_login_delay: Duration::ZERO, ..AddressLimits::default() };
        let guesses = Guesses::new(limits);
        assert_eq!(guesses.failed(PEER, Instant::now()), Duration::ZERO);
        assert_eq!(guesses.delay(PEER, Instant::now()), None);
    }

    #[test]
    fn addresses_of_one_ipv6_network_count_as_one_and_the_tables_are_bounded() {
        let guesses = Guesses::new(AddressLimits { login_failures: 1, ..AddressLimits::default() });
        let now = Instant::now();
        let rates = Rates::new(AddressLimits::default());
        guesses.failed(address("2001:db8::1"), now);
        assert_eq!(guesses.failed(address("2001:db8::2"), now), FIRST_DELAY);
        let later = now + Duration::from_secs(1);
        for host in 0..2 * MAX_ADDRESSES as u32 {
            guesses.failed(Some(IpAddr::V4(host.into())), later);
            rates.admit(Some(IpAddr::V4(host.into())), later);
        }
        assert_eq!(guesses.failures.lock().len(), MAX_ADDRESSES);
        assert_eq!(rates.buckets.lock().len(), MAX_ADDRESSES);
    }
}
