//! Shared access signatures, the passwords of Azure IoT Hub: made from a key, good for a while. Pure.
//!
//! `SharedAccessSignature sr={resource}&sig={signature}&se={end}`: the signature is HMAC-SHA256 over the encoded resource
//! and the end in Unix seconds, a newline between them ("Control access to IoT Hub with shared access signatures").

use std::fmt::Write;
use std::time::Duration;

use data_encoding::BASE64;
use ring::hmac;

use super::url::Url;
use crate::clock::UnixMillis;
use crate::secret::Secret;

/// What tokens are made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sas {
    /// The device's key as Azure shows it, in base64.
    pub key: Secret,
    /// How long a token is good for. A new one is used well before its end.
    pub ttl: Duration,
    /// What it opens, with `{host}` for the upstream's host and `{client_id}` for the client id.
    pub resource: String,
    /// The name of the shared access policy whose key it is; none for a device's own.
    pub policy: Option<String>,
}

/// What a device's key opens.
pub const DEVICE: &str = "{host}/devices/{client_id}";

/// What IoT Hub wants for a user name.
const USER_NAME: &str = "{host}/{client_id}/?api-version=2021-04-12";

/// Part of a token's life after which the next one is made.
const RENEWED_AFTER: f64 = 0.8;

impl Sas {
    /// Whether the key can be used.
    pub fn has_key(&self) -> bool {
        BASE64.decode(self.key.reveal().trim().as_bytes()).is_ok_and(|key| !key.is_empty())
    }

    /// The password for `url`, made at `now`.
    pub(super) fn token(&self, url: &Url, client_id: &str, now: UnixMillis) -> String {
        let end = u64::try_from(now.0).unwrap_or(0).div_ceil(1000) + self.ttl.as_secs();
        let resource = escape(&fill(&self.resource, url, client_id));
        // The settings were checked; a key that is none signs nothing that is accepted.
        let key = BASE64.decode(self.key.reveal().trim().as_bytes()).unwrap_or_default();
        let signed = format!("{resource}\n{end}");
        let signature = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &key), signed.as_bytes());
        let signature = escape(&BASE64.encode(signature.as_ref()));
        let mut token = format!("SharedAccessSignature sr={resource}&sig={signature}&se={end}");
        if let Some(policy) = &self.policy {
            token.push_str("&skn=");
            token.push_str(&escape(policy));
        }
        token
    }

    /// How long after a token was made the connection is made anew with the next one.
    pub(super) fn renewed_after(&self) -> Duration {
        self.ttl.mul_f64(RENEWED_AFTER)
    }
}

/// The user name that goes with a token where the operator names none.
pub(super) fn user_name(url: &Url, client_id: &str) -> String {
    fill(USER_NAME, url, client_id)
}

fn fill(template: &str, url: &Url, client_id: &str) -> String {
    template.replace("{host}", &url.host).replace("{client_id}", client_id)
}

/// Percent-encodes all but RFC 3986's unreserved characters.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len() * 2);
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            escaped.push(byte.into());
        } else {
            let _ = write!(escaped, "%{byte:02X}");
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sas(resource: &str, policy: Option<&str>) -> Sas {
        let key: Vec<u8> = (0..32).collect();
        Sas {
            key: Secret::new(BASE64.encode(&key)),
            ttl: Duration::from_secs(3600),
            resource: resource.into(),
            policy: policy.map(Into::into),
        }
    }

    /// The expected tokens were made with Python's `hmac`, `base64` and `urllib.parse`.
    #[test]
    fn tokens_are_those_that_other_implementations_make() {
        let url = Url::parse("mqtts://hub-1.azure-devices.net").unwrap();
        let check = |sas: Sas, client_id: &str, expected: &str| {
            assert_eq!(sas.token(&url, client_id, UnixMillis(1_794_996_399_001)), expected);
        };
        check(
            sas(DEVICE, None),
            "plant-7",
            "SharedAccessSignature sr=hub-1.azure-devices.net%2Fdevices%2Fplant-7\
             &sig=qObsSELQ9z1oe9tKB5tvUgeu4Rf0pUaR13oF2cV2YK8%3D&se=1795000000",
        );
        check(
            sas(DEVICE, Some("gateway")),
            "plänt 7",
            "SharedAccessSignature sr=hub-1.azure-devices.net%2Fdevices%2Fpl%C3%A4nt%207\
             &sig=oFxPSEzJjfpnzqEazsnyjaCkmct0gqO2OtBG8sd8VRc%3D&se=1795000000&skn=gateway",
        );
        assert_eq!(user_name(&url, "plant-7"), "hub-1.azure-devices.net/plant-7/?api-version=2021-04-12");
        assert_eq!(sas(DEVICE, None).renewed_after(), Duration::from_secs(2880));
    }

    #[test]
    fn a_key_is_base64() {
        let check = |key: &str, expected: bool| {
            assert_eq!(Sas { key: Secret::new(key), ..sas(DEVICE, None) }.has_key(), expected, "{key}");
        };
        check("AAEC", true);
        check("AAEC\n", true);
        check("not base64", false);
        check("", false);
    }
}
