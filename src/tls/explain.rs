//! What a failed TLS handshake means, in words for the person who has to fix it.

use std::io;

use rustls::{AlertDescription, CertificateError, Error};

use super::ClientSettings;

/// A certificate may hold any number of names.
const MAX_NAMES_SHOWN: usize = 4;

/// Says why the handshake with `host` failed and what to do about it, from the client's side.
pub fn client_handshake(error: &io::Error, settings: &ClientSettings, host: &str) -> String {
    let Some(error) = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) else {
        return match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => format!(
                "{host} closed the connection during the TLS handshake; is this its TLS port, and does it ask for a \
                 client certificate (`tls.certificate`)?"
            ),
            _ => format!("the connection broke during the TLS handshake: {error}"),
        };
    };
    match error {
        Error::InvalidCertificate(error) => certificate(error, settings, host),
        Error::AlertReceived(alert) => alert_received(*alert, settings, host),
        Error::InvalidMessage(_) => {
            format!("{host} does not speak TLS on this port; use its TLS port (often 8883), or `mqtt://` without TLS")
        }
        error => format!("TLS with {host} failed: {error}"),
    }
}

/// Says what it means that the server ended a connection with an alert; `None` where `error` is something else.
pub fn alert(error: &io::Error, settings: &ClientSettings, host: &str) -> Option<String> {
    match error.get_ref()?.downcast_ref::<Error>()? {
        Error::AlertReceived(alert) => Some(alert_received(*alert, settings, host)),
        _ => None,
    }
}

/// The server's certificate was not accepted by us.
fn certificate(error: &CertificateError, settings: &ClientSettings, host: &str) -> String {
    let trusted = match &settings.ca {
        Some(path) => path.display().to_string(),
        None => "the system's root certificates".into(),
    };
    match error {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => format!(
            "the certificate of {host} is signed by an authority that is not in {trusted}; name the file with that \
             authority's certificate in `tls.ca`"
        ),
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            let wanted = settings.server_name.as_deref().unwrap_or(host);
            let presented = match error {
                CertificateError::NotValidForNameContext { presented, .. } if !presented.is_empty() => {
                    format!(" (it is for {})", names(presented))
                }
                _ => String::new(),
            };
            format!(
                "the certificate of {host} is not for the name `{wanted}`{presented}; connect by one of its names or set \
                 `tls.server_name`"
            )
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => format!(
            "the certificate of {host} has expired; it must be renewed there, unless this gateway's clock is wrong"
        ),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            format!("the certificate of {host} is not valid yet; most likely this gateway's clock is behind, check NTP")
        }
        CertificateError::Revoked => format!("the certificate of {host} has been revoked; it must be replaced there"),
        error if error.to_string().contains("CaUsedAsEndEntity") => format!(
            "{host} shows a certificate that is itself an authority; give it a certificate of its own, signed by the \
             authority in `tls.ca`"
        ),
        error => format!("the certificate of {host} cannot be accepted: {error}"),
    }
}

/// The server refused us.
fn alert_received(alert: AlertDescription, settings: &ClientSettings, host: &str) -> String {
    let own = settings.identity.as_ref().map(|identity| identity.certificate.display().to_string());
    match (alert, own) {
        (AlertDescription::CertificateRequired, _) | (AlertDescription::HandshakeFailure, None) => {
            format!("{host} asks for a client certificate; name it and its key in `tls.certificate` and `tls.key`")
        }
        (AlertDescription::CertificateExpired, Some(own)) => {
            format!("{host} says that our client certificate {own} has expired; replace it, no restart is needed")
        }
        (AlertDescription::UnknownCA, Some(own)) => format!(
            "{host} does not know the authority of our client certificate {own}; use one that it trusts, with its \
             intermediates in the same file"
        ),
        (
            AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateRevoked
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::AccessDenied
            | AlertDescription::DecryptError,
            Some(own),
        ) => format!(
            "{host} refuses our client certificate {own} ({alert:?}); check that it is registered and active there"
        ),
        (AlertDescription::UnrecognisedName, _) => {
            format!("{host} does not serve the name we ask for; set `tls.server_name` to the name it expects")
        }
        (AlertDescription::NoApplicationProtocol, _) => {
            format!(
                "{host} refuses the application protocols offered in `tls.alpn`; check what it expects on this port"
            )
        }
        (AlertDescription::ProtocolVersion, _) => {
            format!("{host} speaks neither TLS 1.2 nor 1.3; it must be updated")
        }
        (alert, _) => format!("{host} ended the TLS handshake with the alert {alert:?}"),
    }
}

/// The names in a certificate, without what rustls writes around them; `DnsName("a")` is `a`.
fn names(presented: &[String]) -> String {
    let plain = |name: &String| {
        let inner = name.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')')).unwrap_or(name);
        format!("`{}`", inner.trim_matches('"'))
    };
    let mut text = presented.iter().take(MAX_NAMES_SHOWN).map(plain).collect::<Vec<_>>().join(", ");
    if let Some(more @ 1..) = presented.len().checked_sub(MAX_NAMES_SHOWN) {
        text.push_str(&format!(" and {more} more"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_a_certificate_are_shown_plainly_and_not_without_end() {
        let check = |presented: &[&str], expected: &str| {
            let presented: Vec<String> = presented.iter().map(|name| (*name).to_owned()).collect();
            assert_eq!(names(&presented), expected);
        };
        check(&["DnsName(\"a.example\")", "IpAddress(127.0.0.1)"], "`a.example`, `127.0.0.1`");
        check(&["a", "b", "c", "d", "e", "f"], "`a`, `b`, `c`, `d` and 2 more");
    }
}
