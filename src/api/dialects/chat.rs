//! `/v1/chat/completions`: messages in, `chat.completion` out.

use serde_json::Value;

use crate::api::dialects::objects::{Objects, Surface};
use crate::api::dialects::sse::Sse;
use crate::api::dialects::{Prepared, chat_form};
use crate::api::served::ServedModel;
use crate::error::Failure;

pub fn read(served: &ServedModel, id: &str, body: &Value) -> Result<Prepared, Failure> {
    let request = chat_form::request(served, body)?;
    let objects = Objects::new(served, id, Surface::chat(served), &request);
    Ok(Prepared { dialect: Box::new(Sse::new(objects, &request.options)), request })
}
