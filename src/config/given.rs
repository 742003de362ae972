//! What was given, as values: every text read by its row of the table.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};

use super::setting::{Kind, Setting};
use super::{parse, table};

/// A value as its row's [`Kind`] reads it.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Also of the kinds whose meaning is found in `resolve`; it was checked.
    Text(String),
    Switch(bool),
    Count(usize),
    Number(f64),
    List(Vec<String>),
}

/// The settings that were given. envy hands over variables and values; a value that does not fit its row is kept as an error under its
/// name, so that all of them can be told at once.
#[derive(Default)]
pub struct Given {
    values: BTreeMap<&'static str, Value>,
    /// Name, and what is wrong with its value.
    pub wrong: Vec<(&'static str, String)>,
}

impl Given {
    pub fn text(&self, setting: &Setting) -> Option<String> {
        match self.values.get(setting.name)? {
            Value::Text(text) => Some(text.clone()),
            _ => None,
        }
    }

    pub fn switch(&self, setting: &Setting) -> Option<bool> {
        match self.values.get(setting.name)? {
            Value::Switch(value) => Some(*value),
            _ => None,
        }
    }

    pub fn count(&self, setting: &Setting) -> Option<usize> {
        match self.values.get(setting.name)? {
            Value::Count(count) => Some(*count),
            _ => None,
        }
    }

    pub fn number(&self, setting: &Setting) -> Option<f64> {
        match self.values.get(setting.name)? {
            Value::Number(number) => Some(*number),
            _ => None,
        }
    }

    pub fn list(&self, setting: &Setting) -> Vec<String> {
        match self.values.get(setting.name) {
            Some(Value::List(list)) => list.clone(),
            _ => Vec::new(),
        }
    }
}

impl<'de> Deserialize<'de> for Given {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Variables)
    }
}

/// Reads pairs of name and text.
struct Variables;

impl<'de> Visitor<'de> for Variables {
    type Value = Given;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("settings by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut variables: A) -> Result<Given, A::Error> {
        let mut given = Given::default();
        while let Some((name, typed)) = variables.next_entry::<String, String>()? {
            let setting = table::find(&name).ok_or_else(|| de::Error::custom(format_args!("{name} is not a setting")))?;
            match setting.kind.read(&typed) {
                Ok(Some(value)) => drop(given.values.insert(setting.name, value)),
                Ok(None) => {}
                Err(wrong) => given.wrong.push((setting.name, wrong)),
            }
        }
        Ok(given)
    }
}

impl Kind {
    /// The value of a text; `None` when it is as if it were not given. The error says what is wrong, and what to use.
    pub fn read(self, typed: &str) -> Result<Option<Value>, String> {
        if parse::unset(typed) {
            return Ok(None);
        }
        // A template's white space is its own.
        if self == Self::Template {
            return template(typed).map(Some);
        }
        let typed = typed.trim();
        if let Self::Count { auto, .. } | Self::CountOf { auto, .. } | Self::Number { auto, .. } = self
            && auto.iter().any(|word| word.eq_ignore_ascii_case(typed))
        {
            return Ok(None);
        }
        let value = match self {
            Self::Count { least, auto } => Value::Count(count(typed, least, auto)?),
            Self::CountOf { of, auto } => Value::Count(count_of(typed, of, auto)?),
            Self::Ranks if typed.eq_ignore_ascii_case("auto") => Value::Count(0),
            Self::Ranks => Value::Count(count(typed, 1, &["auto"])?),
            Self::CountOrAll if typed == "-1" => Value::Count(usize::MAX),
            Self::CountOrAll => Value::Count(count(typed, 0, &[])?),
            Self::Number { range, .. } => {
                // The upper bound keeps durations representable.
                let number = typed.parse().ok().filter(|value: &f64| value.is_finite() && *value < 1e12 && range.holds(*value));
                Value::Number(number.ok_or_else(|| format!("{typed:?} is not possible; use a number {range}"))?)
            }
            Self::Switch => Value::Switch(
                parse::boolean(typed)
                    .ok_or_else(|| format!("{typed:?} is neither true nor false; use true, 1, yes, on, or false, 0, no, off"))?,
            ),
            // 0 lets the system pick one.
            Self::Port => {
                Value::Count(typed.parse::<u16>().map_err(|_| format!("{typed:?} is not a port; use a number from 0 to 65535"))?.into())
            }
            Self::List => {
                Value::List(parse::list(typed).ok_or("begins like a JSON list and is not one of strings; write [\"a\", \"b\"], or a,b")?)
            }
            Self::Models => {
                let models =
                    parse::models(typed).ok_or("begins like a JSON list and is not one of strings; write [\"a\", \"b\"], or a,b")?;
                if models.is_empty() {
                    return Err(format!("{typed:?} names no model"));
                }
                Value::List(models)
            }
            Self::Keys => Value::List(parse::list(typed).ok_or("begins like a JSON list and is not one of strings")?),
            _ => {
                self.check(typed)?;
                Value::Text(match self {
                    Self::OneOf(_) => typed.to_ascii_lowercase(),
                    Self::Url => typed.trim_end_matches('/').to_owned(),
                    _ => typed.to_owned(),
                })
            }
        };
        Ok(Some(value))
    }

    /// What is wrong with a text of this kind.
    fn check(self, typed: &str) -> Result<(), String> {
        match self {
            Self::OneOf(words) if !words.iter().any(|word| word.eq_ignore_ascii_case(typed)) => {
                Err(format!("{typed:?} is not possible; use one of {}", words.join(", ")))
            }
            Self::Url if !typed.starts_with("http://") && !typed.starts_with("https://") => {
                Err(format!("{typed:?} is not an address; it begins with https:// or http://"))
            }
            Self::UrlPath if !typed.starts_with('/') || typed.contains(['?', '#', ' ', '{', '}']) => {
                Err(format!("{typed:?} is not a path; it begins with a slash, like /ping"))
            }
            Self::MetricsPrefix if !begins_a_metric(typed) => {
                Err(format!("{typed:?} cannot begin a metric's name; use letters, digits, _ and :, no digit first"))
            }
            Self::Object => parse::object(typed).map(|_| ()),
            Self::Seed => parse::seed(typed).map(|_| ()),
            Self::Device => parse::device(typed).map(|_| ()),
            Self::Speculative => parse::speculative(typed).map(|_| ()),
            Self::KvCacheDtype => parse::kv_cache_dtype(typed).map(|_| ()),
            Self::Quantization => match parse::quantization(typed) {
                Ok(_) => Ok(()),
                Err(problem) => Err(format!("{problem}; use BF16 (weights as stored), wint8 or wint4")),
            },
            _ => Ok(()),
        }
    }
}

fn count(typed: &str, least: usize, auto: &[&str]) -> Result<usize, String> {
    let or = auto.first().map(|word| format!(", or {word}")).unwrap_or_default();
    parse::count(typed)
        .filter(|count| *count >= least)
        .ok_or_else(|| format!("{typed:?} is not possible; use a whole number, at least {least}{or}"))
}

fn count_of(typed: &str, of: &[usize], auto: &[&str]) -> Result<usize, String> {
    let number = count(typed, 1, auto)?;
    if of.contains(&number) {
        return Ok(number);
    }
    let words: Vec<String> = of.iter().map(usize::to_string).collect();
    let (last, others) = words.split_last().ok_or("is not possible")?;
    Err(format!("{number} is not possible; use {} or {last}", others.join(", ")))
}

fn template(typed: &str) -> Result<Value, String> {
    if !typed.contains("{{") && !typed.contains("{%") && !Path::new(typed).is_file() {
        return Err("is neither Jinja text nor a file that is there".to_owned());
    }
    Ok(Value::Text(typed.to_owned()))
}

fn begins_a_metric(prefix: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    prefix.chars().all(fits) && !prefix.starts_with(|c: char| c.is_ascii_digit())
}

impl fmt::Display for Kind {
    /// For people who set it: what may be written.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or = |auto: &[&str]| auto.iter().map(|word| format!(", or `{word}`")).collect::<String>();
        match self {
            Self::Text => f.write_str("text"),
            Self::Switch => f.write_str("`true` or `false`"),
            Self::Count { least, auto } => write!(f, "whole number from {least}{}", or(auto)),
            Self::CountOf { of, auto } => {
                let numbers: Vec<String> = of.iter().map(usize::to_string).collect();
                write!(f, "{}{}", numbers.join(", "), or(auto))
            }
            Self::CountOrAll => f.write_str("whole number from 0, or `-1`"),
            Self::Number { range, auto } => write!(f, "number {range}{}", or(auto)),
            Self::OneOf(words) => write!(f, "`{}`", words.join("`, `")),
            Self::List | Self::Keys => f.write_str("list"),
            Self::Models => f.write_str("text, or a list"),
            Self::Object | Self::Speculative => f.write_str("JSON object"),
            Self::Port => f.write_str("port"),
            Self::Url => f.write_str("URL"),
            Self::UrlPath => f.write_str("path"),
            Self::Seed => f.write_str("whole number from 0"),
            Self::Ranks => f.write_str("whole number from 1, or `auto`"),
            Self::Device => f.write_str("`auto`, `cpu`, `cuda`, `cuda:N`"),
            Self::Quantization => f.write_str("`BF16`, `wint8`, `wint4`"),
            Self::Template => f.write_str("Jinja text or a file"),
            Self::KvCacheDtype => f.write_str("`auto`, `float32`, `float16`, `bfloat16`, `int8`"),
            Self::MetricsPrefix => f.write_str("letters, digits, `_` and `:`"),
        }
    }
}
