//! `/v1/chat/completions`: messages in, `chat.completion` out.

use serde_json::Value;

use crate::api::dialects::Prepared;
use crate::api::dialects::objects::{Objects, Surface};
use crate::api::dialects::sse::Sse;
use crate::api::fields::Fields;
use crate::api::logprobs::LogprobsForm;
use crate::api::prompt::chat;
use crate::api::served::ServedModel;
use crate::error::Failure;

pub fn read(served: &ServedModel, id: &str, body: &Value) -> Result<Prepared, Failure> {
    let fields = Fields::new(body)?;
    served.check_model(&fields)?;
    let options = served.options(&fields, LogprobsForm::Chat)?;
    let request = chat::request(served, &fields, options)?;
    let objects = Objects::new(served, id, Surface::chat(served), &request);
    Ok(Prepared { dialect: Box::new(Sse::new(objects, &request.options)), request })
}
