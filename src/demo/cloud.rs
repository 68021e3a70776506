//! The demo's cloud: a second gateway on a thread of its own, as if it were another machine.

use std::thread::{self, JoinHandle};

use tokio::sync::{mpsc, oneshot, watch};
use tracing::subscriber::NoSubscriber;

use super::{DemoError, FirstValue, METER, first_value};
use crate::clock::Clock;
use crate::config::Config;
use crate::gateway::Gateway;
use crate::hub::Hub;
use crate::supervise::describe;
use crate::web::log::LogRing;

/// The running cloud. It stops when this is dropped.
pub struct Cloud {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
    hub: Hub,
}

impl Cloud {
    pub async fn start(config: Config) -> Result<Self, DemoError> {
        let (stop, shutdown) = watch::channel(false);
        let (ready, bound) = oneshot::channel();
        let body = move || {
            // What the cloud logs is not this gateway's business.
            let _silent = tracing::subscriber::set_default(NoSubscriber::default());
            run(config, shutdown, ready);
        };
        let spawned = thread::Builder::new().name("demo-cloud".into()).spawn(body);
        let thread = spawned.map_err(|error| DemoError::Cloud(error.to_string()))?;
        let hub = bound.await.unwrap_or_else(|_| Err("its thread ended".into())).map_err(DemoError::Cloud)?;
        Ok(Self { stop, thread: Some(thread), hub })
    }

    /// The first reading that the gateway forwards.
    pub fn first_value(&mut self) -> FirstValue {
        first_value(&self.hub, &format!("+/devices/{METER}/power")).unwrap_or_else(|_| FirstValue::never())
    }

    pub async fn stop(mut self) {
        let _ = self.stop.send(true);
        if let Some(thread) = self.thread.take() {
            let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        }
    }
}

/// The thread: a runtime with one worker, this one, so that nothing of the cloud runs elsewhere.
fn run(config: Config, shutdown: watch::Receiver<bool>, ready: oneshot::Sender<Result<Hub, String>>) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = ready.send(Err(error.to_string()));
            return;
        }
    };
    runtime.block_on(async {
        let clock = Clock::start("demo-cloud");
        let ring = LogRing::new(clock.clone());
        match Gateway::bind(config, clock, ring).await {
            Ok(gateway) => {
                let _ = ready.send(Ok(gateway.handle().hub().clone()));
                let (_no_reloads, reloads) = mpsc::channel(1);
                gateway.run(shutdown, reloads).await;
            }
            Err(error) => {
                let _ = ready.send(Err(describe(&error)));
            }
        }
    });
}
