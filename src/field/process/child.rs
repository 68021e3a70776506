//! One run of an adapter program: its pipes, its pace, its commands and its end.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{ChildStderr, ChildStdin, ChildStdout};
use tokio::sync::watch;
use tokio::time::{Duration, Instant, sleep_until, timeout};
use tracing::{debug, error, info, trace, warn};

use super::protocol::{FromProgram, Level, ProgramReading, ToProgram, VERSION};
use super::{Adapter, Settings, quoted};
use crate::clock::UnixMillis;
use crate::field::device::{Device, show_bytes, to_json};
use crate::field::mapping::Command;
use crate::observe::Health;
use crate::proto::serial::{Framer, Framing, MAX_FRAME_BYTES};
use crate::reading::ReadingTime;

/// The longest line in either direction, in bytes.
const MAX_LINE_BYTES: usize = MAX_FRAME_BYTES;

const READ_BYTES: usize = 16 * 1024;

/// How long a program may take to greet.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a program has to end by itself once its stdin is closed, and again once it got SIGTERM.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);
const TERMINATE_TIMEOUT: Duration = Duration::from_millis(500);

/// How long a program may take to answer a command, and how many it may have before it.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_COMMANDS: usize = 64;

/// How many lines a program may send: a burst, then so many per second. A program above it is read more slowly, so
/// that its own writes wait; nothing is lost.
const LINE_BURST: f64 = 2000.0;
const LINES_PER_SECOND: f64 = 1000.0;

/// Long lines count as several.
const BYTES_PER_LINE: usize = 1024;

/// How many lines of a program's stderr reach the log per second; the others are counted.
const LOGGED_LINES_PER_SECOND: u32 = 20;

/// What of the gateway's environment a program finds.
const INHERITED: [&str; 5] = ["PATH", "HOME", "LANG", "TZ", "TMPDIR"];

/// A running program.
pub(super) struct Child {
    process: tokio::process::Child,
    pid: u32,
    /// `None` once the program was asked to stop.
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    /// Lines that are still to be written.
    out: BytesMut,
    /// Its process group was ended; the number may already belong to others.
    group_ended: bool,
}

/// How a run ended.
#[derive(Debug)]
pub(super) enum End {
    /// The gateway asked for it.
    Stopped,
    /// The program had nothing more to do.
    Done,
    Exited {
        code: i32,
        last_words: String,
    },
    Killed {
        signal: i32,
        last_words: String,
    },
    NotStarted(io::Error),
    /// The gateway ended it, and why.
    Ended(String),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => f.write_str("it was stopped"),
            Self::Done => f.write_str("it is done"),
            Self::Exited { code, last_words } => {
                write!(f, "the program ended with exit code {code}{}", quoted(last_words))
            }
            Self::Killed { signal, last_words } => {
                write!(f, "the program was ended by signal {signal}{}", quoted(last_words))
            }
            Self::NotStarted(error) => write!(f, "the program cannot be started: {error}"),
            Self::Ended(reason) => f.write_str(reason),
        }
    }
}

/// What is known of a run.
struct Run {
    began: Instant,
    greeted: bool,
    last_heard: Instant,
    lines: Framer,
    errors: Framer,
    pace: Pace,
    logged: LogPace,
    /// The last line of stderr: often why it ended.
    last_words: String,
    commands: BTreeMap<u64, (Command, Instant)>,
    next_id: u64,
    /// Devices whose health the program tells by itself.
    tells_health: BTreeSet<Arc<str>>,
}

enum Event {
    Stop,
    Out(io::Result<usize>),
    Errors(io::Result<usize>),
    Written(io::Result<usize>),
    Exited(io::Result<ExitStatus>),
    Command(Command),
    Timer,
}

impl Child {
    /// Starts the program in a process group of its own, so that what it starts ends with it.
    pub(super) fn start(settings: &Settings) -> io::Result<Self> {
        let (program, arguments) = settings.command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        let mut command = tokio::process::Command::new(program);
        command.args(arguments).env_clear();
        command.envs(INHERITED.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        command.envs(settings.environment.iter().map(|(name, value)| (name, value)));
        if let Some(directory) = &settings.directory {
            command.current_dir(directory);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.process_group(0).kill_on_drop(true).spawn()?;
        let pid = process.id().ok_or_else(|| io::Error::other("it ended at once"))?;
        let hello = ToProgram::Hello {
            version: VERSION,
            name: &settings.name,
            devices: settings.devices.iter().map(|device| &**device).collect(),
            settings: &settings.settings,
        };
        Ok(Self {
            pid,
            stdin: process.stdin.take(),
            stdout: process.stdout.take(),
            stderr: process.stderr.take(),
            process,
            out: BytesMut::from(&*hello.to_line()),
            group_ended: false,
        })
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Ends the program: closes its stdin, which asks it to; then SIGTERM; then SIGKILL.
    async fn end(&mut self) {
        self.stdin = None;
        // A program that blocks on a full pipe could not end.
        self.stdout = None;
        self.stderr = None;
        if timeout(STOP_TIMEOUT, self.process.wait()).await.is_err() {
            self.signal(Signal::SIGTERM);
            if timeout(TERMINATE_TIMEOUT, self.process.wait()).await.is_err() {
                warn!(pid = self.pid, "adapter program does not end and is killed");
            }
        }
        self.end_group();
        let _ = self.process.wait().await;
    }

    /// Ends whatever of the program's process group is left.
    fn end_group(&mut self) {
        if !self.group_ended {
            self.signal(Signal::SIGKILL);
            self.group_ended = true;
        }
    }

    fn signal(&self, signal: Signal) {
        if let Ok(pid) = i32::try_from(self.pid) {
            // Fails where the whole group has ended already, which is as good.
            let _ = killpg(Pid::from_raw(pid), signal);
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.end_group();
    }
}

impl Adapter {
    pub(super) async fn serve(&mut self, mut child: Child, shutdown: &mut watch::Receiver<bool>) -> End {
        let now = Instant::now();
        let mut run = Run {
            began: now,
            greeted: false,
            last_heard: now,
            lines: line_framer(),
            errors: line_framer(),
            pace: Pace::new(now),
            logged: LogPace { second: now, lines: 0, dropped: 0 },
            last_words: String::new(),
            commands: BTreeMap::new(),
            next_id: 1,
            tells_health: BTreeSet::new(),
        };
        let end = self.exchange_lines(&mut child, &mut run, shutdown).await;
        child.end().await;
        for (command, _) in std::mem::take(&mut run.commands).into_values() {
            self.answer(&command, Err("the adapter program ended before it answered"));
        }
        end
    }

    async fn exchange_lines(&mut self, child: &mut Child, run: &mut Run, shutdown: &mut watch::Receiver<bool>) -> End {
        let mut out_buffer = vec![0; READ_BYTES];
        let mut errors_buffer = vec![0; READ_BYTES];
        let mut exited = None;
        loop {
            // What a program wrote before it ended is still in the pipes.
            if let Some(status) = exited
                && child.stdout.is_none()
                && child.stderr.is_none()
            {
                return end_of(status, &run.last_words);
            }
            let paused_until = run.pace.paused_until(Instant::now());
            let due = self.next_timer(run, paused_until, exited.is_some());
            let event = tokio::select! {
                _ = shutdown.wait_for(|stop| *stop) => Event::Stop,
                status = child.process.wait(), if exited.is_none() => Event::Exited(status),
                read = read(&mut child.stdout, &mut out_buffer), if paused_until.is_none() => Event::Out(read),
                read = read(&mut child.stderr, &mut errors_buffer), if paused_until.is_none() => Event::Errors(read),
                written = write(&mut child.stdin, &mut child.out) => Event::Written(written),
                command = self.exchange.next_command(), if run.commands.len() < MAX_COMMANDS => Event::Command(command),
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => Event::Timer,
            };
            match event {
                Event::Stop => return End::Stopped,
                Event::Exited(Ok(status)) => {
                    exited = Some(status);
                    // Others that hold its pipes are not waited for.
                    run.last_heard = Instant::now();
                    child.stdin = None;
                    child.end_group();
                }
                Event::Exited(Err(error)) => return End::Ended(format!("the program cannot be waited for: {error}")),
                Event::Out(Ok(0) | Err(_)) => child.stdout = None,
                Event::Out(Ok(length)) => {
                    if let Err(end) = self.handle_output(run, &out_buffer[..length]) {
                        return end;
                    }
                }
                Event::Errors(Ok(0) | Err(_)) => child.stderr = None,
                Event::Errors(Ok(length)) => self.handle_errors(run, &errors_buffer[..length]),
                Event::Written(Ok(_)) => {}
                // It has closed its stdin, which it may; commands are then answered by their timeout.
                Event::Written(Err(_)) => child.stdin = None,
                Event::Command(command) => self.send_command(child, run, command),
                Event::Timer => {
                    if let Some(end) = self.handle_timers(run, exited) {
                        return end;
                    }
                }
            }
        }
    }

    fn next_timer(&self, run: &Run, paused_until: Option<Instant>, exited: bool) -> Option<Instant> {
        let hello = (!run.greeted).then_some(run.began + HELLO_TIMEOUT);
        let silence = self.settings.silent_after.map(|after| run.last_heard + after);
        let drained = exited.then_some(run.last_heard + STOP_TIMEOUT);
        let answer = run.commands.values().map(|(_, due)| *due).min();
        [hello, silence, drained, answer, paused_until].into_iter().flatten().min()
    }

    fn handle_timers(&mut self, run: &mut Run, exited: Option<ExitStatus>) -> Option<End> {
        let now = Instant::now();
        let overdue: Vec<u64> = run.commands.iter().filter(|(_, (_, due))| now >= *due).map(|(id, _)| *id).collect();
        for (command, _) in overdue.iter().filter_map(|id| run.commands.remove(id)) {
            self.answer(&command, Err("the adapter program did not answer in time"));
        }
        if let Some(status) = exited {
            return (now >= run.last_heard + STOP_TIMEOUT).then(|| end_of(status, &run.last_words));
        }
        if !run.greeted && now >= run.began + HELLO_TIMEOUT {
            let reason = "the program did not greet; does it send {\"type\":\"hello\",\"version\":1} and flush it?";
            return Some(End::Ended(reason.into()));
        }
        match self.settings.silent_after {
            Some(after) if now >= run.last_heard + after => {
                Some(End::Ended(format!("the program said nothing for {after:?} and was ended")))
            }
            _ => None,
        }
    }

    fn handle_output(&mut self, run: &mut Run, bytes: &[u8]) -> Result<(), End> {
        let now = Instant::now();
        run.last_heard = now;
        let mut lines = Vec::new();
        let overlong = run.lines.counts().overlong;
        run.lines.handle_bytes(bytes, now.into_std(), &mut lines);
        if run.lines.counts().overlong > overlong {
            self.observer.ignored(&format!("a line is longer than {MAX_LINE_BYTES} bytes"));
            warn!(adapter = %self.settings.name, limit = MAX_LINE_BYTES, "ignored a line of an adapter program: too long");
        }
        self.keep_pace(run, lines.len(), bytes.len());
        lines.iter().try_for_each(|line| self.handle_line(run, line))
    }

    fn handle_line(&mut self, run: &mut Run, line: &Bytes) -> Result<(), End> {
        let name = &self.settings.name;
        trace!(adapter = %name, line = show_bytes(line), "line");
        match FromProgram::parse(line) {
            Ok(FromProgram::Hello { version }) if version == VERSION => {
                run.greeted = true;
                self.observer.set(Health::Good, None);
            }
            Ok(FromProgram::Hello { version }) => {
                let reason =
                    format!("the program speaks version {version} of the protocol, this gateway version {VERSION}");
                return Err(End::Ended(reason));
            }
            Ok(_) if !run.greeted => {
                return Err(End::Ended("the program's first line was not its greeting".into()));
            }
            Ok(FromProgram::Reading(reading)) => self.handle_reading(run, reading),
            Ok(FromProgram::Health { device, health, reason }) => {
                let Some(device) = self.device(device) else { return Ok(()) };
                run.tells_health.insert(device.name().clone());
                device.set(&self.exchange, health, reason.as_deref());
                if health == Health::Down {
                    device.publish_stale(&self.exchange);
                }
            }
            Ok(FromProgram::Log { level, message }) if run.logged.admits() => match level {
                Level::Debug => debug!(adapter = %name, message, "adapter program"),
                Level::Info => info!(adapter = %name, message, "adapter program"),
                Level::Warn => warn!(adapter = %name, message, "adapter program"),
                Level::Error => error!(adapter = %name, message, "adapter program"),
            },
            Ok(FromProgram::Result { id, result }) => match run.commands.remove(&id) {
                Some((command, _)) => self.answer(
                    &command,
                    match &result {
                        Ok(value) => Ok(value.clone()),
                        Err(error) => Err(error.as_str()),
                    },
                ),
                None => debug!(adapter = %name, id, "answer to a command that does not wait for one"),
            },
            Ok(FromProgram::Log { .. } | FromProgram::Other) => {}
            Err(error) => {
                self.observer.ignored(&format!("{error} (in `{}`)", show_bytes(line)));
                debug!(adapter = %name, line = show_bytes(line), %error, "ignored a line of an adapter program");
            }
        }
        Ok(())
    }

    fn handle_reading(&self, run: &Run, reading: ProgramReading) {
        let Some(device) = self.device(reading.device) else { return };
        let now = self.exchange.time();
        let time = reading.time.map_or(now, |at| ReadingTime { at: UnixMillis(at), clock_set: true });
        self.observer.read();
        device.publish_reading(&self.exchange, reading.point, reading.value, reading.unit, reading.quality, &time);
        if !run.tells_health.contains(device.name()) {
            device.set(&self.exchange, Health::Good, None);
        }
    }

    /// The device a line speaks of; without a name, the only one there is.
    fn device(&self, name: Option<Arc<str>>) -> Option<&Arc<Device>> {
        let device = match &name {
            Some(name) => self.devices.get(name),
            None if self.devices.len() == 1 => self.devices.values().next(),
            None => None,
        };
        if device.is_none() {
            let name = name.as_deref().unwrap_or_default();
            self.observer.ignored(&format!("`device` is `{name}`, which is none of the devices of this adapter"));
            debug!(adapter = %self.settings.name, device = name, "ignored a line for a device that is not the adapter's");
        }
        device
    }

    fn keep_pace(&self, run: &mut Run, lines: usize, bytes: usize) {
        if run.pace.count(lines.max(bytes / BYTES_PER_LINE), Instant::now()) {
            warn!(adapter = %self.settings.name, LINES_PER_SECOND, "adapter program sends too much and is slowed down");
            self.observer.slowed();
        }
    }

    fn handle_errors(&self, run: &mut Run, bytes: &[u8]) {
        let mut lines = Vec::new();
        run.errors.handle_bytes(bytes, Instant::now().into_std(), &mut lines);
        self.keep_pace(run, lines.len(), bytes.len());
        for line in lines {
            run.last_words = String::from_utf8_lossy(&line).chars().filter(|c| !c.is_control()).take(200).collect();
            if run.logged.admits() {
                warn!(adapter = %self.settings.name, line = run.last_words, "adapter program, stderr");
            }
        }
    }

    fn send_command(&self, child: &mut Child, run: &mut Run, command: Command) {
        let id = run.next_id;
        let value = to_json(&command.value);
        let line = ToProgram::Command { id, device: &command.device, point: &command.point, value }.to_line();
        if child.stdin.is_none() {
            self.answer(&command, Err("the adapter program takes no commands: it has closed its stdin"));
        } else if !run.greeted {
            self.answer(&command, Err("the adapter program is still starting"));
        } else if line.len() > MAX_LINE_BYTES {
            self.answer(&command, Err("the value is too long for an adapter program"));
        } else {
            run.next_id += 1;
            child.out.extend_from_slice(&line);
            run.commands.insert(id, (command, Instant::now() + COMMAND_TIMEOUT));
        }
    }
}

/// A bucket of lines that fills with time.
struct Pace {
    left: f64,
    at: Instant,
    slow: bool,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self { left: LINE_BURST, at: now, slow: false }
    }

    /// Takes lines out of the bucket; true where it runs empty, for the first time since it was last full.
    fn count(&mut self, lines: usize, now: Instant) -> bool {
        self.fill(now);
        self.left -= lines as f64;
        let newly = self.left < 0.0 && !self.slow;
        self.slow |= newly;
        newly
    }

    fn paused_until(&mut self, now: Instant) -> Option<Instant> {
        self.fill(now);
        (self.left < 0.0).then(|| now + Duration::from_secs_f64(-self.left / LINES_PER_SECOND))
    }

    fn fill(&mut self, now: Instant) {
        self.left += (now - self.at).as_secs_f64() * LINES_PER_SECOND;
        self.at = now;
        if self.left >= LINE_BURST {
            self.left = LINE_BURST;
            self.slow = false;
        }
    }
}

/// Keeps a program from filling the log.
struct LogPace {
    second: Instant,
    lines: u32,
    dropped: u64,
}

impl LogPace {
    fn admits(&mut self) -> bool {
        let now = Instant::now();
        if now - self.second >= Duration::from_secs(1) {
            if self.dropped > 0 {
                warn!(dropped = self.dropped, "adapter program logs too much; lines were left out");
            }
            *self = Self { second: now, lines: 0, dropped: 0 };
        }
        self.lines += 1;
        let admitted = self.lines <= LOGGED_LINES_PER_SECOND;
        self.dropped += u64::from(!admitted);
        admitted
    }
}

fn line_framer() -> Framer {
    let framing = Framing::Line { delimiters: vec![b"\n".to_vec()], max_length: MAX_LINE_BYTES };
    Framer::new(framing).expect("the framing is one that the framer allows")
}

async fn read<R: AsyncReadExt + Unpin>(from: &mut Option<R>, buffer: &mut [u8]) -> io::Result<usize> {
    match from {
        Some(from) => from.read(buffer).await,
        None => std::future::pending().await,
    }
}

async fn write(to: &mut Option<ChildStdin>, out: &mut BytesMut) -> io::Result<usize> {
    match to {
        Some(to) if !out.is_empty() => to.write_buf(out).await,
        _ => std::future::pending().await,
    }
}

fn end_of(status: ExitStatus, last_words: &str) -> End {
    use std::os::unix::process::ExitStatusExt;
    let last_words = last_words.to_owned();
    match status.code() {
        Some(0) => End::Done,
        Some(code) => End::Exited { code, last_words },
        None => End::Killed { signal: status.signal().unwrap_or_default(), last_words },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_may_send_a_burst_and_then_so_many_lines_per_second() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        assert!(!pace.count(2000, start));
        assert_eq!(pace.paused_until(start), None);
        assert!(pace.count(500, start));
        assert_eq!(pace.paused_until(start), Some(start + Duration::from_millis(500)));
        let later = start + Duration::from_millis(600);
        assert_eq!(pace.paused_until(later), None);
        // Told once per episode, not at every line above the pace.
        assert!(!pace.count(500, later));
        let rested = later + Duration::from_secs(10);
        assert!(!pace.count(2000, rested) && pace.count(1, rested));
    }
}
