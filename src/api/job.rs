//! The `input` of a job: the platform's wrappings off, and what is inside told apart.

use serde_json::{Map, Value};

use crate::api::batch::{self, Given};
use crate::api::fields::{Field, kind, missing, wrong_type};
use crate::api::routes;
use crate::error::Failure;

/// What a job asks for.
pub enum JobInput {
    /// An OpenAI call wrapped as `openai_route` or `route`.
    Call { method: String, path: String, body: Value },
    /// Lines of a batch with their numbers, from `batch` or `input_file_content`. With `stream` each answer comes when it is ready.
    Batch { lines: Vec<(usize, Given)>, stream: bool },
    /// `messages`, `prompt` and their kin.
    Own(Value),
}

pub fn read(input: Value) -> Result<JobInput, Failure> {
    let mut input = unwrapped(object(input)?)?;
    if let Some(call) = wrapped_call(&mut input)? {
        return Ok(call);
    }
    let lines = batch(&mut input)?;
    let stream = input.get("stream") == Some(&Value::Bool(true));
    Ok(match lines {
        Some(lines) => JobInput::Batch { lines, stream },
        None => JobInput::Own(Value::Object(input)),
    })
}

/// Most lines in one job.
const MOST_LINES: usize = 1000;

/// `batch`, a list of lines, or `input_file_content`, the text of a file of them; not beside a prompt, which wins.
fn batch(input: &mut Map<String, Value>) -> Result<Option<Vec<(usize, Given)>>, Failure> {
    let is_given = |name: &str| input.get(name).is_some_and(|value| !value.is_null());
    if is_given("messages") || PROMPTS.into_iter().any(is_given) {
        return Ok(None);
    }
    let mut take = |name: &str| input.get_mut(name).map(Value::take).filter(|value| !value.is_null());
    let too_many = |name: &str, lines: usize| {
        let message = format!("'{name}' holds {lines} lines, more than the maximum of {MOST_LINES} in one job. Send several jobs.");
        Err(Failure::bad_request(name, message).code("invalid_value"))
    };
    let wrong = |name: &str, value: &Value, words: &str| Err(wrong_type(&Field { name: name.to_owned(), value }, words));
    match (take("batch"), take("input_file_content")) {
        (Some(Value::Array(lines)), _) if lines.len() > MOST_LINES => too_many("batch", lines.len()),
        (Some(Value::Array(lines)), _) => {
            Ok(Some(lines.into_iter().enumerate().map(|(place, line)| (place + 1, Given::Value(line))).collect()))
        }
        (Some(value), _) => wrong("batch", &value, "a list of lines"),
        (None, Some(Value::String(text))) => match batch::lines(&text).count() {
            many if many > MOST_LINES => too_many("input_file_content", many),
            _ => Ok(Some(batch::lines(&text).map(|(number, line)| (number, Given::Text(line.to_owned()))).collect())),
        },
        (None, Some(value)) => wrong("input_file_content", &value, "the text of a file of lines"),
        (None, None) => Ok(None),
    }
}

fn object(input: Value) -> Result<Map<String, Value>, Failure> {
    match input {
        Value::Null => Err(missing("input", "The job has no 'input'. It is an object with 'messages', 'prompt' or 'openai_route'.")),
        Value::Object(object) if object.is_empty() => {
            Err(missing("input", "The job's 'input' is empty. It needs 'messages', 'prompt' or 'openai_route'."))
        }
        Value::Object(object) => Ok(object),
        other => Err(Failure::bad_request("input", format!("The job's 'input' must be an object, but it is {}.", kind(&other)))),
    }
}

/// Where a job's prompt stands when it has no `messages`.
pub const PROMPTS: [&str; 5] = ["prompt", "text", "input", "input_ids", "prompt_token_ids"];

/// Some clients wrap the input once more, and the Hub's test harness posts a whole test: `{"input": {"name", "input": {…}, "timeout"}}`.
/// An object under `input` is the input, unless something beside it says what to do. Other fields beside it keep their meaning, and those
/// inside win over them.
fn unwrapped(mut input: Map<String, Value>) -> Result<Map<String, Value>, Failure> {
    let is_given = |name: &str| input.get(name).is_some_and(|value| !value.is_null());
    let mut beside = ["messages", "openai_route", "route"].into_iter().chain(PROMPTS).filter(|name| *name != "input");
    if !input.get("input").is_some_and(Value::is_object) || beside.any(is_given) {
        return Ok(input);
    }
    let inner = object(input.shift_remove("input").unwrap_or_default())?;
    input.extend(inner);
    Ok(input)
}

/// `{openai_route, openai_input}` or `{route, body, method}` as the call it stands for.
fn wrapped_call(input: &mut Map<String, Value>) -> Result<Option<JobInput>, Failure> {
    let text = |name: &str| match input.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone()).filter(|text| !text.is_empty())),
        Some(value) => Err(wrong_type(&Field { name: name.to_owned(), value }, "a string")),
    };
    let (path, body_name, method) = match (text("openai_route")?, text("route")?) {
        (Some(path), _) => (path, "openai_input", None),
        (None, Some(path)) => (path, "body", text("method")?),
        (None, None) => return Ok(None),
    };
    let mut body = match input.get_mut(body_name).map(Value::take) {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(body)) => body,
        Some(value) => return Err(wrong_type(&Field { name: body_name.to_owned(), value: &value }, "an object")),
    };
    // NOTE: the queue carries no method. An empty body means GET, except where only POST makes sense: there it is an empty request.
    let empty = body.is_empty() && routes::allow(&path) != Some("POST");
    let method = method.unwrap_or_else(|| if empty { "GET" } else { "POST" }.to_owned()).to_uppercase();
    if let (Some(stream), false, true) = (input.get("stream"), body.contains_key("stream"), method == "POST") {
        // The FastDeploy worker reads `stream` beside the body only.
        body.insert("stream".to_owned(), stream.clone());
    }
    let body = if method == "GET" { Value::Null } else { Value::Object(body) };
    Ok(Some(JobInput::Call { method, path, body }))
}
