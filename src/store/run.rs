//! Messages of one queue that follow each other, packed into one row: a run.
//!
//! A run is a sequence of frames, one for each message:
//!
//! | field | form |
//! | --- | --- |
//! | check | CRC-32C, u32 little-endian, of slot, number, time, topic text and of the frame behind the check |
//! | flags | u8, see `row` |
//! | place | varint: the number within the lane less that of the run's first message |
//! | time | zigzag varint: `accepted_at` less that of the run's first message, in milliseconds |
//! | topic | varint: a number in table `topic`; or varint length and the text |
//! | payload | varint length and the bytes |
//! | extra | varint length and the bytes, only where the flags say so |
//!
//! The check covers what a frame refers to, not only what it holds: a message whose topic was damaged in another table,
//! or that lies where another one should, is noticed too and never delivered wrong.

use crc32c::crc32c_append;

use super::batch::Row;
use super::op::number;
use super::row::{self, Content, Malformed};
use super::topics::Topics;
use crate::message::QoS;
use crate::topic::TopicName;

/// A run is closed when it holds this much, in bytes. Larger would waste a little less, make a part of a run that is read
/// or removed cost more, and lose more where a page of the database is damaged.
const MAX_RUN_BYTES: usize = 8 << 10;
/// A run holds neighbours: a message that is further from the first one than this begins another run.
const MAX_RUN_SPAN: u64 = 1 << 16;

const CHECK_BYTES: usize = 4;

/// A run that is being filled, and what its row says beside its frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub slot: i64,
    /// Numbers within the lane.
    pub first: u64,
    pub last: u64,
    pub messages: u64,
    /// Sum of `Message::size`.
    pub bytes: u64,
    /// When the first message was accepted, and how much later the newest, in milliseconds.
    pub accepted_at: i64,
    pub lasted: i64,
    /// When the first of its messages expires.
    pub expires_at: Option<i64>,
    pub frames: Vec<u8>,
}

impl Run {
    /// A run that begins with `row`.
    pub fn new(slot: i64, row: &Row, topic: Option<i64>) -> Self {
        let mut run = Self {
            slot,
            first: number(row.sequence),
            last: number(row.sequence),
            messages: 0,
            bytes: 0,
            accepted_at: row.message.accepted_at.0,
            lasted: 0,
            expires_at: None,
            frames: Vec::new(),
        };
        run.append(row, topic);
        run
    }

    /// Adds a message with a higher sequence; false where it must begin another run. `topic` is the number of its topic, if
    /// it has one.
    pub fn push(&mut self, row: &Row, topic: Option<i64>) -> bool {
        let at = number(row.sequence);
        let is_neighbour = at > self.last && at - self.first < MAX_RUN_SPAN;
        let fits = self.frames.len() + row.message.size() <= MAX_RUN_BYTES;
        if is_neighbour && fits {
            self.append(row, topic);
        }
        is_neighbour && fits
    }

    fn append(&mut self, row: &Row, topic: Option<i64>) {
        let at = number(row.sequence);
        let Row { qos, retain, identifiers, shared, message, .. } = row;
        let extra = row::encode_extra(message, identifiers.as_deref(), shared.as_deref());
        let flags = row::encode_flags(message, *qos, *retain)
            | if extra.is_some() { row::HAS_EXTRA } else { 0 }
            | if topic.is_none() { row::TOPIC_IS_TEXT } else { 0 };
        let accepted_at = message.accepted_at.0;
        let start = self.frames.len();
        let frames = &mut self.frames;
        frames.extend([0; CHECK_BYTES]);
        frames.push(flags);
        put_varint(frames, at - self.first);
        put_varint(frames, zigzag(accepted_at.wrapping_sub(self.accepted_at)));
        match topic {
            Some(topic) => put_varint(frames, topic.unsigned_abs()),
            None => put_bytes(frames, message.topic.as_str().as_bytes()),
        }
        put_bytes(frames, &message.payload);
        if let Some(extra) = &extra {
            put_bytes(frames, extra);
        }
        let check = check(self.slot, at, accepted_at, message.topic.as_str(), &frames[start + CHECK_BYTES..]);
        frames[start..start + CHECK_BYTES].copy_from_slice(&check.to_le_bytes());
        self.last = at;
        self.messages += 1;
        self.bytes += u64::try_from(message.size()).unwrap_or(u64::MAX);
        self.lasted = self.lasted.max(accepted_at.saturating_sub(self.accepted_at));
        let expires_at = message.expires_at().map(|at| at.0);
        self.expires_at = [self.expires_at, expires_at].into_iter().flatten().min();
    }
}

/// Where a run lies, for reading its frames.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub slot: i64,
    pub first: u64,
    pub accepted_at: i64,
}

/// One message of a run, not checked yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame<'a> {
    place: Place,
    /// Within its lane.
    pub number: u64,
    pub content: Content<'a>,
    pub topic: Topic<'a>,
    /// The frame as it stands in its run.
    pub encoded: &'a [u8],
}

/// How the topic of a frame stands in it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Topic<'a> {
    Number(i64),
    Text(&'a [u8]),
}

impl<'a> Frame<'a> {
    /// `Message::size` of the message, as far as an unchecked frame can be believed.
    pub fn size(&self, topics: &Topics) -> u64 {
        let topic = match self.topic {
            Topic::Number(topic) => topics.name(topic).map_or(0, |name| name.as_str().len()),
            Topic::Text(text) => text.len(),
        };
        let size = topic + self.content.payload.len() + row::properties_size(self.content.extra);
        u64::try_from(size).unwrap_or(u64::MAX)
    }

    /// Whether its receiver gets it with QoS 2, as far as an unchecked frame can be believed.
    pub fn is_exactly_once(&self) -> bool {
        self.content.grant().is_ok_and(|grant| grant.qos == QoS::ExactlyOnce)
    }

    /// The topic of the message, if the frame is what was written.
    pub fn checked_topic(&self, topics: &Topics) -> Result<TopicName, Malformed> {
        let topic = match self.topic {
            Topic::Number(topic) => topics.name(topic).cloned().ok_or(Malformed("topic number"))?,
            Topic::Text(text) => row::parse_topic(text)?,
        };
        self.check(&topic).map(|()| topic)
    }

    /// Whether the frame is what was written, with this topic.
    pub fn check(&self, topic: &TopicName) -> Result<(), Malformed> {
        let (stored, rest) = self.encoded.split_at(CHECK_BYTES);
        let found = check(self.place.slot, self.number, self.content.accepted_at, topic.as_str(), rest);
        if found.to_le_bytes() == stored { Ok(()) } else { Err(Malformed("checksum")) }
    }

    /// `Message::expires_at`, in milliseconds.
    pub fn expires_at(&self) -> Option<i64> {
        let millis = i64::try_from(self.content.expiry_interval()?.as_millis()).unwrap_or(i64::MAX);
        Some(self.content.accepted_at.saturating_add(millis))
    }
}

/// Takes a run apart. Ends early where the frames are damaged so that the next one cannot be found.
pub(super) struct Frames<'a> {
    place: Place,
    rest: &'a [u8],
}

impl<'a> Frames<'a> {
    pub fn new(place: Place, frames: &'a [u8]) -> Self {
        Self { place, rest: frames }
    }
}

impl<'a> Iterator for Frames<'a> {
    type Item = Frame<'a>;

    fn next(&mut self) -> Option<Frame<'a>> {
        let mut rest = self.rest;
        rest = rest.split_at_checked(CHECK_BYTES)?.1;
        let (&flags, after) = rest.split_first()?;
        rest = after;
        let number = self.place.first.checked_add(take_varint(&mut rest)?)?;
        let accepted_at = self.place.accepted_at.wrapping_add(unzigzag(take_varint(&mut rest)?));
        let topic = if flags & row::TOPIC_IS_TEXT != 0 {
            Topic::Text(take_bytes(&mut rest)?)
        } else {
            Topic::Number(i64::try_from(take_varint(&mut rest)?).ok()?)
        };
        let payload = take_bytes(&mut rest)?;
        let extra = if flags & row::HAS_EXTRA != 0 { Some(take_bytes(&mut rest)?) } else { None };
        let encoded = &self.rest[..self.rest.len() - rest.len()];
        self.rest = rest;
        let content = Content { payload, flags, accepted_at, extra };
        Some(Frame { place: self.place, number, content, topic, encoded })
    }
}

fn check(slot: i64, number: u64, accepted_at: i64, topic: &str, frame: &[u8]) -> u32 {
    let mut fixed = [0; 24];
    fixed[..8].copy_from_slice(&slot.to_le_bytes());
    fixed[8..16].copy_from_slice(&number.to_le_bytes());
    fixed[16..].copy_from_slice(&accepted_at.to_le_bytes());
    [&fixed, topic.as_bytes(), frame].into_iter().fold(0, crc32c_append)
}

/// LEB128.
fn put_varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn take_varint(rest: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, after) = rest.split_first()?;
        *rest = after;
        number |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn take_bytes<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::try_from(take_varint(rest)?).ok()?;
    let (bytes, after) = rest.split_at_checked(length)?;
    *rest = after;
    Some(bytes)
}

fn zigzag(number: i64) -> u64 {
    (number << 1 ^ number >> 63) as u64
}

fn unzigzag(number: u64) -> i64 {
    (number >> 1) as i64 ^ -((number & 1) as i64)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::clock::UnixMillis;
    use crate::message::{Message, QoS};
    use crate::store::SessionId;
    use crate::topic::SharedFilter;

    const NUMBERED: &str = "plant/line/power";

    fn topics() -> Topics {
        let mut topics = Topics::default();
        topics.insert(300, TopicName::new(NUMBERED).unwrap());
        topics
    }

    fn row(sequence: u64, topic: &str, payload: Vec<u8>, at: i64) -> Row {
        let message = Message::new(TopicName::new(topic).unwrap(), payload, QoS::ExactlyOnce, UnixMillis(at));
        Row {
            session: SessionId(1),
            sequence,
            qos: QoS::AtLeastOnce,
            retain: false,
            identifiers: None,
            shared: None,
            message: Arc::new(message),
        }
    }

    /// Three messages with a hole between them, the last one with everything.
    fn rows() -> Vec<Row> {
        let mut rich = row(1_000_203, "a/text", vec![3; 200], 1_793_491_100_000);
        let mut message = (*rich.message).clone();
        message.expiry_interval = Some(Duration::from_secs(1));
        rich.message = Arc::new(message);
        rich.shared = Some(Arc::new(SharedFilter::split("$share/g/a/+").unwrap()));
        rich.identifiers = Some([1, 2].into());
        let at = 1_793_491_200_000;
        vec![row(1_000_000, NUMBERED, vec![], at), row(1_000_001, NUMBERED, vec![7; 90], at + 70), rich]
    }

    fn packed(rows: &[Row]) -> Run {
        let number = |row: &Row| (row.message.topic.as_str() == NUMBERED).then_some(300);
        let mut run = Run::new(5, &rows[0], number(&rows[0]));
        rows[1..].iter().for_each(|row| assert!(run.push(row, number(row))));
        run
    }

    fn place(run: &Run) -> Place {
        Place { slot: run.slot, first: run.first, accepted_at: run.accepted_at }
    }

    #[test]
    fn what_is_packed_is_taken_apart() {
        let (rows, topics) = (rows(), topics());
        let run = packed(&rows);
        assert_eq!((run.first, run.last, run.messages, run.lasted), (1_000_000, 1_000_203, 3, 70));
        assert_eq!(run.expires_at, Some(1_793_491_101_000));
        assert_eq!(run.bytes, rows.iter().map(|row| row.message.size() as u64).sum::<u64>());
        let frames: Vec<_> = Frames::new(place(&run), &run.frames).collect();
        assert_eq!(frames.len(), 3);
        for (frame, row) in frames.iter().zip(&rows) {
            assert_eq!((frame.number, frame.size(&topics)), (row.sequence, row.message.size() as u64));
            let topic = frame.checked_topic(&topics).unwrap();
            assert_eq!(frame.content.message(topic).unwrap(), *row.message);
            let grant = frame.content.grant().unwrap();
            assert_eq!(
                (grant.qos, grant.identifiers, grant.shared),
                (row.qos, row.identifiers.clone(), row.shared.clone())
            );
        }
    }

    #[test]
    fn any_flipped_bit_costs_its_message_and_is_never_believed() {
        let (rows, topics) = (rows(), topics());
        let run = packed(&rows);
        let mut whole = 0;
        for at in 0..run.frames.len() * 8 {
            let mut frames = run.frames.clone();
            frames[at / 8] ^= 1 << (at % 8);
            for frame in Frames::new(place(&run), &frames) {
                if let Ok(topic) = frame.checked_topic(&topics) {
                    let row = rows.iter().find(|row| row.sequence == frame.number).expect("a sequence that is there");
                    assert_eq!(frame.content.message(topic).unwrap(), *row.message, "bit {at}");
                    whole += 1;
                }
            }
        }
        // Most bits are those of payloads, and cost one message of three.
        assert!(whole > run.frames.len() * 8 * 17 / 10, "{whole}");
    }

    #[test]
    fn a_message_is_not_believed_in_another_place_or_with_another_topic() {
        let (rows, topics) = (rows(), topics());
        let run = packed(&rows);
        let good = |place: Place, topics: &Topics| {
            Frames::new(place, &run.frames).filter(|frame| frame.checked_topic(topics).is_ok()).count()
        };
        assert_eq!(good(place(&run), &topics), 3);
        assert_eq!(good(Place { slot: 6, ..place(&run) }, &topics), 0);
        assert_eq!(good(Place { first: 1, ..place(&run) }, &topics), 0);
        assert_eq!(good(Place { accepted_at: 1, ..place(&run) }, &topics), 0);
        let mut renamed = Topics::default();
        renamed.insert(300, TopicName::new("plant/line/powes").unwrap());
        assert_eq!(good(place(&run), &renamed), 1);
    }

    #[test]
    fn a_run_ends_when_it_is_full_and_holds_neighbours_only() {
        let mut run = Run::new(1, &row(5, "t", vec![0; MAX_RUN_BYTES - 100], 0), None);
        assert!(!run.push(&row(6, "t", vec![0; 100], 0), None));
        assert!(run.push(&row(6, "t", vec![0; 50], 0), None));
        assert!(!run.push(&row(6, "t", vec![], 0), None));
        assert!(!run.push(&row(5 + MAX_RUN_SPAN, "t", vec![], 0), None));
        assert_eq!((run.messages, run.last), (2, 6));
    }

    #[test]
    fn numbers_of_every_size_come_back() {
        for number in [0, 1, 127, 128, 16_383, 16_384, u64::MAX / 2, u64::MAX] {
            let mut out = Vec::new();
            put_varint(&mut out, number);
            let mut rest = &out[..];
            assert_eq!((take_varint(&mut rest), rest.len()), (Some(number), 0));
        }
        for number in [0, -1, 1, i64::MIN, i64::MAX] {
            assert_eq!(unzigzag(zigzag(number)), number);
        }
        assert_eq!(take_varint(&mut &[0xff; 11][..]), None);
    }
}
