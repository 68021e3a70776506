//! Where the hub's threads put operations down and the writer picks them up as one batch.
//!
//! Nobody waits here for the disk: the lock is held for bookkeeping only. A limit on bytes holds publishers back
//! through [`Inbox::ready`]; it is not enforced here, because an operation that was not submitted would be lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, RwLock, RwLockReadGuard};
use tokio::sync::Notify;
use tracing::error;

use super::batch::Batch;
use super::op::{MAX_NUMBER, number};
use super::pace::{Pace, Paces};
use super::stats::Stats;
use super::{Due, Durability, Op, Page, PageLimit, Receipt, SessionId, Settings, Sweep, Swept};

/// How long [`Due::Later`] may wait.
const LATER: Duration = Duration::from_secs(1);
/// A batch with this many changes is written although more could be gathered: larger ones write no fewer bytes for each
/// message, and publishers have only so many unacknowledged.
const FULL_BATCH: usize = 4096;

#[derive(Debug)]
pub(super) struct Inbox {
    durability: Durability,
    commit_delay: Duration,
    max_commit_delay: Duration,
    relaxed_interval: Duration,
    retained_interval: Duration,
    limit: usize,
    pending: Mutex<Pending>,
    /// Wakes the writer.
    work: Condvar,
    /// Held for reading while operations that belong together are submitted, for writing when a batch is taken.
    gate: RwLock<()>,
    ready: Notify,
    stats: Arc<Stats>,
    /// More waits than the limit allows.
    is_over: AtomicBool,
}

#[derive(Debug, Default)]
struct Pending {
    batch: Batch,
    /// Retained messages that wait for newer ones of their topics. The batch holds none of these topics.
    retained: Batch,
    retained_due: Option<Instant>,
    paces: Paces,
    /// Answered before the batch is written, as far as that can be.
    loads: Vec<Load>,
    /// Answered after the batch is written.
    requests: Vec<Request>,
    /// When something may be due, or before; `None` while nothing waits to be written.
    due: Option<Instant>,
    /// So much waits that it is written although it is not due.
    is_pressing: bool,
    /// When the writer looks here again without being woken; `None` while it waits for nothing else. At a healthy uplink
    /// each message is gone before it is due: to wake the writer for each of them would only make others wait.
    looks_at: Option<Instant>,
    /// What the writer is busy with or could not write yet, in bytes.
    in_flight: usize,
    end: End,
}

impl Pending {
    /// Adds an operation; how long it may wait is `delay`.
    fn push(&mut self, op: Op, now: Instant, delay: Duration, satisfied: &mut Vec<Arc<Receipt>>) {
        let at = now + delay;
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
        self.batch.push(op, at, satisfied);
    }

    /// Keeps a retained message until others of its kind are due `at` then, if none waits yet.
    fn put_off(&mut self, op: Op, at: Instant, satisfied: &mut Vec<Arc<Receipt>>) {
        let at = *self.retained_due.get_or_insert(at);
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
        self.retained.push(op, at, satisfied);
    }

    /// Whether something must be written now; where that is not so, `due` says when to look again.
    fn is_due(&mut self, now: Instant) -> bool {
        if self.due.is_none_or(|due| due > now) {
            return false;
        }
        // What was due then may be gone.
        self.due = [self.batch.due(now), self.retained_due].into_iter().flatten().min();
        self.is_pressing || self.due.is_some_and(|due| due <= now)
    }

    /// What is to be written now.
    fn take(&mut self, now: Instant) -> Batch {
        let mut batch = std::mem::take(&mut self.batch);
        if self.is_pressing || self.end != End::Open || self.retained_due.is_some_and(|due| due <= now) {
            batch.append(std::mem::take(&mut self.retained));
            self.retained_due = None;
        }
        (self.due, self.is_pressing) = (self.retained_due, false);
        batch
    }

    fn bytes(&self) -> usize {
        self.batch.bytes().saturating_add(self.retained.bytes())
    }

    /// Puts the pages off that the batch has a say in.
    fn sort_loads(&mut self) {
        let Self { batch, loads, requests, .. } = self;
        requests.extend(loads.extract_if(.., |load| batch.changes_page(load.session, load.from)).map(Request::Load));
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum End {
    #[default]
    Open,
    /// What is here is written, then the writer ends.
    Closing,
    Closed,
}

/// What a session asks of its queue; the answer is given on the writer's thread.
pub(super) enum Request {
    Load(Load),
    Sweep { session: SessionId, sweep: Sweep, then: Box<dyn FnOnce(Swept) + Send> },
}

/// A page that is wanted.
pub(super) struct Load {
    pub session: SessionId,
    pub from: u64,
    pub limit: PageLimit,
    pub then: Box<dyn FnOnce(Page) + Send>,
}

impl Request {
    /// Answers that it could not be done.
    pub fn fail(self) {
        match self {
            Self::Load(load) => (load.then)(Page { failed: true, ..Page::default() }),
            Self::Sweep { then, .. } => then(Swept { more: true, ..Swept::default() }),
        }
    }
}

/// What the writer has to do next.
#[derive(Debug)]
pub(super) enum Work {
    /// Read pages while nothing is due to be written.
    Read(Vec<Load>),
    /// Read pages, write the batch, then answer the requests; `last` where nothing comes after.
    Write { loads: Vec<Load>, batch: Batch, requests: Vec<Request>, last: bool },
    /// Nothing is due, and it is time for what the writer asked to be woken for.
    Chores,
}

impl Inbox {
    pub fn new(settings: &Settings, stats: Arc<Stats>) -> Self {
        Self {
            durability: settings.durability,
            commit_delay: settings.commit_delay,
            max_commit_delay: settings.max_commit_delay,
            relaxed_interval: settings.relaxed_interval,
            retained_interval: settings.retained_interval,
            limit: settings.inbox_bytes,
            pending: Mutex::default(),
            work: Condvar::new(),
            gate: RwLock::new(()),
            ready: Notify::new(),
            stats,
            is_over: AtomicBool::new(false),
        }
    }

    pub fn submit(&self, ops: &mut Vec<Op>, due: Due) {
        let mut satisfied = Vec::new();
        let mut guard = self.pending.lock();
        let pending = &mut *guard;
        if pending.end == End::Closed {
            drop(guard);
            ops.drain(..).filter_map(|mut op| take_receipt(&mut op)).for_each(|receipt| receipt.fail());
            return;
        }
        let relaxed = self.durability == Durability::Relaxed && !self.stats.is_failing();
        let now = Instant::now();
        let due_before = pending.due;
        let delay = self.delay(due);
        // Mostly all operations are of one session.
        let mut patience: Option<(SessionId, Duration)> = None;
        for mut op in ops.drain(..) {
            let mut delay = delay;
            match &mut op {
                Op::Enqueue { session, sequence, receipt, .. } => {
                    if number(*sequence) == MAX_NUMBER {
                        error!(
                            session = session.0,
                            sequence, "a queue has used up its sequences, the message is not kept"
                        );
                        receipt.take().inspect(|receipt| receipt.fail());
                        continue;
                    }
                    let known = patience.filter(|&(of, _)| of == *session);
                    let learn = || (*session, self.patience(pending.paces.of(*session), *sequence, due, now));
                    delay = delay.max(patience.insert(known.unwrap_or_else(learn)).1);
                }
                Op::Remove { session, first, last } => {
                    pending.paces.removed(*session, *first, *last, now, self.max_commit_delay);
                }
                Op::DropSession(session) => pending.paces.forget(*session),
                Op::PutRetained(message, None)
                    if due == Due::Eventually && !pending.batch.holds_retained(&message.topic) =>
                {
                    pending.put_off(op, now + self.retained_interval, &mut satisfied);
                    continue;
                }
                Op::PutRetained(message, _) => pending.retained.forget_retained(&message.topic),
                Op::DropRetained(topic, _) => pending.retained.forget_retained(topic),
                _ => {}
            }
            if relaxed {
                satisfied.extend(take_receipt(&mut op));
            }
            pending.push(op, now, delay, &mut satisfied);
        }
        self.stats.cancelled.fetch_add(pending.batch.take_cancelled(), Ordering::Relaxed);
        let wake = self.schedule(pending, due, now, due_before);
        drop(guard);
        if wake {
            self.work.notify_one();
        }
        // Not under the lock: each may wake a task.
        satisfied.iter().for_each(|receipt| receipt.satisfy());
    }

    /// Asks something of a queue; after the store has ended the answer is that it failed.
    pub fn request(&self, request: Request) {
        let mut pending = self.pending.lock();
        if pending.end == End::Closed {
            drop(pending);
            return request.fail();
        }
        match request {
            Request::Load(load) => pending.loads.push(load),
            request => pending.requests.push(request),
        }
        drop(pending);
        self.work.notify_one();
    }

    /// Comes back to a page that can only be read once everything that was submitted is written.
    pub fn postpone(&self, load: Load) {
        self.pending.lock().requests.push(Request::Load(load));
    }

    /// While the guard lives no batch is taken.
    pub fn hold(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read()
    }

    pub async fn ready(&self) {
        loop {
            let notified = self.ready.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if !self.is_over.load(Ordering::Acquire) {
                return;
            }
            notified.await;
        }
    }

    /// Waits for work. `chores_at` is when the writer wants to look after other things, if nothing is due by then.
    pub fn wait(&self, chores_at: Option<Instant>) -> Work {
        let mut pending = self.pending.lock();
        loop {
            let now = Instant::now();
            // It does not wait yet, and looks here before it does.
            pending.looks_at = Some(now);
            pending.sort_loads();
            if pending.is_due(now) || !pending.requests.is_empty() || pending.end != End::Open {
                break;
            }
            if !pending.loads.is_empty() {
                return Work::Read(std::mem::take(&mut pending.loads));
            }
            if chores_at.is_some_and(|at| at <= now) {
                return Work::Chores;
            }
            pending.looks_at = [pending.due, chores_at].into_iter().flatten().min();
            match pending.looks_at {
                Some(until) => {
                    self.work.wait_until(&mut pending, until);
                }
                None => self.work.wait(&mut pending),
            }
        }
        drop(pending);
        let gate = self.gate.write();
        let mut pending = self.pending.lock();
        pending.sort_loads();
        let batch = pending.take(Instant::now());
        let loads = std::mem::take(&mut pending.loads);
        let requests = std::mem::take(&mut pending.requests);
        pending.in_flight = pending.in_flight.saturating_add(batch.bytes());
        let last = pending.end != End::Open;
        if last {
            pending.end = End::Closed;
        }
        drop(pending);
        drop(gate);
        Work::Write { loads, batch, requests, last }
    }

    /// The writer is done with what it took, except for `bytes` that it could not write yet.
    pub fn done(&self, bytes: usize) {
        let mut pending = self.pending.lock();
        pending.in_flight = bytes;
        self.schedule_limit(&pending);
    }

    /// Whether the writer waits to be woken, and for no time.
    #[cfg(test)]
    pub fn sleeps(&self) -> bool {
        self.pending.lock().looks_at.is_none()
    }

    /// Lets the writer finish.
    pub fn close(&self) {
        let mut pending = self.pending.lock();
        if pending.end == End::Open {
            pending.end = End::Closing;
        }
        drop(pending);
        self.work.notify_one();
    }

    /// Takes no more, and fails what still waits, if anything.
    pub fn abandon(&self) {
        let mut pending = self.pending.lock();
        let Pending { batch, loads, requests, .. } = std::mem::take(&mut *pending);
        pending.end = End::Closed;
        self.schedule_limit(&pending);
        drop(pending);
        batch.fail();
        loads.into_iter().map(Request::Load).chain(requests).for_each(Request::fail);
    }

    /// Looks at what has come; true where the writer must be woken for it.
    fn schedule(&self, pending: &mut Pending, due: Due, now: Instant, due_before: Option<Instant>) -> bool {
        self.schedule_limit(pending);
        if pending.retained.is_empty() {
            pending.retained_due = None;
        }
        if pending.batch.is_empty() {
            // Most of the time, at a healthy uplink.
            (pending.due, pending.is_pressing) = (pending.retained_due, false);
        }
        // Half of what may wait is waiting; to let it grow would only hold publishers back.
        let is_much = pending.bytes() > self.limit / 2 || pending.retained.bytes() > self.limit / 8;
        let gathers = matches!(self.durability, Durability::Interval(_)) && matches!(due, Due::Now | Due::Soon);
        if is_much || gathers && pending.batch.changes() >= FULL_BATCH {
            pending.is_pressing = true;
            pending.due = Some(now);
        }
        let sooner = pending.due.is_some_and(|due| due_before.is_none_or(|before| due < before));
        sooner && pending.looks_at.is_none_or(|looks| pending.due.is_some_and(|due| looks > due))
    }

    /// How long an operation may wait.
    fn delay(&self, due: Due) -> Duration {
        match (self.durability, due) {
            (Durability::Commit, Due::Now) => Duration::ZERO,
            (Durability::Commit, Due::Soon) => self.commit_delay,
            (Durability::Commit, Due::Later | Due::Eventually) => LATER,
            (Durability::Interval(interval), Due::Now | Due::Soon) => interval,
            (Durability::Interval(interval), Due::Later | Due::Eventually) => interval.max(LATER),
            (Durability::Relaxed, _) => self.relaxed_interval,
        }
    }

    /// How long a message may wait for the acknowledgements of its session's receiver, to which it is on its way if it is
    /// [`Due::Soon`].
    fn patience(&self, pace: &mut Pace, sequence: u64, due: Due, now: Instant) -> Duration {
        if due != Due::Soon {
            pace.parted();
            return Duration::ZERO;
        }
        pace.sent(sequence, now);
        pace.patience(now, self.max_commit_delay)
    }

    fn schedule_limit(&self, pending: &Pending) {
        let is_over = pending.bytes().saturating_add(pending.in_flight) > self.limit;
        if self.is_over.swap(is_over, Ordering::AcqRel) && !is_over {
            self.ready.notify_waiters();
        }
    }
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Load(load) => load.fmt(f),
            Self::Sweep { session, sweep, .. } => write!(f, "Sweep({session:?}, {sweep:?})"),
        }
    }
}

impl std::fmt::Debug for Load {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Load").field("session", &self.session).field("from", &self.from).finish_non_exhaustive()
    }
}

fn take_receipt(op: &mut Op) -> Option<Arc<Receipt>> {
    match op {
        Op::PutSubscription { receipt, .. }
        | Op::Enqueue { receipt, .. }
        | Op::Release { receipt, .. }
        | Op::AddInbound { receipt, .. }
        | Op::RemoveInbound { receipt, .. }
        | Op::Clear { receipt, .. }
        | Op::PutRetained(_, receipt)
        | Op::DropRetained(_, receipt) => receipt.take(),
        Op::PutSession(_) | Op::DropSession(_) | Op::DropSubscription { .. } | Op::Remove { .. } => None,
    }
}
