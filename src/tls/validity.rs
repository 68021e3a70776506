//! The end of a certificate's validity (RFC 5280 §4.1.2.5), and nothing else of it: rustls checks the rest.

use crate::clock::UnixMillis;

/// When the DER certificate stops being valid; `None` where its outer structure is not that of a certificate.
pub(super) fn not_after(certificate: &[u8]) -> Option<UnixMillis> {
    let (certificate, _) = element(certificate, SEQUENCE)?;
    let (mut fields, _) = element(certificate, SEQUENCE)?;
    // version [0] is absent in a version 1 certificate.
    if let Some((_, rest)) = element(fields, CONTEXT_0) {
        fields = rest;
    }
    for skipped in [INTEGER, SEQUENCE, SEQUENCE] {
        (_, fields) = element(fields, skipped)?;
    }
    let (validity, _) = element(fields, SEQUENCE)?;
    let (_, not_after) = time(validity)?;
    time(not_after).map(|(time, _)| time)
}

pub(super) const INTEGER: u8 = 0x02;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
pub(super) const SEQUENCE: u8 = 0x30;
pub(super) const CONTEXT_0: u8 = 0xa0;

/// The content of the element of type `tag` at the start of `der`, and what follows it.
pub(super) fn element(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (&found, rest) = der.split_first()?;
    let (&first, rest) = rest.split_first()?;
    if found != tag {
        return None;
    }
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        // Up to three octets: more would be a certificate of 16 MiB.
        0x81..=0x83 => {
            let (octets, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            (octets.iter().fold(0, |length, octet| length << 8 | usize::from(*octet)), rest)
        }
        _ => return None,
    };
    rest.split_at_checked(length)
}

/// The UTCTime or GeneralizedTime at the start of `der`, and what follows it.
fn time(der: &[u8]) -> Option<(UnixMillis, &[u8])> {
    let (century, text, rest) = match der.first()? {
        &UTC_TIME => element(der, UTC_TIME).map(|(text, rest)| (None, text, rest))?,
        _ => {
            let (text, rest) = element(der, GENERALIZED_TIME)?;
            let (century, text) = text.split_at_checked(2)?;
            (Some(number(century)?), text, rest)
        }
    };
    let (digits, zone) = text.split_at_checked(12)?;
    if zone != b"Z" {
        return None;
    }
    let mut fields = [0; 6];
    for (field, digits) in fields.iter_mut().zip(digits.chunks(2)) {
        *field = number(digits)?;
    }
    let [year, month, day, hour, minute, second] = fields;
    let century = century.unwrap_or(if year < 50 { 20 } else { 19 });
    if !(1..=12).contains(&month) {
        return None;
    }
    let days = days_from_civil(century * 100 + year, month, day);
    let seconds = days * 86_400 + hour * 3600 + minute * 60 + second;
    Some((UnixMillis(seconds * 1000), rest))
}

fn number(digits: &[u8]) -> Option<i64> {
    digits.iter().try_fold(0, |number, digit| digit.is_ascii_digit().then(|| number * 10 + i64::from(digit - b'0')))
}

/// Days from 1970-01-01 to the Gregorian date (H. Hinnant, "chrono-Compatible Low-Level Date Algorithms").
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_of_time_are_read() {
        let check = |tag: u8, text: &str, expected: Option<&str>| {
            let mut der = vec![tag, u8::try_from(text.len()).unwrap()];
            der.extend(text.as_bytes());
            assert_eq!(time(&der).map(|(time, _)| time.to_string()).as_deref(), expected, "{text}");
        };
        check(UTC_TIME, "491231235959Z", Some("2049-12-31T23:59:59.000Z"));
        check(UTC_TIME, "500101000000Z", Some("1950-01-01T00:00:00.000Z"));
        check(UTC_TIME, "240229120000Z", Some("2024-02-29T12:00:00.000Z"));
        check(GENERALIZED_TIME, "20500101000000Z", Some("2050-01-01T00:00:00.000Z"));
        check(GENERALIZED_TIME, "99991231235959Z", Some("9999-12-31T23:59:59.000Z"));
        check(UTC_TIME, "2402291200Z", None);
        check(UTC_TIME, "240229120000+", None);
        check(UTC_TIME, "24o229120000Z", None);
        check(UTC_TIME, "241329120000Z", None);
    }

    #[test]
    fn anything_but_a_certificate_has_no_end() {
        for der in [&b""[..], b"0", b"\x30\x03\x30\x01\xa0", b"\x30\x84\xff\xff\xff\xff", b"\x30\x83\xff\xff\xff"] {
            assert_eq!(not_after(der), None, "{der:?}");
        }
    }
}
