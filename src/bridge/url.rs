//! The address of an upstream: `mqtt://host`, `mqtts://host:port`, `wss://host/path`. Pure.

use std::fmt;

use thiserror::Error;

/// Where an upstream is reached, and whether over TLS.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Url {
    pub scheme: Scheme,
    /// A DNS name or an IP address; an IPv6 address without its brackets.
    pub host: String,
    pub port: u16,
    /// What WebSocket asks for, from `/` on; empty for the others.
    pub path: String,
}

/// How bytes travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// `mqtt://`: TCP, readable to everybody on the way.
    Tcp,
    /// `mqtts://`: TLS over TCP.
    Tls,
    /// `ws://`: WebSocket over TCP.
    WebSocket,
    /// `wss://`: WebSocket over TLS.
    SecureWebSocket,
}

impl Scheme {
    /// The name in a URL.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "mqtt",
            Self::Tls => "mqtts",
            Self::WebSocket => "ws",
            Self::SecureWebSocket => "wss",
        }
    }

    /// The port that IANA has registered for it.
    pub fn default_port(self) -> u16 {
        match self {
            Self::Tcp => 1883,
            Self::Tls => 8883,
            Self::WebSocket => 80,
            Self::SecureWebSocket => 443,
        }
    }

    pub fn is_tls(self) -> bool {
        matches!(self, Self::Tls | Self::SecureWebSocket)
    }

    pub fn is_web_socket(self) -> bool {
        matches!(self, Self::WebSocket | Self::SecureWebSocket)
    }
}

impl Url {
    /// Parses what an operator writes: `mqtt://HOST[:PORT]`, `mqtts://HOST[:PORT]`, `ws://HOST[:PORT]/PATH` or
    /// `wss://HOST[:PORT]/PATH`.
    ///
    /// # Errors
    /// [`UrlError`] says what to write instead.
    pub fn parse(text: &str) -> Result<Self, UrlError> {
        let (scheme, rest) = text.split_once("://").ok_or(UrlError::NoScheme)?;
        let scheme = match scheme.to_ascii_lowercase().as_str() {
            "mqtt" => Scheme::Tcp,
            "mqtts" => Scheme::Tls,
            "tcp" => return Err(UrlError::Scheme { given: "tcp", instead: "mqtt" }),
            "ssl" => return Err(UrlError::Scheme { given: "ssl", instead: "mqtts" }),
            "tls" => return Err(UrlError::Scheme { given: "tls", instead: "mqtts" }),
            "ws" => Scheme::WebSocket,
            "wss" => Scheme::SecureWebSocket,
            _ => return Err(UrlError::UnknownScheme),
        };
        if rest.contains('@') {
            return Err(UrlError::Credentials);
        }
        let (rest, path) = match rest.find('/').filter(|_| scheme.is_web_socket()) {
            Some(slash) => rest.split_at(slash),
            None if scheme.is_web_socket() => (rest, "/"),
            None => (rest.strip_suffix('/').unwrap_or(rest), ""),
        };
        if path.contains(|c: char| c == '#' || !c.is_ascii_graphic()) {
            return Err(UrlError::WebPath);
        }
        if rest.contains(['/', '?', '#']) {
            return Err(UrlError::Path);
        }
        let (host, port) = host_and_port(rest)?;
        Ok(Self { scheme, host, port: port.unwrap_or(scheme.default_port()), path: path.into() })
    }

    /// `HOST:PORT`, an IPv6 address in brackets.
    pub fn authority(&self) -> String {
        let (open, close) = if self.host.contains(':') { ("[", "]") } else { ("", "") };
        format!("{open}{}{close}:{}", self.host, self.port)
    }
}

/// Takes `HOST[:PORT]` apart; an IPv6 address stands in brackets, which are taken off.
pub(super) fn host_and_port(text: &str) -> Result<(String, Option<u16>), UrlError> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or(UrlError::Host)?;
            host.parse::<std::net::Ipv6Addr>().map_err(|_| UrlError::Host)?;
            (host, port.strip_prefix(':').or(port.is_empty().then_some("")).ok_or(UrlError::Host)?)
        }
        None => text.split_once(':').unwrap_or((text, "")),
    };
    if port.contains(':') {
        return Err(UrlError::Brackets);
    }
    if host.is_empty() || host.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(UrlError::Host);
    }
    let port = match port {
        "" if text.ends_with(':') => return Err(UrlError::Port),
        "" => None,
        port => Some(port.parse().ok().filter(|port| *port != 0).ok_or(UrlError::Port)?),
    };
    Ok((host.into(), port))
}

/// The spelling that [`Url::parse`] reads, always with its port.
impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", self.scheme.name(), self.authority(), self.path)
    }
}

/// What is wrong with an upstream's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum UrlError {
    #[error(
        "an upstream's address begins with `mqtt://` or, over TLS, `mqtts://`; with WebSocket, `ws://` or `wss://`"
    )]
    NoScheme,
    #[error("write `{instead}://` in place of `{given}://`")]
    Scheme { given: &'static str, instead: &'static str },
    #[error("the path of a WebSocket address is ASCII without spaces or `#`; write other characters as `%XX`")]
    WebPath,
    #[error("the scheme is none of `mqtt://`, `mqtts://`, `ws://` and `wss://`")]
    UnknownScheme,
    #[error(
        "user name and password do not belong into the address, which is shown in logs; use `username` and `password`"
    )]
    Credentials,
    #[error("an MQTT address ends after the port; it has no path, query or fragment")]
    Path,
    #[error("the host is neither a DNS name nor an IP address")]
    Host,
    #[error("an IPv6 address is written in brackets, as in `mqtts://[2001:db8::1]:8883`")]
    Brackets,
    #[error("the port is a number from 1 to 65535")]
    Port,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        let check = |text: &str, expected: &str| assert_eq!(Url::parse(text).unwrap().to_string(), expected, "{text}");
        check("mqtt://broker", "mqtt://broker:1883");
        check("MQTTS://broker.example.com/", "mqtts://broker.example.com:8883");
        check("mqtts://10.0.0.7:443", "mqtts://10.0.0.7:443");
        check("mqtt://[::1]", "mqtt://[::1]:1883");
        check("mqtts://[2001:db8::1]:8884", "mqtts://[2001:db8::1]:8884");
        check("ws://broker", "ws://broker:80/");
        check("wss://[::1]/mqtt?a=b", "wss://[::1]:443/mqtt?a=b");
        assert_eq!(Url::parse("mqtt://[::1]:7").unwrap().host, "::1");
    }

    #[test]
    fn a_wrong_address_says_what_to_write() {
        let check = |text: &str, expected| assert_eq!(Url::parse(text).unwrap_err(), expected, "{text}");
        check("broker:1883", UrlError::NoScheme);
        check("ssl://broker", UrlError::Scheme { given: "ssl", instead: "mqtts" });
        check("wss://broker/a b", UrlError::WebPath);
        check("ws://broker?x", UrlError::Path);
        check("http://broker", UrlError::UnknownScheme);
        check("mqtt://me:secret@broker", UrlError::Credentials);
        check("mqtt://broker/mqtt", UrlError::Path);
        check("mqtt://", UrlError::Host);
        check("mqtt://:1883", UrlError::Host);
        check("mqtt://bro ker", UrlError::Host);
        check("mqtt://[broker]", UrlError::Host);
        check("mqtt://[::1]1883", UrlError::Host);
        check("mqtt://2001:db8::1", UrlError::Brackets);
        check("mqtt://broker:", UrlError::Port);
        check("mqtt://broker:0", UrlError::Port);
        check("mqtt://broker:65536", UrlError::Port);
    }
}
