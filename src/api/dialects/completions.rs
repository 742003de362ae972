//! `/v1/completions`: prompts in, `text_completion` out.

use serde_json::Value;

use crate::api::dialects::Prepared;
use crate::api::dialects::objects::{Objects, Surface};
use crate::api::dialects::sse::Sse;
use crate::api::fields::{Fields, missing};
use crate::api::logprobs::LogprobsForm;
use crate::api::prompt::{infill, text};
use crate::api::served::ServedModel;
use crate::error::Failure;

pub fn read(served: &ServedModel, id: &str, body: &Value) -> Result<Prepared, Failure> {
    let fields = Fields::new(body)?;
    served.check_model(&fields)?;
    let options = served.options(&fields, LogprobsForm::Text)?;
    let field = fields.get("prompt").or_else(|| fields.get("prompt_token_ids"));
    let field = field.ok_or_else(|| missing("prompt", "'prompt' is missing. It is a string, a list of strings, or token ids."))?;
    let prompts = text::read(&field, served.limits.vocab_size)?;
    let request = match infill::suffix(&fields) {
        Some((_, suffix)) => infill::request(served, prompts, suffix, options)?,
        None => {
            text::request(served, prompts, options, |given, fit| text::prompt(given, fit, |text| text::encode(served, text, fit.options)))?
        }
    };
    let objects = Objects::new(served, id, Surface::Text, &request);
    Ok(Prepared { dialect: Box::new(Sse::new(objects, &request.options)), request })
}
