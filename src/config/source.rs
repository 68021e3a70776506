//! The texts a configuration is made of, and places in them.

use std::ops::Range;
use std::path::{Path, PathBuf};

/// A place in one of the [`Sources`]: the file's index and a range of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    pub file: u32,
    pub start: u32,
    pub end: u32,
}

impl Span {
    pub(super) fn new(file: u32, range: Range<usize>) -> Self {
        // Files are limited to MAX_FILE_BYTES, far below 4 GiB.
        let clip = |offset: usize| u32::try_from(offset).unwrap_or(u32::MAX);
        Self { file, start: clip(range.start), end: clip(range.end) }
    }

    pub(super) fn range(self) -> Range<usize> {
        self.start as usize..self.end as usize
    }
}

/// A value and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located<T> {
    pub value: T,
    pub span: Span,
}

/// One text.
#[derive(Debug)]
pub struct Source {
    /// As the operator named it.
    pub path: PathBuf,
    pub text: String,
    /// Ranges that hold secrets; they are never shown.
    pub secrets: Vec<Range<usize>>,
}

/// Every text read for one configuration; the main file is the first.
#[derive(Debug, Default)]
pub struct Sources(Vec<Source>);

impl Sources {
    pub(super) fn add(&mut self, path: &Path, text: String) -> u32 {
        self.0.push(Source { path: path.to_path_buf(), text, secrets: Vec::new() });
        u32::try_from(self.0.len() - 1).unwrap_or(u32::MAX)
    }

    pub(super) fn find(&self, path: &Path) -> Option<u32> {
        let index = self.0.iter().position(|source| source.path == path)?;
        u32::try_from(index).ok()
    }

    pub(super) fn get(&self, file: u32) -> Option<&Source> {
        self.0.get(file as usize)
    }

    /// Keeps what stands at `span` out of every report.
    pub(super) fn hide(&mut self, span: Span) {
        if let Some(source) = self.0.get_mut(span.file as usize) {
            source.secrets.push(span.range());
        }
    }

    /// Keeps the user and the password of an address at `span` out of every report.
    pub(super) fn hide_login(&mut self, span: Span) {
        let Some(text) = self.get(span.file).and_then(|source| source.text.get(span.range())) else { return };
        let Some(start) = text.find("://").map(|colon| colon + 3) else { return };
        let end = text[start..].find('/').map_or(text.len(), |slash| start + slash);
        if let Some(at) = text[start..end].rfind('@') {
            let start = span.range().start + start;
            self.hide(Span::new(span.file, start..start + at));
        }
    }

    /// Keeps what stands behind one of `words` on the line of `span` out of every report: of a text that is no YAML,
    /// nobody knows which values are secret.
    pub(super) fn hide_behind(&mut self, words: &[&str], span: Span) {
        let Some(source) = self.get(span.file) else { return };
        let place = source.text.floor_char_boundary(span.range().start);
        let start = source.text[..place].rfind('\n').map_or(0, |newline| newline + 1);
        let line = source.text[start..].lines().next().unwrap_or_default();
        let lower = line.to_ascii_lowercase();
        let word = words.iter().filter_map(|word| lower.find(word)).min();
        let value = word.and_then(|word| Some(word + line[word..].find(':')? + 1));
        if let Some(value) = value {
            self.hide(Span::new(span.file, start + value..start + line.len()));
        }
    }

    /// Line and column, both from 1, columns in characters.
    pub fn position(&self, span: Span) -> (usize, usize) {
        let Some(source) = self.get(span.file) else { return (1, 1) };
        let before = &source.text[..source.text.floor_char_boundary(span.start as usize)];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
    }
}

impl Source {
    /// The text with every secret replaced by stars, byte for byte so that places stay where they are.
    pub(super) fn shown(&self) -> String {
        let mut bytes = self.text.clone().into_bytes();
        for range in &self.secrets {
            let start = self.text.floor_char_boundary(range.start);
            let end = self.text.ceil_char_boundary(range.end);
            for byte in bytes.get_mut(start..end).into_iter().flatten() {
                if *byte != b'\n' {
                    *byte = b'*';
                }
            }
        }
        String::from_utf8(bytes).unwrap_or_default()
    }
}
