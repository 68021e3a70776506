//! Restarts with a million queued messages, of one session and of a thousand, and a hundred thousand retained ones.

use std::path::Path;
use std::time::{Duration, Instant};

use super::{mib, pump, retained, unlimited};
use crate::brokers::Kind;
use crate::client::{self, Session, Stamp, put_publish};
use crate::process;

const RETAINED: u64 = 100_000;

pub fn run(fieldgate: &Path, messages: u64) {
    for sessions in [1, 1000] {
        let mut broker = unlimited(Kind::Fieldgate, fieldgate);
        for session in 0..sessions {
            pump::leave_session(broker.address, &format!("kept{session}"), &format!("queue/{session}/+"))
                .expect("a session");
        }
        retained::publish(broker.address, RETAINED);
        let started = Instant::now();
        pump::publish(broker.address, "filler", 2000, |out, number, id| {
            if number == messages {
                return false;
            }
            let topic = format!("queue/{}/{}", number % sessions, number / sessions % 100);
            put_publish(out, &topic, 1, id, 100, Stamp { publisher: 0, sequence: number, sent_nanos: 0 });
            true
        });
        let filled = messages as f64 / started.elapsed().as_secs_f64();
        let held = process::rss_kib(broker.pid());
        let killed = broker.restart(|_| ());
        std::thread::sleep(Duration::from_millis(500));
        let after = process::peak_rss_kib(broker.pid());
        let started = Instant::now();
        let mut received = 0;
        for session in 0..sessions {
            let client_id = format!("kept{session}");
            let mut stream = client::attach(broker.address, &client_id, Session::Kept).expect("a session is resumed");
            received += pump::receive(&mut stream, messages / sessions).0;
        }
        let drained = received as f64 / started.elapsed().as_secs_f64();
        println!(
            "{messages} queued for {sessions} sessions, {RETAINED} retained: filled at {filled:.0} msg/s ({:.0} MiB); \
             after kill -9 it listens in {} ms ({:.0} MiB at most); {received} delivered at {drained:.0} msg/s ({:.0} MiB)",
            mib(held),
            killed.as_millis(),
            mib(after),
            mib(process::peak_rss_kib(broker.pid())),
        );
    }
}
