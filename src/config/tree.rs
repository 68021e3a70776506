//! YAML text to a tree in which every key and value knows its place.
//!
//! Built from the parser's events, without serde: that is what lets the reader above it find every error at once,
//! point at both of two duplicate keys, and see the text of a scalar before anything has guessed its type. YAML 1.2;
//! one document; tags are refused, anchors and aliases are followed within limits.

use std::collections::HashMap;

use granit_parser::{ErrorKind, Event, Marker, Parser, ScalarStyle, ScanError};

use super::report::Report;
use super::source::Span;

/// A configuration or profile file may not be longer.
pub const MAX_FILE_BYTES: usize = 1024 * 1024;
/// Values in one tree, after aliases are followed; what a "billion laughs" file runs into.
const MAX_NODES: usize = 100_000;
/// Collections inside collections; the configuration itself needs 8.
const MAX_DEPTH: usize = 64;

#[derive(Clone, Debug)]
pub struct Node {
    pub span: Span,
    pub value: Value,
    /// Written without quotes, so that `12` is a number where nobody asks for text.
    pub plain: bool,
    /// Values in this one, itself included.
    size: usize,
}

#[derive(Clone, Debug)]
pub enum Value {
    /// Nothing after the colon, `~` or `null`.
    Null,
    Scalar(String),
    List(Vec<Node>),
    Table(Vec<Entry>),
}

#[derive(Clone, Debug)]
pub struct Entry {
    pub key: String,
    pub key_span: Span,
    pub node: Node,
}

impl Node {
    /// What stands here, for an error message.
    pub fn describe(&self) -> &'static str {
        match &self.value {
            Value::Null => "nothing",
            Value::Scalar(_) => "a single value",
            Value::List(_) => "a list",
            Value::Table(_) => "a table of keys",
        }
    }
}

/// Parses `text`, which is source `file`. An empty document is an empty table.
pub fn parse(file: u32, text: &str) -> Result<Node, Box<Report>> {
    let mut builder = Builder { text, stack: Vec::new(), anchors: HashMap::new(), root: None, nodes: 0 };
    let options = granit_parser::options! { flow_nesting_limit: MAX_DEPTH, block_nesting_limit: MAX_DEPTH };
    for event in Parser::new_from_str_with_options(text, options) {
        let (event, span) = event.map_err(|error| Box::new(syntax_error(file, text, &error)))?;
        let span = Span::new(file, offset(text, &span.start)..offset(text, &span.end));
        builder.handle(event, span)?;
    }
    let empty = Node { span: Span::new(file, 0..0), value: Value::Table(Vec::new()), plain: false, size: 1 };
    Ok(match builder.root {
        None | Some(Node { value: Value::Null, .. }) => empty,
        Some(root) => root,
    })
}

/// A collection that is still being filled.
struct Open {
    anchor: usize,
    start: Span,
    kind: Kind,
}

enum Kind {
    List(Vec<Node>),
    Table { entries: Vec<Entry>, keys: HashMap<String, Span>, next: Option<(String, Span)> },
}

struct Builder<'a> {
    text: &'a str,
    stack: Vec<Open>,
    anchors: HashMap<usize, Node>,
    root: Option<Node>,
    nodes: usize,
}

impl Builder<'_> {
    fn handle(&mut self, event: Event<'_>, span: Span) -> Result<(), Box<Report>> {
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                refuse_tag(tag.is_some(), span)?;
                let plain = matches!(style, ScalarStyle::Plain);
                let value = if plain && matches!(&*text, "" | "~" | "null") {
                    Value::Null
                } else {
                    Value::Scalar(text.into_owned())
                };
                self.nodes += 1;
                self.add(Node { span, value, plain, size: 1 }, anchor)
            }
            Event::SequenceStart(_, anchor, tag) => {
                refuse_tag(tag.is_some(), span)?;
                self.open(Open { anchor, start: span, kind: Kind::List(Vec::new()) })
            }
            Event::MappingStart(_, anchor, tag) => {
                refuse_tag(tag.is_some(), span)?;
                self.open(Open {
                    anchor,
                    start: span,
                    kind: Kind::Table { entries: Vec::new(), keys: HashMap::new(), next: None },
                })
            }
            Event::SequenceEnd | Event::MappingEnd => {
                let Some(Open { anchor, start, kind }) = self.stack.pop() else { return Ok(()) };
                let span = Span { end: span.end.max(start.end), ..start };
                let (value, below) = match kind {
                    Kind::List(items) => {
                        let below: usize = items.iter().map(|item| item.size).sum();
                        (Value::List(items), below)
                    }
                    Kind::Table { entries, .. } => {
                        let below: usize = entries.iter().map(|entry| entry.node.size).sum();
                        (Value::Table(entries), below)
                    }
                };
                self.nodes += 1;
                self.add(Node { span, value, plain: false, size: below + 1 }, anchor)
            }
            Event::Alias(anchor) => match self.anchors.get(&anchor) {
                Some(node) => {
                    self.nodes = self.nodes.saturating_add(node.size);
                    self.limit_nodes(span)?;
                    let node = node.clone();
                    self.add(node, 0)
                }
                None => Err(Box::new(
                    Report::error(span, "this alias stands inside the value it refers to")
                        .help("write the value out instead"),
                )),
            },
            Event::DocumentStart(..) if self.root.is_some() => Err(Box::new(
                Report::error(span, "a second YAML document begins here")
                    .help("a configuration file holds one document: remove the `---`"),
            )),
            _ => Ok(()),
        }
    }

    fn open(&mut self, open: Open) -> Result<(), Box<Report>> {
        if self.stack.len() >= MAX_DEPTH {
            return Err(Box::new(Report::error(open.start, format!("nested more than {MAX_DEPTH} levels deep"))));
        }
        self.stack.push(open);
        Ok(())
    }

    /// Puts a complete value where it belongs.
    fn add(&mut self, node: Node, anchor: usize) -> Result<(), Box<Report>> {
        self.limit_nodes(node.span)?;
        if anchor != 0 {
            self.nodes = self.nodes.saturating_add(node.size);
            self.limit_nodes(node.span)?;
            self.anchors.insert(anchor, node.clone());
        }
        match self.stack.last_mut() {
            None => self.root = Some(node),
            Some(Open { kind: Kind::List(items), .. }) => items.push(node),
            Some(Open { kind: Kind::Table { entries, keys, next }, .. }) => match next.take() {
                Some((key, key_span)) => entries.push(Entry { key, key_span, node }),
                None => {
                    let key = match node.value {
                        Value::Scalar(text) => text,
                        Value::Null => self.text.get(node.span.range()).unwrap_or_default().to_owned(),
                        Value::List(_) | Value::Table(_) => {
                            let report = Report::error(node.span, "a key must be a single word")
                                .help("put quotes around a value that begins with `{` or `[`");
                            return Err(Box::new(report));
                        }
                    };
                    if let Some(first) = keys.insert(key.clone(), node.span) {
                        let report = Report::error(node.span, format!("`{key}` is given twice"))
                            .label("second time")
                            .related(first, "first time")
                            .help("remove one of the two, or merge them");
                        return Err(Box::new(report));
                    }
                    *next = Some((key, node.span));
                }
            },
        }
        Ok(())
    }

    fn limit_nodes(&self, place: Span) -> Result<(), Box<Report>> {
        if self.nodes > MAX_NODES {
            let report = Report::error(place, format!("more than {MAX_NODES} values, counting what aliases repeat"));
            return Err(Box::new(report));
        }
        Ok(())
    }
}

fn refuse_tag(tagged: bool, span: Span) -> Result<(), Box<Report>> {
    if tagged {
        let report = Report::error(span, "YAML tags are not used here").help("remove the word that begins with `!`");
        return Err(Box::new(report));
    }
    Ok(())
}

fn syntax_error(file: u32, text: &str, error: &ScanError) -> Report {
    let start = offset(text, error.marker());
    let end = text[start..].char_indices().nth(1).map_or(text.len(), |(next, _)| start + next);
    let end = if text[start..end].trim().is_empty() { start } else { end };
    let report = Report::error(Span::new(file, start..end), format!("not valid YAML: {}", error.kind()));
    match error.kind() {
        ErrorKind::TabNotAllowed | ErrorKind::TabInBlockIndentation | ErrorKind::TabInIndentation => {
            report.help("indent with spaces; YAML does not allow tabs")
        }
        ErrorKind::UnclosedQuotedScalar => report.help("close the quotation mark"),
        ErrorKind::UnexpectedCharacter { character: '%' | '@' | '`' } => report.help("put quotes around the value"),
        ErrorKind::ExpectedFlowMappingSeparator | ErrorKind::ExpectedFlowSequenceSeparator => report
            .help("close the brackets before this; between brackets `${VARIABLE}` and values with `,` need quotes"),
        ErrorKind::InvalidColonPlacement => report.help("is a `[` or a `{` before this not closed?"),
        ErrorKind::UnknownAnchor => report.help("a value that begins with `*`, as a topic filter, needs quotes"),
        ErrorKind::MappingValueNotAllowed => {
            report.help("check the indentation; a value that contains `: ` needs quotes")
        }
        ErrorKind::ExpectedBlockMappingKey | ErrorKind::InvalidIndentation | ErrorKind::SimpleKeyExpected => {
            report.help("check the indentation of this line and the one before it")
        }
        _ => report,
    }
}

fn offset(text: &str, mark: &Marker) -> usize {
    let bytes = mark.byte_offset().or_else(|| text.char_indices().nth(mark.index()).map(|(offset, _)| offset));
    text.floor_char_boundary(bytes.unwrap_or(text.len()).min(text.len()))
}
