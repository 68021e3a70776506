//! The cost of a publish beside ten, a thousand and a hundred thousand subscriptions of others, wildcards among them.
//!
//! The publisher's topics lie among the filters of the others, level by level, and match none of them; they are more
//! than a broker would remember for one connection, so that each publish is looked up.

use std::net::SocketAddr;
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};
use std::{io::Read, io::Write, thread};

use super::{pump, unlimited};
use crate::brokers::Kind;
use crate::client::{self, Stamp, put_publish};
use crate::process;

const OTHERS: [u32; 3] = [10, 1_000, 100_000];
const CLIENTS: u32 = 100;
const TOPICS: u64 = 4_000;

pub fn run(fieldgate: &Path, seconds: u64) {
    // rumqttd stops answering a publisher with so many topics.
    for kind in [Kind::Mosquitto, Kind::Fieldgate] {
        let mut line = format!("{:10} publishes/s beside", kind.name());
        for others in OTHERS {
            let broker = unlimited(kind, fieldgate);
            let before = process::rss_kib(broker.pid());
            let started = Instant::now();
            let streams = subscribe_others(broker.address, others);
            let took = started.elapsed();
            let cost = (process::rss_kib(broker.pid()) - before) as f64 * 1024.0 / f64::from(others);
            let cpu = process::cpu_time(broker.pid());
            let rate = publish(broker.address, seconds);
            let cpu = (process::cpu_time(broker.pid()) - cpu).as_secs_f64() * 1e6 / (rate * seconds as f64);
            line += &format!("  {others}: {rate:.0} ({cpu:.2} µs of processor each)");
            if others == 100_000 {
                line += &format!("; {cost:.0} bytes a subscription, made in {} ms", took.as_millis());
            }
            drop(streams);
        }
        println!("{line}");
    }
}

/// A rate of QoS 1 messages that are acknowledged and delivered to the one who wants them all.
fn publish(address: SocketAddr, seconds: u64) -> f64 {
    let mut stream = client::connect(address, "receiver").expect("a subscriber connects");
    client::subscribe(&mut stream, "plant/+/line/+/machine/+/own", 0).expect("a subscriber subscribes");
    let started = Instant::now();
    let publisher = thread::spawn(move || {
        let end = started + Duration::from_secs(seconds);
        pump::publish(address, "publisher", 500, |out, number, id| {
            if number % 64 == 0 && Instant::now() >= end {
                return false;
            }
            let at = number % TOPICS;
            let topic = format!("plant/{}/line/{}/machine/{}/own", at % 10, at / 10 % 10, at / 100);
            put_publish(out, &topic, 1, id, 100, Stamp { publisher: 0, sequence: number, sent_nanos: 0 });
            true
        })
    });
    let (received, took) = pump::receive(&mut stream, u64::MAX);
    let sent = publisher.join().expect("the publisher ends");
    assert!(received >= sent, "{} of {sent} were lost", sent - received);
    received as f64 / took.as_secs_f64()
}

fn subscribe_others(address: SocketAddr, others: u32) -> Vec<TcpStream> {
    let clients = CLIENTS.min(others);
    (0..clients)
        .map(|number| {
            let mut stream = client::connect(address, &format!("other{number}")).expect("a subscriber connects");
            let filters: Vec<_> = (0..others / clients).map(|index| filter(index * clients + number)).collect();
            for some in filters.chunks(100) {
                subscribe_all(&mut stream, some);
            }
            stream
        })
        .collect()
}

/// Every tenth holds a wildcard; none matches what is published.
fn filter(number: u32) -> String {
    let (plant, line, machine) = (number % 10, number / 10 % 10, number / 100);
    match number % 30 {
        0 => format!("plant/+/line/{line}/machine/{machine}/value"),
        10 => format!("plant/{plant}/+/{line}/machine/{machine}/state/#"),
        20 => format!("plant/{plant}/line/{line}/machine/{machine}/+/raw"),
        _ => format!("plant/{plant}/line/{line}/machine/{machine}/value"),
    }
}

fn subscribe_all(stream: &mut TcpStream, filters: &[String]) {
    let mut body = vec![0, 1];
    for filter in filters {
        body.extend((filter.len() as u16).to_be_bytes());
        body.extend(filter.as_bytes());
        body.push(0);
    }
    let mut packet = vec![0x82];
    client::put_length(&mut packet, body.len());
    packet.extend(body);
    stream.write_all(&packet).expect("the broker reads");
    let mut answer = vec![0; filters.len() + 4 + usize::from(filters.len() + 2 > 127)];
    stream.read_exact(&mut answer).expect("SUBACK");
    assert!(answer[0] == 0x90 && answer[answer.len() - filters.len()..].iter().all(|code| *code == 0), "{answer:?}");
}
