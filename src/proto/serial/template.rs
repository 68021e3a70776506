//! Writing a command: a text with places for the point and its value, as in `T{value}\r\n`.
//!
//! `{value}` is the value as text, `{value:.2}` a number with two decimals, `{point}` the point's name; `{{` and `}}`
//! are braces. Whatever else stands in the text is sent as it is.

use thiserror::Error;

use crate::reading::Value;

/// The longest command in bytes. The serial port's own buffer holds about as much.
pub const MAX_COMMAND_BYTES: usize = 4096;

const MAX_DECIMALS: usize = 9;

/// A command's text, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Value,
    Decimals(usize),
    Point,
}

/// What is wrong with a template, or with what it was given.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TemplateError {
    #[error("a command must not be empty or longer than {MAX_COMMAND_BYTES} bytes")]
    Length,
    #[error("`{{{0}}}` is not known here; use {{value}}, {{value:.2}} or {{point}}, and {{{{ for a brace")]
    Placeholder(String),
    #[error("a brace is not closed; use {{{{ or }}}} for the character itself")]
    Brace,
    #[error("`{0}` is not a number, and this command needs one")]
    NotNumber(String),
    #[error("the value holds a control character, which could end this command and begin another")]
    Control,
}

impl Template {
    /// Takes a template apart.
    ///
    /// # Errors
    /// [`TemplateError::Length`], [`TemplateError::Placeholder`] or [`TemplateError::Brace`].
    pub fn parse(text: &str) -> Result<Self, TemplateError> {
        if text.is_empty() || text.len() > MAX_COMMAND_BYTES {
            return Err(TemplateError::Length);
        }
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            literal.push_str(&rest[..at]);
            let brace = &rest[at..=at];
            rest = &rest[at + 1..];
            if let Some(after) = rest.strip_prefix(brace) {
                literal.push_str(brace);
                rest = after;
                continue;
            }
            let (name, after) = rest.split_once('}').filter(|_| brace == "{").ok_or(TemplateError::Brace)?;
            if !literal.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut literal)));
            }
            parts.push(placeholder(name)?);
            rest = after;
        }
        literal.push_str(rest);
        if !literal.is_empty() {
            parts.push(Part::Text(literal));
        }
        Ok(Self(parts))
    }

    /// The bytes that tell a device to set `point` to `value`.
    ///
    /// # Errors
    /// [`TemplateError::NotNumber`] where decimals are asked of a text, [`TemplateError::Control`] for a text with
    /// control characters, [`TemplateError::Length`] for a command that would be too long.
    pub fn render(&self, point: &str, value: &Value) -> Result<Vec<u8>, TemplateError> {
        let mut command = String::new();
        for part in &self.0 {
            match part {
                Part::Text(text) => command.push_str(text),
                Part::Point => command.push_str(point),
                Part::Value => command.push_str(&plain_text(value)?),
                Part::Decimals(decimals) => {
                    let number = number(value).ok_or_else(|| TemplateError::NotNumber(value.to_string()))?;
                    command.push_str(&format!("{number:.decimals$}"));
                }
            }
        }
        if command.is_empty() || command.len() > MAX_COMMAND_BYTES {
            return Err(TemplateError::Length);
        }
        Ok(command.into_bytes())
    }
}

fn placeholder(name: &str) -> Result<Part, TemplateError> {
    let decimals = |digits: &str| digits.parse().ok().filter(|decimals| *decimals <= MAX_DECIMALS);
    match name {
        "value" => Ok(Part::Value),
        "point" => Ok(Part::Point),
        _ => name
            .strip_prefix("value:.")
            .and_then(decimals)
            .map(Part::Decimals)
            .ok_or_else(|| TemplateError::Placeholder(name.to_owned())),
    }
}

fn plain_text(value: &Value) -> Result<String, TemplateError> {
    let text = value.to_string();
    if text.chars().any(char::is_control) { Err(TemplateError::Control) } else { Ok(text) }
}

fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Integer(number) => Some(*number as f64),
        Value::Float(number) => Some(*number),
        Value::Bool(_) | Value::Text(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_written_as_the_template_says() {
        let check = |template: &str, value: Value, expected: &str| {
            let command = Template::parse(template).unwrap().render("tare", &value).unwrap();
            assert_eq!(String::from_utf8(command).unwrap(), expected);
        };
        check("T{value}\r\n", Value::Integer(5), "T5\r\n");
        check("{point}={value:.2};", Value::Float(1.005e2), "tare=100.50;");
        check("{value:.0}", Value::Integer(7), "7");
        check("{{{value}}}", Value::Bool(true), "{true}");
        check("T", Value::Text("ignored\r\n".into()), "T");
    }

    #[test]
    fn malformed_templates_say_what_is_wrong() {
        let check = |template: &str, expected: TemplateError| assert_eq!(Template::parse(template), Err(expected));
        check("", TemplateError::Length);
        check(&"x".repeat(MAX_COMMAND_BYTES + 1), TemplateError::Length);
        check("{value", TemplateError::Brace);
        check("value}", TemplateError::Brace);
        check("{tag}", TemplateError::Placeholder("tag".into()));
        check("{value:.10}", TemplateError::Placeholder("value:.10".into()));
    }

    #[test]
    fn values_that_could_smuggle_a_second_command_are_refused() {
        let template = Template::parse("T{value}\r\n").unwrap();
        assert_eq!(template.render("p", &Value::Text("1\r\nZ".into())), Err(TemplateError::Control));
        let decimals = Template::parse("{value:.1}").unwrap();
        assert_eq!(decimals.render("p", &Value::Text("x".into())), Err(TemplateError::NotNumber("x".into())));
        let long = Value::Text("x".repeat(MAX_COMMAND_BYTES + 1).into());
        assert_eq!(template.render("p", &long), Err(TemplateError::Length));
    }
}
