//! Packet identifiers of a lane that its receiver may hold for messages that are lost.
//!
//! A QoS 2 message may have been sent and then lost with a damaged database. Its receiver holds its packet identifier
//! until it is told to release it (MQTT 5.0 §4.3.3), and takes the next message under that identifier for the lost one: it
//! would be lost too, and without a word. Which identifiers these are nobody knows. So each is released before it is used
//! again: a step of them at a time, and when the receiver has answered that is journaled, so that after a crash it is known
//! which messages cannot have been sent yet. Once all of the lane have been round it is as any other.
//!
//! A lane that sends nothing at QoS 2 releases nothing: its receiver need not know what a PUBREL is.

use std::collections::HashSet;
use std::sync::Arc;

use tracing::warn;

use super::{Lane, Outbound, PacketId};
use crate::message::QoS;
use crate::signal::Signal;
use crate::store::{Cleared, Op, Receipt, ReceiptState, first_sequence, lane};

/// How many identifiers are released at a time, in windows: what is sent behind them makes up for the wait.
const STEP_WINDOWS: u64 = 8;
const MIN_STEP: u64 = 64;
const MAX_STEP: u64 = 1024;

/// How many connections in a row may be lost on the first answer. There are clients that close theirs on a PUBREL for what
/// they do not hold, and would do so for ever.
const MAX_FRUITLESS: u32 = 10;

#[derive(Debug)]
pub(super) struct Clearing {
    /// How far it has come; `None` until the first QoS 2 message is to be sent.
    cleared: Option<Cleared>,
    step: Option<Step>,
    /// Connections that were lost with identifiers released and none answered, since the last answer.
    fruitless: u32,
}

#[derive(Debug)]
enum Step {
    /// The identifiers of the sequences before `end` are being released; the one of `next` is the next to be.
    Releasing { next: u64, end: u64, until: u64, awaited: HashSet<PacketId> },
    /// The receiver holds none of them; that is being journaled.
    Journaled { cleared: Cleared, receipt: Arc<Receipt> },
}

impl Clearing {
    /// Lets go of a step that is under way; returns how many answers it waited for.
    fn give_up_step(&mut self) -> usize {
        match self.step.take() {
            Some(Step::Releasing { awaited, .. }) => awaited.len(),
            step => {
                self.step = step;
                0
            }
        }
    }

    /// Whether the message with this sequence may have been sent before the gateway stopped.
    pub fn may_have_sent(&self, sequence: u64) -> bool {
        self.cleared.is_none_or(|cleared| sequence < cleared.below)
    }
}

impl Lane {
    /// The receiver may hold identifiers of messages that are lost; `cleared` says how far that has been cleared up.
    pub fn doubt(&mut self, cleared: Option<Cleared>) {
        let given_up = self.clearing.as_mut().map_or(0, |clearing| clearing.give_up_step());
        self.outstanding -= given_up;
        let is_over = cleared.is_some_and(Cleared::is_over);
        self.clearing = (!is_over).then(|| Box::new(Clearing { cleared, step: None, fruitless: 0 }));
    }

    /// Whether the message that waits first may be sent, for all that is known of its identifier. Otherwise moves what
    /// it takes for that to `into`, up to its length `end`.
    pub(super) fn clear(&mut self, into: &mut Vec<Outbound>, end: usize, window: u16) -> bool {
        let (Some(entry), Some(clearing)) = (self.waiting.front(), &mut self.clearing) else { return true };
        let (sequence, qos) = (entry.sequence, entry.incoming.qos);
        if let Some(Step::Journaled { cleared, receipt }) = &clearing.step {
            match receipt.state() {
                ReceiptState::Pending => {}
                ReceiptState::Done if cleared.is_over() => {
                    self.clearing = None;
                    return true;
                }
                ReceiptState::Done => (clearing.cleared, clearing.step) = (Some(*cleared), None),
                ReceiptState::Failed => clearing.step = None,
            }
        }
        match clearing.cleared {
            // Messages that its receiver merely has to acknowledge are as good under an identifier that it holds.
            None if qos != QoS::ExactlyOnce => return true,
            Some(cleared) if sequence < cleared.below => return true,
            _ => {}
        }
        let (cleared, is_begun) = (clearing.cleared, clearing.step.is_some());
        let step = if is_begun { None } else { self.next_step(cleared, sequence, window) };
        let Some(clearing) = &mut self.clearing else { return true };
        clearing.step = clearing.step.take().or(step);
        if let Some(Step::Releasing { next, end: last, awaited, .. }) = &mut clearing.step {
            while next < last && into.len() < end && self.outstanding < usize::from(window) {
                let id = self.identifiers.of(*next);
                into.push(Outbound::Release(id));
                awaited.insert(id);
                *next += 1;
                self.outstanding += 1;
            }
        }
        false
    }

    /// The identifiers to release before the message with this sequence may be sent; `None` where that has to wait.
    fn next_step(&self, cleared: Option<Cleared>, sequence: u64, window: u16) -> Option<Step> {
        let size = (u64::from(window) * STEP_WINDOWS).clamp(MIN_STEP, MAX_STEP);
        let Cleared { below, until } = match cleared {
            Some(cleared) => cleared,
            // What was begun before is over first. The receiver most likely holds what was lost right before this message.
            None if !self.inflight.is_empty() => return None,
            None => {
                let below = sequence.saturating_sub(size).max(first_sequence(lane(sequence)));
                Cleared { below, until: below + u64::from(self.identifiers.count) }
            }
        };
        let end = (sequence + size).min(until).max(below);
        // No identifier of a message that is not over is among them.
        let is_free =
            self.inflight.front().is_none_or(|oldest| end <= oldest.sequence + u64::from(self.identifiers.count));
        is_free.then(|| Step::Releasing { next: below, end, until, awaited: HashSet::new() })
    }

    /// PUBCOMP for an identifier that was released to be free. False where it was released for a message.
    pub(super) fn is_cleared(&mut self, id: PacketId, signal: &Arc<Signal>, ops: &mut Vec<Op>) -> bool {
        let Some(clearing) = &mut self.clearing else { return false };
        let Some(Step::Releasing { next, end, until, awaited }) = &mut clearing.step else { return false };
        if !awaited.remove(&id) {
            return false;
        }
        self.outstanding -= 1;
        clearing.fruitless = 0;
        if next == end && awaited.is_empty() {
            let cleared = Cleared { below: *end, until: *until };
            self.journal_cleared(cleared, signal, ops);
        }
        true
    }

    #[cfg(test)]
    pub fn is_in_doubt(&self) -> bool {
        self.clearing.is_some()
    }

    /// The receiver has begun anew: it holds nothing.
    pub fn clear_all(&mut self, signal: &Arc<Signal>, ops: &mut Vec<Op>) {
        if self.clearing.is_some() {
            let below = self.next_sequence;
            self.journal_cleared(Cleared { below, until: below }, signal, ops);
        }
    }

    fn journal_cleared(&mut self, cleared: Cleared, signal: &Arc<Signal>, ops: &mut Vec<Op>) {
        let receipt = Receipt::new(signal.clone());
        receipt.add();
        ops.push(Op::Clear { session: self.session, cleared, receipt: Some(receipt.clone()) });
        if let Some(clearing) = &mut self.clearing {
            clearing.step = Some(Step::Journaled { cleared, receipt });
        }
    }

    /// A new connection: the step that is under way begins anew.
    pub(super) fn rewind_clearing(&mut self) {
        let Some(clearing) = &mut self.clearing else { return };
        clearing.fruitless += u32::from(clearing.give_up_step() > 0);
        if clearing.fruitless >= MAX_FRUITLESS {
            self.clearing = None;
            warn!(
                session = self.session.0,
                "a receiver has lost {MAX_FRUITLESS} connections in a row on PUBREL packets for packet identifiers that it \
                 may or may not hold since the database was damaged; they are used without asking it, and a QoS 2 message \
                 that it takes for one it has is lost"
            );
        }
    }
}
