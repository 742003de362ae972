//! Anthropic's `/v1/messages` and `/v1/messages/count_tokens`: blocks in, a `message` of blocks out; in a stream, named events.
//!
//! A request is translated into a chat request (`read`, `messages`), and the deltas of its answer into blocks (`write`).

use serde_json::{Value, json};

use crate::api::dialects::Prepared;
use crate::api::served::ServedModel;
use crate::error::Failure;

mod messages;
mod read;
#[cfg(test)]
mod tests;
mod write;

pub fn read(served: &ServedModel, id: &str, body: &Value) -> Result<Prepared, Failure> {
    let request = read::translate(body, true)?.request(served)?;
    Ok(Prepared { request, dialect: Box::new(write::Writer::new(served, id)) })
}

/// How many tokens the prompt of a request comes to.
pub fn count(served: &ServedModel, body: &Value) -> Result<Value, Failure> {
    let request = read::translate(body, false)?.request(served)?;
    let tokens: usize = request.prompts.iter().map(|prompt| prompt.ids.len()).sum();
    Ok(json!({ "input_tokens": tokens }))
}
