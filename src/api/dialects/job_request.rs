//! A job's own input: `messages`, or `prompt` under one of its names. `messages` wins.

use serde_json::{Value, json};

use crate::api::dialects::objects::Surface;
use crate::api::fields::{Fields, missing, wrong_type};
use crate::api::job::PROMPTS;
use crate::api::logprobs::LogprobsForm;
use crate::api::prompt::{chat, infill, text};
use crate::api::request::GenerationRequest;
use crate::api::served::ServedModel;
use crate::error::Failure;

/// The request, and which of OpenAI's objects answers it.
pub fn read(served: &ServedModel, body: &Value) -> Result<(GenerationRequest, Surface), Failure> {
    let fields = Fields::new(body)?;
    let prompt = PROMPTS.into_iter().find_map(|name| fields.get(name));
    let field = match (fields.get("messages"), prompt) {
        (Some(_), _) => {
            served.check_model(&fields)?;
            let options = served.options(&fields, LogprobsForm::NativeChat)?;
            return Ok((chat::request(served, &fields, options)?, Surface::chat(served)));
        }
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
    served.check_model(&fields)?;
    let options = served.options(&fields, LogprobsForm::NativeText)?;
    let prompts = text::read(&field, served.limits.vocab_size)?;
    let with_template = fields.flag("apply_chat_template")?;
    let request = match infill::suffix(&fields) {
        Some((field, _)) if with_template => {
            let message = format!("'{}' has no place in a chat: leave out 'apply_chat_template'.", field.name);
            return Err(Failure::bad_request(field.name, message).code("unsupported_value"));
        }
        Some((_, suffix)) => infill::request(served, prompts, suffix, options)?,
        None => text::request(served, prompts, options, |given, fit| {
            text::prompt(given, fit, |text| match with_template {
                true => chat::encode(served, &fields, vec![json!({"role": "user", "content": text})], fit.options),
                false => text::encode(served, text, fit.options),
            })
        })?,
    };
    Ok((request, Surface::Text))
}
