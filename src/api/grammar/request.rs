//! The fields of structured output, in the spelling of every server whose clients come here.

use serde_json::Value;

use crate::api::fields::{Field, Fields, invalid, missing, wrong_type};
use crate::api::grammar::{Grammar, JsonOptions, structural_tag};
use crate::error::Failure;

/// What a request's answer must be, with the field that says so.
pub struct Requested {
    pub param: String,
    pub grammar: Grammar,
}

/// Turns one field into what it asks for.
type Read = fn(&Field<'_>, &JsonOptions) -> Result<Option<Requested>, Failure>;

/// Every field that says what the answer must be.
const FIELDS: &[(&str, Read)] = &[
    ("response_format", response_format),
    ("structured_outputs", members),
    ("guided_decoding", members),
    ("structural_tag", tag),
    ("guided_json", json),
    ("guided_json_object", json_object),
    ("guided_regex", regex),
    ("guided_choice", choice),
    ("guided_grammar", grammar),
    ("json_schema", json),
    ("regex", regex),
    ("ebnf", gbnf),
    ("grammar", grammar),
];

/// The members of `structured_outputs` that say the same.
const MEMBERS: &[(&str, Read)] =
    &[("json", json), ("json_object", json_object), ("regex", regex), ("choice", choice), ("grammar", grammar), ("structural_tag", tag)];

/// The request's one constraint, if it has any; two are refused.
pub fn read(fields: &Fields<'_>) -> Result<Option<Requested>, Failure> {
    let mut options = JsonOptions::default();
    if let Some(field) = fields.get("guided_whitespace_pattern") {
        options.whitespace = Some(text(&field)?.to_owned());
    }
    backend(fields, &mut options)?;
    let mut found: Option<Requested> = None;
    for (name, read) in FIELDS {
        let Some(field) = fields.get(name).filter(|field| !is_empty(field)) else { continue };
        let Some(requested) = read(&field, &options)? else { continue };
        match &found {
            None => found = Some(requested),
            Some(first) => return Err(two(&first.param, &requested.param)),
        }
    }
    Ok(found)
}

/// Asks for nothing. An empty object may be a schema, or lack what it needs: its reader says.
fn is_empty(field: &Field<'_>) -> bool {
    match field.value {
        Value::Bool(flag) => !flag,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

fn two(first: &str, second: &str) -> Failure {
    let message = format!("Only one of '{first}' and '{second}' can say what the answer must be. Remove one of them.");
    Failure::bad_request(second, message).code("invalid_value")
}

/// vLLM's names of backends all mean the one that is here; the options that may follow a name count.
fn backend(fields: &Fields<'_>, options: &mut JsonOptions) -> Result<(), Failure> {
    const NAMES: [&str; 6] = ["auto", "guidance", "llguidance", "xgrammar", "outlines", "lm-format-enforcer"];
    let Some(field) = fields.get("guided_decoding_backend") else { return Ok(()) };
    let value = text(&field)?;
    let (name, extras) = value.split_once(':').unwrap_or((value, ""));
    if !NAMES.contains(&name) {
        return Err(invalid(&field, format!("'{name}' is not one of {} - '{}'", NAMES.join(", "), field.name)));
    }
    for extra in extras.split(',').filter(|extra| !extra.is_empty()) {
        match extra {
            "disable-any-whitespace" => options.compact = true,
            "disable-additional-properties" | "no-additional-properties" => options.closed = true,
            "no-fallback" | "disable-fallback" => {}
            _ => return Err(invalid(&field, format!("the option '{extra}' is not known - '{}'", field.name))),
        }
    }
    Ok(())
}

fn found(field: &Field<'_>, grammar: Grammar) -> Result<Option<Requested>, Failure> {
    Ok(Some(Requested { param: field.name.clone(), grammar }))
}

fn text<'a>(field: &Field<'a>) -> Result<&'a str, Failure> {
    field.value.as_str().ok_or_else(|| wrong_type(field, "a string"))
}

/// A member of an object; null is absent.
fn member<'a>(field: &Field<'a>, name: &str) -> Option<Field<'a>> {
    let value = field.value.get(name).filter(|value| !value.is_null())?;
    Some(Field { name: format!("{}.{name}", field.name), value })
}

fn needed<'a>(field: &Field<'a>, name: &str, what: &str) -> Result<Field<'a>, Failure> {
    member(field, name).ok_or_else(|| {
        let param = format!("{}.{name}", field.name);
        missing(&param, format!("'{param}' is missing: {what}."))
    })
}

fn flag(field: &Field<'_>, name: &str) -> Result<bool, Failure> {
    match member(field, name) {
        None => Ok(false),
        Some(member) => member.value.as_bool().ok_or_else(|| wrong_type(&member, "true or false")),
    }
}

fn json_object(field: &Field<'_>, options: &JsonOptions) -> Result<Option<Requested>, Failure> {
    match field.value {
        Value::Bool(true) => found(field, Grammar::JsonObject(options.clone())),
        Value::Bool(false) => Ok(None),
        _ => Err(wrong_type(field, "true or false")),
    }
}

/// A schema, as an object or as the text of one. An empty schema asks for any JSON.
fn json(field: &Field<'_>, options: &JsonOptions) -> Result<Option<Requested>, Failure> {
    let schema = match field.value {
        Value::String(text) => {
            serde_json::from_str(text).map_err(|error| invalid(field, format!("'{}' is not valid JSON: {error}.", field.name)))?
        }
        value => value.clone(),
    };
    match schema {
        Value::Object(_) => found(field, Grammar::JsonSchema(schema, options.clone())),
        _ => Err(wrong_type(field, "a JSON schema: an object, or a string that holds one")),
    }
}

fn regex(field: &Field<'_>, _: &JsonOptions) -> Result<Option<Requested>, Failure> {
    found(field, Grammar::Regex(text(field)?.to_owned()))
}

fn choice(field: &Field<'_>, _: &JsonOptions) -> Result<Option<Requested>, Failure> {
    let texts =
        field.value.as_array().and_then(|list| list.iter().map(|text| text.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>());
    found(field, Grammar::Choice(texts.ok_or_else(|| wrong_type(field, "a list of strings"))?))
}

fn gbnf(field: &Field<'_>, _: &JsonOptions) -> Result<Option<Requested>, Failure> {
    found(field, Grammar::Gbnf(text(field)?.to_owned()))
}

/// A text in GBNF or Lark, or mistral.rs's object of `type` and `value`.
fn grammar(field: &Field<'_>, options: &JsonOptions) -> Result<Option<Requested>, Failure> {
    match field.value {
        Value::String(text) => found(field, of_text(text)),
        Value::Object(object) if object.is_empty() => Ok(None),
        Value::Object(_) => typed(field, options),
        _ => Err(wrong_type(field, "a string, or an object of 'type' and 'value'")),
    }
}

/// Only GBNF defines its rules by `::=`.
fn of_text(text: &str) -> Grammar {
    if text.contains("::=") { Grammar::Gbnf(text.to_owned()) } else { Grammar::Lark(text.to_owned()) }
}

fn typed(field: &Field<'_>, options: &JsonOptions) -> Result<Option<Requested>, Failure> {
    let kind = needed(field, "type", "regex, json_schema, lark or llguidance")?;
    let value = needed(field, "value", "the grammar")?;
    match text(&kind)? {
        "regex" => regex(&value, options),
        "json_schema" => json(&value, options),
        "lark" => found(&value, Grammar::Lark(text(&value)?.to_owned())),
        "llguidance" => match value.value {
            Value::String(text) => match serde_json::from_str(text) {
                Ok(grammars) => found(&value, Grammar::Llguidance(grammars)),
                Err(error) => Err(invalid(&value, format!("'{}' is not valid JSON: {error}.", value.name))),
            },
            grammars => found(&value, Grammar::Llguidance(grammars.clone())),
        },
        other => Err(invalid(&kind, format!("'{other}' is not one of regex, json_schema, lark, llguidance - '{}'", kind.name))),
    }
}

/// vLLM's object with one member for each kind.
fn members(field: &Field<'_>, options: &JsonOptions) -> Result<Option<Requested>, Failure> {
    let Value::Object(object) = field.value else {
        return Err(wrong_type(field, "an object"));
    };
    let mut options = options.clone();
    options.compact |= flag(field, "disable_any_whitespace")?;
    options.closed |= flag(field, "disable_additional_properties")?;
    if let Some(pattern) = member(field, "whitespace_pattern") {
        options.whitespace = Some(text(&pattern)?.to_owned());
    }
    let mut first: Option<Requested> = None;
    for (name, read) in MEMBERS {
        let Some(member) = member(field, name).filter(|member| !is_empty(member)) else { continue };
        let Some(requested) = read(&member, &options)? else { continue };
        match &first {
            None => first = Some(requested),
            Some(first) => return Err(two(&first.param, &requested.param)),
        }
    }
    // A member that is not known may well be a constraint.
    const OTHERS: [&str; 8] = [
        "disable_any_whitespace",
        "disable_additional_properties",
        "whitespace_pattern",
        "disable_fallback",
        "backend",
        "backend_was_auto",
        "_backend",
        "_backend_was_auto",
    ];
    let known = |name: &str| MEMBERS.iter().any(|(member, _)| *member == name) || OTHERS.contains(&name);
    match object.iter().find(|(name, value)| !value.is_null() && !known(name)) {
        Some((name, value)) => {
            let field = Field { name: format!("{}.{name}", field.name), value };
            Err(invalid(&field, format!("'{}' is not known.", field.name)))
        }
        None => Ok(first),
    }
}

/// A structural tag, as an object or as the text of one.
fn tag(field: &Field<'_>, _: &JsonOptions) -> Result<Option<Requested>, Failure> {
    let parsed;
    let value = match field.value {
        Value::String(text) => {
            let error = |error| invalid(field, format!("'{}' is not valid JSON: {error}.", field.name));
            parsed = serde_json::from_str(text).map_err(error)?;
            &parsed
        }
        value => value,
    };
    let Value::Object(object) = value else { return Err(wrong_type(field, "an object, or a string that holds one")) };
    if object.is_empty() {
        return Ok(None);
    }
    let lark = structural_tag::to_lark(value).map_err(|error| invalid(field, format!("'{}': {error}.", field.name)))?;
    found(field, Grammar::Lark(lark))
}

/// OpenAI's field, with the types that other servers add.
fn response_format(field: &Field<'_>, options: &JsonOptions) -> Result<Option<Requested>, Failure> {
    if !field.value.is_object() {
        return Err(wrong_type(field, "an object"));
    }
    let kind = needed(field, "type", "text, json_object or json_schema")?;
    match text(&kind)? {
        "text" => Ok(None),
        // llama.cpp's and others' `schema` beside it.
        "json_object" => match member(field, "schema") {
            Some(schema) => json(&schema, options),
            None => found(field, Grammar::JsonObject(options.clone())),
        },
        "json_schema" => {
            let outer = needed(field, "json_schema", "an object with 'schema'")?;
            if !outer.value.is_object() {
                return Err(wrong_type(&outer, "an object"));
            }
            json(&needed(&outer, "schema", "the JSON schema of the answer")?, options)
        }
        "structural_tag" => {
            let nested = member(field, "structural_tag");
            let parts = tag(nested.as_ref().unwrap_or(field), options)?;
            parts.map_or_else(|| Err(missing(&field.name, format!("'{}' holds no structural tag.", field.name))), |parts| Ok(Some(parts)))
        }
        "json" => json(&needed(field, "value", "the JSON schema of the answer")?, options),
        "regex" => regex(&needed(field, "value", "the regular expression")?, options),
        other => {
            let message = format!("'{other}' is not one of text, json_object, json_schema, structural_tag, json, regex - '{}'", kind.name);
            Err(invalid(&kind, message))
        }
    }
}
