//! A queue's messages are given up because somebody wants it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Hub;
use super::session::{Face, submit};
use crate::signal::Signal;
use crate::store::{Due, Op, Receipt, ReceiptState};

/// A row that is never there: no message has this packet identifier.
const NO_PACKET: u16 = 0;

impl Hub {
    /// Gives up what waits in a session's queue and was never sent, and returns how many messages that were once they are
    /// gone from the disk too; `None` where there is no such session. Deliveries that have begun go on to their end.
    ///
    /// # Cancel safety
    /// They are given up all the same.
    pub async fn purge(&self, face: Face, client_id: &str) -> Option<u64> {
        let session = self.session(face, client_id)?;
        let signal = Arc::<Signal>::default();
        let receipt = Receipt::new(signal.clone());
        let purged = {
            let mut ops = Vec::new();
            let mut state = session.state.lock();
            let purged = state.queue.purge(&mut ops);
            state.settle();
            if !ops.is_empty() && self.store().is_some() {
                // Deletes nothing, and its receipt is settled by the commit.
                receipt.add();
                ops.push(Op::RemoveInbound {
                    session: session.id,
                    packet_id: NO_PACKET,
                    receipt: Some(receipt.clone()),
                });
            }
            submit(self.store(), &mut ops, Due::Now);
            session.tell_drained(state.queue.pressure());
            purged
        };
        session.counters.dropped.purged.fetch_add(purged, Ordering::Relaxed);
        self.0.counters.dropped.purged.fetch_add(purged, Ordering::Relaxed);
        while receipt.state() == ReceiptState::Pending {
            signal.wait().await;
        }
        Some(purged)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::clock::Clock;
    use crate::hub::access::Identity;
    use crate::hub::queue::QueueLimits;
    use crate::hub::{Attach, Limits, Link, Outbound, PacketId, Publish, SessionExpiry, Settings, SubscribeOptions};
    use crate::message::QoS;
    use crate::store::{self, Store};
    use crate::topic::SharedFilter;

    /// A hub whose queues keep 10 messages in memory, and the rest on disk; 5 are on their way at a time.
    fn hub(directory: &Path) -> Hub {
        let queue = QueueLimits { memory_messages: 10, ..QueueLimits::default() };
        let clock = Clock::start("test");
        let store = Store::bind(store::Settings::new(directory), clock.clone()).unwrap();
        let limits = Limits { queue, max_inflight: 5, ..Limits::default() };
        Hub::new(Settings { limits, ..Settings::default() }, clock, Some(store)).unwrap()
    }

    fn client(hub: &Hub) -> Link {
        let (identity, expiry) = (Identity::gateway(), SessionExpiry::Never);
        let attach = Attach { identity, expiry, clean_start: false, ..Attach::internal(Face::Mqtt, "c") };
        let mut link = hub.attach(attach).unwrap();
        link.subscribe(&SharedFilter::split("a/#").unwrap(), SubscribeOptions::new(QoS::ExactlyOnce)).unwrap();
        link
    }

    fn publish(hub: &Hub, numbers: std::ops::Range<u32>) {
        let mut link = hub.attach(Attach::internal(Face::Adapter, "source")).unwrap();
        for number in numbers {
            link.publish(Publish { qos: QoS::ExactlyOnce, ..Publish::new("a/b", number.to_string()) });
        }
        link.flush();
    }

    /// Takes so many messages: their identifiers and payloads.
    fn take(link: &mut Link, count: usize) -> Vec<(PacketId, u32)> {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut taken = Vec::new();
        while taken.len() < count {
            assert!(Instant::now() < deadline, "{taken:?}");
            let mut outbound = Vec::new();
            link.take(&mut outbound, count - taken.len());
            for outbound in outbound {
                let Outbound::Publish(delivery) = outbound else { panic!("{outbound:?}") };
                let payload = std::str::from_utf8(&delivery.message.payload).unwrap().parse().unwrap();
                taken.push((delivery.packet_id.unwrap(), payload));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        taken
    }

    /// Ends the handshakes of messages that were taken.
    fn finish(link: &mut Link, taken: &[(PacketId, u32)]) {
        assert!(taken.iter().all(|&(id, _)| link.received(id)));
        link.flush();
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut releases = Vec::new();
        while releases.len() < taken.len() {
            assert!(Instant::now() < deadline, "{releases:?}");
            link.take(&mut releases, 100);
            std::thread::sleep(Duration::from_millis(2));
        }
        for release in releases {
            let Outbound::Release(id) = release else { panic!("{release:?}") };
            assert!(link.completed(id));
        }
        link.flush();
    }

    fn purge(hub: &Hub) -> Option<u64> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(hub.purge(Face::Mqtt, "c"))
    }

    fn payloads(taken: &[(PacketId, u32)]) -> Vec<u32> {
        taken.iter().map(|&(_, payload)| payload).collect()
    }

    #[test]
    fn what_waits_goes_from_memory_and_disk_and_the_queue_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let hub = hub(directory.path());
        assert_eq!(purge(&hub), None);
        client(&hub).detach(false, None);
        publish(&hub, 0..90);
        assert_eq!(purge(&hub), Some(90));
        assert_eq!((hub.queued(Face::Mqtt, "c"), purge(&hub)), (Some((0, 0)), Some(0)));
        assert_eq!(hub.counters().dropped.purged.load(Ordering::Relaxed), 90);
        publish(&hub, 90..105);
        // It was on disk when the answer came.
        hub.store().unwrap().clone().close();
        let hub = self::hub(directory.path());
        assert_eq!(hub.queued(Face::Mqtt, "c").unwrap().0, 15);
        let mut link = client(&hub);
        let mut heard = Vec::new();
        for _ in 0..3 {
            let taken = take(&mut link, 5);
            heard.extend(payloads(&taken));
            finish(&mut link, &taken);
        }
        assert_eq!(heard, (90..105).collect::<Vec<_>>());
    }

    #[test]
    fn what_has_begun_is_finished() {
        let directory = tempfile::tempdir().unwrap();
        for is_restarted in [false, true] {
            let mut hub = hub(directory.path());
            let mut link = client(&hub);
            publish(&hub, 0..50);
            let mut taken = take(&mut link, 5);
            if is_restarted {
                // Nobody knows then which of the first have been sent.
                drop(link);
                hub.store().unwrap().clone().close();
                hub = self::hub(directory.path());
                assert_eq!(purge(&hub), Some(45));
                link = client(&hub);
                let again = take(&mut link, 5);
                assert_eq!(again, taken);
                taken = again;
            } else {
                assert_eq!(purge(&hub), Some(45));
            }
            assert_eq!(payloads(&taken), [0, 1, 2, 3, 4]);
            publish(&hub, 50..53);
            finish(&mut link, &taken);
            let later = take(&mut link, 3);
            assert_eq!(payloads(&later), [50, 51, 52]);
            finish(&mut link, &later);
            assert_eq!(hub.queued(Face::Mqtt, "c"), Some((0, 0)));
            link.detach(false, None);
            hub.store().unwrap().clone().close();
        }
    }

    #[test]
    fn a_page_that_is_on_its_way_brings_nothing_back() {
        let directory = tempfile::tempdir().unwrap();
        for _ in 0..20 {
            let hub = hub(directory.path());
            client(&hub).detach(false, None);
            publish(&hub, 0..40);
            hub.store().unwrap().clone().close();
            let hub = self::hub(directory.path());
            // Attaching asks for the first page, of which five may have been sent.
            let mut link = client(&hub);
            purge(&hub);
            publish(&hub, 100..101);
            let taken = take(&mut link, 5);
            finish(&mut link, &taken);
            let last = take(&mut link, 1);
            assert_eq!((payloads(&taken), payloads(&last)), (vec![0, 1, 2, 3, 4], vec![100]));
            finish(&mut link, &last);
            link.detach(false, None);
            hub.store().unwrap().clone().close();
        }
    }
}
