//! The subject of a certificate (RFC 5280 §4.1.2.6), which names the client where a listener says so.

use std::fmt::Write;

use super::validity::{CONTEXT_0, INTEGER, SEQUENCE, element};

const OBJECT_IDENTIFIER: u8 = 0x06;
const UTF8_STRING: u8 = 0x0c;
const PRINTABLE_STRING: u8 = 0x13;
const TELETEX_STRING: u8 = 0x14;
const IA5_STRING: u8 = 0x16;
const SET: u8 = 0x31;

/// Attribute types and the names that OpenSSL writes for them.
const NAMES: &[(&[u8], &str)] = &[
    (COMMON_NAME, "CN"),
    (&[0x55, 0x04, 0x04], "SN"),
    (&[0x55, 0x04, 0x05], "serialNumber"),
    (&[0x55, 0x04, 0x06], "C"),
    (&[0x55, 0x04, 0x07], "L"),
    (&[0x55, 0x04, 0x08], "ST"),
    (&[0x55, 0x04, 0x09], "street"),
    (&[0x55, 0x04, 0x0a], "O"),
    (&[0x55, 0x04, 0x0b], "OU"),
    (&[0x55, 0x04, 0x0c], "title"),
    (&[0x55, 0x04, 0x0d], "description"),
    (&[0x55, 0x04, 0x2a], "GN"),
    (&[0x55, 0x04, 0x2e], "dnQualifier"),
    // 0.9.2342.19200300.100.1.1 and .25
    (&[0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 0x01, 0x01], "UID"),
    (&[0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 0x01, 0x19], "DC"),
    // 1.2.840.113549.1.9.1
    (&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x01], "emailAddress"),
];
/// id-at-commonName, 2.5.4.3.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];

/// The first common name of the DER certificate's subject; `None` where there is none, it is empty, holds control
/// characters or is in none of the alphabets in use today.
pub fn common_name(certificate: &[u8]) -> Option<&str> {
    let mut found = None;
    for_each(certificate, |_, kind, value| {
        if found.is_none() && kind == COMMON_NAME {
            found = Some(text(value));
        }
        Some(())
    })?;
    found?.filter(|text| !text.is_empty() && !text.contains(char::is_control))
}

/// The whole subject as text, the last attribute first, as in `CN=pump-1,O=Works` (RFC 2253 §2): what Mosquitto takes
/// for `use_subject_as_username`, letter by letter. `None` where there is no subject, or one that cannot be written.
pub fn subject(certificate: &[u8]) -> Option<String> {
    let mut sets: Vec<(usize, String)> = Vec::new();
    for_each(certificate, |set, kind, value| {
        let name = NAMES.iter().find(|(known, _)| *known == kind)?.1;
        let value = escape(text(value)?);
        match sets.last_mut() {
            Some((last, text)) if *last == set => write!(text, "+{name}={value}").ok()?,
            _ => sets.push((set, format!("{name}={value}"))),
        }
        Some(())
    })?;
    let texts: Vec<_> = sets.into_iter().rev().map(|(_, text)| text).collect();
    (!texts.is_empty()).then(|| texts.join(","))
}

/// Calls `each` with the number of the set, the type and the value of each attribute, in their order; `None` where the
/// certificate is malformed or `each` says so.
fn for_each<'a>(certificate: &'a [u8], mut each: impl FnMut(usize, &'a [u8], &'a [u8]) -> Option<()>) -> Option<()> {
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
    let mut set = 0;
    while !subject.is_empty() {
        let (mut attributes, rest) = element(subject, SET)?;
        while !attributes.is_empty() {
            let (attribute, rest) = element(attributes, SEQUENCE)?;
            let (kind, value) = element(attribute, OBJECT_IDENTIFIER)?;
            each(set, kind, value)?;
            attributes = rest;
        }
        subject = rest;
        set += 1;
    }
    Some(())
}

fn text(value: &[u8]) -> Option<&str> {
    let tags = [UTF8_STRING, PRINTABLE_STRING, IA5_STRING, TELETEX_STRING];
    let (text, _) = tags.iter().find_map(|tag| element(value, *tag))?;
    std::str::from_utf8(text).ok()
}

/// What has a meaning in a distinguished name gets a backslash; what is no printable ASCII becomes its octets.
fn escape(value: &str) -> String {
    let mut escaped = String::with_capacity(value.len());
    let last = value.len().saturating_sub(1);
    for (index, octet) in value.bytes().enumerate() {
        match octet {
            b',' | b'+' | b'"' | b'\\' | b'<' | b'>' | b';' => escaped.extend(['\\', char::from(octet)]),
            b'#' if index == 0 => escaped.push_str("\\#"),
            b' ' if index == 0 || index == last => escaped.push_str("\\ "),
            0x20..=0x7e => escaped.push(char::from(octet)),
            _ => {
                let _ = write!(escaped, "\\{octet:02X}");
            }
        }
    }
    escaped
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
    fn the_subject_is_written_as_openssl_writes_it() {
        use rcgen::{DnType, DnValue};
        let utf8 = |text: &str| DnValue::Utf8String(text.into());
        let check = |distinguished: &[(DnType, DnValue)], expected: Option<&str>| {
            assert_eq!(subject(&certificate(distinguished)).as_deref(), expected, "{distinguished:?}");
        };
        let organization = (DnType::OrganizationName, utf8("Works"));
        let unit = (DnType::OrganizationalUnitName, utf8("Line 1"));
        let common = (DnType::CommonName, utf8("pump-1"));
        check(&[organization.clone(), unit, common], Some("CN=pump-1,OU=Line 1,O=Works"));
        check(&[(DnType::CommonName, utf8(" a,b=\\ "))], Some("CN=\\ a\\,b=\\\\\\ "));
        check(&[(DnType::CommonName, utf8("#ü"))], Some("CN=\\#\\C3\\BC"));
        check(&[organization, (DnType::CustomDnType(vec![1, 2, 3]), utf8("x"))], None);
        check(&[], None);
    }

    #[test]
    fn no_prefix_of_a_certificate_panics() {
        let whole = certificate(&[(rcgen::DnType::CommonName, rcgen::DnValue::Utf8String("x".into()))]);
        assert!((0..whole.len()).all(|length| common_name(&whole[..length]).is_none()));
        assert!((0..whole.len()).all(|length| subject(&whole[..length]).is_none()));
    }
}
