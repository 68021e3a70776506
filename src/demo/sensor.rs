//! A simulated climate sensor: an MQTT-SN 1.2 client over UDP that sleeps most of the time.
//!
//! It connects with a will, publishes five packed bytes with QoS 1 (`plugins/codecs/demo-sensor.js` says what they
//! mean), sleeps, and wakes with PINGREQ to take what was buffered for it.
//!
//! | topic | what |
//! | --- | --- |
//! | `sensors/{name}/raw` | a measurement: temperature, humidity, battery, door |
//! | `sensors/{name}/state` | `online`, or by its will `lost`; retained |
//! | `devices/{name}/interval` | how long it sleeps, as a reading; retained |
//! | `devices/{name}/interval/set` | a command to sleep longer or shorter, and `…/result` its answer |

use std::collections::HashMap;
use std::future::pending;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use serde_json::{Value, json};
use thiserror::Error;
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

use crate::message::QoS;
use crate::proto::mqttsn::codec::{decode, encode};
use crate::proto::mqttsn::packet::{
    Connect, MsgId, Packet, Protocol, Publish, PublishQoS, ReturnCode, TopicId, TopicRef, WillTopic,
};

/// How long the sensor sleeps between two measurements until it is told otherwise.
const INTERVAL: Duration = Duration::from_secs(5);
/// What it may be told, in seconds.
const INTERVALS: std::ops::RangeInclusive<u64> = 1..=3600;
/// How long it waits for an answer, and how often it asks. A real radio would wait 10 to 15 s; this one is next door.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
const MAX_TRIES: u32 = 4;
/// How long it rests when there is no gateway.
const REST: Duration = Duration::from_secs(2);
/// Keep alive while it is active, which it never is for long.
const KEEP_ALIVE_SECONDS: u16 = 30;
/// The longest datagram it can take.
const MAX_DATAGRAM_BYTES: usize = 1024;

/// Measures, sleeps and wakes until `shutdown`. Without a gateway it goes on trying.
///
/// # Errors
/// When the system gives no UDP socket.
pub async fn run(gateway: SocketAddr, name: &str, mut shutdown: watch::Receiver<bool>) -> io::Result<()> {
    let local: SocketAddr = match gateway {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(local).await?;
    socket.connect(gateway).await?;
    let mut sensor = Sensor {
        socket,
        name: name.to_owned(),
        interval: INTERVAL,
        last_msg_id: 0,
        topic_ids: HashMap::new(),
        commands: Vec::new(),
        started: Instant::now(),
    };
    tokio::select! {
        _ = shutdown.wait_for(|stop| *stop) => {}
        () = sensor.live() => {}
    }
    // Whether the gateway hears it does not matter any more.
    let _ = sensor.send(&Packet::Disconnect { duration: None }).await;
    Ok(())
}

struct Sensor {
    socket: UdpSocket,
    name: String,
    interval: Duration,
    last_msg_id: MsgId,
    /// What the gateway calls our topics.
    topic_ids: HashMap<&'static str, u16>,
    /// Commands taken and not yet carried out.
    commands: Vec<Vec<u8>>,
    started: Instant,
}

/// Why the sensor has to begin anew.
#[derive(Debug, Error)]
enum Trouble {
    #[error("the gateway does not answer")]
    Silence,
    #[error("the gateway does not know us")]
    Disconnected,
    #[error("the gateway refused: {0:?}")]
    Refused(ReturnCode),
}

/// The topics, with `{}` for the sensor's name.
const RAW: &str = "sensors/{}/raw";
const STATE: &str = "sensors/{}/state";
const INTERVAL_TOPIC: &str = "devices/{}/interval";
const COMMAND: &str = "devices/{}/interval/set";
const RESULT: &str = "devices/{}/interval/set/result";

impl Sensor {
    async fn live(&mut self) {
        loop {
            if let Err(trouble) = self.connected().await {
                tracing::debug!(sensor = %self.name, %trouble, "demo sensor: begins anew");
                sleep(REST).await;
            }
        }
    }

    /// From a first CONNECT until something goes wrong.
    async fn connected(&mut self) -> Result<(), Trouble> {
        self.connect_with_will().await?;
        for topic in [RAW, STATE, INTERVAL_TOPIC, RESULT] {
            self.register(topic).await?;
        }
        self.subscribe().await?;
        self.publish(STATE, b"online", true).await?;
        self.publish_interval().await?;
        loop {
            self.measure().await?;
            self.carry_out_commands().await?;
            self.disconnect_for(self.interval).await?;
            sleep(self.interval).await;
            self.wake().await?;
            // Active again: the session, the topic ids and the will are kept.
            self.connect(false).await?;
        }
    }

    async fn connect_with_will(&mut self) -> Result<(), Trouble> {
        let topic = self.topic(STATE);
        let will = WillTopic { qos: QoS::AtLeastOnce, retain: true, topic_name: topic.as_bytes() };
        let name = self.name.clone();
        let connect = connect_packet(&name, true);
        self.ask(&connect, |packet| matches!(packet, Packet::WillTopicReq).then_some(())).await?;
        let will = Packet::WillTopic(Some(will));
        self.ask(&will, |packet| matches!(packet, Packet::WillMsgReq).then_some(())).await?;
        check(self.ask(&Packet::WillMsg(b"lost"), connack).await?)
    }

    async fn connect(&mut self, will: bool) -> Result<(), Trouble> {
        let name = self.name.clone();
        check(self.ask(&connect_packet(&name, will), connack).await?)
    }

    async fn register(&mut self, topic: &'static str) -> Result<(), Trouble> {
        let (expected, name) = (self.msg_id(), self.topic(topic));
        let register = Packet::Register { topic_id: 0, msg_id: expected, topic_name: name.as_bytes() };
        let answer = |packet: &Packet<'_>| match *packet {
            Packet::RegAck { topic_id, msg_id, code } if msg_id == expected => Some((topic_id, code)),
            _ => None,
        };
        let (topic_id, code) = self.ask(&register, answer).await?;
        check(code)?;
        self.topic_ids.insert(topic, topic_id);
        Ok(())
    }

    async fn subscribe(&mut self) -> Result<(), Trouble> {
        let (expected, name) = (self.msg_id(), self.topic(COMMAND));
        let qos = PublishQoS::Connected(QoS::AtLeastOnce);
        let topic = TopicRef::Name(name.as_bytes());
        let subscribe = Packet::Subscribe { dup: false, qos, msg_id: expected, topic };
        let answer = |packet: &Packet<'_>| match *packet {
            Packet::SubAck { topic_id, msg_id, code, .. } if msg_id == expected => Some((topic_id, code)),
            _ => None,
        };
        let (topic_id, code) = self.ask(&subscribe, answer).await?;
        check(code)?;
        self.topic_ids.insert(COMMAND, topic_id);
        Ok(())
    }

    async fn measure(&mut self) -> Result<(), Trouble> {
        let measurement = measurement(self.started.elapsed());
        self.publish(RAW, &measurement, false).await
    }

    async fn carry_out_commands(&mut self) -> Result<(), Trouble> {
        for command in std::mem::take(&mut self.commands) {
            let answer = match seconds(&command).filter(|seconds| INTERVALS.contains(seconds)) {
                Some(seconds) => {
                    self.interval = Duration::from_secs(seconds);
                    self.publish_interval().await?;
                    json!({ "ok": true, "value": seconds })
                }
                None => json!({ "ok": false, "error": "expected a number of seconds from 1 to 3600" }),
            };
            self.publish(RESULT, answer.to_string().as_bytes(), false).await?;
        }
        Ok(())
    }

    async fn publish_interval(&mut self) -> Result<(), Trouble> {
        let value = json!({ "value": self.interval.as_secs(), "unit": "s", "quality": "good" });
        self.publish(INTERVAL_TOPIC, value.to_string().as_bytes(), true).await
    }

    async fn publish(&mut self, topic: &'static str, payload: &[u8], retain: bool) -> Result<(), Trouble> {
        let expected = self.msg_id();
        let publish = Packet::Publish(Publish {
            dup: false,
            qos: PublishQoS::Connected(QoS::AtLeastOnce),
            retain,
            topic: TopicId::Normal(self.topic_ids.get(topic).copied().unwrap_or_default()),
            msg_id: expected,
            payload,
        });
        let answer = |packet: &Packet<'_>| match *packet {
            Packet::PubAck { msg_id, code, .. } if msg_id == expected => Some(code),
            _ => None,
        };
        match self.ask(&publish, answer).await? {
            // The gateway is busy: the next measurement will do.
            ReturnCode::Accepted | ReturnCode::Congestion => Ok(()),
            code => Err(Trouble::Refused(code)),
        }
    }

    async fn disconnect_for(&mut self, sleep: Duration) -> Result<(), Trouble> {
        let duration = u16::try_from(sleep.as_secs()).ok();
        let disconnect = Packet::Disconnect { duration };
        self.ask(&disconnect, |packet| matches!(packet, Packet::Disconnect { .. }).then_some(())).await
    }

    /// Takes what was buffered while asleep; PINGRESP says that there is no more.
    async fn wake(&mut self) -> Result<(), Trouble> {
        let name = self.name.clone();
        let ping = Packet::PingReq { client_id: name.as_bytes() };
        self.ask(&ping, |packet| matches!(packet, Packet::PingResp).then_some(())).await
    }

    /// Sends a request until its answer comes, and meanwhile serves what the gateway wants.
    async fn ask<T>(&mut self, request: &Packet<'_>, answer: impl Fn(&Packet<'_>) -> Option<T>) -> Result<T, Trouble> {
        let mut buffer = [0; MAX_DATAGRAM_BYTES];
        for attempt in 0..MAX_TRIES {
            self.send(&repeated(request, attempt > 0)).await?;
            let deadline = Instant::now() + RETRY_INTERVAL;
            while let Ok(received) = timeout_at(deadline, self.receive(&mut buffer)).await {
                let Ok(packet) = decode(&buffer[..received]) else { continue };
                if let Some(answer) = answer(&packet) {
                    return Ok(answer);
                }
                self.serve(&packet).await?;
            }
        }
        Err(Trouble::Silence)
    }

    async fn receive(&self, buffer: &mut [u8]) -> usize {
        match self.socket.recv(buffer).await {
            Ok(length) => length,
            // Nobody listens there yet; the retry timer decides what happens next.
            Err(_) => pending().await,
        }
    }

    async fn serve(&mut self, packet: &Packet<'_>) -> Result<(), Trouble> {
        match *packet {
            Packet::Publish(Publish { qos, topic, msg_id, payload, .. }) => {
                let known = self.topic_ids.get(COMMAND).is_some_and(|id| topic == TopicId::Normal(*id));
                let code = if known { ReturnCode::Accepted } else { ReturnCode::InvalidTopicId };
                if known {
                    self.commands.push(payload.to_vec());
                }
                if qos == PublishQoS::Connected(QoS::AtLeastOnce) || !known {
                    self.send(&Packet::PubAck { topic_id: topic.number(), msg_id, code }).await?;
                }
            }
            Packet::Register { topic_id, msg_id, topic_name } => {
                let known = topic_name == self.topic(COMMAND).as_bytes();
                let code = if known { ReturnCode::Accepted } else { ReturnCode::NotSupported };
                if known {
                    self.topic_ids.insert(COMMAND, topic_id);
                }
                self.send(&Packet::RegAck { topic_id, msg_id, code }).await?;
            }
            Packet::Disconnect { .. } => return Err(Trouble::Disconnected),
            _ => {}
        }
        Ok(())
    }

    async fn send(&self, packet: &Packet<'_>) -> Result<(), Trouble> {
        let mut datagram = Vec::new();
        encode(packet, &mut datagram);
        // The socket reports here that an earlier datagram found nobody; this one is lost like any other.
        let _ = self.socket.send(&datagram).await;
        Ok(())
    }

    fn topic(&self, pattern: &str) -> String {
        pattern.replace("{}", &self.name)
    }

    fn msg_id(&mut self) -> MsgId {
        self.last_msg_id = self.last_msg_id.checked_add(1).unwrap_or(1);
        self.last_msg_id
    }
}

fn connect_packet(name: &str, will: bool) -> Packet<'_> {
    Packet::Connect(Connect {
        will,
        clean_session: false,
        protocol: Protocol::Supported,
        duration: KEEP_ALIVE_SECONDS,
        client_id: name.as_bytes(),
    })
}

/// The same message with its DUP flag, if it has one.
fn repeated<'a>(packet: &Packet<'a>, again: bool) -> Packet<'a> {
    match *packet {
        Packet::Publish(publish) => Packet::Publish(Publish { dup: again, ..publish }),
        Packet::Subscribe { qos, msg_id, topic, .. } => Packet::Subscribe { dup: again, qos, msg_id, topic },
        other => other,
    }
}

fn connack(packet: &Packet<'_>) -> Option<ReturnCode> {
    match packet {
        Packet::ConnAck(code) => Some(*code),
        _ => None,
    }
}

fn check(code: ReturnCode) -> Result<(), Trouble> {
    if code == ReturnCode::Accepted { Ok(()) } else { Err(Trouble::Refused(code)) }
}

/// What the sensor measures after running for a while: a mild day, and a door that is opened now and then.
fn measurement(running: Duration) -> [u8; 5] {
    let seconds = running.as_secs_f64();
    let temperature = 21.5 + 2.0 * (seconds / 60.0).sin() + 0.3 * (seconds / 7.0).sin();
    let humidity = 45.0 + 8.0 * (seconds / 97.0 + 1.0).sin();
    // Casts saturate; the values are far from the ends.
    let [high, low] = ((temperature * 100.0).round() as i16).to_be_bytes();
    let battery = (3.0 - (seconds / 86_400.0).min(0.8)) / 0.02;
    let door_is_open = running.as_secs() % 60 >= 50;
    [high, low, (humidity * 2.0).round() as u8, battery.round() as u8, u8::from(door_is_open)]
}

/// What a command says: a bare number, or `{"value": …}`.
fn seconds(command: &[u8]) -> Option<u64> {
    let value: Value = serde_json::from_slice(command).ok()?;
    value.get("value").unwrap_or(&value).as_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_measurement_is_packed_as_its_codec_unpacks_it() {
        let [high, low, humidity, battery, flags] = measurement(Duration::from_secs(50));
        assert!((1900..2400).contains(&i16::from_be_bytes([high, low])));
        assert!((74..=106).contains(&humidity));
        assert_eq!((battery, flags), (150, 1));
        assert_eq!(measurement(Duration::ZERO)[4], 0);
    }

    #[test]
    fn commands_are_bare_numbers_or_objects() {
        let check = |command: &str, expected| assert_eq!(seconds(command.as_bytes()), expected, "{command}");
        check("7", Some(7));
        check(r#"{"value": 7}"#, Some(7));
        check("7.5", None);
        check("-1", None);
        check("soon", None);
        check(r#"{"seconds": 7}"#, None);
    }
}
