//! What only one part of the gateway may own: listen addresses, serial ports, connections to a bus, device names.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::report::Report;
use super::source::{Located, Span};

/// Something with one owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resource {
    TcpListen(SocketAddr),
    UdpListen(SocketAddr),
    SerialPort(PathBuf),
    /// A Modbus server's host and port; many accept one connection only.
    Bus(String),
}

/// Who wants what, and where that is written.
#[derive(Clone, Debug)]
pub struct Claim {
    pub resource: Resource,
    pub place: Span,
    /// As in "listener `local`".
    pub owner: String,
}

/// Names that must differ across sections: they stand in topics, metrics and the API.
#[derive(Debug, Default)]
pub(super) struct Names {
    pub adapters: Vec<Located<String>>,
    pub devices: Vec<Located<String>>,
}

/// A report for every claim that comes too late.
pub(super) fn conflicts(claims: &[Claim]) -> Vec<Report> {
    let mut reports = Vec::new();
    for (index, claim) in claims.iter().enumerate() {
        let Some(first) = claims[..index].iter().find(|first| collide(&first.resource, &claim.resource)) else {
            continue;
        };
        let (what, help) = match &claim.resource {
            Resource::TcpListen(address) => (format!("{address} has two owners"), "give each its own port"),
            Resource::UdpListen(address) => (format!("UDP {address} has two owners"), "give each its own port"),
            Resource::SerialPort(path) => (
                format!("the serial port {} has two owners", path.display()),
                "several Modbus devices on one line belong under `devices` of one bus",
            ),
            Resource::Bus(peer) => {
                (format!("{peer} has two owners"), "put all devices behind this address under `devices` of one bus")
            }
        };
        reports.push(
            Report::error(claim.place, what)
                .label(format!("also wanted by {}", claim.owner))
                .related(first.place, format!("owned by {}", first.owner))
                .help(help),
        );
    }
    reports
}

fn collide(a: &Resource, b: &Resource) -> bool {
    match (a, b) {
        (Resource::TcpListen(a), Resource::TcpListen(b)) | (Resource::UdpListen(a), Resource::UdpListen(b)) => {
            // Port 0 lets the system choose; an unspecified address takes the port on every address.
            let same_ip = a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified();
            a.port() != 0 && a.port() == b.port() && same_ip
        }
        (a, b) => a == b,
    }
}

/// The device a path leads to: `/dev/serial/by-id/…` and `/dev/ttyUSB0` may be the same one.
pub(super) fn same_device(path: &std::path::Path) -> PathBuf {
    std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf())
}
