//! Adapters end to end, one at a time and without a hub: programs as real child processes, serial devices on real ptys.

use std::sync::Arc;
use std::time::Duration;

use fieldgate::clock::Clock;
use fieldgate::field::Exchange;
use fieldgate::field::mapping::{Mapping, PayloadForm};
use fieldgate::message::{Message, QoS};
use fieldgate::observe::{Health, Metrics, Observe};
use fieldgate::topic::TopicName;
use serde_json::Value as Json;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

mod programs;
mod serial;

/// Far more than anything here takes, for a machine under load.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running adapter, seen from where the hub would be.
struct Gateway {
    clock: Clock,
    published: mpsc::UnboundedReceiver<Message>,
    commands: mpsc::Sender<Arc<Message>>,
    observe: Arc<dyn Observe>,
    shutdown: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Gateway {
    /// `bind` makes the adapter; it gives what tells about it, and what runs it.
    fn start<R>(bind: impl FnOnce(Exchange, watch::Receiver<bool>) -> (Arc<dyn Observe>, R)) -> Self
    where
        R: Future<Output = ()> + Send + 'static,
    {
        let clock = Clock::start("boot");
        let (publish, published) = mpsc::unbounded_channel();
        let (commands, inbox) = mpsc::channel(8);
        let mapping = Mapping::new(clock.clone(), PayloadForm::Json);
        let exchange = Exchange::new(mapping, move |message| drop(publish.send(message)), inbox);
        let (shutdown, stopped) = watch::channel(false);
        let (observe, run) = bind(exchange, stopped);
        let mut tasks = JoinSet::new();
        tasks.spawn(run);
        Self { clock, published, commands, observe, shutdown, tasks }
    }

    /// Waits for a message on `topic` whose payload satisfies `wanted`, and returns it.
    async fn expect(&mut self, topic: &str, wanted: impl Fn(&Json) -> bool) -> Json {
        let mut seen = Vec::new();
        let search = async {
            loop {
                let message = self.published.recv().await.expect("the adapter runs");
                let json: Json = serde_json::from_slice(&message.payload).unwrap();
                if message.topic.as_str() == topic && wanted(&json) {
                    return json;
                }
                seen.push(format!("{} {json}", message.topic));
            }
        };
        let found = timeout(PATIENCE, search).await;
        found.unwrap_or_else(|_| panic!("nothing wanted on {topic}; seen:\n{}", seen.join("\n")))
    }

    /// Waits until the adapter's own status satisfies `wanted`, and returns its reason.
    async fn expect_status(&self, wanted: impl Fn(Health, &str) -> bool) -> String {
        let search = async {
            loop {
                let status = self.observe.statuses().remove(0);
                let reason = status.reason.unwrap_or_default();
                if wanted(status.health, &reason) {
                    return reason;
                }
                sleep(Duration::from_millis(10)).await;
            }
        };
        let found = timeout(PATIENCE, search).await;
        found.unwrap_or_else(|_| panic!("the status stays {:?}", self.observe.statuses()))
    }

    async fn expect_good(&self) {
        self.expect_status(|health, _| health == Health::Good).await;
    }

    async fn command(&self, topic: &str, payload: &str) {
        let topic = TopicName::new(topic).unwrap();
        let message = Message::new(topic, payload.to_owned(), QoS::AtLeastOnce, self.clock.now());
        self.commands.send(Arc::new(message)).await.unwrap();
    }

    fn metric(&self, name: &str) -> f64 {
        let mut metrics = Metrics::default();
        self.observe.collect(&mut metrics);
        let text = metrics.render();
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name} in {text}"));
        line.rsplit_once(' ').unwrap().1.parse().unwrap()
    }

    async fn stop(mut self) {
        self.shutdown.send_replace(true);
        timeout(PATIENCE, self.tasks.join_next()).await.expect("the adapter stops when told").unwrap().unwrap();
    }
}

fn is_state(state: &'static str) -> impl Fn(&Json) -> bool {
    move |json| json["state"] == state
}
