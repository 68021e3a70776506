//! Codecs on topics, on a real hub: bytes that clients publish become readings.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::Duration;

use fieldgate::clock::Clock;
use fieldgate::field::codec;
use fieldgate::field::mapping::PayloadForm;
use fieldgate::field::translate::{BindError, DeviceTemplate, Settings, Translator};
use fieldgate::hub::{self, Attach, Face, Hub, Link, Outbound, Publish, SubscribeOptions};
use fieldgate::message::QoS;
use fieldgate::observe::Metrics;
use fieldgate::topic::{SharedFilter, TopicFilter};
use serde_json::Value as Json;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Far more than anything here takes, for a machine under load.
const PATIENCE: Duration = Duration::from_secs(30);

fn settings(filter: &str, device: &str) -> Settings {
    let filter = TopicFilter::new(filter).unwrap();
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("plugins/codecs/demo-sensor.js");
    let limits = codec::Limits { time: Duration::from_secs(5), ..codec::Limits::default() };
    Settings {
        name: "raw".into(),
        device: DeviceTemplate::parse(device, &filter).unwrap(),
        filter,
        codec: codec::Settings { limits, ..codec::Settings::new(path) },
        silent_after: None,
    }
}

fn publish(link: &mut Link, topic: &str, payload: &[u8]) {
    link.publish(Publish { qos: QoS::AtLeastOnce, ..Publish::new(topic, payload.to_vec()) });
    link.flush();
}

/// Sees everything that is published for devices.
struct Watcher {
    link: Link,
    taken: VecDeque<Outbound>,
}

impl Watcher {
    fn new(hub: &Hub) -> Self {
        let mut link = hub.attach(Attach::internal(Face::Web, "watcher")).unwrap();
        let filter = SharedFilter::split("devices/#").unwrap();
        link.subscribe(&filter, SubscribeOptions::new(QoS::AtMostOnce)).unwrap();
        Self { link, taken: VecDeque::new() }
    }

    /// Waits for a message on `topic` whose payload satisfies `wanted`, and returns it.
    async fn expect(&mut self, topic: &str, wanted: impl Fn(&Json) -> bool) -> Json {
        let mut seen = Vec::new();
        let search = async {
            loop {
                let Some(outbound) = self.taken.pop_front() else {
                    self.taken.extend(self.link.next().await);
                    continue;
                };
                let Outbound::Publish(delivery) = outbound else { continue };
                let json: Json = serde_json::from_slice(&delivery.message.payload).unwrap();
                if delivery.message.topic.as_str() == topic && wanted(&json) {
                    return json;
                }
                seen.push(format!("{} {json}", delivery.message.topic));
            }
        };
        let found = timeout(PATIENCE, search).await;
        found.unwrap_or_else(|_| panic!("nothing wanted on {topic}; seen:\n{}", seen.join("\n")))
    }
}

#[tokio::test]
async fn packed_bytes_become_readings_of_the_device_the_topic_names() {
    let hub = Hub::new(hub::Settings::default(), Clock::start("boot"), None).unwrap();
    let mut watcher = Watcher::new(&hub);
    let translator = Translator::bind(settings("sensors/+/raw", "sensor-{1}"), &hub, PayloadForm::Json).unwrap();
    let observe = translator.observe();
    let (shutdown, stopped) = watch::channel(false);
    let mut tasks = JoinSet::new();
    tasks.spawn(translator.run(stopped));

    let mut sensor = hub.attach(Attach::internal(Face::MqttSn, "s7")).unwrap();
    publish(&mut sensor, "sensors/s7/raw", &[0xFF, 0x9C, 111, 150, 1]);
    let reading = watcher.expect("devices/sensor-s7/temperature", |_| true).await;
    assert_eq!((&reading["value"], &reading["unit"]), (&Json::from(-1), &Json::from("°C")));
    watcher.expect("devices/sensor-s7/state", |json| json["state"] == "good").await;

    for payload in [&b"junk"[..], b"", &[0xFF; 100_000]] {
        publish(&mut sensor, "sensors/s7/raw", payload);
    }
    let state = watcher.expect("devices/sensor-s7/state", |json| json["state"] == "degraded").await;
    assert!(state["reason"].as_str().unwrap().contains("cannot be read"), "{state}");
    publish(&mut sensor, "sensors//raw", &[0, 0, 0, 0, 0]);
    publish(&mut sensor, "sensors/s7/raw", &[0x08, 0x34, 111, 150, 0]);
    let reading = watcher.expect("devices/sensor-s7/temperature", |_| true).await;
    assert_eq!(reading["value"], 21.0);
    watcher.expect("devices/sensor-s7/state", |json| json["state"] == "good").await;

    let names: Vec<String> = observe.statuses().into_iter().map(|status| status.name).collect();
    assert_eq!(names, ["raw", "sensor-s7"]);
    let mut metrics = Metrics::default();
    observe.collect(&mut metrics);
    let metrics = metrics.render();
    for line in
        ["messages_total{adapter=\"raw\"} 5", "unreadable_total{adapter=\"raw\"} 3", "refused_total{adapter=\"raw\"} 1"]
    {
        assert!(metrics.contains(&format!("fieldgate_translated_{line}\n")), "{line} in\n{metrics}");
    }
    shutdown.send_replace(true);
    timeout(PATIENCE, tasks.join_next()).await.expect("the translator stops when told").unwrap().unwrap();
}

#[tokio::test]
async fn a_filter_that_would_take_its_own_readings_is_refused() {
    let hub = Hub::new(hub::Settings::default(), Clock::start("boot"), None).unwrap();
    for filter in ["#", "+/raw", "devices/+/raw"] {
        let bound = Translator::bind(settings(filter, "d"), &hub, PayloadForm::Json);
        assert!(matches!(bound, Err(BindError::Loop(_))), "{filter}");
    }
}
