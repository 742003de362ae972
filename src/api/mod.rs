//! Translation: foreign JSON ⇄ our requests. Pure: no sockets, no files.
//!
//! [`Service`] is what both doors drive, the job queue ([`Service::job`]) and HTTP ([`Service::call`]).

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use serde_json::Value;

use crate::config::ApiSettings;
use crate::engine::Handle;
use crate::error::Failure;
use crate::models::tokenizer::Tokenizer;

pub mod chat_template;
mod clock;
pub mod failure;
pub mod fields;
mod messages;
pub mod model;
mod options;

/// What a request gives back.
pub enum Answer {
    /// One object.
    Whole(Value),
    /// Pieces as they come. **Pulled, never pushed**: each pull gives everything that is ready as one piece, so whoever pulls
    /// slowly gets fewer and larger ones, and nobody slows the engine. Dropping the stream cancels the generation.
    ///
    /// For HTTP and for `openai_route` jobs a piece is a string of whole server-sent-event frames, the last of which is
    /// `data: [DONE]`. For native jobs it is one chunk object. A failure after the first piece ends the stream; for SSE it has been
    /// written into the stream as a frame already.
    Stream(Pieces),
}

pub type Pieces = Pin<Box<dyn Stream<Item = Result<Value, Failure>> + Send>>;

/// One HTTP-like call to the OpenAI surface.
pub struct Call {
    /// Upper case.
    pub method: String,
    /// Path without query, as the client wrote it (`/v1/chat/completions`, `/openai/v1/models`).
    pub path: String,
    /// The parsed body, `Null` when there was none.
    pub body: Value,
    /// Goes into response ids and logs.
    pub request_id: String,
}

/// Everything needed to answer: one per loaded model, shared by all doors.
pub struct Service {
    pub settings: ApiSettings,
    pub engine: Handle,
    pub tokenizer: Arc<Tokenizer>,
}

impl Service {
    /// The direct door: what an OpenAI client sent.
    pub async fn call(self: &Arc<Self>, call: Call) -> Result<Answer, Failure> {
        let _ = call;
        Err(Failure::internal("not built yet"))
    }

    /// The queue's door: the `input` of a RunPod job (`messages`, `prompt`, `openai_route`, `route` …).
    pub async fn job(self: &Arc<Self>, input: Value, job_id: &str) -> Result<Answer, Failure> {
        let _ = (input, job_id);
        Err(Failure::internal("not built yet"))
    }
}
