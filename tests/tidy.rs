//! Holds the floors of `src/lib.rs` and the habits a machine can check.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Each module and its floor. A new module must find its place here.
const FLOORS: &[(&str, u8)] = &[
    ("address", 0),
    ("clock", 0),
    ("message", 0),
    ("observe", 0),
    ("reading", 0),
    ("secret", 0),
    ("signal", 0),
    ("throttle", 0),
    ("topic", 0),
    ("via", 0),
    ("proto", 1),
    ("files", 2),
    ("store", 2),
    ("tls", 2),
    ("websocket", 2),
    ("hub", 3),
    ("bridge", 4),
    ("field", 4),
    ("listener", 4),
    ("sensornet", 4),
    ("web", 4),
    ("cli", 5),
    ("config", 5),
    ("demo", 5),
    ("gateway", 5),
    ("supervise", 5),
];

/// Lines of code, without tests, at which a file has become hard to hold in the head.
const LONGEST_FILE: usize = 700;

struct Source {
    path: PathBuf,
    /// The first component below `src`; empty for `lib.rs` and `main.rs`.
    module: String,
    text: String,
}

impl Source {
    /// The lines before the file's tests; nothing for a file that is all tests: `tests.rs`, or one in a folder `tests`.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let is_tests =
            self.path.components().any(|part| Path::new(part.as_os_str()).with_extension("") == Path::new("tests"));
        let lines = self.text.lines().enumerate().map(|(index, line)| (index + 1, line));
        lines.take_while(move |(_, line)| !is_tests && !line.starts_with("#[cfg(test)]"))
    }
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    walk(&root, &mut files);
    let read = |path: PathBuf| {
        let relative = path.strip_prefix(&root).unwrap().to_owned();
        let first = relative.components().next().unwrap().as_os_str().to_str().unwrap().to_owned();
        let module = first.trim_end_matches(".rs").to_owned();
        let module = if module == "lib" || module == "main" { String::new() } else { module };
        Source { text: fs::read_to_string(&path).unwrap(), path: relative, module }
    };
    files.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "rs")).map(read).collect()
}

fn walk(directory: &Path, files: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() { walk(&path, files) } else { files.push(path) }
    }
}

/// The modules that a line names with `crate::`, one or a list in braces.
fn named_modules(line: &str) -> Vec<String> {
    let line = line.split("//").next().unwrap_or_default();
    let identifier = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut modules = Vec::new();
    for (start, marker) in line.match_indices("crate::") {
        let rest = &line[start + marker.len()..];
        match rest.strip_prefix('{') {
            Some(list) => modules.extend(top_level_items(list).iter().map(|item| identifier(item.trim()))),
            None => modules.push(identifier(rest)),
        }
    }
    modules.retain(|module| !module.is_empty());
    modules
}

/// Splits `a::{b, c}, d}` at the commas that are not inside braces.
fn top_level_items(list: &str) -> Vec<String> {
    let (mut depth, mut items, mut item) = (0, Vec::new(), String::new());
    for character in list.chars() {
        match character {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                items.push(std::mem::take(&mut item));
                continue;
            }
            _ => {}
        }
        item.push(character);
    }
    items.push(item);
    items
}

fn imports() -> BTreeMap<String, BTreeSet<String>> {
    let mut imports: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for source in sources().iter().filter(|source| !source.module.is_empty()) {
        // A `use crate::{` may go on over lines: look at the statement, not the line.
        let code: Vec<&str> = source.code().map(|(_, line)| line).collect();
        let code = code.iter().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join(" ");
        let entry = imports.entry(source.module.clone()).or_default();
        entry.extend(code.split(';').flat_map(named_modules).filter(|name| *name != source.module));
    }
    imports
}

#[test]
fn every_floor_uses_only_floors_below_it() {
    let floors: BTreeMap<&str, u8> = FLOORS.iter().copied().collect();
    let mut wrong = Vec::new();
    for (module, used) in imports() {
        let Some(&floor) = floors.get(module.as_str()) else {
            wrong.push(format!("module `{module}` has no floor: give it one in tests/tidy.rs and src/lib.rs"));
            continue;
        };
        // Names that are no module are re-exports or macros of the crate root: there are none, so they are typing slips.
        for name in used.iter().filter(|name| floors.contains_key(name.as_str())) {
            let below = floors[name.as_str()];
            if below > floor || (below == floor && floor == 4) {
                wrong.push(format!("`{module}` (floor {floor}) imports `{name}` (floor {below})"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn modules_of_one_floor_form_no_cycle() {
    let imports = imports();
    let reaches = |from: &str, to: &str| {
        let (mut seen, mut stack) = (BTreeSet::new(), vec![from.to_owned()]);
        while let Some(module) = stack.pop() {
            for next in imports.get(&module).into_iter().flatten() {
                if next == to {
                    return true;
                }
                if seen.insert(next.clone()) {
                    stack.push(next.clone());
                }
            }
        }
        false
    };
    let cyclic: Vec<_> = imports.keys().filter(|module| reaches(module, module)).collect();
    assert!(cyclic.is_empty(), "these modules import themselves through others: {cyclic:?}");
}

#[test]
fn every_file_says_what_it_is_and_can_be_held_in_the_head() {
    let mut wrong = Vec::new();
    for source in sources() {
        let name = source.path.display();
        if !source.text.starts_with("//!") {
            wrong.push(format!("{name} does not open with what it is (`//!`)"));
        }
        let lines = source.code().count();
        if lines > LONGEST_FILE {
            wrong.push(format!("{name} has {lines} lines of code; {LONGEST_FILE} are the limit: find the seam"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_code_may_panic_on_what_a_peer_sends_or_leave_work_undone() {
    // Spelled in two parts so that this file does not find itself.
    let refused = [
        [".unwrap", "()"].concat(),
        ["to", "do!("].concat(),
        ["unimple", "mented!("].concat(),
        ["FIX", "ME"].concat(),
        ["TO", "DO"].concat(),
        ["panic", "!("].concat(),
    ];
    let mut wrong = Vec::new();
    for source in sources() {
        for (number, line) in source.code() {
            for word in refused.iter().filter(|word| line.contains(word.as_str())) {
                wrong.push(format!("{}:{number}: `{word}`", source.path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_test_is_switched_off() {
    let mut files = Vec::new();
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests"), &mut files);
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
    let word = ["#[ig", "nore"].concat();
    let is_source = |path: &&PathBuf| path.extension().is_some_and(|extension| extension == "rs");
    let found: Vec<_> =
        files.iter().filter(is_source).filter(|path| fs::read_to_string(path).unwrap().contains(&word)).collect();
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn imports_are_read_from_lists_and_paths() {
    let check = |line: &str, expected: &[&str]| assert_eq!(named_modules(line), expected, "{line}");
    check("use crate::hub::{Link, Face}", &["hub"]);
    check("use crate::{hub::{A, B}, store, topic::TopicName}", &["hub", "store", "topic"]);
    check("let x = crate::store::Page::default()", &["store"]);
    check("// crate::web is not meant", &[]);
    check("pub(crate) fn x()", &[]);
}
