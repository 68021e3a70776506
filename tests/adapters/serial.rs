//! Serial devices, on real ptys: the demo's scale, its cable, and devices that misbehave.

use std::path::{Path, PathBuf};
use std::time::Duration;

use fieldgate::demo::scale::Scale;
use fieldgate::field::serial::{Adapter, CommandRule, Decode, Request, Settings};
use fieldgate::field::{SerialLine, codec};
use fieldgate::observe::{Health, Metrics};
use fieldgate::proto::serial::{Framing, ParseRule, PointRule, Template};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_serial::{SerialPort, SerialStream};

use crate::{Gateway, PATIENCE, is_state};

fn start(settings: Settings) -> Gateway {
    Gateway::start(|exchange, stopped| {
        let adapter = Adapter::bind(settings, exchange).unwrap();
        (adapter.observe(), adapter.run(stopped))
    })
}

fn settings(path: &Path, decode: Decode) -> Settings {
    Settings {
        name: "scale".into(),
        line: SerialLine::new(path, 9600),
        framing: Framing::Line { delimiters: vec![b"\n".to_vec()], max_length: 64 },
        decode,
        commands: Vec::new(),
        request: None,
        silent_after: None,
    }
}

fn number(point: &str) -> Decode {
    Decode::Parse(ParseRule::Number(PointRule::auto(point)))
}

fn demo_scale_codec() -> Decode {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("plugins/codecs/demo-scale.js");
    // Generous, because tests share the machine.
    let limits = codec::Limits { time: Duration::from_secs(5), ..codec::Limits::default() };
    Decode::Codec(codec::Settings { limits, ..codec::Settings::new(path) })
}

/// A pty: the device's end, the gateway's end held open, and its path.
fn pty() -> (SerialStream, SerialStream, PathBuf) {
    let (near, far) = SerialStream::pair().unwrap();
    let path = PathBuf::from(far.name().unwrap());
    (near, far, path)
}

#[tokio::test]
async fn the_demo_scale_is_read_and_tared_through_its_codec() {
    let (path, scale) = Scale::open().unwrap();
    let (stop, stopped) = watch::channel(false);
    let mut tasks = JoinSet::new();
    tasks.spawn(scale.run(stopped));
    let mut gateway = start(settings(&path, demo_scale_codec()));
    gateway.expect("devices/scale/state", is_state("good")).await;
    let weight = gateway.expect("devices/scale/weight", |json| json["quality"] == "good").await;
    assert_eq!(weight["unit"], "kg");
    gateway.expect("devices/scale/tared", |json| json["value"] == false).await;
    gateway.expect("devices/scale/weight", |json| json["value"].as_f64().is_some_and(|weight| weight > 1.0)).await;
    gateway.command("devices/scale/tare/set", "true").await;
    let answer = gateway.expect("devices/scale/tare/set/result", |_| true).await;
    assert_eq!(answer, json!({ "ok": true, "value": true }));
    gateway.expect("devices/scale/tared", |json| json["value"] == true).await;
    gateway.command("devices/scale/weight/set", "1").await;
    let answer = gateway.expect("devices/scale/weight/set/result", |_| true).await;
    assert!(answer["error"].as_str().unwrap().contains("takes the commands tare and zero"), "{answer}");
    gateway.stop().await;
    stop.send_replace(true);
    tasks.join_next().await.unwrap().unwrap().unwrap();
    assert!(!path.exists() && !path.parent().unwrap().exists());
}

#[tokio::test]
async fn a_port_that_goes_away_and_comes_back_is_used_again() {
    let (path, scale) = Scale::open().unwrap();
    let cable = scale.cable();
    let (_stop, stopped) = watch::channel(false);
    let mut tasks = JoinSet::new();
    tasks.spawn(scale.run(stopped));
    let pattern = r"^(?<stability>ST|US),GS,(?<weight>[+-][\d.]+)kg$".to_owned();
    let mut gateway = start(settings(&path, Decode::Parse(ParseRule::Regex { pattern, points: Vec::new() })));
    for _ in 0..3 {
        gateway.expect("devices/scale/weight", |json| json["quality"] == "good").await;
        cable.unplug();
        let state = gateway.expect("devices/scale/state", is_state("down")).await;
        assert!(state["reason"].as_str().unwrap().contains("went away"), "{state}");
        let stale = gateway.expect("devices/scale/weight", |json| json["quality"] == "stale").await;
        assert!(stale["value"].is_number());
        gateway.command("devices/scale/tare/set", "1").await;
        let answer = gateway.expect("devices/scale/tare/set/result", |_| true).await;
        assert_eq!(answer["ok"], false);
        assert_eq!(gateway.observe.statuses()[0].health, Health::Down);
        cable.replug();
        gateway.expect("devices/scale/state", is_state("good")).await;
    }
    assert_eq!(gateway.observe.statuses()[0].health, Health::Good);
    gateway.stop().await;
}

#[tokio::test]
async fn a_port_that_is_not_there_at_the_start_is_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("port");
    let mut gateway = start(settings(&path, number("value")));
    let state = gateway.expect("devices/scale/state", is_state("down")).await;
    assert!(state["reason"].as_str().unwrap().contains("port"), "{state}");
    let (mut near, _far, real) = pty();
    std::os::unix::fs::symlink(real, &path).unwrap();
    let talk = async {
        loop {
            near.write_all(b"42\r\n").await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::select! {
        () = talk => {}
        json = gateway.expect("devices/scale/value", |_| true) => assert_eq!(json["value"], 42.0),
    }
    gateway.stop().await;
}

#[tokio::test]
async fn commands_are_written_as_their_template_says() {
    let (mut near, _far, path) = pty();
    let template = |text: &str| Template::parse(text).unwrap();
    let commands = vec![
        CommandRule { point: "target".into(), template: template("T{value:.1}\r\n") },
        CommandRule { point: "label".into(), template: template("L{value}\r\n") },
    ];
    let mut gateway = start(Settings { commands, ..settings(&path, number("value")) });
    gateway.command("devices/scale/target/set", "21").await;
    let mut read = [0; 7];
    timeout(PATIENCE, near.read_exact(&mut read)).await.unwrap().unwrap();
    assert_eq!(&read, b"T21.0\r\n");
    assert_eq!(gateway.expect("devices/scale/target/set/result", |_| true).await["ok"], true);
    let cases = [
        ("label", r#""a\r\nT99""#, "control character"),
        ("target", "warm", "not a number"),
        ("weight", "1", "what can be set is target, label"),
    ];
    for (point, payload, expected) in cases {
        gateway.command(&format!("devices/scale/{point}/set"), payload).await;
        let answer = gateway.expect(&format!("devices/scale/{point}/set/result"), |_| true).await;
        assert!(answer["error"].as_str().unwrap().contains(expected), "{answer}");
    }
    gateway.stop().await;
}

#[tokio::test]
async fn frames_that_cannot_be_read_are_counted_and_the_last_one_is_shown() {
    let (mut near, _far, path) = pty();
    let mut gateway = start(settings(&path, number("value")));
    gateway.expect_good().await;
    near.write_all(b"1\r\nE1\r\n").await.unwrap();
    gateway.expect("devices/scale/value", |json| json["value"] == 1.0).await;
    near.write_all(b"2\r\nE2\r\nE3\r\n").await.unwrap();
    gateway.expect("devices/scale/value", |json| json["value"] == 2.0).await;
    near.write_all(&[b'x'; 100]).await.unwrap();
    near.write_all(b"\r\n\xFF\x00E4\r\n").await.unwrap();
    let state = gateway.expect("devices/scale/state", is_state("degraded")).await;
    assert!(state["reason"].as_str().unwrap().contains("cannot be read"), "{state}");
    near.write_all(b"3\n").await.unwrap();
    gateway.expect("devices/scale/value", |json| json["value"] == 3.0).await;
    gateway.expect("devices/scale/state", is_state("good")).await;
    let device = gateway.observe.statuses().remove(1);
    let fact = |label: &str| device.facts.iter().find(|fact| fact.0 == label).unwrap().1.clone();
    assert_eq!(fact("Unreadable frames"), "4");
    assert!(fact("Last unreadable").starts_with("ff 00 45 34 ("), "{:?}", device.facts);
    let mut metrics = Metrics::default();
    gateway.observe.collect(&mut metrics);
    let metrics = metrics.render();
    for line in [
        "frames_total{adapter=\"scale\"} 7",
        "unreadable_frames_total{adapter=\"scale\"} 4",
        "overlong_frames_total{adapter=\"scale\"} 1",
    ] {
        assert!(metrics.contains(&format!("fieldgate_serial_{line}\n")), "{line} in\n{metrics}");
    }
    gateway.stop().await;
}

#[tokio::test]
async fn a_device_that_speaks_when_asked_is_asked_and_missed() {
    let (mut near, _far, path) = pty();
    let ms = Duration::from_millis;
    let request = Request { bytes: b"?\r".to_vec(), interval: ms(20), timeout: ms(50) };
    let mut gateway = start(Settings { request: Some(request), ..settings(&path, number("value")) });
    let mut read = [0; 2];
    for answer in ["7\n", "8\n"] {
        timeout(PATIENCE, near.read_exact(&mut read)).await.unwrap().unwrap();
        assert_eq!(&read, b"?\r");
        near.write_all(answer.as_bytes()).await.unwrap();
    }
    gateway.expect("devices/scale/value", |json| json["value"] == 8.0).await;
    let state = gateway.expect("devices/scale/state", is_state("down")).await;
    assert!(state["reason"].as_str().unwrap().contains("does not answer"), "{state}");
    gateway.expect("devices/scale/value", |json| json["quality"] == "stale").await;
    near.write_all(b"9\n").await.unwrap();
    gateway.expect("devices/scale/state", is_state("good")).await;
    gateway.stop().await;
}

#[tokio::test]
async fn a_device_that_falls_silent_is_down() {
    let (mut near, _far, path) = pty();
    let silent_after = Some(Duration::from_millis(300));
    let mut gateway = start(Settings { silent_after, ..settings(&path, number("value")) });
    gateway.expect("devices/scale/state", is_state("down")).await;
    near.write_all(b"5\n").await.unwrap();
    gateway.expect("devices/scale/state", is_state("good")).await;
    let state = gateway.expect("devices/scale/state", is_state("down")).await;
    assert!(state["reason"].as_str().unwrap().contains("sends nothing"), "{state}");
    gateway.stop().await;
}

#[tokio::test]
async fn a_port_has_one_owner() {
    let (_near, _far, path) = pty();
    let gateway = start(settings(&path, number("value")));
    gateway.expect_good().await;
    let error = SerialLine::new(&path, 9600).open().unwrap_err();
    assert!(error.to_string().contains("another program holds it"), "{error}");
    gateway.stop().await;
    SerialLine::new(&path, 9600).open().unwrap();
}

#[tokio::test]
async fn an_adapter_stops_though_its_codec_takes_its_time_over_many_frames() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("slow.js");
    std::fs::write(&path, "function decodeUplink() { for (;;) {} }").unwrap();
    let limits = codec::Limits { time: Duration::from_millis(200), ..codec::Limits::default() };
    let decode = Decode::Codec(codec::Settings { limits, ..codec::Settings::new(path) });
    let (mut near, _far, port) = pty();
    let mut gateway = start(settings(&port, decode));
    gateway.expect_good().await;
    // Two hundred frames of 200 ms each.
    near.write_all(&b"x\n".repeat(200)).await.unwrap();
    gateway.expect("devices/scale/state", is_state("degraded")).await;
    let begun = std::time::Instant::now();
    gateway.stop().await;
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn a_codec_that_loops_costs_its_frame_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("loops.js");
    let source =
        "function decodeUplink(i) { while (i.bytes[0] === 76) {} return { data: { first: i.bytes[0], state: 'x' } } }";
    std::fs::write(&path, source).unwrap();
    let limits = codec::Limits { time: Duration::from_millis(500), ..codec::Limits::default() };
    let (mut near, _far, port) = pty();
    let mut gateway = start(settings(&port, Decode::Codec(codec::Settings { limits, ..codec::Settings::new(path) })));
    gateway.expect_good().await;
    near.write_all(b"A\nL\n").await.unwrap();
    gateway.expect("devices/scale/first", |json| json["value"] == 65).await;
    let state = gateway.expect("devices/scale/state", is_state("degraded")).await;
    assert!(state["reason"].as_str().unwrap().contains("loops.js: the script ran longer than 500 ms"), "{state}");
    near.write_all(b"B\n").await.unwrap();
    gateway.expect("devices/scale/first", |json| json["value"] == 66).await;
    // A point may not take the name of the device's health.
    gateway.expect("devices/scale/state_", |json| json["value"] == "x").await;
    gateway.stop().await;
}
