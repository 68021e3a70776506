//! The medians of all rounds as a table in Markdown.

use std::fmt;

use super::gateway::{BRIDGES, Bridge};
use crate::table::median;

/// Rows in the order in which they were first added to.
#[derive(Default)]
pub struct Report(Vec<(String, [Vec<f64>; BRIDGES.len() + 1])>);

#[derive(Clone, Copy)]
pub enum Column {
    Of(Bridge),
    /// What the upstream takes from anybody.
    Limit,
}

impl Report {
    pub fn add(&mut self, name: &str, column: Column, value: f64) {
        let at = self.0.iter().position(|(known, _)| known == name).unwrap_or_else(|| {
            self.0.push((name.into(), Default::default()));
            self.0.len() - 1
        });
        let column = match column {
            Column::Of(bridge) => bridge as usize,
            Column::Limit => BRIDGES.len(),
        };
        self.0[at].1[column].push(value);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = BRIDGES.map(Bridge::name);
        let rule = " --- |".repeat(names.len() + 1);
        writeln!(f, "| | {} | the upstream's own limit |\n| --- |{rule}", names.join(" | "))?;
        for (name, values) in &self.0 {
            let cells =
                values.each_ref().map(|values| if values.is_empty() { "–".into() } else { cell(median(values)) });
            writeln!(f, "| {name} | {} |", cells.join(" | "))?;
        }
        Ok(())
    }
}

/// Three digits that count.
fn cell(value: f64) -> String {
    match value.abs() {
        size if size >= 10_000.0 => format!("{:.0}k", value / 1000.0),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
