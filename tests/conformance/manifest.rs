//! Checks the manifests: `| id | status | what is demanded, in our words | tests | note |`, one row per statement.
//!
//! Ids are those of the specification. A test is `file::function`, the file relative to `tests/`, or to the root where
//! it begins with `src/`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

#[test]
fn the_manifests_are_in_order_and_name_tests_that_exist() {
    for name in ["mqtt-5.0.md", "mqtt-3.1.1.md"] {
        let summary = check(name).unwrap_or_else(|fault| panic!("tests/conformance/{name}: {fault}"));
        println!("{name}: {summary:?}");
    }
}

/// How many statements have which status.
fn check(name: &str) -> Result<BTreeMap<String, usize>, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("tests/conformance").join(name)).map_err(|error| error.to_string())?;
    let mut summary = BTreeMap::new();
    let mut last = None;
    for line in text.lines().filter(|line| line.starts_with("| MQTT")) {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        let &[id, status, words, tests, note] = cells.as_slice() else { return Err(format!("not five cells: {line}")) };
        let number = numbers(id).ok_or_else(|| format!("{id} is not MQTT-chapter.section.subsection-number"))?;
        if last.replace(number.clone()).is_some_and(|last| last >= number) {
            return Err(format!("{id} is not after the row above it"));
        }
        if words.is_empty() {
            return Err(format!("{id} says nothing"));
        }
        match status {
            "shown" if tests.is_empty() => return Err(format!("{id} is shown by no test")),
            "differs" | "not applicable" | "not shown" if note.is_empty() => {
                return Err(format!("{id} gives no reason"));
            }
            "shown" | "differs" | "not applicable" | "not shown" => {}
            _ => return Err(format!("{id} has the unknown status {status}")),
        }
        for test in tests.split_whitespace() {
            find(root, test).map_err(|fault| format!("{id}: {test}: {fault}"))?;
        }
        *summary.entry(status.to_owned()).or_default() += 1;
    }
    Ok(summary)
}

/// The numbers of an id, which sort as the specification goes.
fn numbers(id: &str) -> Option<Vec<u32>> {
    let numbers: Result<Vec<u32>, _> = id.strip_prefix("MQTT-")?.split(['.', '-']).map(str::parse).collect();
    numbers.ok().filter(|numbers| numbers.len() == 4)
}

fn find(root: &Path, test: &str) -> Result<(), String> {
    let (file, function) = test.split_once("::").ok_or("not file::function")?;
    let path = if file.starts_with("src/") { root.join(file) } else { root.join("tests").join(file) };
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    let mut lines = text.lines().map(str::trim);
    // The attribute stands in the line before.
    while lines.any(|line| line == "#[test]" || line == "#[tokio::test]") {
        let line = lines.next().unwrap_or_default();
        let name = line.trim_start_matches("async ").strip_prefix("fn ").and_then(|rest| rest.split('(').next());
        if name == Some(function) {
            return Ok(());
        }
    }
    Err("there is no such test".into())
}
