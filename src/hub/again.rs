//! What the journal has lost with a damaged database is journaled once more from memory.

use std::sync::Arc;

use super::Hub;
use super::session::{Session, submit};
use crate::store::{Due, Op};

impl Hub {
    /// Journals what is in memory once more: the database was damaged and replaced by what could be saved of it, of the
    /// retained messages so many.
    pub(super) fn record_again(&self, sessions: &[Arc<Session>], retained: u64) {
        for session in sessions.iter().filter(|session| session.durable) {
            let mut state = session.state.lock();
            if !state.ended {
                // A part that was on disk only may have been sent before the gateway was started.
                state.queue.doubt_all();
                submit(self.store(), &mut session.records(&state), Due::Soon);
            }
        }
        // Held until they are submitted, so that no older message comes behind a newer one of its topic.
        let messages = self.0.retained.read();
        if messages.len() as u64 != retained {
            let mut ops = messages.iter().map(|message| Op::PutRetained(message.clone(), None)).collect();
            submit(self.store(), &mut ops, Due::Soon);
        }
    }
}
