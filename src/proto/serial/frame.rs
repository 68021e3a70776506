//! Cutting a byte stream into frames.
//!
//! A framer holds at most one unfinished frame, never more than its `max_length`. Whatever does not fit the framing is
//! dropped and counted, and the framer finds the next frame by itself: a device that is plugged in while it talks, a
//! wrong baud rate or a cut cable must not need a restart.

use std::time::{Duration, Instant};

use bytes::Bytes;
use thiserror::Error;

/// The longest frame any framing may be set to. Serial devices send tens of bytes; a label printer's reply, thousands.
pub const MAX_FRAME_BYTES: usize = 64 * 1024;

/// The longest delimiter, start sequence or header. Real ones have one to four bytes.
const MAX_MARK_BYTES: usize = 16;

/// How many different delimiters may end a line.
const MAX_DELIMITERS: usize = 8;

/// How a device marks where its frames begin and end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Framing {
    /// Text lines. A line ends at any of `delimiters`; trailing CRs are taken off and empty lines are skipped.
    Line { delimiters: Vec<Vec<u8>>, max_length: usize },
    /// Frames of `length` bytes that begin with `start` (which may be empty). A gap of `idle` begins a new frame.
    Fixed { start: Vec<u8>, length: usize, idle: Duration },
    /// Frames between a start and an end byte, as in STX … ETX, then `trailer` bytes such as a check sum. The frame is
    /// what stands between, followed by the trailer. A start byte inside a frame begins it anew.
    Enclosed { start: u8, end: u8, trailer: usize, max_length: usize },
    /// Frames that tell their own length. A gap of `idle` begins a new frame.
    Prefixed { prefix: Prefix, max_length: usize, idle: Duration },
    /// Frames that are separated by silence of at least `gap`.
    Idle { gap: Duration, max_length: usize },
}

/// Where a frame holds its length: `start`, then bytes up to `offset`, then the length field of `width` bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// What every frame begins with; may be empty.
    pub start: Vec<u8>,
    /// Bytes before the length field, `start` among them.
    pub offset: usize,
    /// Bytes of the length field: 1, 2 or 4.
    pub width: usize,
    pub byte_order: ByteOrder,
    /// Added to the field's value to get the bytes that follow it: 2 where a check sum is not counted, negative
    /// where the header is.
    pub adjust: i32,
}

/// Which byte of a number comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ByteOrder {
    Big,
    Little,
}

/// What is wrong with a framing's settings.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FramingError {
    #[error("a frame's length must be 1 to {MAX_FRAME_BYTES} bytes, not {0}")]
    Length(usize),
    #[error("give 1 to {MAX_DELIMITERS} delimiters")]
    DelimiterCount,
    #[error("a delimiter or start sequence must not be empty or longer than {MAX_MARK_BYTES} bytes")]
    Mark,
    #[error("the start byte and the end byte must differ")]
    SameEnclosure,
    #[error("a length field has 1, 2 or 4 bytes, not {0}")]
    Width(usize),
    #[error("the length field must lie behind the start sequence and within the first {MAX_MARK_BYTES} bytes")]
    Offset,
    #[error("the idle time must be 1 ms to 60 s")]
    Idle,
}

/// What a framer has seen since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameCounts {
    pub bytes: u64,
    pub frames: u64,
    /// Frames dropped because they were longer than `max_length`, or said they were.
    pub overlong: u64,
    /// Frames dropped because they were cut off: by silence, by a new start, or by the port going away.
    pub incomplete: u64,
    /// Bytes outside any frame.
    pub noise_bytes: u64,
}

/// Cuts one port's bytes into frames.
#[derive(Debug)]
pub struct Framer {
    framing: Framing,
    /// The unfinished frame; while skipping, only the tail that a delimiter could still begin in.
    buffer: Vec<u8>,
    state: State,
    last_byte: Option<Instant>,
    counts: FrameCounts,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Outside a frame, where the framing knows an outside.
    Outside,
    Inside,
    /// Between the end byte and the last byte of the trailer.
    Trailer {
        left: usize,
    },
    /// An overlong frame is being dropped up to its end.
    Skipping,
}

impl Framing {
    /// Checks the settings, once, before a framer is made of them.
    ///
    /// # Errors
    /// [`FramingError`] says which setting is out of its range.
    pub fn check(&self) -> Result<(), FramingError> {
        let length = |length: usize| {
            if (1..=MAX_FRAME_BYTES).contains(&length) { Ok(()) } else { Err(FramingError::Length(length)) }
        };
        let idle = |idle: Duration| {
            let fits = (Duration::from_millis(1)..=Duration::from_secs(60)).contains(&idle);
            if fits { Ok(()) } else { Err(FramingError::Idle) }
        };
        match self {
            Self::Line { delimiters, max_length } => {
                if delimiters.is_empty() || delimiters.len() > MAX_DELIMITERS {
                    return Err(FramingError::DelimiterCount);
                }
                if delimiters.iter().any(|mark| mark.is_empty() || mark.len() > MAX_MARK_BYTES) {
                    return Err(FramingError::Mark);
                }
                length(*max_length)
            }
            Self::Fixed { start, length: frame, idle: gap } => {
                if start.len() > MAX_MARK_BYTES || start.len() > *frame {
                    return Err(FramingError::Mark);
                }
                length(*frame).and(idle(*gap))
            }
            Self::Enclosed { start, end, trailer, max_length } => {
                if start == end {
                    return Err(FramingError::SameEnclosure);
                }
                if trailer > max_length {
                    return Err(FramingError::Length(*trailer));
                }
                length(*max_length)
            }
            Self::Prefixed { prefix, max_length, idle: gap } => {
                if prefix.start.len() > MAX_MARK_BYTES {
                    return Err(FramingError::Mark);
                }
                if prefix.offset < prefix.start.len() || prefix.offset > MAX_MARK_BYTES {
                    return Err(FramingError::Offset);
                }
                if ![1, 2, 4].contains(&prefix.width) {
                    return Err(FramingError::Width(prefix.width));
                }
                length(*max_length).and(idle(*gap))
            }
            Self::Idle { gap, max_length } => length(*max_length).and(idle(*gap)),
        }
    }

    /// The silence after which an unfinished frame is over.
    fn gap(&self) -> Option<Duration> {
        match self {
            Self::Fixed { idle, .. } | Self::Prefixed { idle, .. } => Some(*idle),
            Self::Idle { gap, .. } => Some(*gap),
            Self::Line { .. } | Self::Enclosed { .. } => None,
        }
    }
}

impl Framer {
    /// A framer that has seen nothing yet.
    ///
    /// # Errors
    /// As [`Framing::check`].
    pub fn new(framing: Framing) -> Result<Self, FramingError> {
        framing.check()?;
        Ok(Self { framing, buffer: Vec::new(), state: State::Outside, last_byte: None, counts: FrameCounts::default() })
    }

    pub fn counts(&self) -> FrameCounts {
        self.counts
    }

    /// Takes what the port has just read and adds the frames it completes to `frames`, in order. A frame is never
    /// empty, and all of them together hold no more bytes than were given and buffered.
    pub fn handle_bytes(&mut self, bytes: &[u8], now: Instant, frames: &mut Vec<Bytes>) {
        if bytes.is_empty() {
            return;
        }
        self.handle_timeout(now, frames);
        self.last_byte = Some(now);
        self.counts.bytes += bytes.len() as u64;
        for &byte in bytes {
            match &self.framing {
                Framing::Line { .. } => self.line_byte(byte, frames),
                Framing::Fixed { .. } => {
                    self.buffer.push(byte);
                    self.cut_fixed(frames);
                }
                Framing::Enclosed { .. } => self.enclosed_byte(byte, frames),
                Framing::Prefixed { .. } => {
                    self.buffer.push(byte);
                    self.cut_prefixed(frames);
                }
                Framing::Idle { max_length, .. } => {
                    let max_length = *max_length;
                    self.counted_byte(byte, max_length);
                }
            }
        }
    }

    /// Ends what silence ends; call it at [`Framer::poll_timeout`], or whenever.
    pub fn handle_timeout(&mut self, now: Instant, frames: &mut Vec<Bytes>) {
        if self.poll_timeout().is_none_or(|due| now < due) {
            return;
        }
        self.last_byte = None;
        match self.framing {
            Framing::Idle { .. } if self.state != State::Skipping => self.finish(frames),
            _ => self.abandon(),
        }
    }

    /// When silence will have ended the unfinished frame; `None` while there is none or silence does not end it.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.buffer.is_empty() && self.state != State::Skipping {
            return None;
        }
        Some(self.last_byte? + self.framing.gap()?)
    }

    /// Forgets the unfinished frame: the port was closed, what comes next does not belong to it.
    pub fn reset(&mut self) {
        self.last_byte = None;
        self.abandon();
    }

    fn line_byte(&mut self, byte: u8, frames: &mut Vec<Bytes>) {
        let Framing::Line { delimiters, max_length } = &self.framing else { return };
        let max_length = *max_length;
        self.buffer.push(byte);
        let ended = delimiters.iter().find(|mark| self.buffer.ends_with(mark)).map(Vec::len);
        match (self.state, ended) {
            (State::Skipping, Some(_)) => {
                self.buffer.clear();
                self.state = State::Outside;
            }
            (State::Skipping, None) => self.keep_tail(),
            (_, Some(mark)) => {
                self.buffer.truncate(self.buffer.len() - mark);
                while self.buffer.last() == Some(&b'\r') {
                    self.buffer.pop();
                }
                if self.buffer.len() > max_length {
                    self.counts.overlong += 1;
                    self.buffer.clear();
                }
                self.finish(frames);
            }
            // The delimiter and CRs before it do not count; while they may be under way they get room of their own.
            (_, None) if self.buffer.len() >= max_length + MAX_MARK_BYTES => self.skip(),
            (_, None) => self.state = State::Inside,
        }
    }

    fn enclosed_byte(&mut self, byte: u8, frames: &mut Vec<Bytes>) {
        let Framing::Enclosed { start, end, trailer, max_length } = self.framing else { return };
        match self.state {
            // A check sum may have any value, the start byte's too.
            State::Trailer { left } => {
                self.buffer.push(byte);
                if left > 1 {
                    self.state = State::Trailer { left: left - 1 };
                } else {
                    self.finish(frames);
                }
            }
            State::Inside if byte == start => {
                self.counts.incomplete += 1;
                self.buffer.clear();
            }
            State::Outside | State::Skipping if byte == start => self.state = State::Inside,
            State::Outside => self.counts.noise_bytes += 1,
            State::Skipping => {}
            State::Inside if byte == end && trailer > 0 => self.state = State::Trailer { left: trailer },
            State::Inside if byte == end => self.finish(frames),
            State::Inside if self.buffer.len() + trailer >= max_length => self.skip(),
            State::Inside => self.buffer.push(byte),
        }
    }

    fn cut_fixed(&mut self, frames: &mut Vec<Bytes>) {
        let Framing::Fixed { start, length, .. } = &self.framing else { return };
        let length = *length;
        let noise = leading_noise(&self.buffer, start);
        self.drop_noise(noise);
        if self.buffer.len() == length {
            self.finish(frames);
        }
    }

    fn cut_prefixed(&mut self, frames: &mut Vec<Bytes>) {
        if self.state == State::Skipping {
            self.buffer.clear();
            return;
        }
        loop {
            let Framing::Prefixed { prefix, max_length, .. } = &self.framing else { return };
            let max_length = *max_length;
            let noise = leading_noise(&self.buffer, &prefix.start);
            let length = prefix.frame_length(&self.buffer[noise..]);
            let has_start = !prefix.start.is_empty();
            self.drop_noise(noise);
            match length {
                None => return,
                Some(length) if length > max_length as u64 => {
                    self.counts.overlong += 1;
                    if !has_start {
                        // Nothing marks the next frame but the silence before it.
                        self.buffer.clear();
                        self.state = State::Skipping;
                        return;
                    }
                    // The start sequence was part of something else: look for the next one behind it.
                    self.drop_noise(1);
                }
                Some(length) => {
                    let length = length as usize;
                    if self.buffer.len() < length {
                        return;
                    }
                    let rest = self.buffer.split_off(length);
                    self.finish(frames);
                    self.buffer = rest;
                    if self.buffer.is_empty() {
                        return;
                    }
                }
            }
        }
    }

    fn counted_byte(&mut self, byte: u8, max_length: usize) {
        if self.state == State::Skipping {
            return;
        }
        if self.buffer.len() == max_length {
            self.skip();
        } else {
            self.buffer.push(byte);
        }
    }

    fn finish(&mut self, frames: &mut Vec<Bytes>) {
        self.state = State::Outside;
        if !self.buffer.is_empty() {
            self.counts.frames += 1;
            frames.push(Bytes::copy_from_slice(&self.buffer));
            self.buffer.clear();
        }
    }

    fn abandon(&mut self) {
        if !self.buffer.is_empty() && self.state != State::Skipping {
            self.counts.incomplete += 1;
        }
        self.buffer.clear();
        self.state = State::Outside;
    }

    fn skip(&mut self) {
        self.counts.overlong += 1;
        self.state = State::Skipping;
        match self.framing {
            Framing::Line { .. } => self.keep_tail(),
            _ => self.buffer.clear(),
        }
    }

    /// While a line is skipped, only what a delimiter could begin with is worth keeping.
    fn keep_tail(&mut self) {
        let excess = self.buffer.len().saturating_sub(MAX_MARK_BYTES - 1);
        self.buffer.drain(..excess);
    }

    fn drop_noise(&mut self, bytes: usize) {
        self.counts.noise_bytes += bytes as u64;
        self.buffer.drain(..bytes);
    }
}

impl Prefix {
    /// The whole frame's length once its length field is there; `u64::MAX` for one that cannot be.
    fn frame_length(&self, bytes: &[u8]) -> Option<u64> {
        let field = bytes.get(self.offset..self.offset + self.width)?;
        let add = |value: u64, byte: &u8| value << 8 | u64::from(*byte);
        let value = match self.byte_order {
            ByteOrder::Big => field.iter().fold(0, add),
            ByteOrder::Little => field.iter().rev().fold(0, add),
        };
        let header = (self.offset + self.width) as u64;
        Some(value.checked_add_signed(i64::from(self.adjust)).map_or(u64::MAX, |rest| rest + header))
    }
}

/// How many bytes stand before the first place where `start`, or the part of it that has arrived, could begin.
fn leading_noise(bytes: &[u8], start: &[u8]) -> usize {
    (0..bytes.len())
        .find(|&at| {
            let part = start.len().min(bytes.len() - at);
            bytes[at..at + part] == start[..part]
        })
        .unwrap_or(bytes.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(max_length: usize) -> Framing {
        Framing::Line { delimiters: vec![b"\n".to_vec()], max_length }
    }

    fn sds011() -> Framing {
        Framing::Fixed { start: vec![0xAA, 0xC0], length: 4, idle: Duration::from_millis(50) }
    }

    fn pms5003() -> Framing {
        let prefix = Prefix { start: vec![0x42, 0x4D], offset: 2, width: 2, byte_order: ByteOrder::Big, adjust: 0 };
        Framing::Prefixed { prefix, max_length: 8, idle: Duration::from_millis(50) }
    }

    fn bare_prefix() -> Framing {
        let prefix = Prefix { start: vec![], offset: 0, width: 1, byte_order: ByteOrder::Little, adjust: 1 };
        Framing::Prefixed { prefix, max_length: 6, idle: Duration::from_millis(50) }
    }

    fn stx_etx(trailer: usize) -> Framing {
        Framing::Enclosed { start: 2, end: 3, trailer, max_length: 6 }
    }

    /// Every stream is cut at once, byte by byte, and in pieces of three: the frames must be the same.
    fn check(framing: &Framing, stream: &[u8], expected: &[&[u8]], counts: FrameCounts) {
        for piece in [stream.len(), 1, 3] {
            let now = Instant::now();
            let mut framer = Framer::new(framing.clone()).unwrap();
            let mut frames = Vec::new();
            for bytes in stream.chunks(piece) {
                framer.handle_bytes(bytes, now, &mut frames);
            }
            assert_eq!(frames, expected, "{framing:?} in pieces of {piece}");
            let expected = FrameCounts { bytes: stream.len() as u64, frames: expected.len() as u64, ..counts };
            assert_eq!(framer.counts(), expected, "{framing:?} in pieces of {piece}");
        }
    }

    const CLEAN: FrameCounts = FrameCounts { bytes: 0, frames: 0, overlong: 0, incomplete: 0, noise_bytes: 0 };

    #[test]
    fn lines_end_at_any_delimiter_lose_their_cr_and_are_never_empty() {
        check(&line(10), b"1.5\r\n\r\n\nab\n", &[b"1.5", b"ab"], CLEAN);
        check(&line(10), b"a\rb\r\r\n", &[b"a\rb"], CLEAN);
        let marks = |marks: &[&[u8]]| Framing::Line {
            delimiters: marks.iter().map(|mark| mark.to_vec()).collect(),
            max_length: 10,
        };
        check(&marks(&[b"\r"]), b"a\rb\r", &[b"a", b"b"], CLEAN);
        check(&marks(&[b"\r", b"\n"]), b"a\r\nb\n", &[b"a", b"b"], CLEAN);
        check(&marks(&[b"OK\r\n", b"ERR\r\n"]), b"1\r\nOK\r\n2;ERR\r\n", &[b"1\r\n", b"2;"], CLEAN);
    }

    #[test]
    fn an_overlong_line_is_dropped_once_and_the_next_line_is_whole() {
        let overlong = FrameCounts { overlong: 1, ..CLEAN };
        check(&line(4), b"1234\r\n12345\n678\n", &[b"1234", b"678"], overlong);
        check(&line(4), &[&[b'x'; 5000][..], b"\n678\n"].concat(), &[b"678"], overlong);
        let marks = Framing::Line { delimiters: vec![b"<EOL>".to_vec()], max_length: 4 };
        check(&marks, b"1234<EOL>12345<EOL>1<EO<EOL>", &[b"1234", b"1<EO"], overlong);
    }

    #[test]
    fn an_endless_line_holds_no_more_than_its_limit() {
        let mut framer = Framer::new(line(100)).unwrap();
        let mut frames = Vec::new();
        for _ in 0..10_000 {
            framer.handle_bytes(b"\r\r\r\r0123456789", Instant::now(), &mut frames);
            assert!(framer.buffer.len() <= 100 + MAX_MARK_BYTES);
        }
        framer.handle_bytes(&[b'\r'; 5000], Instant::now(), &mut frames);
        assert!(framer.buffer.capacity() < 1000 && frames.is_empty());
    }

    #[test]
    fn fixed_frames_are_found_by_their_start() {
        let noise = |noise_bytes| FrameCounts { noise_bytes, ..CLEAN };
        check(&sds011(), &[0xAA, 0xC0, 1, 2, 0xAA, 0xC0, 3, 4], &[&[0xAA, 0xC0, 1, 2], &[0xAA, 0xC0, 3, 4]], CLEAN);
        check(&sds011(), &[9, 0xAA, 0xAA, 0xC0, 1, 2], &[&[0xAA, 0xC0, 1, 2]], noise(2));
        let bare = Framing::Fixed { start: vec![], length: 2, idle: Duration::from_millis(50) };
        check(&bare, b"abcd", &[b"ab", b"cd"], CLEAN);
    }

    #[test]
    fn enclosed_frames_ignore_what_is_outside_and_begin_anew_at_a_start() {
        check(&stx_etx(0), b"x\x02abc\x03yz\x02d\x03", &[b"abc", b"d"], FrameCounts { noise_bytes: 3, ..CLEAN });
        check(&stx_etx(0), b"\x02ab\x02cd\x03\x02\x03", &[b"cd"], FrameCounts { incomplete: 1, ..CLEAN });
        check(&stx_etx(0), b"\x02abcdefg\x03\x02h\x03", &[b"h"], FrameCounts { overlong: 1, ..CLEAN });
        check(&stx_etx(2), b"\x02a\x03\x02\x03\x02b\x03cc", &[b"a\x02\x03", b"bcc"], CLEAN);
    }

    #[test]
    fn prefixed_frames_tell_their_length() {
        let one: &[u8] = &[0x42, 0x4D, 0, 2, 7, 8];
        check(&pms5003(), &[one, one].concat(), &[one, one], CLEAN);
        let lying = [&[0x42, 0x4D, 0xFF, 0xFF][..], one].concat();
        check(&pms5003(), &lying, &[one], FrameCounts { overlong: 1, noise_bytes: 4, ..CLEAN });
        check(&bare_prefix(), &[1, 5, 6, 0, 9], &[&[1, 5, 6], &[0, 9]], CLEAN);
        check(&bare_prefix(), &[200, 5, 6, 0, 9], &[], FrameCounts { overlong: 1, ..CLEAN });
    }

    #[test]
    fn a_length_that_would_be_negative_is_refused_as_overlong() {
        let prefix = Prefix { start: vec![], offset: 0, width: 4, byte_order: ByteOrder::Big, adjust: -4 };
        let framing = Framing::Prefixed { prefix, max_length: 64, idle: Duration::from_millis(50) };
        check(&framing, &[0, 0, 0, 6, 1, 2], &[&[0, 0, 0, 6, 1, 2]], CLEAN);
        check(&framing, &[0, 0, 0, 1], &[], FrameCounts { overlong: 1, ..CLEAN });
        check(&framing, &[0xFF; 4], &[], FrameCounts { overlong: 1, ..CLEAN });
    }

    #[test]
    fn silence_ends_frames_and_cuts_unfinished_ones() {
        let ms = Duration::from_millis;
        let start = Instant::now();
        let run = |framing: Framing, input: &[(&[u8], u64)]| {
            let mut framer = Framer::new(framing).unwrap();
            let mut frames = Vec::new();
            for (bytes, at) in input {
                let now = start + ms(*at);
                if bytes.is_empty() {
                    framer.handle_timeout(now, &mut frames);
                } else {
                    framer.handle_bytes(bytes, now, &mut frames);
                }
            }
            (frames, framer.counts(), framer.poll_timeout().map(|due| due - start))
        };
        let idle = Framing::Idle { gap: ms(10), max_length: 4 };
        let (frames, _, due) = run(idle.clone(), &[(b"ab", 0), (b"c", 9), (b"", 18), (b"d", 19), (b"e", 25)]);
        assert_eq!((frames, due), (vec![Bytes::from("abc")], Some(ms(35))));
        let (frames, counts, due) = run(idle, &[(b"abcde", 0), (b"f", 9), (b"", 19), (b"g", 20), (b"", 30)]);
        assert_eq!((frames, counts.overlong, due), (vec![Bytes::from("g")], 1, None));
        let (frames, counts, _) = run(sds011(), &[(&[0xAA, 0xC0, 1], 0), (&[0xAA, 0xC0, 2, 3], 50)]);
        assert_eq!((frames, counts.incomplete), (vec![Bytes::from_static(&[0xAA, 0xC0, 2, 3])], 1));
        let (frames, counts, _) = run(bare_prefix(), &[(&[200, 1], 0), (&[0, 9], 50)]);
        assert_eq!((frames, counts.overlong), (vec![Bytes::from_static(&[0, 9])], 1));
    }

    #[test]
    fn a_closed_port_drops_the_frame_it_cut() {
        let mut framer = Framer::new(line(10)).unwrap();
        let mut frames = Vec::new();
        framer.handle_bytes(b"12", Instant::now(), &mut frames);
        framer.reset();
        framer.handle_bytes(b"34\n", Instant::now(), &mut frames);
        assert_eq!((frames, framer.counts().incomplete), (vec![Bytes::from("34")], 1));
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        let check = |framing: Framing, expected: FramingError| assert_eq!(framing.check(), Err(expected));
        check(line(0), FramingError::Length(0));
        check(line(MAX_FRAME_BYTES + 1), FramingError::Length(MAX_FRAME_BYTES + 1));
        check(Framing::Line { delimiters: vec![], max_length: 1 }, FramingError::DelimiterCount);
        check(Framing::Line { delimiters: vec![vec![]], max_length: 1 }, FramingError::Mark);
        check(Framing::Enclosed { start: 2, end: 2, trailer: 0, max_length: 9 }, FramingError::SameEnclosure);
        check(Framing::Idle { gap: Duration::ZERO, max_length: 9 }, FramingError::Idle);
        let prefix = |offset, width| Framing::Prefixed {
            prefix: Prefix { start: vec![1, 2], offset, width, byte_order: ByteOrder::Big, adjust: 0 },
            max_length: 9,
            idle: Duration::from_millis(5),
        };
        check(prefix(1, 1), FramingError::Offset);
        check(prefix(2, 3), FramingError::Width(3));
        assert_eq!(prefix(2, 2).check(), Ok(()));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_in_any_pieces_stay_within_the_limits(
            stream in proptest::collection::vec(0u8..6, 0..400), piece in 1usize..20,
        ) {
            let two = Prefix { start: vec![1, 1], offset: 3, width: 1, byte_order: ByteOrder::Big, adjust: -2 };
            let framings = [
                Framing::Line { delimiters: vec![vec![1, 2], vec![3]], max_length: 5 },
                Framing::Fixed { start: vec![1, 2, 1], length: 5, idle: Duration::from_millis(9) },
                Framing::Enclosed { start: 2, end: 3, trailer: 2, max_length: 5 },
                Framing::Prefixed { prefix: two, max_length: 5, idle: Duration::from_millis(9) },
                Framing::Idle { gap: Duration::from_millis(9), max_length: 5 },
            ];
            for framing in framings {
                let mut framer = Framer::new(framing).unwrap();
                let mut frames = Vec::new();
                let mut now = Instant::now();
                for bytes in stream.chunks(piece) {
                    framer.handle_bytes(bytes, now, &mut frames);
                    now += Duration::from_millis(u64::from(bytes[0]) * 2);
                    proptest::prop_assert!(framer.buffer.len() <= 5 + MAX_MARK_BYTES);
                }
                proptest::prop_assert!(frames.iter().all(|frame| (1..=5).contains(&frame.len())));
            }
        }
    }
}
