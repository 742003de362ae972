//! Arguments as Python writes them, or in Gemma's notation, in Lark.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use crate::api::enforce::lark::Lark;
use crate::api::enforce::schemas::{self, OF_LISTS, OF_NUMBERS, OF_OBJECTS, OF_TEXTS, Texts};
use crate::api::grammar::lark_string;
use crate::api::parse::tools::values::Types;

/// How values are written.
#[derive(Debug, Clone, Copy)]
pub struct Notation {
    /// True, false and nothing.
    pub words: [&'static str; 3],
    /// Around texts, in which nothing is escaped; `None`: texts are JSON's.
    pub quote: Option<&'static str>,
    /// Between a call's keys and values.
    pub assigns: &'static str,
    /// Behind commas and colons.
    pub blank: &'static str,
}

pub const PYTHON: Notation = Notation { words: ["True", "False", "None"], quote: None, assigns: "=", blank: "ws" };

pub const fn gemma(quote: &'static str) -> Notation {
    Notation { words: ["true", "false", "null"], quote: Some(quote), assigns: ":", blank: "" }
}

const NAME: &str = "/[A-Za-z_][A-Za-z0-9_]{0,63}/";
/// Numbers without limits: as large as the reader takes them.
const INTEGER: &str = "/-?(0|[1-9][0-9]{0,17})/";
const NUMBER: &str = "/-?(0|[1-9][0-9]{0,17})(\\.[0-9]{1,17})?([eE][+-]?[0-9]{1,2})?/";

/// Writes the values of one schema.
pub struct Literals<'l, 't, 'a> {
    lark: &'l mut Lark<'t>,
    notation: Notation,
    root: &'a Value,
    /// The rules of what references lead to.
    references: HashMap<String, String>,
}

/// The arguments of a call, without the brackets around them.
pub fn arguments(lark: &mut Lark<'_>, notation: Notation, schema: &Value) -> Result<String, String> {
    let object = schema.as_object().ok_or("it is no schema of an object")?;
    schemas::only(object, &[&OF_OBJECTS[..], &["type"]].concat())?;
    Literals { lark, notation, root: schema, references: HashMap::new() }.members(object, true)
}

fn cannot(what: &str) -> String {
    format!("{what} cannot be kept to in this model's format of calls")
}

impl Literals<'_, '_, '_> {
    fn value(&mut self, schema: &Value) -> Result<String, String> {
        let object = match schema {
            _ if schemas::is_any(schema) => return self.any(),
            Value::Object(object) => object,
            _ => return Err("it allows nothing".to_owned()),
        };
        if let Some(reference) = object.get("$ref") {
            schemas::only(object, &["$ref"])?;
            return self.referred(reference);
        }
        if let Some((keyword, parts)) = schemas::parts(object)? {
            if keyword == "oneOf" && !self.told_apart(parts) {
                return Err(cannot("'oneOf' of parts that a value may meet at once"));
            }
            let parts: Vec<String> = parts.iter().map(|part| self.value(part)).collect::<Result<_, _>>()?;
            return Ok(self.lark.rule(&parts.join(" | ")));
        }
        schemas::only(object, &[&OF_TEXTS[..], &OF_NUMBERS, &OF_LISTS, &OF_OBJECTS, &["type", "enum", "const"]].concat())?;
        let types = Types::of_schema(self.root, schema);
        if let Some(values) = schemas::listed(object) {
            schemas::only(object, &["type", "enum", "const"])?;
            let fits = |value: &&&Value| schemas::types(object).is_empty() || of_types(value, &schemas::types(object));
            let values: Vec<String> = values.iter().filter(fits).map(|value| self.literal(value)).collect::<Result<_, _>>()?;
            return if values.is_empty() { Err("it allows nothing".to_owned()) } else { Ok(self.lark.rule(&values.join(" | "))) };
        }
        if types.is_unknown() {
            return Err(cannot("a schema without 'type'"));
        }
        let forms: Vec<String> = types.names().map(|name| self.typed(name, object)).collect::<Result<_, _>>()?;
        Ok(self.lark.rule(&forms.join(" | ")))
    }

    /// The values of one type.
    fn typed(&mut self, name: &str, object: &Map<String, Value>) -> Result<String, String> {
        let picked = |keywords: &[&str]| -> Map<String, Value> {
            let picked = object.iter().filter(|(key, _)| keywords.contains(&key.as_str()));
            picked.map(|(key, value)| (key.clone(), value.clone())).chain([("type".to_owned(), json!(name))]).collect()
        };
        match name {
            "null" => Ok(lark_string(self.notation.words[2])),
            "boolean" => Ok(format!("{} | {}", lark_string(self.notation.words[0]), lark_string(self.notation.words[1]))),
            "integer" | "number" if picked(&OF_NUMBERS).len() == 1 => {
                Ok(self.lark.terminal(if name == "integer" { INTEGER } else { NUMBER }))
            }
            "integer" | "number" => schemas::json(&Value::Null, &picked(&OF_NUMBERS).into(), true),
            "string" => self.text(&picked(&OF_TEXTS).into()),
            "array" => self.list(object),
            "object" => Ok(format!("\"{{\" {} \"}}\"", self.members(object, false)?)),
            other => Err(format!("'{other}' is no type")),
        }
    }

    fn text(&mut self, schema: &Value) -> Result<String, String> {
        let Some(quote) = self.notation.quote else { return schemas::json(&Value::Null, schema, true) };
        let texts = schemas::texts(self.lark, self.root, schema)?;
        let content = match &texts {
            Texts::Of(content) => Some(content.as_str()),
            Texts::Any => None,
            Texts::None => return Err("it allows nothing".to_owned()),
        };
        let text = self.lark.text_until(content, &[quote]);
        Ok(format!("{} {text}", self.lark.mark(quote)))
    }

    fn list(&mut self, object: &Map<String, Value>) -> Result<String, String> {
        let any = Value::Bool(true);
        let count = |name: &str| object.get(name).and_then(Value::as_u64);
        let first = object.get("prefixItems").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let (least, most) = (count("minItems").unwrap_or_default(), count("maxItems"));
        let (fixed, blank) = (first.len() as u64, self.notation.blank);
        if least < fixed && fixed > 0 {
            return Err(cannot("'prefixItems' of which some may be missing"));
        }
        if most.is_some_and(|most| most < least) {
            return Err("'minItems' is greater than 'maxItems'".to_owned());
        }
        let comma = format!("{blank} \",\" {blank}");
        let mut all: Vec<String> = first.iter().map(|schema| self.value(schema)).collect::<Result<_, _>>()?;
        let (least, most) = (least - fixed, most.map(|most| most.saturating_sub(fixed)));
        let items = object.get("items").unwrap_or(&any);
        let closed = most == Some(0) || *items == Value::Bool(false);
        if closed && least > 0 {
            return Err("it allows nothing".to_owned());
        }
        if !closed {
            let item = self.value(items)?;
            // The first of them has a comma before it only behind others.
            let many = |least: u64, most: Option<u64>| match most {
                Some(0) => String::new(),
                Some(most) => format!("({comma} {item}){{{least},{most}}}"),
                None => format!("({comma} {item}){{{least},}}"),
            };
            match (all.pop(), least) {
                (Some(last), _) => all.push(format!("{last} {}", many(least, most))),
                (None, 0) => all.push(format!("({item} {})?", many(0, most.map(|most| most - 1)))),
                (None, _) => all.push(format!("{item} {}", many(least - 1, most.map(|most| most - 1)))),
            }
        }
        Ok(format!("\"[\" {blank} {} {blank} \"]\"", all.join(&format!(" {comma} "))))
    }

    /// Keys and values, in the order of the schema. `call`: they are the arguments of a call.
    fn members(&mut self, object: &Map<String, Value>, call: bool) -> Result<String, String> {
        let nothing = Map::new();
        let properties = object.get("properties").and_then(Value::as_object).unwrap_or(&nothing);
        let required: Vec<&str> =
            object.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
        let others = object.get("additionalProperties");
        let any = Value::Bool(true);
        let unnamed = required.iter().filter(|key| !properties.contains_key(**key)).map(|key| (*key, others.unwrap_or(&any)));
        let named = properties.iter().map(|(key, schema)| (key.as_str(), schema)).chain(unnamed);
        let mut items = Vec::new();
        for (key, schema) in named {
            let value = self.value(schema)?;
            let item = format!("{} {} {value}", self.key(key, call)?, self.colon(call));
            items.push((self.lark.rule(&item), required.contains(&key)));
        }
        let others = match others {
            Some(Value::Bool(false)) => None,
            Some(schema) => Some(self.value(schema)?),
            None if properties.is_empty() => Some(self.any()?),
            None => None,
        };
        let comma = format!("{} \",\" {}", self.notation.blank, self.notation.blank);
        let (mut first, mut after) = ("\"\"".to_owned(), "\"\"".to_owned());
        if let Some(value) = others {
            let keys: Vec<&str> = properties.keys().map(String::as_str).chain(required.iter().copied()).collect();
            let item = format!("{} {} {value}", self.other_key(&keys, call), self.colon(call));
            let item = self.lark.rule(&item);
            after = self.lark.rule(&format!("({comma} {item})*"));
            first = self.lark.rule(&format!("({item} {after})?"));
        }
        for (item, required) in items.into_iter().rev() {
            (first, after) = match required {
                true => (format!("{item} {after}"), format!("{comma} {item} {after}")),
                false => (format!("{item} {after} | {first}"), format!("({comma} {item})? {after}")),
            };
            (first, after) = (self.lark.rule(&first), self.lark.rule(&after));
        }
        Ok(first)
    }

    fn colon(&self, call: bool) -> String {
        match call {
            true => lark_string(self.notation.assigns),
            false => format!("\":\" {}", self.notation.blank),
        }
    }

    /// Keys are bare in calls, and everywhere in Gemma's notation.
    fn key(&self, key: &str, call: bool) -> Result<String, String> {
        let of_name = |c: char| c.is_alphanumeric() || c == '_';
        let is_name = !key.starts_with(|c: char| c.is_numeric()) && !key.is_empty() && key.chars().all(of_name);
        let is_bare = || !key.is_empty() && key.trim().trim_matches('"') == key && !key.contains([':', '{', '}', '[', ']', ',', '<']);
        match self.notation.quote {
            None if !call => Ok(lark_string(&json!(key).to_string())),
            _ if is_name => Ok(lark_string(key)),
            Some(_) if is_bare() => Ok(lark_string(key)),
            _ => Err(format!("the name {} cannot be written in this model's format of calls", json!(key))),
        }
    }

    /// The terminal of all keys but these.
    fn other_key(&mut self, known: &[&str], call: bool) -> String {
        let quoted = self.notation.quote.is_none() && !call;
        let known: Vec<String> = known.iter().map(|key| lark_string(key)).collect();
        let name = if known.is_empty() { NAME.to_owned() } else { format!("{NAME} & ~({})", known.join(" | ")) };
        let name = self.lark.terminal(&name);
        if quoted { self.lark.terminal(&format!("\"\\\"\" {name} \"\\\"\"")) } else { name }
    }

    /// Any value.
    fn any(&mut self) -> Result<String, String> {
        if let Some(rule) = self.references.get("") {
            return Ok(rule.clone());
        }
        let rule = self.lark.name();
        self.references.insert(String::new(), rule.clone());
        let nothing = Map::new();
        let types = ["null", "boolean", "number", "string", "array", "object"];
        let forms: Vec<String> = types.iter().map(|name| self.typed(name, &nothing)).collect::<Result<_, _>>()?;
        self.lark.named(&rule, &forms.join(" | "));
        Ok(rule)
    }

    fn referred(&mut self, reference: &Value) -> Result<String, String> {
        let key = reference.to_string();
        if let Some(rule) = self.references.get(&key) {
            return Ok(rule.clone());
        }
        let rule = self.lark.name();
        self.references.insert(key, rule.clone());
        let target = schemas::target(self.root, reference)?;
        let value = self.value(target)?;
        self.lark.named(&rule, &value);
        Ok(rule)
    }

    /// A value as it is written.
    fn literal(&self, value: &Value) -> Result<String, String> {
        let comma = if self.notation.blank.is_empty() { "\",\"" } else { "\", \"" };
        let colon = if self.notation.blank.is_empty() { "\":\"" } else { "\": \"" };
        Ok(match (value, self.notation.quote) {
            (Value::Null, _) => lark_string(self.notation.words[2]),
            (Value::Bool(value), _) => lark_string(self.notation.words[usize::from(!value)]),
            (Value::Number(number), _) => lark_string(&number.to_string()),
            (Value::String(_), None) => lark_string(&value.to_string()),
            (Value::String(text), Some(quote)) if text.contains(quote) => return Err(cannot("a text with the mark of texts in it")),
            (Value::String(text), Some(quote)) => format!("{0} {1} {0}", self.lark.mark(quote), lark_string(text)),
            (Value::Array(list), _) => {
                let list: Vec<String> = list.iter().map(|value| self.literal(value)).collect::<Result<_, _>>()?;
                format!("\"[\" {} \"]\"", list.join(&format!(" {comma} ")))
            }
            (Value::Object(object), _) => {
                let member = |(key, value): (&String, &Value)| Ok(format!("{} {colon} {}", self.key(key, false)?, self.literal(value)?));
                let members: Vec<String> = object.iter().map(member).collect::<Result<_, String>>()?;
                format!("\"{{\" {} \"}}\"", members.join(&format!(" {comma} ")))
            }
        })
    }

    /// No value meets two of these, because they are of other types or list other values.
    fn told_apart(&self, parts: &[Value]) -> bool {
        let types: Vec<Types> = parts.iter().map(|part| Types::of_schema(self.root, part)).collect();
        let apart = |a: usize, b: usize| {
            let listed =
                |part: &Value| part.as_object().and_then(schemas::listed).map(|values| values.into_iter().cloned().collect::<Vec<_>>());
            let values = listed(&parts[a]).zip(listed(&parts[b]));
            types[a].is_apart_from(&types[b]) || values.is_some_and(|(a, b)| !a.iter().any(|value| b.contains(value)))
        };
        (0..parts.len()).all(|a| (0..a).all(|b| apart(a, b)))
    }
}

/// Whether a value is of one of these types.
fn of_types(value: &Value, types: &[&str]) -> bool {
    types.iter().any(|name| match *name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|number| number.fract() == 0.0),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => false,
    })
}
