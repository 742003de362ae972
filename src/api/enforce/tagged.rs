//! Arguments between tags, in Lark: texts as they are, and anything else as JSON.

use serde_json::{Map, Value, json};

use crate::api::enforce::lark::Lark;
use crate::api::enforce::schemas::{self, OF_OBJECTS, Texts};
use crate::api::grammar::lark_string;
use crate::api::parse::tools::table::Tags;
use crate::api::parse::tools::values::Types;

/// What any name looks like.
const NAME: &str = "/[A-Za-z_][A-Za-z0-9_]{0,63}/";

pub struct Tagged<'a> {
    pub tags: &'static Tags,
    /// What ends a call.
    pub close: &'static [&'static str],
    pub root: &'a Value,
}

impl Tagged<'_> {
    /// All arguments, in the order of the schema, each with what stands before it.
    pub fn arguments(&self, lark: &mut Lark<'_>) -> Result<String, String> {
        let nothing = Map::new();
        let object = self.root.as_object().ok_or("it is no schema of an object")?;
        schemas::only(object, &[&OF_OBJECTS[..], &["type"]].concat())?;
        let properties = object.get("properties").and_then(Value::as_object).unwrap_or(&nothing);
        let required: Vec<&str> =
            object.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
        let others = object.get("additionalProperties");
        let mut all = Vec::new();
        for (key, schema) in properties {
            let argument = self.argument(lark, &self.key(key)?, schema)?;
            all.push(if required.contains(&key.as_str()) { argument } else { format!("{argument}?") });
        }
        let unnamed = required.iter().filter(|key| !properties.contains_key(**key));
        for key in unnamed {
            all.push(self.argument(lark, &self.key(key)?, others.unwrap_or(&Value::Bool(true)))?);
        }
        let others = match others {
            Some(Value::Bool(false)) => None,
            Some(schema) => Some(schema),
            None => properties.is_empty().then_some(&Value::Bool(true)),
        };
        if let Some(schema) = others {
            let known: Vec<String> = properties.keys().map(String::as_str).chain(required).map(lark_string).collect();
            let key = if known.is_empty() { NAME.to_owned() } else { format!("{NAME} & ~({})", known.join(" | ")) };
            let key = Key::Any(lark.terminal(&key));
            all.push(format!("{}*", self.argument(lark, &key, schema)?));
        }
        Ok(if all.is_empty() { "\"\"".to_owned() } else { all.join(" ") })
    }

    fn key(&self, key: &str) -> Result<Key, String> {
        match key.is_empty() || key.contains(self.tags.key.1) || key.trim() != key {
            true => Err(format!("the name {} cannot be written in this model's format of calls", json!(key))),
            false => Ok(Key::Named(key.to_owned())),
        }
    }

    /// The rule of an argument: its key, what it is, and its closing mark.
    fn argument(&self, lark: &mut Lark<'_>, key: &Key, schema: &Value) -> Result<String, String> {
        let forms = self.values(lark, schema)?;
        let forms: Vec<String> = forms.into_iter().map(|(text, value)| format!("ws {} {value}", self.opening(lark, key, text))).collect();
        match forms.is_empty() {
            true => Err("it allows nothing that can be written in this model's format of calls".to_owned()),
            false => Ok(lark.rule(&forms.join(" | "))),
        }
    }

    /// Everything before a value. `text`: what the attribute says, where there is one.
    fn opening(&self, lark: &Lark<'_>, key: &Key, text: Option<bool>) -> String {
        let tags = self.tags;
        let behind = match (tags.attributes, text) {
            (true, Some(text)) => format!("{} string=\"{text}\">", tags.key.1),
            (true, None) => format!("{}>", tags.key.1),
            (false, _) => tags.key.1.to_owned(),
        };
        let key = match key {
            Key::Named(name) => lark.mark(&format!("{}{name}{behind}", tags.key.0)),
            Key::Any(terminal) => format!("{} {terminal} {}", lark.mark(tags.key.0), lark.mark(&behind)),
        };
        if tags.value_open.is_empty() { key } else { format!("{key} ws {}", lark.mark(tags.value_open)) }
    }

    /// The ways to write a value, each with what the attribute says of it.
    fn values(&self, lark: &mut Lark<'_>, schema: &Value) -> Result<Vec<(Option<bool>, String)>, String> {
        let types = Types::of_schema(self.root, schema);
        let is_any = schemas::is_any(schema);
        if types.is_unknown() && !is_any {
            return Err("a schema without 'type' cannot be kept to in this model's format of calls".to_owned());
        }
        let texts = if types.is_json() { Texts::None } else { schemas::texts(lark, self.root, schema)? };
        let mut forms = Vec::new();
        if self.tags.tells_text {
            if let Some(text) = self.text(lark, texts) {
                forms.push((Some(true), text));
            }
            let json = if is_any { Types::json() } else { types };
            let others = json.not_texts();
            if !others.is_empty() {
                let value = if is_any { json!({"type": others}) } else { json!({"allOf": [schema, {"type": others}]}) };
                forms.push((Some(false), self.json(lark, &value)?));
            }
            return Ok(forms);
        }
        if types.is_json() {
            forms.push((None, self.json(lark, schema)?));
            return Ok(forms);
        }
        // What is written as a null is one, where the schema allows it.
        let texts = match texts {
            Texts::Of(content) if types.may_be_null() => Texts::Of(lark.terminal(&format!("{content} | \"null\""))),
            Texts::None if types.may_be_null() => Texts::Of(lark.terminal("\"null\"")),
            texts => texts,
        };
        forms.extend(self.text(lark, texts).map(|text| (None, text)));
        Ok(forms)
    }

    fn json(&self, lark: &Lark<'_>, schema: &Value) -> Result<String, String> {
        let value = schemas::json(self.root, schema, false)?;
        Ok(format!("ws {value} ws {}", lark.mark(self.tags.value_close)))
    }

    fn text(&self, lark: &mut Lark<'_>, texts: Texts) -> Option<String> {
        let marks = [&[self.tags.value_close], self.close].concat();
        let content = match texts {
            Texts::None => return None,
            Texts::Any => None,
            // A line break on either side is no part of it.
            Texts::Of(content) if self.tags.lines => {
                let any = lark.terminal("/(?s:.*)/");
                let outer = lark.terminal(&format!("\"\\n\" {any} | {any} \"\\n\""));
                let plain = lark.terminal(&format!("{content} & ~{outer}"));
                Some(lark.terminal(&format!("\"\\n\" {content} \"\\n\" | {plain}")))
            }
            Texts::Of(content) => Some(content),
        };
        Some(lark.text_until(content.as_deref(), &marks))
    }
}

enum Key {
    Named(String),
    /// One of a terminal.
    Any(String),
}
