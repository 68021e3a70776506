//! The line between gateway and upstream: this test's own proxy, or an Ethernet cable of the kernel's.

use std::net::SocketAddr;

use crate::cable::Cable;
use crate::proxy::Proxy;

/// What the line does with bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weather {
    Clear,
    /// 64 kbit/s.
    Slow,
    /// Nothing passes, and nobody is told.
    Blackhole,
}

/// Which directions of a dead connection are dead, seen from the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dead {
    Both,
    Incoming,
    Outgoing,
}

/// Who makes the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    Proxy,
    /// The kernel, between network namespaces.
    Netns,
}

pub enum Line {
    Proxy(Proxy),
    Cable(Cable),
}

impl Link {
    pub fn name(self) -> &'static str {
        match self {
            Self::Proxy => "proxy",
            Self::Netns => "netns",
        }
    }
}

impl Line {
    /// Where the gateway finds its upstream.
    pub fn address(&self) -> SocketAddr {
        match self {
            Self::Proxy(proxy) => proxy.address,
            Self::Cable(cable) => cable.upstream(),
        }
    }

    pub fn set(&self, weather: Weather) {
        match self {
            Self::Proxy(proxy) => proxy.set(weather),
            Self::Cable(cable) => cable.set(weather),
        }
    }

    /// Resets the connections that there are.
    pub fn reset(&self) {
        match self {
            Self::Proxy(proxy) => proxy.reset(),
            Self::Cable(cable) => cable.reset(),
        }
    }

    /// Nothing passes in the connections that there are, and neither end is told; new ones pass.
    pub fn half_open(&self, dead: Dead) {
        match self {
            Self::Proxy(proxy) => proxy.half_open(),
            Self::Cable(cable) => cable.half_open(dead),
        }
    }
}
