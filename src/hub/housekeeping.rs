//! What time changes is looked after, once a second.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::watch;
use tracing::info;

use super::session::{Session, submit};
use super::{Hub, sys};
use crate::clock::UnixMillis;
use crate::store::{Due, Op, Store};

impl Hub {
    /// Looks after what time changes, once a second, until `shutdown`: sessions and retained messages that expire, wills
    /// that are due, a system clock that was set, the `$SYS` topics.
    pub async fn run(&self, mut shutdown: watch::Receiver<bool>) {
        let mut seconds: u64 = 0;
        let mut figures = sys::Figures::default();
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = self.0.memory.becomes_tight() => {
                    self.relieve_memory();
                    continue;
                }
                changed = shutdown.changed() => {
                    if changed.is_err() || *shutdown.borrow() {
                        return;
                    }
                    continue;
                }
            }
            self.housekeep(seconds);
            if seconds.is_multiple_of(sys::INTERVAL_SECONDS) {
                figures.publish(self);
            }
            seconds += 1;
        }
    }

    pub(super) fn housekeep(&self, seconds: u64) {
        if let Some(step) = self.0.clock.adjust(Duration::from_secs(2)) {
            info!(step_ms = step, "the system clock was set; wall time follows it");
        }
        self.relieve_memory();
        let now = self.now();
        let sessions: Vec<_> = self.0.sessions.lock().values().cloned().collect();
        if let Some(saved) = self.store().and_then(Store::take_replaced) {
            self.record_again(&sessions, saved);
        }
        for session in sessions {
            self.housekeep_session(&session, now);
            self.sweep(&session, now);
        }
        if seconds.is_multiple_of(60) {
            let expired = self.0.retained.write().expire(now);
            let mut ops = expired.iter().map(|message| Op::DropRetained(message.topic.clone(), None)).collect();
            submit(self.store(), &mut ops, Due::Soon);
        }
    }

    fn housekeep_session(&self, session: &Arc<Session>, now: UnixMillis) {
        let mut state = session.state.lock();
        if state.ended {
            return;
        }
        let (ends, due) = (state.has_expired(now), state.will_is_due(now));
        let will = if due { state.will.take() } else { None };
        let mut estate = None;
        if ends {
            self.0.counters.expired_sessions.fetch_add(1, Ordering::Relaxed);
            estate = Some(self.end(session, &mut state));
        } else if due {
            session.journal(&mut state, self.store());
        }
        drop(state);
        self.follow_up(session, estate, will);
    }
}
