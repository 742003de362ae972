//! Arguments between tags are plain text: the tool's schema says what they are.

use serde_json::{Number, Value};

use super::json::spaced;
use super::literal::python_value;

/// Schemas refer to others, and those in turn, so many times.
const DEEPEST: usize = 16;

/// What a schema allows as a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Types(Vec<String>);

impl Types {
    /// Of the parameter `key` in a schema of parameters. Nothing is known of what it does not name.
    pub fn of(parameters: &Value, key: &str) -> Self {
        let property = parameters["properties"].get(key).or_else(|| parameters.get("additionalProperties"));
        property.map_or_else(|| Self(Vec::new()), |schema| Self::of_schema(parameters, schema))
    }

    /// Of a schema that stands in `root`.
    pub fn of_schema(root: &Value, schema: &Value) -> Self {
        let mut types = Vec::new();
        collect(root, schema, DEEPEST, &mut types);
        Self(types)
    }

    /// Nothing says what a value is.
    pub fn is_unknown(&self) -> bool {
        self.0.is_empty()
    }

    /// What is written may be a text, and then it is one.
    pub fn may_be_text(&self) -> bool {
        self.may_be("string")
    }

    pub fn may_be_null(&self) -> bool {
        self.may_be("null")
    }

    /// Lists and objects are read to their ends, whatever stands in their strings.
    pub fn is_json(&self) -> bool {
        !self.is_unknown() && !self.may_be_text()
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    /// All but texts.
    pub fn not_texts(&self) -> Vec<&str> {
        self.names().filter(|name| *name != "string").collect()
    }

    /// No value is of these types and of those.
    pub fn is_apart_from(&self, other: &Self) -> bool {
        let kind = |name: &str| if name == "integer" { "number".to_owned() } else { name.to_owned() };
        !self.is_unknown() && !other.is_unknown() && !self.names().any(|name| other.names().any(|other| kind(other) == kind(name)))
    }

    fn may_be(&self, name: &str) -> bool {
        self.0.iter().any(|known| known == name)
    }

    /// Only a text.
    pub fn text() -> Self {
        Self(vec!["string".to_owned()])
    }

    /// JSON, whatever it is.
    pub fn json() -> Self {
        Self(["object", "array", "number", "boolean", "null"].map(str::to_owned).to_vec())
    }

    /// Whatever is written is a text.
    pub fn is_text(&self) -> bool {
        self.0 == ["string"]
    }

    /// The JSON text of what is written. What does not fit stays a text.
    pub fn convert(&self, written: &str) -> String {
        let text = written.trim();
        let may_be = |name: &str| self.may_be(name);
        let as_string = || Value::String(written.to_owned()).to_string();
        if self.0.is_empty() {
            let is_structure = text.starts_with(['{', '[']) && serde_json::from_str::<Value>(text).is_ok();
            return if is_structure { text.to_owned() } else { as_string() };
        }
        if matches!(text, "null" | "None") && (may_be("null") || !may_be("string")) {
            return "null".to_owned();
        }
        if may_be("string") {
            return as_string();
        }
        let number = ["integer", "number"].into_iter().any(may_be) && serde_json::from_str::<Number>(text).is_ok();
        let structure = ["object", "array"].into_iter().any(may_be) && text.starts_with(['{', '[', '(']);
        match text {
            "true" | "True" if may_be("boolean") => "true".to_owned(),
            "false" | "False" if may_be("boolean") => "false".to_owned(),
            text if number => text.to_owned(),
            text if structure && serde_json::from_str::<Value>(text).is_ok() => text.to_owned(),
            text if structure => python_value(text).map_or_else(as_string, |value| spaced(&value)),
            _ => as_string(),
        }
    }
}

/// `depth`: so many schemas may yet lead into each other.
fn collect(root: &Value, schema: &Value, depth: usize, types: &mut Vec<String>) {
    if depth == 0 {
        return;
    }
    let mut add = |name: &str| {
        if !types.iter().any(|known| known == name) {
            types.push(name.to_owned());
        }
    };
    match &schema["type"] {
        Value::String(name) => add(name),
        Value::Array(names) => names.iter().filter_map(Value::as_str).for_each(&mut add),
        _ => {}
    }
    let listed = schema["enum"].as_array().into_iter().flatten().chain(schema.get("const"));
    if schema["type"].is_null() {
        for value in listed {
            add(match value {
                Value::Null => "null",
                Value::Bool(_) => "boolean",
                Value::Number(_) => "number",
                Value::String(_) => "string",
                Value::Array(_) => "array",
                Value::Object(_) => "object",
            });
        }
    }
    // What only objects or lists have tells what is meant.
    for (name, of) in [("properties", "object"), ("items", "array")] {
        if schema["type"].is_null() && schema.get(name).is_some() {
            add(of);
        }
    }
    for name in ["anyOf", "oneOf", "allOf"] {
        schema[name].as_array().into_iter().flatten().for_each(|schema| collect(root, schema, depth - 1, types));
    }
    let target = schema["$ref"].as_str().and_then(|reference| reference.strip_prefix('#')).and_then(|pointer| root.pointer(pointer));
    if let Some(target) = target {
        collect(root, target, depth - 1, types);
    }
}

/// A part of a text as it stands inside a JSON string.
pub fn escaped(text: &str) -> String {
    let quoted = Value::String(text.to_owned()).to_string();
    quoted[1..quoted.len() - 1].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_schema_says_what_a_text_is() {
        let schema = json!({"properties": {
            "s": {"type": "string"}, "i": {"type": "integer"}, "b": {"type": "boolean"}, "o": {"type": "object"},
            "n": {"anyOf": [{"type": "integer"}, {"type": "null"}]}, "m": {"type": ["string", "null"]}, "e": {"enum": [1, 2]},
            "r": {"$ref": "#/$defs/count"}, "l": {"items": {}}, "loop": {"$ref": "#/$defs/loop"},
        }, "$defs": {"count": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}}});
        for (key, written, json) in [
            ("s", "5", "\"5\""),
            ("s", " a\"b ", "\" a\\\"b \""),
            ("i", "5", "5"),
            ("i", "five", "\"five\""),
            ("b", "True", "true"),
            ("o", "{\"a\":1}", "{\"a\":1}"),
            ("o", "{'a': None}", "{\"a\": null}"),
            ("o", "nothing", "\"nothing\""),
            ("n", "null", "null"),
            ("n", "7", "7"),
            ("m", "null", "null"),
            ("e", "2", "2"),
            ("unknown", "5", "\"5\""),
            ("unknown", "[5]", "[5]"),
            ("r", "7", "7"),
            ("l", "('a', 1)", "[\"a\", 1]"),
            ("loop", "7", "\"7\""),
        ] {
            assert_eq!(Types::of(&schema, key).convert(written), json, "{key} {written}");
        }
    }
}
