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
use super::stats::Stats;
use super::{Due, Durability, Op, Page, PageLimit, Receipt, SessionId, Settings, Sweep, Swept};

/// How long [`Due::Later`] may wait.
const LATER: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Inbox {
    durability: Durability,
    commit_delay: Duration,
    relaxed_interval: Duration,
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
    requests: Vec<Request>,
    /// When the batch is due; `None` while there is nothing in it.
    due: Option<Instant>,
    /// What the writer is busy with or could not write yet, in bytes.
    in_flight: usize,
    end: End,
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
    Load { session: SessionId, from: u64, limit: PageLimit, then: Box<dyn FnOnce(Page) + Send> },
    Sweep { session: SessionId, sweep: Sweep, then: Box<dyn FnOnce(Swept) + Send> },
}

impl Request {
    /// Answers that it could not be done.
    pub fn fail(self) {
        match self {
            Self::Load { then, .. } => then(Page { failed: true, ..Page::default() }),
            Self::Sweep { then, .. } => then(Swept { more: true, ..Swept::default() }),
        }
    }
}

/// What the writer has to do next.
#[derive(Debug)]
pub(super) enum Work {
    /// Write the batch, then answer the requests; `last` where nothing comes after.
    Write { batch: Batch, requests: Vec<Request>, last: bool },
    /// Nothing is due, and it is time for what the writer asked to be woken for.
    Chores,
}

impl Inbox {
    pub fn new(settings: &Settings, stats: Arc<Stats>) -> Self {
        Self {
            durability: settings.durability,
            commit_delay: settings.commit_delay,
            relaxed_interval: settings.relaxed_interval,
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
        let mut pending = self.pending.lock();
        if pending.end == End::Closed {
            drop(pending);
            ops.drain(..).filter_map(|mut op| take_receipt(&mut op)).for_each(|receipt| receipt.fail());
            return;
        }
        let relaxed = self.durability == Durability::Relaxed && !self.stats.is_failing();
        for mut op in ops.drain(..) {
            if let Op::Enqueue { session, sequence, receipt, .. } = &mut op
                && number(*sequence) == MAX_NUMBER
            {
                error!(session = session.0, sequence, "a queue has used up its sequences, the message is not kept");
                receipt.take().inspect(|receipt| receipt.fail());
                continue;
            }
            if relaxed {
                satisfied.extend(take_receipt(&mut op));
            }
            pending.batch.push(op, &mut satisfied);
        }
        self.stats.cancelled.fetch_add(pending.batch.take_cancelled(), Ordering::Relaxed);
        let wake = self.schedule(&mut pending, due);
        drop(pending);
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
        pending.requests.push(request);
        drop(pending);
        self.work.notify_one();
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
            let is_due = pending.due.is_some_and(|due| due <= now);
            if is_due || !pending.requests.is_empty() || pending.end != End::Open {
                break;
            }
            if chores_at.is_some_and(|at| at <= now) {
                return Work::Chores;
            }
            match [pending.due, chores_at].into_iter().flatten().min() {
                Some(until) => {
                    self.work.wait_until(&mut pending, until);
                }
                None => self.work.wait(&mut pending),
            }
        }
        drop(pending);
        let gate = self.gate.write();
        let mut pending = self.pending.lock();
        pending.due = None;
        let batch = std::mem::take(&mut pending.batch);
        let requests = std::mem::take(&mut pending.requests);
        pending.in_flight = pending.in_flight.saturating_add(batch.bytes());
        let last = pending.end != End::Open;
        if last {
            pending.end = End::Closed;
        }
        drop(pending);
        drop(gate);
        Work::Write { batch, requests, last }
    }

    /// The writer is done with what it took, except for `bytes` that it could not write yet.
    pub fn done(&self, bytes: usize) {
        let mut pending = self.pending.lock();
        pending.in_flight = bytes;
        self.schedule_limit(&pending);
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
        let Pending { batch, requests, .. } = std::mem::take(&mut *pending);
        pending.end = End::Closed;
        self.schedule_limit(&pending);
        drop(pending);
        batch.fail();
        requests.into_iter().for_each(Request::fail);
    }

    /// Sets when the batch is due; true where the writer must be woken for it.
    fn schedule(&self, pending: &mut Pending, due: Due) -> bool {
        self.schedule_limit(pending);
        if pending.batch.is_empty() {
            pending.due = None;
            return false;
        }
        let delay = match (self.durability, due) {
            // Half of what may wait is waiting; to let it grow would only hold publishers back.
            _ if pending.batch.bytes() > self.limit / 2 => Duration::ZERO,
            (Durability::Commit, Due::Now) => Duration::ZERO,
            (Durability::Commit, Due::Soon) => self.commit_delay,
            (Durability::Commit, Due::Later) => LATER,
            (Durability::Interval(interval), Due::Now | Due::Soon) => interval,
            (Durability::Interval(interval), Due::Later) => interval.max(LATER),
            (Durability::Relaxed, _) => self.relaxed_interval,
        };
        let at = Instant::now() + delay;
        if pending.due.is_some_and(|due| due <= at) {
            return false;
        }
        pending.due = Some(at);
        true
    }

    fn schedule_limit(&self, pending: &Pending) {
        let is_over = pending.batch.bytes().saturating_add(pending.in_flight) > self.limit;
        if self.is_over.swap(is_over, Ordering::AcqRel) && !is_over {
            self.ready.notify_waiters();
        }
    }
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Load { session, from, .. } => write!(f, "Load({session:?}, {from})"),
            Self::Sweep { session, sweep, .. } => write!(f, "Sweep({session:?}, {sweep:?})"),
        }
    }
}

fn take_receipt(op: &mut Op) -> Option<Arc<Receipt>> {
    match op {
        Op::PutSubscription { receipt, .. }
        | Op::Enqueue { receipt, .. }
        | Op::Release { receipt, .. }
        | Op::AddInbound { receipt, .. }
        | Op::RemoveInbound { receipt, .. }
        | Op::PutRetained(_, receipt)
        | Op::DropRetained(_, receipt) => receipt.take(),
        Op::PutSession(_) | Op::DropSession(_) | Op::DropSubscription { .. } | Op::Remove { .. } => None,
    }
}
