//! The web floor's sessions on the hub: one that sees values, and one for each command while its answer is awaited.
//!
//! Topics and payloads are those of `field::mapping`. QoS 0, because only the latest value counts, and a command for
//! now must not act hours later.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value as Json, json};
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::warn;

use super::App;
use crate::hub::{Attach, AttachError, Face, Hub, Link, Outbound, Outcome, Publish, SubscribeError, SubscribeOptions};
use crate::message::{Properties, QoS};
use crate::topic::{SharedFilter, TopicError};

/// What is shown as live values: the points of all devices.
const VALUES: &str = "devices/+/+";
/// The wait before attaching again, after an operator or a limit took the session away.
const REATTACH_DELAY: Duration = Duration::from_secs(5);
/// How long a device may take to answer a command: a few timeouts and retries of a slow bus.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Keeps the table of values up to date until `shutdown`.
pub async fn run(app: &App, mut shutdown: watch::Receiver<bool>) {
    let follow = async {
        loop {
            match attach(&app.parts.hub, "web", VALUES) {
                Ok(link) => take_values(app, link).await,
                Err(error) => warn!(%error, "the web UI gets no values from the hub; trying again"),
            }
            sleep(REATTACH_DELAY).await;
        }
    };
    tokio::select! {
        () = follow => {}
        // An error means that the sender is gone, which is the end too.
        _ = shutdown.wait_for(|stop| *stop) => {}
    }
}

/// Returns when the connection has to close.
async fn take_values(app: &App, mut link: Link) {
    loop {
        let taken = link.next().await;
        if taken.is_empty() {
            return;
        }
        for outbound in taken {
            if let Outbound::Publish(delivery) = outbound {
                let message = &delivery.message;
                app.values.message(message.topic.as_str(), &message.payload, message.accepted_at);
            }
        }
    }
}

/// Why a command has no result.
#[derive(Debug, Error)]
pub enum CommandError {
    #[error("this is no name of a device and a point")]
    Name(#[source] TopicError),
    #[error("nothing on this gateway takes commands for this device")]
    NobodyListens,
    #[error("the device gave no answer within {} s", ANSWER_TIMEOUT.as_secs())]
    NoAnswer,
    #[error("{0}")]
    Refused(String),
    #[error("the hub takes no command now")]
    Attach(#[from] AttachError),
    #[error("the hub takes no command now")]
    Subscribe(#[from] SubscribeError),
}

/// Sets a point and waits for the device's answer: the value as it reads back.
///
/// # Errors
/// [`CommandError`]: it cannot be sent, nobody answers, or the adapter says why not.
pub async fn command(app: &App, device: &str, point: &str, value: &Json) -> Result<Json, CommandError> {
    #[derive(Deserialize)]
    struct Answer {
        ok: bool,
        #[serde(default)]
        value: Json,
        error: Option<String>,
    }
    let is_level = |name: &str| !name.is_empty() && !name.contains(['/', '+', '#']);
    if !is_level(device) || !is_level(point) {
        return Err(CommandError::Name(TopicError::WildcardInName));
    }
    // Two commands at a time do not share a session.
    let name = format!("web/command/{}", app.counters.commands.fetch_add(1, Ordering::Relaxed) + 1);
    let topic = format!("devices/{device}/{point}/set");
    let mut link = attach(&app.parts.hub, &name, &format!("{topic}/result"))?;
    let correlation_data = Bytes::from(name);
    let properties = Properties { correlation_data: Some(correlation_data.clone()), ..Properties::default() };
    let outcome = link.publish(Publish {
        qos: QoS::AtLeastOnce,
        properties: Some(Box::new(properties)),
        expiry_interval: Some(ANSWER_TIMEOUT),
        ..Publish::new(&topic, json!({ "value": value }).to_string())
    });
    link.flush();
    match outcome {
        Outcome::Refused(refusal) => return Err(CommandError::Refused(refusal.to_string())),
        Outcome::Done { matched: false } => return Err(CommandError::NobodyListens),
        Outcome::Done { matched: true } | Outcome::Pending(_) => {}
    }
    let deadline = Instant::now() + ANSWER_TIMEOUT;
    loop {
        let taken = timeout_at(deadline, link.next()).await.map_err(|_| CommandError::NoAnswer)?;
        if taken.is_empty() {
            return Err(CommandError::NoAnswer);
        }
        for outbound in taken {
            let Outbound::Publish(delivery) = outbound else { continue };
            let properties = delivery.message.properties.as_deref();
            if properties.and_then(|properties| properties.correlation_data.as_ref()) != Some(&correlation_data) {
                continue;
            }
            let Ok(answer) = serde_json::from_slice::<Answer>(&delivery.message.payload) else { continue };
            return match answer.ok {
                true => Ok(answer.value),
                false => Err(CommandError::Refused(answer.error.unwrap_or_else(|| "the device refused".to_owned()))),
            };
        }
    }
}

fn attach(hub: &Hub, name: &str, filter: &str) -> Result<Link, CommandError> {
    let filter = SharedFilter::split(filter).map_err(CommandError::Name)?;
    let mut link = hub.attach(Attach::internal(Face::Web, name))?;
    link.subscribe(&filter, SubscribeOptions::new(QoS::AtMostOnce))?;
    Ok(link)
}
