//! One connection on which a message is tried that upstreams may close connections on. Pure.
//!
//! First nothing is sent for a while, and a PINGREQ is answered: the line is good, and the upstream there. Then what the
//! session has goes one by one, each after the answer to the one before, until it is the suspect's turn. Where the trial
//! is to show that the upstream takes others, the suspect is held back until one of those was acknowledged, and with it
//! whatever is on its topic or on one that is to be avoided.

use std::time::{Duration, Instant};

use crate::hub::{Delivery, Outbound, PacketId, Unanswered};
use crate::message::QoS;

/// How many messages are held back at most, until one is found that may go first.
const MAX_HELD: usize = 64;
/// A connection that ends later than this after the suspect was sent, or than the keep alive, has not ended for it: a
/// slow line takes that long for what is large, and an upstream may close what it has heard nothing whole from.
const LATE: Duration = Duration::from_secs(15);

/// A packet that was sent and not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suspect {
    pub packet_id: PacketId,
    /// `None` for the PUBREL of a message that the upstream has.
    pub message: Option<About>,
}

/// What tells a message from others with its identifier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    pub topic: String,
    /// Of topic, payload and properties.
    pub bytes: usize,
}

impl Suspect {
    /// Whether this is the packet that is meant.
    pub fn is(&self, outbound: &Outbound) -> bool {
        match (outbound, &self.message) {
            (Outbound::Release(packet_id), None) => *packet_id == self.packet_id,
            (Outbound::Publish(delivery), Some(about)) => {
                let message = &delivery.message;
                delivery.packet_id == Some(self.packet_id)
                    && message.topic.as_str() == about.topic
                    && message.size() == about.bytes
            }
            _ => false,
        }
    }
}

impl From<&Unanswered> for Suspect {
    fn from(unanswered: &Unanswered) -> Self {
        let about = unanswered.message.as_deref();
        let about = about.map(|message| About { topic: message.topic.to_string(), bytes: message.size() });
        Self { packet_id: unanswered.packet_id, message: about }
    }
}

impl std::fmt::Display for Suspect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let id = self.packet_id;
        match &self.message {
            Some(About { topic, bytes }) => {
                write!(f, "the message on `{topic}` ({bytes} bytes, packet identifier {id})")
            }
            None => write!(f, "the PUBREL of packet identifier {id}"),
        }
    }
}

/// As what a message is sent, at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    pub retain: bool,
    pub qos: QoS,
}

impl Offer {
    /// As publisher, rule and upstream allow.
    pub const AS_WISHED: Self = Self { retain: true, qos: QoS::ExactlyOnce };

    /// What every upstream takes.
    pub const LEAST: Self = Self { retain: false, qos: QoS::AtLeastOnce };

    /// What both allow.
    pub fn and(self, other: Self) -> Self {
        Self { retain: self.retain && other.retain, qos: self.qos.min(other.qos) }
    }

    /// The next to try where a message was not taken as this.
    pub fn less(self) -> Option<Self> {
        match self {
            Self { retain: true, qos } => Some(Self { retain: false, qos }),
            Self { retain: false, qos: QoS::ExactlyOnce } => Some(Self { retain: true, qos: QoS::AtLeastOnce }),
            Self { retain: false, .. } => None,
        }
    }
}

/// What a trial has shown once the connection has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// The connection ended before the suspect was sent, or the suspect was answered.
    Nothing,
    /// It ended with a message on this topic unanswered, which was to go first.
    OtherClosed(String),
    /// It ended so long `after` the suspect was sent.
    Closed {
        after: Duration,
        /// Another message was acknowledged before.
        behind_another: bool,
        /// As what it was sent.
        offered: Offer,
    },
    /// So late that it may have been for another reason.
    Late,
}

/// What is to be done with what the session hands out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    Send,
    Offer,
    Hold,
}

#[derive(Debug)]
pub struct Trial {
    suspect: Suspect,
    pub offer: Offer,
    /// How long nothing is sent first.
    pub quiet: Duration,
    /// Topics of which nothing may go before the suspect; `None` where nothing at all may.
    avoided: Option<Vec<String>>,
    held: usize,
    behind_another: bool,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Begun,
    /// Nothing is sent.
    Quiet {
        since: Instant,
    },
    /// One by one; the topic of the message that is out.
    Others(Option<String>),
    Offered {
        at: Instant,
        offered: Offer,
    },
    Over,
}

impl Trial {
    /// Lets messages on other topics than the suspect's and those of `passing` go first, if that is given.
    pub fn new(suspect: Suspect, offer: Offer, quiet: Duration, passing: Option<Vec<String>>) -> Self {
        let avoided = passing.map(|mut topics| {
            topics.extend(suspect.message.as_ref().map(|about| about.topic.clone()));
            topics
        });
        Self { suspect, offer, quiet, avoided, held: 0, behind_another: false, stage: Stage::Begun }
    }

    /// Begins to be quiet. True the first time: a PINGREQ is due.
    pub fn begin(&mut self, now: Instant) -> bool {
        let begins = matches!(self.stage, Stage::Begun);
        if begins {
            self.stage = Stage::Quiet { since: now };
        }
        begins
    }

    /// When something may be sent.
    pub fn quiet_until(&self) -> Option<Instant> {
        match self.stage {
            Stage::Quiet { since } => Some(since + self.quiet),
            _ => None,
        }
    }

    /// Nothing that was sent waits for an answer. True if that was the suspect.
    pub fn answered(&mut self, now: Instant) -> bool {
        match &mut self.stage {
            Stage::Quiet { since } if now >= *since + self.quiet => self.stage = Stage::Others(None),
            Stage::Begun | Stage::Quiet { .. } | Stage::Over => {}
            Stage::Others(out) => self.behind_another |= out.take().is_some(),
            Stage::Offered { .. } => {
                self.stage = Stage::Over;
                return true;
            }
        }
        false
    }

    pub fn may_send(&self) -> bool {
        matches!(self.stage, Stage::Others(None))
    }

    pub fn is_over(&self) -> bool {
        matches!(self.stage, Stage::Over)
    }

    /// Whether the suspect is not to be held back any longer.
    pub fn is_due(&self) -> bool {
        self.avoided.is_none() || self.behind_another || self.held >= MAX_HELD
    }

    pub fn suspect(&self) -> &Suspect {
        &self.suspect
    }

    /// There is no other message that could go first.
    pub fn hold_no_longer(&mut self) {
        self.avoided = None;
    }

    pub fn is_suspect(&self, outbound: &Outbound) -> bool {
        self.suspect.is(outbound)
    }

    pub fn turn(&mut self, outbound: &Outbound) -> Turn {
        if self.is_suspect(outbound) && self.is_due() {
            return Turn::Offer;
        }
        let waits = match outbound {
            Outbound::Release(_) => false,
            // Nobody would know what the connection ended for.
            Outbound::Publish(Delivery { packet_id: None, .. }) => true,
            Outbound::Publish(delivery) => {
                let topic = delivery.message.topic.as_str();
                self.avoided.as_ref().is_some_and(|avoided| avoided.iter().any(|one| one == topic))
            }
        };
        if waits || self.is_suspect(outbound) {
            self.held += 1;
            return Turn::Hold;
        }
        Turn::Send
    }

    /// A message that is not the suspect was sent, and will be answered.
    pub fn sent(&mut self, delivery: &Delivery) {
        self.stage = Stage::Others(Some(delivery.message.topic.to_string()));
    }

    /// The suspect was sent.
    pub fn offered(&mut self, offered: Offer, now: Instant) {
        self.stage = Stage::Offered { at: now, offered };
    }

    /// There is nothing to try any more.
    pub fn end(&mut self) {
        self.stage = Stage::Over;
    }

    /// What was shown, where the connection has ended.
    pub fn finding(self, now: Instant, keep_alive: Duration) -> Finding {
        let late = if keep_alive.is_zero() { LATE } else { LATE.min(keep_alive) };
        match self.stage {
            Stage::Begun | Stage::Quiet { .. } | Stage::Others(None) | Stage::Over => Finding::Nothing,
            Stage::Others(Some(topic)) => Finding::OtherClosed(topic),
            Stage::Offered { at, .. } if now.duration_since(at) >= late => Finding::Late,
            Stage::Offered { at, offered } => {
                Finding::Closed { after: now.duration_since(at), behind_another: self.behind_another, offered }
            }
        }
    }
}
