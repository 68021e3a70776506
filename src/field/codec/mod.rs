//! Payload codecs: JavaScript that turns a device's bytes into values and values into its bytes.
//!
//! The signature is the one LoRaWAN device makers publish (The Things Stack, ChirpStack v4: `decodeUplink(input)`,
//! `encodeDownlink(input)`), so their files work as they are. Each [`Codec`] has a thread of its own, because a script
//! may compute up to its time limit; a script that misbehaves spoils its own readings only. See `plugins/README.md`.

mod script;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use serde::Serialize;
use serde_json::Value as Json;
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};
use tracing::warn;

use crate::clock::UnixMillis;
use crate::field::device::to_json as to_json_value;
use crate::observe::Metrics;
use crate::proto::serial::{MAX_COMMAND_BYTES, PointValue, flatten};
use crate::reading::Value;
use script::{Entry, GRACE, Script};

/// The largest script file in bytes. The largest ones device makers publish have about 100 KiB.
const MAX_SCRIPT_BYTES: u64 = 1024 * 1024;

/// The most bytes a script is given; each takes several times that in the script's memory.
const MAX_UPLINK_BYTES: usize = 64 * 1024;

/// Calls that may wait for a codec's thread; more callers wait in line before they get in.
const INBOX_CALLS: usize = 16;

/// What a script needs of the thread's stack beside its own limit: the engine's and this crate's frames.
const THREAD_STACK_MARGIN_BYTES: usize = 512 * 1024;

/// How many warnings and errors of one call are passed on, and how long each may be.
const MAX_REMARKS: usize = 8;
const MAX_REMARK_CHARS: usize = 300;

/// The longest unit a script may give a point, in bytes.
const MAX_UNIT_BYTES: usize = 32;

/// Which script, and what it may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub path: PathBuf,
    /// What the script finds as `input.fPort`, for scripts that tell messages apart by LoRaWAN's port.
    pub port: u8,
    pub limits: Limits,
}

impl Settings {
    pub const DEFAULT_PORT: u8 = 1;

    /// The script at `path`, with what most scripts need.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), port: Self::DEFAULT_PORT, limits: Limits::default() }
    }
}

/// What one call of a script may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    pub time: Duration,
    pub memory_bytes: usize,
    pub stack_bytes: usize,
}

impl Default for Limits {
    /// 100 ms, 8 MiB, 256 KiB: a hundred times what a decoder of a few dozen bytes takes on a small computer.
    fn default() -> Self {
        Self { time: Duration::from_millis(100), memory_bytes: 8 * 1024 * 1024, stack_bytes: 256 * 1024 }
    }
}

/// A loaded script on its thread. Clones share it; the thread ends with the last one.
#[derive(Clone, Debug)]
pub struct Codec(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    can_encode: bool,
    port: u8,
    limits: Limits,
    /// `None` only while it is being dropped.
    inbox: Option<mpsc::Sender<Call>>,
    thread: Option<JoinHandle<()>>,
    /// Closed when the thread ends.
    ended: std::sync::Mutex<std::sync::mpsc::Receiver<()>>,
    stopping: Arc<AtomicBool>,
    running: Running,
    counts: Counts,
}

/// Since when the thread has been in a call.
#[derive(Clone, Debug, Default)]
struct Running(Arc<Mutex<Option<Instant>>>);

#[derive(Debug, Default)]
struct Counts {
    calls: AtomicU64,
    failed: AtomicU64,
    busy_micros: AtomicU64,
}

/// What a device sent.
#[derive(Clone, Debug)]
pub struct Uplink {
    pub bytes: Bytes,
    pub received_at: UnixMillis,
    pub device: Arc<str>,
    /// The topic the bytes were published on, where they came that way.
    pub topic: Option<Arc<str>>,
}

/// What a script made of an uplink.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decoded {
    pub values: Vec<PointValue>,
    /// Values left out because they were too deep, too long or too many.
    pub dropped: usize,
    pub warnings: Vec<String>,
}

/// Why a script could not be loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    #[error("cannot read the codec {}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("the codec {} is larger than {MAX_SCRIPT_BYTES} bytes", .0.display())]
    TooLarge(PathBuf),
    #[error("the codec {} does not load", path.display())]
    Script { path: PathBuf, source: CodecError },
    #[error("the codec {} has no function decodeUplink(input) {{ … return {{ data: {{ … }} }} }}", .0.display())]
    NoDecoder(PathBuf),
    #[error("cannot start a thread for the codec {}", path.display())]
    Thread { path: PathBuf, source: std::io::Error },
}

/// Why a call of a script gave nothing.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CodecError {
    #[error("{place}: {message}")]
    Threw { place: String, message: String },
    #[error("the script ran longer than {} ms and was stopped", .0.as_millis())]
    Time(Duration),
    #[error("the script used more memory than it may")]
    Memory,
    #[error("{0}: the script called itself too deeply")]
    Stack(String),
    #[error("the script has no function {0}(input)")]
    NoFunction(&'static str),
    #[error("the script reported: {0}")]
    Reported(String),
    #[error("{function} must return {expected}, not {found}")]
    WrongType { function: &'static str, expected: &'static str, found: String },
    #[error("{0} bytes are more than a codec is given; the most is {MAX_UPLINK_BYTES}")]
    InputTooLarge(usize),
    #[error("the script returned more than it may")]
    OutputTooLarge,
    #[error("the script hangs in a built-in function, which cannot be stopped; its readings are lost until it returns")]
    Stuck,
}

impl CodecError {
    /// Whether the script was stopped, rather than that it did not like its input: a person must look at it.
    pub fn is_limit(&self) -> bool {
        !matches!(self, Self::Threw { .. } | Self::Reported(_) | Self::InputTooLarge(_))
    }
}

struct Call {
    entry: Entry,
    input: String,
    answer: oneshot::Sender<Result<String, CodecError>>,
}

impl Codec {
    /// Reads a script, starts its thread and runs the script's top level once. Blocks for as long as that takes.
    ///
    /// # Errors
    /// [`LoadError`] where the file cannot be read, does not parse (with its line), or has no `decodeUplink`.
    pub fn load(settings: &Settings) -> Result<Self, LoadError> {
        let source = read_script(&settings.path)?;
        Self::from_source(settings, source)
    }

    fn from_source(settings: &Settings, source: String) -> Result<Self, LoadError> {
        let Settings { path, port, limits } = settings;
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        let stopping = Arc::new(AtomicBool::new(false));
        let (inbox, calls) = mpsc::channel(INBOX_CALLS);
        let (loaded, waiting) = std::sync::mpsc::sync_channel(1);
        let (ending, ended) = std::sync::mpsc::sync_channel::<()>(1);
        let running = Running::default();
        let (file, own_limits, stop, run) = (name.clone(), limits.clone(), stopping.clone(), running.clone());
        let thread = thread::Builder::new()
            .name("codec".into())
            .stack_size(limits.stack_bytes + THREAD_STACK_MARGIN_BYTES)
            .spawn(move || {
                let _ending = ending;
                let mut script = Script::new(file, source, own_limits, stop);
                let result = script
                    .has(Entry::DecodeUplink)
                    .and_then(|decodes| Ok((decodes, script.has(Entry::EncodeDownlink)?)));
                let works = result.is_ok();
                if loaded.send(result).is_ok() && works {
                    serve(&mut script, calls, &run);
                }
            })
            .map_err(|source| LoadError::Thread { path: path.clone(), source })?;
        let result = waiting.recv_timeout(limits.time * 2 + GRACE).unwrap_or(Err(CodecError::Stuck));
        let (decodes, can_encode) = result.map_err(|source| LoadError::Script { path: path.clone(), source })?;
        let codec = Self(Arc::new(Inner {
            name,
            can_encode,
            port: *port,
            limits: limits.clone(),
            inbox: Some(inbox),
            thread: Some(thread),
            ended: std::sync::Mutex::new(ended),
            stopping,
            running,
            counts: Counts::default(),
        }));
        if decodes { Ok(codec) } else { Err(LoadError::NoDecoder(path.clone())) }
    }

    /// The script's file name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Whether the script has an `encodeDownlink`.
    pub fn can_encode(&self) -> bool {
        self.0.can_encode
    }

    /// Makes values of what a device sent.
    ///
    /// # Errors
    /// [`CodecError`] where the script threw, reported errors, hit a limit or returned something else than an object
    /// `data`.
    pub async fn decode(&self, uplink: &Uplink) -> Result<Decoded, CodecError> {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Input<'a> {
            bytes: &'a [u8],
            f_port: u8,
            recv_time: String,
            device: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            topic: Option<&'a str>,
            variables: Json,
        }
        if uplink.bytes.len() > MAX_UPLINK_BYTES {
            return Err(CodecError::InputTooLarge(uplink.bytes.len()));
        }
        let input = to_json(&Input {
            bytes: &uplink.bytes,
            f_port: self.0.port,
            recv_time: uplink.received_at.to_string(),
            device: &uplink.device,
            topic: uplink.topic.as_deref(),
            variables: Json::Object(serde_json::Map::new()),
        });
        self.counted(async { read_decoded(&self.call(Entry::DecodeUplink, input).await?) }).await
    }

    /// Makes the bytes that tell a device to set `point` to `value`.
    ///
    /// # Errors
    /// [`CodecError`], as [`Codec::decode`]; the script returns `{ bytes: [0…255, …] }`.
    pub async fn encode(&self, device: &str, point: &str, value: &Value) -> Result<Vec<u8>, CodecError> {
        let input = serde_json::json!({ "data": { point: to_json_value(value) }, "fPort": self.0.port, "device": device, "variables": {} });
        self.counted(async { read_encoded(&self.call(Entry::EncodeDownlink, input.to_string()).await?) }).await
    }

    /// Adds this codec's metrics to a scrape.
    pub fn collect(&self, metrics: &mut Metrics) {
        let labels = [("codec", self.name())];
        let counts = &self.0.counts;
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        metrics.counter("fieldgate_codec_calls_total", "Calls of a payload codec.", &labels, load(&counts.calls));
        let help = "Calls of a payload codec that gave no values: it threw, reported errors or hit a limit.";
        metrics.counter("fieldgate_codec_failed_calls_total", help, &labels, load(&counts.failed));
        let seconds = load(&counts.busy_micros) as f64 / 1e6;
        metrics.gauge("fieldgate_codec_busy_seconds", "Time callers waited for a payload codec.", &labels, seconds);
    }

    async fn counted<T>(&self, call: impl Future<Output = Result<T, CodecError>>) -> Result<T, CodecError> {
        let begun = Instant::now();
        let result = call.await;
        let counts = &self.0.counts;
        counts.calls.fetch_add(1, Ordering::Relaxed);
        counts.failed.fetch_add(u64::from(result.is_err()), Ordering::Relaxed);
        let micros = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        counts.busy_micros.fetch_add(micros, Ordering::Relaxed);
        result
    }

    async fn call(&self, entry: Entry, input: String) -> Result<String, CodecError> {
        if self.is_stuck() {
            return Err(CodecError::Stuck);
        }
        let (answer, answered) = oneshot::channel();
        let inbox = self.0.inbox.as_ref().ok_or(CodecError::Stuck)?;
        let round_trip = async {
            inbox.send(Call { entry, input, answer }).await.map_err(|_| CodecError::Stuck)?;
            answered.await.unwrap_or(Err(CodecError::Stuck))
        };
        tokio::pin!(round_trip);
        // Other owners' calls may stand in line before this one. Each of them returns in time or makes the codec stuck.
        loop {
            match tokio::time::timeout(GRACE, &mut round_trip).await {
                Ok(result) => return result,
                Err(_) if self.is_stuck() => return Err(CodecError::Stuck),
                Err(_) => {}
            }
        }
    }

    fn is_stuck(&self) -> bool {
        self.0.running.since().is_some_and(|since| since.elapsed() > self.0.limits.time + GRACE)
    }
}

impl Running {
    fn since(&self) -> Option<Instant> {
        *self.0.lock()
    }

    fn set(&self, since: Option<Instant>) {
        *self.0.lock() = since;
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.inbox = None;
        // A running call ends within a few instructions of the script, unless it is inside a long built-in. Then the
        // thread is left to end by itself.
        let ended = self.ended.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(GRACE) {
            warn!(codec = self.name, "left behind a codec that hangs in a built-in function");
        } else if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(script: &mut Script, mut calls: mpsc::Receiver<Call>, running: &Running) {
    while let Some(Call { entry, input, answer }) = calls.blocking_recv() {
        // A caller that has given up needs no answer.
        if !answer.is_closed() {
            running.set(Some(Instant::now()));
            let result = script.call(entry, &input);
            running.set(None);
            let _ = answer.send(result);
        }
    }
}

fn read_script(path: &Path) -> Result<String, LoadError> {
    let unreadable = |source| LoadError::Read { path: path.to_owned(), source };
    if std::fs::metadata(path).map_err(unreadable)?.len() > MAX_SCRIPT_BYTES {
        return Err(LoadError::TooLarge(path.to_owned()));
    }
    std::fs::read_to_string(path).map_err(unreadable)
}

fn read_decoded(output: &str) -> Result<Decoded, CodecError> {
    const FUNCTION: &str = Entry::DecodeUplink.name();
    let result = read_result(FUNCTION, "an object { data: { … } }", output)?;
    let data = result.get("data").unwrap_or(&Json::Null);
    if !data.is_object() {
        let expected = "an object { data: { … } }";
        let found = format!("{} as `data`", type_name(data));
        return Err(CodecError::WrongType { function: FUNCTION, expected, found });
    }
    let mut flattened = flatten(data);
    for value in &mut flattened.values {
        let unit = result.get("units").and_then(|units| units.get(&*value.point)).and_then(Json::as_str);
        value.unit = unit.filter(|unit| unit.len() <= MAX_UNIT_BYTES).map(Arc::from);
    }
    Ok(Decoded { values: flattened.values, dropped: flattened.dropped, warnings: remarks(result.get("warnings")) })
}

fn read_encoded(output: &str) -> Result<Vec<u8>, CodecError> {
    const FUNCTION: &str = Entry::EncodeDownlink.name();
    const EXPECTED: &str = "an object { bytes: [0 to 255, …] }";
    let wrong = |found: String| CodecError::WrongType { function: FUNCTION, expected: EXPECTED, found };
    let result = read_result(FUNCTION, EXPECTED, output)?;
    let bytes = result.get("bytes").unwrap_or(&Json::Null);
    // `JSON.stringify` writes a Uint8Array as an object with indexes as keys.
    let elements: Vec<&Json> = match bytes {
        Json::Array(elements) => elements.iter().collect(),
        Json::Object(object) => (0..object.len()).map_while(|index| object.get(&index.to_string())).collect(),
        other => return Err(wrong(format!("{} as `bytes`", type_name(other)))),
    };
    if elements.len() > MAX_COMMAND_BYTES {
        return Err(CodecError::OutputTooLarge);
    }
    let byte = |element: &Json| element.as_u64().and_then(|number| u8::try_from(number).ok());
    let bytes: Option<Vec<u8>> = elements.iter().map(|element| byte(element)).collect();
    match bytes {
        Some(bytes) if !bytes.is_empty() => Ok(bytes),
        Some(_) => Err(wrong("no bytes".into())),
        None => Err(wrong("something else in `bytes`".into())),
    }
}

fn read_result(
    function: &'static str,
    expected: &'static str,
    output: &str,
) -> Result<serde_json::Map<String, Json>, CodecError> {
    let wrong = |found: String| CodecError::WrongType { function, expected, found };
    match serde_json::from_str(output) {
        Ok(Json::Object(object)) => {
            let errors = remarks(object.get("errors"));
            if errors.is_empty() { Ok(object) } else { Err(CodecError::Reported(errors.join("; "))) }
        }
        Ok(other) => Err(wrong(type_name(&other).to_owned())),
        Err(error) => Err(wrong(format!("something that is no JSON ({error})"))),
    }
}

fn remarks(list: Option<&Json>) -> Vec<String> {
    let cut = |text: &str| text.chars().take(MAX_REMARK_CHARS).collect();
    let one = |remark: &Json| remark.as_str().map_or_else(|| cut(&remark.to_string()), cut);
    match list {
        Some(Json::Array(list)) => list.iter().take(MAX_REMARKS).map(one).collect(),
        Some(Json::String(text)) if !text.is_empty() => vec![cut(text)],
        _ => Vec::new(),
    }
}

fn type_name(json: &Json) -> &'static str {
    match json {
        Json::Null => "nothing",
        Json::Bool(_) => "a boolean",
        Json::Number(_) => "a number",
        Json::String(_) => "a text",
        Json::Array(_) => "a list",
        Json::Object(_) => "an object",
    }
}

fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("plain structs of text, numbers and lists always serialize")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(source: &str) -> Result<Codec, LoadError> {
        let limits = Limits { time: Duration::from_millis(300), ..Limits::default() };
        Codec::from_source(&Settings { port: 2, limits, ..Settings::new("plugins/x.js") }, source.to_owned())
    }

    fn uplink(bytes: &'static [u8]) -> Uplink {
        let bytes = Bytes::from_static(bytes);
        Uplink { bytes, received_at: UnixMillis(1000), device: "d".into(), topic: Some("t".into()) }
    }

    async fn decode(body: &str) -> Result<Decoded, CodecError> {
        load(&format!("function decodeUplink(input) {{\n{body}\n}}")).unwrap().decode(&uplink(b"\x00\x80\xFF")).await
    }

    fn text(decoded: &Decoded) -> Vec<String> {
        decoded.values.iter().map(|value| format!("{}={}", value.point, value.value)).collect()
    }

    async fn fails(body: &str, expected: &str) {
        let error = decode(body).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{body}: {error}");
    }

    #[tokio::test]
    async fn the_input_is_what_the_things_stack_gives() {
        let body = "return { data: { n: input.bytes.length, b: input.bytes[2], port: input.fPort,
            year: input.recvTime.getUTCFullYear(), device: input.device, topic: input.topic,
            list: Array.isArray(input.bytes), nested: { a: 1.5, b: { c: true } }, none: undefined, nan: NaN },
            warnings: ['low battery'] }";
        let decoded = decode(body).await.unwrap();
        let mut values = text(&decoded);
        values.sort();
        let expected = [
            "b=255",
            "device=d",
            "list=true",
            "n=3",
            "nested.a=1.5",
            "nested.b.c=true",
            "port=2",
            "topic=t",
            "year=1970",
        ];
        assert_eq!(values, expected);
        assert_eq!(decoded.warnings, ["low battery"]);
    }

    #[tokio::test]
    async fn a_codec_may_name_units() {
        let body = "return { data: { weight: 1.5, in: { t: 2 }, n: 3 }, units: { weight: 'kg', 'in.t': '°C', n: 5 } }";
        let decoded = decode(body).await.unwrap();
        let unit = |point: &str| decoded.values.iter().find(|value| &*value.point == point).unwrap().unit.as_deref();
        assert_eq!((unit("weight"), unit("in.t"), unit("n")), (Some("kg"), Some("°C"), None));
    }

    #[tokio::test]
    async fn a_codec_may_be_written_in_any_of_the_usual_ways() {
        for source in [
            "function decodeUplink(input) { return { data: { n: input.bytes.length } } }",
            "const decodeUplink = input => ({ data: { n: input.bytes.length } });",
            "module.exports = { decodeUplink(input) { return { data: { n: input.bytes.length } } } };",
            "exports.decodeUplink = function (input) { return { data: { n: input.bytes.length } } };",
            "function decodeUplink(input) { undeclared = input.bytes.length; console.log('x'); return { data: { n: undeclared } } }",
        ] {
            let decoded = load(source).unwrap().decode(&uplink(b"abc")).await.unwrap();
            assert_eq!(text(&decoded), ["n=3"], "{source}");
        }
    }

    #[tokio::test]
    async fn no_state_survives_a_call() {
        let codec = load(
            "var calls = 0; function decodeUplink() { globalThis.x = (globalThis.x || 0) + 1;
            Array.prototype.y = 5; return { data: { calls: ++calls, x: globalThis.x } } }",
        )
        .unwrap();
        for _ in 0..3 {
            assert_eq!(text(&codec.decode(&uplink(b"")).await.unwrap()), ["calls=1", "x=1"]);
        }
    }

    #[tokio::test]
    async fn a_script_that_fails_says_where() {
        fails("return input.no.such", "x.js:2:").await;
        fails("throw new Error('bad crc')", "x.js:2:").await;
        fails("throw new Error('bad crc')", "Error: bad crc").await;
        fails("throw 'just text'", "just text").await;
        fails("throw { a: 1 }", "x.js").await;
        fails("return { errors: ['unknown port', 'and more'] }", "unknown port; and more").await;
    }

    #[tokio::test]
    async fn wrong_return_types_are_named() {
        fails("return 5", "not a number").await;
        fails("return", "not nothing").await;
        fails("return { data: [1] }", "not a list as `data`").await;
        fails("return { date: {} }", "not nothing as `data`").await;
        fails("return { data: { big: 1n } }", "BigInt").await;
        fails("var a = {}; a.a = a; return { data: a }", "circular").await;
        fails("return { data: { s: 'x'.repeat(300000) } }", "more than it may").await;
        let long = decode("return { data: { s: 'x'.repeat(5000), t: 1 } }").await.unwrap();
        assert_eq!((text(&long), long.dropped), (vec!["t=1".to_owned()], 1));
    }

    /// Each of these is followed by a call that works: a limit stops the call, not the codec.
    #[tokio::test]
    async fn limits_stop_the_call_and_the_next_one_works() {
        let check = async |misdeed: &str, expected: fn(&CodecError) -> bool| {
            let source = format!(
                "function decodeUplink(input) {{ if (input.bytes.length) {{ {misdeed} }} return {{ data: {{ ok: true }} }} }}"
            );
            let codec = load(&source).unwrap();
            let error = codec.decode(&uplink(b"x")).await.unwrap_err();
            assert!(expected(&error), "{misdeed}: {error:?}");
            assert_eq!(text(&codec.decode(&uplink(b"")).await.unwrap()), ["ok=true"], "{misdeed}");
        };
        let time = |error: &CodecError| matches!(error, CodecError::Time(_));
        let memory = |error: &CodecError| matches!(error, CodecError::Memory);
        let stack = |error: &CodecError| matches!(error, CodecError::Stack(_));
        check("for (;;) {}", time).await;
        check("for (;;) { try { for (;;) {} } catch (e) {} }", time).await;
        check("/^(a+)+$/.test('a'.repeat(40) + 'b')", time).await;
        check("var a = []; for (;;) a.push('x'.repeat(1000))", memory).await;
        check("var s = 'x'; for (;;) s += s", |error| matches!(error, CodecError::Memory | CodecError::Threw { .. }))
            .await;
        check("new Uint8Array(1e9)", memory).await;
        // There is not even the memory for an error here.
        check("var o = {}; for (;;) o = { o }", memory).await;
        check("(function f() { f() })()", stack).await;
        check("var o = {}; for (var i = 0; i < 2e4; i++) o = { o }; JSON.stringify(o)", stack).await;
        check("input.self = input; Promise.resolve().then(() => { for (;;) {} }); throw 1", |error| {
            matches!(error, CodecError::Threw { .. })
        })
        .await;
    }

    #[tokio::test]
    async fn a_script_that_cannot_work_is_refused_with_its_line() {
        let check = |source: &str, expected: &str| {
            let error = load(source).unwrap_err();
            let text = format!("{error} {:?}", std::error::Error::source(&error).map(ToString::to_string));
            assert!(text.contains(expected), "{source}: {text}");
        };
        check("var a = 1;\nfunction decodeUplink( {", "x.js:2:");
        check("function decode() {}", "no function decodeUplink");
        check("var decodeUplink = 5", "no function decodeUplink");
        check("for (;;) {}", "longer than 300 ms");
        check("missing()", "x.js:1:");
        check("export function decodeUplink() {}", "x.js:1:");
        assert!(matches!(Codec::load(&Settings::new("no/such.js")), Err(LoadError::Read { .. })));
    }

    #[tokio::test]
    async fn commands_become_bytes() {
        let encode = async |body: &str, value: Value| {
            let source = format!("function decodeUplink() {{}} function encodeDownlink(input) {{ {body} }}");
            let codec = load(&source).unwrap();
            assert!(codec.can_encode());
            codec.encode("d", "tare", &value).await
        };
        let five = Value::Integer(5);
        let bytes = encode("return { bytes: [84, input.data.tare, 255], fPort: 1 }", five.clone()).await;
        assert_eq!(bytes.unwrap(), [84, 5, 255]);
        assert_eq!(encode("return { bytes: new Uint8Array([1, 2]) }", five.clone()).await.unwrap(), [1, 2]);
        for body in
            ["return { bytes: [256] }", "return { bytes: [1.5] }", "return { bytes: [] }", "return { bytes: 'x' }"]
        {
            let error = encode(body, five.clone()).await.unwrap_err();
            assert!(matches!(error, CodecError::WrongType { .. }), "{body}: {error:?}");
        }
        let error = encode("return { bytes: Array(5000).fill(1) }", five.clone()).await.unwrap_err();
        assert_eq!(error, CodecError::OutputTooLarge);
        let error = encode("return { errors: ['no such point'] }", five).await.unwrap_err();
        assert_eq!(error, CodecError::Reported("no such point".into()));
        let decoder = load("function decodeUplink() {}").unwrap();
        assert!(!decoder.can_encode());
        let error = decoder.encode("d", "p", &Value::Bool(true)).await.unwrap_err();
        assert_eq!(error, CodecError::NoFunction("encodeDownlink"));
    }

    #[tokio::test]
    #[expect(clippy::await_holding_lock, reason = "the script waits for it on a thread of its own")]
    async fn a_script_that_hangs_in_a_built_in_is_given_up_and_used_again_when_it_returns() {
        let source = "function decodeUplink(input) {
            if (input.bytes.length) hang();
            return { data: { ok: true } } }";
        let codec = load(source).unwrap();
        let hanging = script::HANG.lock();
        for _ in 0..2 {
            let hang = codec.decode(&uplink(b"x")).await;
            assert!(matches!(hang, Err(CodecError::Stuck)), "{hang:?}");
        }
        drop(hanging);
        let begun = Instant::now();
        while codec.decode(&uplink(b"")).await.is_err() {
            assert!(begun.elapsed() < Duration::from_secs(60));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    #[tokio::test]
    async fn dropping_a_codec_ends_a_call_that_is_running() {
        let limits = Limits { time: Duration::from_secs(60), ..Limits::default() };
        let source = "function decodeUplink() { for (;;) {} }".to_owned();
        let codec = Codec::from_source(&Settings { limits, ..Settings::new("x.js") }, source).unwrap();
        let begun = Instant::now();
        let uplink = uplink(b"");
        let call = codec.decode(&uplink);
        assert!(tokio::time::timeout(Duration::from_millis(20), call).await.is_err());
        drop(codec);
        assert!(begun.elapsed() < Duration::from_secs(20));
    }
}
