//! A store whose disk cannot be used when the gateway starts: it is full, read-only or fails.
//!
//! Until it can, what adds data is refused and what takes data away is kept in memory, as later when the disk fails; and
//! what the database holds is not known. Then the writer takes over.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use tracing::{error, warn};

use super::batch::Batch;
use super::inbox::{Inbox, Request, Work};
use super::open::{self, OpenError};
use super::read;
use super::stats::Stats;
use super::writer::{Abandon, RETRY, Writer};
use super::{Contents, Settings, TakeUp};
use crate::clock::Clock;

pub(super) struct Waiting {
    pub settings: Settings,
    pub clock: Clock,
    pub inbox: Arc<Inbox>,
    pub stats: Arc<Stats>,
    pub take_up: Receiver<TakeUp>,
    /// What was not refused.
    kept: Batch,
    at: Instant,
    delay: Duration,
}

impl Waiting {
    pub fn new(
        settings: Settings,
        clock: Clock,
        inbox: Arc<Inbox>,
        stats: Arc<Stats>,
        take_up: Receiver<TakeUp>,
    ) -> Self {
        let delay = RETRY.0;
        Self { settings, clock, inbox, stats, take_up, kept: Batch::default(), at: Instant::now() + delay, delay }
    }

    /// Waits for the disk, then writes.
    pub fn run(mut self) {
        let inbox = self.inbox.clone();
        let _abandon = Abandon(&inbox);
        loop {
            match inbox.wait(Some(self.at)) {
                Work::Chores => {}
                Work::Read(loads) => loads.into_iter().map(Request::Load).for_each(Request::fail),
                Work::Write { loads, batch, requests, last } => {
                    loads.into_iter().map(Request::Load).chain(requests).for_each(Request::fail);
                    self.refuse(batch);
                    if last {
                        return self.kept.fail();
                    }
                }
            }
            if Instant::now() >= self.at {
                match self.open() {
                    Ok(writer) => return writer.run(),
                    Err(error) => self.retry_later(&error),
                }
            }
        }
    }

    fn refuse(&mut self, batch: Batch) {
        self.kept.append(batch);
        let refused = self.kept.take_refusable();
        refused.iter().for_each(|slot| slot.receipts.fail());
        self.stats.count_refused(refused.len());
        self.kept.fail_subscriptions();
        self.inbox.done(self.kept.bytes());
    }

    fn open(&mut self) -> Result<Writer, OpenError> {
        let open::Found { mut database, lock, reserve, replaced } = open::open(&self.settings, &self.clock)?;
        let path = self.settings.directory.join(open::DATABASE_FILE);
        let failed = |source| OpenError::Database { path, source };
        let read = database.commit(&self.kept).and_then(|_| {
            let mut retained = Vec::new();
            read::retained(&database.connection, &mut |message| retained.push(message))?;
            Ok(Contents { sessions: read::sessions(&database.connection, &database.state)?, retained })
        });
        let contents = read.map_err(failed)?;
        std::mem::take(&mut self.kept).satisfy();
        self.inbox.done(0);
        self.stats.replaced(replaced.as_ref());
        if let Ok(take_up) = self.take_up.recv() {
            take_up(contents);
        }
        if let Some(alarm) = self.stats.recovered() {
            let seconds = self.clock.now().since(alarm.since).as_secs();
            warn!(kind = alarm.failure.name(), seconds, refused = alarm.refused, "the store can be used now");
        }
        let (inbox, stats, clock) = (self.inbox.clone(), self.stats.clone(), self.clock.clone());
        Ok(Writer::new(database, lock, reserve, inbox, stats, clock, self.settings.clone()))
    }

    fn retry_later(&mut self, problem: &OpenError) {
        match problem.failure() {
            Some(failure) => _ = self.stats.failed(failure, &describe(problem), self.clock.now()),
            None => error!(error = describe(problem), "the store cannot be used; restart the gateway when it can"),
        }
        self.delay = (self.delay * 2).min(RETRY.1);
        self.at = Instant::now() + self.delay;
    }
}

/// An error with what caused it.
pub(super) fn describe(error: &OpenError) -> String {
    let source = std::error::Error::source(error).map(|source| format!(": {source}"));
    format!("{error}{}", source.unwrap_or_default())
}
