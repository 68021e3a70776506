//! The last log lines, kept in memory for the log page.
//!
//! A `tracing` layer writes every event of level DEBUG and above into a ring with a limit on lines and on the size of
//! each; TRACE is left out because it is written per message and would push everything else away. It is not a log
//! file: journald or the terminal keep the whole log.

use std::collections::VecDeque;
use std::fmt::{self, Write};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::Serialize;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

use crate::clock::Clock;

/// Lines kept; about half an hour of a busy gateway at level `info`.
const MAX_LINES: usize = 1000;
/// Bytes of a line's message; a longer one is cut.
const MAX_MESSAGE_BYTES: usize = 500;
/// Bytes of one field's value; a longer one is cut.
const MAX_FIELD_BYTES: usize = 200;
/// Fields of one line; more are left out.
const MAX_FIELDS: usize = 16;

/// The last log lines of the gateway; cheap to clone, every clone is the same ring.
#[derive(Clone)]
pub struct LogRing(Arc<Inner>);

struct Inner {
    clock: Clock,
    ring: Mutex<Ring>,
}

#[derive(Default)]
struct Ring {
    lines: VecDeque<Arc<Line>>,
    /// The sequence of the newest line; 0 before the first.
    last: u64,
}

/// One log line as the API gives it.
#[derive(Debug, Serialize)]
pub struct Line {
    /// Counts up from 1 within one start of the gateway.
    pub sequence: u64,
    /// RFC 3339.
    pub time: String,
    #[serde(serialize_with = "as_level")]
    pub level: Level,
    /// The module that wrote it.
    pub target: &'static str,
    pub message: String,
    /// In the order of the event: name and value.
    pub fields: Vec<(&'static str, String)>,
}

impl LogRing {
    pub fn new(clock: Clock) -> Self {
        Self(Arc::new(Inner { clock, ring: Mutex::default() }))
    }

    /// The layer that fills this ring, for the gateway's `tracing` subscriber.
    pub fn layer(&self) -> LogLayer {
        LogLayer(self.clone())
    }

    /// The newest `limit` lines with a sequence above `after` and of `level` or graver, oldest first.
    pub fn after(&self, after: u64, level: Level, limit: usize) -> Vec<Arc<Line>> {
        let ring = self.0.ring.lock();
        let newer = ring.lines.iter().rev().take_while(|line| line.sequence > after);
        let mut lines: Vec<_> = newer.filter(|line| line.level <= level).take(limit).cloned().collect();
        lines.reverse();
        lines
    }

    /// The sequence of the newest line; 0 before the first.
    pub fn last(&self) -> u64 {
        self.0.ring.lock().last
    }
}

/// Writes events into a [`LogRing`].
pub struct LogLayer(LogRing);

impl<S: Subscriber> Layer<S> for LogLayer {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        if *metadata.level() > Level::DEBUG {
            return;
        }
        let mut text = Text::default();
        event.record(&mut text);
        let Inner { clock, ring } = &*self.0.0;
        let time = clock.now().to_string();
        let mut ring = ring.lock();
        ring.last += 1;
        let line = Line {
            sequence: ring.last,
            time,
            level: *metadata.level(),
            target: metadata.target(),
            message: text.message,
            fields: text.fields,
        };
        if ring.lines.len() == MAX_LINES {
            ring.lines.pop_front();
        }
        ring.lines.push_back(Arc::new(line));
    }
}

#[derive(Default)]
struct Text {
    message: String,
    fields: Vec<(&'static str, String)>,
}

impl Text {
    fn add(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        if field.name() == "message" {
            self.message = bounded(MAX_MESSAGE_BYTES, value);
        } else if self.fields.len() < MAX_FIELDS {
            // Nothing should log a secret; a field that is named like one is not shown even then.
            let value = if is_secret(field.name()) { "(hidden)".to_owned() } else { bounded(MAX_FIELD_BYTES, value) };
            self.fields.push((field.name(), value));
        }
    }
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field, format_args!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, format_args!("{value}"));
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.add(field, format_args!("{value}"));
    }
}

fn is_secret(name: &str) -> bool {
    ["password", "secret", "token", "private_key"].iter().any(|word| name.contains(word))
}

/// Formats `value`, cut after `limit` bytes with an ellipsis; formatting stops there, so a huge value costs nothing.
fn bounded(limit: usize, value: fmt::Arguments<'_>) -> String {
    struct Bounded {
        text: String,
        limit: usize,
    }
    impl Write for Bounded {
        fn write_str(&mut self, part: &str) -> fmt::Result {
            let room = self.limit - self.text.len();
            if part.len() <= room {
                self.text.push_str(part);
                return Ok(());
            }
            self.text.push_str(&part[..part.floor_char_boundary(room)]);
            Err(fmt::Error)
        }
    }
    let mut bounded = Bounded { text: String::new(), limit };
    if bounded.write_fmt(value).is_err() {
        bounded.text.push('…');
    }
    bounded.text
}

fn as_level<S: serde::Serializer>(level: &Level, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(level_name(*level))
}

/// The level's name in the API and the configuration.
fn level_name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        _ => "trace",
    }
}

/// The level of that name; `None` for any other word.
pub fn level_from_name(name: &str) -> Option<Level> {
    [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG].into_iter().find(|level| level_name(*level) == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing_subscriber::layer::SubscriberExt;

    fn with_ring(events: impl FnOnce()) -> LogRing {
        let ring = LogRing::new(Clock::start("test"));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(ring.layer()), events);
        ring
    }

    #[test]
    fn lines_are_numbered_and_filtered_by_level_and_sequence() {
        let ring = with_ring(|| {
            tracing::info!(device = "meter", attempts = 3, "polled");
            tracing::trace!("never kept");
            tracing::warn!("slow");
            tracing::debug!("detail");
        });
        let check = |after: u64, level: Level, limit: usize, expected: &[&str]| {
            let lines = ring.after(after, level, limit);
            assert_eq!(lines.iter().map(|line| line.message.as_str()).collect::<Vec<_>>(), expected);
        };
        check(0, Level::DEBUG, 9, &["polled", "slow", "detail"]);
        check(0, Level::WARN, 9, &["slow"]);
        check(1, Level::DEBUG, 9, &["slow", "detail"]);
        check(0, Level::DEBUG, 1, &["detail"]);
        check(3, Level::DEBUG, 9, &[]);
        let first = &ring.after(0, Level::INFO, 9)[0];
        assert_eq!(first.fields, [("device", "meter".to_owned()), ("attempts", "3".to_owned())]);
        assert_eq!(ring.last(), 3);
    }

    #[test]
    fn long_lines_are_cut_and_old_lines_go() {
        let ring = with_ring(|| {
            for _ in 0..MAX_LINES + 5 {
                tracing::info!(long = "é".repeat(4000), "{}", "x".repeat(4000));
            }
        });
        let lines = ring.after(0, Level::INFO, usize::MAX);
        assert_eq!(lines.len(), MAX_LINES);
        assert_eq!(lines[0].sequence, 6);
        assert_eq!(lines[0].message, format!("{}…", "x".repeat(MAX_MESSAGE_BYTES)));
        assert_eq!(lines[0].fields[0].1, format!("{}…", "é".repeat(MAX_FIELD_BYTES / 2)));
    }

    #[test]
    fn fields_named_like_a_secret_are_hidden() {
        let ring = with_ring(|| tracing::info!(password = "hunter2", session_token = "abc", user = "anna", "login"));
        let json = serde_json::to_string(&*ring.after(0, Level::INFO, 9)[0]).unwrap();
        assert!(!json.contains("hunter2") && !json.contains("abc"), "{json}");
        assert!(json.contains(r#"["user","anna"]"#) && json.contains(r#""level":"info""#), "{json}");
    }
}
