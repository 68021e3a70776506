//! A queue as its session uses it, of one lane and of several.

use std::collections::BTreeSet;

use super::*;
use crate::store::{StoredMessage, StoredState, first_sequence};
use crate::topic::TopicName;

/// A queue with what it needs around it, and a tiny notation: `1a` is QoS 1 with payload `a`.
struct Bench {
    queue: Queue,
    limits: QueueLimits,
    ops: Vec<Op>,
    signal: Arc<Signal>,
    connected: bool,
    window: u16,
}

impl Bench {
    /// With pages of half of what may wait in memory.
    fn wants_page(&mut self) -> Option<u64> {
        let QueueLimits { memory_messages, memory_bytes, .. } = self.limits;
        self.queue.wants_page(PageLimit { messages: memory_messages / 2, bytes: memory_bytes })
    }

    fn page_in(&mut self, from: u64, messages: Vec<StoredMessage>, complete: bool) {
        self.queue.page_in(from, Packed::of(&messages), complete);
    }

    fn new(durable: bool) -> Self {
        Self {
            queue: Queue::new(SessionId(7), durable, Layout::One),
            limits: QueueLimits::default(),
            ops: Vec::new(),
            signal: Arc::default(),
            connected: true,
            window: 100,
        }
    }

    /// A queue of several lanes.
    fn by_priority(durable: bool) -> Self {
        Self { queue: Queue::new(SessionId(7), durable, Layout::ByPriority), ..Self::new(durable) }
    }

    fn push(&mut self, spelled: &'static str) -> Pushed {
        self.push_as(Precedence::default(), spelled)
    }

    fn push_as(&mut self, precedence: Precedence, spelled: &'static str) -> Pushed {
        let (qos, payload) = spelled.split_at(1);
        let qos = QoS::from_level(qos.parse().unwrap()).unwrap();
        let message = Arc::new(Message::new(TopicName::new("t").unwrap(), payload, qos, UnixMillis(0)));
        let incoming = Incoming { message, qos, retain: false, identifiers: None, shared: None, spread: 0 };
        let lane = self.queue.lane_for(precedence, self.connected, &self.limits);
        self.queue.push(lane, incoming, None, self.connected, &self.signal, &self.limits, &mut self.ops)
    }

    /// What may be sent: `a#1` a publish with its identifier, `+` marks a repeated one, `!1` a release.
    fn take(&mut self) -> String {
        self.take_up_to(100)
    }

    fn take_up_to(&mut self, max: usize) -> String {
        let mut taken = Vec::new();
        let age = Age { now: UnixMillis(0), max: self.limits.max_age };
        self.queue.take(&mut taken, max, self.window, age, &mut self.ops);
        let spell = |outbound: &Outbound| match outbound {
            Outbound::Release(id) => format!("!{id}"),
            Outbound::Publish(delivery) => {
                let text = String::from_utf8(delivery.message.payload.to_vec()).unwrap();
                let id = delivery.packet_id.map_or(String::new(), |id| format!("#{id}"));
                format!("{text}{id}{}", if delivery.dup { "+" } else { "" })
            }
        };
        taken.iter().map(spell).collect::<Vec<_>>().join(" ")
    }

    /// Settles what the journal was given, as its commit would.
    fn commit(&mut self) {
        for op in self.ops.drain(..) {
            if let Op::Enqueue { receipt: Some(receipt), .. }
            | Op::Release { receipt: Some(receipt), .. }
            | Op::Clear { receipt: Some(receipt), .. } = op
            {
                receipt.satisfy();
            }
        }
    }

    fn acknowledge(&mut self, number: u16) -> bool {
        self.queue.acknowledge(id(number), &mut self.ops)
    }
}

fn id(number: u16) -> PacketId {
    PacketId::new(number).unwrap()
}

#[test]
fn messages_leave_in_order_within_the_window_and_qos_0_does_not_wait_for_it() {
    let mut bench = Bench::new(false);
    bench.window = 2;
    for spelled in ["1a", "1b", "1c", "0x"] {
        bench.push(spelled);
    }
    assert_eq!(bench.take(), "x a#1 b#2");
    assert_eq!(bench.take(), "");
    assert!(bench.acknowledge(2), "acknowledgements may come out of order");
    assert_eq!(bench.take(), "c#3");
    assert!(bench.acknowledge(1) && bench.acknowledge(3));
    assert!(!bench.acknowledge(3), "an identifier is acknowledged once");
    assert_eq!(bench.queue.len(), 0);
}

#[test]
fn a_new_connection_gets_the_unacknowledged_again_in_order_and_marked() {
    let mut bench = Bench::new(false);
    for spelled in ["1a", "2b", "1c"] {
        bench.push(spelled);
    }
    assert_eq!(bench.take(), "a#1 b#2 c#3");
    assert!(bench.queue.receive(id(2), &bench.signal, &mut bench.ops));
    assert_eq!(bench.take(), "!2");
    bench.push("1d");
    bench.window = 2;
    bench.queue.rewind();
    assert_eq!(bench.take(), "a#1+ !2");
    assert!(bench.acknowledge(1));
    assert_eq!(bench.take(), "c#3+");
    assert!(bench.queue.complete(id(2), &bench.signal, &mut bench.ops));
    assert_eq!(bench.take(), "d#4");
}

#[test]
fn a_durable_qos_2_message_is_sent_only_once_it_is_on_disk_and_so_is_its_release() {
    let mut bench = Bench::new(true);
    bench.push("2a");
    bench.push("1b");
    assert_eq!(bench.take(), "", "and what is behind it waits, to keep the order");
    bench.commit();
    assert_eq!(bench.take(), "a#1 b#2");
    assert!(bench.queue.receive(id(1), &bench.signal, &mut bench.ops));
    assert_eq!(bench.take(), "");
    bench.commit();
    assert_eq!(bench.take(), "!1");
    for _ in 0..3 {
        assert!(bench.queue.receive(id(1), &bench.signal, &mut bench.ops));
    }
    assert_eq!(bench.take(), "!1", "a repeated PUBREC is answered again, but nobody can pile up answers");
    assert!(bench.queue.complete(id(1), &bench.signal, &mut bench.ops));
    assert!(!bench.queue.complete(id(1), &bench.signal, &mut bench.ops));
}

// MQTT-4.6.0-4: a commit settles its receipts one after the other, and a connection may look in between.
#[test]
fn releases_go_out_in_order_although_a_later_one_was_seen_on_disk_first() {
    let mut bench = Bench::new(true);
    bench.push("2a");
    bench.push("2b");
    bench.commit();
    assert_eq!(bench.take(), "a#1 b#2");
    for number in [1, 2] {
        assert!(bench.queue.receive(id(number), &bench.signal, &mut bench.ops));
    }
    let Some(Op::Release { receipt: Some(later), .. }) = bench.ops.pop() else { panic!("no journal entry") };
    later.satisfy();
    assert_eq!(bench.take(), "");
    bench.commit();
    assert_eq!(bench.take(), "!1 !2");
}

#[test]
fn a_message_that_could_not_be_kept_is_not_sent() {
    let mut bench = Bench::new(true);
    bench.push("2a");
    bench.push("1b");
    let Some(Op::Enqueue { receipt: Some(receipt), .. }) = bench.ops.first() else { panic!("no journal entry") };
    receipt.fail();
    assert_eq!(bench.take(), "b#2");
}

#[test]
fn a_full_queue_does_what_its_policy_says() {
    let check = |when_full, pushed, left: &str| {
        let mut bench = Bench::new(false);
        bench.limits.max_messages = 2;
        bench.limits.when_full = when_full;
        bench.push("1a");
        bench.push("1b");
        assert_eq!(bench.push("1c"), pushed, "{when_full:?}");
        assert_eq!(bench.take(), left, "{when_full:?}");
    };
    check(WhenFull::DropNewest, Pushed::DroppedNewest, "a#1 b#2");
    check(WhenFull::DropOldest, Pushed::DroppedOldest, "b#2 c#3");
}

#[test]
fn a_full_queue_gives_up_its_oldest_on_disk_too_and_also_while_a_page_is_read() {
    let mut bench = Bench::new(true);
    bench.limits.memory_messages = 1;
    bench.limits.max_messages = 4;
    bench.limits.when_full = WhenFull::DropOldest;
    for spelled in ["1a", "1b", "1c", "1d"] {
        bench.push(spelled);
    }
    assert_eq!(bench.push("1e"), Pushed::DroppedOldest, "a, from memory");
    assert_eq!(bench.push("1f"), Pushed::DroppedOldest, "b, from disk");
    assert_eq!(bench.wants_page(), Some(2));
    let page = stored(&bench.ops, 2..5);
    assert_eq!(bench.push("1g"), Pushed::DroppedOldest, "c, on its way from disk");
    bench.page_in(0, page, false);
    assert_eq!(bench.take(), "d#4 e#5");
    assert_eq!(bench.wants_page(), Some(5));
    bench.page_in(0, stored(&bench.ops, 5..7), true);
    assert_eq!(bench.take(), "f#6 g#7");
    let removed = bench.ops.iter().filter_map(|op| match op {
        Op::Remove { first, last, .. } => Some(*first..=*last),
        _ => None,
    });
    assert_eq!(removed.flatten().collect::<Vec<_>>(), [0, 1, 2]);
}

#[test]
fn qos_0_is_for_the_connected_only() {
    let mut bench = Bench::new(true);
    bench.connected = false;
    assert_eq!(bench.push("0a"), Pushed::Skipped);
    assert_eq!(bench.push("1b"), Pushed::Queued);
    assert_eq!(bench.take(), "b#1");
}

#[test]
fn what_does_not_fit_in_memory_waits_on_disk_and_is_paged_in_order() {
    let mut bench = Bench::new(true);
    bench.limits.memory_messages = 2;
    for spelled in ["1a", "1b", "1c", "1d"] {
        bench.push(spelled);
    }
    assert_eq!(bench.queue.len(), 4);
    assert_eq!(bench.take(), "a#1 b#2");
    let from = bench.wants_page().unwrap();
    assert_eq!(from, 2);
    assert_eq!(bench.wants_page(), None, "one page at a time");
    // Published while the page is being read: it stays behind it.
    bench.push("1e");
    let page = stored(&bench.ops, 2..4);
    bench.page_in(0, page, true);
    assert_eq!(bench.take(), "c#3 d#4");
    assert_eq!(bench.wants_page(), Some(4));
    bench.page_in(0, stored(&bench.ops, 4..5), true);
    bench.push("1f");
    assert_eq!(bench.take(), "e#5 f#6");
    assert_eq!(bench.wants_page(), None);
}

/// A queue with two messages in memory, `a` and `b`, and `c` to `f` on disk, of which `c` and `d` were read ahead.
fn read_ahead(when_full: WhenFull) -> Bench {
    let mut bench = Bench::new(true);
    bench.limits = QueueLimits { memory_messages: 2, max_messages: 6, when_full, ..bench.limits };
    for spelled in ["1a", "1b", "1c", "1d", "1e", "1f"] {
        bench.push(spelled);
    }
    assert_eq!(bench.queue.wants_page(PageLimit { messages: 2, bytes: 1 << 20 }), Some(2));
    let held = bench.queue.held();
    let page = stored(&bench.ops, 2..4);
    bench.page_in(0, page, false);
    assert!(bench.queue.held() > held);
    assert_eq!((bench.queue.pressure().0, bench.queue.len(), bench.queue.tails()), (4, 6, vec![2]));
    assert_eq!(bench.wants_page(), None, "two pages are enough");
    bench
}

#[test]
fn what_was_read_ahead_is_sent_in_its_place_and_leaves_no_memory_held() {
    let mut bench = read_ahead(WhenFull::DropNewest);
    assert_eq!(bench.take(), "a#1 b#2 c#3 d#4");
    assert_eq!((bench.queue.len(), bench.queue.tails()), (6, vec![4]));
    assert_eq!(bench.wants_page(), Some(4));
    bench.page_in(0, stored(&bench.ops, 4..6), true);
    assert_eq!(bench.take(), "e#5 f#6");
    (1..=6).for_each(|id| assert!(bench.acknowledge(id)));
    assert_eq!((bench.queue.len(), bench.queue.bytes(), bench.queue.held()), (0, 0, 0));
}

#[test]
fn what_was_read_ahead_is_given_up_before_what_is_on_disk_only() {
    let mut bench = read_ahead(WhenFull::DropOldest);
    for spelled in ["1g", "1h", "1i"] {
        assert_eq!(bench.push(spelled), Pushed::DroppedOldest);
    }
    assert_eq!(bench.take(), "d#4");
    assert_eq!(bench.queue.len(), 6);
}

#[test]
fn what_was_read_ahead_is_read_again_where_memory_is_wanted() {
    let mut bench = read_ahead(WhenFull::DropNewest);
    bench.queue.page_out(0, &bench.limits.clone());
    assert_eq!((bench.queue.held(), bench.queue.len(), bench.queue.tails()), (0, 6, vec![0]));
    assert_eq!(bench.take(), "");
    assert_eq!(bench.wants_page(), Some(0));
    bench.page_in(0, stored(&bench.ops, 0..6), true);
    assert_eq!(bench.take(), "a#1 b#2 c#3 d#4 e#5 f#6");
}

#[test]
fn what_was_read_ahead_expires_as_what_waits() {
    let mut bench = read_ahead(WhenFull::DropNewest);
    let age = Age { now: UnixMillis(60_000), max: Some(Duration::from_secs(30)) };
    assert_eq!(bench.queue.sweep(age, &mut bench.ops), 4);
    assert_eq!((bench.queue.len(), bench.queue.held(), bench.queue.tails()), (2, 0, vec![4]));
}

#[test]
fn a_restored_queue_repeats_what_may_have_been_sent_under_the_same_identifiers() {
    let found = QueueSummary { lane: 0, first: Some(8), last: Some(12), messages: 4, bytes: 4 };
    let mut bench = Bench { queue: Queue::restored(SessionId(7), Layout::One, &[found], None, 2), ..Bench::new(true) };
    let mut source = Bench::new(true);
    for _ in 0..13 {
        source.push("2x");
    }
    let mut page = stored(&source.ops, 8..13);
    page[0].state = StoredState::Released;
    page.remove(2);
    assert_eq!(bench.wants_page(), Some(8));
    bench.page_in(0, page, true);
    bench.queue.rewind();
    assert_eq!(bench.take(), "!9 x#10+ x#12+ x#13");
    bench.push("1y");
    assert_eq!(bench.take(), "y#14");
}

#[test]
fn what_may_have_been_sent_before_a_restart_is_backlog_until_it_is_sent_again() {
    let found = QueueSummary { lane: 0, first: Some(0), last: Some(3), messages: 4, bytes: 4 };
    let mut bench = Bench { queue: Queue::restored(SessionId(7), Layout::One, &[found], None, 3), ..Bench::new(true) };
    let mut source = Bench::new(true);
    for spelled in ["2r", "1a", "1b", "1c"] {
        source.push(spelled);
    }
    let mut page = stored(&source.ops, 0..4);
    page[0].state = StoredState::Released;
    assert_eq!(bench.queue.backlog(), 4);
    assert_eq!(bench.wants_page(), Some(0));
    bench.page_in(0, page, true);
    bench.queue.rewind();
    assert_eq!(bench.queue.backlog(), 3, "of what is released its receiver has the message");
    assert_eq!(bench.take_up_to(2), "!1 a#2+");
    assert_eq!(bench.queue.backlog(), 2);
    assert_eq!(bench.take(), "b#3+ c#4+");
    assert_eq!(bench.queue.backlog(), 0, "although nothing is acknowledged");
}

#[test]
fn behind_a_hole_wider_than_the_identifiers_nothing_counts_as_sent_and_all_is_acknowledged() {
    let found = QueueSummary { lane: 0, first: Some(0), last: Some(65_541), messages: 3, bytes: 2 };
    let mut bench = Bench { queue: Queue::restored(SessionId(7), Layout::One, &[found], None, 9), ..Bench::new(true) };
    let mut source = Bench::new(true);
    for spelled in ["1a", "2r", "1b"] {
        source.push(spelled);
    }
    let mut page = stored(&source.ops, 0..3);
    (page[1].sequence, page[1].state) = (65_540, StoredState::Released);
    page[2].sequence = 65_541;
    assert_eq!(bench.wants_page(), Some(0));
    bench.page_in(0, page, true);
    bench.queue.rewind();
    assert_eq!(bench.take(), "a#1+ !6");
    assert!(bench.queue.complete(id(6), &bench.signal, &mut bench.ops));
    assert!(bench.acknowledge(1));
    assert_eq!(bench.take(), "b#7");
    assert!(bench.acknowledge(7));
    assert_eq!(bench.queue.len(), 0);
}

impl Bench {
    /// A queue that was taken up behind message 99 after damage, of which so much has been cleared up.
    fn in_doubt(layout: Layout, cleared: &[Cleared]) -> Self {
        let found = QueueSummary { lane: 0, last: Some(99), ..QueueSummary::default() };
        let mut queue = Queue::restored(SessionId(7), layout, &[found], Some(cleared), 9);
        queue.rewind();
        Self { queue, window: 10, ..Self::new(true) }
    }

    /// Sends what may be sent and lets the receiver answer until only the journal is waited for. Returns the identifiers
    /// that were released, and what was sent under the others.
    fn run_dry(&mut self) -> (Vec<u16>, Vec<u16>) {
        let (mut released, mut sent) = (Vec::new(), Vec::new());
        loop {
            let taken = self.take();
            if taken.is_empty() {
                return (released, sent);
            }
            for spelled in taken.split(' ') {
                let (text, number) = spelled.split_once(['!', '#']).unwrap();
                let number: u16 = number.parse().unwrap();
                if text.is_empty() {
                    self.queue.complete(id(number), &self.signal, &mut self.ops);
                    released.push(number);
                } else {
                    assert!(self.acknowledge(number));
                    sent.push(number);
                }
            }
        }
    }

    /// What the journal was told last of how far identifiers are cleared.
    fn cleared(&self) -> Option<Cleared> {
        self.ops.iter().rev().find_map(|op| match op {
            Op::Clear { cleared, .. } => Some(*cleared),
            _ => None,
        })
    }
}

#[test]
fn after_damage_identifiers_are_released_before_a_qos_2_message_has_them() {
    let mut bench = Bench::in_doubt(Layout::One, &[]);
    bench.push("1a");
    assert_eq!(bench.take(), "a#101", "a peer that gets no QoS 2 need not know PUBREL");
    bench.push("2b");
    bench.commit();
    assert_eq!(bench.take(), "", "what was begun before is over first");
    assert!(bench.acknowledge(101));
    // Within the window, those before it too: what was lost right before it is what the receiver most likely holds.
    assert_eq!(bench.take(), "!22 !23 !24 !25 !26 !27 !28 !29 !30 !31");
    // The answers were on their way when the connection was lost.
    bench.queue.rewind();
    assert!(!bench.queue.complete(id(22), &bench.signal, &mut bench.ops));
    let (released, sent) = bench.run_dry();
    assert_eq!((released, sent), ((22..=181).collect(), vec![]));
    assert_eq!(bench.cleared(), Some(Cleared { below: 181, until: 21 + 65_535 }));
    bench.queue.rewind();
    assert_eq!(bench.take(), "", "it is not in the journal yet");
    bench.commit();
    assert_eq!(bench.take(), "b#102");
    assert!(bench.queue.receive(id(102), &bench.signal, &mut bench.ops));
    bench.commit();
    assert_eq!(bench.take(), "!102");
    assert!(bench.queue.complete(id(102), &bench.signal, &mut bench.ops));
    // What is behind what has been cleared waits for the next step, QoS 1 too.
    (103..=181).for_each(|_| _ = bench.push("1x"));
    bench.push("1y");
    let (released, sent) = bench.run_dry();
    assert_eq!((released, sent), ((182..=261).collect(), (103..=181).collect()));
    bench.commit();
    assert_eq!(bench.take(), "y#182");
}

#[test]
fn after_damage_every_identifier_is_released_once_before_it_is_used_again() {
    let mut bench = Bench::in_doubt(Layout::ByPriority, &[]);
    bench.window = 1000;
    let (mut all, mut used, mut last) = (BTreeSet::new(), 0, None);
    for _ in 0..12_000 {
        bench.push("2x");
        loop {
            bench.commit();
            let (released, sent) = bench.run_dry();
            if released.is_empty() && sent.is_empty() {
                break;
            }
            assert!(sent.iter().all(|id| all.contains(id)), "{sent:?}");
            assert!(released.into_iter().all(|id| all.insert(id)), "once is enough");
            last = bench.cleared().or(last);
            used += sent.len();
        }
    }
    assert_eq!(all, (1..=10_922).collect(), "those of the lane");
    assert_eq!(used, 12_000);
    assert!(last.unwrap().is_over());
    assert_eq!(bench.queue.lanes.iter().filter(|lane| lane.is_in_doubt()).count(), 5, "the other lanes sent nothing");
}

#[test]
fn after_another_crash_what_was_not_cleared_was_never_sent() {
    let cleared = Cleared { below: 2, until: 65_537 };
    let found = QueueSummary { lane: 0, first: Some(0), last: Some(3), messages: 4, bytes: 4 };
    let mut source = Bench::new(true);
    for spelled in ["2a", "2b", "2c", "2d"] {
        source.push(spelled);
    }
    let queue = Queue::restored(SessionId(7), Layout::One, &[found], Some(&[cleared]), 9);
    let mut bench = Bench { queue, ..Bench::new(true) };
    assert_eq!(bench.wants_page(), Some(0));
    bench.page_in(0, stored(&source.ops, 0..4), true);
    bench.queue.rewind();
    assert!(bench.take().starts_with("a#1+ b#2+ !3 !4 !5"));
}

#[test]
fn a_receiver_that_closes_its_connection_on_each_release_is_not_asked_for_ever() {
    let mut bench = Bench::in_doubt(Layout::One, &[]);
    bench.push("2a");
    bench.commit();
    for _ in 0..10 {
        assert!(bench.take().starts_with("!21 !22"));
        bench.queue.rewind();
    }
    assert_eq!(bench.take(), "a#101");
}

#[test]
fn a_message_that_is_found_damaged_puts_identifiers_in_doubt() {
    let mut bench = Bench::in_doubt(Layout::One, &[]);
    bench.push("2a");
    bench.commit();
    assert!(!bench.run_dry().0.is_empty());
    bench.commit();
    assert_eq!(bench.take(), "a#101");
    bench.push("2b");
    bench.queue.doubt(0);
    bench.commit();
    assert_eq!(bench.take(), "", "what is under way is over first");
    assert!(bench.acknowledge(101));
    assert_eq!(bench.take_up_to(3), "!22 !23 !24");
    // Found while a step is under way.
    bench.queue.doubt(0);
    assert_eq!(bench.queue.outstanding(), 0);
    assert_eq!(bench.run_dry().0, (22..=181).collect::<Vec<_>>());
}

#[test]
fn a_receiver_that_begins_anew_holds_nothing() {
    let mut bench = Bench::in_doubt(Layout::One, &[]);
    bench.queue.clear_all(&bench.signal, &mut bench.ops);
    assert!(bench.cleared().unwrap().is_over());
    bench.push("2a");
    assert_eq!(bench.take(), "", "another crash could forget it");
    bench.commit();
    assert_eq!(bench.take(), "a#101");
    // And where that was in the journal nothing is in doubt.
    let cleared = Cleared { below: 100, until: 100 };
    let mut bench = Bench::in_doubt(Layout::One, &[cleared]);
    bench.push("2a");
    bench.commit();
    assert_eq!(bench.take(), "a#101");
}

/// As where a run was damaged in its middle.
#[test]
fn what_is_released_between_messages_that_wait_leaves_all_of_them_acknowledged() {
    let found = QueueSummary { lane: 0, first: Some(0), last: Some(3), messages: 4, bytes: 3 };
    let mut bench = Bench { queue: Queue::restored(SessionId(7), Layout::One, &[found], None, 1), ..Bench::new(true) };
    let mut source = Bench::new(true);
    for spelled in ["1a", "1b", "2r", "1c"] {
        source.push(spelled);
    }
    let mut page = stored(&source.ops, 0..4);
    page[2].state = StoredState::Released;
    assert_eq!(bench.wants_page(), Some(0));
    bench.page_in(0, page, true);
    bench.queue.rewind();
    assert_eq!(bench.take(), "a#1+ !3 b#2 c#4");
    assert!(bench.acknowledge(1) && bench.acknowledge(2) && bench.acknowledge(4));
    assert!(bench.queue.complete(id(3), &bench.signal, &mut bench.ops));
    assert_eq!(bench.queue.len(), 0);
}

#[test]
fn what_is_paged_in_after_the_restored_part_goes_behind_what_waits() {
    let found = QueueSummary { lane: 0, first: Some(0), last: Some(1), messages: 2, bytes: 2 };
    // More may have been sent than there is.
    let mut bench = Bench { queue: Queue::restored(SessionId(7), Layout::One, &[found], None, 9), ..Bench::new(true) };
    let mut source = Bench::new(true);
    for spelled in ["1a", "1b"] {
        source.push(spelled);
    }
    assert_eq!(bench.wants_page(), Some(0));
    bench.page_in(0, stored(&source.ops, 0..2), true);
    bench.queue.rewind();
    (bench.limits.memory_messages, bench.window) = (4, 4);
    for spelled in ["1c", "1d", "1e", "1f", "1g", "1h"] {
        bench.push(spelled);
    }
    assert_eq!(bench.take(), "a#1+ b#2+ c#3 d#4");
    assert_eq!(bench.wants_page(), Some(6));
    bench.page_in(0, stored(&bench.ops, 6..8), true);
    (1..=4).for_each(|id| assert!(bench.acknowledge(id)));
    assert_eq!(bench.take(), "e#5 f#6 g#7 h#8");
}

#[test]
fn an_identifier_in_use_is_not_given_out_again() {
    let mut bench = Bench::new(false);
    bench.window = u16::MAX;
    bench.push("1a");
    bench.take();
    bench.queue.lanes[0].restore(QueueSummary { last: Some(65_534), ..QueueSummary::default() }, 0);
    bench.push("1b");
    assert_eq!(bench.take(), "");
    assert!(bench.acknowledge(1));
    assert_eq!(bench.take(), "b#1");
}

const HIGH: Precedence = Precedence { rank: 0, priority: Priority::High, order: Order::Strict, expiry: None };
const NORMAL: Precedence = Precedence { priority: Priority::Normal, ..HIGH };
const LOW: Precedence = Precedence { priority: Priority::Low, ..HIGH };
const LIVE: Precedence = Precedence { order: Order::LiveBeside, ..NORMAL };

#[test]
fn what_is_more_urgent_goes_first_and_all_share_one_window() {
    let mut bench = Bench::by_priority(false);
    for (precedence, spelled) in [(LOW, "1a"), (NORMAL, "1b"), (HIGH, "1c"), (LOW, "1d"), (NORMAL, "0e")] {
        bench.push_as(precedence, spelled);
    }
    bench.window = 2;
    assert_eq!(bench.take(), "c#21845 e b#1", "each lane has identifiers of its own");
    bench.push_as(HIGH, "1f");
    assert!(bench.acknowledge(1));
    assert_eq!(bench.take(), "f#21846", "also what came later");
    assert!(bench.acknowledge(21_845) && bench.acknowledge(21_846));
    assert_eq!(bench.take(), "a#43689 d#43690");
    for unknown in [21_845, 43_691, 65_532, 65_533, u16::MAX] {
        assert!(!bench.acknowledge(unknown), "{unknown}");
    }
}

#[test]
fn a_backlog_and_live_messages_share_the_connection_and_each_keeps_its_order() {
    let mut bench = Bench::by_priority(false);
    bench.queue.set_live_share(Priority::Normal, 25);
    bench.connected = false;
    for spelled in ["1a", "1b", "1c", "1d", "1e", "1f"] {
        bench.push_as(LIVE, spelled);
    }
    bench.connected = true;
    for spelled in ["1w", "1x", "1y", "1z"] {
        bench.push_as(LIVE, spelled);
    }
    // What keeps its order although others do not stands in the backlog.
    bench.push_as(NORMAL, "1g");
    assert_eq!(bench.take_up_to(3), "a#1 b#2 c#3");
    assert_eq!(bench.take_up_to(3), "w#10923 d#4 e#5", "the turns go on from one batch to the next");
    assert_eq!(bench.take(), "f#6 x#10924 g#7 y#10925 z#10926", "and what is alone does not wait");
    bench.push_as(LIVE, "1l");
    bench.push_as(HIGH, "1h");
    assert_eq!(bench.take(), "h#21845 l#10927");
}

#[test]
fn a_share_holds_to_the_message() {
    for share in [1, 30, 50, 99, 100] {
        let mut bench = Bench::by_priority(false);
        bench.window = u16::MAX;
        bench.queue.set_live_share(Priority::Normal, share);
        for _ in 0..1000 {
            bench.push_as(NORMAL, "1b");
            bench.push_as(LIVE, "1l");
        }
        let taken = bench.take_up_to(1000);
        assert_eq!(taken.split(' ').filter(|text| text.starts_with('l')).count(), usize::from(share) * 10);
    }
}

#[test]
fn a_lane_that_waits_for_the_disk_holds_up_no_other() {
    let mut bench = Bench::by_priority(true);
    bench.push_as(HIGH, "2a");
    bench.push_as(NORMAL, "2b");
    bench.push_as(LIVE, "1c");
    bench.push_as(LOW, "1d");
    assert_eq!(bench.take(), "c#10923 d#43689");
    bench.commit();
    assert_eq!(bench.take(), "a#21845 b#1");
}

#[test]
fn live_messages_that_are_late_join_the_backlog() {
    let mut bench = Bench::by_priority(true);
    bench.limits.memory_messages = 2;
    for spelled in ["1a", "1b", "1c"] {
        bench.push_as(LIVE, spelled);
    }
    assert_eq!(bench.take_up_to(2), "c#1 a#10923");
    bench.push_as(LIVE, "1d");
    assert_eq!(bench.take(), "b#10924 d#10925");
}

#[test]
fn a_full_queue_gives_up_what_is_least_urgent_and_never_what_is_more_urgent() {
    let mut bench = Bench::by_priority(false);
    bench.limits = QueueLimits { max_messages: 4, when_full: WhenFull::DropOldest, ..bench.limits };
    for (precedence, spelled) in [(HIGH, "1a"), (LIVE, "1b"), (NORMAL, "1c"), (LOW, "1d")] {
        assert_eq!(bench.push_as(precedence, spelled), Pushed::Queued);
    }
    assert_eq!(bench.push_as(NORMAL, "1e"), Pushed::DroppedOldest, "d");
    assert_eq!(bench.push_as(LOW, "1f"), Pushed::DroppedNewest);
    assert_eq!(bench.push_as(HIGH, "1g"), Pushed::DroppedOldest, "c: the backlog goes before what is live");
    assert_eq!(bench.push_as(HIGH, "1h"), Pushed::DroppedOldest, "e");
    assert_eq!(bench.push_as(HIGH, "1i"), Pushed::DroppedOldest, "b");
    assert_eq!(bench.push_as(NORMAL, "1j"), Pushed::DroppedNewest);
    assert_eq!(bench.push_as(HIGH, "1k"), Pushed::DroppedOldest, "a");
    assert_eq!(bench.take(), "g#21846 h#21847 i#21848 k#21849");
}

#[test]
fn a_new_connection_gets_what_is_urgent_before_the_unacknowledged_of_what_is_not() {
    let mut bench = Bench::by_priority(false);
    for (precedence, spelled) in [(LOW, "1a"), (LOW, "1b"), (NORMAL, "1c")] {
        bench.push_as(precedence, spelled);
    }
    assert_eq!(bench.take(), "c#1 a#43689 b#43690");
    bench.push_as(NORMAL, "1d");
    bench.queue.rewind();
    assert_eq!(bench.take(), "c#1+ d#2 a#43689+ b#43690+");
}

#[test]
fn restored_lanes_go_on_under_their_own_identifiers_and_are_paged_in_one_by_one() {
    let mut before = Bench::by_priority(true);
    for (precedence, spelled) in [(LOW, "2a"), (LIVE, "2b"), (NORMAL, "2c"), (LOW, "2d"), (HIGH, "2e")] {
        before.push_as(precedence, spelled);
    }
    let rows = stored(&before.ops, 0..u64::MAX);
    let lanes: Vec<Vec<StoredMessage>> =
        (0..6).map(|lane| rows.iter().filter(|row| store::lane(row.sequence) == lane).cloned().collect()).collect();
    let found = (0..6).zip(&lanes).map(|(lane, rows)| QueueSummary {
        lane,
        first: rows.first().map(|row| row.sequence),
        last: rows.last().map(|row| row.sequence),
        messages: rows.len() as u64,
        bytes: 0,
    });
    let found: Vec<_> = found.collect();
    let queue = Queue::restored(SessionId(7), Layout::ByPriority, &found, None, 1);
    let mut bench = Bench { queue, ..Bench::by_priority(true) };
    assert_eq!(bench.queue.len(), 5);
    bench.queue.rewind();
    // What is less urgent has time.
    assert_eq!(bench.wants_page(), Some(first_sequence(2)));
    assert_eq!(bench.wants_page(), None);
    bench.page_in(first_sequence(2), lanes[2].clone(), true);
    assert_eq!(bench.wants_page(), Some(first_sequence(0)));
    assert_eq!(bench.wants_page(), Some(first_sequence(1)), "the two of one priority together");
    bench.queue.page_failed(first_sequence(1));
    bench.page_in(first_sequence(0), lanes[0].clone(), true);
    assert_eq!(bench.wants_page(), Some(first_sequence(1)), "tried again");
    bench.page_in(first_sequence(1), lanes[1].clone(), true);
    assert_eq!(bench.wants_page(), Some(first_sequence(4)));
    bench.page_in(first_sequence(4), lanes[4].clone(), true);
    assert_eq!(bench.take(), "e#21845+ c#1+ b#10923+ a#43689+ d#43690");
    bench.push_as(HIGH, "1f");
    assert_eq!(bench.take(), "f#21846");
}

#[test]
fn every_lane_has_its_own_identifiers_and_they_come_round() {
    let lanes = Layout::ByPriority.lanes(SessionId(7), false);
    let mut seen = std::collections::HashSet::new();
    for (index, lane) in lanes.iter().enumerate() {
        let first = first_sequence(index as u8);
        let mine: Vec<_> = (first..first + 10_922).map(|sequence| lane.identifier(sequence)).collect();
        assert!(mine.iter().all(|id| seen.insert(*id)), "lane {index}");
        assert_eq!(lane.identifier(first + 10_922), mine[0]);
    }
    let names: Vec<_> = (0..6).map(|lane| stream_name(first_sequence(lane))).collect();
    assert_eq!(names, [None, Some("live"), Some("high"), Some("high-live"), Some("low"), Some("low-live")]);
}

/// What the journal holds of `sequences`.
fn stored(ops: &[Op], sequences: std::ops::Range<u64>) -> Vec<StoredMessage> {
    let row = |op: &Op| match op {
        Op::Enqueue { sequence, qos, retain, identifiers, shared, message, .. } => Some(StoredMessage {
            sequence: *sequence,
            qos: *qos,
            retain: *retain,
            identifiers: identifiers.clone(),
            shared: shared.clone(),
            state: StoredState::Queued(message.clone()),
        }),
        _ => None,
    };
    ops.iter().filter_map(row).filter(|row| sequences.contains(&row.sequence)).collect()
}
