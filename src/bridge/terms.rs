//! On which terms an upstream takes us: what a CONNECT says, and what is learnt from how it is received. Pure.

use std::time::Duration;

use bytes::Bytes;

use super::handshake::Unwelcome;
use super::settings::{Checked, Settings, VersionChoice};
use super::url::Url;
use super::words::{self, Who};
use crate::message::QoS;
use crate::proto::mqtt::client::Options;
use crate::proto::mqtt::server::Will;
use crate::proto::mqtt::{MAX_PACKET_BYTES, ReasonCode, Version};

/// How long the upstream may take to answer a SUBSCRIBE or PINGREQ.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// How many messages may be in flight towards a 3.1.1 upstream where QoS 2 is among them. It cannot say what it takes,
/// and mosquitto closes the connection on the twenty-first QoS 2 message (its `max_inflight_messages`).
const OLD_QOS_2_WINDOW: u16 = 20;

/// What the next CONNECT asks for.
pub(super) struct Terms {
    pub version: Version,
    /// Whether the upstream may rather take the other version.
    may_fall_back: bool,
    /// What is known of the versions that it takes.
    insight: Insight,
    /// Whether a 3.1.1 upstream is told that we are a bridge, as Mosquitto's `try_private` does: one that knows the word
    /// does not send our own messages back. Some close the connection instead.
    is_bridge: bool,
    /// How often in a row it has closed the connection on the question which gateway it is.
    closed_on_question: u8,
    /// What the upstream takes of our will: not retained, or at QoS 0, if it must be so.
    will_retain: bool,
    will_qos: QoS,
    /// What it may take of our will where it closes the connection on the CONNECT.
    will: WillTerms,
    /// How many CONNECTs in a row it has closed the connection on.
    closes: u32,
}

/// How much of our will a CONNECT holds. An upstream that closes the connection on one may do so for the will; what is tried
/// then must show that it takes that and not the whole, which starting up could look like too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WillTerms {
    Whole,
    /// Tried, as the whole was not answered.
    Less(Less),
    /// The whole once more, as that was taken.
    WholeAgain(Less),
    /// Known to be all that is taken.
    Only(Less),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Less {
    NotRetained,
    /// Nor acknowledged.
    AtMostOnce,
    None,
}

/// After how many CONNECTs that were answered by closing, with one version of MQTT, less of the will is tried.
const CLOSES: u32 = 3;

/// What is known of the versions that an upstream takes. A connection that is closed before its CONNACK may mean an old
/// broker, but more often one that starts up, a load balancer with nobody behind it, or a broken line: what is lost with
/// 5.0 (expiry, hops, limits, reasons) is not given up for that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Insight {
    /// It has not answered in MQTT yet.
    None,
    /// It has closed on a CONNECT of 5.0 without a word.
    Silent,
    /// It takes 3.1.1, and was only silent about 5.0, which is tried once more.
    TakesOlder,
    /// It takes `version`, and nothing newer.
    Settled,
}

impl Terms {
    /// The best there are.
    pub fn new(choice: VersionChoice) -> Self {
        Self {
            version: match choice {
                VersionChoice::Newest | VersionChoice::V5 => Version::V5,
                VersionChoice::V3_1_1 => Version::V3_1_1,
            },
            may_fall_back: choice == VersionChoice::Newest,
            insight: Insight::None,
            is_bridge: true,
            closed_on_question: 0,
            will_retain: true,
            will_qos: QoS::AtLeastOnce,
            will: WillTerms::Whole,
            closes: 0,
        }
    }

    /// The CONNECT.
    pub fn options(&self, settings: &Settings, rules: &Checked, clean_start: bool) -> Options {
        let less = match self.will {
            WillTerms::Whole | WillTerms::WholeAgain(_) => None,
            WillTerms::Less(less) | WillTerms::Only(less) => Some(less),
        };
        let will = rules.state_topic.as_ref().filter(|_| less != Some(Less::None)).map(|topic| Will {
            topic: topic.clone(),
            payload: Bytes::from_static(b"0"),
            qos: if less == Some(Less::AtMostOnce) { QoS::AtMostOnce } else { self.will_qos },
            retain: self.will_retain && less.is_none(),
            properties: None,
            expiry_interval: None,
            delay: Duration::ZERO,
        });
        Options {
            version: self.version,
            clean_start,
            keep_alive: settings.keep_alive.as_secs().try_into().unwrap_or(u16::MAX),
            session_expiry: settings.session_expiry.as_secs().try_into().unwrap_or(u32::MAX),
            user_name: settings.username.clone(),
            password: settings.password.as_ref().map(|password| password.reveal().as_bytes().to_vec()),
            will,
            max_packet_size: settings.max_packet_size,
            max_sent_packet_size: settings.bridge_max_packet_size.unwrap_or(MAX_PACKET_BYTES),
            is_bridge: self.is_bridge,
            // Whoever wants silence noticed early does not want to wait long for the answer either.
            answer_timeout: settings.keep_alive.min(ANSWER_TIMEOUT),
            ..Options::new(rules.client_id.as_str())
        }
    }

    /// Whether to ask the upstream which gateway it is: not one that takes no bridges, such as AWS IoT Core, which closes the
    /// connection on a subscription to `$SYS`. Once may have been the line, twice is no chance.
    pub fn asks(&self) -> bool {
        self.is_bridge && !self.version.is_5() && self.closed_on_question < 2
    }

    /// A connection on which it was asked has ended, or was lost before the answer.
    pub fn asked(&mut self, is_lost: bool) {
        self.closed_on_question = if is_lost { self.closed_on_question.saturating_add(1) } else { 0 };
    }

    /// How many messages may be in flight, where the upstream allows `allowed`.
    pub fn window(&self, allowed: u16, rules: &Checked) -> u16 {
        if self.version < Version::V5 && rules.sends_qos_2() { OLD_QOS_2_WINDOW } else { allowed }
    }

    /// The upstream took the CONNECT. False where it may take a better one, which is to be tried first.
    pub fn taken(&mut self) -> bool {
        if self.may_fall_back && !self.version.is_5() && self.insight == Insight::Silent {
            self.version = Version::V5;
            self.insight = Insight::TakesOlder;
            return false;
        }
        self.insight = Insight::Settled;
        self.closes = 0;
        self.will = match self.will {
            WillTerms::Whole | WillTerms::WholeAgain(_) => WillTerms::Whole,
            WillTerms::Only(less) => WillTerms::Only(less),
            WillTerms::Less(less) => {
                self.will = WillTerms::WholeAgain(less);
                return false;
            }
        };
        true
    }

    /// What a person is to be told of terms that are less than what was wished.
    pub fn notice(&self) -> Option<String> {
        let WillTerms::Only(less) = self.will else { return None };
        let how = match less {
            Less::NotRetained => "it is not retained",
            Less::AtMostOnce => "it is not retained, and at QoS 0",
            Less::None => "it is left out",
        };
        Some(format!(
            "the upstream closes the connection on our will on `state_topic`: {how}, so who comes later may not see that the \
             gateway is away; check what it allows on that topic"
        ))
    }

    /// A CONNECT was answered by closing: tries less of the will in turn, where there is one. True where it is known by now
    /// that it was the will.
    fn lessen(&mut self, has_will: bool) -> bool {
        match self.will {
            WillTerms::WholeAgain(less) => {
                self.will = WillTerms::Only(less);
                return true;
            }
            WillTerms::Only(_) => return false,
            WillTerms::Whole | WillTerms::Less(_) => {}
        }
        self.closes = self.closes.saturating_add(1);
        let versions = if self.may_fall_back && self.insight != Insight::Settled { 2 } else { 1 };
        if has_will && self.closes >= CLOSES * versions {
            let turn = (self.closes / versions).saturating_sub(CLOSES) % 4;
            self.will = match turn {
                0 => WillTerms::Less(Less::NotRetained),
                1 => WillTerms::Less(Less::AtMostOnce),
                2 => WillTerms::Less(Less::None),
                _ => WillTerms::Whole,
            };
        }
        false
    }

    /// The upstream at `url` did not take the CONNECT: says why, or `None` where it may take what is asked for next.
    pub fn refused(&mut self, url: &Url, unwelcome: Unwelcome, who: Who<'_>, has_will: bool) -> Option<String> {
        match unwelcome {
            Unwelcome::Refused { reason: ReasonCode::UnsupportedProtocolVersion, .. }
                if self.may_fall_back && self.version == Version::V5 =>
            {
                self.version = Version::V3_1_1;
                self.insight = Insight::Settled;
                None
            }
            Unwelcome::Closed(_) | Unwelcome::Garbled(_) if self.insight == Insight::TakesOlder => {
                self.version = Version::V3_1_1;
                self.insight = Insight::Settled;
                None
            }
            Unwelcome::Refused { reason: ReasonCode::RetainNotSupported, .. } if self.will_retain => {
                self.will_retain = false;
                None
            }
            Unwelcome::Refused { reason: ReasonCode::QoSNotSupported, .. } if self.will_qos != QoS::AtMostOnce => {
                self.will_qos = QoS::AtMostOnce;
                None
            }
            Unwelcome::Refused { reason: ReasonCode::UnsupportedProtocolVersion, .. }
            | Unwelcome::Closed(_)
            | Unwelcome::Garbled(_)
                if self.is_bridge && !self.version.is_5() =>
            {
                self.is_bridge = false;
                None
            }
            Unwelcome::Refused { reason, detail } => Some(words::refused(reason, detail.as_deref(), who)),
            Unwelcome::Closed(_) | Unwelcome::Garbled(_) => {
                let spoken = self.version.name();
                // It was not the mark then.
                self.is_bridge = true;
                if matches!(unwelcome, Unwelcome::Closed(_)) && self.lessen(has_will) {
                    return None;
                }
                // Old brokers answer a version they do not know by closing, or in their own format. Which of the two
                // it was cannot be told, so both versions take turns until one is taken.
                if self.may_fall_back && self.insight != Insight::Settled {
                    if self.version.is_5() && matches!(unwelcome, Unwelcome::Closed(_)) {
                        self.insight = Insight::Silent;
                    }
                    self.version = if self.version == Version::V5 { Version::V3_1_1 } else { Version::V5 };
                }
                Some(match unwelcome {
                    Unwelcome::Garbled(error) => {
                        format!("{url} does not answer in MQTT {spoken}: {error}; is it an MQTT port?")
                    }
                    Unwelcome::Closed(Some(error)) => format!(
                        "{url} broke the connection instead of answering an MQTT {spoken} CONNECT ({error}); is it an MQTT \
                         port, and does it want TLS or a client certificate?"
                    ),
                    _ => format!(
                        "{url} closed the connection instead of answering an MQTT {spoken} CONNECT; is it an MQTT port, and \
                         does it want TLS or a client certificate?"
                    ),
                })
            }
            Unwelcome::Silent => {
                Some(format!("{url} accepted the connection but does not answer; is it an MQTT port?"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::bridge::words::Proof;

    #[test]
    fn silence_is_taken_for_an_old_broker_only_when_it_is_heard_again_after_an_answer_in_3_1_1() {
        let url = Url::parse("mqtt://broker").unwrap();
        let who = Who { client_id: "gateway", username: None, proof: Proof::Given };
        let broken = || Unwelcome::Closed(Some(io::ErrorKind::ConnectionReset.into()));
        let closed = || Unwelcome::Closed(None);
        let check = |steps: Vec<(Option<Unwelcome>, Version)>| {
            let mut terms = Terms::new(VersionChoice::Newest);
            for (number, (unwelcome, expected)) in steps.into_iter().enumerate() {
                match unwelcome {
                    Some(unwelcome) => _ = terms.refused(&url, unwelcome, who, false),
                    None => {
                        let before = terms.version;
                        assert_eq!(terms.taken(), before == expected, "step {number}");
                    }
                }
                assert_eq!(terms.version, expected, "step {number}");
            }
        };
        let (older, newer) = (Version::V3_1_1, Version::V5);
        // The line, or an upstream that starts up: once 5 was taken, nothing changes that.
        for silent in [broken as fn() -> Unwelcome, closed] {
            check(vec![(Some(silent()), older), (None, newer), (None, newer), (Some(silent()), newer)]);
        }
        // An old broker, with and without the mark of a bridge.
        check(vec![(Some(closed()), older), (None, newer), (Some(closed()), older), (None, older)]);
        // Nobody there who speaks MQTT: both take turns.
        check(vec![(Some(closed()), older), (Some(closed()), older), (Some(closed()), newer), (Some(closed()), older)]);
    }

    #[test]
    fn a_will_is_given_up_only_where_less_of_it_is_taken_and_the_whole_is_not() {
        let url = Url::parse("mqtt://broker").unwrap();
        let who = Who { client_id: "gateway", username: None, proof: Proof::Given };
        let close = |terms: &mut Terms| terms.refused(&url, Unwelcome::Closed(None), who, true).is_none();
        let mut terms = Terms::new(VersionChoice::V5);
        // It starts up: the whole is taken once it is there.
        (0..CLOSES).for_each(|_| assert!(!close(&mut terms)));
        assert_eq!(terms.will, WillTerms::Less(Less::NotRetained));
        assert!(!terms.taken());
        assert!(terms.taken());
        assert_eq!((terms.will, terms.notice()), (WillTerms::Whole, None));
        // It takes none that is acknowledged.
        let takes = |terms: &Terms| matches!(terms.will, WillTerms::Less(Less::AtMostOnce) | WillTerms::Only(_));
        let mut attempts = 0;
        loop {
            attempts += 1;
            let is_taken = takes(&terms) && terms.taken();
            if is_taken {
                break;
            }
            if !takes(&terms) {
                close(&mut terms);
            }
        }
        assert_eq!((terms.will, attempts), (WillTerms::Only(Less::AtMostOnce), 6));
        assert!(terms.notice().unwrap().contains("at QoS 0"));
        // Nor does it matter who is away then.
        close(&mut terms);
        assert_eq!(terms.will, WillTerms::Only(Less::AtMostOnce));
    }
}
