//! What a configuration will run, in lines for a person.

use super::Config;
use super::scalar::{Scalar, Size};
use crate::hub::access::Anonymous;
use crate::listener::Transport;
use crate::store::Durability;

/// Label, name and what it is.
pub type Line = (&'static str, String, String);

impl Config {
    /// What will run where.
    pub fn summary(&self) -> Vec<Line> {
        let mut lines = vec![("gateway", self.name.clone(), self.who_may_connect())];
        let durability = match self.store.durability {
            Durability::Commit => "commit".to_owned(),
            Durability::Interval(interval) => format!("commit every {}", interval.show()),
            Durability::Relaxed => "relaxed".to_owned(),
        };
        let most = Size(self.store.max_bytes).show();
        let directory = self.store.directory.display();
        lines.push(("store", String::new(), format!("{directory}, {durability}, at most {most}")));
        for listener in &self.listeners {
            let protocol = match (listener.transport, &listener.tls) {
                (Transport::Mqtt, None) => "mqtt",
                (Transport::Mqtt, Some(_)) => "mqtts",
                (Transport::WebSocket, None) => "ws",
                (Transport::WebSocket, Some(_)) => "wss",
            };
            lines.push(("listener", listener.name.clone(), format!("{protocol}://{}", listener.address)));
        }
        if let Some(mqttsn) = &self.mqttsn {
            lines.push(("mqtt-sn", String::new(), format!("udp {}, gateway id {}", mqttsn.address, mqttsn.gateway_id)));
        }
        for bus in &self.buses {
            let points: usize = bus.devices.iter().map(|device| device.points.len()).sum();
            let devices = count(bus.devices.len() as u64, "device");
            lines.push((
                "bus",
                bus.name.to_string(),
                format!("{}: {devices}, {}", bus.link, count(points as u64, "point")),
            ));
        }
        for device in &self.serial {
            let line = &device.line;
            lines.push((
                "serial",
                device.name.to_string(),
                format!("{} at {} Bd", line.path.display(), line.baud_rate),
            ));
        }
        for translator in &self.translators {
            let codec = translator.codec.path.display();
            lines.push(("codec", translator.name.to_string(), format!("{} with {codec}", translator.filter)));
        }
        for program in &self.plugins {
            let command: Vec<_> = program.command.iter().map(|word| word.to_string_lossy()).collect();
            lines.push(("plugin", program.name.to_string(), command.join(" ")));
        }
        for upstream in &self.upstreams {
            let urls: Vec<_> = upstream.urls.iter().map(ToString::to_string).collect();
            let (out, back) = (upstream.outgoing.len(), upstream.incoming.len());
            let rules = format!("{}, {} back", count(out as u64, "rule"), count(back as u64, "rule"));
            lines.push(("upstream", upstream.name.clone(), format!("{}: {rules}", urls.join(", "))));
        }
        if let Some(web) = &self.web {
            let scheme = if web.tls.is_some() { "https" } else { "http" };
            lines.push(("web", String::new(), format!("{scheme}://{}/", web.address)));
        }
        lines
    }

    fn who_may_connect(&self) -> String {
        let access = &self.hub.access;
        let anonymous = match access.anonymous {
            Anonymous::Never => "no anonymous clients",
            Anonymous::Loopback => "anonymous clients from this machine only",
            Anonymous::Always => "anonymous clients from everywhere",
        };
        format!(
            "{}, {}, {anonymous}",
            count(access.users.len() as u64, "user"),
            count(access.rules.len() as u64, "rule")
        )
    }
}

/// As in `1 message`, `2 messages`.
pub fn count(number: u64, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}
