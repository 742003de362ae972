//! What an answer must be, in the one form that all spellings are read into.

use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use llguidance::regex_to_lark;
use serde_json::{Map, Value, json};

use crate::api::grammar::lark::lark_string;
use crate::api::grammar::{expansion, gbnf, schema};

/// Most bytes of a grammar's text.
const LONGEST: usize = 256 << 10;
/// The same of the schemas of all tools together.
const LONGEST_CALLS: usize = 1 << 20;
/// Most bytes of a regular expression.
const LONGEST_REGEX: usize = 32 << 10;
/// Between the parts of a JSON text: nothing, a space, or a line break with its indentation. Bounded, so that no answer is spaces to its end.
const WHITESPACE: &str = r"( |\r?\n[ \t]{0,32})";

/// What an answer must be.
#[derive(Debug, Clone, PartialEq)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject(JsonOptions),
    /// A JSON value that meets the schema.
    JsonSchema(Value, JsonOptions),
    /// A text that the whole expression matches.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in llguidance's variant of Lark.
    Lark(String),
    /// A grammar as llama.cpp (GBNF) and xgrammar (EBNF) write it.
    Gbnf(String),
    /// The calls of a request's tools, in Lark.
    Calls(String),
    /// A list of grammars in llguidance's own JSON form.
    Llguidance(Value),
}

/// How JSON is written.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct JsonOptions {
    /// No white space between the parts.
    pub compact: bool,
    /// A regular expression for the white space between the parts, in place of ours.
    pub whitespace: Option<String>,
    /// Objects whose schema does not speak of other properties have no others.
    pub closed: bool,
}

impl Grammar {
    /// Refuses what is too large to be looked at.
    pub fn check_size(&self) -> Result<(), String> {
        let (size, most) = match self {
            Self::JsonObject(_) => (0, LONGEST),
            Self::JsonSchema(value, _) | Self::Llguidance(value) => (value.to_string().len(), LONGEST),
            Self::Regex(text) => (text.len(), LONGEST_REGEX),
            Self::Choice(texts) => (texts.iter().map(|text| text.len() + 1).sum(), LONGEST),
            Self::Lark(text) | Self::Gbnf(text) => (text.len(), LONGEST),
            Self::Calls(text) => (text.len(), LONGEST_CALLS),
        };
        if size > most {
            return Err(format!("it has {size} bytes, more than the maximum of {most}"));
        }
        match self {
            Self::Regex(text) => expansion::check(text),
            Self::JsonSchema(schema, options) => {
                options.whitespace.as_deref().map_or(Ok(()), expansion::check)?;
                check_patterns(schema)
            }
            _ => Ok(()),
        }
    }

    /// Equal for equal grammars alone.
    pub fn key(&self) -> String {
        format!("{self:?}")
    }

    /// As llguidance takes it; the error says what is wrong.
    pub fn to_llguidance(&self) -> Result<TopLevelGrammar, String> {
        match self {
            Self::JsonObject(options) => json_schema(&json!({"type": "object"}), options),
            Self::JsonSchema(schema, options) => json_schema(schema, options),
            // `\d`, `\w` and `\s` are those of ASCII, as in other servers.
            Self::Regex(regex) => Ok(TopLevelGrammar::from_lark(format!("start: /{}/\n", regex_to_lark(without_anchors(regex), "dws")))),
            Self::Choice(texts) => choice(texts),
            Self::Lark(text) | Self::Calls(text) => Ok(TopLevelGrammar::from_lark(text.clone())),
            Self::Gbnf(text) => {
                let lark = gbnf::to_lark(text).map_err(|error| format!("read as GBNF (EBNF), it is not valid: {error}"))?;
                Ok(TopLevelGrammar::from_lark(lark))
            }
            Self::Llguidance(value) => serde_json::from_value(value.clone()).map_err(|error| format!("not a list of grammars: {error}")),
        }
    }
}

fn check_patterns(schema: &Value) -> Result<(), String> {
    match schema {
        Value::Object(object) => object.iter().try_for_each(|(name, value)| match value {
            Value::String(pattern) if name == "pattern" => expansion::check(pattern),
            Value::Object(patterns) if name == "patternProperties" => {
                patterns.keys().try_for_each(|pattern| expansion::check(pattern))?;
                check_patterns(value)
            }
            value => check_patterns(value),
        }),
        Value::Array(list) => list.iter().try_for_each(check_patterns),
        _ => Ok(()),
    }
}

fn json_schema(schema: &Value, options: &JsonOptions) -> Result<TopLevelGrammar, String> {
    Ok(TopLevelGrammar::from_grammar(GrammarWithLexer::from_json_schema(guided_schema(schema, options)?)))
}

/// The schema with what llguidance is to know of the white space between the parts.
pub fn guided_schema(schema: &Value, options: &JsonOptions) -> Result<Value, String> {
    let mut object = match schema::prepared(schema) {
        Value::Object(object) => object,
        Value::Bool(true) => Map::new(),
        Value::Bool(false) => return Err("the schema `false` allows nothing".to_owned()),
        _ => return Err("a JSON schema is an object".to_owned()),
    };
    if options.closed {
        object.values_mut().for_each(close);
        close_object(&mut object);
    }
    let mut settings = match options {
        JsonOptions { compact: true, .. } => json!({"whitespace_flexible": false}),
        JsonOptions { whitespace: Some(pattern), .. } => json!({"whitespace_pattern": pattern}),
        _ => json!({"whitespace_pattern": WHITESPACE}),
    };
    // The schema's own word counts, as llguidance reads it.
    if let (Some(Value::Object(own)), Value::Object(settings)) = (object.get("x-guidance"), &mut settings) {
        settings.extend(own.clone());
    }
    object.insert("x-guidance".to_owned(), settings);
    Ok(Value::Object(object))
}

/// Sets `additionalProperties: false` in every object schema that says nothing of it.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            object.values_mut().for_each(close);
            close_object(object);
        }
        Value::Array(list) => list.iter_mut().for_each(close),
        _ => {}
    }
}

fn close_object(object: &mut Map<String, Value>) {
    let speaks = ["additionalProperties", "patternProperties", "unevaluatedProperties"].iter().any(|key| object.contains_key(*key));
    if object.get("properties").is_some_and(Value::is_object) && !speaks {
        object.insert("additionalProperties".to_owned(), Value::Bool(false));
    }
}

/// The whole answer matches in any case, so anchors at the ends mean nothing.
fn without_anchors(regex: &str) -> &str {
    let regex = regex.strip_prefix('^').unwrap_or(regex);
    match regex.strip_suffix('$') {
        // An escaped `$` is a dollar sign.
        Some(rest) if (rest.len() - rest.trim_end_matches('\\').len()).is_multiple_of(2) => rest,
        _ => regex,
    }
}

fn choice(texts: &[String]) -> Result<TopLevelGrammar, String> {
    if texts.is_empty() {
        return Err("it holds no text to choose".to_owned());
    }
    let texts: Vec<String> = texts.iter().map(|text| lark_string(text)).collect();
    Ok(TopLevelGrammar::from_lark(format!("start: {}\n", texts.join(" | "))))
}
