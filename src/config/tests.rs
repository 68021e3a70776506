//! Wrong configurations and what is said about them.

use std::fs;

use proptest::prelude::*;

use super::report::Look;
use super::*;

/// Loads `yaml` from a file called `fieldgate.yaml`; the reports as text, with the directory taken out.
pub(super) fn load_text(yaml: &[u8]) -> Result<Loaded, String> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fieldgate.yaml");
    fs::write(&path, yaml).unwrap();
    load_in(directory.path())
}

fn load_in(directory: &Path) -> Result<Loaded, String> {
    let environment = |name: &str| (name == "PASSWORD").then(|| "hunter2".to_owned());
    let loaded = load_with(&directory.join("fieldgate.yaml"), &environment);
    loaded.map_err(|reports| reports.render(Look::Plain).replace(&format!("{}/", directory.display()), ""))
}

#[track_caller]
fn check(yaml: &str, expected: &str) {
    let text = load_text(yaml.as_bytes()).expect_err("the configuration is wrong");
    let tidy = |text: &str| text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n").trim().to_owned();
    assert_eq!(tidy(&text), tidy(expected), "\n{text}");
}

#[test]
fn an_empty_file_is_all_defaults() {
    let loaded = load_text(b"# nothing\n").unwrap();
    assert_eq!(loaded.config.log, Log { level: Level::Info, format: Format::Text });
    assert!(loaded.warnings.reports.is_empty());
}

#[test]
fn an_unknown_key_is_answered_with_the_known_one() {
    check(
        "store:\n  directroy: /tmp\n",
        "
error: unknown key `directroy` in `store`
 --> fieldgate.yaml:2:3
  |
2 |   directroy: /tmp
  |   ^^^^^^^^^ did you mean `directory`?",
    );
}

#[test]
fn a_stranger_is_answered_with_all_known_keys() {
    check(
        "log: { colour: true }\n",
        "
error: unknown key `colour` in `log`
 --> fieldgate.yaml:1:8
  |
1 | log: { colour: true }
  |        ^^^^^^
  |
  = help: the keys in `log` are `level`, `format`",
    );
}

#[test]
fn all_errors_are_reported_at_once() {
    check(
        "log: { level: wran }\nstore:\n  max_size: 64\n  durability: [commit]\n  directory:\n",
        "
error: `level` must be one of `error`, `warn`, `info`, `debug`, `trace`
 --> fieldgate.yaml:1:15
  |
1 | log: { level: wran }
  |               ^^^^
  |
  = help: did you mean `warn`?

error: `max_size` must be a size, as in `512KiB`, `64MiB` or `2GiB`
 --> fieldgate.yaml:3:13
  |
3 |   max_size: 64
  |             ^^ `64` has no unit

error: `durability` must be a durability, not a list
 --> fieldgate.yaml:4:3
  |
4 |   durability: [commit]
  |   ^^^^^^^^^^

error: `directory` has no value
 --> fieldgate.yaml:5:3
  |
5 |   directory:
  |   ^^^^^^^^^
  |
  = help: write a path; a relative one starts at the file it stands in",
    );
}

#[test]
fn out_of_range_says_the_range() {
    check(
        "store: { durability: interval, commit_interval: 1ms }\n",
        "
error: `commit_interval` is out of range
 --> fieldgate.yaml:1:49
  |
1 | store: { durability: interval, commit_interval: 1ms }
  |                                                 ^^^ must be from 10ms to 1m",
    );
}

#[test]
fn a_key_given_twice_shows_both_lines() {
    check(
        "log:\n  level: info\nstore: {}\nlog:\n  level: warn\n",
        "
error: `log` is given twice
 --> fieldgate.yaml:4:1
  |
1 | log:
  | --- first time
...
4 | log:
  | ^^^ second time
  |
  = help: remove one of the two, or merge them",
    );
}

#[test]
fn broken_yaml_is_shown_where_it_breaks() {
    check(
        "log:\n\tlevel: info\n",
        "
error: not valid YAML: tabs disallowed within this context (block indentation)
 --> fieldgate.yaml:2:2
  |
2 |     level: info
  |     ^
  |
  = help: indent with spaces; YAML does not allow tabs",
    );
}

#[test]
fn an_unset_variable_is_named() {
    check(
        "gateway: { name: \"${PLANT}\" }\n",
        "
error: `name` cannot be read
 --> fieldgate.yaml:1:18
  |
1 | gateway: { name: \"${PLANT}\" }
  |                  ^^^^^^^^^^ the environment variable `PLANT` is not set; set it, or write `${PLANT:-DEFAULT}`",
    );
}

#[test]
fn a_missing_file_is_said_without_a_snippet() {
    let reports = load(Path::new("/nonexistent/fieldgate.yaml")).unwrap_err();
    assert_eq!(
        reports.render(Look::Plain).trim(),
        "error: /nonexistent/fieldgate.yaml: No such file or directory (os error 2)"
    );
}

#[test]
fn every_key_has_a_meaning() {
    for key in keys() {
        assert!(key.meaning.ends_with('.') && !key.shape.is_empty(), "{}", key.path);
    }
}

proptest! {
    #[test]
    fn no_bytes_panic_the_reader(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = load_text(&bytes);
    }

    #[test]
    fn no_yaml_like_text_panics_the_reader(text in "([a-z]{1,4}: |[-\\[\\]{},:&*!|>'\"#%@`é\u{3000} \n\t]|store:|log:){0,60}") {
        let _ = load_text(text.as_bytes());
    }
}

#[test]
fn two_owners_of_one_serial_port_are_shown_with_both_lines() {
    check(
        "modbus:
  - name: a
    serial: { path: /dev/ttyFG0 }
    devices: [ { name: x, unit_id: 1, points: [ { name: p, coil: 0 } ] } ]
  - name: b
    serial: { path: /dev/ttyFG0 }
    devices: [ { name: x, unit_id: 2, points: [ { name: p, coil: 0 } ] } ]
",
        "
error: the serial port /dev/ttyFG0 has two owners
 --> fieldgate.yaml:6:21
  |
3 |     serial: { path: /dev/ttyFG0 }
  |                     ----------- owned by bus `a`
...
6 |     serial: { path: /dev/ttyFG0 }
  |                     ^^^^^^^^^^^ also wanted by bus `b`
  |
  = help: several Modbus devices on one line belong under `devices` of one bus

error: two devices are named `x`
 --> fieldgate.yaml:7:24
  |
4 |     devices: [ { name: x, unit_id: 1, points: [ { name: p, coil: 0 } ] } ]
  |                        - first
...
7 |     devices: [ { name: x, unit_id: 2, points: [ { name: p, coil: 0 } ] } ]
  |                        ^ second
  |
  = help: give each its own name",
    );
}

#[test]
fn a_point_is_told_what_makes_no_sense() {
    check(
        "modbus:
  - name: bus
    tcp: 10.0.0.5
    serial: { path: /dev/ttyFG0 }
    devices:
      - name: meter
        points:
          - { name: a, coil: 0, type: f32 }
          - { name: b }
          - { name: c, address: 50001 }
",
        "
error: `tcp` must be a host and a port, as in `10.0.0.5:502`
 --> fieldgate.yaml:3:10
  |
3 |     tcp: 10.0.0.5
  |          ^^^^^^^^ `10.0.0.5` has no port

error: `tcp` and `serial` exclude each other
 --> fieldgate.yaml:4:5
  |
3 |     tcp: 10.0.0.5
  |     --- also given
4 |     serial: { path: /dev/ttyFG0 }
  |     ^^^^^^
  |
  = help: keep one of them

error: `unit_id` is missing
 --> fieldgate.yaml:6:9
  |
6 |       - name: meter
  |         ^^^^ needed here
  |
  = help: add `unit_id:` with a whole number, from 1 to 247: which server on the bus.

error: the point `a` makes no sense
 --> fieldgate.yaml:8:21
  |
8 |           - { name: a, coil: 0, type: f32 }
  |                     ^ a coil holds one bit, so its type is bool, not f32

error: one of `coil`, `discrete_input`, `input_register`, `holding_register`, `address` is missing
 --> fieldgate.yaml:9:15
  |
9 |           - { name: b }
  |               ^^^^ needs one of them

error: `address` must be a number as in manuals, `40001` or `400001`
  --> fieldgate.yaml:10:33
   |
10 |           - { name: c, address: 50001 }
   |                                 ^^^^^ a reference begins with 0 (coil), 1 (discrete input), 3 (input register) or 4 (holding register)",
    );
}

#[test]
fn an_error_in_a_profile_is_shown_in_the_profile() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("profiles")).unwrap();
    fs::write(directory.path().join("profiles/meter.yaml"), "points:\n  - { name: u, input_regster: 0 }\n").unwrap();
    let yaml = "modbus:
  - { name: bus, tcp: 'h:502', devices: [ { name: meter, profile: profiles/meter.yaml } ] }
";
    fs::write(directory.path().join("fieldgate.yaml"), yaml).unwrap();
    let text = load_in(directory.path()).unwrap_err();
    assert!(text.contains("--> profiles/meter.yaml:2:16"), "{text}");
    assert!(text.contains("did you mean `input_register`?") && !text.contains("missing"), "{text}");
}

#[test]
fn a_device_overrides_its_profile_and_a_point_both() {
    let directory = tempfile::tempdir().unwrap();
    let profile = "poll_interval: 5s
word_order: little
points:
  - { name: a, holding_register: 0, type: f32 }
  - { name: b, holding_register: 2, poll_interval: 30s }
  - { name: c, holding_register: 4 }
";
    fs::write(directory.path().join("meter.yaml"), profile).unwrap();
    let yaml = "modbus:
  - name: bus
    tcp: h:502
    devices:
      - { name: meter, profile: meter.yaml, poll_interval: 2s, points: [ { name: c, address: 40101 } ] }
";
    fs::write(directory.path().join("fieldgate.yaml"), yaml).unwrap();
    let loaded = load_in(directory.path()).unwrap();
    let points = &loaded.config.buses[0].devices[0].points;
    let seen: Vec<_> = points.iter().map(|p| (&*p.point.name, p.point.address, p.poll_interval.as_secs())).collect();
    assert_eq!(seen, [("a", 0, 2), ("b", 2, 30), ("c", 100, 2)]);
    assert_eq!(points[0].point.word_order, crate::proto::modbus::Order::Little);
}
