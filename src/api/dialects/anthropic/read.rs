//! A request of `/v1/messages` as a chat request.

use serde_json::{Map, Value, json};

use crate::api::dialects::anthropic::messages::{self, required};
use crate::api::dialects::chat_form::ChatForm;
use crate::api::fields::dialect_tables::MESSAGES;
use crate::api::fields::rows::{Rows, member, object};
use crate::api::fields::{Field, invalid, missing, wrong_type};
use crate::error::Failure;

/// The least budget that Anthropic takes.
const LEAST_BUDGET: u64 = 1024;

/// `answered`: an answer is wanted, and so `max_tokens`.
pub fn translate(body: &Value, answered: bool) -> Result<ChatForm, Failure> {
    let rows = Rows::new(MESSAGES, body)?;
    let mut chat = ChatForm::new(rows.others());
    match rows.get("max_tokens") {
        Some(field) => chat.set("max_tokens", field.value.clone(), "max_tokens"),
        None if answered => return Err(missing("max_tokens", "'max_tokens' is missing. It is the most tokens that the answer may have.")),
        None => {}
    }
    put_messages(&mut chat, &rows)?;
    put_tools(&mut chat, &rows)?;
    put_thinking(&mut chat, &rows)?;
    put_output(&mut chat, &rows)?;
    rows.object("metadata")?;
    Ok(chat)
}

fn put_messages(chat: &mut ChatForm, rows: &Rows<'_>) -> Result<(), Failure> {
    let conversation = messages::read(rows)?;
    for (place, origin) in conversation.origins.iter().enumerate() {
        chat.call(format!("messages[{place}]"), origin);
    }
    // Anthropic's models go on where a last message of theirs ends.
    let last = conversation.messages.last().filter(|last| last["role"] == "assistant" && last.get("tool_calls").is_none());
    if last.and_then(|last| last["content"].as_array()).is_some_and(|parts| !parts.is_empty()) {
        let origin = conversation.origins.last().cloned().unwrap_or_default();
        chat.set("continue_final_message", json!(true), &origin);
    }
    chat.set("messages", Value::Array(conversation.messages), "messages");
    Ok(())
}

fn put_tools(chat: &mut ChatForm, rows: &Rows<'_>) -> Result<(), Failure> {
    let mut tools = Vec::new();
    for (place, tool) in rows.list("tools")?.into_iter().enumerate() {
        let fields = object(&tool, "an object with 'name' and 'input_schema'")?;
        if let Some(kind) = fields.get("type").filter(|kind| !kind.is_null() && *kind != "custom") {
            let name = &tool.name;
            let message =
                format!("'{name}' is a tool of type {kind}. This server runs no tools: only tools with an 'input_schema' can be called.");
            return Err(Failure::bad_request(name, message).code("unsupported_value"));
        }
        let mut function = Map::from_iter([("name".to_owned(), json!(required(&tool, fields, "name")?))]);
        let as_chat = [("description", "description"), ("input_schema", "parameters"), ("strict", "strict")];
        for (written, name) in as_chat {
            if let Some(field) = member(Some(&tool.name), fields, written) {
                function.insert(name.to_owned(), field.value.clone());
                chat.call(format!("tools[{place}].function.{name}"), field.name);
            }
        }
        tools.push(json!({"type": "function", "function": function}));
        chat.call(format!("tools[{place}].function"), &tool.name);
    }
    if !tools.is_empty() {
        chat.set("tools", Value::Array(tools), "tools");
    }
    put_tool_choice(chat, rows)
}

fn put_tool_choice(chat: &mut ChatForm, rows: &Rows<'_>) -> Result<(), Failure> {
    let (Some(choice), Some(fields)) = (rows.get("tool_choice"), rows.object("tool_choice")?) else { return Ok(()) };
    let value = match required(&choice, fields, "type")? {
        "auto" => json!("auto"),
        "any" => json!("required"),
        "none" => json!("none"),
        "tool" => json!({"type": "function", "function": {"name": required(&choice, fields, "name")?}}),
        other => {
            let message = format!("'tool_choice.type' is '{other}'. It must be one of auto, any, tool, none.");
            return Err(Failure::bad_request("tool_choice.type", message).code("invalid_value"));
        }
    };
    chat.set("tool_choice", value, "tool_choice");
    chat.call("tool_choice.function", "tool_choice");
    if let Some(field) = member(Some("tool_choice"), fields, "disable_parallel_tool_use") {
        let disable = field.value.as_bool().ok_or_else(|| wrong_type(&field, "true or false"))?;
        if disable {
            chat.set("parallel_tool_calls", json!(false), &field.name);
        }
    }
    Ok(())
}

/// Without a wish the model does what it does by itself.
fn put_thinking(chat: &mut ChatForm, rows: &Rows<'_>) -> Result<(), Failure> {
    let (Some(thinking), Some(fields)) = (rows.get("thinking"), rows.object("thinking")?) else { return Ok(()) };
    let thinks = match required(&thinking, fields, "type")? {
        "enabled" => {
            let Some(field) = member(Some("thinking"), fields, "budget_tokens") else {
                let message =
                    "'thinking.budget_tokens' is missing. It is the most tokens to think with; {\"type\": \"adaptive\"} needs none.";
                return Err(missing("thinking.budget_tokens", message));
            };
            chat.set("thinking_token_budget", json!(budget(&field, rows)?), &field.name);
            true
        }
        "adaptive" => true,
        "disabled" => false,
        other => {
            let message = format!("'thinking.type' is '{other}'. It must be one of enabled, adaptive, disabled.");
            return Err(Failure::bad_request("thinking.type", message).code("invalid_value"));
        }
    };
    chat.set("enable_thinking", json!(thinks), "thinking");
    Ok(())
}

/// A budget leaves room for an answer.
fn budget(field: &Field<'_>, rows: &Rows<'_>) -> Result<u64, Failure> {
    let budget = field.value.as_u64().ok_or_else(|| wrong_type(field, "an integer"))?;
    if budget < LEAST_BUDGET {
        return Err(invalid(field, format!("{budget} is less than the minimum of {LEAST_BUDGET} - '{}'", field.name)));
    }
    let most = rows.get("max_tokens").and_then(|most| most.value.as_u64());
    match most.filter(|most| budget >= *most) {
        Some(most) => Err(invalid(field, format!("{budget} is not less than 'max_tokens', which is {most} - '{}'", field.name))),
        None => Ok(budget),
    }
}

/// `output_config`, and the older `output_format`.
fn put_output(chat: &mut ChatForm, rows: &Rows<'_>) -> Result<(), Failure> {
    let config = rows.object("output_config")?;
    if let Some(effort) = config.and_then(|config| member(Some("output_config"), config, "effort")) {
        chat.set("reasoning_effort", effort.value.clone(), &effort.name);
    }
    let newer = config.and_then(|config| member(Some("output_config"), config, "format"));
    let Some(format) = newer.or_else(|| rows.get("output_format")) else { return Ok(()) };
    let fields = object(&format, "an object with 'type' and 'schema'")?;
    let kind = required(&format, fields, "type")?;
    if kind != "json_schema" {
        let name = format!("{}.type", format.name);
        return Err(Failure::bad_request(&name, format!("'{name}' is '{kind}'. It must be json_schema.")).code("invalid_value"));
    }
    let Some(schema) = member(Some(&format.name), fields, "schema") else {
        let name = format!("{}.schema", format.name);
        return Err(missing(&name, format!("'{name}' is missing. It is a JSON schema.")));
    };
    let schema = json!({"name": "output", "schema": schema.value, "strict": true});
    chat.set("response_format", json!({"type": "json_schema", "json_schema": schema}), &format.name);
    chat.call("response_format.json_schema", &format.name);
    Ok(())
}
