//! Dialects: each reads its request into the one neutral form, and writes typed deltas as its own objects.
//!
//! | Dialect | Requests | Answers |
//! |---|---|---|
//! | `chat` | `/v1/chat/completions` | `chat.completion`, server-sent events |
//! | `fastchat` | `/api/v1/chat/completions` | the same as `chat`, with FastChat's defaults |
//! | `completions` | `/v1/completions` | `text_completion`, server-sent events |
//! | `infill` | llama.cpp's `/infill` | its object, its chunks |
//! | `responses` | `/v1/responses` | `response`, named events |
//! | `anthropic` | `/v1/messages` | `message`, named events |
//! | `native` | a job's own input | either object, chunk objects |
//! | `tokens` | the same, with `NATIVE_OUTPUT_FORMAT=tokens` | the older form of `{"choices":[{"tokens"}],"usage"}` |
//!
//! What several of them share stands beside them: `objects` (OpenAI's objects), `sse` (frames), `job_request` (a job's own
//! input), `chat_form` (requests that are translated into chats).

use serde_json::Value;

use crate::api::delta::{ChoiceUpdate, Delta, Usage};
use crate::api::request::GenerationRequest;
use crate::error::Failure;

pub mod anthropic;
pub mod chat;
mod chat_form;
pub mod completions;
pub mod fastchat;
pub mod infill;
mod job_request;
pub mod native;
mod objects;
pub mod responses;
mod sse;
#[cfg(test)]
mod tests;
pub mod tokens;

/// Writes one answer. Either [`Dialect::whole`] is called, once; or a stream's `open`, `delta` as often as something is ready, and `end`,
/// each of which adds to the item that [`Dialect::take`] takes away.
pub trait Dialect: Send {
    /// The answer as one object.
    fn whole(&mut self, choices: Vec<ChoiceUpdate>, usage: Usage) -> Value;

    /// A stream begins: its first deltas are ready.
    fn open(&mut self, usage: Usage);

    /// Everything that is ready. `usage` counts it already.
    fn delta(&mut self, deltas: Vec<Delta>, usage: Usage);

    /// All choices have ended.
    fn end(&mut self, usage: Usage);

    /// One item of the stream: all that was added since the last one; `None` when that shows nothing yet.
    fn take(&mut self) -> Option<Value>;

    /// The last item of a stream that fails midway.
    fn error(&self, failure: &Failure) -> Value;
}

/// A request that is ready to run, and the dialect that its answer is written in.
pub struct Prepared {
    pub request: GenerationRequest,
    pub dialect: Box<dyn Dialect>,
}
