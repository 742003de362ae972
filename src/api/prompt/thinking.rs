//! What a request wishes of thinking, under the names that clients use.

use serde_json::{Map, Value, json};

use crate::api::fields::{Field, Fields, invalid, whole, wrong_type};
use crate::error::Failure;

const EFFORTS: [&str; 7] = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];

/// What becomes of thoughts in the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thoughts {
    /// They are told apart from the content.
    Apart,
    /// They stay in the content, with their marks.
    InContent,
    /// They are left out.
    Hidden,
}

/// Adds the switches for the template. What `user` holds already wins: it is from `chat_template_kwargs`.
pub fn switches(fields: &Fields<'_>, user: &mut Map<String, Value>) -> Result<(), Failure> {
    let (of_object, effort) = objects(fields)?;
    let effort = effort_field(fields)?.or(effort);
    let enabled = fields.bool("enable_thinking")?.or(of_object).or((effort.as_deref() == Some("none")).then_some(false));
    if let Some(enabled) = enabled {
        // DeepSeek's and Granite's templates say `thinking`, the others `enable_thinking`.
        let enabled = json!(enabled);
        let given = ["enable_thinking", "thinking"].into_iter().find_map(|name| user.get(name)).cloned().unwrap_or(enabled);
        for name in ["enable_thinking", "thinking"] {
            user.entry(name).or_insert_with(|| given.clone());
        }
    }
    if let Some(effort) = effort {
        user.entry("reasoning_effort").or_insert(json!(effort));
    }
    Ok(())
}

fn effort_field(fields: &Fields<'_>) -> Result<Option<String>, Failure> {
    fields.get("reasoning_effort").map(|field| effort(&field)).transpose()
}

fn effort(field: &Field<'_>) -> Result<String, Failure> {
    let word = field.value.as_str().filter(|effort| EFFORTS.contains(effort));
    word.map(str::to_owned)
        .ok_or_else(|| invalid(field, format!("'{}' must be one of {}, but it is {}.", field.name, EFFORTS.join(", "), field.value)))
}

/// Whether `thinking` (Anthropic's and others') and `reasoning` (OpenRouter's) switch it, and the effort that they name.
fn objects(fields: &Fields<'_>) -> Result<(Option<bool>, Option<String>), Failure> {
    let (mut enabled, mut effort_given) = (None, None);
    for field in ["thinking", "reasoning"].into_iter().filter_map(|name| fields.get(name)) {
        let object = match field.value {
            Value::Bool(flag) => {
                enabled = enabled.or(Some(*flag));
                continue;
            }
            Value::Object(object) => object,
            _ => return Err(wrong_type(&field, "true, false or an object")),
        };
        for (key, value) in object.iter().filter(|(_, value)| !value.is_null()) {
            let inner = Field { name: format!("{}.{key}", field.name), value };
            match key.as_str() {
                "type" => match value.as_str() {
                    Some("enabled") => enabled = enabled.or(Some(true)),
                    Some("disabled") => enabled = enabled.or(Some(false)),
                    Some("adaptive" | "auto") => {}
                    _ => return Err(invalid(&inner, format!("'{}' must be 'enabled', 'disabled' or 'adaptive'.", inner.name))),
                },
                "enabled" => enabled = enabled.or(Some(flag(&inner)?)),
                "exclude" => {
                    flag(&inner)?;
                }
                "effort" => effort_given = Some(effort(&inner)?),
                _ => {}
            }
        }
    }
    Ok((enabled, effort_given))
}

/// Names of a budget in `thinking` and `reasoning`.
const BUDGETS: [&str; 3] = ["budget_tokens", "max_tokens", "budget"];

/// Most tokens of thoughts, with the field that says so; -1 bounds nothing.
pub fn budget(fields: &Fields<'_>) -> Result<Option<(String, usize)>, Failure> {
    let own = fields.get("thinking_token_budget").into_iter();
    let of_objects = ["thinking", "reasoning"].into_iter().filter_map(|name| fields.get(name)).filter_map(|field| {
        let object = field.value.as_object()?;
        let (name, value) = BUDGETS.into_iter().find_map(|name| Some((name, object.get(name).filter(|value| !value.is_null())?)))?;
        Some(Field { name: format!("{}.{name}", field.name), value })
    });
    let Some(field) = own.chain(of_objects).next() else { return Ok(None) };
    let budget = whole(field.value).ok_or_else(|| wrong_type(&field, "an integer"))?;
    match budget {
        -1 => Ok(None),
        ..-1 => Err(invalid(&field, format!("{budget} is less than the minimum of 0 (-1: no budget) - '{}'", field.name))),
        _ => Ok(Some((field.name, usize::try_from(budget).unwrap_or(usize::MAX)))),
    }
}

fn flag(field: &Field<'_>) -> Result<bool, Failure> {
    field.value.as_bool().ok_or_else(|| wrong_type(field, "true or false"))
}

/// What the request wants done with thoughts.
pub fn thoughts(fields: &Fields<'_>) -> Result<Thoughts, Failure> {
    let excluded = fields.get("reasoning").is_some_and(|field| field.value["exclude"] == true);
    let hidden = excluded || !fields.flag("include_reasoning")?;
    let apart = fields.flag("separate_reasoning")?;
    let of_format = match fields.get("reasoning_format") {
        None => Thoughts::Apart,
        Some(field) => match field.value.as_str() {
            Some("" | "auto" | "deepseek" | "parsed") => Thoughts::Apart,
            Some("none" | "raw") => Thoughts::InContent,
            Some("hidden") => Thoughts::Hidden,
            _ => {
                let message = format!("'{}' must be auto, deepseek, parsed, none, raw or hidden, but it is {}.", field.name, field.value);
                return Err(Failure::bad_request(field.name, message).code("unsupported_value"));
            }
        },
    };
    Ok(match of_format {
        _ if hidden => Thoughts::Hidden,
        _ if !apart => Thoughts::InContent,
        other => other,
    })
}
