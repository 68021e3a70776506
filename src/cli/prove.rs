//! `fieldgate prove`: whether a subscriber's record holds every message that gateways have numbered.
//!
//! The numbers are those of `provenance` on an upstream's rules, in user properties or in payloads. Within one stream of
//! one queue, each is one more than the last; what was sent again comes under the number it had. After a restart (another
//! boot id) the queue goes on where it was, or starts over if it was empty.

mod ledger;
mod record;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::{Value, json};

use super::terminal::{complain, printable, say};
use super::{SYSTEM_ERROR, USER_ERROR};
use crate::config::summary::count;
use crate::topic::TopicFilter;
use ledger::{Fate, Findings, Gap, KEPT, Ledger};
use record::{Line, Origin};

#[derive(clap::Args)]
pub struct Arguments {
    /// The record; standard input if absent.
    #[arg(value_name = "FILE")]
    record: Option<PathBuf>,
    /// Also count what came on these topics; may be given several times.
    #[arg(short, long = "topic", value_name = "FILTER", value_parser = filter)]
    topics: Vec<TopicFilter>,
    /// How to answer.
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Format {
    Text,
    Json,
}

fn filter(text: &str) -> Result<TopicFilter, String> {
    TopicFilter::new(text).map_err(|error| error.to_string())
}

pub fn prove(arguments: &Arguments) -> ExitCode {
    let mut proof = Proof::new(&arguments.topics);
    let read = match &arguments.record {
        None => {
            if io::stdin().is_terminal() {
                complain("reading the record from the terminal; Ctrl-D ends it");
            }
            proof.read(io::stdin().lock())
        }
        Some(path) => File::open(path).and_then(|file| proof.read(BufReader::new(file))),
    };
    if let Err(error) = read {
        let name = arguments.record.as_ref().map_or("standard input".into(), |path| path.display().to_string());
        complain(&format!("{name} cannot be read: {error}"));
        let is_argument = matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::IsADirectory);
        return ExitCode::from(if is_argument { USER_ERROR } else { SYSTEM_ERROR });
    }
    match arguments.format {
        Format::Text => say(&proof.to_text()),
        Format::Json => say(&proof.to_json().to_string()),
    }
    if proof.is_sound() { ExitCode::SUCCESS } else { ExitCode::from(USER_ERROR) }
}

/// What a record shows.
#[derive(Debug, Default)]
struct Proof {
    /// By queue and stream; empty for a queue that was not named, and for the stream that every upstream has.
    ledgers: BTreeMap<(String, String), Ledger>,
    topics: Vec<Tally>,
    /// Messages without a number, as those of QoS 0.
    unnumbered: u64,
    /// Lines that are none of the forms of a record.
    unreadable: u64,
    /// The first of those.
    unreadable_line: u64,
}

/// What came on certain topics. The numbers of one queue run over all its topics, so nothing can be said of gaps.
#[derive(Debug)]
struct Tally {
    filter: TopicFilter,
    messages: u64,
    unnumbered: u64,
    repeated: u64,
    doubled: u64,
    late: u64,
}

impl Proof {
    fn new(topics: &[TopicFilter]) -> Self {
        Self { topics: topics.iter().cloned().map(Tally::of).collect(), ..Self::default() }
    }

    fn read(&mut self, record: impl BufRead) -> io::Result<()> {
        for (number, line) in (1..).zip(record.split(b'\n')) {
            let line = line?;
            if line.trim_ascii().is_empty() {
                continue;
            }
            match Line::read(&line) {
                Some(line) => self.add(number, &line),
                None => {
                    if self.unreadable == 0 {
                        self.unreadable_line = number;
                    }
                    self.unreadable += 1;
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, line_number: u64, line: &Line) {
        let is_among = |tally: &Tally| line.topic.as_ref().is_some_and(|topic| tally.filter.matches(topic));
        if line.origins.is_empty() {
            self.unnumbered += 1;
            self.topics.iter_mut().filter(|tally| is_among(tally)).for_each(|tally| tally.unnumbered += 1);
        }
        for Origin { queue, stream, boot, number, time } in &line.origins {
            let ledger = self.ledgers.entry((queue.clone(), stream.clone())).or_default();
            let fate = ledger.add(boot, *number, time, line.qos, line_number);
            self.topics.iter_mut().filter(|tally| is_among(tally)).for_each(|tally| tally.add(fate));
        }
    }

    fn is_sound(&self) -> bool {
        self.unreadable == 0 && !self.ledgers.is_empty() && self.ledgers.values().all(Ledger::is_sound)
    }

    fn to_text(&self) -> String {
        let mut lines = Vec::new();
        for ((queue, stream), ledger) in &self.ledgers {
            let stream = if stream.is_empty() { "main stream".to_owned() } else { format!("stream {stream}") };
            let name = if queue.is_empty() { stream } else { format!("{queue}, {stream}") };
            lines.push(format!("{}: {}", printable(&name), describe(ledger)));
            let gaps = ledger.gaps();
            lines.extend(gaps.iter().take(KEPT).map(|gap| format!("  missing: {}", place(gap))));
            lines.extend(rest(gaps.len() as u64));
            let kinds =
                [("out of order", &ledger.late), ("twice at QoS 2", &ledger.doubled), ("repeated", &ledger.repeated)];
            for (what, Findings { count, first }) in kinds {
                lines.extend(first.iter().map(|(number, line)| format!("  {what}: number {number} on line {line}")));
                lines.extend(rest(*count));
            }
        }
        for Tally { filter, messages, unnumbered, repeated, doubled, late } in &self.topics {
            let (filter, messages) = (printable(filter.as_str()), count(*messages, "message"));
            lines.push(format!(
                "topics {filter}: {messages}, {late} out of order, {repeated} repeated, {doubled} twice at QoS 2, {unnumbered} \
                 without a number"
            ));
        }
        if self.ledgers.is_empty() {
            lines.push(
                "no message has a number; set `provenance` on the rules, and record user properties (MQTT 5) or payloads"
                    .into(),
            );
        }
        if self.unnumbered > 0 {
            lines.push(format!("{} without a number, of which nothing can be said", count(self.unnumbered, "message")));
        }
        if self.unreadable > 0 {
            lines.push(format!(
                "{} not a message, the first is line {}; record with mosquitto_sub -F '%j'",
                if self.unreadable == 1 { "1 line is".into() } else { format!("{} lines are", self.unreadable) },
                self.unreadable_line
            ));
        }
        lines.join("\n")
    }

    fn to_json(&self) -> Value {
        let findings = |findings: &Findings| {
            let first = findings.first.iter().map(|(number, line)| json!({ "number": number, "line": line }));
            json!({ "count": findings.count, "first": first.collect::<Vec<_>>() })
        };
        let streams = self.ledgers.iter().map(|((queue, stream), ledger)| {
            let gaps = ledger.gaps();
            let missing = missing(&gaps);
            let gaps = gaps.iter().map(|gap| {
                let Gap { from, to, after_line, before_line } = gap;
                json!({ "from": from, "to": to, "after_line": after_line, "before_line": before_line })
            });
            json!({
                "queue": queue, "stream": stream, "sound": ledger.is_sound(), "messages": ledger.messages,
                "starts": ledger.starts(), "missing": missing, "gaps": gaps.collect::<Vec<_>>(),
                "late": findings(&ledger.late), "doubled": findings(&ledger.doubled),
                "repeated": findings(&ledger.repeated),
            })
        });
        let topics = self.topics.iter().map(|Tally { filter, messages, unnumbered, repeated, doubled, late }| {
            json!({
                "filter": filter.as_str(), "messages": messages, "unnumbered": unnumbered, "late": late, "doubled": doubled,
                "repeated": repeated,
            })
        });
        json!({
            "sound": self.is_sound(), "streams": streams.collect::<Vec<_>>(), "topics": topics.collect::<Vec<_>>(),
            "unnumbered": self.unnumbered, "unreadable": self.unreadable,
        })
    }
}

impl Tally {
    fn of(filter: TopicFilter) -> Self {
        Self { filter, messages: 0, unnumbered: 0, repeated: 0, doubled: 0, late: 0 }
    }

    fn add(&mut self, fate: Fate) {
        self.messages += 1;
        match fate {
            Fate::Fine => {}
            Fate::Repeated => self.repeated += 1,
            Fate::Doubled => self.doubled += 1,
            Fate::Late => self.late += 1,
        }
    }
}

/// The verdict on one stream, and its numbers.
fn describe(ledger: &Ledger) -> String {
    let missing = missing(&ledger.gaps());
    let (late, repeated, doubled) = (ledger.late.count, ledger.repeated.count, ledger.doubled.count);
    let verdict = match () {
        () if missing > 0 => "NOT complete",
        () if late > 0 => "NOT in order",
        () if doubled > 0 => "NOT exactly once",
        () => "complete",
    };
    let (messages, starts) = (count(ledger.messages, "message"), count(ledger.starts() as u64, "start"));
    let doubled = if doubled > 0 { format!(", {doubled} twice at QoS 2") } else { String::new() };
    format!(
        "{verdict}: {messages}, {missing} missing, {late} out of order{doubled}, {repeated} repeated, {starts} of the gateway"
    )
}

fn missing(gaps: &[Gap]) -> u64 {
    gaps.iter().map(|gap| gap.to - gap.from + 1).fold(0, u64::saturating_add)
}

/// A gap's numbers, and where in the record they should be.
fn place(&Gap { from, to, after_line, before_line }: &Gap) -> String {
    let numbers = if from == to { format!("number {from}") } else { format!("numbers {from} to {to}") };
    match after_line {
        Some(after_line) => format!("{numbers}, between line {after_line} and line {before_line}"),
        None => format!("{numbers}, before line {before_line}"),
    }
}

/// Says how many findings are not spelled out.
fn rest(count: u64) -> Option<String> {
    let rest = count.saturating_sub(KEPT as u64);
    (rest > 0).then(|| format!("  … and {rest} more"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proof(record: &str, topics: &[&str]) -> Proof {
        let topics: Vec<_> = topics.iter().map(|topic| TopicFilter::new(topic).unwrap()).collect();
        let mut proof = Proof::new(&topics);
        proof.read(record.as_bytes()).unwrap();
        proof
    }

    /// A line of `mosquitto_sub -F '%j'`, with what it shows in user properties.
    fn line(queue: &str, stream: &str, number: u64, qos: u8) -> String {
        let mut properties = json!({
            "fieldgate-queue": queue, "fieldgate-sequence": number.to_string(), "fieldgate-boot": queue,
            "fieldgate-time": format!("{number:09}"),
        });
        if !stream.is_empty() {
            properties["fieldgate-stream"] = json!(stream);
        }
        json!({ "topic": format!("{queue}/t"), "qos": qos, "properties": { "user-properties": properties } })
            .to_string()
    }

    #[test]
    fn one_record_may_be_of_several_gateways_and_streams() {
        let both = [line("a/c", "", 0, 1), line("b/c", "", 7, 1), line("a/c", "high", 0, 1), line("a/c", "", 1, 1)];
        let mut lines = both.to_vec();
        lines.push(r#"{"value":1,"fieldgate":{"queue":"b/c","boot":"b/c","sequence":8,"time":"8"}}"#.into());
        let sound = proof(&lines.join("\n\n"), &[]);
        assert!(sound.is_sound(), "{}", sound.to_text());
        lines.extend([line("b/c", "", 11, 1), line("a/c", "", 2, 2), line("a/c", "", 2, 2)]);
        lines.push(r#"{"topic":"a/state","qos":0,"payload":"1"}"#.into());
        let unsound = proof(&lines.join("\n"), &["a/#", "+/c/t", "x"]);
        assert!(!unsound.is_sound());
        let expected = "\
a/c, main stream: NOT exactly once: 4 messages, 0 missing, 0 out of order, 1 twice at QoS 2, 0 repeated, 1 start of the gateway
  twice at QoS 2: number 2 on line 8
a/c, stream high: complete: 1 message, 0 missing, 0 out of order, 0 repeated, 1 start of the gateway
b/c, main stream: NOT complete: 3 messages, 2 missing, 0 out of order, 0 repeated, 1 start of the gateway
  missing: numbers 9 to 10, between line 5 and line 6
topics a/#: 5 messages, 0 out of order, 0 repeated, 1 twice at QoS 2, 1 without a number
topics +/c/t: 7 messages, 0 out of order, 0 repeated, 1 twice at QoS 2, 0 without a number
topics x: 0 messages, 0 out of order, 0 repeated, 0 twice at QoS 2, 0 without a number
1 message without a number, of which nothing can be said";
        assert_eq!(unsound.to_text(), expected);
        let json = unsound.to_json();
        assert_eq!(json["streams"][2]["gaps"], json!([{ "from": 9, "to": 10, "after_line": 5, "before_line": 6 }]));
        assert_eq!(json["streams"][0]["doubled"], json!({ "count": 1, "first": [{ "number": 2, "line": 8 }] }));
        assert_eq!((&json["sound"], &json["topics"][0]["messages"]), (&json!(false), &json!(5)));
    }

    #[test]
    fn many_findings_are_counted_and_the_first_are_shown() {
        let lines: Vec<_> = (0..30).map(|number| line("a/c", "", number * 2, 1)).collect();
        let text = proof(&lines.join("\n"), &[]).to_text();
        assert!(text.contains("30 messages, 29 missing") && text.ends_with("… and 9 more"), "{text}");
        assert_eq!(text.lines().count(), 1 + KEPT + 1);
    }

    #[test]
    fn a_record_that_shows_nothing_proves_nothing() {
        let check = |text: &str, expected: &str| {
            let proof = proof(text, &[]);
            assert!(!proof.is_sound(), "{text}");
            assert!(proof.to_text().contains(expected), "{}", proof.to_text());
        };
        check("", "no message has a number");
        check("{\"topic\":\"t\",\"payload\":\"1\"}\n", "1 message without a number");
        check(&format!("{}\n\nt 1\nt 2", line("a/c", "", 0, 1)), "2 lines are not a message, the first is line 3;");
    }
}
