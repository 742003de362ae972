//! JSON schemas as their authors' libraries write them (pydantic, zod, schemars, MCP servers), made such that the grammar compiler takes them.
//!
//! What is a mere annotation goes, what has an equal in other words is written so; no answer is allowed that the schema forbids. All else that
//! the compiler does not know it refuses by name.

use serde_json::{Map, Value};

/// The formats that the compiler knows. By the standard, any other is an annotation.
const FORMATS: [&str; 9] = ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"];
const URI: &str = "uri";

/// Pydantic's names of UUIDs of one version.
const UUIDS: [&str; 8] = ["uuid1", "uuid2", "uuid3", "uuid4", "uuid5", "uuid6", "uuid7", "uuid8"];

/// Expressions with look-around, which the compiler does not have, that libraries write, and their equals without it.
const PATTERNS: &[(&str, &str)] = &[
    // Pydantic's Decimal, before 2.14.
    (r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$", r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)$"),
    // Zod's email, before 4.6.
    (
        r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
        r"^([A-Za-z0-9_'+\-]+\.)*[A-Za-z0-9_'+\-]*[A-Za-z0-9_+\-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
    ),
];

/// Sets of more values than these have too many arrangements: five have 326.
const MOST_OF_A_SET: usize = 5;

/// Keywords whose value is a schema, or a list of schemas.
const NESTED: [&str; 11] = [
    "items",
    "prefixItems",
    "additionalItems",
    "additionalProperties",
    "unevaluatedProperties",
    "contains",
    "not",
    "anyOf",
    "oneOf",
    "allOf",
    "propertyNames",
];
/// Keywords whose value names schemas.
const NAMED: [&str; 4] = ["properties", "patternProperties", "$defs", "definitions"];

/// The schema as the compiler takes it.
pub fn prepared(schema: &Value) -> Value {
    let mut prepared = schema.clone();
    rewrite(&mut prepared, schema);
    prepared
}

fn rewrite(schema: &mut Value, root: &Value) {
    match schema {
        Value::Object(object) => {
            for keyword in NESTED {
                object.get_mut(keyword).into_iter().for_each(|nested| rewrite(nested, root));
            }
            for keyword in NAMED {
                let named = object.get_mut(keyword).and_then(Value::as_object_mut);
                named.into_iter().flat_map(Map::values_mut).for_each(|nested| rewrite(nested, root));
            }
            format(object);
            pattern(object);
            property_names(object, root);
            one_of(object, root);
            unique_items(object, root);
            // JSON in a string, of which the compiler sees the string.
            object.remove("contentSchema");
        }
        Value::Array(list) => list.iter_mut().for_each(|nested| rewrite(nested, root)),
        _ => {}
    }
}

fn format(object: &mut Map<String, Value>) {
    let Some(name) = object.get("format").and_then(Value::as_str) else { return };
    if name == URI || FORMATS.contains(&name) {
        return;
    }
    let version = UUIDS.contains(&name).then(|| name.trim_start_matches("uuid").to_owned());
    object.remove("format");
    if let Some(version) = version.filter(|_| !object.contains_key("pattern")) {
        let hex = "[0-9a-fA-F]";
        let pattern = format!("^{hex}{{8}}-{hex}{{4}}-{version}{hex}{{3}}-[89abAB]{hex}{{3}}-{hex}{{12}}$");
        object.insert("pattern".to_owned(), Value::from(pattern));
    }
}

fn pattern(object: &mut Map<String, Value>) {
    let Some(pattern) = object.get("pattern").and_then(Value::as_str) else { return };
    if let Some((_, equal)) = PATTERNS.iter().find(|(written, _)| *written == pattern) {
        object.insert("pattern".to_owned(), Value::from(*equal));
    }
}

/// Names of properties: any string is no limit, and a list of names is a list of properties. An expression has an equal too, if no property has
/// a schema of its own.
fn property_names(object: &mut Map<String, Value>, root: &Value) {
    let Some(names) = object.get("propertyNames").map(|names| resolved(names, root)) else { return };
    let Some(fields) = names.as_object() else { return };
    let says = |keyword: &str| fields.get(keyword).filter(|value| !value.is_null());
    let is_filled = |keyword: &str| object.get(keyword).and_then(Value::as_object).is_some_and(|named| !named.is_empty());
    let others = is_filled("properties") || is_filled("patternProperties");
    let limits = ["enum", "const", "pattern", "minLength", "maxLength", "format", "anyOf", "oneOf", "allOf", "not", "$ref"];
    if !limits.iter().any(|keyword| fields.contains_key(*keyword)) {
        object.remove("propertyNames");
        return;
    }
    if others {
        return;
    }
    let values = object.get("additionalProperties").cloned().unwrap_or(Value::Bool(true));
    let (keyword, schemas) = match (says("enum"), says("const"), says("pattern")) {
        (Some(Value::Array(names)), None, None) => ("properties", names.iter().filter_map(Value::as_str).map(str::to_owned).collect()),
        (None, Some(Value::String(name)), None) => ("properties", vec![name.clone()]),
        (None, None, Some(Value::String(pattern))) if fields.len() <= 2 => ("patternProperties", vec![pattern.clone()]),
        _ => return,
    };
    let schemas: Map<String, Value> = schemas.into_iter().map(|name| (name, values.clone())).collect();
    object.remove("propertyNames");
    object.insert(keyword.to_owned(), Value::Object(schemas));
    object.insert("additionalProperties".to_owned(), Value::Bool(false));
}

/// Of parts that a property's value tells apart at most one matches, so any may. The compiler sees that too, but not through references.
fn one_of(object: &mut Map<String, Value>, root: &Value) {
    let Some(Value::Array(parts)) = object.get("oneOf") else { return };
    let parts: Vec<Value> = parts.iter().map(|part| resolved(part, root)).collect();
    let keys = parts.first().and_then(|part| part.get("properties")).and_then(Value::as_object);
    let told_apart = keys.is_some_and(|keys| keys.keys().any(|key| tells_apart(key, &parts)));
    if told_apart && !object.contains_key("anyOf") {
        object.remove("oneOf").and_then(|parts| object.insert("anyOf".to_owned(), parts));
    }
}

/// Whether every part is an object that must have this property, with a value that no other part takes.
fn tells_apart(key: &str, parts: &[Value]) -> bool {
    let mut seen: Vec<&Value> = Vec::new();
    parts.iter().all(|part| {
        let required = part.get("required").and_then(Value::as_array).is_some_and(|names| names.iter().any(|name| name == key));
        let is_object = part.get("type").is_some_and(|kind| kind == "object");
        let property = part.get("properties").and_then(|properties| properties.get(key));
        let values = property.and_then(|property| match (property.get("const"), property.get("enum")) {
            (Some(value), _) => Some(vec![value]),
            (None, Some(Value::Array(values))) => Some(values.iter().collect()),
            _ => None,
        });
        let Some(values) = values.filter(|values| required && is_object && !values.iter().any(|value| seen.contains(value))) else {
            return false;
        };
        seen.extend(values);
        true
    })
}

/// Sets: of at most one item any list is one, and those of a few values that the schema names can be listed.
fn unique_items(object: &mut Map<String, Value>, root: &Value) {
    let count = |name: &str| object.get(name).and_then(Value::as_u64);
    let (least, most) = (count("minItems").unwrap_or_default(), count("maxItems").unwrap_or(u64::MAX));
    if object.get("uniqueItems") == Some(&Value::Bool(false)) || most <= 1 {
        object.remove("uniqueItems");
    }
    if object.get("uniqueItems") != Some(&Value::Bool(true))
        || ["enum", "const", "prefixItems", "contains"].iter().any(|key| object.contains_key(*key))
    {
        return;
    }
    let items = object.get("items").map(|items| resolved(items, root)).unwrap_or_default();
    let alone =
        items.as_object().is_some_and(|items| items.keys().all(|key| ["type", "enum", "title", "description"].contains(&key.as_str())));
    let Some(Value::Array(values)) = items.get("enum").filter(|_| alone && object.get("type").is_some_and(|kind| kind == "array")) else {
        return;
    };
    let distinct = values.iter().enumerate().all(|(at, value)| value.is_string() && !values[..at].contains(value));
    if !distinct || values.len() > MOST_OF_A_SET || items.get("type").is_some_and(|kind| kind != "string") {
        return;
    }
    let sets: Vec<Value> =
        arranged(values).into_iter().filter(|set| (least..=most).contains(&(set.len() as u64))).map(Value::from).collect();
    if !sets.is_empty() {
        ["uniqueItems", "items", "minItems", "maxItems"].iter().for_each(|key| drop(object.remove(*key)));
        object.insert("enum".to_owned(), Value::Array(sets));
    }
}

/// Lists of some of these values, in any order.
fn arranged(values: &[Value]) -> Vec<Vec<Value>> {
    let mut all = vec![Vec::new()];
    for at in 0..values.len() {
        let rest = [&values[..at], &values[at + 1..]].concat();
        all.extend(arranged(&rest).into_iter().map(|list| [&values[at..=at], &list].concat()));
    }
    all
}

/// What a reference into the same document leads to.
fn resolved(schema: &Value, root: &Value) -> Value {
    let target = schema.get("$ref").and_then(Value::as_str).and_then(|reference| reference.strip_prefix('#'));
    target.and_then(|pointer| root.pointer(pointer)).unwrap_or(schema).clone()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn annotations_go_and_names_of_properties_stay() {
        let schema = json!({
            "properties": {
                "format": {"type": "string", "format": "path"},
                "uniqueItems": {"type": "array", "uniqueItems": false, "items": {"type": "string", "format": "uuid"}},
                "pattern": {"enum": [{"uniqueItems": true, "format": "path"}]},
            },
            "$defs": {"a": {"format": "uri"}},
        });
        let wanted = json!({
            "properties": {
                "format": {"type": "string"},
                "uniqueItems": {"type": "array", "items": {"type": "string", "format": "uuid"}},
                "pattern": {"enum": [{"uniqueItems": true, "format": "path"}]},
            },
            "$defs": {"a": {"format": "uri"}},
        });
        assert_eq!(prepared(&schema), wanted);
    }

    #[test]
    fn names_of_properties_become_properties() {
        let number = json!({"type": "integer"});
        let schema = |names: Value| json!({"type": "object", "additionalProperties": number, "propertyNames": names, "$defs": {"c": {"enum": ["a", "b"]}}});
        let of = |names: Value| {
            let mut made = prepared(&schema(names));
            made.as_object_mut().unwrap().remove("$defs");
            made
        };
        assert_eq!(of(json!({"type": "string", "title": "Key"})), json!({"type": "object", "additionalProperties": number}));
        let listed = json!({"type": "object", "properties": {"a": number, "b": number}, "additionalProperties": false});
        assert_eq!(of(json!({"type": "string", "enum": ["a", "b"]})), listed);
        assert_eq!(of(json!({"$ref": "#/$defs/c"})), listed);
        // As OpenAI's SDKs complete it.
        let completed = json!({"type": "object", "properties": {}, "additionalProperties": number, "propertyNames": {"enum": ["a", "b"]}});
        assert_eq!(prepared(&completed), listed);
        let matching = json!({"type": "object", "patternProperties": {"^x": number}, "additionalProperties": false});
        assert_eq!(of(json!({"type": "string", "pattern": "^x"})), matching);
        // What has no equal is left for the compiler to refuse.
        assert!(of(json!({"maxLength": 3})).get("propertyNames").is_some());
        assert!(of(json!({"$ref": "#/$defs/none"})).get("propertyNames").is_some());
    }

    #[test]
    fn parts_that_a_property_tells_apart_are_any_of() {
        let part = |kind: Value, required: Value| json!({"type": "object", "properties": {"kind": kind, "n": {}}, "required": required});
        let of = |other: Value| {
            let defs = json!({"a": part(json!({"const": "a"}), json!(["kind"])), "b": other});
            prepared(&json!({"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "$defs": defs})).get("anyOf").is_some()
        };
        assert!(of(part(json!({"const": "b"}), json!(["n", "kind"]))));
        assert!(of(part(json!({"enum": ["b", "c"]}), json!(["kind"]))));
        assert!(!of(part(json!({"enum": ["a", "c"]}), json!(["kind"]))), "a value of both");
        assert!(!of(part(json!({"const": "b"}), json!(["n"]))), "not required");
        assert!(!of(part(json!({"type": "string"}), json!(["kind"]))), "any value");
        assert!(!of(json!({"properties": {"kind": {"const": "b"}}, "required": ["kind"]})), "not an object alone");
    }

    #[test]
    fn sets_of_few_values_are_listed() {
        let colors =
            |names: &[&str]| json!({"type": "array", "uniqueItems": true, "items": {"$ref": "#/$defs/c"}, "$defs": {"c": {"enum": names}}});
        let lists = prepared(&colors(&["a", "b"]))["enum"].clone();
        assert_eq!(lists, json!([[], ["a"], ["a", "b"], ["b"], ["b", "a"]]));
        let mut bounded = colors(&["a", "b"]);
        bounded["minItems"] = json!(2);
        assert_eq!(prepared(&bounded)["enum"], json!([["a", "b"], ["b", "a"]]));
        assert_eq!(prepared(&colors(&["a", "b", "c", "d", "e"]))["enum"].as_array().unwrap().len(), 326);
        assert_eq!(prepared(&colors(&["a", "b", "c", "d", "e", "f"]))["uniqueItems"], true, "left for the compiler to refuse");
        assert_eq!(prepared(&json!({"type": "array", "uniqueItems": true, "items": {"type": "string"}}))["uniqueItems"], true);
        let one = json!({"type": "array", "uniqueItems": true, "maxItems": 1});
        assert_eq!(prepared(&one), json!({"type": "array", "maxItems": 1}));
    }

    #[test]
    fn uuids_of_a_version_are_held_to_it() {
        let of = |schema: Value| prepared(&schema);
        let pattern = "^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-4[0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}$";
        assert_eq!(of(json!({"type": "string", "format": "uuid4"})), json!({"type": "string", "pattern": pattern}));
        assert_eq!(of(json!({"format": "uuid4", "pattern": "^a"})), json!({"pattern": "^a"}));
    }
}
