//! Schemas of requests, made from the rows of the tables of fields.

use serde_json::{Map, Value, json};

use super::operations::Body;
use crate::api::fields::dialect_tables::{MESSAGES, POOLING, RESPONSES};
use crate::api::fields::table::{FIELDS, FieldSpec, Neutral, TakenBy, ValueSpec, find};

/// Schemas of the values that the tables have words for, by the field's name, with `responses.` or `messages.` before those of these routes'
/// own tables.
const SHAPES: &str = include_str!("shapes.json");

/// What all that generate take, and what of it is refused, as two schemas; then each kind of request.
pub fn components() -> Map<String, Value> {
    let shapes = Shapes::read();
    let mut schemas = Map::new();
    let shared = |field: &&FieldSpec| field.taken_by == TakenBy::All && !is_dialects(field.name);
    let (refused, common): (Vec<_>, Vec<_>) = FIELDS.iter().filter(shared).partition(|field| is_refused(field));
    schemas.insert("CommonFields".to_owned(), object(&shapes, &common));
    schemas.insert("RefusedFields".to_owned(), object(&shapes, &refused));
    let any_of =
        |names: &[&str]| names.iter().map(|name| json!({"required": [name], "properties": {*name: {"not": {"type": "null"}}}})).collect();
    for (name, own, kind, one_of) in [
        ("ChatRequest", None, TakenBy::Chat, &["messages", "prompt_token_ids"][..]),
        ("CompletionRequest", None, TakenBy::Completions, &["prompt", "prompt_token_ids"]),
        ("ResponseRequest", Some(("responses.", RESPONSES)), TakenBy::Chat, &["input"]),
        ("MessageRequest", Some(("messages.", MESSAGES)), TakenBy::Chat, &["messages"]),
    ] {
        let (prefix, table) = own.unwrap_or(("", &[]));
        let is_own = |field: &FieldSpec| table.iter().any(|row| row.name == field.name);
        let rest = FIELDS.iter().filter(|field| field.taken_by == kind || (field.taken_by == TakenBy::All && is_dialects(field.name)));
        let rest: Vec<&FieldSpec> = rest.filter(|field| !is_own(field)).collect();
        let mut of_request = object(&shapes, &rest);
        if let Some(properties) = of_request["properties"].as_object_mut() {
            properties.extend(table.iter().map(|field| (field.name.to_owned(), shapes.of_dialect(prefix, field))));
        }
        let one_of: Vec<Value> = any_of(one_of);
        schemas.insert(
            name.to_owned(),
            json!({
                "type": "object",
                "allOf": [{"$ref": "#/components/schemas/CommonFields"}, {"$ref": "#/components/schemas/RefusedFields"}, of_request],
                "anyOf": one_of,
            }),
        );
    }
    schemas
}

/// The schema of a request.
pub fn of_body(body: Body) -> Value {
    match body {
        Body::Nothing => Value::Null,
        Body::Chat => json!({"$ref": "#/components/schemas/ChatRequest"}),
        Body::Completion => json!({"$ref": "#/components/schemas/CompletionRequest"}),
        Body::Response => json!({"$ref": "#/components/schemas/ResponseRequest"}),
        Body::Message => json!({"$ref": "#/components/schemas/MessageRequest"}),
        Body::Fields(required, names) => {
            let rows: Vec<&FieldSpec> = names.iter().filter_map(|name| find(name)).collect();
            requiring(object(&Shapes::read(), &rows), &names[..required])
        }
        Body::Pooling(required, names) => {
            let shapes = Shapes::read();
            let rows = names.iter().filter_map(|name| POOLING.iter().find(|row| row.name == *name));
            let properties: Map<String, Value> = rows.map(|row| (row.name.to_owned(), shapes.of_dialect("pooling.", row))).collect();
            requiring(json!({"type": "object", "properties": properties}), &names[..required])
        }
    }
}

fn requiring(mut schema: Value, required: &[&str]) -> Value {
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    schema
}

/// Has a row of its own on a route that is translated.
fn is_dialects(name: &str) -> bool {
    RESPONSES.iter().chain(MESSAGES).any(|row| row.name == name)
}

fn is_refused(field: &FieldSpec) -> bool {
    matches!(field.value, ValueSpec::Unsupported)
}

/// An object with these fields, and any others.
fn object(shapes: &Shapes, fields: &[&FieldSpec]) -> Value {
    let mut properties = Map::new();
    for field in fields {
        properties.insert(field.name.to_owned(), shapes.of(field));
        for alias in field.aliases {
            let mut schema = shapes.of(field);
            schema["description"] = json!(format!("Another name of `{}`.", field.name));
            properties.insert((*alias).to_owned(), schema);
        }
    }
    json!({"type": "object", "properties": properties})
}

/// The values that pass, where most are refused.
fn passing(neutral: Neutral) -> Value {
    match neutral {
        Neutral::Nothing => json!({"type": "null"}),
        Neutral::Empty => json!({"enum": [null, false, "", [], {}]}),
        Neutral::Number(number) => json!({"enum": [null, number]}),
        Neutral::Words(words) => json!({"anyOf": [{"enum": [null]}, {"enum": words}, {"type": "array", "items": {"enum": words}}]}),
        Neutral::Yes => json!({"enum": [null, true]}),
        Neutral::NoThinking => json!({"type": ["null", "boolean", "object"]}),
    }
}

struct Shapes(Map<String, Value>);

impl Shapes {
    fn read() -> Self {
        Self(serde_json::from_str(SHAPES).unwrap_or_default())
    }

    /// A row of the table of all fields.
    fn of(&self, field: &FieldSpec) -> Value {
        match field.neutral.filter(|_| is_refused(field)) {
            Some(neutral) => described(passing(neutral), format!("Not supported ({}); any other value is a 400.", field.doc)),
            None => self.value("", field),
        }
    }

    /// A row of a dialect's own table, where only neutral values pass if there are such.
    fn of_dialect(&self, prefix: &str, field: &FieldSpec) -> Value {
        match field.neutral {
            Some(neutral) => described(passing(neutral), format!("Any other value is a 400: {}", field.doc)),
            None => self.value(prefix, field),
        }
    }

    fn value(&self, prefix: &str, field: &FieldSpec) -> Value {
        let mut doc = field.doc.to_owned();
        let schema = match field.value {
            ValueSpec::Bool(default) => with_default(json!({"type": ["boolean", "null"]}), default.map(Value::from)),
            ValueSpec::Text => json!({"type": ["string", "null"]}),
            ValueSpec::Object => json!({"type": ["object", "null"]}),
            ValueSpec::Integer { min, default } => {
                with_default(json!({"type": ["integer", "null"], "minimum": min}), default.map(Value::from))
            }
            ValueSpec::Number { min, max, default } => {
                json!({"type": ["number", "null"], "minimum": min, "maximum": max, "default": default})
            }
            ValueSpec::TokenIds => json!({"type": ["array", "null"], "items": {"type": "integer", "minimum": 0}}),
            ValueSpec::Other(words) => {
                doc = format!("{}{}: {doc}", words[..1].to_uppercase(), &words[1..]);
                self.0.get(&format!("{prefix}{}", field.name)).cloned().unwrap_or_else(|| json!({}))
            }
            ValueSpec::Unsupported => json!({"type": "null"}),
        };
        described(schema, doc)
    }
}

fn with_default(mut schema: Value, default: Option<Value>) -> Value {
    if let Some(default) = default {
        schema["default"] = default;
    }
    schema
}

fn described(mut schema: Value, doc: String) -> Value {
    schema["description"] = Value::String(doc);
    schema
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_value_in_words_has_a_shape_and_every_shape_a_row() {
        let shapes: BTreeSet<String> = Shapes::read().0.keys().cloned().collect();
        let in_words = |prefix: &str, table: &[FieldSpec]| -> Vec<String> {
            let others = table.iter().filter(|row| matches!(row.value, ValueSpec::Other(_)) && row.taken_by != TakenBy::Jobs);
            others.map(|row| format!("{prefix}{}", row.name)).collect()
        };
        let mut rows = in_words("", FIELDS);
        rows.extend(in_words("responses.", RESPONSES));
        rows.extend(in_words("messages.", MESSAGES));
        rows.extend(in_words("pooling.", POOLING));
        assert_eq!(shapes, rows.into_iter().collect());
    }

    #[test]
    fn rows_become_schemas() {
        let schemas = components();
        let common = &schemas["CommonFields"]["properties"];
        assert_eq!((&common["temperature"]["maximum"], &common["temperature"]["default"]), (&json!(2.0), &json!(1.0)));
        assert_eq!(common["min_new_tokens"]["description"], "Another name of `min_tokens`.");
        assert_eq!(schemas["RefusedFields"]["properties"]["num_beams"]["enum"], json!([null, 1.0]));
        assert_eq!(schemas["ResponseRequest"]["allOf"][2]["properties"]["n"]["enum"], json!([null, 1.0]));
        assert_eq!(schemas["ChatRequest"]["allOf"][2]["properties"]["n"]["minimum"], 1);
        // Nothing that a route has its own word on is said for all.
        for name in RESPONSES.iter().chain(MESSAGES).map(|row| row.name) {
            assert!(common.get(name).is_none(), "{name}");
        }
    }
}
