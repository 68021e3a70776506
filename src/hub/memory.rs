//! The memory that all queues hold together, and what becomes of them when it runs short.
//!
//! A session settles its account once a batch, with one addition to a number that all share. A message that waits for
//! several receivers is in memory once; each of their queues counts an equal part of it, and the whole from when the
//! receiver turns out to be slow or is gone: by then it may be the last to hold it.
//!
//! **From half of the limit on** durable queues keep on disk what they need not have in memory, those of absent clients
//! first. **From three quarters on** what is left is shared out evenly: a queue that holds less than its part goes on as
//! ever, so that one slow receiver does not spoil the others. Into a queue that holds more, QoS 0 is dropped; QoS 1 and 2
//! go to disk where the queue is durable, and meet its policy for full queues where it is not.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;
use tracing::info;

use super::Hub;
use super::queue::QueueLimits;
use super::session::Session;
use crate::store::PageLimit;

/// How much of its head a connected session keeps in memory when memory is tight.
const KEPT_MESSAGES: usize = 64;
/// What a message takes beside its topic, payload and properties, roughly.
const MESSAGE_OVERHEAD: usize = 256;

/// What all queues hold together.
#[derive(Debug)]
pub(super) struct Memory {
    max: u64,
    used: AtomicU64,
    queues: AtomicU64,
    /// Told when memory becomes tight.
    tight: Notify,
}

impl Memory {
    pub fn new(max: u64) -> Arc<Self> {
        Arc::new(Self { max, used: AtomicU64::new(0), queues: AtomicU64::new(0), tight: Notify::new() })
    }

    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Whether queues should keep on disk what they can.
    pub fn is_tight(&self) -> bool {
        self.used() > self.max / 2
    }

    /// Waits until memory becomes tight.
    ///
    /// # Cancel safety
    /// Not to be relied upon alone: what is missed is found by the next look at [`Memory::is_tight`].
    pub async fn becomes_tight(&self) {
        self.tight.notified().await;
    }
}

/// One queue's account.
#[derive(Debug)]
pub(super) struct Account {
    memory: Arc<Memory>,
    held: u64,
}

impl Account {
    pub fn new(memory: &Arc<Memory>) -> Self {
        memory.queues.fetch_add(1, Ordering::Relaxed);
        Self { memory: memory.clone(), held: 0 }
    }

    /// Takes note of what the queue holds now.
    pub fn settle(&mut self, held: u64) {
        let before = std::mem::replace(&mut self.held, held);
        if held < before {
            self.memory.used.fetch_sub(before - held, Ordering::Relaxed);
        } else if held > before {
            let added = held - before;
            let used = self.memory.used.fetch_add(added, Ordering::Relaxed);
            let mark = self.memory.max / 2;
            if used <= mark && used + added > mark {
                self.memory.tight.notify_one();
            }
        }
    }

    pub fn is_tight(&self) -> bool {
        self.memory.is_tight()
    }

    /// Whether memory is short and this queue holds its part of what is shared out.
    pub fn is_short(&self) -> bool {
        self.memory.used() > self.memory.max / 4 * 3 && self.held >= self.part()
    }

    /// How much of the queue's tail is read at once, so that one page can be sent while the next one is read: less, the
    /// less memory is free.
    pub fn page(&self, limits: &QueueLimits) -> PageLimit {
        let free = self.memory.max.saturating_sub(self.memory.used());
        let room = usize::try_from((free / 4).max(self.part())).unwrap_or(usize::MAX);
        let messages = (room / MESSAGE_OVERHEAD).max(1);
        let most = (limits.memory_messages / 2, limits.memory_bytes / 2);
        PageLimit { messages: messages.min(most.0).max(1), bytes: room.min(most.1) }
    }

    /// What each queue may have when memory is short.
    fn part(&self) -> u64 {
        self.memory.max / 4 / self.memory.queues.load(Ordering::Relaxed).max(1)
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.memory.used.fetch_sub(self.held, Ordering::Relaxed);
        self.memory.queues.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Hub {
    /// Makes durable queues keep on disk what they need not have in memory, while memory is tight.
    pub(super) fn relieve_memory(&self) {
        let memory = &self.0.memory;
        if !memory.is_tight() {
            return;
        }
        let before = memory.used();
        let sessions: Vec<Arc<Session>> =
            self.0.sessions.lock().values().filter(|session| session.durable).cloned().collect();
        for (connected, kept) in [(false, 0), (true, KEPT_MESSAGES)] {
            for session in &sessions {
                if !memory.is_tight() {
                    break;
                }
                let mut state = session.state.lock();
                if state.attached.is_some() == connected {
                    state.queue.page_out(kept, &session.limits());
                    state.settle();
                }
            }
        }
        let freed = before.saturating_sub(memory.used());
        if freed > 0 {
            info!(freed, used = memory.used(), "queues hold much memory; what waits on disk too was let go of");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::access::Identity;
    use super::super::{Attach, Face, Limits, Link, Outbound, Outcome, Publish, Refusal, SessionExpiry, WhenFull};
    use super::super::{Settings, SubscribeOptions};
    use super::*;
    use crate::clock::Clock;
    use crate::message::QoS;
    use crate::observe::{Metrics, Observe};
    use crate::store::{self, Store};
    use crate::topic::SharedFilter;
    use std::path::Path;
    use std::time::Duration;

    const MAX: u64 = 64 << 10;

    fn hub(when_full: WhenFull, directory: Option<&Path>) -> Hub {
        let queue = QueueLimits { when_full, ..QueueLimits::default() };
        let limits = Limits { max_queue_memory: MAX, queue, ..Limits::default() };
        let clock = Clock::start("test");
        let store = directory.map(|path| Store::bind(store::Settings::new(path), clock.clone()).unwrap());
        Hub::new(Settings { limits, ..Settings::default() }, clock, store).unwrap()
    }

    fn subscriber(hub: &Hub, name: &str, filter: &str, expiry: SessionExpiry) -> Link {
        let attach =
            Attach { identity: Identity::gateway(), expiry, clean_start: false, ..Attach::internal(Face::Mqtt, name) };
        let mut link = hub.attach(attach).unwrap();
        link.subscribe(&SharedFilter::split(filter).unwrap(), SubscribeOptions::new(QoS::AtLeastOnce)).unwrap();
        link
    }

    /// Publishes `count` messages of 1000 bytes, each by itself; tells how many were refused.
    fn flood(hub: &Hub, topic: &str, qos: QoS, count: u32) -> usize {
        let mut link = hub.attach(Attach::internal(Face::Adapter, "flood")).unwrap();
        let mut refused = 0;
        for number in 0..count {
            let mut payload = vec![0; 1000];
            payload[..4].copy_from_slice(&number.to_be_bytes());
            let outcome = link.publish(Publish { qos, ..Publish::new(topic, payload) });
            refused += usize::from(matches!(outcome, Outcome::Refused(Refusal::QuotaExceeded)));
            link.flush();
        }
        refused
    }

    fn taken(link: &mut Link) -> Vec<Outbound> {
        let mut taken = Vec::new();
        link.take(&mut taken, 1000);
        taken
    }

    fn given_up(hub: &Hub) -> u64 {
        counted(hub, "dropped")
    }

    fn counted(hub: &Hub, what: &str) -> u64 {
        let mut metrics = Metrics::default();
        hub.collect(&mut metrics);
        let name = format!("fieldgate_hub_messages_{what}_total{{reason=\"memory_full\"}} ");
        let text = metrics.render();
        text.lines().find_map(|line| line.strip_prefix(&name)).unwrap().parse().unwrap()
    }

    #[test]
    fn qos_0_is_given_up_and_counted_and_those_who_keep_up_notice_nothing() {
        let hub = hub(WhenFull::DropNewest, None);
        let mut stuck = subscriber(&hub, "stuck", "a", SessionExpiry::OnDetach);
        let mut quick = subscriber(&hub, "quick", "b", SessionExpiry::OnDetach);
        flood(&hub, "a", QoS::AtMostOnce, 100);
        assert!(hub.0.memory.used() <= MAX, "{}", hub.0.memory.used());
        for _ in 0..20 {
            flood(&hub, "b", QoS::AtMostOnce, 1);
            assert_eq!(taken(&mut quick).len(), 1);
        }
        let kept = taken(&mut stuck).len() as u64;
        assert!((40..60).contains(&kept), "{kept}");
        assert_eq!(given_up(&hub), 100 - kept);
        assert_eq!(hub.0.memory.used(), 0, "what was sent is nobody's memory");
    }

    #[test]
    fn qos_1_of_sessions_in_memory_meets_the_policy_for_full_queues() {
        let check = |when_full, first: u32, refused: bool| {
            let hub = hub(when_full, None);
            let mut stuck = subscriber(&hub, "stuck", "a", SessionExpiry::OnDetach);
            let number = flood(&hub, "a", QoS::AtLeastOnce, 100);
            assert_eq!((number > 0, counted(&hub, "refused")), (refused, number as u64), "{when_full:?}");
            assert_eq!(given_up(&hub) > 0, !refused, "{when_full:?}");
            let taken = taken(&mut stuck);
            assert!((40..60).contains(&taken.len()), "{when_full:?}: {}", taken.len());
            let Outbound::Publish(delivery) = &taken[0] else { panic!("{taken:?}") };
            assert_eq!(delivery.message.payload[3] >= 40, first > 0, "{when_full:?}");
            // Sent and not yet acknowledged is held still.
            assert!(hub.0.memory.used() > MAX / 2);
            drop(stuck);
            assert_eq!(hub.0.memory.used(), 0);
        };
        check(WhenFull::DropNewest, 0, false);
        check(WhenFull::DropOldest, 1, false);
        check(WhenFull::Reject, 0, true);
    }

    #[tokio::test]
    async fn durable_queues_go_to_disk_and_lose_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let hub = hub(WhenFull::DropNewest, Some(directory.path()));
        subscriber(&hub, "away", "a", SessionExpiry::Never).detach(false, None);
        let mut here = subscriber(&hub, "here", "b", SessionExpiry::Never);
        flood(&hub, "a", QoS::AtLeastOnce, 100);
        assert!(hub.0.memory.used() <= MAX);
        hub.relieve_memory();
        assert_eq!(hub.0.memory.used(), 0, "an absent client's queue needs no memory");
        flood(&hub, "b", QoS::AtLeastOnce, 200);
        hub.relieve_memory();
        assert!(hub.0.memory.used() <= MAX);
        let mut away = subscriber(&hub, "away", "a", SessionExpiry::Never);
        for (link, expected) in [(&mut away, 100_u32), (&mut here, 200)] {
            let mut next = 0;
            while next < expected {
                let taken = tokio::time::timeout(Duration::from_secs(10), link.next()).await.expect("all of them");
                for outbound in taken {
                    let Outbound::Publish(delivery) = outbound else { panic!("{outbound:?}") };
                    assert_eq!(delivery.message.payload[..4], next.to_be_bytes());
                    link.acknowledge(delivery.packet_id.unwrap());
                    next += 1;
                }
                link.flush();
                assert!(hub.0.memory.used() <= MAX, "{}", hub.0.memory.used());
            }
        }
        assert_eq!((given_up(&hub), hub.0.memory.used()), (0, 0));
    }

    #[test]
    fn a_message_for_several_counts_once_until_one_of_them_is_left_with_it() {
        let hub = hub(WhenFull::DropNewest, None);
        let mut links: Vec<_> = (0..4)
            .map(|number| subscriber(&hub, &format!("c{number}"), "a", SessionExpiry::After(Duration::MAX)))
            .collect();
        flood(&hub, "a", QoS::AtLeastOnce, 10);
        let together = hub.0.memory.used();
        assert!((10_000..16_000).contains(&together), "{together}");
        links.pop().unwrap().detach(false, None);
        assert!(hub.0.memory.used() > together + 7000);
    }

    #[test]
    fn the_last_quarter_is_shared_out_evenly() {
        let memory = Memory::new(1000);
        let (mut greedy, mut modest) = (Account::new(&memory), Account::new(&memory));
        greedy.settle(750);
        assert!(memory.is_tight() && !greedy.is_short(), "three quarters are for whoever comes");
        greedy.settle(760);
        modest.settle(124);
        assert!(greedy.is_short() && !modest.is_short());
        modest.settle(125);
        assert!(modest.is_short());
        greedy.settle(100);
        assert_eq!((memory.used(), greedy.is_short(), modest.is_short()), (225, false, false));
        drop(greedy);
        assert_eq!((memory.used(), memory.queues.load(Ordering::Relaxed)), (125, 1));
    }

    #[tokio::test]
    async fn whoever_waits_is_told_when_memory_becomes_tight() {
        let memory = Memory::new(1000);
        let mut account = Account::new(&memory);
        account.settle(500);
        account.settle(501);
        memory.becomes_tight().await;
        assert!(memory.is_tight());
    }
}
