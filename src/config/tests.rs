//! Wrong configurations and what is said about them.

use std::fs;

use proptest::prelude::*;

use super::report::Look;
use super::*;
use crate::hub::{Order, Priority};

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
fn a_server_that_has_moved_says_where_to() {
    check(
        "listeners:\n  - { name: a, address: \"127.0.0.1:1883\", server_moved: true }\n",
        "
error: `server_moved` does not say where to
 --> fieldgate.yaml:2:43
  |
2 |   - { name: a, address: \"127.0.0.1:1883\", server_moved: true }
  |                                           ^^^^^^^^^^^^
  |
  = help: add `server_reference: HOST:PORT`",
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

#[test]
fn listeners_that_would_share_a_port_are_shown_with_both_lines() {
    check(
        "listeners:
  - { name: a, address: 127.0.0.1:1883 }
  - { name: a, address: 0.0.0.0:1883 }
web: { address: 127.0.0.1:1883 }
allow_anonymous: always
",
        "
error: two listeners are named `a`
 --> fieldgate.yaml:3:13
  |
2 |   - { name: a, address: 127.0.0.1:1883 }
  |             - first
3 |   - { name: a, address: 0.0.0.0:1883 }
  |             ^ second
  |
  = help: give each its own name

error: 0.0.0.0:1883 has two owners
 --> fieldgate.yaml:3:25
  |
2 |   - { name: a, address: 127.0.0.1:1883 }
  |                         -------------- owned by listener `a`
3 |   - { name: a, address: 0.0.0.0:1883 }
  |                         ^^^^^^^^^^^^ also wanted by listener `a`
  |
  = help: give each its own port

error: 127.0.0.1:1883 has two owners
 --> fieldgate.yaml:4:8
  |
2 |   - { name: a, address: 127.0.0.1:1883 }
  |                         -------------- owned by listener `a`
3 |   - { name: a, address: 0.0.0.0:1883 }
4 | web: { address: 127.0.0.1:1883 }
  |        ^^^^^^^ also wanted by the web UI
  |
  = help: give each its own port",
    );
}

#[test]
fn a_gateway_open_to_the_network_without_users_is_not_meant() {
    check(
        "listeners: [ { name: all, address: 0.0.0.0:1883 } ]\nweb: { address: 0.0.0.0:8080 }\n",
        "
warning: there are no users, so clients on other machines will be refused
 --> fieldgate.yaml:1:36
  |
1 | listeners: [ { name: all, address: 0.0.0.0:1883 } ]
  |                                    ^^^^^^^^^^^^
  |
  = help: add `users:` (see `fieldgate passwd`), or `allow_anonymous: always` in a network you trust

error: the web UI would be open to the network, and there are no users
 --> fieldgate.yaml:2:8
  |
2 | web: { address: 0.0.0.0:8080 }
  |        ^^^^^^^
  |
  = help: add `users:` (see `fieldgate passwd`), or listen on 127.0.0.1",
    );
}

#[test]
fn a_wrong_line_in_a_file_of_mosquitto_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
    write("fieldgate.yaml", "password_file: passwords\nacl_file: rules\n");
    let check = |passwords: &str, rules: &str, parts: &[&str]| {
        write("passwords", passwords);
        write("rules", rules);
        let text = load_in(directory.path()).unwrap_err();
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        assert!(!text.contains("hunter2"), "{text}");
    };
    check(
        "# people\nann:hunter2\n",
        "user ann\ntopics a\n",
        &["passwords:2: what follows", "rules:2: `topics` is unknown"],
    );
    check("", "# nothing\n", &["rules holds no rule"]);
}

#[test]
fn a_rule_for_a_user_that_does_not_exist_is_wrong_and_so_is_a_password_for_a_hash() {
    check(
        "users: [ { name: operator, password_hash: hunter2 } ]\nacl: [ { user: operater, read: 'a/#/b' } ]\n",
        "
error: `password_hash` cannot be used
 --> fieldgate.yaml:1:43
  |
1 | users: [ { name: operator, password_hash: ******* } ]
  |                                           ^^^^^^^ must be an argon2 hash; `fieldgate passwd` makes one

error: there is no user `operater`
 --> fieldgate.yaml:2:16
  |
2 | acl: [ { user: operater, read: 'a/#/b' } ]
  |                ^^^^^^^^ did you mean `operator`?

error: `read` must be a topic filter that may hold `%u` and `%c`
 --> fieldgate.yaml:2:32
  |
2 | acl: [ { user: operater, read: 'a/#/b' } ]
  |                                ^^^^^^^ `#` must be the last level of a topic filter",
    );
}

#[test]
fn a_secret_is_not_shown_even_where_its_key_is_misspelt() {
    let yaml = "upstreams: [ { name: c, url: mqtts://h, pasword: hunter2, usrname: x, out: [ { filter: '#' } ] } ]\n";
    let text = load_text(yaml.as_bytes()).unwrap_err();
    assert!(text.contains("did you mean `password`?") && text.contains("did you mean `username`?"), "{text}");
    assert!(!text.contains("hunter2"), "{text}");
}

#[test]
fn a_login_in_an_address_is_not_shown() {
    let yaml = "upstreams: [ { name: c, url: 'mqtts://anna:hunter2@host/p@th', out: [ { filter: '#' } ] } ]\n";
    let text = load_text(yaml.as_bytes()).unwrap_err();
    assert!(
        text.contains("mqtts://************@host/p@th") && text.contains("use `username` and `password`"),
        "{text}"
    );
}

#[test]
fn of_a_text_that_is_no_yaml_what_may_be_secret_is_not_shown() {
    check(
        "upstreams:\n  - name: c\n    Password: hunter2: x\n",
        "
error: not valid YAML: mapping values are not allowed in this context
 --> fieldgate.yaml:3:22
  |
3 |     Password:***********
  |                      ^
  |
  = help: check the indentation; a value that contains `: ` needs quotes",
    );
}

#[test]
fn brackets_that_do_not_fit_are_told_of() {
    let check = |yaml: &str, expected: &str| {
        let text = load_text(yaml.as_bytes()).unwrap_err();
        assert!(text.contains(expected), "{text}");
    };
    check("web: { address: ${ADDRESS} }\n", "between brackets `${VARIABLE}` and values with `,` need quotes");
    check("a: [1\nb: 2\n", "is a `[` or a `{` before this not closed?");
}

#[test]
fn where_a_table_belongs_its_keys_are_named() {
    check(
        "upstreams: [ { name: c, url: 'mqtts://h', max_rate: 100, out: [ { filter: '#' } ] } ]\n",
        "
error: expected a table of keys, found a single value
 --> fieldgate.yaml:1:53
  |
1 | upstreams: [ { name: c, url: 'mqtts://h', max_rate: 100, out: [ { filter: '#' } ] } ]
  |                                                     ^^^
  |
  = help: write `key: value` lines, indented under it; `fieldgate keys upstreams.max_rate` explains them",
    );
}

#[test]
fn abbreviations_stay_as_they_are_in_the_middle_of_a_sentence() {
    let text =
        load_text(b"listeners: [ { name: t, address: '127.0.0.1:8883', tls: { certificate: a.pem } } ]\n").unwrap_err();
    assert!(text.contains("it stands in: PEM file with"), "{text}");
}

#[test]
fn priorities_shares_and_rates_are_checked() {
    check(
        "upstreams:
  - name: a
    url: mqtts://h
    live_share: 50
    max_rate: { messages: 0 }
    out: [ { filter: a, priority: urgent }, { filter: b, live_share: 101% } ]
    in: [ { filter: c, priority: low } ]
",
        "
error: `live_share` must be a percentage, as in `50%`
 --> fieldgate.yaml:4:17
  |
4 |     live_share: 50
  |                 ^^

error: `messages` is out of range
 --> fieldgate.yaml:5:27
  |
5 |     max_rate: { messages: 0 }
  |                           ^ must be from 1 to 4294967295

error: `priority` must be one of `high`, `normal`, `low`
 --> fieldgate.yaml:6:35
  |
6 |     out: [ { filter: a, priority: urgent }, { filter: b, live_share: 101% } ]
  |                                   ^^^^^^

error: `live_share` must be a percentage, as in `50%`
 --> fieldgate.yaml:6:70
  |
6 |     out: [ { filter: a, priority: urgent }, { filter: b, live_share: 101% } ]
  |                                                                      ^^^^ it must be from 0% to 100%

error: unknown key `priority` in `upstreams[].in[]`
 --> fieldgate.yaml:7:24
  |
7 |     in: [ { filter: c, priority: low } ]
  |                        ^^^^^^^^
  |
  = help: the keys in `upstreams[].in[]` are `filter`, `qos`, `retain`, `local_prefix`, `remote_prefix`, `local_topic`, `message_expiry`, `user_properties`",
    );
    let clash = "upstreams:
  - name: a
    url: mqtts://h
    live_share: 30%
    out: [ { filter: a }, { filter: b, live_share: 0% }, { filter: c, priority: low, live_share: 60% },
           { filter: d, live_share: 40% } ]
";
    let text = load_text(clash.as_bytes()).unwrap_err();
    assert!(text.contains("rule 4 of `out` has the live share 40%, another one of its priority 30%"), "{text}");
    let yaml = "upstreams:
  - name: a
    url: mqtts://h
    live_share: 30%
    max_rate: { messages: 100, bytes: 64KiB }
    out: [ { filter: a }, { filter: b, live_share: 0%, priority: high } ]
";
    let upstream = load_text(yaml.as_bytes()).unwrap().config.upstreams.remove(0);
    assert_eq!((upstream.max_rate.messages.unwrap().get(), upstream.max_rate.bytes.unwrap().get()), (100, 65_536));
    let orders = [0, 1].map(|rule| upstream.precedence(rule)).map(|it| (it.rank, it.priority, it.order));
    assert_eq!(orders, [(0, Priority::Normal, Order::LiveBeside), (1, Priority::High, Order::Strict)]);
}

#[test]
fn a_rule_has_prefixes_or_a_template_and_names_the_level_that_is_not_there() {
    check(
        "upstreams:
  - name: a
    url: mqtts://h
    out: [ { filter: a/+, remote_topic: 'b/{1}', remote_prefix: c/ }, { filter: a/+, remote_topic: 'b/{2}' } ]
",
        "
error: `remote_topic` and `remote_prefix` exclude each other
 --> fieldgate.yaml:4:50
  |
4 |     out: [ { filter: a/+, remote_topic: 'b/{1}', remote_prefix: c/ }, { filter: a/+, remote_topic: 'b/{2}' } ]
  |                           ------------           ^^^^^^^^^^^^^
  |                           |
  |                           also given
  |
  = help: keep one of them

error: this rule cannot work
 --> fieldgate.yaml:4:81
  |
4 |     out: [ { filter: a/+, remote_topic: 'b/{1}', remote_prefix: c/ }, { filter: a/+, remote_topic: 'b/{2}' } ]
  |                                                                                 ^^^ the filter has 1 `+`, so there is no {2}
",
    );
}

#[test]
fn an_upstream_says_what_cannot_work() {
    check(
        "upstreams:
  - { name: a, url: ssl://h, out: [ { filter: '#', remote_prefix: plant } ] }
  - { name: b, url: mqtts://h }
  - { name: c, url: mqtts://h, password: x, version: 3.1.1, out: [ { filter: '#' } ], tls: { key: k.pem } }
",
        "
error: `url` must be `mqtts://HOST[:PORT]`, `wss://HOST[:PORT]/PATH` or, unencrypted, `mqtt://…`, `ws://…`
 --> fieldgate.yaml:2:21
  |
2 |   - { name: a, url: ssl://h, out: [ { filter: '#', remote_prefix: plant } ] }
  |                     ^^^^^^^ write `mqtts://` in place of `ssl://`

error: this rule cannot work
 --> fieldgate.yaml:2:47
  |
2 |   - { name: a, url: ssl://h, out: [ { filter: '#', remote_prefix: plant } ] }
  |                                               ^^^ the prefix `plant` must end with `/` before a filter that begins with a wildcard

warning: this upstream forwards nothing
 --> fieldgate.yaml:3:13
  |
3 |   - { name: b, url: mqtts://h }
  |             ^
  |
  = help: add `out: [ { filter: \"#\" } ]` or another rule

error: `key` needs its `certificate`
 --> fieldgate.yaml:4:94
  |
4 |   - { name: c, url: mqtts://h, password: *, version: 3.1.1, out: [ { filter: '#' } ], tls: { key: k.pem } }
  |                                                                                              ^^^",
    );
}

#[test]
fn what_one_upstream_lacks_is_a_warning_and_the_gateway_starts() {
    let yaml = "upstreams: [ { name: c, url: mqtts://h, out: [ { filter: '#' } ], tls: { ca: /no/such.pem }, \
                queue: { max_bytes: 5GiB } } ]";
    let reports = load_text(yaml.as_bytes()).unwrap().warnings.reports;
    let said: Vec<_> = reports.iter().map(|report| (report.message.as_str(), report.label.as_str())).collect();
    assert!(said[0].0.contains("TLS files") && said[0].1.starts_with("cannot read /no/such.pem"), "{said:?}");
    assert_eq!(said[1], ("this queue may get larger than the database that keeps it", "`max_bytes` is 5GiB"));
    assert_eq!(reports[1].help.as_deref(), Some("raise `store.max_size`, which is 1GiB, or lower it"));
}

#[test]
fn a_word_of_which_nothing_is_left_is_no_slip() {
    let known = ["0", "1", "newest"];
    let meant = ["3", "newst", "x"].map(|given| super::words::did_you_mean(given, &known));
    assert_eq!(meant, [None, Some("newest"), None]);
}

#[test]
fn the_longest_wait_between_attempts_is_not_below_the_shortest() {
    let load = |backoff: &str| {
        load_text(
            format!(
                "upstreams: [ {{ name: c, url: mqtts://h, out: [ {{ filter: '#' }} ], backoff: {{ {backoff} }} }} ]"
            )
            .as_bytes(),
        )
    };
    let settings = load("base: 2m").unwrap().config.upstreams.remove(0);
    assert_eq!((settings.backoff.base.as_secs(), settings.backoff.cap.as_secs()), (120, 120));
    let text = load("base: 1m, cap: 1s").unwrap_err();
    assert!(text.contains("`cap` is out of range"), "{text}");
}

#[test]
fn aliases_may_repeat_values_but_not_without_end() {
    let shared = "x: &line { baud_rate: 2400 }\n";
    let text = load_text(shared.as_bytes()).unwrap_err();
    assert!(text.contains("unknown key `x`"), "{text}");
    let mut laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..9 {
        let below = format!("*a{}, ", level - 1).repeat(10);
        laughs.push_str(&format!("a{level}: &a{level} [{below}]\n"));
    }
    let text = load_text(laughs.as_bytes()).unwrap_err();
    assert!(text.contains("more than 100000 values"), "{text}");
}

#[test]
fn a_file_that_is_no_text_is_said_with_its_line() {
    let text = load_text(b"log: {}\nx: \xff\n").unwrap_err();
    assert!(text.contains("fieldgate.yaml: line 2 is not UTF-8 text"), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_damage_to_the_sample_panics_the_reader(
        cuts in proptest::collection::vec((any::<prop::sample::Index>(), 0..40_usize, "[-\\[\\]{}:&*!|>'\"#%@a0 \n]{0,3}"), 1..6),
    ) {
        let mut text = include_str!("../../config/fieldgate.yaml").to_owned();
        for (place, length, insert) in cuts {
            let start = text.floor_char_boundary(place.index(text.len().max(1)));
            let end = text.ceil_char_boundary((start + length).min(text.len()));
            text.replace_range(start..end, &insert);
        }
        let _ = load_text(text.as_bytes());
    }
}
