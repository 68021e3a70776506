//! Any framing, any bytes in any pieces, with silence between: no frame is longer than its limit, nothing is made up, and
//! where silence does not count it does not matter how the bytes are cut.
#![no_main]

use std::time::{Duration, Instant};

use arbitrary::Arbitrary;
use fieldgate_fuzz::proto::serial::{ByteOrder, Framer, Framing, Prefix};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    framing: AnyFraming<'a>,
    pieces: Vec<(u8, &'a [u8])>,
}

#[derive(Arbitrary, Debug)]
enum AnyFraming<'a> {
    Line { delimiters: Vec<&'a [u8]>, max_length: u8 },
    Fixed { start: &'a [u8], length: u8, idle: u8 },
    Enclosed { start: u8, end: u8, trailer: u8, max_length: u8 },
    Prefixed { start: &'a [u8], offset: u8, width: u8, big: bool, adjust: i32, max_length: u8, idle: u8 },
    Idle { gap: u8, max_length: u8 },
}

impl AnyFraming<'_> {
    fn framing(&self) -> (Framing, usize) {
        let millis = |millis: u8| Duration::from_millis(millis.into());
        match *self {
            Self::Line { ref delimiters, max_length } => {
                let delimiters = delimiters.iter().map(|mark| mark.to_vec()).collect();
                (Framing::Line { delimiters, max_length: max_length.into() }, max_length.into())
            }
            Self::Fixed { start, length, idle } => {
                (Framing::Fixed { start: start.to_vec(), length: length.into(), idle: millis(idle) }, length.into())
            }
            Self::Enclosed { start, end, trailer, max_length } => {
                let framing = Framing::Enclosed { start, end, trailer: trailer.into(), max_length: max_length.into() };
                (framing, max_length.into())
            }
            Self::Prefixed { start, offset, width, big, adjust, max_length, idle } => {
                let byte_order = if big { ByteOrder::Big } else { ByteOrder::Little };
                let width = [1, 2, 4][usize::from(width % 3)];
                let prefix = Prefix { start: start.to_vec(), offset: offset.into(), width, byte_order, adjust };
                (Framing::Prefixed { prefix, max_length: max_length.into(), idle: millis(idle) }, max_length.into())
            }
            Self::Idle { gap, max_length } => {
                (Framing::Idle { gap: millis(gap), max_length: max_length.into() }, max_length.into())
            }
        }
    }
}

fuzz_target!(|input: Input<'_>| {
    let (framing, max_length) = input.framing.framing();
    let Ok(mut framer) = Framer::new(framing.clone()) else { return };
    let mut now = Instant::now();
    let (mut frames, mut given) = (Vec::new(), 0);
    for &(wait, bytes) in &input.pieces {
        now += Duration::from_millis(wait.into());
        framer.handle_timeout(now, &mut frames);
        assert!(framer.poll_timeout().is_none_or(|due| due > now), "it would spin");
        framer.handle_bytes(bytes, now, &mut frames);
        given += bytes.len();
    }
    assert!(frames.iter().all(|frame| !frame.is_empty() && frame.len() <= max_length));
    assert!(frames.iter().map(|frame| frame.len()).sum::<usize>() <= given);
    assert_eq!(framer.counts().bytes, given as u64);
    if matches!(framing, Framing::Line { .. } | Framing::Enclosed { .. }) {
        let mut whole = Framer::new(framing).expect("as before");
        let bytes: Vec<u8> = input.pieces.iter().flat_map(|(_, bytes)| bytes.iter().copied()).collect();
        let mut at_once = Vec::new();
        whole.handle_bytes(&bytes, now, &mut at_once);
        assert_eq!(frames, at_once);
    }
});
