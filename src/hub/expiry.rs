//! Messages that wait for too long: what has expired is given up, in memory and on disk, whether anybody is connected or
//! not, so that an outage does not fill the disk with what nobody wants any more.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use tracing::warn;

use super::queue::Age;
use super::session::{Session, submit};
use super::{Counters, Hub};
use crate::clock::UnixMillis;
use crate::store::Due;

/// After this long without a message that expired, the next one begins another episode in the log.
const QUIET: Duration = Duration::from_secs(60);

/// Messages of one session that expired one after the other: logged once at the beginning and once at the end.
#[derive(Debug, Default)]
pub(super) struct Episode {
    messages: AtomicU64,
    last: AtomicI64,
}

impl Hub {
    /// Gives up what has expired in a session's queue.
    pub(super) fn sweep(&self, session: &Arc<Session>, now: UnixMillis) {
        session.end_expiry_episode(now);
        let age = Age { now, max: session.limits().max_age };
        let mut ops = Vec::new();
        let mut state = session.state.lock();
        if state.ended {
            return;
        }
        let expired = state.queue.sweep(age, &mut ops);
        let wanted: Vec<_> = std::iter::from_fn(|| state.queue.wants_sweep(age)).collect();
        state.settle();
        submit(self.store(), &mut ops, Due::Later);
        drop(state);
        session.note_expired(expired, now, &self.0.counters);
        let Some(store) = self.store() else { return };
        for sweep in wanted {
            let (hub, session) = (self.clone(), session.clone());
            let id = session.id;
            let then = move |swept: crate::store::Swept| {
                session.state.lock().queue.swept(sweep, swept);
                session.note_expired(swept.messages, now, &hub.0.counters);
                // Whoever waited for a page meanwhile asks again.
                session.signal.raise();
            };
            store.sweep(id, sweep, Box::new(then));
        }
    }
}

impl Session {
    /// Counts messages that were given up because they had expired, and logs the first of an episode.
    pub fn note_expired(&self, expired: u64, now: UnixMillis, counters: &Counters) {
        if expired == 0 {
            return;
        }
        for drops in [&self.counters.dropped, &counters.dropped] {
            drops.expired.fetch_add(expired, Ordering::Relaxed);
        }
        self.expired.last.store(now.0, Ordering::Relaxed);
        if self.expired.messages.fetch_add(expired, Ordering::Relaxed) == 0 {
            let (face, client_id) = (self.face.name(), &self.client_id);
            warn!(face, %client_id, "messages expire before they are delivered, and are given up");
        }
    }

    fn end_expiry_episode(&self, now: UnixMillis) {
        let last = UnixMillis(self.expired.last.load(Ordering::Relaxed));
        if self.expired.messages.load(Ordering::Relaxed) > 0 && now.since(last) >= QUIET {
            let expired = self.expired.messages.swap(0, Ordering::Relaxed);
            warn!(face = self.face.name(), client_id = %self.client_id, expired, "no more messages expire");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::access::Identity;
    use super::super::queue::QueueLimits;
    use super::super::{Attach, Face, Limits, Link, Outbound, Publish, SessionExpiry, Settings, SubscribeOptions};
    use super::*;
    use crate::clock::Clock;
    use crate::message::QoS;
    use crate::store::{self, Store};
    use crate::topic::SharedFilter;
    use std::path::Path;
    use std::time::Instant;

    /// A hub whose queues keep `memory` messages in memory, and the rest on disk.
    fn hub(directory: &Path, memory: usize, max_age: Option<Duration>) -> Hub {
        let queue = QueueLimits { max_age, memory_messages: memory, ..QueueLimits::default() };
        let clock = Clock::start("test");
        let store = Store::bind(store::Settings::new(directory), clock.clone()).unwrap();
        let limits = Limits { queue, max_inflight: 5, ..Limits::default() };
        Hub::new(Settings { limits, ..Settings::default() }, clock, Some(store)).unwrap()
    }

    fn client(hub: &Hub, name: &str, filter: &str) -> Link {
        let (identity, expiry) = (Identity::gateway(), SessionExpiry::Never);
        let attach = Attach { identity, expiry, clean_start: false, ..Attach::internal(Face::Mqtt, name) };
        let mut link = hub.attach(attach).unwrap();
        link.subscribe(&SharedFilter::split(filter).unwrap(), SubscribeOptions::new(QoS::AtLeastOnce)).unwrap();
        link
    }

    /// Publishes a message for each number; every third expires after 5 s.
    fn publish(hub: &Hub, numbers: std::ops::Range<u32>) {
        let mut link = hub.attach(Attach::internal(Face::Adapter, "source")).unwrap();
        for number in numbers {
            let expiry_interval = number.is_multiple_of(3).then_some(Duration::from_secs(5));
            let payload = number.to_string();
            link.publish(Publish { qos: QoS::AtLeastOnce, expiry_interval, ..Publish::new("a/b", payload) });
        }
        link.flush();
    }

    fn until(what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !condition() {
            assert!(Instant::now() < deadline, "{what} never happens");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn queued(hub: &Hub, name: &str) -> u64 {
        hub.queued(Face::Mqtt, name).unwrap().0
    }

    fn stored(hub: &Hub) -> u64 {
        let mut metrics = crate::observe::Metrics::default();
        crate::observe::Observe::collect(hub.store().unwrap(), &mut metrics);
        let text = metrics.render();
        let line = text.lines().find_map(|line| line.strip_prefix("fieldgate_store_queue_messages "));
        line.unwrap().parse().unwrap()
    }

    fn sweep(hub: &Hub, now: UnixMillis) {
        let sessions: Vec<_> = hub.0.sessions.lock().values().cloned().collect();
        sessions.iter().for_each(|session| hub.sweep(session, now));
    }

    /// The payloads of everything that a client gets, which it acknowledges.
    fn drain(link: &mut Link, count: usize) -> Vec<u32> {
        let mut payloads = Vec::new();
        until("the last message", || {
            let mut taken = Vec::new();
            link.take(&mut taken, 1000);
            for outbound in taken {
                let Outbound::Publish(delivery) = outbound else { panic!("{outbound:?}") };
                payloads.push(std::str::from_utf8(&delivery.message.payload).unwrap().parse().unwrap());
                link.acknowledge(delivery.packet_id.unwrap());
            }
            payloads.len() >= count
        });
        link.flush();
        payloads
    }

    #[test]
    fn what_expires_frees_memory_and_disk_while_nobody_is_connected() {
        let directory = tempfile::tempdir().unwrap();
        for restarted in [false, true] {
            let mut hub = hub(directory.path(), 10, None);
            client(&hub, "away", "a/#").detach(false, None);
            publish(&hub, 0..90);
            assert_eq!(queued(&hub, "away"), 90);
            if restarted {
                hub.store().unwrap().clone().close();
                hub = self::hub(directory.path(), 10, None);
            }
            sweep(&hub, hub.now());
            let later = hub.now().plus(Duration::from_secs(6));
            // After a restart the first messages may have been sent before, as many as the window holds: 0 and 3 stay.
            let kept = if restarted { 62 } else { 60 };
            until("the sweep", || {
                sweep(&hub, later);
                queued(&hub, "away") == kept && stored(&hub) == kept
            });
            assert_eq!(hub.counters().dropped.expired.load(Ordering::Relaxed), 90 - kept);
            let mut link = client(&hub, "away", "a/#");
            if !restarted {
                let expected: Vec<u32> = (0..90).filter(|number: &u32| !number.is_multiple_of(3)).collect();
                assert_eq!(drain(&mut link, 60), expected);
            }
            link.detach(false, Some(SessionExpiry::OnDetach));
            hub.store().unwrap().clone().close();
        }
    }

    #[test]
    fn what_a_subscription_wants_for_a_while_only_frees_memory_and_disk_while_nobody_is_connected() {
        let directory = tempfile::tempdir().unwrap();
        let hub = hub(directory.path(), 10, None);
        let mut link = client(&hub, "away", "b/#");
        let mut options = SubscribeOptions::new(QoS::AtLeastOnce);
        options.precedence.expiry = Some(Duration::from_secs(3600));
        link.subscribe(&SharedFilter::split("a/#").unwrap(), options).unwrap();
        link.detach(false, None);
        // Another receiver has them for as long as their publisher said.
        client(&hub, "patient", "a/#").detach(false, None);
        publish(&hub, 0..90);
        let after = |wait| hub.now().plus(Duration::from_secs(wait));
        // Those that expire by themselves sooner do so.
        for (wait, kept) in [(6, 60), (3606, 0)] {
            let later = after(wait);
            until("the sweep", || {
                sweep(&hub, later);
                (queued(&hub, "away"), queued(&hub, "patient"), stored(&hub)) == (kept, 60, kept + 60)
            });
        }
        hub.store().unwrap().clone().close();
    }

    #[test]
    fn a_queue_gives_up_what_is_older_than_its_limit() {
        let directory = tempfile::tempdir().unwrap();
        let hub = hub(directory.path(), 10, Some(Duration::from_secs(60)));
        client(&hub, "away", "a/#").detach(false, None);
        publish(&hub, 0..50);
        let older = hub.now().plus(Duration::from_secs(61));
        sweep(&hub, hub.now().plus(Duration::from_secs(1)));
        assert_eq!(queued(&hub, "away"), 50);
        until("the sweep", || {
            sweep(&hub, older);
            queued(&hub, "away") == 0 && stored(&hub) == 0
        });
        assert_eq!(hub.counters().dropped.expired.load(Ordering::Relaxed), 50);
        // The queue goes on as ever.
        publish(&hub, 100..130);
        assert_eq!(drain(&mut client(&hub, "away", "a/#"), 30), (100..130).collect::<Vec<_>>());
    }

    #[test]
    fn a_limit_of_the_store_holds_for_every_queue() {
        let limits = Limits { max_age: Some(Duration::from_secs(60)), ..Limits::default() };
        let check = |own: Option<u64>, expected: u64| {
            let queue = QueueLimits { max_age: own.map(Duration::from_secs), ..QueueLimits::default() };
            assert_eq!(limits.of_queue(queue).max_age, Some(Duration::from_secs(expected)));
        };
        check(None, 60);
        check(Some(30), 30);
        check(Some(90), 60);
    }

    #[test]
    fn a_store_at_its_limit_makes_queues_do_what_they_do_when_full() {
        let directory = tempfile::tempdir().unwrap();
        let clock = Clock::start("test");
        let settings = store::Settings { max_messages: 20, ..store::Settings::new(directory.path()) };
        let hub = Hub::new(Settings::default(), clock.clone(), Some(Store::bind(settings, clock).unwrap())).unwrap();
        client(&hub, "away", "a/#").detach(false, None);
        publish(&hub, 0..20);
        until("the limit", || hub.store().unwrap().is_full());
        let mut here = client(&hub, "here", "a/#");
        publish(&hub, 20..25);
        assert_eq!(queued(&hub, "away"), 20);
        assert_eq!(hub.counters().dropped.store_full.load(Ordering::Relaxed), 5);
        assert_eq!(drain(&mut here, 5), (20..25).collect::<Vec<_>>(), "whoever keeps up needs no disk");
        drain(&mut client(&hub, "away", "a/#"), 20);
        until("room", || !hub.store().unwrap().is_full());
    }

    #[test]
    fn what_an_ended_member_had_on_disk_goes_to_the_other_members() {
        let directory = tempfile::tempdir().unwrap();
        let mut hub = hub(directory.path(), 10, None);
        client(&hub, "first", "$share/g/a/#").detach(false, None);
        publish(&hub, 0..600);
        // Also what was read again after a restart.
        hub.store().unwrap().clone().close();
        hub = self::hub(directory.path(), 10, None);
        let mut other = client(&hub, "other", "$share/g/a/#");
        client(&hub, "first", "$share/g/a/#").detach(false, Some(SessionExpiry::OnDetach));
        let mut got = drain(&mut other, 600);
        got.sort_unstable();
        assert_eq!(got, (0..600).collect::<Vec<_>>());
        until("the end of its journal", || stored(&hub) == 0);
        hub.store().unwrap().clone().close();
        assert_eq!(store::inspect::show(directory.path()).unwrap().sessions.len(), 1);
    }
}
