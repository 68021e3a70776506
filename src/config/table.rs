//! The reader: a table's keys are taken one by one, each with its type, range, default and meaning.
//!
//! One call per key is the only definition there is. Reading a file, the "did you mean" of an unknown key and the
//! reference that `fieldgate keys` prints all come from it. Errors never stop the reading: they are collected, and
//! whoever builds the settings leaves with `None` at the end.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::Read;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use serde_json::Value as Json;

use super::claims::Claim;
use super::report::{Report, Severity};
use super::scalar::{Origin, Scalar};
use super::source::{Located, Sources, Span};
use super::tree::{self, Entry, MAX_FILE_BYTES, Node, Value};
use super::words::{did_you_mean, list, lower_first};

/// What keys of secrets have in their names.
const SECRET_WORDS: [&str; 3] = ["pass", "secret", "token"];
/// A `file:` secret may not be longer.
const MAX_SECRET_BYTES: usize = 64 * 1024;
/// Reports of one run; a file that is wrong everywhere says nothing new after that.
const MAX_REPORTS: usize = 1000;

/// What one run of the reader collects.
pub struct Context<'e> {
    pub(super) sources: RefCell<Sources>,
    pub(super) reports: RefCell<Vec<Report>>,
    pub(super) claims: RefCell<Vec<Claim>>,
    pub(super) files: RefCell<Vec<PathBuf>>,
    environment: &'e dyn Fn(&str) -> Option<String>,
    /// Set when there is no file and only the keys are wanted.
    describing: Cell<bool>,
    keys: RefCell<Vec<Key>>,
}

/// One key, as the reference shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// From the top of its file: `listeners[].tls.key`.
    pub path: String,
    pub shape: String,
    /// `None` for a key that has to be given or has no default.
    pub default: Option<String>,
    pub required: bool,
    pub meaning: &'static str,
}

impl<'e> Context<'e> {
    pub fn new(environment: &'e dyn Fn(&str) -> Option<String>) -> Self {
        Self {
            sources: RefCell::default(),
            reports: RefCell::default(),
            claims: RefCell::default(),
            files: RefCell::default(),
            environment,
            describing: Cell::new(false),
            keys: RefCell::default(),
        }
    }

    /// Runs `read` on nothing and returns the keys it asked for.
    pub fn describe(read: impl FnOnce(&mut Table<'_>)) -> Vec<Key> {
        let context = Context::new(&|_| None);
        context.describing.set(true);
        let mut table = Table::empty(&context, String::new(), Span { file: 0, start: 0, end: 0 }, Path::new(""));
        read(&mut table);
        context.keys.into_inner()
    }

    pub fn report(&self, report: Report) {
        let mut reports = self.reports.borrow_mut();
        if !self.describing.get() && reports.len() < MAX_REPORTS {
            reports.push(report);
        }
    }

    /// Says that something has an owner; conflicts are reported when everything has been read.
    pub fn claim(&self, claim: Claim) {
        self.claims.borrow_mut().push(claim);
    }

    /// How many errors there are so far: whoever compares before and after knows whether a part is worth more checks.
    pub(super) fn errors(&self) -> usize {
        self.reports.borrow().iter().filter(|report| report.severity == Severity::Error).count()
    }

    pub(super) fn is_describing(&self) -> bool {
        self.describing.get()
    }

    fn document(&self, key: Key) {
        let mut keys = self.keys.borrow_mut();
        if self.describing.get() && !keys.iter().any(|known| known.path == key.path) {
            keys.push(key);
        }
    }

    /// Reads a text that is part of the configuration.
    pub(super) fn read_text(&self, path: &Path) -> Result<String, String> {
        self.note_file(path);
        read_text(path)
    }

    fn note_file(&self, path: &Path) {
        let mut files = self.files.borrow_mut();
        if !files.iter().any(|known| known == path) {
            files.push(path.to_path_buf());
        }
    }

    /// Reads and parses a file that is part of the configuration; reports at `place` when it cannot be read.
    pub fn load(&self, path: &Path, place: Option<Span>) -> Option<(u32, Node)> {
        let text = match self.read_text(path) {
            Ok(text) => text,
            Err(problem) => {
                self.report(Report {
                    place,
                    ..Report::error(Span { file: 0, start: 0, end: 0 }, format!("{}: {problem}", path.display()))
                });
                return None;
            }
        };
        let mut sources = self.sources.borrow_mut();
        let file = sources.find(path).unwrap_or_else(|| sources.add(path, text));
        let source = sources.get(file)?;
        match tree::parse(file, &source.text) {
            Ok(node) => Some((file, node)),
            Err(report) => {
                if let Some(place) = report.place {
                    sources.hide_behind(&SECRET_WORDS, place);
                }
                drop(sources);
                self.report(*report);
                None
            }
        }
    }

    /// Reports every name that was used before.
    pub fn unique<'n>(&self, what: &str, names: impl IntoIterator<Item = (&'n str, Span)>) {
        let mut seen: Vec<(&str, Span)> = Vec::new();
        for (name, place) in names {
            match seen.iter().find(|(known, _)| *known == name) {
                Some((_, first)) => self.report(
                    Report::error(place, format!("two {what} are named `{name}`"))
                        .label("second")
                        .related(*first, "first")
                        .help("give each its own name"),
                ),
                None => seen.push((name, place)),
            }
        }
    }

    /// Puts variables in. `$${` stands for `${` itself.
    fn expand(&self, text: &str) -> Result<String, String> {
        let mut expanded = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(dollar) = rest.find("${") {
            let (before, after) = (&rest[..dollar], &rest[dollar + 2..]);
            if let Some(escaped) = before.strip_suffix('$') {
                expanded.push_str(escaped);
                expanded.push_str("${");
                rest = after;
                continue;
            }
            expanded.push_str(before);
            let (inside, after) =
                after.split_once('}').ok_or("`${` is never closed by `}`; write `$${` for the text")?;
            let (name, default) = match inside.split_once(":-") {
                Some((name, default)) => (name, Some(default)),
                None => (inside, None),
            };
            let legal = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
            if name.is_empty() || !name.bytes().all(legal) {
                return Err(format!("`{name}` is not the name of an environment variable"));
            }
            match ((self.environment)(name).filter(|value| !value.is_empty()), default) {
                (Some(value), _) => expanded.push_str(&value),
                (None, Some(default)) => expanded.push_str(default),
                (None, None) => {
                    return Err(format!(
                        "the environment variable `{name}` is not set; set it, or write `${{{name}:-DEFAULT}}`"
                    ));
                }
            }
            rest = after;
        }
        expanded.push_str(rest);
        Ok(expanded)
    }
}

fn read_text(path: &Path) -> Result<String, String> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|error| error.to_string())?;
    file.take(MAX_FILE_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    if bytes.len() > MAX_FILE_BYTES {
        return Err(format!("longer than {} MiB", MAX_FILE_BYTES / (1024 * 1024)));
    }
    String::from_utf8(bytes).map_err(|error| {
        let good = error.utf8_error().valid_up_to();
        let line = error.as_bytes()[..good].iter().filter(|byte| **byte == b'\n').count() + 1;
        format!("line {line} is not UTF-8 text")
    })
}

/// One table of keys while it is being read.
pub struct Table<'a> {
    pub cx: &'a Context<'a>,
    /// The way here from the top, as in `listeners[]`.
    path: String,
    /// Where to point when something is missing: the key that holds the table, or its first key.
    pub place: Span,
    pub directory: &'a Path,
    entries: &'a [Entry],
    known: Vec<&'static str>,
    /// Those of `known` whose values are kept out of reports.
    secret: Vec<&'static str>,
    missing: Missing,
}

/// Reports of missing keys, with the keys; held back until it is known whether one of them was only misspelt.
type Missing = Rc<RefCell<Vec<(Vec<String>, Report)>>>;

impl<'a> Table<'a> {
    fn empty(cx: &'a Context<'a>, path: String, place: Span, directory: &'a Path) -> Self {
        Self {
            cx,
            path,
            place,
            directory,
            entries: &[],
            known: Vec::new(),
            secret: Vec::new(),
            missing: Missing::default(),
        }
    }

    /// Reads a whole file's tree with `read`.
    pub fn read_root<R>(
        cx: &'a Context<'a>,
        node: &'a Node,
        directory: &'a Path,
        read: impl FnOnce(&mut Self) -> R,
    ) -> Option<R> {
        let mut table = Self::empty(cx, String::new(), Span { end: node.span.start, ..node.span }, directory);
        table.fill(node).then(|| table.read(read))
    }

    /// Runs `read`, then reports the keys nobody asked for.
    fn read<R>(mut self, read: impl FnOnce(&mut Self) -> R) -> R {
        let result = read(&mut self);
        for entry in self.entries.iter().filter(|entry| !self.known.contains(&entry.key.as_str())) {
            let meant = did_you_mean(&entry.key, &self.known);
            let sounds_secret = SECRET_WORDS.iter().any(|word| entry.key.to_lowercase().contains(word));
            if sounds_secret || meant.is_some_and(|meant| self.secret.contains(&meant)) {
                self.cx.sources.borrow_mut().hide(entry.node.span);
            }
            let place = if self.path.is_empty() { "here".into() } else { format!("in `{}`", self.path) };
            let report = Report::error(entry.key_span, format!("unknown key `{}` {place}", entry.key));
            self.cx.report(match meant {
                Some(word) => {
                    self.missing.borrow_mut().retain(|(keys, _)| !keys.iter().any(|key| key == word));
                    report.label(format!("did you mean `{word}`?"))
                }
                None => report.help(format!("the keys {place} are {}", list(&self.known))),
            });
        }
        for (_, report) in self.missing.take() {
            self.cx.report(report);
        }
        result
    }

    fn fill(&mut self, node: &'a Node) -> bool {
        match &node.value {
            Value::Table(entries) => {
                if let (true, Some(first)) = (self.place.start == self.place.end, entries.first()) {
                    self.place = first.key_span;
                }
                self.entries = entries;
                true
            }
            Value::Null => true,
            _ => {
                let report = Report::error(node.span, format!("expected a table of keys, found {}", node.describe()));
                let keys = match self.path.as_str() {
                    "" => "`fieldgate keys`".to_owned(),
                    path => format!("`fieldgate keys {}`", path.replace("[]", "")),
                };
                self.cx
                    .report(report.help(format!("write `key: value` lines, indented under it; {keys} explains them")));
                false
            }
        }
    }

    fn entry(&mut self, key: &'static str) -> Option<&'a Entry> {
        self.known.push(key);
        self.entries.iter().find(|entry| entry.key == key)
    }

    fn below(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// Where `key` stands, if it is given.
    pub fn place_of(&self, key: &str) -> Option<Span> {
        self.entries.iter().find(|entry| entry.key == key).map(|entry| entry.key_span)
    }

    pub fn report(&self, report: Report) {
        self.cx.report(report);
    }

    /// Reports that `key`, which was read, is missing, unless it was only misspelt.
    pub fn missing(&self, key: &str, help: &str) {
        let report = Report::error(self.place, format!("`{key}` is missing")).label("needed here").help(help);
        self.missing.borrow_mut().push((vec![key.to_owned()], report));
    }

    /// Reports when not exactly one of `keys` is given. They are still to be read.
    pub fn exactly_one(&self, keys: &[&str]) {
        let given: Vec<_> = keys.iter().filter_map(|key| Some((*key, self.place_of(key)?))).collect();
        match given.as_slice() {
            [] => {
                let report = Report::error(self.place, format!("one of {} is missing", list(keys)));
                let keys = keys.iter().map(|key| (*key).to_owned()).collect();
                self.missing.borrow_mut().push((keys, report.label("needs one of them")));
            }
            _ => self.at_most_one(keys),
        }
    }

    /// Reports when more than one of `keys` is given. They are still to be read.
    pub fn at_most_one(&self, keys: &[&str]) {
        let mut given = keys.iter().filter_map(|key| Some((*key, self.place_of(key)?)));
        if let (Some((first, first_place)), Some((second, second_place))) = (given.next(), given.next()) {
            self.report(
                Report::error(second_place, format!("`{first}` and `{second}` exclude each other"))
                    .related(first_place, "also given")
                    .help("keep one of them"),
            );
        }
    }

    /// A single value.
    pub fn value<T: Scalar>(&mut self, key: &'static str, meaning: &'static str) -> Field<'a, T> {
        let entry = self.entry(key);
        if T::SECRET {
            self.secret.push(key);
        }
        let shape = if T::words().is_empty() { T::SHAPE.to_owned() } else { list(T::words()) };
        let key_doc = Key { path: self.below(key), shape, default: None, required: false, meaning };
        let value = entry.map(|entry| scalar(self.cx, self.directory, key, &entry.node, entry.key_span));
        let failed = matches!(value, Some(None));
        Field {
            cx: self.cx,
            key,
            doc: key_doc,
            place: self.place,
            value: value.flatten(),
            failed,
            missing: self.missing.clone(),
        }
    }

    /// A list of single values; absent is empty. One value may stand without the list's brackets.
    pub fn values<T: Scalar>(&mut self, key: &'static str, meaning: &'static str) -> Vec<Located<T>> {
        let shape = format!("a list, each {}", if T::words().is_empty() { T::SHAPE.into() } else { list(T::words()) });
        self.cx.document(Key { path: self.below(key), shape, default: None, required: false, meaning });
        let Some(entry) = self.entry(key) else { return Vec::new() };
        match &entry.node.value {
            Value::Null => Vec::new(),
            Value::List(items) => {
                items.iter().filter_map(|item| scalar(self.cx, self.directory, key, item, item.span)).collect()
            }
            Value::Scalar(_) | Value::Table(_) => {
                scalar(self.cx, self.directory, key, &entry.node, entry.key_span).into_iter().collect()
            }
        }
    }

    /// A table that is read also when it is absent, for its defaults.
    pub fn table<R>(&mut self, key: &'static str, meaning: &'static str, read: impl FnOnce(&mut Self) -> R) -> R {
        let (mut table, entry) = self.child(key, meaning, "a table");
        if let Some(entry) = entry {
            table.fill(&entry.node);
        }
        table.read(read)
    }

    /// A table that switches something on by being there.
    pub fn optional<R>(
        &mut self,
        key: &'static str,
        meaning: &'static str,
        read: impl FnOnce(&mut Self) -> Option<R>,
    ) -> Option<R> {
        let (mut table, entry) = self.child(key, meaning, "a table");
        let wanted = match entry {
            Some(entry) => table.fill(&entry.node),
            None => self.cx.is_describing(),
        };
        if wanted { table.read(read) } else { None }
    }

    /// A list of tables; absent is empty. What `read` refuses is left out; it has reported why.
    pub fn list<R>(
        &mut self,
        key: &'static str,
        meaning: &'static str,
        mut read: impl FnMut(&mut Self) -> Option<R>,
    ) -> Vec<R> {
        let (mut table, entry) = self.child(key, meaning, "a list of tables");
        table.path.push_str("[]");
        let items = match entry.map(|entry| &entry.node) {
            None if self.cx.is_describing() => return table.read(read).into_iter().collect(),
            None => return Vec::new(),
            Some(Node { value: Value::Null, .. }) => return Vec::new(),
            Some(Node { value: Value::List(items), .. }) => items,
            Some(node) => {
                let report = Report::error(table.place, format!("`{key}` must be a list, not {}", node.describe()));
                self.report(report.help("begin each item with `- `"));
                return Vec::new();
            }
        };
        let mut results = Vec::new();
        for item in items {
            let place = Span { end: item.span.start, ..item.span };
            let mut table = Self::empty(self.cx, table.path.clone(), place, self.directory);
            if table.fill(item) {
                results.extend(table.read(&mut read));
            }
        }
        results
    }

    /// A table whose keys are free, as identifiers of something: each key with the scalar it holds.
    pub fn pairs<K: Scalar, V: Scalar>(
        &mut self,
        key: &'static str,
        meaning: &'static str,
    ) -> Vec<(Located<K>, Located<V>)> {
        let shape = format!("a table from {} to {}", K::SHAPE, V::SHAPE);
        self.cx.document(Key { path: self.below(key), shape, default: None, required: false, meaning });
        let Some(entry) = self.entry(key) else { return Vec::new() };
        let entries = match &entry.node.value {
            Value::Null => return Vec::new(),
            Value::Table(entries) => entries,
            _ => {
                let message = format!("`{key}` must be a table of keys, not {}", entry.node.describe());
                self.report(Report::error(entry.key_span, message));
                return Vec::new();
            }
        };
        let pair = |entry: &Entry| {
            let value = scalar(self.cx, self.directory, key, &entry.node, entry.key_span);
            match K::parse(&entry.key, &Origin { directory: self.directory }) {
                Ok(left) => Some((Located { value: left, span: entry.key_span }, value?)),
                Err(detail) => {
                    self.report(mismatch::<K>(key, entry.key_span, &entry.key, &detail));
                    None
                }
            }
        };
        entries.iter().filter_map(pair).collect()
    }

    /// Whatever stands there, as JSON; an empty object if nothing does.
    pub fn json(&mut self, key: &'static str, meaning: &'static str) -> Json {
        let shape = "anything".to_owned();
        self.cx.document(Key { path: self.below(key), shape, default: None, required: false, meaning });
        self.entry(key).map_or_else(|| Json::Object(serde_json::Map::new()), |entry| json(&entry.node))
    }

    fn child(&mut self, key: &'static str, meaning: &'static str, shape: &str) -> (Self, Option<&'a Entry>) {
        let path = self.below(key);
        self.cx.document(Key { path: path.clone(), shape: shape.into(), default: None, required: false, meaning });
        let entry = self.entry(key);
        let place = entry.map_or(self.place, |entry| entry.key_span);
        (Self::empty(self.cx, path, place, self.directory), entry)
    }
}

/// One value on its way from the file to the settings.
#[must_use = "a field that is not finished is not documented"]
pub struct Field<'a, T> {
    cx: &'a Context<'a>,
    key: &'static str,
    doc: Key,
    place: Span,
    value: Option<Located<T>>,
    /// Given, but wrong; that has been reported.
    failed: bool,
    missing: Missing,
}

impl<T: Scalar> Field<'_, T> {
    /// Bounds the value, both ends included.
    pub fn range(mut self, range: RangeInclusive<T>) -> Self
    where
        T: PartialOrd,
    {
        let bounds = format!("from {} to {}", range.start().show(), range.end().show());
        self.doc.shape = format!("{}, {bounds}", self.doc.shape);
        let message = "is out of range";
        self.refuse(message, |value| if range.contains(value) { Ok(()) } else { Err(format!("must be {bounds}")) })
    }

    /// Any other condition; the error says what the value must be.
    pub fn check(self, check: impl FnOnce(&T) -> Result<(), String>) -> Self {
        self.refuse("cannot be used", check)
    }

    fn refuse(mut self, what: &str, check: impl FnOnce(&T) -> Result<(), String>) -> Self {
        if let Some(Located { value, span }) = &self.value
            && let Err(must) = check(value)
        {
            self.cx.report(Report::error(*span, format!("`{}` {what}", self.key)).label(must));
            self.value = None;
            self.failed = true;
        }
        self
    }

    pub fn or(mut self, default: T) -> T {
        self.doc.default = Some(default.show());
        self.optional().unwrap_or(default)
    }

    /// A default that depends on the machine or other keys; `shown` describes it.
    pub fn or_else(mut self, shown: &str, default: impl FnOnce() -> T) -> T {
        self.doc.default = Some(shown.to_owned());
        self.optional().unwrap_or_else(default)
    }

    pub fn required(self) -> Option<T> {
        self.required_at().map(|located| located.value)
    }

    pub fn required_at(mut self) -> Option<Located<T>> {
        self.doc.required = true;
        if self.value.is_none() && !self.failed {
            let report = Report::error(self.place, format!("`{}` is missing", self.key));
            let help = format!("add `{}:` with {}: {}", self.key, self.doc.shape, lower_first(self.doc.meaning));
            self.missing.borrow_mut().push((vec![self.key.to_owned()], report.label("needed here").help(help)));
        }
        self.optional_at()
    }

    pub fn optional(self) -> Option<T> {
        self.optional_at().map(|located| located.value)
    }

    pub fn optional_at(self) -> Option<Located<T>> {
        self.cx.document(self.doc);
        self.value
    }
}

/// A tree as JSON: YAML's core schema for plain words and numbers. As deep as [`tree`] allows.
fn json(node: &Node) -> Json {
    match &node.value {
        Value::Null => Json::Null,
        Value::Scalar(text) if !node.plain => text.clone().into(),
        Value::Scalar(text) => match text.as_str() {
            "true" => Json::Bool(true),
            "false" => Json::Bool(false),
            text => match serde_json::from_str(text) {
                Ok(Json::Number(number)) => Json::Number(number),
                _ => text.into(),
            },
        },
        Value::List(items) => items.iter().map(json).collect(),
        Value::Table(entries) => entries.iter().map(|entry| (entry.key.clone(), json(&entry.node))).collect(),
    }
}

/// Reads one scalar; `None` has been reported.
fn scalar<T: Scalar>(cx: &Context<'_>, directory: &Path, key: &str, node: &Node, key_span: Span) -> Option<Located<T>> {
    let span = node.span;
    if T::SECRET {
        cx.sources.borrow_mut().hide(span);
    }
    cx.sources.borrow_mut().hide_login(span);
    let text = match &node.value {
        Value::Scalar(text) => text,
        Value::Null => {
            cx.report(Report::error(key_span, format!("`{key}` has no value")).help(format!("write {}", T::SHAPE)));
            return None;
        }
        _ => {
            let message = format!("`{key}` must be {}, not {}", T::SHAPE, node.describe());
            cx.report(Report::error(key_span, message));
            return None;
        }
    };
    let file = text.strip_prefix("file:").filter(|_| T::SECRET);
    let expanded = if T::EXPAND { cx.expand(file.unwrap_or(text)) } else { Ok(text.clone()) };
    let expanded = match (expanded, file) {
        (Ok(path), Some(_)) => {
            let path = directory.join(path);
            cx.note_file(&path);
            read_secret(&path)
        }
        (other, _) => other,
    };
    let text = match expanded {
        Ok(text) => text,
        Err(problem) => {
            cx.report(Report::error(span, format!("`{key}` cannot be read")).label(problem));
            return None;
        }
    };
    match T::parse(&text, &Origin { directory }) {
        Ok(value) => Some(Located { value, span }),
        Err(detail) => {
            let report = mismatch::<T>(key, span, &text, &detail);
            cx.report(match did_you_mean(&text, T::words()) {
                Some(word) => report.help(format!("did you mean `{word}`?")),
                None => report,
            });
            None
        }
    }
}

fn mismatch<T: Scalar>(key: &str, place: Span, text: &str, detail: &str) -> Report {
    if T::is_out_of_range(text) {
        return Report::error(place, format!("`{key}` is out of range")).label(detail);
    }
    let shape = match T::words() {
        [] => T::SHAPE.to_owned(),
        words => format!("one of {}", list(words)),
    };
    let report = Report::error(place, format!("`{key}` must be {shape}"));
    if detail.is_empty() { report } else { report.label(detail) }
}

fn read_secret(path: &Path) -> Result<String, String> {
    let describe = |problem: String| format!("{}: {problem}", path.display());
    let mut text = String::new();
    let file = File::open(path).map_err(|error| describe(error.to_string()))?;
    file.take(MAX_SECRET_BYTES as u64 + 1).read_to_string(&mut text).map_err(|error| describe(error.to_string()))?;
    if text.len() > MAX_SECRET_BYTES {
        return Err(describe(format!("longer than {} KiB", MAX_SECRET_BYTES / 1024)));
    }
    // Editors and `echo` end a file with a newline that is no part of the password.
    let text = text.strip_suffix('\n').unwrap_or(&text);
    Ok(text.strip_suffix('\r').unwrap_or(text).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_put_in_with_defaults_and_an_escape() {
        let environment = |name: &str| (name == "HOST").then(|| "plant".to_owned());
        let context = Context::new(&environment);
        let check = |text: &str, expected: Result<&str, &str>| {
            let expanded = context.expand(text);
            match expected {
                Ok(expected) => assert_eq!(expanded.as_deref(), Ok(expected)),
                Err(part) => assert!(expanded.unwrap_err().contains(part)),
            }
        };
        check("a-${HOST}-b", Ok("a-plant-b"));
        check("${PORT:-1883}${HOST}", Ok("1883plant"));
        check("${PORT:-}", Ok(""));
        check("$${HOST} $x $", Ok("${HOST} $x $"));
        check("${PORT}", Err("`PORT` is not set"));
        check("${HOST", Err("never closed"));
        check("${a b}", Err("not the name"));
    }
}
