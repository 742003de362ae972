//! Structural tags (xgrammar's and vLLM's): free text, in which a trigger opens a part that has a schema.

use std::fmt::Write;

use serde_json::Value;

use crate::api::grammar::lark::lark_string;
use crate::api::grammar::schema;

/// One kind of part.
struct Tag<'a> {
    begin: &'a str,
    schema: &'a Value,
    end: &'a str,
}

/// `structures` of `begin`, `schema` and `end`, and the `triggers` that open them, as a grammar in Lark.
pub fn to_lark(value: &Value) -> Result<String, String> {
    if value.get("format").is_some() {
        return Err("the newer form with 'format' is not supported: use 'structures' and 'triggers'".to_owned());
    }
    let structures = value.get("structures").and_then(Value::as_array).filter(|list| !list.is_empty());
    let triggers = value.get("triggers").and_then(Value::as_array).filter(|list| !list.is_empty());
    let (Some(structures), Some(triggers)) = (structures, triggers) else {
        return Err("it needs 'structures' and 'triggers', each a list with at least one entry".to_owned());
    };
    let tags: Vec<Tag<'_>> = structures.iter().map(tag).collect::<Result<_, _>>()?;
    let triggers: Vec<&str> = triggers
        .iter()
        .map(|trigger| trigger.as_str().filter(|text| !text.is_empty()))
        .collect::<Option<_>>()
        .ok_or("'triggers' must be a list of strings that are not empty")?;
    write_lark(&tags, &triggers)
}

fn tag(value: &Value) -> Result<Tag<'_>, String> {
    let text = |name: &str| value.get(name).and_then(Value::as_str).ok_or_else(|| format!("each of 'structures' needs '{name}', a string"));
    let schema = value.get("schema").ok_or("each of 'structures' needs 'schema'")?;
    Ok(Tag { begin: text("begin")?, schema, end: text("end")? })
}

fn write_lark(tags: &[Tag<'_>], triggers: &[&str]) -> Result<String, String> {
    let mut rules = String::new();
    let mut parts = Vec::new();
    for (at, tag) in tags.iter().enumerate() {
        let trigger = triggers.iter().find(|trigger| tag.begin.starts_with(**trigger));
        let trigger = trigger.ok_or_else(|| format!("none of 'triggers' begins {:?}", tag.begin))?;
        // Free text up to the first trigger, and then what only this tag has.
        let rest = lark_string(&tag.begin[trigger.len()..]);
        let number = triggers.iter().position(|other| other == trigger).unwrap_or_default();
        let _ = writeln!(rules, "tag_{at}: trigger_{number} {rest} %json {} {}", schema::prepared(tag.schema), lark_string(tag.end));
        parts.push(format!("tag_{at}"));
    }
    for (number, trigger) in triggers.iter().enumerate() {
        let _ = writeln!(rules, "trigger_{number}[lazy]: TEXT {}", lark_string(trigger));
    }
    Ok(format!("start: ({})* TEXT\n{rules}TEXT: /(.|\\n)*/\n", parts.join(" | ")))
}
