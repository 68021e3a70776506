//! What is wrong in a configuration, for the person who wrote it: message, place, snippet, what to do.

use std::fmt::Write;

use annotate_snippets::renderer::DecorStyle;
use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};

use super::source::{Sources, Span};

/// More reports than these are counted, not shown: the first ones usually explain the rest.
const MAX_SHOWN: usize = 50;

/// One finding.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    pub severity: Severity,
    /// What is wrong, in one line.
    pub message: String,
    /// Where; `None` for what has no place, as a file that cannot be read.
    pub place: Option<Span>,
    /// Stands under the place in the snippet.
    pub label: String,
    /// Other places that belong to the finding.
    pub related: Vec<(Span, String)>,
    /// What to do.
    pub help: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    Error,
    /// The configuration works, but probably not as meant.
    Warning,
}

impl Report {
    pub fn error(place: Span, message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            message: message.into(),
            place: Some(place),
            label: String::new(),
            related: Vec::new(),
            help: None,
        }
    }

    pub fn warning(place: Span, message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(place, message) }
    }

    pub fn label(mut self, label: impl Into<String>) -> Self {
        self.label = label.into();
        self
    }

    pub fn related(mut self, place: Span, label: impl Into<String>) -> Self {
        self.related.push((place, label.into()));
        self
    }

    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

/// How reports look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// For files, logs and pipes.
    Plain,
    /// For terminals, with colours.
    Styled,
}

/// Everything found in one configuration, with the texts it was found in.
#[derive(Debug, Default)]
pub struct Reports {
    pub sources: Sources,
    pub reports: Vec<Report>,
}

impl Reports {
    pub fn errors(&self) -> usize {
        self.reports.iter().filter(|report| report.severity == Severity::Error).count()
    }

    pub fn warnings(&self) -> usize {
        self.reports.len() - self.errors()
    }

    /// All reports as text, in the order of the files.
    pub fn render(&self, look: Look) -> String {
        let renderer = match look {
            Look::Plain => Renderer::plain(),
            // Links to files need an absolute URL; a relative path in one is worse than none.
            Look::Styled => Renderer::styled().decor_style(DecorStyle::Unicode).hyperlink(false),
        };
        let mut text = String::new();
        for report in self.reports.iter().take(MAX_SHOWN) {
            let _ = writeln!(text, "{}\n", self.render_one(report, &renderer));
        }
        if let Some(more) = self.reports.len().checked_sub(MAX_SHOWN).filter(|more| *more > 0) {
            let _ = writeln!(text, "and {more} more\n");
        }
        text
    }

    /// One line per report: `file:line:column: message (label); help`, for logs.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        self.reports.iter().map(|report| {
            let mut text = String::new();
            if let Some(place) = report.place {
                let (line, column) = self.sources.position(place);
                let path = self.sources.get(place.file).map(|source| source.path.display().to_string());
                let _ = write!(text, "{}:{line}:{column}: ", path.unwrap_or_default());
            }
            text.push_str(&report.message);
            if !report.label.is_empty() {
                let _ = write!(text, " ({})", report.label);
            }
            if let Some(help) = &report.help {
                let _ = write!(text, "; {help}");
            }
            text
        })
    }

    fn render_one(&self, report: &Report, renderer: &Renderer) -> String {
        let level = match report.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let mut group = Group::with_title(level.primary_title(report.message.clone()));
        let places = report.place.map(|place| (place, report.label.clone(), AnnotationKind::Primary));
        let related = report.related.iter().map(|(place, label)| (*place, label.clone(), AnnotationKind::Context));
        let mut places: Vec<_> = places.into_iter().chain(related).collect();
        // One snippet per file, each file once, the report's own place first.
        while let Some(&(Span { file, .. }, ..)) = places.first() {
            let (here, elsewhere): (Vec<_>, Vec<_>) = places.into_iter().partition(|(place, ..)| place.file == file);
            places = elsewhere;
            let Some(source) = self.sources.get(file) else { continue };
            let text = source.shown();
            let annotations: Vec<_> = here
                .into_iter()
                .map(|(place, label, kind)| {
                    let annotation = kind.span(visible(&text, place));
                    if label.is_empty() { annotation } else { annotation.label(label) }
                })
                .collect();
            let path = source.path.display().to_string();
            group = group.element(Snippet::source(text).path(path).annotations(annotations));
        }
        if let Some(help) = &report.help {
            group = group.element(Level::HELP.message(help.clone()));
        }
        renderer.render(&[group])
    }
}

/// The part of a place that is worth underlining: its first line, on whole characters, at least one wide.
fn visible(text: &str, place: Span) -> std::ops::Range<usize> {
    let start = text.floor_char_boundary((place.start as usize).min(text.len()));
    let end = text.ceil_char_boundary((place.end as usize).clamp(start, text.len()));
    let first_line = text[start..end].lines().next().unwrap_or_default();
    start..start + first_line.trim_end().len()
}
