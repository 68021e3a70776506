//! The clients' sessions on the hub: does what the protocol asks for, and passes on what comes of it.
//!
//! A client keeps its [`Link`] while it sleeps: the session goes on queueing, and losing the client fires its will.
//! Nothing is taken from the link until the protocol asks.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Wake};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tracing::{debug, info};

use super::settings::Settings;
use super::wakes::{KeyWaker, Wakes};
use crate::hub::{
    self, Attach, Face, Hub, Link, Outbound, Outcome, Publish, Refusal, SessionExpiry, SubscribeError,
    SubscribeOptions, is_loopback,
};
use crate::message::{Message, QoS};
use crate::proto::mqttsn::action::{
    ClientKey, Delivery, PublishAnswer, Request, SessionLifetime, SubscribeAnswer, Will, WillFate,
};
use crate::proto::mqttsn::gateway::Gateway;
use crate::proto::mqttsn::packet::{MsgId, ReturnCode};
use crate::store::{Receipt, ReceiptState};
use crate::topic::TopicName;

/// The session of those who publish without a connection. No client may have this id.
const CONNECTIONLESS_ID: &str = "(publish without connect)";

/// SUBSCRIBEs and PUBRELs of one client that wait for the disk; PUBLISHes have their own, lower limit.
const MAX_WAITING: usize = 64;

/// All sessions of the gateway's clients.
#[derive(Debug)]
pub struct Sessions {
    hub: Hub,
    settings: Arc<Settings>,
    entries: HashMap<ClientKey, Entry>,
    connectionless: Option<Link>,
    wakes: Wakes,
    /// Sessions with something to flush.
    touched: Vec<ClientKey>,
    taken: Vec<Outbound>,
}

struct Entry {
    link: Link,
    waker: Arc<KeyWaker>,
    waiting: Vec<Waiting>,
    /// Receivers, or the disk, cannot keep up; answers are held back until they can, which slows the client down.
    pressure: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

/// An answer that waits.
#[derive(Debug)]
struct Waiting {
    answer: Answer,
    /// `None`: it waits for the pressure to go only.
    receipt: Option<Arc<Receipt>>,
}

#[derive(Clone, Copy, Debug)]
enum Answer {
    Publish(PublishAnswer),
    Release(MsgId),
    Subscribe(SubscribeAnswer, QoS),
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entry").field("link", &self.link).field("waiting", &self.waiting).finish_non_exhaustive()
    }
}

impl Sessions {
    /// `wakes` is woken when [`Sessions::attend`] has something to do.
    pub fn new(hub: Hub, settings: Arc<Settings>, wakes: Wakes) -> Self {
        Self {
            hub,
            settings,
            entries: HashMap::new(),
            connectionless: None,
            wakes,
            touched: Vec::new(),
            taken: Vec::new(),
        }
    }

    /// Looks after every session that was woken.
    pub fn attend(&mut self, gateway: &mut Gateway, now: Instant) {
        for key in self.wakes.take() {
            self.attend_to(key, gateway, now);
        }
    }

    /// Does what a client asks of its session.
    pub fn serve(&mut self, key: ClientKey, request: Request, gateway: &mut Gateway, now: Instant) {
        match request {
            Request::Attach { client_id, clean_start, lifetime, will } => {
                let peer = gateway.address(key);
                let result = self.attach(key, client_id, clean_start, lifetime, will, peer);
                return gateway.attached(key, result, now);
            }
            Request::Resume { will } => {
                let resumed = self.entries.get_mut(&key).map(|entry| {
                    entry.link.set_will(will.map(|will| to_hub(will, &self.hub)));
                });
                return gateway.attached(key, resumed.ok_or(ReturnCode::Congestion), now);
            }
            Request::Detach { will, lifetime } => {
                if let Some(entry) = self.entries.remove(&key) {
                    debug!(client = %entry.link.client_id(), will = ?will, "MQTT-SN client is gone");
                    entry.link.detach(will == WillFate::Publish, Some(self.expiry(lifetime)));
                }
                return;
            }
            _ => {}
        }
        let Some(entry) = self.entries.get_mut(&key) else { return };
        match request {
            Request::Attach { .. } | Request::Resume { .. } | Request::Detach { .. } => {}
            Request::SetWill(will) => entry.link.set_will(will.map(|will| to_hub(will, &self.hub))),
            Request::Publish { topic, payload, qos, retain, dup, answer } => {
                let packet_id = hub::PacketId::new(answer.msg_id).filter(|_| qos != QoS::AtMostOnce);
                let publish = Publish { qos, retain, dup, packet_id, ..Publish::new(topic.as_str(), payload) };
                let outcome = entry.link.publish(publish);
                self.touched.push(key);
                match outcome {
                    Outcome::Refused(refusal) => gateway.published(key, answer, Err(refusal_code(refusal)), now),
                    Outcome::Done { .. } if entry.pressure.is_none() => gateway.published(key, answer, Ok(()), now),
                    Outcome::Done { .. } => entry.wait(Answer::Publish(answer), None),
                    Outcome::Pending(receipt) => entry.wait(Answer::Publish(answer), Some(receipt)),
                }
            }
            Request::Release(msg_id) => {
                let receipt = hub::PacketId::new(msg_id).and_then(|id| entry.link.released(id).receipt);
                match receipt {
                    Some(receipt) if entry.waiting.len() < MAX_WAITING => {
                        entry.wait(Answer::Release(msg_id), Some(receipt));
                    }
                    // The client asks again.
                    Some(_) => {}
                    None => gateway.released(key, msg_id, now),
                }
            }
            Request::Subscribe { filter, qos, answer } => {
                if entry.waiting.len() >= MAX_WAITING {
                    return gateway.subscribed(key, answer, Err(ReturnCode::Congestion), now);
                }
                match entry.link.subscribe(&filter, SubscribeOptions::new(qos)) {
                    Ok(subscribed) => match subscribed.receipt {
                        Some(receipt) => entry.wait(Answer::Subscribe(answer, subscribed.qos), Some(receipt)),
                        None => gateway.subscribed(key, answer, Ok(subscribed.qos), now),
                    },
                    Err(error) => gateway.subscribed(key, answer, Err(subscribe_code(error)), now),
                }
            }
            Request::Unsubscribe { filter } => {
                entry.link.unsubscribe(&filter);
            }
            Request::Take => {
                entry.link.take(&mut self.taken, 1);
                match self.taken.pop() {
                    Some(Outbound::Publish(delivery)) => gateway.deliver(key, from_hub(delivery), now),
                    Some(Outbound::Release(packet_id)) => gateway.deliver_release(key, packet_id, now),
                    None => gateway.drained(key, now),
                }
            }
            Request::Acknowledge(packet_id) => {
                entry.link.acknowledge(packet_id);
                self.touched.push(key);
            }
            Request::Received(packet_id) => {
                // The session knows nothing of it any more: let the client be done with it.
                if !entry.link.received(packet_id) {
                    gateway.deliver_release(key, packet_id, now);
                }
                self.touched.push(key);
            }
            Request::Completed(packet_id) => {
                entry.link.completed(packet_id);
                self.touched.push(key);
            }
        }
    }

    /// Publishes for someone without a connection, under the rules for anonymous clients; false where they forbid it.
    pub fn publish_connectionless(&mut self, from: IpAddr, topic: &TopicName, payload: Bytes, retain: bool) -> bool {
        let Ok(identity) = self.hub.access().authenticate(None, None, is_loopback(from)) else { return false };
        if self.connectionless.as_ref().is_none_or(|link| link.fate().is_some()) {
            self.flush();
            let attach = Attach { identity, ..Attach::internal(Face::MqttSn, CONNECTIONLESS_ID) };
            self.connectionless = self.hub.attach(attach).ok();
        }
        let Some(link) = &mut self.connectionless else { return false };
        let outcome = link.publish(Publish { retain, ..Publish::new(topic.as_str(), payload) });
        !matches!(outcome, Outcome::Refused(_))
    }

    /// Routes everything that was published since the last flush.
    pub fn flush(&mut self) {
        if let Some(link) = &mut self.connectionless {
            // Nobody waits for an answer, so nobody can be slowed down: the receivers' queues have their limits.
            let _pressure = link.flush();
        }
        for key in self.touched.drain(..) {
            let Some(entry) = self.entries.get_mut(&key) else { continue };
            if let Some(pressure) = entry.link.flush()
                && entry.pressure.is_none()
            {
                entry.pressure = Some(Box::pin(async move { pressure.wait().await }));
                // To be polled once, so that it wakes us when it is over.
                entry.waker.wake_by_ref();
            }
        }
    }

    /// The gateway stops: the clients are not lost, so no will is published.
    pub fn close(&mut self) {
        for (_, entry) in self.entries.drain() {
            entry.link.detach(false, None);
        }
        if let Some(link) = self.connectionless.take() {
            link.detach(false, None);
        }
    }

    fn attach(
        &mut self,
        key: ClientKey,
        client_id: Arc<str>,
        clean_start: bool,
        lifetime: SessionLifetime,
        will: Option<Will>,
        peer: Option<SocketAddr>,
    ) -> Result<(), ReturnCode> {
        if let Some(old) = self.entries.remove(&key) {
            old.link.detach(false, None);
        }
        // The hub waits until what an earlier connection of the session has published is routed.
        self.flush();
        if &*client_id == CONNECTIONLESS_ID {
            return Err(ReturnCode::NotSupported);
        }
        let from_loopback = peer.is_some_and(|peer| is_loopback(peer.ip()));
        let identity = self.hub.access().authenticate(None, None, from_loopback).map_err(|error| {
            info!(client = %client_id, peer = ?peer, %error, "MQTT-SN client refused");
            ReturnCode::NotSupported
        })?;
        let attach = Attach {
            face: Face::MqttSn,
            client_id,
            identity,
            clean_start,
            expiry: self.expiry(lifetime),
            will: will.map(|will| to_hub(will, &self.hub)),
            // One exchange at a time (MQTT-SN 1.2 §6.6).
            receive_maximum: 1,
            peer: peer.map(|peer| peer.to_string()),
            version: Some("1.2"),
            queue: self.settings.queue,
        };
        let link = self.hub.attach(attach).map_err(|error| {
            info!(peer = ?peer, %error, "MQTT-SN client refused");
            ReturnCode::Congestion
        })?;
        debug!(client = %link.client_id(), peer = ?peer, "MQTT-SN client connected");
        let waker = self.wakes.waker(key);
        waker.wake_by_ref();
        self.entries.insert(key, Entry { link, waker, waiting: Vec::new(), pressure: None });
        Ok(())
    }

    fn attend_to(&mut self, key: ClientKey, gateway: &mut Gateway, now: Instant) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        entry.waker.rearm();
        let waker = entry.waker.waker();
        let mut cx = Context::from_waker(&waker);
        loop {
            if let Some(fate) = entry.link.fate() {
                info!(client = %entry.link.client_id(), ?fate, "MQTT-SN client disconnected");
                self.entries.remove(&key);
                return gateway.evicted(key, now);
            }
            // Until it is registered to wake us.
            if entry.link.poll_wake(&mut cx).is_pending() {
                break;
            }
        }
        if entry.pressure.as_mut().is_some_and(|pressure| pressure.as_mut().poll(&mut cx).is_ready()) {
            entry.pressure = None;
        }
        for (answer, result) in entry.answers() {
            match answer {
                Answer::Publish(answer) => {
                    if let (Err(_), Some(QoS::ExactlyOnce), Some(id)) =
                        (result, answer.qos, hub::PacketId::new(answer.msg_id))
                    {
                        entry.link.forget_failed_inbound(id);
                    }
                    gateway.published(key, answer, result, now);
                }
                Answer::Subscribe(answer, granted) => gateway.subscribed(key, answer, result.map(|()| granted), now),
                Answer::Release(msg_id) if result.is_ok() => gateway.released(key, msg_id, now),
                // The client asks again.
                Answer::Release(_) => {}
            }
        }
        gateway.pending(key, now);
    }

    fn expiry(&self, lifetime: SessionLifetime) -> SessionExpiry {
        match lifetime {
            SessionLifetime::Connection => SessionExpiry::OnDetach,
            SessionLifetime::Lasting => self.settings.session_expiry.map_or(SessionExpiry::Never, SessionExpiry::After),
        }
    }
}

impl Entry {
    fn wait(&mut self, answer: Answer, receipt: Option<Arc<Receipt>>) {
        self.waiting.push(Waiting { answer, receipt });
        // The receipt may have been settled before anybody listened.
        self.waker.wake_by_ref();
    }

    /// Takes out the answers that need not wait any more, in their order.
    fn answers(&mut self) -> Vec<(Answer, Result<(), ReturnCode>)> {
        let mut ready = Vec::new();
        let pressed = self.pressure.is_some();
        self.waiting.retain(|waiting| {
            let state = waiting.receipt.as_ref().map_or(ReceiptState::Done, |receipt| receipt.state());
            let held = pressed && matches!(waiting.answer, Answer::Publish(_));
            match state {
                ReceiptState::Pending => true,
                ReceiptState::Done if held => true,
                ReceiptState::Done => {
                    ready.push((waiting.answer, Ok(())));
                    false
                }
                ReceiptState::Failed => {
                    ready.push((waiting.answer, Err(ReturnCode::Congestion)));
                    false
                }
            }
        });
        ready
    }
}

fn refusal_code(refusal: Refusal) -> ReturnCode {
    match refusal {
        Refusal::TopicInvalid => ReturnCode::InvalidTopicId,
        Refusal::NotAuthorized => ReturnCode::NotSupported,
        Refusal::QuotaExceeded | Refusal::Behind | Refusal::StoreUnavailable => ReturnCode::Congestion,
    }
}

fn subscribe_code(error: SubscribeError) -> ReturnCode {
    match error {
        SubscribeError::NotAuthorized => ReturnCode::NotSupported,
        SubscribeError::FilterTooLong => ReturnCode::InvalidTopicId,
        SubscribeError::QuotaExceeded | SubscribeError::Detached => ReturnCode::Congestion,
    }
}

fn to_hub(will: Will, hub: &Hub) -> hub::Will {
    let Will { topic, payload, qos, retain } = will;
    let message = Message { retain, ..Message::new(topic, payload, qos, hub.clock().now()) };
    hub::Will { message, delay: Duration::ZERO }
}

fn from_hub(delivery: hub::Delivery) -> Delivery {
    let hub::Delivery { message, qos, retain, dup, packet_id, sequence: _, identifiers: _ } = delivery;
    Delivery { message, qos, retain, dup, packet_id }
}
