//! The common name of a certificate's subject (RFC 5280 §4.1.2.6), which names the client where a listener says so.

use super::validity::{CONTEXT_0, INTEGER, SEQUENCE, element};

const OBJECT_IDENTIFIER: u8 = 0x06;
const UTF8_STRING: u8 = 0x0c;
const PRINTABLE_STRING: u8 = 0x13;
const IA5_STRING: u8 = 0x16;
const SET: u8 = 0x31;
/// id-at-commonName, 2.5.4.3.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];

/// The first common name of the DER certificate's subject; `None` where there is none, it is empty, holds control
/// characters or is in none of the alphabets in use today.
pub fn common_name(certificate: &[u8]) -> Option<&str> {
    let (certificate, _) = element(certificate, SEQUENCE)?;
    let (mut fields, _) = element(certificate, SEQUENCE)?;
    // version [0] is absent in a version 1 certificate.
    if let Some((_, rest)) = element(fields, CONTEXT_0) {
        fields = rest;
    }
    // Serial number, signature algorithm, issuer, validity.
    for skipped in [INTEGER, SEQUENCE, SEQUENCE, SEQUENCE] {
        (_, fields) = element(fields, skipped)?;
    }
    let (mut subject, _) = element(fields, SEQUENCE)?;
    while let Some((mut attributes, rest)) = element(subject, SET) {
        while let Some((attribute, rest)) = element(attributes, SEQUENCE) {
            let (kind, value) = element(attribute, OBJECT_IDENTIFIER)?;
            if kind == COMMON_NAME {
                let text = [UTF8_STRING, PRINTABLE_STRING, IA5_STRING].iter().find_map(|tag| element(value, *tag));
                let text = text.and_then(|(text, _)| std::str::from_utf8(text).ok());
                return text.filter(|text| !text.is_empty() && !text.contains(char::is_control));
            }
            attributes = rest;
        }
        subject = rest;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(distinguished: &[(rcgen::DnType, rcgen::DnValue)]) -> Vec<u8> {
        let mut params = rcgen::CertificateParams::new(vec!["san".to_owned()]).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        for (kind, value) in distinguished {
            params.distinguished_name.push(kind.clone(), value.clone());
        }
        params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn the_common_name_is_found_among_the_subject_s_attributes() {
        use rcgen::{DnType, DnValue};
        let utf8 = |text: &str| DnValue::Utf8String(text.into());
        let check = |distinguished: &[(DnType, DnValue)], expected| {
            assert_eq!(common_name(&certificate(distinguished)), expected, "{distinguished:?}");
        };
        check(&[(DnType::CommonName, utf8("pump-1"))], Some("pump-1"));
        check(&[(DnType::OrganizationName, utf8("Werk")), (DnType::CommonName, utf8("Prüfstand"))], Some("Prüfstand"));
        check(&[(DnType::CommonName, DnValue::PrintableString("p".try_into().unwrap()))], Some("p"));
        check(&[(DnType::OrganizationName, utf8("Werk"))], None);
        check(&[(DnType::CommonName, utf8("a\0b"))], None);
        check(&[(DnType::CommonName, utf8(""))], None);
    }

    #[test]
    fn no_prefix_of_a_certificate_panics() {
        let whole = certificate(&[(rcgen::DnType::CommonName, rcgen::DnValue::Utf8String("x".into()))]);
        assert!((0..whole.len()).all(|length| common_name(&whole[..length]).is_none()));
    }
}
