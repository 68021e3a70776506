//! The part of a lane that is on disk only: how it comes to be, is read again, and loses what has expired.
//!
//! What was read waits as it lies on disk ([`Packed`]); its messages are made when those before them are gone. One
//! question to the store is under way at a time, a page or a sweep, so that neither sees what the other takes
//! away.

use std::time::Duration;

use super::{Entry, Inflight, InflightState, Lane};
use crate::clock::UnixMillis;
use crate::hub::queue::{Age, Incoming, QueueLimits, expires_at};
use crate::message::Message;
use crate::store::{Op, Packed, PackedRun, PageLimit, StoredState, Sweep, Swept};

/// For what has to be looked at by the next sweep.
pub(super) const AT_ONCE: UnixMillis = UnixMillis(i64::MIN);

/// The part of a durable lane that is on disk only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tail {
    /// The first sequence that was not read yet.
    pub from: u64,
    pub messages: u64,
    pub bytes: u64,
    /// When something of it may have expired; `None` where nothing ever does.
    pub expires_at: Option<UnixMillis>,
}

impl Tail {
    pub fn at(from: u64) -> Self {
        Self { from, messages: 0, bytes: 0, expires_at: None }
    }

    pub fn add(&mut self, message: &Message, size: usize, limits: &QueueLimits) {
        self.messages += 1;
        self.bytes += size as u64;
        self.expires_at = earliest(self.expires_at, expires_at(message, limits.max_age));
    }
}

impl Lane {
    /// Lets go of what waits in memory and is in the journal too, except the first `kept` messages.
    pub fn page_out(&mut self, kept: usize, limits: &QueueLimits) {
        // A page that is on its way goes behind what waits now.
        if !self.durable || self.loading.is_some() {
            return;
        }
        self.put_back();
        if self.waiting.len() <= kept {
            return;
        }
        let paged = self.waiting.split_off(kept);
        self.waiting.shrink_to_fit();
        let Some(from) = paged.front().map(|entry| entry.sequence) else { return };
        let mut tail = self.tail.unwrap_or(Tail::at(from));
        tail.from = from;
        for entry in paged {
            let size = entry.incoming.message.size();
            self.waiting_bytes -= size as u64;
            self.held -= entry.incoming.weight(size);
            tail.add(&entry.incoming.message, size, limits);
        }
        self.tail = Some(tail);
    }

    /// Forgets what was read ahead: it is read again.
    fn put_back(&mut self) {
        if let (Some(first), Some(tail)) = (self.ahead.first(), &mut self.tail) {
            tail.from = first;
            self.held -= self.ahead.bytes() as u64;
            self.ahead = Packed::default();
        }
    }

    /// Gives up what is on disk only, except what may have been sent before the gateway stopped; returns how many messages
    /// that were.
    pub(super) fn purge_tail(&mut self, ops: &mut Vec<Op>) -> u64 {
        self.put_back();
        let Some(tail) = &mut self.tail else { return 0 };
        let first = tail.from + self.maybe_sent as u64;
        if first >= self.next_sequence {
            return 0;
        }
        self.purged = first..self.next_sequence;
        ops.push(Op::Remove { session: self.session, first, last: self.next_sequence - 1 });
        let kept = tail.messages.min(self.maybe_sent as u64);
        let purged = tail.messages - kept;
        // What each of them has is on disk too; the average will do.
        tail.bytes = tail.bytes.checked_div(tail.messages).unwrap_or(0) * kept;
        tail.messages = kept;
        if kept == 0 {
            self.tail = None;
        }
        purged
    }

    /// Gives up what has expired of what waits in memory; returns how many messages that were.
    pub fn sweep(&mut self, age: Age, ops: &mut Vec<Op>) -> u64 {
        if self.waiting_expires_at.is_none_or(|at| at > age.now) {
            return 0;
        }
        self.unpack_all(0);
        let mut expired = 0;
        self.waiting_expires_at = None;
        for entry in std::mem::take(&mut self.waiting) {
            let message = &entry.incoming.message;
            if age.is_over(message) {
                self.forget_waiting(&entry, ops);
                expired += 1;
            } else {
                // What was accepted before the clock was set is never looked for again.
                let at = expires_at(message, age.max).filter(|&at| at > age.now);
                self.waiting_expires_at = earliest(self.waiting_expires_at, at);
                self.waiting.push_back(entry);
            }
        }
        expired
    }

    /// What the store should sweep, when something of the tail may have expired. The caller gives what was found to
    /// [`Lane::swept`].
    pub fn wants_sweep(&mut self, age: Age) -> Option<Sweep> {
        let tail = self.tail.as_mut().filter(|tail| tail.expires_at.is_some_and(|at| at <= age.now))?;
        if self.loading.is_some() {
            return None;
        }
        tail.expires_at = None;
        self.loading = Some(self.next_sequence);
        // What may have been sent before the gateway stopped is not given up: its receiver may have begun with it.
        let from = tail.from + self.maybe_sent as u64;
        let millis = |max: Duration| i64::try_from(max.as_millis()).unwrap_or(i64::MAX);
        let oldest = age.max.map(|max| UnixMillis(age.now.0.saturating_sub(millis(max))));
        Some(Sweep { from, now: age.now, oldest })
    }

    /// Takes note of what a sweep has removed.
    pub fn swept(&mut self, sweep: Sweep, swept: Swept) {
        let Some(next_at_request) = self.loading.take() else { return };
        let Some(tail) = &mut self.tail else { return };
        tail.messages = tail.messages.saturating_sub(swept.messages);
        tail.bytes = tail.bytes.saturating_sub(swept.bytes);
        let again = if swept.more { Some(AT_ONCE) } else { swept.next };
        tail.expires_at = earliest(tail.expires_at, again);
        if sweep.from == tail.from && !swept.more {
            tail.from = swept.first.unwrap_or(next_at_request);
        }
    }

    /// Other limits hold: what expires when is not known any more.
    pub fn sweep_again(&mut self) {
        self.waiting_expires_at = Some(AT_ONCE);
        if let Some(tail) = &mut self.tail {
            tail.expires_at = Some(AT_ONCE);
        }
    }

    /// The sequence to page in from, when no more than one `page` waits in memory and there is a tail: while that is sent
    /// the next one is read. The caller asks the store and gives the page to [`Lane::page_in`].
    pub fn wants_page(&mut self, page: PageLimit) -> Option<u64> {
        let tail = self.tail?;
        let (messages, bytes) = (self.waiting.len() + self.ahead.len(), self.waiting_bytes + self.ahead.bytes() as u64);
        let is_ahead = messages > page.messages || bytes > page.bytes as u64;
        if self.loading.is_some() || is_ahead {
            return None;
        }
        self.loading = Some(self.next_sequence);
        Some(tail.from)
    }

    /// Appends a page of the tail. `complete` says that nothing followed it on disk when it was read.
    pub fn page_in(&mut self, page: Packed, complete: bool) {
        let Some(next_at_request) = self.loading.take() else { return };
        let Some(tail) = &mut self.tail else { return };
        // What is before was given up while the page was being read.
        let from = tail.from;
        let is_cut = page.first().is_some_and(|first| first < from);
        if let Some(last) = page.last() {
            tail.from = from.max(last + 1);
        }
        if complete {
            tail.from = tail.from.max(next_at_request);
        }
        let is_over = tail.from >= self.next_sequence;
        self.held += page.bytes() as u64;
        let must_unpack = is_over || is_cut || self.maybe_sent > 0 || page.has_released();
        self.ahead.append(page);
        // When it expires is not asked here but by the next sweep.
        self.waiting_expires_at = Some(AT_ONCE);
        if must_unpack {
            // What was given up was the first of the queue: where the page was cut, nothing else is ahead.
            self.unpack_all(if is_cut { from } else { 0 });
        }
        if complete {
            // What is paged in later was queued by this process; ahead of what waits it would be out of order.
            self.maybe_sent = 0;
        }
        if is_over {
            self.tail = None;
        }
    }

    /// Whether anything waits to be sent; makes messages of what was read where all before it is gone.
    pub(super) fn has_waiting(&mut self) -> bool {
        while self.waiting.is_empty()
            && let Some(run) = self.pop_ahead()
        {
            self.unpack(&run, 0);
        }
        !self.waiting.is_empty()
    }

    /// Lets all that was read ahead wait, from sequence `from` on.
    fn unpack_all(&mut self, from: u64) {
        while let Some(run) = self.pop_ahead() {
            self.unpack(&run, from);
        }
    }

    fn pop_ahead(&mut self) -> Option<PackedRun> {
        let run = self.ahead.pop()?;
        self.held -= run.bytes() as u64;
        Some(run)
    }

    /// Lets the messages of a run wait, from sequence `from` on.
    fn unpack(&mut self, run: &PackedRun, from: u64) {
        let (mut messages, mut bytes) = (0, 0);
        run.unpack(|stored| {
            let sequence = stored.sequence;
            if sequence < from || self.purged.contains(&sequence) {
                // Given up while the page was being read.
                return;
            }
            messages += 1;
            let StoredState::Queued(message) = stored.state else {
                return self.inflight.push_back(Inflight { sequence, state: InflightState::Released });
            };
            let size = message.size();
            bytes += size as u64;
            let incoming = Incoming {
                message,
                qos: stored.qos,
                retain: stored.retain,
                identifiers: stored.identifiers,
                shared: stored.shared,
                spread: 0,
            };
            self.held += incoming.weight(size);
            // Behind a hole in the numbers, as damage to the disk leaves one, nothing was sent yet.
            let may_have_sent = self.clearing.as_ref().is_none_or(|clearing| clearing.may_have_sent(sequence));
            if self.maybe_sent > 0 && may_have_sent && self.identifier_is_free(sequence) {
                self.maybe_sent -= 1;
                self.inflight.push_back(Inflight { sequence, state: InflightState::Published(incoming) });
            } else {
                self.maybe_sent = 0;
                self.waiting_bytes += size as u64;
                self.waiting.push_back(Entry { sequence, incoming, committed: None });
            }
        });
        if let Some(tail) = &mut self.tail {
            tail.messages = tail.messages.saturating_sub(messages);
            tail.bytes = tail.bytes.saturating_sub(bytes);
        }
    }

    /// The page could not be read; [`Lane::wants_page`] asks again.
    pub fn page_failed(&mut self) {
        self.loading = None;
    }
}

pub(super) fn earliest(one: Option<UnixMillis>, other: Option<UnixMillis>) -> Option<UnixMillis> {
    [one, other].into_iter().flatten().min()
}
