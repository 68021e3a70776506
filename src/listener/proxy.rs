//! The PROXY protocol, versions 1 and 2: what a proxy in front of a listener says about its client, before anything else
//! (HAProxy, "The PROXY protocol", 2020).
//!
//! Whoever may say it chooses the address that limits, rules and the log see: it is believed from trusted addresses only,
//! and nobody else is served.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt};

use crate::address::AddressRange;

/// What a header of version 2 begins with.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// The longest line of version 1, with its end (§2.1).
const MAX_LINE: usize = 107;
/// The longest rest of a header of version 2: addresses, and what proxies add about TLS.
const MAX_REST: usize = 2048;

/// The proxies before a listener.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proxies {
    /// Who is believed; empty: this machine.
    pub trusted: Vec<AddressRange>,
}

impl Proxies {
    /// Whether what comes from `address`, `None` for a Unix socket, is a proxy's word.
    pub(super) fn trust(&self, address: Option<IpAddr>) -> bool {
        let Some(address) = address else { return true };
        if self.trusted.is_empty() {
            return address.to_canonical().is_loopback();
        }
        self.trusted.iter().any(|range| range.contains(address))
    }
}

/// Reads the header and not a byte more. `None`: the proxy speaks for itself, or does not know for whom.
///
/// # Errors
/// The stream's own, or `InvalidData` where no header comes.
pub(super) async fn read_header(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<SocketAddr>> {
    let mut start = [0; SIGNATURE.len()];
    stream.read_exact(&mut start).await?;
    if start == SIGNATURE {
        let mut fixed = [0; 4];
        stream.read_exact(&mut fixed).await?;
        let [command, family, high, low] = fixed;
        let length = usize::from(u16::from_be_bytes([high, low]));
        if length > MAX_REST {
            return Err(invalid("the PROXY header is too long"));
        }
        let mut rest = vec![0; length];
        stream.read_exact(&mut rest).await?;
        return parse_binary(command, family, &rest).ok_or_else(|| invalid("the PROXY header is malformed"));
    }
    let mut line = start.to_vec();
    if !line.starts_with(b"PROXY ") {
        return Err(invalid("no PROXY header came; does the proxy send one, and do clients come through it?"));
    }
    while !line.ends_with(b"\r\n") {
        if line.len() == MAX_LINE {
            return Err(invalid("the PROXY header is too long"));
        }
        line.push(stream.read_u8().await?);
    }
    parse_line(&line).ok_or_else(|| invalid("the PROXY header is malformed"))
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Version 2 after its signature and length (§2.2).
fn parse_binary(command: u8, family: u8, rest: &[u8]) -> Option<Option<SocketAddr>> {
    match command {
        // LOCAL: what the proxy asks on its own behalf, such as whether we live.
        0x20 => return Some(None),
        0x21 => {}
        _ => return None,
    }
    let port = |at: usize| rest.get(at..at + 2).map(|port| u16::from_be_bytes([port[0], port[1]]));
    match family {
        // TCP over IPv4 and over IPv6: source, destination, and the port of each.
        0x11 => {
            let address: [u8; 4] = rest.get(..4)?.try_into().ok()?;
            rest.get(..12)?;
            Some(Some((Ipv4Addr::from(address), port(8)?).into()))
        }
        0x21 => {
            let address: [u8; 16] = rest.get(..16)?.try_into().ok()?;
            rest.get(..36)?;
            Some(Some((Ipv6Addr::from(address), port(32)?).into()))
        }
        // Unspecified, or a Unix socket at the proxy.
        0x00 | 0x31 => Some(None),
        _ => None,
    }
}

/// Version 1: `PROXY TCP4 SOURCE DESTINATION PORT PORT`, or `PROXY UNKNOWN …` (§2.1).
fn parse_line(line: &[u8]) -> Option<Option<SocketAddr>> {
    let line = std::str::from_utf8(line).ok()?.strip_suffix("\r\n")?;
    let words: Vec<_> = line.split(' ').collect();
    match words.as_slice() {
        ["PROXY", "UNKNOWN", ..] => Some(None),
        ["PROXY", family @ ("TCP4" | "TCP6"), source, destination, port, other_port] => {
            let (source, destination): (IpAddr, IpAddr) = (source.parse().ok()?, destination.parse().ok()?);
            let (port, _): (u16, u16) = (port.parse().ok()?, other_port.parse().ok()?);
            let is_4 = *family == "TCP4";
            (source.is_ipv4() == is_4 && destination.is_ipv4() == is_4).then(|| Some((source, port).into()))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V4: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x07\x0a\0\0\x01\x30\x39\x07\x5b";

    /// What the header in front of `rest` says, and that `rest` is still there.
    async fn read(header: &[u8]) -> Result<Option<SocketAddr>, String> {
        let bytes = [header, b"rest"].concat();
        let mut stream = &bytes[..];
        let read = read_header(&mut stream).await.map_err(|error| error.to_string())?;
        assert_eq!(stream, b"rest");
        Ok(read)
    }

    #[tokio::test]
    async fn headers_of_both_versions_name_the_client() {
        let check = async |header: &[u8], expected: Option<&str>| {
            assert_eq!(read(header).await, Ok(expected.map(|text| text.parse().unwrap())), "{header:x?}");
        };
        check(V4, Some("192.0.2.7:12345")).await;
        // With a TLV behind the addresses.
        let mut long = V4.to_vec();
        long[15] += 4;
        long.extend(b"\x04\0\x01x");
        check(&long, Some("192.0.2.7:12345")).await;
        let mut six = b"\r\n\r\n\0\r\nQUIT\n\x21\x21\0\x24".to_vec();
        six.extend(Ipv6Addr::from(0x2001_0db8_u128 << 96 | 7).octets());
        six.extend([0; 16]);
        six.extend(b"\x30\x39\x07\x5b");
        check(&six, Some("[2001:db8::7]:12345")).await;
        check(b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0", None).await;
        check(b"\r\n\r\n\0\r\nQUIT\n\x21\0\0\0", None).await;
        check(b"PROXY TCP4 192.0.2.7 10.0.0.1 12345 1883\r\n", Some("192.0.2.7:12345")).await;
        check(b"PROXY TCP6 2001:db8::7 2001:db8::1 1 1883\r\n", Some("[2001:db8::7]:1")).await;
        check(b"PROXY UNKNOWN\r\n", None).await;
        check(b"PROXY UNKNOWN ffff:: ffff:: 65535 65535\r\n", None).await;
    }

    #[tokio::test]
    async fn what_is_no_header_is_refused() {
        let line = [b"PROXY TCP4 ".as_slice(), &[b'1'; 200]].concat();
        let mut huge = V4.to_vec();
        huge[14] = 0x10;
        for bytes in [
            b"\x10\x0c\0\x04MQTT\x04\x02\0\0\0\0".as_slice(),
            b"PROXY TCP4 192.0.2.7 2001:db8::1 12345 1883\r\n",
            b"PROXY TCP4 192.0.2.7 10.0.0.1 12345\r\n",
            b"PROXY TCP4 192.0.2.7 10.0.0.1 12345 99999\r\n",
            b"PROXY UDP4 192.0.2.7 10.0.0.1 12345 1883\r\n",
            // Commands, families and lengths that there are not.
            b"\r\n\r\n\0\r\nQUIT\n\x22\x11\0\0",
            b"\r\n\r\n\0\r\nQUIT\n\x11\x11\0\0",
            b"\r\n\r\n\0\r\nQUIT\n\x21\x12\0\0",
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0b\xc0\0\x02\x07\x0a\0\0\x01\x30\x39\x07",
            &line,
            &huge,
        ] {
            assert!(read_header(&mut &bytes[..]).await.is_err(), "{bytes:x?}");
        }
        for length in 0..V4.len() {
            assert!(read_header(&mut &V4[..length]).await.is_err());
        }
    }

    #[test]
    fn only_trusted_proxies_are_believed() {
        let check = |trusted: &[&str], address: &str, expected: bool| {
            let proxies = Proxies { trusted: trusted.iter().map(|range| range.parse().unwrap()).collect() };
            assert_eq!(proxies.trust(Some(address.parse().unwrap())), expected, "{trusted:?} {address}");
            assert!(proxies.trust(None));
        };
        check(&[], "127.0.0.1", true);
        check(&[], "::1", true);
        check(&[], "10.0.0.1", false);
        check(&["10.0.0.0/8"], "10.0.0.1", true);
        check(&["10.0.0.0/8"], "::ffff:10.0.0.1", true);
        check(&["10.0.0.0/8"], "127.0.0.1", false);
    }
}
