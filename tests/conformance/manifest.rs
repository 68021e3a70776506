//! Checks the manifests: `| id | status | what is demanded, in our words | tests | note |`, one row per statement.
//!
//! Ids are those of the specification, all of them. A test is `file::function`, the file relative to `tests/`, or to
//! the root where it begins with `src/`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

#[test]
fn the_manifests_are_in_order_and_name_tests_that_exist() {
    for (name, statements) in [("mqtt-5.0.md", MQTT_5_0), ("mqtt-3.1.1.md", MQTT_3_1_1)] {
        let summary = check(name, statements).unwrap_or_else(|fault| panic!("tests/conformance/{name}: {fault}"));
        println!("{name}: {summary:?}");
    }
}

/// The sections that hold normative statements (appendix B), each with the number of its last one.
const MQTT_5_0: &str = "1.5.4-3 1.5.5-1 1.5.7-1 2.1.3-1 2.2.1-6 2.2.2-1 3.1.0-2 3.1.2-30 3.1.3-12 3.1.4-6 3.2.0-2 \
    3.2.2-22 3.3.1-13 3.3.2-20 3.3.4-10 3.4.2-3 3.5.2-3 3.6.1-1 3.6.2-3 3.7.2-3 3.8.1-1 3.8.3-5 3.8.4-8 3.9.2-2 \
    3.9.3-2 3.10.1-1 3.10.3-2 3.10.4-6 3.11.2-2 3.11.3-2 3.12.4-1 3.14.0-1 3.14.1-1 3.14.2-4 3.14.4-3 3.15.1-1 \
    3.15.2-3 4.1.0-2 4.2.0-1 4.3.1-1 4.3.2-5 4.3.3-13 4.4.0-2 4.5.0-2 4.6.0-6 4.7.0-1 4.7.1-2 4.7.2-1 4.7.3-4 \
    4.8.2-6 4.9.0-3 4.12.0-7 4.12.1-2 4.13.1-1 4.13.2-1 6.0.0-4";
const MQTT_3_1_1: &str = "1.5.3-3 2.2.2-2 2.3.1-7 3.1.0-2 3.1.2-24 3.1.3-11 3.1.4-5 3.2.0-1 3.2.2-6 3.3.1-12 3.3.2-3 \
    3.3.4-1 3.3.5-2 3.6.1-1 3.8.1-1 3.8.3-4 3.8.4-6 3.9.3-2 3.10.1-1 3.10.3-2 3.10.4-6 3.12.4-1 3.14.1-1 3.14.4-3 \
    4.1.0-2 4.2.0-1 4.3.1-1 4.3.2-2 4.3.3-2 4.4.0-1 4.5.0-2 4.6.0-6 4.7.1-3 4.7.2-1 4.7.3-4 4.8.0-2 6.0.0-4 7.0.0-2 \
    7.1.1-1 7.1.2-1";

/// Numbers that the specification has left out.
const NO_STATEMENTS: &[&str] = &["2.2.1-1"];

/// How many statements have which status.
fn check(name: &str, statements: &str) -> Result<BTreeMap<String, usize>, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("tests/conformance").join(name)).map_err(|error| error.to_string())?;
    let mut summary = BTreeMap::new();
    let mut expected = ids(statements);
    for line in text.lines().filter(|line| line.starts_with("| MQTT")) {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        let &[id, status, words, tests, note] = cells.as_slice() else { return Err(format!("not five cells: {line}")) };
        match expected.next() {
            Some(next) if next == id => {}
            Some(next) => return Err(format!("{next} has no row, or not where it belongs: here is {id}")),
            None => return Err(format!("{id} is no statement of the specification")),
        }
        if words.is_empty() {
            return Err(format!("{id} says nothing"));
        }
        match status {
            "shown" if tests.is_empty() => return Err(format!("{id} is shown by no test")),
            "client" if tests.is_empty() && note.is_empty() => return Err(format!("{id} says nothing of our client")),
            "differs" | "not applicable" | "not shown" if note.is_empty() => {
                return Err(format!("{id} gives no reason"));
            }
            "shown" | "client" | "differs" | "not applicable" | "not shown" => {}
            _ => return Err(format!("{id} has the unknown status {status}")),
        }
        for test in tests.split_whitespace() {
            find(root, test).map_err(|fault| format!("{id}: {test}: {fault}"))?;
        }
        *summary.entry(status.to_owned()).or_default() += 1;
    }
    expected.next().map_or(Ok(summary), |next| Err(format!("{next} has no row")))
}

/// The ids of all statements, in order.
fn ids(statements: &str) -> impl Iterator<Item = String> {
    let numbers = statements.split_whitespace().flat_map(|last| {
        let (section, last) = last.split_once('-').expect("section-number");
        (1..=last.parse::<u32>().expect("a number")).map(move |number| format!("{section}-{number}"))
    });
    numbers.filter(|id| !NO_STATEMENTS.contains(&id.as_str())).map(|id| format!("MQTT-{id}"))
}

fn find(root: &Path, test: &str) -> Result<(), String> {
    let (file, function) = test.split_once("::").ok_or("not file::function")?;
    let path = if file.starts_with("src/") { root.join(file) } else { root.join("tests").join(file) };
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    let mut lines = text.lines().map(str::trim);
    // The attribute stands in the line before.
    while lines.any(|line| line == "#[test]" || line.starts_with("#[tokio::test")) {
        let line = lines.next().unwrap_or_default();
        let name = line.trim_start_matches("async ").strip_prefix("fn ").and_then(|rest| rest.split('(').next());
        if name == Some(function) {
            return Ok(());
        }
    }
    Err("there is no such test".into())
}
