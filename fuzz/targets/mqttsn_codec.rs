//! Any datagram: what is decoded can be encoded and comes back the same.
#![no_main]

use fieldgate_fuzz::proto::mqttsn::codec::{decode, encode, encoded_len};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(packet) = decode(bytes) else { return };
    let mut out = Vec::new();
    encode(&packet, &mut out);
    assert_eq!(encoded_len(&packet), out.len());
    assert!(out.len() <= bytes.len(), "the shortest form is not longer");
    assert_eq!(decode(&out).as_ref(), Ok(&packet));
});
