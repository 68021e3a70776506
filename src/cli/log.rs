//! The log on standard error: lines for people and journald, or JSON objects.

use std::fmt;
use std::io::{self, IsTerminal};

use serde_json::{Map, Value as Json};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::clock::Clock;
use crate::config::{self, Format};
use crate::web::log::LogRing;

/// Sends the process's events to standard error and to `ring`. Panics become events too.
pub fn start(log: config::Log, clock: &Clock, ring: &LogRing) {
    let level = match log.level {
        config::Level::Error => LevelFilter::ERROR,
        config::Level::Warn => LevelFilter::WARN,
        config::Level::Info => LevelFilter::INFO,
        config::Level::Debug => LevelFilter::DEBUG,
        config::Level::Trace => LevelFilter::TRACE,
    };
    // What libraries say below WARN is about themselves.
    let targets =
        |level: LevelFilter| Targets::new().with_default(LevelFilter::WARN.min(level)).with_target("fieldgate", level);
    let to_journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let shape = match log.format {
        Format::Json => Shape::Json,
        Format::Text if to_journal => Shape::Journal,
        Format::Text => Shape::Terminal,
    };
    let colours = shape == Shape::Terminal && io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .with_ansi(colours)
        .event_format(Lines { shape, clock: clock.clone() })
        .with_filter(targets(level));
    // The web UI's log page is worth something also where standard error is kept quiet.
    let page = ring.layer().with_filter(targets(level.max(LevelFilter::INFO)));
    // A second start in one process, as in tests, keeps the first one's subscriber.
    let _ = tracing_subscriber::registry().with(lines).with(page).try_init();
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let message = panic.payload_as_str().unwrap_or("panic");
        tracing::error!(place, message, "a fault in the program; please report it");
    }));
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Terminal,
    /// With syslog's priority before each line and no time, which journald knows better.
    Journal,
    Json,
}

struct Lines {
    shape: Shape,
    clock: Clock,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let level = *event.metadata().level();
        let target = event.metadata().target();
        match self.shape {
            Shape::Json => {
                let mut fields = Fields::default();
                event.record(&mut fields);
                let mut object = Map::new();
                object.insert("time".into(), self.clock.now().to_string().into());
                object.insert("level".into(), level.as_str().to_ascii_lowercase().into());
                object.insert("target".into(), target.into());
                object.insert("message".into(), fields.message.into());
                object.extend(fields.others);
                writeln!(writer, "{}", Json::Object(object))
            }
            Shape::Journal => {
                write!(writer, "<{}>", priority(level))?;
                write_text(&mut writer, event)
            }
            Shape::Terminal => {
                let (start, end) = if writer.has_ansi_escapes() { (colour(level), "\x1b[0m") } else { ("", "") };
                write!(writer, "{} {start}{:<5}{end} ", self.clock.now(), level.as_str())?;
                write_text(&mut writer, event)
            }
        }
    }
}

fn write_text(writer: &mut Writer<'_>, event: &Event<'_>) -> fmt::Result {
    let mut fields = Fields::default();
    event.record(&mut fields);
    writer.write_str(&one_line(&fields.message))?;
    for (name, value) in fields.others {
        match value {
            Json::String(text) if text.is_empty() || text.contains([' ', '"', '=']) => {
                write!(writer, " {name}={:?}", one_line(&text))?;
            }
            Json::String(text) => write!(writer, " {name}={}", one_line(&text))?,
            other => write!(writer, " {name}={other}")?,
        }
    }
    writer.write_char('\n')
}

/// What a peer sends must not begin a line of its own in the log, nor reach the terminal as a command to it.
fn one_line(text: &str) -> String {
    let escape = |character: char| match character {
        character if character.is_control() => character.escape_default().collect::<String>(),
        character => character.to_string(),
    };
    if text.chars().any(char::is_control) { text.chars().map(escape).collect() } else { text.to_owned() }
}

/// syslog's numbers (RFC 5424 §6.2.1).
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

fn colour(level: Level) -> &'static str {
    match level {
        Level::ERROR => "\x1b[31m",
        Level::WARN => "\x1b[33m",
        Level::INFO => "\x1b[32m",
        _ => "\x1b[2m",
    }
}

/// An event's fields, the message apart.
#[derive(Default)]
struct Fields {
    message: String,
    others: Map<String, Json>,
}

impl Fields {
    fn add(&mut self, field: &Field, value: Json) {
        match (field.name(), value) {
            ("message", Json::String(text)) => self.message = text,
            (name, value) => {
                self.others.insert(name.to_owned(), value);
            }
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field, format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field, value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_from_a_peer_stay_in_their_line() {
        assert_eq!(one_line("a\nb\x1b[31m"), "a\\nb\\u{1b}[31m");
        assert_eq!(one_line("plain é"), "plain é");
    }
}
