//! A request of `/v1/responses` as a chat request.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::api::dialects::chat_form::ChatForm;
use crate::api::dialects::responses::items::{Conversation, required, unsupported};
use crate::api::fields::dialect_tables::RESPONSES;
use crate::api::fields::rows::{Rows, elements, member, object, string};
use crate::api::fields::{Field, invalid, missing, wrong_type};
use crate::api::response_store::{self, ResponseStore, new_id};
use crate::error::Failure;

/// What `include` may name. All but the first concern tools and media that are not there.
const INCLUDE: [&str; 8] = [
    LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
];
const LOGPROBS: &str = "message.output_text.logprobs";

/// A request that is translated.
pub struct Translated {
    pub chat: ChatForm,
    /// The whole conversation as items, each with an id.
    pub input: Vec<Arc<Value>>,
    /// The response is to be kept.
    pub store: bool,
    /// The fields of the response object that repeat the request.
    pub repeated: Map<String, Value>,
}

pub fn translate(body: &Value, store: Option<&ResponseStore>) -> Result<Translated, Failure> {
    let rows = Rows::new(RESPONSES, body)?;
    let mut chat = ChatForm::new(rows.others());
    let (input, earlier) = conversation(&rows, store)?;
    put_messages(&mut chat, &rows, &input, earlier)?;
    if let Some(field) = rows.get("max_output_tokens") {
        chat.set("max_completion_tokens", field.value.clone(), &field.name);
    }
    put_tools(&mut chat, &rows)?;
    put_format(&mut chat, &rows)?;
    let reasoning = rows.object("reasoning")?;
    for (name, of_chat) in [("effort", "reasoning_effort"), ("max_tokens", "thinking_token_budget")] {
        if let Some(field) = reasoning.and_then(|reasoning| member(Some("reasoning"), reasoning, name)) {
            chat.set(of_chat, field.value.clone(), &field.name);
        }
    }
    put_logprobs(&mut chat, &rows)?;
    match rows.string("truncation")? {
        None | Some("disabled") => {}
        Some("auto") => chat.set("truncate_prompt_tokens", json!(-1), "truncation"),
        Some(other) => {
            let message = format!("'truncation' is '{other}'. It must be auto or disabled.");
            return Err(Failure::bad_request("truncation", message).code("invalid_value"));
        }
    }
    let store = rows.bool("store")?.unwrap_or(true);
    Ok(Translated { chat, input, store, repeated: repeated(&rows)? })
}

/// All items of the conversation, and how many of them are those of earlier responses.
fn conversation(rows: &Rows<'_>, store: Option<&ResponseStore>) -> Result<(Vec<Arc<Value>>, usize), Failure> {
    let mut items = Vec::new();
    if let Some(id) = rows.string("previous_response_id")? {
        let stored =
            response_store::find(store, id).map_err(|failure| failure.param("previous_response_id").code("previous_response_not_found"))?;
        items.extend(stored.input.iter().cloned());
        items.extend(stored.output().iter().cloned().map(Arc::new));
    }
    let earlier = items.len();
    let input = rows.get("input").ok_or_else(|| missing("input", "'input' is missing. It is a string or a list of items."))?;
    if let Value::String(text) = input.value {
        let content = [json!({"type": "input_text", "text": text})];
        items.push(Arc::new(with_id(json!({"type": "message", "role": "user", "status": "completed", "content": content}))));
        return Ok((items, earlier));
    }
    let given = elements(&input, "a string or a list of items")?;
    if given.is_empty() && earlier == 0 {
        return Err(missing("input", "'input' must hold at least one item."));
    }
    for item in given {
        items.push(Arc::new(with_id(referenced(&item, store)?)));
    }
    Ok((items, earlier))
}

/// An item itself in place of a reference to it.
fn referenced(item: &Field<'_>, store: Option<&ResponseStore>) -> Result<Value, Failure> {
    let fields = item.value.as_object();
    // OpenAI's own clients leave the type out.
    let is_bare = |fields: &Map<String, Value>| fields.len() == 1 && fields.contains_key("id");
    let Some(fields) = fields.filter(|fields| fields.get("type").is_some_and(|kind| kind == "item_reference") || is_bare(fields)) else {
        return Ok(item.value.clone());
    };
    let id = required(item, fields, "id")?;
    store.and_then(|store| store.item(id)).ok_or_else(|| {
        let name = format!("{}.id", item.name);
        let why = match store {
            Some(_) => "no stored response holds an item of that id",
            None => "responses are not stored here (RESPONSES_STORE). Send the item itself",
        };
        Failure::bad_request(&name, format!("'{name}' refers to '{id}', but {why}.")).code("invalid_value")
    })
}

/// An item with an id, which references and lists of items need.
fn with_id(mut item: Value) -> Value {
    if let Value::Object(fields) = &mut item
        && !fields.get("id").is_some_and(Value::is_string)
    {
        let prefix = match fields.get("type").and_then(Value::as_str) {
            Some("function_call") => "fc",
            Some("function_call_output") => "fco",
            Some("reasoning") => "rs",
            _ => "msg",
        };
        fields.insert("id".to_owned(), json!(new_id(prefix)));
        fields.entry("type").or_insert_with(|| json!("message"));
    }
    item
}

/// `messages` of the chat: instructions, then the items, of which the first `earlier` come from stored responses.
fn put_messages(chat: &mut ChatForm, rows: &Rows<'_>, items: &[Arc<Value>], earlier: usize) -> Result<(), Failure> {
    let mut conversation = Conversation::default();
    if let Some(text) = rows.string("instructions")?.filter(|text| !text.is_empty()) {
        conversation.messages.push(json!({"role": "system", "content": text}));
        conversation.origins.push("instructions".to_owned());
    }
    let is_text = rows.get("input").is_some_and(|input| input.value.is_string());
    for (place, item) in items.iter().enumerate() {
        let name = match place.checked_sub(earlier) {
            None => "previous_response_id".to_owned(),
            Some(_) if is_text => "input".to_owned(),
            Some(own) => format!("input[{own}]"),
        };
        conversation.add(&Field { name, value: item })?;
    }
    for (place, origin) in conversation.origins.iter().enumerate() {
        chat.call(format!("messages[{place}]"), origin);
    }
    chat.set("messages", Value::Array(conversation.messages), "input");
    Ok(())
}

/// Flat function tools and the choice of them, as a chat has them.
fn put_tools(chat: &mut ChatForm, rows: &Rows<'_>) -> Result<(), Failure> {
    let mut tools = Vec::new();
    for (place, tool) in rows.list("tools")?.into_iter().enumerate() {
        let fields = object(&tool, "an object with 'type' and 'name'")?;
        let kind = required(&tool, fields, "type")?;
        if kind != "function" {
            return Err(unsupported(
                &tool.name,
                &format!("a tool of type '{kind}'. This server runs no tools: only function tools can be called"),
            ));
        }
        required(&tool, fields, "name")?;
        let function: Map<String, Value> = fields.iter().filter(|(name, _)| *name != "type").map(|(k, v)| (k.clone(), v.clone())).collect();
        tools.push(json!({"type": "function", "function": function}));
        chat.call(format!("tools[{place}].function"), &tool.name);
    }
    if !tools.is_empty() {
        chat.set("tools", Value::Array(tools), "tools");
    }
    if let Some(choice) = rows.get("tool_choice") {
        chat.set("tool_choice", tool_choice(&choice)?, "tool_choice");
        chat.call("tool_choice.function", "tool_choice");
        chat.call("tool_choice.allowed_tools", "tool_choice");
    }
    Ok(())
}

fn tool_choice(choice: &Field<'_>) -> Result<Value, Failure> {
    if choice.value.is_string() {
        return Ok(choice.value.clone());
    }
    let fields = object(choice, "a string, or an object with 'type'")?;
    let function = |item: &Field<'_>, fields: &Map<String, Value>| {
        Ok::<_, Failure>(json!({"type": "function", "function": {"name": required(item, fields, "name")?}}))
    };
    match required(choice, fields, "type")? {
        "function" => function(choice, fields),
        "allowed_tools" => {
            let mut allowed = Vec::new();
            let tools = member(Some(&choice.name), fields, "tools");
            for tool in tools.map_or(Ok(Vec::new()), |tools| elements(&tools, "a list of tools"))? {
                allowed.push(function(&tool, object(&tool, "an object with 'type' and 'name'")?)?);
            }
            let mode = fields.get("mode").cloned().unwrap_or_else(|| json!("auto"));
            Ok(json!({"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": allowed}}))
        }
        other => Err(unsupported(&choice.name, &format!("of type '{other}', and there are no tools of that type here"))),
    }
}

/// `text.format` as `response_format`.
fn put_format(chat: &mut ChatForm, rows: &Rows<'_>) -> Result<(), Failure> {
    let Some(format) = rows.object("text")?.and_then(|text| member(Some("text"), text, "format")) else { return Ok(()) };
    let fields = object(&format, "an object with 'type'")?;
    let kind = required(&format, fields, "type")?;
    let schema: Map<String, Value> = fields.iter().filter(|(name, _)| *name != "type").map(|(k, v)| (k.clone(), v.clone())).collect();
    let value = match kind {
        "json_schema" => json!({"type": kind, "json_schema": schema}),
        other => json!({"type": other}),
    };
    chat.set("response_format", value, &format.name);
    chat.call("response_format.json_schema", &format.name);
    Ok(())
}

fn put_logprobs(chat: &mut ChatForm, rows: &Rows<'_>) -> Result<(), Failure> {
    let mut wanted = false;
    for name in rows.list("include")? {
        let text = string(&name)?;
        if !INCLUDE.contains(&text) {
            return Err(invalid(&name, format!("'{}' is '{text}'. It must be one of {}.", name.name, INCLUDE.join(", "))));
        }
        wanted |= text == LOGPROBS;
    }
    let top = rows.get("top_logprobs");
    if let Some(top) = top.filter(|top| wanted || top.value.as_f64() != Some(0.0)) {
        chat.set("top_logprobs", top.value.clone(), &top.name);
        wanted = true;
    }
    if wanted {
        chat.set("logprobs", json!(true), "include");
    }
    Ok(())
}

/// What the response says of its request.
fn repeated(rows: &Rows<'_>) -> Result<Map<String, Value>, Failure> {
    let given = |name: &str, default: Value| (name.to_owned(), rows.get(name).map_or(default, |field| field.value.clone()));
    let mut text = json!({"format": {"type": "text"}});
    if let (Value::Object(text), Some(given)) = (&mut text, rows.object("text")?) {
        text.extend(given.iter().filter(|(_, value)| !value.is_null()).map(|(name, value)| (name.clone(), value.clone())));
    }
    let mut reasoning = json!({"effort": null, "summary": null});
    if let (Value::Object(reasoning), Some(given)) = (&mut reasoning, rows.object("reasoning")?) {
        reasoning.extend(given.clone());
    }
    let metadata = metadata(rows)?;
    rows.bool("parallel_tool_calls")?;
    Ok(Map::from_iter([
        given("instructions", Value::Null),
        given("max_output_tokens", Value::Null),
        given("max_tool_calls", Value::Null),
        ("metadata".to_owned(), metadata),
        given("parallel_tool_calls", json!(true)),
        given("previous_response_id", Value::Null),
        given("prompt_cache_key", Value::Null),
        ("reasoning".to_owned(), reasoning),
        given("safety_identifier", Value::Null),
        given("tool_choice", json!("auto")),
        given("tools", json!([])),
        given("top_logprobs", json!(0)),
        ("text".to_owned(), text),
        given("truncation", json!("disabled")),
        given("user", Value::Null),
    ]))
}

/// Labels: at most 16 strings.
fn metadata(rows: &Rows<'_>) -> Result<Value, Failure> {
    const MOST: usize = 16;
    const LONGEST_KEY: usize = 64;
    const LONGEST: usize = 512;
    let Some(labels) = rows.object("metadata")? else { return Ok(json!({})) };
    let wrong = |message: String| Err(Failure::bad_request("metadata", message).code("invalid_value"));
    if labels.len() > MOST {
        return wrong(format!("'metadata' holds {} pairs, more than the maximum of {MOST}.", labels.len()));
    }
    for (key, value) in labels {
        let field = Field { name: format!("metadata.{key}"), value };
        let text = value.as_str().ok_or_else(|| wrong_type(&field, "a string"))?;
        if key.chars().count() > LONGEST_KEY || text.chars().count() > LONGEST {
            return wrong(format!(
                "'metadata' may have keys of {LONGEST_KEY} and values of {LONGEST} characters, and '{key}' or its value is longer."
            ));
        }
    }
    Ok(Value::Object(labels.clone()))
}
