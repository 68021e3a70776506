//! What is said before messages flow: our state and our subscriptions, at once or one by one.

use std::time::Instant;

use tracing::warn;

use super::{End, Stream};
use crate::bridge::manners::{Open, Said};
use crate::proto::mqtt::{PacketId, PublishHead, RetainHandling, Subscription, SubscriptionOptions};

/// AWS IoT Core takes no more in one SUBSCRIBE.
const SUBSCRIPTIONS_PER_PACKET: usize = 8;

impl Stream<'_> {
    /// Says what is to be said at once; of what is said one by one nothing, but asks whether the upstream is there.
    pub(super) fn begin(&mut self, now: Instant) -> Result<(), End> {
        self.has_heard = false;
        if self.greeting.is_one_by_one {
            self.client.ping(now, self.encoded.bytes.get_mut());
            return Ok(());
        }
        let is_rule = |said: &Said| match *said {
            Said::Rule(index) => Some(index),
            Said::State => None,
        };
        let rules: Vec<_> = self.greeting.said.iter().filter_map(is_rule).collect();
        // First what has no answer of its own: the next answer shows that it was taken.
        if self.greeting.said.contains(&Said::State) {
            self.say_state("1", now);
        }
        rules.chunks(SUBSCRIPTIONS_PER_PACKET).try_for_each(|rules| self.subscribe(rules, now))
    }

    /// Whether messages may flow. Goes on with what is said one by one.
    pub(super) fn is_greeted(&mut self, now: Instant) -> Result<bool, End> {
        if !self.requests.is_empty() {
            return Ok(false);
        }
        if !self.greeting.is_one_by_one {
            return Ok(true);
        }
        if !self.client.is_answered() {
            return Ok(false);
        }
        self.saying = self.greeting.said.pop_front();
        match self.saying {
            None => self.greeting.is_one_by_one = false,
            Some(Said::Rule(index)) => self.subscribe(&[index], now)?,
            Some(Said::State) => {
                self.say_state("1", now);
                self.client.ping(now, self.encoded.bytes.get_mut());
            }
        }
        Ok(self.saying.is_none())
    }

    /// What has no answer yet.
    pub(super) fn unanswered_greeting(&self) -> Open {
        match self.saying {
            Some(said) => Open::One(said),
            None if self.greeting.is_one_by_one || !self.requests.is_empty() => Open::Some,
            None if self.greeting.said.contains(&Said::State) && !self.has_heard => Open::Some,
            None => Open::Nothing,
        }
    }

    /// Subscribes to what the `in` rules with these indices want.
    fn subscribe(&mut self, rules: &[usize], now: Instant) -> Result<(), End> {
        let rules: Vec<_> = rules.iter().filter_map(|index| self.rules.incoming.iter().nth(*index)).collect();
        let options = |qos| SubscriptionOptions {
            qos,
            no_local: true,
            retain_as_published: true,
            retain_handling: RetainHandling::SendIfNew,
        };
        let entries: Vec<_> = rules
            .iter()
            .map(|rule| Subscription { filter: rule.filter.as_str(), options: options(rule.qos) })
            .collect();
        let filters = rules.iter().map(|rule| rule.filter.to_string()).collect();
        self.subscribe_to(&entries, filters, now).map(|_| ())
    }

    /// Subscribes to `entries`, of which `filters` are to be named where they are refused.
    pub(super) fn subscribe_to(
        &mut self,
        entries: &[Subscription<'_>],
        filters: Vec<String>,
        now: Instant,
    ) -> Result<PacketId, End> {
        let packet_id = self
            .client
            .subscribe(entries, now, self.encoded.bytes.get_mut())
            .map_err(|error| End::Lost(format!("the subscriptions cannot be sent: {error}")))?;
        self.requests.push((packet_id, filters));
        Ok(packet_id)
    }

    /// Publishes our state, at QoS 0: the packet identifiers are the session's.
    pub(super) fn say_state(&mut self, state: &str, now: Instant) {
        let Some(topic) = &self.rules.state_topic else { return };
        let head = PublishHead { retain: true, ..PublishHead::bare(topic.as_str(), state.as_bytes()) };
        if let Err(error) = self.client.publish(&head, usize::MAX, now, self.encoded.bytes.get_mut()) {
            self.tell("state topic", |upstream| warn!(upstream, %error, "the state topic cannot be published"));
        }
    }
}
