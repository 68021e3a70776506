//! What is done about messages that the upstream may close the connection on: tried, sent as less, given up.

use std::sync::atomic::Ordering;
use std::time::Instant;

use tracing::{error, info, warn};

use super::Stream;
use crate::bridge::condition::DropReason;
use crate::bridge::suspicion::Lesson;
use crate::bridge::trial::{Offer, Trial, Turn};
use crate::hub::Outbound;
use crate::message::QoS;

impl Stream<'_> {
    /// Goes on with the trial. False where there is none, or none any more, and messages may flow.
    pub(super) fn is_trying(&mut self, now: Instant) -> bool {
        let Some(mut trial) = self.trial.take() else { return false };
        if trial.begin(now) {
            self.client.ping(now, self.encoded.bytes.get_mut());
        } else if self.client.is_answered() && self.window.unacknowledged == 0 {
            if trial.answered(now) {
                self.was_taken(&trial);
            }
            self.try_next(&mut trial, now);
        }
        if trial.is_over() {
            self.taken.extend(self.held.drain(..));
            return false;
        }
        self.trial = Some(trial);
        true
    }

    /// Sends one packet that will be answered, if there is one to be sent.
    fn try_next(&mut self, trial: &mut Trial, now: Instant) {
        let wall = self.shared.hub.clock().now();
        while trial.may_send() && self.window.unacknowledged == 0 {
            let suspect = self.held.iter().position(|outbound| trial.is_suspect(outbound));
            let due = suspect.filter(|_| trial.is_due()).and_then(|index| self.held.remove(index));
            let mut taken = Vec::from_iter(due);
            if taken.is_empty() {
                self.link.take(&mut taken, 1);
            }
            let Some(outbound) = taken.pop() else {
                if suspect.is_some() {
                    trial.hold_no_longer();
                    continue;
                }
                if self.link.is_idle() || !self.held.is_empty() {
                    // It has expired, or is out of reach.
                    trial.end();
                }
                return;
            };
            let turn = trial.turn(&outbound);
            match (turn, outbound) {
                (Turn::Hold, outbound) => self.held.push_back(outbound),
                (_, outbound) if self.is_condemned(&outbound) => self.refuse(&outbound),
                (turn, Outbound::Release(packet_id)) => {
                    self.window.sent(now);
                    self.client.release(packet_id, now, self.encoded.bytes.get_mut());
                    if turn == Turn::Offer {
                        trial.offered(Offer::LEAST, now);
                    }
                }
                (turn, Outbound::Publish(delivery)) => {
                    let limit = if turn == Turn::Offer { trial.offer } else { Offer::AS_WISHED };
                    match self.send(&delivery, limit, now, wall) {
                        Ok(offered) if turn == Turn::Offer => trial.offered(offered, now),
                        Ok(_) if self.window.unacknowledged > 0 => trial.sent(&delivery),
                        Ok(_) => {}
                        Err(reason) => {
                            self.give_up(&delivery, reason);
                            if turn == Turn::Offer {
                                trial.end();
                            }
                        }
                    }
                }
            }
        }
    }

    /// The suspect was taken, perhaps as less than it was.
    fn was_taken(&mut self, trial: &Trial) {
        let Some(about) = &trial.suspect().message else { return };
        let (upstream, topic) = (&self.shared.name, &about.topic);
        if trial.offer == Offer::AS_WISHED {
            info!(upstream, topic, "the upstream has taken the message that it seemed to close the connection on");
            return;
        }
        let Ok(rule) = self.rules.outgoing.map(topic, &mut self.topic) else { return };
        let lesson = Lesson { filter: rule.filter.clone(), offer: trial.offer };
        warn!(upstream, topic, "{lesson}");
        self.shared.note(lesson.to_string());
        self.lessons.push(lesson);
    }

    /// As what messages of the rule with this filter are sent, at most.
    pub(super) fn lesson(&self, filter: &crate::topic::TopicFilter) -> Offer {
        let lessons = self.lessons.iter().filter(|lesson| lesson.filter == *filter);
        lessons.fold(Offer::AS_WISHED, |offer, lesson| offer.and(lesson.offer))
    }

    pub(super) fn is_condemned(&self, outbound: &Outbound) -> bool {
        self.condemned.as_ref().is_some_and(|suspect| suspect.is(outbound))
    }

    /// Gives up what the upstream closes the connection on.
    pub(super) fn refuse(&mut self, outbound: &Outbound) {
        let Some(suspect) = self.condemned.take() else { return };
        let (upstream, counters) = (&self.shared.name, &self.shared.counters);
        match outbound {
            Outbound::Release(packet_id) => {
                self.link.completed(*packet_id);
                // The upstream has had the message itself.
                counters.sent.fetch_add(1, Ordering::Relaxed);
                error!(upstream, "the upstream closes the connection on {suspect}, which is not sent any more");
                return;
            }
            Outbound::Publish(delivery) => {
                let Some(packet_id) = delivery.packet_id else { return };
                let rule = self.rules.outgoing.map(delivery.message.topic.as_str(), &mut self.topic);
                let qos = rule.map_or(delivery.qos, |rule| delivery.qos.min(rule.qos));
                if qos == QoS::ExactlyOnce && !self.is_new {
                    // The upstream may have begun with it, and would take the next one under its identifier for it.
                    self.link.received(packet_id);
                    self.refused = Some(packet_id);
                } else {
                    self.link.acknowledge(packet_id);
                }
            }
        }
        self.shared.dropped(DropReason::Refused, || suspect.to_string());
        error!(
            upstream,
            "the upstream closed the connection each time it got {suspect}, and took others: it was given up; if such \
             messages are to arrive, allow them there, or change what the `out` rule makes of their topic, QoS and retain flag; \
             if they are too large, `bridge_max_packet_size` drops them before they cost a connection"
        );
    }
}
