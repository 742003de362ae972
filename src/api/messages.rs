//! Chat messages as clients send them, checked and brought into the form that chat templates expect.

use serde_json::{Map, Value, json};

use crate::api::fields::{Field, invalid, kind, missing, wrong_type};
use crate::error::Failure;

/// Roles that some API of this kind knows.
const ROLES: &[&str] = &["system", "developer", "user", "assistant", "tool", "function"];

/// `messages`: a list of message objects, or one string, which stands for one user message.
pub fn read(field: &Field<'_>) -> Result<Vec<Value>, Failure> {
    let messages = match field.value {
        Value::String(text) => return Ok(vec![json!({"role": "user", "content": text})]),
        Value::Array(messages) => messages,
        _ => return Err(wrong_type(field, "a list of messages")),
    };
    if messages.is_empty() {
        return Err(missing(&field.name, format!("'{}' must hold at least one message.", field.name)));
    }
    messages.iter().enumerate().map(|(i, value)| message(&Field { name: format!("{}[{i}]", field.name), value })).collect()
}

fn message(field: &Field<'_>) -> Result<Value, Failure> {
    let object = field.value.as_object().ok_or_else(|| wrong_type(field, "a message object with 'role' and 'content'"))?;
    let role = role(field, object)?;
    let mut message = object.clone();
    message.insert("role".to_owned(), json!(role));
    let calls = tool_calls(field, &mut message)?;
    let content = content(field, object, role, calls)?;
    message.insert("content".to_owned(), json!(content));
    if role == "tool" && !object.get("tool_call_id").is_some_and(Value::is_string) {
        let name = format!("{}.tool_call_id", field.name);
        return Err(missing(&name, format!("'{name}' must be a string: it says which tool call this message answers.")));
    }
    // History of thinking models comes under either name, and templates read either.
    let thought = ["reasoning_content", "reasoning"].iter().find_map(|key| object.get(*key).filter(|value| value.is_string()));
    if let Some(thought) = thought {
        message.insert("reasoning_content".to_owned(), thought.clone());
        message.insert("reasoning".to_owned(), thought.clone());
    }
    Ok(Value::Object(message))
}

/// The role for the template: `developer` is the newer name of `system`.
fn role<'a>(field: &Field<'_>, object: &'a Map<String, Value>) -> Result<&'a str, Failure> {
    let name = format!("{}.role", field.name);
    let role = match object.get("role") {
        None | Some(Value::Null) => return Err(missing(&name, format!("'{name}' is missing. It is one of {}.", ROLES.join(", ")))),
        Some(value) => value.as_str().ok_or_else(|| wrong_type(&Field { name: name.clone(), value }, "a string"))?,
    };
    if !ROLES.contains(&role) {
        let message = format!("'{name}' is '{role}', which is not a role. It must be one of {}.", ROLES.join(", "));
        return Err(Failure::bad_request(name, message).code("invalid_value"));
    }
    Ok(if role == "developer" { "system" } else { role })
}

/// The text of a message: its string, or its text parts one after another.
fn content(field: &Field<'_>, object: &Map<String, Value>, role: &str, calls: bool) -> Result<String, Failure> {
    let name = format!("{}.content", field.name);
    match object.get("content") {
        None | Some(Value::Null) if role == "assistant" => Ok(object.get("refusal").and_then(Value::as_str).unwrap_or_default().to_owned()),
        None | Some(Value::Null) if calls => Ok(String::new()),
        None | Some(Value::Null) => Err(missing(&name, format!("'{name}' is missing. A message of role '{role}' needs a text."))),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) => {
            parts.iter().enumerate().map(|(j, value)| part(&Field { name: format!("{name}[{j}]"), value })).collect()
        }
        Some(value) => Err(wrong_type(&Field { name, value }, "a string or a list of content parts")),
    }
}

fn part(field: &Field<'_>) -> Result<String, Failure> {
    let object = match field.value {
        Value::String(text) => return Ok(text.clone()),
        Value::Object(object) => object,
        _ => return Err(wrong_type(field, "a content part, such as {\"type\": \"text\", \"text\": \"…\"}")),
    };
    let type_name = match object.get("type") {
        None if object.contains_key("text") => "text",
        None => return Err(missing(&format!("{}.type", field.name), format!("'{}' has no 'type'.", field.name))),
        Some(value) => value.as_str().ok_or_else(|| wrong_type(&Field { name: format!("{}.type", field.name), value }, "a string"))?,
    };
    let key = match type_name {
        "text" | "input_text" | "output_text" => "text",
        "refusal" => "refusal",
        other => {
            let message = format!("'{}' is a part of type '{other}', which this model does not take: it reads text only.", field.name);
            return Err(Failure::bad_request(&field.name, message).code("unsupported_value"));
        }
    };
    match object.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        other => Err(wrong_type(&Field { name: format!("{}.{key}", field.name), value: other.unwrap_or(&Value::Null) }, "a string")),
    }
}

/// Tool calls of the history, for templates: arguments arrive as a JSON string, and templates expect an object. True when there are any.
fn tool_calls(field: &Field<'_>, message: &mut Map<String, Value>) -> Result<bool, Failure> {
    let Some(calls) = message.get_mut("tool_calls") else { return Ok(message.get("function_call").is_some_and(|call| !call.is_null())) };
    let name = format!("{}.tool_calls", field.name);
    let list = match calls {
        Value::Null => &mut Vec::new(),
        Value::Array(list) => list,
        value => return Err(wrong_type(&Field { name, value }, "a list of tool calls")),
    };
    for (k, call) in list.iter_mut().enumerate() {
        let Some(function) = call.get_mut("function").and_then(Value::as_object_mut) else {
            return Err(invalid(
                &Field { name: format!("{name}[{k}]"), value: &Value::Null },
                format!("'{name}[{k}]' must be an object with a 'function', but it is {}.", kind(call)),
            ));
        };
        if let Some(Value::String(text)) = function.get("arguments") {
            // NOTE: arguments that do not parse must not fail this and every later turn of the conversation.
            let arguments = serde_json::from_str::<Value>(text).ok().filter(Value::is_object).unwrap_or_else(|| json!({}));
            function.insert("arguments".to_owned(), arguments);
        }
    }
    let any = !list.is_empty();
    if !any {
        message.remove("tool_calls");
    }
    Ok(any)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(value: Value) -> Result<Vec<Value>, Failure> {
        read(&Field { name: "messages".to_owned(), value: &value })
    }

    #[test]
    fn strings_parts_and_null() {
        assert_eq!(parse(json!("Hi")).unwrap(), [json!({"role": "user", "content": "Hi"})]);
        let messages = parse(json!([
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, "c"], "name": "x"},
            {"role": "assistant", "content": null, "tool_calls": []},
        ]))
        .unwrap();
        assert_eq!(messages[0], json!({"role": "system", "content": "Be brief."}));
        assert_eq!(messages[1], json!({"role": "user", "content": "abc", "name": "x"}));
        assert_eq!(messages[2], json!({"role": "assistant", "content": ""}));
    }

    #[test]
    fn arguments_of_tool_calls_become_objects() {
        let call = |arguments: &str| json!([{"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]}]);
        for (text, arguments) in [("{\"a\":1}", json!({"a": 1})), ("", json!({})), ("{broken", json!({}))] {
            assert_eq!(parse(call(text)).unwrap()[0]["tool_calls"][0]["function"]["arguments"], arguments);
        }
    }

    #[test]
    fn each_mistake_names_its_place() {
        let cases = [
            (json!(5), "messages", None),
            (json!([]), "messages", Some("missing_required_parameter")),
            (json!(["Hi"]), "messages[0]", None),
            (json!([{"content": "Hi"}]), "messages[0].role", Some("missing_required_parameter")),
            (json!([{"role": 1, "content": "Hi"}]), "messages[0].role", None),
            (json!([{"role": "wizard", "content": "Hi"}]), "messages[0].role", Some("invalid_value")),
            (json!([{"role": "user"}]), "messages[0].content", Some("missing_required_parameter")),
            (json!([{"role": "user", "content": 5}]), "messages[0].content", None),
            (json!([{"role": "user", "content": [5]}]), "messages[0].content[0]", None),
            (json!([{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text", None),
            (
                json!([{"role": "user", "content": "a"}, {"role": "user", "content": ["b", {"type": "image_url", "image_url": {"url": "x"}}]}]),
                "messages[1].content[1]",
                Some("unsupported_value"),
            ),
            (json!([{"role": "tool", "content": "5"}]), "messages[0].tool_call_id", Some("missing_required_parameter")),
            (json!([{"role": "assistant", "tool_calls": [5]}]), "messages[0].tool_calls[0]", Some("invalid_value")),
        ];
        for (messages, param, code) in cases {
            let failure = parse(messages.clone()).unwrap_err();
            assert_eq!((failure.param.as_deref(), failure.code), (Some(param), code), "{messages}: {failure}");
        }
    }
}
