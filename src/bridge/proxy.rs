//! The way through an HTTP proxy: CONNECT (RFC 9110 §9.3.6), with a password or without (RFC 7617).

use std::fmt;

use data_encoding::BASE64;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::url::{Url, host_and_port};
use crate::secret::Secret;

/// The most that is read of a proxy's answer: its head; some add a page for people behind it.
const MAX_HEAD_BYTES: usize = 16 * 1024;

/// An HTTP proxy that is asked for a tunnel to the upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proxy {
    /// A DNS name or an IP address; an IPv6 address without its brackets.
    pub host: String,
    pub port: u16,
    pub login: Option<Login>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Login {
    pub user: String,
    pub password: Secret,
}

impl Proxy {
    /// Parses `http://[USER:PASSWORD@]HOST:PORT`; in user and password, `%XX` stands for a byte.
    ///
    /// # Errors
    /// [`ProxyError`] says what to write instead.
    pub fn parse(text: &str) -> Result<Self, ProxyError> {
        let (scheme, rest) = text.split_once("://").ok_or(ProxyError::Scheme)?;
        if !scheme.eq_ignore_ascii_case("http") {
            return Err(ProxyError::Scheme);
        }
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (login, place) = match rest.rsplit_once('@') {
            None => (None, rest),
            Some((login, place)) => {
                let (user, password) = login.split_once(':').ok_or(ProxyError::Login)?;
                let (user, password) = (unescape(user)?, unescape(password)?);
                if user.is_empty() || user.contains(':') {
                    return Err(ProxyError::Login);
                }
                (Some(Login { user, password: Secret::new(password) }), place)
            }
        };
        if place.contains(['/', '?', '#']) {
            return Err(ProxyError::Place);
        }
        let (host, port) = host_and_port(place).map_err(|_| ProxyError::Place)?;
        Ok(Self { host, port: port.ok_or(ProxyError::Place)?, login })
    }

    /// Asks for a tunnel to `url` on `stream`, which leads to the proxy.
    ///
    /// # Errors
    /// What the proxy answered, and what to do.
    ///
    /// # Cancel safety
    /// Close the stream if this is dropped.
    pub(super) async fn tunnel(
        &self,
        stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
        url: &Url,
    ) -> Result<(), String> {
        let broken = |error| format!("the connection to the proxy {self} broke ({error})");
        stream.write_all(self.request(url).as_bytes()).await.map_err(broken)?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            // Byte by byte: what comes behind the head is the upstream's. It is short and comes once a connection.
            let byte = stream.read_u8().await.map_err(|error| match error.kind() {
                std::io::ErrorKind::UnexpectedEof => {
                    format!("the proxy {self} closed the connection instead of answering; is it an HTTP proxy?")
                }
                _ => broken(error),
            })?;
            head.push(byte);
            if head.len() > MAX_HEAD_BYTES || !b"HTTP/1.".starts_with(&head[..head.len().min(7)]) {
                return Err(format!("the proxy {self} does not answer in HTTP; is it an HTTP proxy?"));
            }
        }
        let status = String::from_utf8_lossy(&head);
        let status = status.lines().next().and_then(|line| line.split_once(' ')).map_or("", |(_, status)| status);
        self.check_status(status, url)
    }

    fn request(&self, url: &Url) -> String {
        let target = url.authority();
        let mut request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n");
        if let Some(Login { user, password }) = &self.login {
            let credentials = BASE64.encode(format!("{user}:{}", password.reveal()).as_bytes());
            request.push_str(&format!("Proxy-Authorization: Basic {credentials}\r\n"));
        }
        request.push_str("\r\n");
        request
    }

    fn check_status(&self, status: &str, url: &Url) -> Result<(), String> {
        let target = url.authority();
        let shown: String = status.chars().filter(|c| !c.is_control()).take(80).collect();
        let advice = match (status.get(..3).unwrap_or_default(), &self.login) {
            (code, _) if code.starts_with('2') => return Ok(()),
            // tinyproxy says 401 where it should be 407.
            ("401" | "407", Some(Login { user, .. })) => format!("check the password of the user `{user}` in `proxy`"),
            ("401" | "407", None) => {
                "it wants a login; write `proxy: http://USER:PASSWORD@HOST:PORT`, best in a file of its own".into()
            }
            ("403" | "405", _) => format!(
                "it does not let this gateway through to {target}; many allow port 443 only, where most clouds take MQTT \
                 over WebSocket (`wss://`)"
            ),
            ("500" | "502" | "503" | "504", _) => {
                format!("it cannot reach {target}; check the address, and the proxy's own network")
            }
            _ => "its log may say more".into(),
        };
        Err(format!("the proxy {self} refuses the way to {target}: {shown}; {advice}"))
    }
}

/// Without the login.
impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (open, close) = if self.host.contains(':') { ("[", "]") } else { ("", "") };
        write!(f, "http://{open}{}{close}:{}", self.host, self.port)
    }
}

/// What is wrong with a proxy's address. The address itself is left out: it may hold a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ProxyError {
    #[error("a proxy's address begins with `http://`; the way to it is plain HTTP, whatever goes through it")]
    Scheme,
    #[error("before the `@` stand a user and a password, as in `http://USER:PASSWORD@HOST:PORT`")]
    Login,
    #[error("write `%XX` with two hexadecimal digits for a special character, and `%25` for `%` itself")]
    Escape,
    #[error("the address ends with host and port, as in `http://proxy.example:3128`")]
    Place,
}

/// Puts bytes in place of `%XX`.
fn unescape(text: &str) -> Result<String, ProxyError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|byte| char::from(byte).to_digit(16)).ok_or(ProxyError::Escape);
        bytes.push((digit()? * 16 + digit()?) as u8);
    }
    let text = String::from_utf8(bytes).map_err(|_| ProxyError::Escape)?;
    if text.contains(char::is_control) { Err(ProxyError::Escape) } else { Ok(text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_shown_without_the_password() {
        let check = |text: &str, shown: &str, login: Option<(&str, &str)>| {
            let proxy = Proxy::parse(text).unwrap();
            assert_eq!(proxy.to_string(), shown, "{text}");
            let found = proxy.login.as_ref().map(|login| (login.user.as_str(), login.password.reveal()));
            assert_eq!(found, login, "{text}");
            assert!(login.is_none_or(|(_, password)| !format!("{proxy:?}").contains(password)));
        };
        check("http://proxy:3128", "http://proxy:3128", None);
        check("HTTP://[::1]:8080/", "http://[::1]:8080", None);
        check("http://me:secret@proxy:80", "http://proxy:80", Some(("me", "secret")));
        check("http://me:a@b%3Ac%25@proxy:80", "http://proxy:80", Some(("me", "a@b:c%")));
    }

    #[test]
    fn a_wrong_address_says_what_to_write() {
        let check = |text: &str, expected| assert_eq!(Proxy::parse(text).unwrap_err(), expected, "{text}");
        check("proxy:3128", ProxyError::Scheme);
        check("https://proxy:3128", ProxyError::Scheme);
        check("http://proxy", ProxyError::Place);
        check("http://proxy:3128/path", ProxyError::Place);
        check("http://me@proxy:3128", ProxyError::Login);
        check("http://:secret@proxy:3128", ProxyError::Login);
        check("http://me:100%@proxy:3128", ProxyError::Escape);
        check("http://me:%0d%0a@proxy:3128", ProxyError::Escape);
    }

    /// The credentials are those of RFC 7617 §2.
    #[test]
    fn the_request_names_the_target_and_carries_the_login() {
        let proxy = Proxy::parse("http://Aladdin:open%20sesame@proxy:3128").unwrap();
        let request = proxy.request(&Url::parse("mqtts://[2001:db8::1]").unwrap());
        let expected = "CONNECT [2001:db8::1]:8883 HTTP/1.1\r\nHost: [2001:db8::1]:8883\r\n\
                        Proxy-Authorization: Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==\r\n\r\n";
        assert_eq!(request, expected);
    }

    #[tokio::test]
    async fn an_answer_is_taken_for_what_it_says_and_nothing_behind_it_is_lost() {
        let url = Url::parse("mqtt://broker").unwrap();
        let answered = async |proxy: &str, answer: &'static [u8]| {
            let (mut near, mut far) = tokio::io::duplex(64 * 1024);
            far.write_all(answer).await.unwrap();
            let proxy = Proxy::parse(proxy).unwrap();
            let result = proxy.tunnel(&mut near, &url).await;
            drop(far);
            let mut rest = Vec::new();
            near.read_to_end(&mut rest).await.unwrap();
            (result, rest)
        };
        let (plain, with_login) = ("http://proxy:3128", "http://me:secret@proxy:3128");
        let (result, rest) = answered(plain, b"HTTP/1.0 200 Connection established\r\nVia: x\r\n\r\nrest").await;
        assert_eq!((result, rest.as_slice()), (Ok(()), &b"rest"[..]));
        let fails = async |proxy: &str, answer: &'static [u8], expected: &str| {
            let error = answered(proxy, answer).await.0.unwrap_err();
            assert!(error.contains(expected) && !error.contains("secret"), "{error}");
        };
        let wants_login = b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n";
        fails(plain, wants_login, "407 Proxy Authentication Required; it wants a login").await;
        fails(with_login, wants_login, "check the password of the user `me`").await;
        fails(plain, b"HTTP/1.1 403 Filtered\r\n\r\n", "many allow port 443 only").await;
        fails(plain, b"HTTP/1.1 502 Bad\x07 Gateway\r\n\r\n", "502 Bad Gateway; it cannot reach broker:1883").await;
        fails(plain, b"HTTP/1.1\r\n\r\n", "refuses the way to broker:1883").await;
        fails(plain, b"\x20\x02\x00\x00", "does not answer in HTTP").await;
    }
}
