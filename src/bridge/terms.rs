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
use crate::proto::mqtt::{ReasonCode, Version};

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
    /// Whether the last connection broke before there was an answer. Once, it was the line; twice in a row, it may be how
    /// the upstream answers.
    has_broken: bool,
    /// Whether a 3.1.1 upstream is told that we are a bridge, as Mosquitto's `try_private` does: one that knows the word
    /// does not send our own messages back. Some close the connection instead.
    is_bridge: bool,
    /// What the upstream takes of our will: not retained, or at QoS 0, if it must be so.
    will_retain: bool,
    will_qos: QoS,
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
            has_broken: false,
            is_bridge: true,
            will_retain: true,
            will_qos: QoS::AtLeastOnce,
        }
    }

    /// The CONNECT.
    pub fn options(&self, settings: &Settings, rules: &Checked, clean_start: bool) -> Options {
        let will = rules.state_topic.as_ref().map(|topic| Will {
            topic: topic.clone(),
            payload: Bytes::from_static(b"0"),
            qos: self.will_qos,
            retain: self.will_retain,
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
            is_bridge: self.is_bridge,
            // Whoever wants silence noticed early does not want to wait long for the answer either.
            answer_timeout: settings.keep_alive.min(ANSWER_TIMEOUT),
            ..Options::new(rules.client_id.as_str())
        }
    }

    /// The upstream has taken the CONNECT.
    pub fn taken(&mut self) {
        self.has_broken = false;
    }

    /// How many messages may be in flight, where the upstream allows `allowed`.
    pub fn window(&self, allowed: u16, rules: &Checked) -> u16 {
        if self.version < Version::V5 && rules.sends_qos_2() { OLD_QOS_2_WINDOW } else { allowed }
    }

    /// The upstream at `url` did not take the CONNECT: says why, or `None` where it may take what is asked for next.
    pub fn refused(&mut self, url: &Url, unwelcome: Unwelcome, who: Who<'_>) -> Option<String> {
        match unwelcome {
            Unwelcome::Refused { reason: ReasonCode::UnsupportedProtocolVersion, .. }
                if self.may_fall_back && self.version == Version::V5 =>
            {
                self.version = Version::V3_1_1;
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
                let may_be_the_line = matches!(unwelcome, Unwelcome::Closed(Some(_))) && !self.has_broken;
                self.has_broken = may_be_the_line;
                // Old brokers answer a version they do not know by closing, or in their own format. Which of the two
                // it was cannot be told, so both versions take turns.
                if self.may_fall_back && !may_be_the_line {
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
    fn a_line_that_breaks_is_not_taken_for_an_old_broker() {
        let url = Url::parse("mqtt://broker").unwrap();
        let who = Who { client_id: "gateway", username: None, proof: Proof::Given };
        let mut terms = Terms::new(VersionChoice::Newest);
        let broken = || Unwelcome::Closed(Some(io::ErrorKind::ConnectionReset.into()));
        let mut check = |unwelcome: Option<Unwelcome>, expected: Version| {
            match unwelcome {
                Some(unwelcome) => _ = terms.refused(&url, unwelcome, who),
                None => terms.taken(),
            }
            assert_eq!(terms.version, expected);
        };
        check(Some(broken()), Version::V5);
        check(None, Version::V5);
        check(Some(broken()), Version::V5);
        check(Some(broken()), Version::V3_1_1);
        // First without the mark of a bridge, then in turns again.
        check(Some(Unwelcome::Closed(None)), Version::V3_1_1);
        check(Some(Unwelcome::Closed(None)), Version::V5);
        check(Some(Unwelcome::Closed(None)), Version::V3_1_1);
    }
}
