//! The one thread that writes: group commit, what happens when the disk refuses, and upkeep while nothing is due.

mod upkeep;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use super::batch::{Batch, Change, Receipts};
use super::database::{Database, Usage};
use super::inbox::{Inbox, Load, Request, Work};
use super::open::{self, Lock};
use super::read;
use super::reserve::Reserve;
use super::stats::{Alarm, Failure, Stats};
use super::{Page, SessionId, Settings, Sweep, Swept};
use crate::clock::Clock;

/// The last of this many parts of the database is held back when it fills; see [`super::Store::is_full`].
const HELD_BACK: u64 = 16;
/// While the log cannot be moved into the database it goes on to grow up to here; what adds data is refused then.
const MAX_LOG_BYTES: u64 = 64 << 20;
/// While the disk refuses, how long until the next try; doubles up to the second.
pub(super) const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Between two times that a damaged database is replaced: a disk or memory that damages all it gets wears out no other.
const MEND_PAUSE: Duration = Duration::from_secs(60);
/// How long until what could not be read is tried again.
const READ_AGAIN: Duration = Duration::from_secs(1);
/// How long nothing must have been written before free space is given back.
const IDLE: Duration = Duration::from_secs(2);

pub(super) struct Writer {
    database: Database,
    inbox: Arc<Inbox>,
    stats: Arc<Stats>,
    clock: Clock,
    settings: Settings,
    limits: Limits,
    lock: Lock,
    reserve: Reserve,
    /// Pages that could not be read, and when to try again.
    unread: Vec<Load>,
    read_again_at: Option<Instant>,
    /// What the disk refused and must not be lost.
    kept: Batch,
    /// Of what was refused, what may stand in the log nevertheless. Its publishers are not told before that is out of the
    /// question: a QoS 2 identifier that came back after they had given it to another message would swallow that.
    untold: Vec<Receipts>,
    retry: Option<Retry>,
    /// When a damaged database was last replaced, or that was tried.
    mended_at: Option<Instant>,
    /// A queue could not be read when it was last tried.
    is_unreadable: bool,
    usage: Usage,
    upkeep_at: Option<Instant>,
    /// Pages were given back, and the file still has them.
    shrinks: bool,
}

/// From where on the store says that it is full.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// The rest up to the limit of the database is for what is on its way, and for removals, which may need a page before
    /// they give one back.
    bytes: u64,
    messages: u64,
}

impl Limits {
    fn of(settings: &Settings) -> Self {
        Self { bytes: settings.max_bytes - settings.max_bytes / HELD_BACK, messages: settings.max_messages }
    }
}

/// When to try again.
#[derive(Clone, Copy, Debug)]
struct Retry {
    at: Instant,
    delay: Duration,
    /// Not even what makes room could be written: until then nothing is tried.
    blocked: bool,
}

/// Whether what is refused was written to the log before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tried {
    Yes,
    No,
}

impl Writer {
    pub fn new(
        database: Database,
        lock: Lock,
        reserve: Reserve,
        inbox: Arc<Inbox>,
        stats: Arc<Stats>,
        clock: Clock,
        settings: Settings,
    ) -> Self {
        let limits = Limits::of(&settings);
        Self {
            database,
            inbox,
            stats,
            clock,
            settings,
            limits,
            lock,
            reserve,
            unread: Vec::new(),
            read_again_at: None,
            kept: Batch::default(),
            untold: Vec::new(),
            retry: None,
            mended_at: None,
            is_unreadable: false,
            usage: Usage::default(),
            upkeep_at: None,
            shrinks: false,
        }
    }

    pub fn run(mut self) {
        let inbox = self.inbox.clone();
        // Only a panic leaves the inbox open; whoever waits must be told then.
        let _abandon = Abandon(&inbox);
        self.look_at_usage();
        self.upkeep_at = Some(Instant::now() + IDLE);
        loop {
            self.tell_refused();
            let chores_at =
                [self.retry.map(|retry| retry.at), self.read_again_at, self.upkeep_at].into_iter().flatten().min();
            match self.inbox.wait(chores_at) {
                Work::Chores => self.do_chores(),
                Work::Read(loads) => {
                    let unfinished: Vec<_> = loads.into_iter().filter_map(|load| self.read_ahead(load)).collect();
                    unfinished.into_iter().for_each(|load| self.inbox.postpone(load));
                }
                Work::Write { loads, batch, requests, last } => {
                    if last {
                        self.retry = None;
                    }
                    // Whoever drains a backlog does not wait for the disk to sync what others sent.
                    let unfinished: Vec<_> = loads.into_iter().filter_map(|load| self.read_ahead(load)).collect();
                    self.write(batch);
                    self.inbox.done(self.kept.bytes());
                    let requests = unfinished.into_iter().map(Request::Load).chain(requests);
                    requests.for_each(|request| self.answer(request));
                    self.checkpoint_if_large();
                    if last {
                        break;
                    }
                    // Where there is always something to write, there is never time for chores.
                    self.do_what_is_due();
                }
            }
        }
        self.finish();
    }

    /// Writes `batch` after what is left from before, or refuses what may be refused and keeps the rest.
    fn write(&mut self, batch: Batch) {
        let mut work = std::mem::take(&mut self.kept);
        work.append(batch);
        if work.is_empty() {
            // Receipts of what needs no write, if any.
            return work.satisfy();
        }
        if self.is_blocked() {
            self.refuse(&mut work, Tried::No);
            return self.keep(work);
        }
        // What a publisher sends after something that was refused must not be kept before it: it sends that again.
        if self.has_no_room() || self.stats.has_refused() {
            self.refuse(&mut work, Tried::No);
        }
        let written = self.mended(|writer| writer.commit(&work)).or_else(|error| {
            if self.note(&error) {
                // The log starts over, and its next transactions stand in the room that it has.
                let _ = self.database.checkpoint();
            }
            // What is left may make room, as removals do.
            if self.refuse(&mut work, Tried::Yes) > 0 && !work.is_empty() { self.commit(&work) } else { Err(error) }
        });
        match written {
            Ok(()) => {
                work.satisfy();
                // That one commit passed does not end the episode: see [`Database::settle`].
                if self.retry.is_none_or(|retry| retry.blocked) {
                    self.retry = None;
                    if self.stats.is_failing() {
                        self.retry_later(false);
                    }
                }
                self.upkeep_at = Some(Instant::now() + IDLE);
            }
            Err(error) => {
                self.note(&error);
                self.keep(work);
                self.retry_later(true);
            }
        }
        self.look_at_usage();
    }

    fn commit(&mut self, batch: &Batch) -> rusqlite::Result<()> {
        let started = Instant::now();
        let committed = self.database.commit(batch)?;
        self.stats.committed(committed, batch.len(), started.elapsed());
        Ok(())
    }

    /// Fails the receipts of what adds data and gives it up; returns how much that was.
    fn refuse(&mut self, work: &mut Batch, tried: Tried) -> usize {
        let refused = work.take_refusable();
        let count = refused.len();
        self.stats.count_refused(count);
        let has_identifiers = refused.iter().any(|slot| matches!(slot.change, Change::AddInbound { .. }));
        if tried == Tried::Yes && self.database.is_unsure && has_identifiers {
            self.untold.extend(refused.into_iter().map(|slot| slot.receipts));
        } else {
            refused.iter().for_each(|slot| slot.receipts.fail());
        }
        count
    }

    /// Tells publishers what was refused, once it cannot come back.
    fn tell_refused(&mut self) {
        if !self.database.is_unsure {
            self.untold.drain(..).for_each(|receipts| receipts.fail());
        }
    }

    fn keep(&mut self, mut work: Batch) {
        if self.database.refresh().is_ok() {
            let state = &self.database.state;
            work.prune(|session| state.has(session), |session, sequence| state.queue(session, sequence)?.last);
        }
        work.fail_subscriptions();
        self.kept = work;
    }

    /// Takes note of what failed; true where that was for want of room, and the reserve has made some.
    fn note(&mut self, error: &rusqlite::Error) -> bool {
        let failure = match Failure::of(error) {
            Failure::Io if self.lock.is_read_only() => Failure::ReadOnly,
            failure => failure,
        };
        if self.stats.failed(failure, &error.to_string(), self.clock.now()) {
            error!(%error, hint = failure.hint(), "the store cannot write; what must be kept is refused until it can");
        }
        failure == Failure::Full && self.reserve.release()
    }

    fn retry_later(&mut self, blocked: bool) {
        let delay = self.retry.map_or(RETRY.0, |retry| (retry.delay * 2).min(RETRY.1));
        self.retry = Some(Retry { at: Instant::now() + delay, delay, blocked });
    }

    /// Ends the episode in which the disk refused, if there is one.
    fn recover(&mut self) {
        self.retry = None;
        if !self.stats.is_failing() {
            return;
        }
        if let Some(Alarm { failure, since, refused, .. }) = self.stats.recovered() {
            let seconds = self.clock.now().since(since).as_secs();
            warn!(kind = failure.name(), seconds, refused, "the store can write again");
        }
    }

    /// Answers with what is on disk, if that fills the page: what is not written yet comes behind it. Otherwise the load
    /// comes back.
    fn read_ahead(&mut self, load: Load) -> Option<Load> {
        let page = self.page(&load);
        if page.complete || page.failed {
            return Some(load);
        }
        if catch_unwind(AssertUnwindSafe(|| (load.then)(page))).is_err() {
            error!("the receiver of a page panicked");
        }
        None
    }

    fn answer(&mut self, request: Request) {
        // A fault in one receiver must not end the store for all others.
        let answered = match request {
            Request::Load(load) => {
                let page = self.page(&load);
                if page.failed {
                    return self.read_later(load);
                }
                catch_unwind(AssertUnwindSafe(|| (load.then)(page)))
            }
            Request::Sweep { session, sweep, then } => {
                let swept = self.sweep(session, sweep);
                catch_unwind(AssertUnwindSafe(|| then(swept)))
            }
        };
        if answered.is_err() {
            error!("the receiver of a page or a sweep panicked");
        }
    }

    fn page(&mut self, load: &Load) -> Page {
        match self.mended(|writer| writer.read(load)) {
            Ok(page) => {
                self.is_unreadable = false;
                page
            }
            Err(error) => {
                if !std::mem::replace(&mut self.is_unreadable, true) {
                    let hint = Failure::of(&error).hint();
                    error!(%error, hint, session = load.session.0, "a queue cannot be read; it is tried again until it can");
                }
                Page { failed: true, ..Page::default() }
            }
        }
    }

    fn read(&mut self, &Load { session, from, limit, .. }: &Load) -> rusqlite::Result<Page> {
        self.database.refresh()?;
        let page =
            |database: &Database, kept| read::page(&database.connection, &database.state, session, from, limit, kept);
        let (whole, damaged) = page(&self.database, &self.kept)?;
        if damaged.is_empty() {
            return Ok(whole);
        }
        let lane = super::lane(from);
        match self.database.set_aside(session, lane, &damaged, self.clock.now()) {
            Ok(lost) => {
                error!(
                    session = session.0,
                    lane, lost, "messages in the store are damaged and will not be delivered; check the disk"
                );
                self.stats.damaged.fetch_add(lost, Ordering::Relaxed);
                page(&self.database, &self.kept).map(|(page, _)| Page { in_doubt: true, ..page })
            }
            Err(error) if open::damage(&error).is_some() => Err(error),
            Err(error) => {
                self.note(&error);
                Ok(whole)
            }
        }
    }

    /// Does `work`; where that finds the database damaged, replaces it by what can be saved of it and does it again.
    fn mended<T>(&mut self, mut work: impl FnMut(&mut Self) -> rusqlite::Result<T>) -> rusqlite::Result<T> {
        match work(self) {
            Err(error) if self.mend(&error) => work(self),
            result => result,
        }
    }

    fn mend(&mut self, error: &rusqlite::Error) -> bool {
        let Some(reason) = open::damage(error) else { return false };
        if self.mended_at.is_some_and(|at| at.elapsed() < MEND_PAUSE) {
            return false;
        }
        let mended = open::repair(&mut self.database, &self.settings, &reason, &self.clock);
        self.mended_at = Some(Instant::now());
        match &mended {
            Ok(replaced) => self.stats.replaced_while_running(replaced),
            Err(error) => error!(
                error = error as &dyn std::error::Error,
                reason, "the database is damaged and cannot be replaced now; that is tried again in a minute"
            ),
        }
        mended.is_ok()
    }

    /// Keeps the receiver of a page that cannot be read waiting: told so, it would ask again at once.
    fn read_later(&mut self, load: Load) {
        self.unread.push(load);
        self.stats.unread.store(self.unread.len() as u64, Ordering::Relaxed);
        self.read_again_at.get_or_insert_with(|| Instant::now() + READ_AGAIN);
    }

    fn read_again(&mut self) {
        self.read_again_at = None;
        let loads = std::mem::take(&mut self.unread);
        loads.into_iter().for_each(|load| self.answer(Request::Load(load)));
        self.stats.unread.store(self.unread.len() as u64, Ordering::Relaxed);
    }

    fn sweep(&mut self, session: SessionId, sweep: Sweep) -> Swept {
        if self.is_blocked() {
            return Swept { more: true, ..Swept::default() };
        }
        match self.mended(|writer| writer.database.sweep(session, sweep)) {
            Ok(swept) => {
                self.stats.removed.fetch_add(swept.messages, Ordering::Relaxed);
                self.upkeep_at = Some(Instant::now() + IDLE);
                swept
            }
            Err(error) => {
                self.note(&error);
                self.retry_later(false);
                Swept { more: true, ..Swept::default() }
            }
        }
    }

    /// Not even what makes room could be written a moment ago.
    fn is_blocked(&self) -> bool {
        self.retry.is_some_and(|retry| retry.blocked && retry.at > Instant::now())
    }

    /// What room there is on the disk is for removals, or the log cannot be moved into the database and is as large as it
    /// may become.
    fn has_no_room(&self) -> bool {
        self.stats.is_failing() && (self.reserve.is_spent() || self.usage.wal >= MAX_LOG_BYTES)
    }

    /// Tries again what could not be written or read a while ago; false where it is not time for that.
    fn do_what_is_due(&mut self) -> bool {
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= Instant::now());
        if is_due(self.retry.map(|retry| retry.at)) {
            self.try_again();
        } else if is_due(self.read_again_at) {
            self.read_again();
        } else {
            return false;
        }
        true
    }

    fn do_chores(&mut self) {
        if self.do_what_is_due() {
            return;
        }
        let now = Instant::now();
        self.upkeep_at = None;
        if self.stats.is_failing() {
            return;
        }
        match self.mended(Self::keep_up) {
            Ok(true) => self.upkeep_at = Some(now),
            Ok(false) => {}
            Err(error) => {
                self.note(&error);
                self.retry_later(false);
            }
        }
        self.look_at_usage();
        self.checkpoint_if_large();
    }

    fn try_again(&mut self) {
        let retry = self.retry.take();
        if !self.kept.is_empty() {
            self.write(Batch::default());
            self.inbox.done(self.kept.bytes());
        }
        if self.kept.is_empty() && self.stats.is_failing() {
            if self.resume() {
                self.recover();
            } else {
                self.retry = retry;
                self.retry_later(false);
            }
            self.look_at_usage();
        } else if let (Some(before), Some(after)) = (retry, &mut self.retry) {
            after.delay = (before.delay * 2).min(RETRY.1);
            after.at = Instant::now() + after.delay;
        }
    }

    fn finish(mut self) {
        if !self.kept.is_empty() {
            let lost = self.kept.len();
            error!(changes = lost, "the store ends while it cannot write; these changes are lost");
            self.kept.fail();
        }
        self.unread.drain(..).for_each(|load| Request::Load(load).fail());
        if let Err(error) = self.database.write_all_summaries() {
            warn!(%error, "the next start counts the queues anew");
        }
        // Who is not told now sends it again, and is right whether it came back or not.
        self.tell_refused();
        let commits = self.stats.commits.load(Ordering::Relaxed);
        match self.database.connection.close() {
            Ok(()) => info!(commits, "store closed"),
            Err((_, error)) => warn!(%error, "the store did not close cleanly; its log is read at the next start"),
        }
    }
}

/// Fails what waits when a thread of the store ends, in whatever way.
pub(super) struct Abandon<'a>(pub &'a Inbox);

impl Drop for Abandon<'_> {
    fn drop(&mut self) {
        self.0.abandon();
    }
}
