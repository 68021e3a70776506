//! A million retained messages: memory, the time until a new subscriber has them all, and a restart with them.

use std::path::Path;
use std::time::Instant;

use super::{mib, pump, unlimited};
use crate::brokers::Kind;
use crate::client::{self, Stamp, put_publish};
use crate::process;

pub fn run(fieldgate: &Path, messages: u64) {
    // rumqttd needs 788 MiB for them, gives a subscriber 200 of the million, and on a busy machine stops answering.
    for kind in [Kind::Mosquitto, Kind::Fieldgate] {
        let mut broker = unlimited(kind, fieldgate);
        let started = Instant::now();
        publish(broker.address, messages);
        let took = started.elapsed().as_secs_f64();
        let held = process::rss_kib(broker.pid());
        let mut line = format!(
            "{:10} {messages} retained: {:.0} msg/s, {:.0} MiB ({:.0} at most)",
            kind.name(),
            messages as f64 / took,
            mib(held),
            mib(process::peak_rss_kib(broker.pid())),
        );
        process::forget_peak(broker.pid());
        let mut stream = client::connect(broker.address, "reader").expect("a subscriber connects");
        let started = Instant::now();
        client::subscribe(&mut stream, "#", 0).expect("a subscriber subscribes");
        let (received, _) = pump::receive(&mut stream, messages);
        let took = started.elapsed();
        let peak = process::peak_rss_kib(broker.pid());
        line += &format!("; `#` gets {received} in {} ms, {:.0} MiB at most", took.as_millis(), mib(peak));
        drop(stream);
        if kind == Kind::Fieldgate {
            let took = broker.restart(|_| ());
            let held = process::rss_kib(broker.pid());
            line += &format!("; after kill -9 it listens in {} ms with {:.0} MiB", took.as_millis(), mib(held));
        }
        println!("{line}");
    }
}

/// Topics of 30 bytes, payloads of 20 to 100.
pub fn publish(address: std::net::SocketAddr, messages: u64) {
    pump::publish(address, "retainer", 1000, |out, number, id| {
        if number == messages {
            return false;
        }
        let topic = format!("plant/{:02}/line/{:03}/point/{:06}", number % 17, number % 211, number);
        let at = out.len();
        let stamp = Stamp { publisher: 0, sequence: number, sent_nanos: 0 };
        put_publish(out, &topic, 1, id, 20 + (number * 7 % 81) as usize, stamp);
        out[at] |= 1;
        true
    });
}
