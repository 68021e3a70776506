//! What others may see and ask of a running gateway: the web UI, the demo.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::bridge;
use crate::clock::Clock;
use crate::hub::Hub;
use crate::observe::Observe;
use crate::web::log::LogRing;
use crate::web::{Backlog, ControlError, Controls, Depth, Switch, Upstream};

/// A running gateway, seen from outside.
pub struct Handle {
    name: Arc<str>,
    clock: Clock,
    hub: Hub,
    log: LogRing,
    running: Mutex<Vec<Arc<dyn Observe>>>,
    /// In the order of the configuration.
    upstreams: Mutex<Vec<bridge::Handle>>,
}

impl Handle {
    pub(super) fn new(name: Arc<str>, clock: Clock, hub: Hub, log: LogRing) -> Self {
        Self { name, clock, hub, log, running: Mutex::default(), upstreams: Mutex::default() }
    }

    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    pub fn hub(&self) -> &Hub {
        &self.hub
    }

    pub(super) fn log(&self) -> &LogRing {
        &self.log
    }

    pub(super) fn set_running(&self, running: Vec<Arc<dyn Observe>>) {
        *self.running.lock() = running;
    }

    /// Takes over a new upstream, or one that was restarted: what was cut stays cut.
    pub(super) fn add_upstream(&self, new: bridge::Handle) {
        let mut upstreams = self.upstreams.lock();
        match upstreams.iter_mut().find(|known| known.name() == new.name()) {
            Some(known) => {
                new.succeed(known);
                *known = new;
            }
            None => upstreams.push(new),
        }
    }

    /// Forgets upstreams that the configuration no longer has.
    pub(super) fn keep_upstreams(&self, names: &[&str]) {
        let position = |handle: &bridge::Handle| names.iter().position(|name| *name == handle.name());
        let mut upstreams = self.upstreams.lock();
        upstreams.retain(|handle| position(handle).is_some());
        upstreams.sort_by_key(position);
    }

    /// Lets go of the components, which in turn hold this handle.
    pub(super) fn forget(&self) {
        self.running.lock().clear();
    }
}

impl Controls for Handle {
    fn components(&self) -> Vec<Arc<dyn Observe>> {
        let mut components: Vec<Arc<dyn Observe>> = vec![Arc::new(self.hub.clone())];
        if let Some(store) = self.hub.store() {
            components.push(Arc::new(store.clone()));
        }
        components.extend(self.running.lock().iter().cloned());
        components
    }

    fn upstreams(&self) -> Vec<Upstream> {
        let upstream = |handle: &bridge::Handle| {
            let ((messages, bytes), limits) = (handle.queued(), handle.limits());
            let depth = Depth { messages, bytes, max_messages: limits.max_messages, max_bytes: limits.max_bytes };
            Upstream {
                name: handle.name().to_owned(),
                paused: handle.is_paused(),
                state: handle.phase().name(),
                connection: handle.connection(),
                depth,
                dropped: handle.drops().into_iter().collect(),
                backlog: handle.progress().map(|bridge::Progress { messages, rate, seconds_left }| Backlog {
                    messages,
                    rate,
                    seconds_left,
                }),
            }
        };
        self.upstreams.lock().iter().map(upstream).collect()
    }

    fn switch_upstream(&self, name: &str, to: Switch) -> Result<(), ControlError> {
        let upstreams = self.upstreams.lock();
        let handle = upstreams.iter().find(|handle| handle.name() == name);
        let handle = handle.ok_or_else(|| ControlError::UnknownUpstream(name.to_owned()))?;
        match to {
            Switch::Cut => handle.set_paused(true),
            Switch::Restore => handle.set_paused(false),
            Switch::Connect => handle.connect(),
        }
        Ok(())
    }
}
