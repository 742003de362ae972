//! A job's own input: `messages`, `prompt` and their kin, or an OpenAI call wrapped as `openai_route` or `route`.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::api::answer::Dialect;
use crate::api::fields::{Field, Fields, kind, missing, wrong_type};
use crate::api::logprobs::Form;
use crate::api::openai::{self, Prepared, chat, completions};
use crate::api::{Answer, Call, Service};
use crate::error::Failure;

/// Answers the `input` of a job.
pub async fn job(service: &Arc<Service>, input: Value, job_id: &str) -> Result<Answer, Failure> {
    let mut input = unwrapped(object(input)?)?;
    if let Some(call) = wrapped_call(&mut input, job_id)? {
        drop(input);
        return openai::call(service, call).await;
    }
    let dialect = Dialect::native(service.settings.native_format);
    let body = Value::Object(input);
    let prepared = service
        .prepare(move |service| {
            let prepared = prepare(service, &body)?;
            if let (Dialect::Tokens, Some(field)) = (dialect, prepared.options.logprobs.field(&Fields::new(&body)?)) {
                let message = format!("'{}' has no place in answers of the form NATIVE_OUTPUT_FORMAT=tokens. Remove it.", field.name);
                return Err(Failure::bad_request(field.name, message).code("unsupported_parameter"));
            }
            Ok(prepared)
        })
        .await?;
    prepared.answer(service, job_id, dialect).await
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
const PROMPTS: [&str; 5] = ["prompt", "text", "input", "input_ids", "prompt_token_ids"];

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
fn wrapped_call(input: &mut Map<String, Value>, job_id: &str) -> Result<Option<Call>, Failure> {
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
    let empty = body.is_empty() && openai::allow(&path) != Some("POST");
    let method = method.unwrap_or_else(|| if empty { "GET" } else { "POST" }.to_owned()).to_uppercase();
    if let (Some(stream), false, true) = (input.get("stream"), body.contains_key("stream"), method == "POST") {
        // The FastDeploy worker reads `stream` beside the body only.
        body.insert("stream".to_owned(), stream.clone());
    }
    let body = if method == "GET" { Value::Null } else { Value::Object(body) };
    Ok(Some(Call { method, path, body, request_id: job_id.to_owned() }))
}

/// The native forms. `messages` wins over `prompt`.
fn prepare(service: &Service, body: &Value) -> Result<Prepared, Failure> {
    let fields = Fields::new(body)?;
    let prompt = PROMPTS.into_iter().find_map(|name| fields.get(name));
    let field = match (fields.get("messages"), prompt) {
        (Some(_), _) => return chat::prepare(service, body, true),
        (None, Some(field)) => field,
        (None, None) => {
            return Err(missing(
                "input",
                "The job's 'input' needs one of 'messages', 'prompt', 'text', 'input_ids', 'openai_route' or 'route'.",
            ));
        }
    };
    if field.name.ends_with("_ids") && (field.value.is_string() || field.value[0].is_string()) {
        return Err(wrong_type(&field, "a list of token ids"));
    }
    service.check_model(&fields)?;
    let mut options = service.options(&fields, Form::NativeText)?;
    options.max_tokens = options.max_tokens.or(service.settings.default_max_tokens);
    let prompts = completions::read(&field, service.engine.limits().vocab_size)?;
    let with_template = fields.bool("apply_chat_template")?.unwrap_or(false);
    completions::finish(service, prompts, options, |text, options| match with_template {
        true => chat::encode(service, &fields, vec![json!({"role": "user", "content": text})], options),
        false => completions::encode(service, text, options),
    })
}
