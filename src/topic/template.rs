//! Text made from a topic: what stands where a filter has wildcards, put into places of a template. Pure.

use thiserror::Error;

use super::TopicFilter;

/// Text with places for what a filter's wildcards stand for: `{1}` for the first `+`, `{2}` for the second, `{#}` for all
/// that the `#` at the end stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(Box<str>),
    /// What the `+` of this index, from 0, stands for.
    Level(usize),
    Rest,
}

/// What is wrong with a template.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TemplateError {
    #[error(
        "`{{{0}}}` is not a level; write {{1}} for what stands in place of the filter's first `+`, and {{#}} for what stands \
         in place of its `#`"
    )]
    Placeholder(String),
    #[error("the filter has {wildcards} `+`, so there is no {{{level}}}")]
    NoSuchLevel { level: usize, wildcards: usize },
    #[error("the filter has no `#`, so there is no {{#}}")]
    NoRest,
    #[error("a brace is not closed")]
    Brace,
}

impl Template {
    /// Takes a template apart; `filter` is the one whose wildcards it speaks of.
    ///
    /// # Errors
    /// [`TemplateError`] says what of it cannot be.
    pub fn parse(text: &str, filter: &TopicFilter) -> Result<Self, TemplateError> {
        let wildcards = filter.as_str().split('/').filter(|level| *level == "+").count();
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((literal, after)) = rest.split_once('{') {
            let (name, after) = after.split_once('}').ok_or(TemplateError::Brace)?;
            parts.extend((!literal.is_empty()).then(|| Part::Text(literal.into())));
            parts.push(match name {
                "#" if filter.as_str().ends_with('#') => Part::Rest,
                "#" => return Err(TemplateError::NoRest),
                number => {
                    let level = number.parse().map_err(|_| TemplateError::Placeholder(number.to_owned()))?;
                    if !(1..=wildcards).contains(&level) {
                        return Err(TemplateError::NoSuchLevel { level, wildcards });
                    }
                    Part::Level(level - 1)
                }
            });
            rest = after;
        }
        parts.extend((!rest.is_empty()).then(|| Part::Text(rest.into())));
        Ok(Self(parts))
    }

    /// Writes the template to `filled`, its places taken by what stands in `topic`, which `filter` matches. Where `#`
    /// stands for nothing, because `topic` is the parent, the slash before `{#}` is left out.
    pub fn fill(&self, filter: &TopicFilter, topic: &str, filled: &mut String) {
        for part in &self.0 {
            match part {
                Part::Text(text) => filled.push_str(text),
                Part::Level(index) => filled.push_str(filter.captures(topic).nth(*index).unwrap_or_default()),
                Part::Rest => match filter.rest(topic) {
                    Some(rest) => filled.push_str(rest),
                    None => _ = filled.ends_with('/').then(|| filled.pop()),
                },
            }
        }
    }
}

impl TopicFilter {
    /// What stands in `topic`, which this filter matches, in place of each `+`.
    pub fn captures<'t>(&'t self, topic: &'t str) -> impl Iterator<Item = &'t str> {
        let levels = self.as_str().split('/').zip(topic.split('/'));
        levels.filter(|(wanted, _)| *wanted == "+").map(|(_, level)| level)
    }

    /// What stands in `topic`, which this filter matches, in place of the `#`; `None` without one, or for the parent.
    fn rest<'t>(&self, topic: &'t str) -> Option<&'t str> {
        let before = self.as_str().strip_suffix('#')?.matches('/').count();
        topic.splitn(before + 1, '/').nth(before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_taken_by_what_stands_in_the_topic() {
        let check = |template: &str, filter: &str, topic: &str, expected: &str| {
            let filter = TopicFilter::new(filter).unwrap();
            assert!(filter.matches(topic), "{topic}");
            let mut filled = String::new();
            Template::parse(template, &filter).unwrap().fill(&filter, topic, &mut filled);
            assert_eq!(filled, expected, "{template} {topic}");
        };
        check("{2}-{1}", "+/x/+/#", "a/x/b/c/d", "b-a");
        check("plants/{1}/{#}", "devices/+/#", "devices/m/v/set", "plants/m/v/set");
        check("plants/{1}/{#}", "devices/+/#", "devices/m", "plants/m");
        check("plants/{1}/{#}", "devices/+/#", "devices/m/", "plants/m/");
        check("{#}", "#", "a/b", "a/b");
        check("{#}{1}", "+/#", "a", "a");
        check("fixed", "a", "a", "fixed");
        check("{1}/{1}", "+", "", "/");
    }

    #[test]
    fn a_wrong_template_says_which_place_there_is_not() {
        let check = |template: &str, filter: &str, expected: TemplateError| {
            let filter = TopicFilter::new(filter).unwrap();
            assert_eq!(Template::parse(template, &filter), Err(expected), "{template}");
        };
        check("{2}", "a/+/#", TemplateError::NoSuchLevel { level: 2, wildcards: 1 });
        check("{0}", "a/+", TemplateError::NoSuchLevel { level: 0, wildcards: 1 });
        check("{#}", "a/+", TemplateError::NoRest);
        check("{site}", "a/+", TemplateError::Placeholder("site".into()));
        check("{1", "a/+", TemplateError::Brace);
    }
}
