//! What `fieldgate prove` says of the subscriber's record, held against what the oracle knows.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::gateway::program;
use crate::oracle::Verdict;

/// A message in the record, by what the gateway numbered it with.
struct Numbered {
    stream: String,
    boot: String,
    number: u64,
    topic: String,
    payload: String,
}

/// Where `fieldgate prove` and the oracle disagree: on the record as it is, and on one from which a message was taken.
/// `may_miss` says that numbers may be missing, of what limits have dropped, or a full disk has refused after it had its
/// number; after a crash such a number may be given again.
pub fn contradiction(record: &Path, verdict: &Verdict, may_miss: bool) -> Option<String> {
    let (is_sound, proof) = prove(record);
    let is_in_order = |stream: &Value| stream["late"]["count"] == 0;
    let is_fine = is_sound || may_miss && streams(&proof).iter().all(is_in_order);
    if verdict.findings.is_empty() && !is_fine {
        return Some(format!("`fieldgate prove` misses what has come: {proof}"));
    }
    let text = fs::read_to_string(record).unwrap();
    let messages: Vec<_> = text.lines().map(Numbered::parse).collect();
    let taken = one_between_others(&messages)?;
    let is_other = |message: &Numbered| (&message.topic, &message.payload) != (&taken.topic, &taken.payload);
    let kept = text.lines().zip(&messages).filter(|(_, message)| is_other(message));
    let shorter = record.with_extension("without-one.jsonl");
    fs::write(&shorter, kept.flat_map(|(line, _)| [line, "\n"]).collect::<String>()).unwrap();
    let (is_sound, proof) = prove(&shorter);
    let gaps = streams(&proof).iter().filter(|stream| stream["stream"] == *taken.stream);
    let mut gaps = gaps.flat_map(|stream| stream["gaps"].as_array().expect("a list of gaps"));
    let end = |gap: &Value, name: &str| gap[name].as_u64().expect("a number");
    let is_named = gaps.any(|gap| (end(gap, "from")..=end(gap, "to")).contains(&taken.number));
    (is_sound || !is_named).then(|| {
        let Numbered { stream, boot, number, .. } = taken;
        format!("`fieldgate prove` does not notice that number {number} of {boot} in `{stream}` is missing: {proof}")
    })
}

fn streams(proof: &Value) -> &[Value] {
    proof["streams"].as_array().expect("a list of streams")
}

/// Some message in the middle of the record with others of its stream before and after it, from the same start of the
/// gateway.
fn one_between_others(messages: &[Numbered]) -> Option<&Numbered> {
    let mut ends: BTreeMap<(&str, &str), (u64, u64)> = BTreeMap::new();
    for Numbered { stream, boot, number, .. } in messages {
        let (first, last) = ends.entry((stream, boot)).or_insert((*number, *number));
        (*first, *last) = ((*first).min(*number), (*last).max(*number));
    }
    messages[messages.len() / 2..].iter().find(|message| {
        let (first, last) = ends[&(&*message.stream, &*message.boot)];
        first < message.number && message.number < last
    })
}

impl Numbered {
    fn parse(line: &str) -> Self {
        let message: Value = serde_json::from_str(line).expect("the subscriber writes JSON");
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let properties = &message["properties"]["user-properties"];
        Self {
            stream: text(&properties["fieldgate-stream"]),
            boot: text(&properties["fieldgate-boot"]),
            number: text(&properties["fieldgate-sequence"]).parse().expect("every message has its number"),
            topic: text(&message["topic"]),
            payload: text(&message["payload"]),
        }
    }
}

/// Whether nothing is missing, late or doubled, and why.
fn prove(record: &Path) -> (bool, Value) {
    let output = Command::new(program()).args(["prove", "--format", "json"]).arg(record).output().unwrap();
    let proof: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(output.status.success(), proof["sound"] == true, "{proof}");
    (output.status.success(), proof)
}
