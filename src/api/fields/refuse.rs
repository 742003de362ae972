//! Fields that would change the answer and are not supported: refused by name, never ignored.

use serde_json::Value;

use crate::api::fields::Fields;
use crate::api::fields::table::{FIELDS, Neutral, TakenBy};
use crate::error::Failure;

/// Refuses each known field that would change the output and is not supported. `chat`: fields of chats have their own readers. `infills`:
/// a text as `suffix` is one that the answer leads to.
pub fn refuse_unsupported(fields: &Fields<'_>, chat: bool, infills: bool) -> Result<(), Failure> {
    // Then they are only text for the chat template.
    let tools_are_text = fields.get("tool_choice").is_some_and(|field| field.value == "none");
    for spec in FIELDS {
        let Some(neutral) = spec.neutral.filter(|_| !(chat && spec.taken_by == TakenBy::Chat)) else { continue };
        let Some(field) = fields.get(spec.name) else { continue };
        let has_reader = match spec.name {
            "suffix" => field.value.is_object() || (infills && field.value.is_string()),
            "tools" => tools_are_text,
            _ => false,
        };
        if has_reader {
            continue;
        }
        if !passes(field.value, neutral) {
            return Err(unsupported(&field.name));
        }
    }
    let of_template = fields.object("chat_template_kwargs")?.and_then(|object| object.get("tools"));
    match of_template.is_some_and(|tools| !tools_are_text && !passes(tools, Neutral::Empty)) {
        true => Err(unsupported("chat_template_kwargs.tools")),
        false => Ok(()),
    }
}

/// The refusal of a field that would change the output.
pub fn unsupported(name: &str) -> Failure {
    let message = format!("'{name}' is not supported by this server. Remove it, or leave it at its default.");
    Failure::bad_request(name, message).code("unsupported_parameter")
}

/// Whether a value is one of those that change nothing.
pub fn passes(value: &Value, neutral: Neutral) -> bool {
    let empty = match value {
        Value::Bool(flag) => !flag,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(object) => object.is_empty(),
        Value::Null => true,
        Value::Number(_) => false,
    };
    match neutral {
        Neutral::Nothing => false,
        Neutral::Empty => empty,
        Neutral::Number(number) => value.as_f64() == Some(number),
        Neutral::Words(words) => match value {
            Value::String(word) => words.contains(&word.as_str()),
            Value::Array(list) => list.iter().all(|word| word.as_str().is_some_and(|word| words.contains(&word))),
            _ => false,
        },
        Neutral::Yes => value == &Value::Bool(true),
        Neutral::NoThinking => empty || is_thinking_off(value),
    }
}

/// `thinking` and `reasoning` in the forms that switch it off: `false`, `{"type": "disabled"}`, `{"enabled": false}`, `{"effort": "none"}`.
pub fn is_thinking_off(value: &Value) -> bool {
    match value {
        Value::Bool(flag) => !flag,
        Value::Object(object) => {
            let mut given = object.iter().filter(|(_, value)| !value.is_null()).peekable();
            let off = |name: &str, value: &Value| match name {
                "type" => value == "disabled",
                "enabled" => value == &Value::Bool(false),
                "effort" => value == "none",
                _ => false,
            };
            given.peek().is_some() && given.all(|(name, value)| off(name, value))
        }
        _ => false,
    }
}
