//! FastChat's `/api/v1/token_check`: whether prompts and their answers fit the context.

use serde_json::{Value, json};

use crate::api::fields::{Field, Fields, missing, wrong_type};
use crate::api::prompt::text;
use crate::api::served::ServedModel;
use crate::error::Failure;

/// Most prompts in one call.
const MOST: usize = 1024;

/// `{"prompts": [{"model", "prompt", "max_tokens"}]}` → `{"prompts": [{"fits", "tokenCount", "contextLength"}]}`. One mistake fails the call.
/// `model` tells which a prompt asks for.
pub fn token_check<'a>(model: impl Fn(&Value) -> &'a ServedModel, body: &Value) -> Result<Value, Failure> {
    let fields = Fields::new(body)?;
    let words = "a list of objects with 'model', 'prompt' and 'max_tokens'";
    let field = fields.get("prompts").ok_or_else(|| missing("prompts", format!("'prompts' is missing. It is {words}.")))?;
    let prompts = field.value.as_array().ok_or_else(|| wrong_type(&field, words))?;
    if prompts.len() > MOST {
        let message = format!("'prompts' holds {} prompts, more than the maximum of {MOST}.", prompts.len());
        return Err(Failure::bad_request("prompts", message).code("invalid_value"));
    }
    let checked = prompts.iter().enumerate().map(|(position, value)| {
        let entry = Field { name: format!("{}[{position}]", field.name), value };
        if !value.is_object() {
            return Err(wrong_type(&entry, "an object with 'model', 'prompt' and 'max_tokens'"));
        }
        check(model(value), value).map_err(|failure| within(failure, &entry.name))
    });
    Ok(json!({ "prompts": checked.collect::<Result<Vec<_>, _>>()? }))
}

fn check(served: &ServedModel, prompt: &Value) -> Result<Value, Failure> {
    let fields = Fields::new(prompt)?;
    served.check_model(&fields)?;
    let required = |name: &str| missing(name, format!("'{name}' is missing."));
    let text = fields.string("prompt")?.ok_or_else(|| required("prompt"))?;
    let wanted = fields.count_from("max_tokens", 0)?.ok_or_else(|| required("max_tokens"))?;
    let tokens = text::ids(served, text, text::special(served), true)?.len();
    let context = served.limits.max_model_len;
    Ok(json!({"fits": tokens.saturating_add(wanted) <= context, "tokenCount": tokens, "contextLength": context}))
}

/// The failure of a part, named from the whole.
fn within(failure: Failure, part: &str) -> Failure {
    let param = failure.param.as_deref().map(|param| format!("{part}.{param}"));
    Failure { param, ..failure }
}
