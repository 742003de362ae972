//! `/tokenize`, `/detokenize` and `/apply-template`, in vLLM's form and in llama.cpp's: the fields of a body tell which.

use serde_json::{Value, json};

use crate::api::fields::{self, Field, Fields, invalid, missing, wrong_type};
use crate::api::logprobs::token_name;
use crate::api::prompt::chat::{self, Rendered};
use crate::api::prompt::{messages, text};
use crate::api::served::ServedModel;
use crate::error::Failure;
use crate::text::tokenizer::{Special, Tokenizer};

/// The token ids of `messages` or `prompt` as this server would read them (vLLM's form), or of `content` (llama.cpp's).
pub fn tokenize(served: &ServedModel, body: &Value) -> Result<Value, Failure> {
    let fields = Fields::new(body)?;
    served.check_model(&fields)?;
    if let Some(field) = fields.get("messages") {
        let rendered = chat::render(served, &fields, messages::read(&field, served.settings.max_messages)?)?;
        let ids = rendered.encode(served, fields.bool("add_special_tokens")?, |text| Ok(text))?;
        return of_vllm(served, &fields, &ids);
    }
    if let Some(prompt) = fields.string("prompt")? {
        let special = special(&fields, text::special(served))?;
        let ids = text::ids(served, prompt, special, fields.bool("add_special_tokens")?.unwrap_or(true))?;
        return of_vllm(served, &fields, &ids);
    }
    let content = fields.string("content")?;
    let content = content.ok_or_else(|| missing("prompt", "There is nothing to tokenize: give 'prompt', 'messages' or 'content'."))?;
    // llama.cpp reads the names of special tokens as control tokens unless told otherwise, and adds none.
    let ids = text::ids(served, content, special(&fields, Special::Control)?, fields.flag("add_special")?)?;
    let tokenizer = &served.tokenizer;
    let tokens: Vec<Value> = match fields.flag("with_pieces")? {
        true => ids.iter().map(|id| json!({"id": id, "piece": piece(tokenizer, *id)})).collect(),
        false => ids.iter().map(|id| json!(id)).collect(),
    };
    Ok(json!({ "tokens": tokens }))
}

/// How names of special tokens are read: as `parse_special` says.
fn special(fields: &Fields<'_>, default: Special) -> Result<Special, Failure> {
    Ok(fields.bool("parse_special")?.map_or(default, |parse| if parse { Special::Control } else { Special::Text }))
}

fn of_vllm(served: &ServedModel, fields: &Fields<'_>, ids: &[u32]) -> Result<Value, Failure> {
    let names = |ids: &[u32]| ids.iter().map(|id| token_name(&served.tokenizer, *id)).collect::<Vec<_>>();
    let names = fields.flag("return_token_strs")?.then(|| names(ids));
    Ok(json!({"count": ids.len(), "max_model_len": served.limits.max_model_len, "tokens": ids, "token_strs": names}))
}

/// What a token stands for: a text, or its bytes where those are no text.
fn piece(tokenizer: &Tokenizer, id: u32) -> Value {
    let bytes = tokenizer.token_bytes(id).unwrap_or_default();
    std::str::from_utf8(bytes).map_or_else(|_| json!(bytes), |text| json!(text))
}

/// The text of `tokens`, control tokens by their names: `prompt` for vLLM's callers, `content` for llama.cpp's.
pub fn detokenize(served: &ServedModel, body: &Value) -> Result<Value, Failure> {
    let fields = Fields::new(body)?;
    served.check_model(&fields)?;
    let field = fields.get("tokens").ok_or_else(|| missing("tokens", "'tokens' is missing. It is a list of token ids."))?;
    // Of the vocabulary, not of the model: some ids are none that it may write.
    let ids = fields::token_ids(&field, u32::MAX as usize)?;
    let mut bytes = Vec::new();
    for (position, id) in ids.into_iter().enumerate() {
        match served.tokenizer.token_bytes(id) {
            Some(of_token) => bytes.extend_from_slice(of_token),
            None => {
                let entry = Field { name: format!("{}[{position}]", field.name), value: field.value };
                return Err(invalid(&entry, format!("{id} is not a token id of this model - '{}'", entry.name)));
            }
        }
    }
    let text = String::from_utf8_lossy(&bytes);
    let text = if served.tokenizer.begins_with_space()? { text.strip_prefix(' ').unwrap_or(&text) } else { &text };
    Ok(json!({"prompt": text, "content": text}))
}

/// The prompt that the chat template makes of `messages`: llama.cpp's form.
pub fn apply_template(served: &ServedModel, body: &Value) -> Result<Value, Failure> {
    let (_, rendered) = rendered(served, body)?;
    Ok(json!({ "prompt": rendered.text() }))
}

/// The same with its token ids: the part of vLLM's form that tells what the model would be given.
pub fn render(served: &ServedModel, body: &Value) -> Result<Value, Failure> {
    let (fields, rendered) = rendered(served, body)?;
    let ids = rendered.encode(served, fields.bool("add_special_tokens")?, |text| Ok(text))?;
    Ok(json!({"model": served.name(), "prompt": rendered.text(), "token_ids": ids}))
}

fn rendered<'a>(served: &ServedModel, body: &'a Value) -> Result<(Fields<'a>, Rendered), Failure> {
    let fields = Fields::new(body)?;
    served.check_model(&fields)?;
    let field = fields.get("messages");
    let field = field.ok_or_else(|| missing("messages", "'messages' is missing. It is a list of at least one message."))?;
    if !field.value.is_array() && !field.value.is_string() {
        return Err(wrong_type(&field, "a list of messages"));
    }
    let rendered = chat::render(served, &fields, messages::read(&field, served.settings.max_messages)?)?;
    Ok((fields, rendered))
}
