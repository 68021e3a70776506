//! What grows: subscriptions, retained messages, queues on disk, connections. Each measurement starts its own brokers.

mod durable;
mod pump;
mod restart;
mod retained;
mod subscriptions;
mod tls;

pub use durable::run as durable;
pub use restart::run as restart;
pub use retained::run as retained;
pub use subscriptions::run as subscriptions;
pub use tls::{run as tls, serve_bare as serve_bare_tls};

use std::path::Path;

use crate::brokers::{Broker, Kind, free_port, mosquitto_basics};

/// A broker whose limits are not what is measured.
fn unlimited(kind: Kind, fieldgate: &Path) -> Broker {
    with_metrics(kind, fieldgate, free_port())
}

/// The same; Fieldgate's metrics are on `web`.
fn with_metrics(kind: Kind, fieldgate: &Path, web: u16) -> Broker {
    Broker::start_with(kind, fieldgate, |port, data| match kind {
        Kind::Mosquitto => format!("max_inflight_messages 100\nmax_queued_messages 0\n{}", mosquitto_basics(port)),
        Kind::Rumqttd => String::new(),
        Kind::Fieldgate => format!(
            "gateway: {{ name: bench }}\nlog: {{ level: warn }}\n\
             store: {{ directory: \"{}\", max_size: 16GiB }}\n\
             limits:\n  max_connections: 20000\n  max_queued_messages: 10000000\n  max_queued_bytes: 4GiB\n  \
             max_subscriptions: 1000000\n  max_retained_messages: 2000000\n  max_retained_bytes: 2GiB\n\
             web: {{ address: \"127.0.0.1:{web}\" }}\n\
             listeners: [ {{ name: bench, address: \"127.0.0.1:{port}\" }} ]\n",
            data.display()
        ),
    })
}

fn mib(kib: i64) -> f64 {
    kib as f64 / 1024.0
}
