//! What a grammar of ours needs to know of JSON schemas: which keywords limit a value, what a reference leads to, and the texts that a schema
//! allows.

use llguidance::regex_to_lark;
use serde_json::{Map, Value, json};

use crate::api::enforce::lark::Lark;
use crate::api::grammar::{JsonOptions, guided_schema, lark_string};

/// Keywords that limit a value. Others are annotations.
const LIMITS: [&str; 44] = [
    "type",
    "enum",
    "const",
    "anyOf",
    "oneOf",
    "allOf",
    "not",
    "if",
    "then",
    "else",
    "$ref",
    "$dynamicRef",
    "$recursiveRef",
    "properties",
    "required",
    "additionalProperties",
    "patternProperties",
    "propertyNames",
    "minProperties",
    "maxProperties",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "unevaluatedProperties",
    "unevaluatedItems",
    "items",
    "prefixItems",
    "additionalItems",
    "contains",
    "minContains",
    "maxContains",
    "minItems",
    "maxItems",
    "uniqueItems",
    "minLength",
    "maxLength",
    "pattern",
    "format",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "nullable",
];
/// Of texts.
pub const OF_TEXTS: [&str; 4] = ["minLength", "maxLength", "pattern", "format"];
pub const OF_NUMBERS: [&str; 5] = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"];
pub const OF_LISTS: [&str; 4] = ["items", "prefixItems", "minItems", "maxItems"];
pub const OF_OBJECTS: [&str; 3] = ["properties", "required", "additionalProperties"];

/// Formats as expressions. Each allows no text that is not of the format.
const FORMATS: [(&str, &str); 8] = [
    ("date", r"[0-9]{4}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"),
    ("time", r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?([zZ]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"),
    ("uuid", r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"),
    ("email", r"[a-zA-Z0-9_+-]+(\.[a-zA-Z0-9_+-]+)*@([a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?\.)+[a-zA-Z]{2,63}"),
    ("hostname", r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?(\.[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)*"),
    ("ipv4", r"((25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\.){3}(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"),
    (
        "ipv6",
        r"([0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}|([0-9a-fA-F]{1,4}(:[0-9a-fA-F]{1,4}){0,3})?::([0-9a-fA-F]{1,4}(:[0-9a-fA-F]{1,4}){0,2})?",
    ),
    (
        "uri",
        r"[a-zA-Z][a-zA-Z0-9+.-]*:(//[a-zA-Z0-9.-]+(:[0-9]{1,5})?)?(/([a-zA-Z0-9._~!$'()*+,;=:@-]|%[0-9a-fA-F]{2})*)*(\?[a-zA-Z0-9._~!$&'()*+,;=:@/-]*)?(#[a-zA-Z0-9._~-]*)?",
    ),
];

/// Schemas refer to others, and those in turn, so many times.
const DEEPEST: usize = 16;

/// Fails with the name of a keyword that limits values and is none of these.
pub fn only(schema: &Map<String, Value>, known: &[&str]) -> Result<(), String> {
    match schema.keys().find(|key| LIMITS.contains(&key.as_str()) && !known.contains(&key.as_str())) {
        Some(key) => Err(format!("'{key}' cannot be kept to in this model's format of calls")),
        None => Ok(()),
    }
}

/// Any value will do.
pub fn is_any(schema: &Value) -> bool {
    match schema {
        Value::Object(object) => !object.keys().any(|key| LIMITS.contains(&key.as_str())),
        other => *other == Value::Bool(true),
    }
}

/// What a reference within the same document leads to.
pub fn target<'r>(root: &'r Value, reference: &Value) -> Result<&'r Value, String> {
    let pointer = reference.as_str().and_then(|reference| reference.strip_prefix('#'));
    pointer.and_then(|pointer| root.pointer(pointer)).ok_or_else(|| format!("the reference {reference} leads nowhere"))
}

/// The names of a schema's `type`.
pub fn types(schema: &Map<String, Value>) -> Vec<&str> {
    match schema.get("type") {
        Some(Value::String(name)) => vec![name],
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}

/// The values that a schema lists.
pub fn listed(schema: &Map<String, Value>) -> Option<Vec<&Value>> {
    match (schema.get("const"), schema.get("enum")) {
        (Some(value), _) => Some(vec![value]),
        (None, Some(Value::Array(values))) => Some(values.iter().collect()),
        _ => None,
    }
}

/// JSON that meets a part of a schema, in Lark. `compact`: without white space.
pub fn json(root: &Value, schema: &Value, compact: bool) -> Result<String, String> {
    let mut whole = match schema {
        Value::Object(object) => object.clone(),
        Value::Bool(true) => Map::new(),
        _ => return Err("it allows nothing".to_owned()),
    };
    check_references(schema)?;
    for name in ["$defs", "definitions"] {
        if let (Some(schemas), false) = (root.get(name), whole.contains_key(name)) {
            whole.insert(name.to_owned(), schemas.clone());
        }
    }
    guided_schema(&Value::Object(whole), &JsonOptions { compact, ..JsonOptions::default() }).map(|schema| format!("%json {schema}"))
}

/// References must lead to where they lead when only the definitions stand beside them.
fn check_references(schema: &Value) -> Result<(), String> {
    match schema {
        Value::Object(object) => object.iter().try_for_each(|(key, value)| match value {
            Value::String(text) if key == "$ref" && !text.starts_with("#/$defs/") && !text.starts_with("#/definitions/") => {
                Err(format!("the reference '{text}' cannot be followed in this model's format of calls"))
            }
            value => check_references(value),
        }),
        Value::Array(list) => list.iter().try_for_each(check_references),
        _ => Ok(()),
    }
}

/// The texts that a schema allows.
pub enum Texts {
    None,
    Any,
    /// Those of a terminal.
    Of(String),
}

pub fn texts(lark: &mut Lark<'_>, root: &Value, schema: &Value) -> Result<Texts, String> {
    texts_within(lark, root, schema, DEEPEST)
}

fn texts_within(lark: &mut Lark<'_>, root: &Value, schema: &Value, depth: usize) -> Result<Texts, String> {
    let Some(depth) = depth.checked_sub(1) else { return Err("its references lead too far".to_owned()) };
    let object = match schema {
        _ if is_any(schema) => return Ok(Texts::Any),
        Value::Object(object) => object,
        _ => return Ok(Texts::None),
    };
    if let Some(reference) = object.get("$ref") {
        only(object, &["$ref"])?;
        return texts_within(lark, root, target(root, reference)?, depth);
    }
    if let Some((keyword, parts)) = parts(object)? {
        let all: Vec<Texts> = parts.iter().map(|part| texts_within(lark, root, part, depth)).collect::<Result<_, _>>()?;
        let names: Vec<&str> =
            all.iter().filter_map(|texts| if let Texts::Of(name) = texts { Some(name.as_str()) } else { None }).collect();
        let any = all.iter().any(|texts| matches!(texts, Texts::Any));
        return match (any, names.len()) {
            (true, 0) => Ok(Texts::Any),
            (false, 0) => Ok(Texts::None),
            _ if keyword == "oneOf" && names.len() + usize::from(any) > 1 => {
                Err("'oneOf' with several kinds of texts cannot be kept to in this model's format of calls".to_owned())
            }
            (true, _) => Ok(Texts::Any),
            (false, _) => Ok(Texts::Of(lark.terminal(&names.join(" | ")))),
        };
    }
    let types = types(object);
    if !types.is_empty() && !types.contains(&"string") {
        return Ok(Texts::None);
    }
    only(object, &[&OF_TEXTS[..], &OF_NUMBERS, &OF_LISTS, &OF_OBJECTS, &["type", "enum", "const"]].concat())?;
    if let Some(values) = listed(object) {
        only(object, &[&OF_NUMBERS[..], &OF_LISTS, &OF_OBJECTS, &["type", "enum", "const"]].concat())?;
        let texts: Vec<String> = values.into_iter().filter_map(Value::as_str).map(lark_string).collect();
        return Ok(if texts.is_empty() { Texts::None } else { Texts::Of(lark.terminal(&texts.join(" | "))) });
    }
    limited(lark, object)
}

/// The parts of `anyOf`, `oneOf`, or an `allOf` of one, which must stand alone.
pub fn parts(object: &Map<String, Value>) -> Result<Option<(&'static str, &Vec<Value>)>, String> {
    for keyword in ["anyOf", "oneOf", "allOf"] {
        let Some(Value::Array(parts)) = object.get(keyword) else { continue };
        only(object, &[keyword])?;
        if keyword == "allOf" && parts.len() > 1 {
            return Err("'allOf' of several cannot be kept to in this model's format of calls".to_owned());
        }
        return Ok(Some((keyword, parts)));
    }
    Ok(None)
}

/// The texts that keep to a length, an expression and a format.
fn limited(lark: &mut Lark<'_>, object: &Map<String, Value>) -> Result<Texts, String> {
    let mut all = Vec::new();
    let count = |name: &str| match object.get(name) {
        None => Ok(None),
        Some(value) => value.as_u64().map(Some).ok_or_else(|| format!("'{name}' must be a whole number")),
    };
    let (least, most) = (count("minLength")?.unwrap_or_default(), count("maxLength")?);
    if least > 0 || most.is_some() {
        all.push(lark.terminal(&format!("/(?s:.{{{least},{}}})/", most.map(|most| most.to_string()).unwrap_or_default())));
    }
    if let Some(pattern) = object.get("pattern") {
        all.push(lark.terminal(&search(pattern.as_str().ok_or("'pattern' must be a string")?)?));
    }
    if let Some(format) = object.get("format").and_then(Value::as_str) {
        all.push(lark.terminal(&of_format(format)?));
    }
    Ok(if all.is_empty() { Texts::Any } else { Texts::Of(lark.terminal(&all.join(" & "))) })
}

fn of_format(format: &str) -> Result<String, String> {
    let expression = |name: &str| FORMATS.iter().find(|(known, _)| *known == name).map(|(_, expression)| expression.replace('/', "\\/"));
    match (format, expression("date"), expression("time")) {
        ("date-time", Some(date), Some(time)) => Ok(format!("/({date})[tT]({time})/")),
        _ => expression(format)
            .map(|expression| format!("/{expression}/"))
            .ok_or_else(|| format!("the format '{format}' cannot be kept to in this model's format of calls")),
    }
}

/// A terminal of the texts in which an expression finds something.
fn search(pattern: &str) -> Result<String, String> {
    let bare = pattern.strip_prefix('^').unwrap_or(pattern);
    let begins = bare.len() < pattern.len();
    let (bare, ends) = match bare.strip_suffix('$') {
        Some(rest) if (rest.len() - rest.trim_end_matches('\\').len()).is_multiple_of(2) => (rest, true),
        _ => (bare, false),
    };
    if (begins || ends) && has_outer_choice(bare) {
        return Err(format!(
            "the pattern {} cannot be kept to in this model's format of calls: put its choice in brackets",
            json!(pattern)
        ));
    }
    let rest = |bound: bool| if bound { "" } else { "(?s:.*)" };
    Ok(format!("/{}({}){}/", rest(begins), regex_to_lark(bare, "dw"), rest(ends)))
}

/// Whether an expression is a choice that no brackets hold.
fn has_outer_choice(regex: &str) -> bool {
    let (mut depth, mut class, mut escaped) = (0i32, false, false);
    regex.chars().any(|c| {
        if std::mem::take(&mut escaped) {
            return false;
        }
        match c {
            '\\' => escaped = true,
            '[' => class = true,
            ']' => class = false,
            '(' if !class => depth += 1,
            ')' if !class => depth -= 1,
            '|' => return !class && depth == 0,
            _ => {}
        }
        false
    })
}
