//! Adapter programs, as real child processes: what they publish, how they are commanded, how they end.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use fieldgate::field::process::{Adapter, Settings};
use fieldgate::observe::Health;
use serde_json::{Value as Json, json};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

use crate::{Gateway, PATIENCE, is_state};

/// Runs a shell script that has greeted already, unless `script` begins with `#!`, in a directory of its own.
fn start(script: &str, change: impl FnOnce(&mut Settings)) -> (Gateway, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("program");
    let greeting = r#"#!/bin/sh
read -r hello
echo '{"type":"hello","version":1}'
"#;
    let whole = if script.starts_with("#!") { script.to_owned() } else { format!("{greeting}{script}\n") };
    fs::write(&path, whole).unwrap();
    // Run by the shell rather than executed: a file that was just written may still be open in the child that
    // another test is forking, and Linux refuses to execute such a file.
    let mut settings = Settings::new("prog", vec!["/bin/sh".into(), path.into()]);
    settings.directory = Some(directory.path().to_owned());
    change(&mut settings);
    let gateway = Gateway::start(|exchange, stopped| {
        let adapter = Adapter::bind(settings, exchange).unwrap();
        (adapter.observe(), adapter.run(stopped))
    });
    (gateway, directory)
}

/// Whether a process runs; one that ended and was not yet reaped by its parent does not.
fn is_running(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    !matches!(state, None | Some('Z' | 'X'))
}

#[tokio::test]
async fn a_program_is_greeted_and_its_readings_are_published() {
    let script = r#"#!/bin/sh
read -r hello
echo "$hello" > hello
echo '{"type":"hello","version":1,"future":true}'
echo '{"type":"reading","device":"a","point":"t","value":21.5,"unit":"°C"}'
echo '{"type":"reading","device":"b","point":"s","value":null,"quality":"bad","reason":"broken wire"}'
echo '{"type":"health","device":"b","state":"degraded","reason":"one wire is broken"}'
echo "$SECRET$GIVEN" > environment
cat > /dev/null"#;
    let (mut gateway, directory) = start(script, |settings| {
        settings.devices = vec!["a".into(), "b".into()];
        settings.settings = json!({ "path": "/" });
        settings.environment = vec![("GIVEN".into(), "given".into())];
    });
    let reading = gateway.expect("devices/a/t", |_| true).await;
    assert_eq!(
        (&reading["value"], &reading["unit"], &reading["quality"]),
        (&json!(21.5), &json!("°C"), &json!("good"))
    );
    gateway.expect("devices/a/state", is_state("good")).await;
    let reading = gateway.expect("devices/b/s", |_| true).await;
    assert_eq!((&reading["quality"], &reading["reason"]), (&json!("bad"), &json!("broken wire")));
    let state = gateway.expect("devices/b/state", is_state("degraded")).await;
    assert_eq!(state["reason"], "one wire is broken");
    gateway.expect_good().await;
    gateway.stop().await;
    let hello: Json = serde_json::from_str(&fs::read_to_string(directory.path().join("hello")).unwrap()).unwrap();
    let expected = json!({
        "type": "hello", "version": 1, "name": "prog", "devices": ["a", "b"], "settings": { "path": "/" }
    });
    assert_eq!(hello, expected);
    assert_eq!(fs::read_to_string(directory.path().join("environment")).unwrap(), "given\n");
}

#[tokio::test]
async fn commands_are_answered_by_the_program_or_for_it() {
    // Answers the commands it gets in turn: done, refused, not at all; then it ends.
    let script = r#"
read -r command; echo "$command" > command
echo '{"type":"result","id":1,"ok":true,"value":22}'
read -r command
echo '{"type":"result","id":2,"ok":false,"error":"too warm"}'
read -r command
exit 3"#;
    let (mut gateway, directory) = start(script, |_| ());
    gateway.expect_good().await;
    gateway.command("devices/prog/target/set", "21.5").await;
    let answer = gateway.expect("devices/prog/target/set/result", |_| true).await;
    assert_eq!(answer, json!({ "ok": true, "value": 22 }));
    gateway.command("devices/prog/target/set", "99").await;
    let answer = gateway.expect("devices/prog/target/set/result", |_| true).await;
    assert_eq!(answer, json!({ "ok": false, "error": "too warm" }));
    gateway.command("devices/prog/target/set", "1").await;
    let answer = gateway.expect("devices/prog/target/set/result", |_| true).await;
    assert!(answer["error"].as_str().unwrap().contains("ended before it answered"), "{answer}");
    gateway.command("devices/prog/target/set", "2").await;
    let answer = gateway.expect("devices/prog/target/set/result", |_| true).await;
    assert_eq!(answer["ok"], false, "{answer}");
    assert_eq!(gateway.metric("fieldgate_program_commands_total"), 4.0);
    assert_eq!(gateway.metric("fieldgate_program_failed_commands_total"), 3.0);
    gateway.stop().await;
    let command: Json = serde_json::from_str(&fs::read_to_string(directory.path().join("command")).unwrap()).unwrap();
    let expected = json!({ "type": "command", "id": 1, "device": "prog", "point": "target", "value": 21.5 });
    assert_eq!(command, expected);
}

#[tokio::test]
async fn a_program_that_crashes_is_started_again_and_its_values_are_stale_until_then() {
    let script = r#"
echo '{"type":"reading","point":"n","value":1}'
echo 'out of luck' >&2
kill -9 $$"#;
    let (mut gateway, _directory) = start(script, |_| ());
    for _ in 0..2 {
        gateway.expect("devices/prog/n", |json| json["quality"] == "good").await;
        let state = gateway.expect("devices/prog/state", is_state("down")).await;
        let reason = state["reason"].as_str().unwrap();
        assert!(
            reason.contains("signal 9") && reason.contains("out of luck") && reason.contains("again in"),
            "{reason}"
        );
        gateway.expect("devices/prog/n", |json| json["quality"] == "stale").await;
    }
    gateway.stop().await;
}

#[tokio::test]
async fn a_program_that_refuses_its_settings_is_not_started_again() {
    let (gateway, directory) = start("echo starts >> starts; echo 'no such sensor' >&2; exit 78", |_| ());
    let reason = gateway.expect_status(|health, _| health == Health::Down).await;
    assert!(reason.contains("exit code 78") && reason.contains("no such sensor"), "{reason}");
    // Longer than the wait before a first restart.
    sleep(Duration::from_millis(1500)).await;
    assert_eq!(gateway.metric("fieldgate_program_starts_total"), 1.0);
    gateway.stop().await;
    assert_eq!(fs::read_to_string(directory.path().join("starts")).unwrap(), "starts\n");
}

#[tokio::test]
async fn a_program_that_is_done_is_run_again_at_its_interval_and_its_device_stays_good() {
    let script = r#"echo '{"type":"reading","point":"n","value":1}'"#;
    let (mut gateway, _directory) = start(script, |settings| settings.rerun_interval = Duration::from_millis(50));
    for _ in 0..3 {
        let reading = gateway.expect("devices/prog/n", |_| true).await;
        assert_eq!(reading["quality"], "good");
    }
    gateway.expect_good().await;
    gateway.stop().await;
}

#[tokio::test]
async fn a_program_that_cannot_run_or_does_not_keep_to_the_protocol_says_so() {
    let check = async |script: &str, program: Option<&str>, expected: &str| {
        let (gateway, _directory) = start(script, |settings| {
            if let Some(program) = program {
                settings.command = vec![program.into()];
            }
        });
        let reason = gateway.expect_status(|health, _| health == Health::Down).await;
        assert!(reason.contains(expected), "{reason}");
        gateway.stop().await;
    };
    check("", Some("/no/such/program"), "cannot be started").await;
    check("#!/bin/sh\necho '{\"type\":\"hello\",\"version\":2}'\ncat", None, "version 2").await;
    check("#!/bin/sh\necho '{\"type\":\"log\",\"message\":\"hi\"}'\ncat", None, "greeting").await;
}

#[tokio::test]
async fn lines_that_cannot_be_used_are_counted_and_the_others_are() {
    let script = r#"
echo 'Traceback (most recent call last)'
echo '{"type":"reading","device":"meter","point":"n","value":1}'
head -c 100000 /dev/zero | tr '\0' x; echo
echo '{"type":"future"}'
echo '{"type":"reading","point":"state","value":2}'
cat > /dev/null"#;
    let (mut gateway, _directory) = start(script, |_| ());
    gateway.expect("devices/prog/state_", |json| json["value"] == 2).await;
    assert_eq!(gateway.metric("fieldgate_program_ignored_lines_total"), 3.0);
    assert_eq!(gateway.metric("fieldgate_program_readings_total"), 1.0);
    gateway.stop().await;
}

#[tokio::test]
async fn a_flood_is_slowed_down_and_nothing_of_it_is_lost() {
    let script = r#"
i=0; while [ $i -lt 4000 ]; do i=$((i + 1)); echo "{\"type\":\"reading\",\"point\":\"n\",\"value\":$i}"; done
cat > /dev/null"#;
    let (mut gateway, _directory) = start(script, |_| ());
    let begun = std::time::Instant::now();
    let mut next = 1;
    while next <= 4000 {
        let message = timeout(PATIENCE, gateway.published.recv()).await.unwrap().unwrap();
        if message.topic.as_str() == "devices/prog/n" {
            let json: Json = serde_json::from_slice(&message.payload).unwrap();
            assert_eq!(json["value"], next);
            next += 1;
        }
    }
    assert!(begun.elapsed() > Duration::from_millis(1000), "2000 lines above the burst take time");
    assert_eq!(gateway.metric("fieldgate_program_slowed_total"), 1.0);
    gateway.stop().await;
}

#[tokio::test]
async fn a_flood_without_line_breaks_is_slowed_down_too() {
    let script = r#"
head -c 4000000 /dev/zero | tr '\0' x >&2
echo '{"type":"reading","point":"n","value":1}'
cat > /dev/null"#;
    let (mut gateway, _directory) = start(script, |_| ());
    let begun = std::time::Instant::now();
    gateway.expect("devices/prog/n", |_| true).await;
    assert!(begun.elapsed() > Duration::from_millis(1000), "1900 KiB above the burst take time");
    assert_eq!(gateway.metric("fieldgate_program_slowed_total"), 1.0);
    gateway.stop().await;
}

#[tokio::test]
async fn a_program_that_says_nothing_is_started_again() {
    let script = "echo x >> starts; exec sleep 1000";
    let (gateway, _directory) = start(script, |settings| settings.silent_after = Some(Duration::from_millis(100)));
    let reason = gateway.expect_status(|health, _| health == Health::Down).await;
    assert!(reason.contains("said nothing"), "{reason}");
    timeout(PATIENCE, async {
        while gateway.metric("fieldgate_program_starts_total") < 2.0 {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
    gateway.stop().await;
}

#[tokio::test]
async fn a_program_that_will_not_stop_is_killed_with_all_it_started() {
    let script = r#"
trap '' TERM INT HUP
sleep 1000 & echo $! > child; echo $$ > self
echo '{"type":"log","message":"ready"}'
while :; do sleep 1000; done"#;
    let (gateway, directory) = start(script, |_| ());
    let pids: Vec<PathBuf> = ["child", "self"].iter().map(|name| directory.path().join(name)).collect();
    timeout(PATIENCE, async {
        while pids.iter().any(|path| fs::read_to_string(path).is_ok_and(|pid| pid.is_empty()) || !path.exists()) {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
    let pids: Vec<String> = pids.iter().map(|path| fs::read_to_string(path).unwrap()).collect();
    assert!(pids.iter().all(|pid| is_running(pid)));
    let begun = std::time::Instant::now();
    gateway.stop().await;
    assert!(begun.elapsed() < Duration::from_secs(5));
    timeout(PATIENCE, async {
        while pids.iter().any(|pid| is_running(pid)) {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("nothing of the program is left");
}

#[tokio::test]
async fn a_program_ends_when_its_stdin_does() {
    let (gateway, directory) = start("cat > /dev/null; echo ended > ended", |_| ());
    gateway.expect_good().await;
    gateway.stop().await;
    assert_eq!(fs::read_to_string(directory.path().join("ended")).unwrap(), "ended\n");
}
