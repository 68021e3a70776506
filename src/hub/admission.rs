//! Which connections are taken at all, before anybody knows whose they are: the places of the whole gateway, of each
//! address, and how fast addresses may come and guess passwords. All listeners share it.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use thiserror::Error;

use crate::throttle::{AddressLimits, Guesses, Network, Rates};

/// The door of the gateway.
#[derive(Debug)]
pub struct Admission {
    limits: AddressLimits,
    max_connections: usize,
    rates: Rates,
    guesses: Guesses,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    total: usize,
    networks: HashMap<Network, usize>,
}

/// Why a connection is refused unheard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
pub enum Refused {
    #[error("the gateway has as many connections as `limits.global_max_connections` allows")]
    GatewayFull,
    #[error("the address has as many connections as `limits.max_connections_per_address` allows")]
    AddressFull,
    #[error("the address opens more connections per second than `limits.max_connection_rate` allows")]
    TooFast,
}

/// The place of one connection; dropping it gives the place back.
#[derive(Debug)]
pub struct Place {
    admission: Arc<Admission>,
    network: Option<Network>,
}

impl Admission {
    pub(super) fn new(limits: AddressLimits, max_connections: usize) -> Arc<Self> {
        let (rates, guesses) = (Rates::new(limits.clone()), Guesses::new(limits.clone()));
        Arc::new(Self { limits, max_connections, rates, guesses, open: Mutex::default() })
    }

    /// Takes a place for a connection from `address`; `None` for a Unix socket.
    ///
    /// # Errors
    /// [`Refused`] names the limit.
    pub fn admit(self: &Arc<Self>, address: Option<IpAddr>, now: Instant) -> Result<Place, Refused> {
        if !self.rates.admit(address, now) {
            return Err(Refused::TooFast);
        }
        let network = self.limits.network(address);
        let mut open = self.open.lock();
        if open.total >= self.max_connections {
            return Err(Refused::GatewayFull);
        }
        if let Some(network) = network {
            let count = open.networks.entry(network).or_default();
            if *count >= self.limits.max_connections {
                return Err(Refused::AddressFull);
            }
            *count += 1;
        }
        open.total += 1;
        Ok(Place { admission: self.clone(), network })
    }

    /// Wrong passwords of clients, by address.
    pub fn guesses(&self) -> &Guesses {
        &self.guesses
    }

    /// Connections open now, on all listeners.
    pub fn connections(&self) -> usize {
        self.open.lock().total
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.admission.open.lock();
        open.total -= 1;
        if let Some(network) = self.network
            && let Some(count) = open.networks.get_mut(&network)
        {
            *count -= 1;
            if *count == 0 {
                open.networks.remove(&network);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_counted_by_address_and_altogether_and_given_back() {
        let limits = AddressLimits { max_connections: 2, connection_rate: 0, ..AddressLimits::default() };
        let admission = Admission::new(limits, 4);
        let now = Instant::now();
        let admit = |address: &str| admission.admit(Some(address.parse().unwrap()), now);
        let first = admit("192.0.2.1").unwrap();
        let _second = admit("192.0.2.1").unwrap();
        assert_eq!(admit("192.0.2.1").unwrap_err(), Refused::AddressFull);
        let _local = [admit("127.0.0.1").unwrap(), admit("::1").unwrap()];
        assert_eq!(admit("192.0.2.2").unwrap_err(), Refused::GatewayFull);
        assert_eq!(admission.admit(None, now).unwrap_err(), Refused::GatewayFull);
        drop(first);
        assert_eq!(admission.connections(), 3);
        assert!(admit("192.0.2.1").is_ok());
        assert_eq!(admission.open.lock().networks.len(), 1);
    }
}
