//! `fieldgate prove`: whether a subscriber's record holds every message that a gateway has numbered.
//!
//! The record is JSON lines as `mosquitto_sub -V 5 -F '%j'` writes them, with what `provenance: add` puts into user
//! properties. Within one stream of one gateway, each number is one more than the last; what was sent again comes under
//! the number it had. After a restart (another boot id) the queue goes on where it was, or starts over if it was empty.
//! A record is of one upstream of one gateway: boot ids do not say whose they are.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::{Value, json};

use super::terminal::{complain, say};
use super::{SYSTEM_ERROR, USER_ERROR};

/// How many findings of each stream are spelled out.
const SHOWN: usize = 20;

#[derive(clap::Args)]
pub struct Arguments {
    /// The record; standard input if absent.
    #[arg(value_name = "FILE")]
    record: Option<PathBuf>,
    /// How to answer.
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Format {
    Text,
    Json,
}

pub fn prove(arguments: &Arguments) -> ExitCode {
    let read = match &arguments.record {
        None => Proof::read(io::stdin().lock()),
        Some(path) => File::open(path).and_then(|file| Proof::read(BufReader::new(file))),
    };
    let proof = match read {
        Ok(proof) => proof,
        Err(error) => {
            let name = arguments.record.as_ref().map_or("standard input".into(), |path| path.display().to_string());
            complain(&format!("{name} cannot be read: {error}"));
            return ExitCode::from(SYSTEM_ERROR);
        }
    };
    match arguments.format {
        Format::Text => say(&proof.to_text()),
        Format::Json => say(&proof.to_json().to_string()),
    }
    if proof.is_complete() { ExitCode::SUCCESS } else { ExitCode::from(USER_ERROR) }
}

/// What a record shows.
#[derive(Debug, Default)]
struct Proof {
    /// By the name in `fieldgate-stream`, empty for the one that every upstream has.
    streams: BTreeMap<String, Stream>,
    /// Messages without a number, as those of QoS 0.
    unnumbered: u64,
    /// Lines that are no JSON object.
    unreadable: u64,
}

#[derive(Debug, Default)]
struct Stream {
    messages: u64,
    /// Each start of the gateway in the order in which it first came, and what came under it.
    boots: Vec<Boot>,
}

#[derive(Debug)]
struct Boot {
    id: String,
    /// Numbers seen, as ranges that do not touch: first to last.
    seen: BTreeMap<u64, u64>,
    highest: u64,
    repeated: u64,
    /// Numbers that came for the first time after a higher one.
    disordered: Vec<u64>,
}

/// Numbers that are missing.
#[derive(Debug, PartialEq, Eq)]
struct Gap {
    boot: String,
    from: u64,
    to: u64,
}

impl Proof {
    fn read(record: impl BufRead) -> io::Result<Self> {
        let mut proof = Self::default();
        for line in record.split(b'\n') {
            let line = line?;
            if line.trim_ascii().is_empty() {
                continue;
            }
            match serde_json::from_slice::<Value>(&line) {
                Ok(Value::Object(message)) => proof.add(&Value::Object(message)),
                _ => proof.unreadable += 1,
            }
        }
        Ok(proof)
    }

    fn add(&mut self, message: &Value) {
        let properties = &message["properties"]["user-properties"];
        let property = |name: &str| properties[name].as_str();
        let number = property("fieldgate-sequence").and_then(|number| number.parse().ok());
        let (Some(number), Some(boot)) = (number, property("fieldgate-boot")) else {
            self.unnumbered += 1;
            return;
        };
        let stream = property("fieldgate-stream").unwrap_or_default();
        self.streams.entry(stream.to_owned()).or_default().add(boot, number);
    }

    fn is_complete(&self) -> bool {
        let sound = |stream: &Stream| stream.gaps().is_empty() && stream.disordered() == 0;
        self.unreadable == 0 && !self.streams.is_empty() && self.streams.values().all(sound)
    }

    fn to_text(&self) -> String {
        let mut lines = Vec::new();
        for (stream, found) in &self.streams {
            let name = if stream.is_empty() { "main stream".to_owned() } else { format!("stream {stream}") };
            let gaps = found.gaps();
            let missing: u64 = gaps.iter().map(|gap| gap.to - gap.from + 1).sum();
            let verdict = if gaps.is_empty() && found.disordered() == 0 { "complete" } else { "NOT complete" };
            lines.push(format!(
                "{name}: {verdict}: {} messages, {missing} missing, {} out of order, {} repeated, {} starts of the gateway",
                found.messages,
                found.disordered(),
                found.repeated(),
                found.boots.len()
            ));
            for Gap { boot, from, to } in gaps.iter().take(SHOWN) {
                let numbers = if from == to { format!("number {from}") } else { format!("numbers {from} to {to}") };
                lines.push(format!("  missing: {numbers}, up to the start {boot}"));
            }
            let late = found.boots.iter().flat_map(|boot| boot.disordered.iter().map(move |number| (boot, number)));
            for (boot, number) in late.take(SHOWN) {
                lines.push(format!("  out of order: number {number} of the start {}", boot.id));
            }
        }
        if self.streams.is_empty() {
            lines.push("no message has a number; set `provenance: add` on the rules, and record with MQTT 5".into());
        }
        if self.unnumbered > 0 {
            lines.push(format!("{} messages without a number, of which nothing can be said", self.unnumbered));
        }
        if self.unreadable > 0 {
            lines.push(format!("{} lines are not JSON objects; record with mosquitto_sub -F '%j'", self.unreadable));
        }
        lines.join("\n")
    }

    fn to_json(&self) -> Value {
        let streams = self.streams.iter().map(|(stream, found)| {
            let gaps = found.gaps();
            let gaps: Vec<_> =
                gaps.iter().map(|Gap { boot, from, to }| json!({ "boot": boot, "from": from, "to": to })).collect();
            json!({
                "stream": stream, "messages": found.messages, "boots": found.boots.len(),
                "repeated": found.repeated(), "disordered": found.disordered(), "gaps": gaps,
            })
        });
        json!({
            "complete": self.is_complete(), "streams": streams.collect::<Vec<_>>(),
            "unnumbered": self.unnumbered, "unreadable": self.unreadable,
        })
    }
}

impl Stream {
    fn add(&mut self, boot: &str, number: u64) {
        self.messages += 1;
        let place = self.boots.iter().rposition(|known| known.id == boot).unwrap_or_else(|| {
            let highest = number;
            let boot = Boot { id: boot.into(), seen: BTreeMap::new(), highest, repeated: 0, disordered: Vec::new() };
            self.boots.push(boot);
            self.boots.len() - 1
        });
        self.boots[place].add(number);
    }

    fn repeated(&self) -> u64 {
        self.boots.iter().map(|boot| boot.repeated).sum()
    }

    fn disordered(&self) -> usize {
        self.boots.iter().map(|boot| boot.disordered.len()).sum()
    }

    /// Within a start of the gateway, and from one to the next: the queue goes on at most one behind what was sent, and
    /// starts over with 0 where it was empty. Where a record begins cannot be told from a gap.
    fn gaps(&self) -> Vec<Gap> {
        let mut gaps = Vec::new();
        for (at, boot) in self.boots.iter().enumerate() {
            let first = boot.seen.keys().next().copied().unwrap_or_default();
            if let Some(before) = at.checked_sub(1).map(|before| self.boots[before].highest)
                && first > before + 1
            {
                gaps.push(Gap { boot: boot.id.clone(), from: before + 1, to: first - 1 });
            }
            for ((_, &last), (&next, _)) in boot.seen.iter().zip(boot.seen.iter().skip(1)) {
                gaps.push(Gap { boot: boot.id.clone(), from: last + 1, to: next - 1 });
            }
        }
        gaps
    }
}

impl Boot {
    fn add(&mut self, number: u64) {
        let below = self.seen.range(..=number).next_back().map(|(&first, &last)| (first, last));
        if below.is_some_and(|(_, last)| last >= number) {
            self.repeated += 1;
            return;
        }
        if number < self.highest {
            self.disordered.push(number);
        }
        self.highest = self.highest.max(number);
        let first = below.filter(|(_, last)| last + 1 == number).map_or(number, |(first, _)| first);
        let last = self.seen.remove(&(number + 1)).unwrap_or(number);
        self.seen.insert(first, last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A record of numbers, each with its boot id and stream.
    fn record(messages: &[(&str, &str, u64)]) -> Proof {
        let line = |(boot, stream, number): &(&str, &str, u64)| {
            let mut properties = json!({ "fieldgate-sequence": number.to_string(), "fieldgate-boot": boot });
            if !stream.is_empty() {
                properties["fieldgate-stream"] = json!(stream);
            }
            json!({ "topic": "t", "properties": { "user-properties": properties } }).to_string()
        };
        let text: Vec<_> = messages.iter().map(line).collect();
        Proof::read(text.join("\n\n").as_bytes()).unwrap()
    }

    #[test]
    fn numbers_without_a_hole_are_complete_however_often_they_come() {
        let check = |messages: &[(&str, &str, u64)], repeated: u64| {
            let proof = record(messages);
            assert!(proof.is_complete(), "{messages:?}: {}", proof.to_text());
            assert_eq!(proof.streams.values().map(Stream::repeated).sum::<u64>(), repeated, "{messages:?}");
        };
        check(&[("a", "", 7), ("a", "", 8), ("a", "", 9)], 0);
        check(&[("a", "", 0), ("a", "", 1), ("a", "", 0), ("a", "", 1), ("a", "", 2)], 2);
        // The next start repeats what was not acknowledged, goes on, or starts over.
        check(&[("a", "", 0), ("a", "", 1), ("b", "", 1), ("b", "", 2)], 0);
        check(&[("a", "", 0), ("a", "", 1), ("b", "", 2)], 0);
        check(&[("a", "", 8), ("a", "", 9), ("b", "", 0), ("b", "", 1)], 0);
        check(&[("a", "", 0), ("a", "live", 0), ("a", "", 1), ("a", "live", 1)], 0);
    }

    #[test]
    fn what_is_missing_or_late_is_named() {
        let gaps = |messages: &[(&str, &str, u64)]| {
            let proof = record(messages);
            assert!(!proof.is_complete(), "{messages:?}");
            let gaps = proof.streams.values().flat_map(Stream::gaps);
            gaps.map(|gap| (gap.boot, gap.from, gap.to)).collect::<Vec<_>>()
        };
        assert_eq!(gaps(&[("a", "", 0), ("a", "", 2)]), [("a".to_owned(), 1, 1)]);
        assert_eq!(gaps(&[("a", "", 0), ("a", "", 5), ("a", "", 9)]), [("a".to_owned(), 1, 4), ("a".to_owned(), 6, 8)]);
        assert_eq!(gaps(&[("a", "", 3), ("b", "", 6)]), [("b".to_owned(), 4, 5)]);
        assert_eq!(gaps(&[("a", "", 0), ("a", "live", 1), ("a", "", 1), ("a", "live", 3)]), [("a".to_owned(), 2, 2)]);
        // Late, and nothing is missing.
        assert_eq!(gaps(&[("a", "", 0), ("a", "", 2), ("a", "", 1)]), []);
        let text = record(&[("a", "high", 0), ("a", "high", 2), ("a", "high", 1)]).to_text();
        assert!(text.contains("stream high: NOT complete: 3 messages, 0 missing, 1 out of order"), "{text}");
    }

    #[test]
    fn a_record_that_shows_nothing_proves_nothing() {
        let check = |text: &str, expected: &str| {
            let proof = Proof::read(text.as_bytes()).unwrap();
            assert!(!proof.is_complete(), "{text}");
            assert!(proof.to_text().contains(expected), "{}", proof.to_text());
        };
        check("", "no message has a number");
        check("{\"topic\":\"t\",\"payload\":\"1\"}\n", "1 messages without a number");
        check("t 1\n", "1 lines are not JSON objects");
    }
}
