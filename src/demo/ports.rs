//! The demo's ports on 127.0.0.1: the usual ones where they are free, others where they are not.

use std::io;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};

use super::Options;

const LOOPBACK: Ipv4Addr = Ipv4Addr::LOCALHOST;

#[derive(Clone, Copy, Debug)]
pub struct Ports {
    pub mqtt: u16,
    pub mqttsn: u16,
    pub web: u16,
    pub cloud: u16,
}

impl Ports {
    /// The ports, and what to say about those that are not the usual ones.
    pub async fn choose(options: &Options) -> io::Result<(Self, Vec<String>)> {
        let mut notices = Vec::new();
        let mut choose = |what: &str, usual: u16, free: fn(u16) -> io::Result<u16>| {
            if options.any_ports {
                return free(0);
            }
            match free(usual) {
                Ok(port) => Ok(port),
                Err(_) => {
                    let port = free(0)?;
                    notices.push(format!("Port {usual} is taken, so {what} is on {port}."));
                    Ok(port)
                }
            }
        };
        let ports = Self {
            mqtt: choose("the broker", options.mqtt_port.unwrap_or(1883), free_tcp)?,
            mqttsn: choose("MQTT-SN", 1884, free_udp)?,
            web: choose("the web UI", options.web_port.unwrap_or(8080), free_tcp)?,
            cloud: choose("the cloud", 8883, free_tcp)?,
        };
        Ok((ports, notices))
    }
}

/// The port if it is free; any free one for 0. Another program may take it before the gateway does; then the gateway
/// says so.
fn free_tcp(port: u16) -> io::Result<u16> {
    Ok(TcpListener::bind((LOOPBACK, port))?.local_addr()?.port())
}

fn free_udp(port: u16) -> io::Result<u16> {
    Ok(UdpSocket::bind((LOOPBACK, port))?.local_addr()?.port())
}
