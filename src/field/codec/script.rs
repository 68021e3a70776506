//! Running one codec script in QuickJS, under limits.
//!
//! No state survives a call: each runs the script in a context of its own, as The Things Stack and ChirpStack do, so
//! that a payload always decodes to the same values and a script cannot fill the memory over days. Scripts are run in
//! sloppy mode, because device makers publish scripts that assign to undeclared variables. They have the language and
//! nothing else: no files, no network, no timers; `console` is there and silent.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rquickjs::context::EvalOptions;
use rquickjs::{CatchResultExt, CaughtError, Context, Ctx, FromJs, Function, Runtime};

use super::{CodecError, Limits};

/// What scripts that were written for other hosts expect to find.
const PRELUDE: &str = "var module = { exports: {} }, exports = module.exports;
var console = { log() {}, info() {}, warn() {}, error() {}, debug() {} };";

/// Finds a function that the script declared in any of the usual ways, calls it with JSON and gives JSON back. Wrapped
/// in a function so that its own names do not show in the script's scope.
const CALL: &str = "(function (name, json) {
    var found = module.exports[name];
    if (typeof found !== 'function') found = (0, eval)('typeof ' + name + \" === 'function' ? \" + name + ' : null');
    if (!found) return null;
    if (json === undefined) return '';
    var input = JSON.parse(json);
    if (input.recvTime) input.recvTime = new Date(input.recvTime);
    var output = JSON.stringify(found(input));
    return output === undefined ? 'null' : output;
})";

/// The largest JSON text a codec may return, in bytes.
const MAX_OUTPUT_BYTES: usize = 256 * 1024;

/// The longest error message that is passed on, in characters.
const MAX_MESSAGE_CHARS: usize = 300;

/// A script and the engine it runs in. Lives on one thread.
pub(super) struct Script {
    file: String,
    source: String,
    limits: Limits,
    stopping: Arc<AtomicBool>,
    /// Made anew after a call that hit a limit: nothing of what it left behind is trusted.
    engine: Option<Engine>,
}

struct Engine {
    runtime: Runtime,
    deadline: Rc<Cell<Option<Instant>>>,
    timed_out: Rc<Cell<bool>>,
}

/// What a test holds while the built-in `hang()`, which only tests have, must not return.
#[cfg(test)]
pub(super) static HANG: parking_lot::Mutex<()> = parking_lot::Mutex::new(());

/// The functions a codec may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    DecodeUplink,
    EncodeDownlink,
}

impl Entry {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::DecodeUplink => "decodeUplink",
            Self::EncodeDownlink => "encodeDownlink",
        }
    }
}

impl Script {
    /// A script that errors will name `file`. Raising `stopping` ends a running call.
    pub(super) fn new(file: String, source: String, limits: Limits, stopping: Arc<AtomicBool>) -> Self {
        Self { file, source, limits, stopping, engine: None }
    }

    /// Runs the script's top level and tells whether it has the function `entry`.
    pub(super) fn has(&mut self, entry: Entry) -> Result<bool, CodecError> {
        Ok(self.run(entry, None)?.is_some())
    }

    /// Calls a function of the script with a JSON object and returns what it returned, as JSON.
    pub(super) fn call(&mut self, entry: Entry, input: &str) -> Result<String, CodecError> {
        let output = self.run(entry, Some(input))?.ok_or(CodecError::NoFunction(entry.name()))?;
        if output.len() > MAX_OUTPUT_BYTES { Err(CodecError::OutputTooLarge) } else { Ok(output) }
    }

    fn run(&mut self, entry: Entry, input: Option<&str>) -> Result<Option<String>, CodecError> {
        let engine = match self.engine.take() {
            Some(engine) => engine,
            None => Engine::new(&self.limits, self.stopping.clone()).map_err(|_| CodecError::Memory)?,
        };
        engine.timed_out.set(false);
        engine.deadline.set(Some(Instant::now() + self.limits.time));
        let result = match Context::full(&engine.runtime) {
            Ok(context) => context.with(|ctx| self.run_in(&ctx, &engine, entry, input)),
            Err(_) => Err(CodecError::Memory),
        };
        engine.deadline.set(None);
        if !matches!(result, Err(CodecError::Time(_) | CodecError::Memory | CodecError::Stack(_))) {
            self.engine = Some(engine);
        }
        result
    }

    fn run_in<'js>(
        &self,
        ctx: &Ctx<'js>,
        engine: &Engine,
        entry: Entry,
        input: Option<&str>,
    ) -> Result<Option<String>, CodecError> {
        let failed = |error: CaughtError<'js>| self.explain(engine, &error);
        evaluate::<()>(ctx, "prelude", PRELUDE).catch(ctx).map_err(failed)?;
        #[cfg(test)]
        Function::new(ctx.clone(), || drop(HANG.lock()))
            .and_then(|hang| ctx.globals().set("hang", hang))
            .catch(ctx)
            .map_err(failed)?;
        evaluate::<()>(ctx, &self.file, &self.source).catch(ctx).map_err(failed)?;
        let call: Function = evaluate(ctx, "call", CALL).catch(ctx).map_err(failed)?;
        call.call((entry.name(), input)).catch(ctx).map_err(failed)
    }

    fn explain(&self, engine: &Engine, error: &CaughtError<'_>) -> CodecError {
        if engine.timed_out.get() {
            return CodecError::Time(self.limits.time);
        }
        let (message, stack) = match error {
            // The engine throws null where it has no memory left to make an error of.
            CaughtError::Value(value) if value.is_null() => return CodecError::Memory,
            CaughtError::Exception(exception) => {
                let message = exception.message().unwrap_or_default();
                let name: String = exception.as_object().get("name").unwrap_or_default();
                let text = if name.is_empty() { message } else { format!("{name}: {message}") };
                (text, exception.stack().unwrap_or_default())
            }
            CaughtError::Value(value) => {
                let text = String::from_js(value.ctx(), value.clone());
                (text.unwrap_or_else(|_| format!("a value of type {}", value.type_name())), String::new())
            }
            CaughtError::Error(error) => (error.to_string(), String::new()),
        };
        let place = place_in(&self.file, &stack).unwrap_or_else(|| self.file.clone());
        if message.contains("out of memory") {
            CodecError::Memory
        } else if message.contains("stack size exceeded") || message.contains("stack overflow") {
            CodecError::Stack(place)
        } else {
            CodecError::Threw { place, message: message.chars().take(MAX_MESSAGE_CHARS).collect() }
        }
    }
}

impl Engine {
    fn new(limits: &Limits, stopping: Arc<AtomicBool>) -> Result<Self, rquickjs::Error> {
        let runtime = Runtime::new()?;
        runtime.set_memory_limit(limits.memory_bytes);
        runtime.set_max_stack_size(limits.stack_bytes);
        let deadline = Rc::new(Cell::new(None::<Instant>));
        let timed_out = Rc::new(Cell::new(false));
        let (due, late) = (deadline.clone(), timed_out.clone());
        runtime.set_interrupt_handler(Some(Box::new(move || {
            let over = due.get().is_some_and(|due| Instant::now() >= due) || stopping.load(Ordering::Relaxed);
            late.set(late.get() || over);
            over
        })));
        Ok(Self { runtime, deadline, timed_out })
    }
}

/// How much longer than the script's time limit a caller waits for the thread. The engine looks at the clock between
/// instructions, but a single built-in that runs very long (`indexOf` on an object that claims 2⁵³ elements) does not.
pub(super) const GRACE: Duration = Duration::from_secs(1);

fn evaluate<'js, V: FromJs<'js>>(ctx: &Ctx<'js>, file: &str, source: &str) -> Result<V, rquickjs::Error> {
    let mut options = EvalOptions::default();
    options.strict = false;
    options.filename = Some(file.to_owned());
    ctx.eval_with_options(source, options)
}

/// The innermost place in `file` of a stack trace with lines such as `    at decodeUplink (scale.js:3:7)`.
fn place_in(file: &str, stack: &str) -> Option<String> {
    let at = stack.find(&format!("{file}:"))?;
    let rest = &stack[at..];
    let end =
        rest[file.len()..].find(|c: char| !c.is_ascii_digit() && c != ':').map_or(rest.len(), |end| file.len() + end);
    Some(rest[..end].trim_end_matches(':').to_owned())
}
