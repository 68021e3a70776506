//! Messages of a lane as they lie in their runs: read and checked, and not yet messages.
//!
//! The store's thread reads runs and checks them; whoever sends what is in them makes messages of it, one run at a time.
//! So a message is made, encoded and freed by one processor, in whose cache it is, and two share the work of a backlog.
//! Its payload is a part of its run: a message that is kept keeps [`MAX_RUN_BYTES`](super::run) at most, or its own size
//! where that is more, and its neighbours mostly leave when it does.

use std::collections::VecDeque;

use bytes::Bytes;

use super::StoredMessage;
use super::op::{first_sequence, lane};
use super::read::{released_message, stored_message};
use super::row::{Malformed, parse_topic, properties_size};
use super::run::{Frame, Frames, Place, Topic};
use super::topics::Topics;
use crate::topic::TopicName;
#[cfg(test)]
use {
    super::batch::Row,
    super::run::Run,
    super::{SessionId, StoredState},
};

/// What was read of a lane, in the order of its sequences.
#[derive(Clone, Debug, Default)]
pub struct Packed {
    runs: VecDeque<PackedRun>,
    messages: usize,
    bytes: usize,
}

/// What is wanted of a run; or one message that is released.
#[derive(Clone, Debug)]
pub struct PackedRun {
    /// The sequences of its first and last message.
    first: u64,
    last: u64,
    messages: usize,
    content: Content,
}

#[derive(Clone, Debug)]
enum Content {
    Run { place: Place, frames: Bytes, topics: Box<[(i64, TopicName)]> },
    Released,
}

impl Packed {
    pub fn len(&self) -> usize {
        self.messages
    }

    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The memory that it holds, roughly.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The first sequence.
    pub fn first(&self) -> Option<u64> {
        self.runs.front().map(|run| run.first)
    }

    /// The last sequence.
    pub fn last(&self) -> Option<u64> {
        self.runs.back().map(|run| run.last)
    }

    /// Whether the receiver of some message has taken it.
    pub fn has_released(&self) -> bool {
        self.runs.iter().any(|run| matches!(run.content, Content::Released))
    }

    /// Puts `later`, whose sequences are higher, behind what is here.
    pub fn append(&mut self, mut later: Self) {
        self.messages += later.messages;
        self.bytes += later.bytes;
        self.runs.append(&mut later.runs);
    }

    /// Takes the first run off.
    pub fn pop(&mut self) -> Option<PackedRun> {
        let run = self.runs.pop_front()?;
        self.messages -= run.messages;
        self.bytes -= run.bytes();
        Some(run)
    }

    /// Makes all of its messages at once.
    pub fn unpack(&self) -> Vec<StoredMessage> {
        let mut messages = Vec::with_capacity(self.messages);
        self.runs.iter().for_each(|run| run.unpack(|stored| messages.push(stored)));
        messages
    }

    /// Packed as the store would, each message in a run of its own.
    #[cfg(test)]
    pub fn of(messages: &[StoredMessage]) -> Self {
        let mut packed = Self::default();
        for stored in messages {
            let StoredMessage { sequence, qos, retain, ref identifiers, ref shared, ref state } = *stored;
            let StoredState::Queued(message) = state else {
                packed.push_released(sequence);
                continue;
            };
            let (identifiers, shared, message) = (identifiers.clone(), shared.clone(), message.clone());
            let row = Row { session: SessionId(1), sequence, qos, retain, identifiers, shared, message };
            let run = Run::new(1, &row, None);
            let place = Place { slot: run.slot, first: run.first, accepted_at: run.accepted_at };
            let mut packing = Packing::new(lane(sequence), place, 0);
            Frames::new(place, &run.frames).for_each(|frame| packing.push(&frame));
            packing.finish(&mut packed);
        }
        packed
    }

    pub(super) fn push_released(&mut self, sequence: u64) {
        self.push(PackedRun { first: sequence, last: sequence, messages: 1, content: Content::Released });
    }

    fn push(&mut self, run: PackedRun) {
        self.messages += run.messages;
        self.bytes += run.bytes();
        self.runs.push_back(run);
    }
}

impl PackedRun {
    /// Makes its messages, and hands them to `each`.
    pub fn unpack(&self, mut each: impl FnMut(StoredMessage)) {
        let Content::Run { place, frames, topics } = &self.content else {
            return each(released_message(self.first));
        };
        let lane = lane(self.first);
        for frame in Frames::new(*place, frames) {
            let topic = match frame.topic {
                Topic::Number(number) => {
                    topics.iter().find(|(known, _)| *known == number).map(|(_, name)| name.clone())
                }
                Topic::Text(text) => parse_topic(text).ok(),
            };
            let payload = frames.slice_ref(frame.content.payload);
            // What was checked when it was packed is whole: nothing is left out here.
            if let Some(Ok(stored)) = topic.map(|topic| stored_message(&frame, lane, topic, payload)) {
                each(stored);
            }
        }
    }

    /// The memory that it holds, roughly.
    pub fn bytes(&self) -> usize {
        size_of::<Self>()
            + match &self.content {
                Content::Run { frames, topics, .. } => frames.len() + size_of_val(&**topics),
                Content::Released => 0,
            }
    }
}

/// A run that is being taken over from the database, without what is not wanted of it.
pub(super) struct Packing {
    lane: u8,
    place: Place,
    /// Numbers within the lane.
    first: u64,
    last: u64,
    messages: usize,
    frames: Vec<u8>,
    /// Those that have a number and occur in the run.
    topics: Vec<(i64, TopicName)>,
}

impl Packing {
    /// Makes room for `bytes` of frames.
    pub fn new(lane: u8, place: Place, bytes: usize) -> Self {
        let (frames, topics) = (Vec::with_capacity(bytes), Vec::new());
        Self { lane, place, first: 0, last: 0, messages: 0, frames, topics }
    }

    pub fn len(&self) -> usize {
        self.messages
    }

    /// Checks a frame; returns the size of its message, as `Message::size` gives it.
    ///
    /// # Errors
    /// It is not what was written.
    pub fn check(&mut self, frame: &Frame<'_>, topics: &Topics) -> Result<usize, Malformed> {
        let text;
        let topic = match frame.topic {
            Topic::Number(number) => match self.topics.iter().position(|(known, _)| *known == number) {
                Some(index) => &self.topics[index].1,
                None => {
                    let name = topics.name(number).ok_or(Malformed("topic number"))?;
                    &self.topics.push_mut((number, name.clone())).1
                }
            },
            Topic::Text(spelled) => {
                text = parse_topic(spelled)?;
                &text
            }
        };
        frame.check(topic)?;
        frame.content.check_form()?;
        Ok(topic.as_str().len() + frame.content.payload.len() + properties_size(frame.content.extra))
    }

    /// Adds a frame that was checked.
    pub fn push(&mut self, frame: &Frame<'_>) {
        if self.messages == 0 {
            self.first = frame.number;
        }
        self.last = frame.number;
        self.messages += 1;
        self.frames.extend_from_slice(frame.encoded);
    }

    /// Ends the run here, as something comes between; what follows of it is another one.
    pub fn cut(&mut self, packed: &mut Packed) {
        let rest = Self { topics: self.topics.clone(), ..Self::new(self.lane, self.place, 0) };
        std::mem::replace(self, rest).finish(packed);
    }

    /// Puts what was added to the end of `packed`.
    pub fn finish(mut self, packed: &mut Packed) {
        if self.messages == 0 {
            return;
        }
        self.frames.shrink_to_fit();
        let lane = first_sequence(self.lane);
        packed.push(PackedRun {
            first: lane | self.first,
            last: lane | self.last,
            messages: self.messages,
            content: Content::Run { place: self.place, frames: self.frames.into(), topics: self.topics.into() },
        });
    }
}
