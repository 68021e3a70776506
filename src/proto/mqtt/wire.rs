//! The data types of the wire: integers, variable byte integers, strings and binary data (MQTT 5.0 §1.5).

use super::{EncodeError, ProtocolError};

const CUT_SHORT: ProtocolError = ProtocolError::malformed("a packet ends in the middle of a field");

/// Takes fields off the front of a packet's bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], ProtocolError> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(CUT_SHORT)?;
        self.0 = rest;
        Ok(taken)
    }

    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    #[inline]
    pub fn u8(&mut self) -> Result<u8, ProtocolError> {
        let (&first, rest) = self.0.split_first().ok_or(CUT_SHORT)?;
        self.0 = rest;
        Ok(first)
    }

    #[inline]
    pub fn u16(&mut self) -> Result<u16, ProtocolError> {
        let (&taken, rest) = self.0.split_first_chunk().ok_or(CUT_SHORT)?;
        self.0 = rest;
        Ok(u16::from_be_bytes(taken))
    }

    pub fn u32(&mut self) -> Result<u32, ProtocolError> {
        let (&taken, rest) = self.0.split_first_chunk().ok_or(CUT_SHORT)?;
        self.0 = rest;
        Ok(u32::from_be_bytes(taken))
    }

    /// A variable byte integer in its shortest form (MQTT 5.0 §1.5.5).
    pub fn variable(&mut self) -> Result<u32, ProtocolError> {
        let (value, length) = variable(self.0)?.ok_or(CUT_SHORT)?;
        if length > variable_length(value) {
            return Err(ProtocolError::malformed("a variable byte integer is longer than it needs to be"));
        }
        self.0 = &self.0[length..];
        Ok(value)
    }

    pub fn binary(&mut self) -> Result<&'a [u8], ProtocolError> {
        let length = self.u16()?;
        self.bytes(length.into())
    }

    /// A UTF-8 string without U+0000 (MQTT 5.0 §1.5.4). Control characters and non-characters, which a receiver
    /// may refuse, are let through.
    pub fn string(&mut self) -> Result<&'a str, ProtocolError> {
        let text = str::from_utf8(self.binary()?)
            .map_err(|_| ProtocolError::malformed("a string is not well-formed UTF-8"))?;
        if text.as_bytes().contains(&0) {
            return Err(ProtocolError::malformed("a string contains the character U+0000"));
        }
        Ok(text)
    }
}

/// Value and length of the variable byte integer at the front of `bytes`; `None` while it is not all there.
#[inline]
pub(super) fn variable(bytes: &[u8]) -> Result<Option<(u32, usize)>, ProtocolError> {
    let mut value = 0;
    for (index, &byte) in bytes.iter().take(4).enumerate() {
        value |= u32::from(byte & 0x7F) << (7 * index);
        if byte < 0x80 {
            return Ok(Some((value, index + 1)));
        }
    }
    if bytes.len() < 4 {
        return Ok(None);
    }
    Err(ProtocolError::malformed("a variable byte integer is longer than four bytes"))
}

/// How many bytes `value`, at most 268,435,455, takes as a variable byte integer.
#[inline]
pub(super) fn variable_length(value: u32) -> usize {
    match value {
        0..=0x7F => 1,
        0x80..=0x3FFF => 2,
        0x4000..=0x1F_FFFF => 3,
        _ => 4,
    }
}

#[inline]
pub(super) fn put_variable(out: &mut Vec<u8>, mut value: u32) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

pub(super) fn put_u16(out: &mut Vec<u8>, value: u16) {
    out.extend_from_slice(&value.to_be_bytes());
}

pub(super) fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_be_bytes());
}

pub(super) fn put_binary(out: &mut Vec<u8>, bytes: &[u8]) -> Result<(), EncodeError> {
    put_u16(out, u16::try_from(bytes.len()).map_err(|_| EncodeError::FieldTooLong)?);
    out.extend_from_slice(bytes);
    Ok(())
}

pub(super) fn put_string(out: &mut Vec<u8>, text: &str) -> Result<(), EncodeError> {
    put_binary(out, text.as_bytes())
}

/// Writes what `body` writes, preceded by its length as a variable byte integer.
pub(super) fn put_with_length(
    out: &mut Vec<u8>,
    body: impl FnOnce(&mut Vec<u8>) -> Result<(), EncodeError>,
) -> Result<(), EncodeError> {
    let start = out.len();
    // Nearly every length fits the one byte that is kept free here; a longer one moves the body.
    out.push(0);
    body(out)?;
    let length = u32::try_from(out.len() - start - 1).ok().filter(|&length| length <= MAX_VARIABLE);
    let length = length.ok_or(EncodeError::PacketTooLarge)?;
    let extra = variable_length(length) - 1;
    if extra > 0 {
        let end = out.len();
        out.resize(end + extra, 0);
        out.copy_within(start + 1..end, start + 1 + extra);
    }
    let mut rest = length;
    for index in 0..=extra {
        out[start + index] = (rest & 0x7F) as u8 | if index < extra { 0x80 } else { 0 };
        rest >>= 7;
    }
    Ok(())
}

/// The largest value of a variable byte integer (MQTT 5.0 §1.5.5).
pub(super) const MAX_VARIABLE: u32 = 268_435_455;

#[cfg(test)]
mod tests {
    use super::*;

    // [MQTT-1.5.5-1]; the values of MQTT 5.0 table 1-1.
    #[test]
    fn variable_byte_integers_have_one_form() {
        for (value, bytes) in [
            (0, &[0x00][..]),
            (127, &[0x7F]),
            (128, &[0x80, 0x01]),
            (16_383, &[0xFF, 0x7F]),
            (16_384, &[0x80, 0x80, 0x01]),
            (2_097_151, &[0xFF, 0xFF, 0x7F]),
            (2_097_152, &[0x80, 0x80, 0x80, 0x01]),
            (MAX_VARIABLE, &[0xFF, 0xFF, 0xFF, 0x7F]),
        ] {
            let mut out = Vec::new();
            put_variable(&mut out, value);
            assert_eq!((out.as_slice(), out.len()), (bytes, variable_length(value)));
            assert_eq!(Reader(bytes).variable(), Ok(value));
            assert_eq!(variable(&bytes[..bytes.len() - 1]), Ok(None));
        }
        assert!(Reader(&[0x80, 0x00]).variable().is_err());
        assert!(variable(&[0x80, 0x80, 0x80, 0x80]).is_err());
    }

    #[test]
    fn a_long_body_is_moved_behind_its_length() {
        for length in [0, 127, 128, 16_383, 16_384, 70_000] {
            let body = vec![7; length];
            let mut out = vec![1];
            put_with_length(&mut out, |out| {
                out.extend_from_slice(&body);
                Ok(())
            })
            .unwrap();
            let mut reader = Reader(&out[1..]);
            assert_eq!(reader.variable().unwrap() as usize, length);
            assert_eq!(reader.rest(), body);
        }
    }

    // [MQTT-1.5.4-1] [MQTT-1.5.4-2] [MQTT-1.5.4-3]
    #[test]
    fn strings_are_utf_8_without_nul_and_keep_their_byte_order_mark() {
        assert_eq!(Reader(b"\0\x03\xEF\xBB\xBF").string(), Ok("\u{FEFF}"));
        for bytes in [&b"\0\x03\xED\xA0\x80"[..], b"\0\x01\0", b"\0\x02\xC0\x80", b"\0\x01\xFF", b"\0\x02a"] {
            assert!(Reader(bytes).string().is_err(), "{bytes:?}");
        }
    }
}
