//! Chat messages as clients send them, checked and brought into the form that chat templates expect.

use serde_json::{Map, Value, json};

use crate::api::fields::{Field, invalid, kind, missing, wrong_type};
use crate::error::Failure;

/// Roles that some API of this kind knows.
const ROLES: &[&str] = &["system", "developer", "user", "assistant", "tool", "function"];

/// `messages`: a list of at most so many message objects, or one string, which stands for one user message.
pub fn read(field: &Field<'_>, most: Option<usize>) -> Result<Vec<Value>, Failure> {
    let messages = match field.value {
        Value::String(text) => return Ok(vec![json!({"role": "user", "content": text})]),
        Value::Array(messages) => messages,
        _ => return Err(wrong_type(field, "a list of messages")),
    };
    if messages.is_empty() {
        return Err(missing(&field.name, format!("'{}' must hold at least one message.", field.name)));
    }
    if let Some(most) = most.filter(|most| messages.len() > *most) {
        let message = format!("'{}' holds {} messages, more than the maximum of {most} (MAX_MESSAGES).", field.name, messages.len());
        return Err(invalid(field, message));
    }
    messages.iter().enumerate().map(|(i, value)| message(&Field { name: format!("{}[{i}]", field.name), value })).collect()
}

fn message(field: &Field<'_>) -> Result<Value, Failure> {
    let object = field.value.as_object().ok_or_else(|| wrong_type(field, "a message object with 'role' and 'content'"))?;
    let role = role(field, object)?;
    let is_tool_message = object.get("role").is_some_and(|given| given == "tool");
    let mut message = object.clone();
    message.insert("role".to_owned(), json!(role));
    let calls = tool_calls(field, &mut message)?;
    let content = content(field, object, role, calls)?;
    message.insert("content".to_owned(), content);
    if is_tool_message && !object.get("tool_call_id").is_some_and(Value::is_string) {
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

/// The role for the template: `developer` is the newer name of `system`, and `function` the older one of `tool`.
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
    Ok(match role {
        "developer" => "system",
        "function" => "tool",
        role => role,
    })
}

/// The content of a message: its string, or its text parts in the one form that templates know.
fn content(field: &Field<'_>, object: &Map<String, Value>, role: &str, calls: bool) -> Result<Value, Failure> {
    let name = format!("{}.content", field.name);
    match object.get("content") {
        None | Some(Value::Null) if role == "assistant" => Ok(json!(object.get("refusal").and_then(Value::as_str).unwrap_or_default())),
        None | Some(Value::Null) if calls || role == "tool" => Ok(json!("")),
        None | Some(Value::Null) => Err(missing(&name, format!("'{name}' is missing. A message of role '{role}' needs a text."))),
        Some(Value::String(text)) => Ok(json!(text)),
        Some(Value::Array(parts)) => {
            let texts = parts.iter().enumerate().map(|(j, value)| part(&Field { name: format!("{name}[{j}]"), value }));
            texts.map(|text| text.map(|text| json!({"type": "text", "text": text}))).collect()
        }
        Some(value) => Err(wrong_type(&Field { name, value }, "a string or a list of content parts")),
    }
}

/// The text of a content part.
fn part<'a>(field: &Field<'a>) -> Result<&'a str, Failure> {
    let object = match field.value {
        Value::String(text) => return Ok(text),
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
        Some(Value::String(text)) => Ok(text),
        other => Err(wrong_type(&Field { name: format!("{}.{key}", field.name), value: other.unwrap_or(&Value::Null) }, "a string")),
    }
}

/// Tool calls of the history in the one form that templates know: a `function` with a `name` and `arguments`. True when there are any.
fn tool_calls(field: &Field<'_>, message: &mut Map<String, Value>) -> Result<bool, Failure> {
    // The older form of a single call.
    if let Some(call @ Value::Object(_)) = message.shift_remove("function_call")
        && message.get("tool_calls").is_none_or(Value::is_null)
    {
        message.insert("tool_calls".to_owned(), json!([{"type": "function", "function": call}]));
    }
    let Some(calls) = message.get_mut("tool_calls") else { return Ok(false) };
    let name = format!("{}.tool_calls", field.name);
    let list = match calls {
        Value::Null => &mut Vec::new(),
        Value::Array(list) => list,
        value => return Err(wrong_type(&Field { name, value }, "a list of tool calls")),
    };
    for (k, call) in list.iter_mut().enumerate() {
        tool_call(&format!("{name}[{k}]"), call)?;
    }
    let any = !list.is_empty();
    if !any {
        message.remove("tool_calls");
    }
    Ok(any)
}

fn tool_call(name: &str, call: &mut Value) -> Result<(), Failure> {
    let expected = "with the called 'function', or the called 'custom' tool";
    if !call.is_object() {
        return Err(invalid(
            &Field { name: name.to_owned(), value: call },
            format!("'{name}' must be an object {expected}, but it is {}.", kind(call)),
        ));
    }
    // A custom tool takes one text in place of arguments: to a template it is a function with one argument.
    if let Some(custom) = call.get("custom").filter(|custom| custom.is_object()) {
        let function = json!({"name": custom["name"], "arguments": {"input": custom["input"]}});
        call["type"] = json!("function");
        call["function"] = function;
        call.as_object_mut().and_then(|call| call.shift_remove("custom"));
    }
    let Some(function) = call.get_mut("function").and_then(Value::as_object_mut) else {
        return Err(missing(name, format!("'{name}' must be an object {expected}, and it has neither.")));
    };
    // Arguments come as a JSON string, and templates expect an object.
    let arguments = match function.get("arguments") {
        // NOTE: arguments that do not parse must not fail this and every later turn of the conversation.
        Some(Value::String(text)) => serde_json::from_str::<Value>(text).ok().filter(Value::is_object).unwrap_or_else(|| {
            if !text.trim().is_empty() {
                tracing::warn!("the arguments of '{name}' are no JSON object: the template gets an empty one");
            }
            json!({})
        }),
        None | Some(Value::Null) => json!({}),
        Some(value) => value.clone(),
    };
    function.insert("arguments".to_owned(), arguments);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(value: Value) -> Result<Vec<Value>, Failure> {
        read(&Field { name: "messages".to_owned(), value: &value }, Some(8))
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
        let parts = ["a", "b", "c"].map(|text| json!({"type": "text", "text": text}));
        assert_eq!(messages[1], json!({"role": "user", "content": parts, "name": "x"}));
        assert_eq!(messages[2], json!({"role": "assistant", "content": ""}));
    }

    #[test]
    fn there_may_be_so_many() {
        let message = json!({"role": "user", "content": "x"});
        assert!(parse(json!(vec![message.clone(); 8])).is_ok());
        let failure = parse(json!(vec![message; 9])).unwrap_err();
        assert!(failure.message.contains("holds 9 messages, more than the maximum of 8 (MAX_MESSAGES)"), "{failure}");
    }

    #[test]
    fn arguments_of_tool_calls_become_objects() {
        let call = |arguments: &str| json!([{"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]}]);
        for (text, arguments) in [("{\"a\":1}", json!({"a": 1})), ("", json!({})), ("{broken", json!({}))] {
            assert_eq!(parse(call(text)).unwrap()[0]["tool_calls"][0]["function"]["arguments"], arguments);
        }
    }

    #[test]
    fn every_kind_of_call_and_result_is_brought_into_one_form() {
        let call =
            |name: &str, arguments: Value| json!({"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}});
        let messages = parse(json!([
            {"role": "assistant", "tool_calls": [{"id": "1", "type": "custom", "custom": {"name": "shell", "input": "ls -l"}}]},
            {"role": "tool", "tool_call_id": "1", "content": null},
            {"role": "assistant", "content": null, "function_call": {"name": "f", "arguments": "{\"a\": 1}"}},
            {"role": "function", "name": "f", "content": "5"},
            {"role": "assistant", "content": "x", "function_call": null, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "g"}}]},
        ]))
        .unwrap();
        assert_eq!(messages[0]["tool_calls"], json!([call("shell", json!({"input": "ls -l"}))]));
        assert_eq!((&messages[1]["role"], &messages[1]["content"]), (&json!("tool"), &json!("")));
        assert_eq!(messages[2]["tool_calls"], json!([{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]));
        assert_eq!((&messages[3]["role"], &messages[3]["name"]), (&json!("tool"), &json!("f")));
        assert_eq!(messages[4]["tool_calls"], json!([call("g", json!({}))]));
        let failure = parse(json!([{"role": "assistant", "tool_calls": [{"id": "1", "type": "web_search"}]}])).unwrap_err();
        assert!(failure.message.ends_with("'function', or the called 'custom' tool, and it has neither."), "{failure}");
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
            (json!([{"role": "assistant", "tool_calls": [{}]}]), "messages[0].tool_calls[0]", Some("missing_required_parameter")),
        ];
        for (messages, param, code) in cases {
            let failure = parse(messages.clone()).unwrap_err();
            assert_eq!((failure.param.as_deref(), failure.code), (Some(param), code), "{messages}: {failure}");
        }
    }
}
