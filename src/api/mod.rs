//! Translation: foreign JSON ⇄ our requests. Pure: no sockets, and no files after the start.
//!
//! [`Service`] is what both doors drive, the job queue ([`Service::job`]) and HTTP ([`Service::call`]).

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::Stream;
use serde_json::Value;

use crate::config::ApiSettings;
use crate::engine::Handle;
use crate::error::{Failure, Kind};
use crate::models::tokenizer::{Special, Tokenizer};

mod answer;
pub mod chat_template;
mod clock;
mod contents;
pub mod failure;
pub mod fields;
mod generate;
mod logprobs;
mod messages;
pub mod model;
mod native;
pub mod openai;
mod options;
mod prompt;
pub mod tally;
#[cfg(test)]
mod tests;

use chat_template::ChatTemplate;
use contents::Contents;
use fields::Fields;
use logprobs::Form;
pub use model::ModelInfo;
use openai::Prepared;
use options::{Context, Defaults, Options, Truncate};
use prompt::Guard;

/// What a request gives back.
pub enum Answer {
    /// One object.
    Whole(Value),
    /// Pieces as they come. **Pulled, never pushed**: each pull gives everything that is ready as one piece, so whoever pulls
    /// slowly gets fewer and larger ones, and nobody slows the engine. Dropping the stream cancels the generation.
    ///
    /// For HTTP and for `openai_route` jobs a piece is a string of whole server-sent-event frames, the last of which is
    /// `data: [DONE]`. For native jobs it is one chunk object.
    ///
    /// A failure ends the stream. If it is the **first item**, nothing has been written: its status can still be told. If it comes later,
    /// the item before it tells it to who reads the pieces alone: a frame with `data: [DONE]`, or for native jobs a chunk that is the error
    /// envelope.
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
    pub model: ModelInfo,
    /// Served names; at least one.
    names: Vec<String>,
    defaults: Defaults,
    eos_token_ids: Arc<Vec<u32>>,
    bos_token_id: Option<u32>,
    guard: Guard,
    /// The template with the form of contents that it takes, or why there is none.
    chat_template: Result<(ChatTemplate, Contents), String>,
    seeds: AtomicU64,
}

impl Service {
    /// Fails on settings that do not hold (`CHAT_TEMPLATE`, whose file is read here, and `OVERRIDE_GENERATION_CONFIG`); a model's own
    /// template that does not compile fails chat requests only.
    pub fn new(settings: ApiSettings, engine: Handle, tokenizer: Arc<Tokenizer>, mut model: ModelInfo) -> Result<Self, Failure> {
        let defaults = Defaults::new(&model.generation_config, &settings)?;
        let chat_template = match (&settings.chat_template, &model.chat_template) {
            (Some(setting), _) => Ok(ChatTemplate::compile(&chat_template::of_setting(setting)?)
                .map_err(|error| Failure::internal(format!("CHAT_TEMPLATE is not a valid template: {error}")))?),
            (None, Some((text, origin))) => ChatTemplate::compile(text)
                .map_err(|error| format!("The model's chat template ({origin}) is not valid: {error}. Set CHAT_TEMPLATE to one that is.")),
            (None, None) => Err("The model has no chat template. Set CHAT_TEMPLATE, or use /v1/completions.".to_owned()),
        };
        let mut names = settings.served_names.clone();
        if names.is_empty() {
            names.push(model.public_name().to_owned());
        }
        if let (None, Some(bos)) = (model.special_tokens.get("bos_token"), model.config.get("bos_token")) {
            model.special_tokens.insert("bos_token".to_owned(), bos.clone());
        }
        let chat_template = chat_template.map(|template| {
            let contents = Contents::of(&template, &model.special_tokens, settings.content_format);
            (template, contents)
        });
        let bos_token_id = model.special_tokens.get("bos_token").and_then(Value::as_str).and_then(|token| tokenizer.token_id(token));
        Ok(Self {
            names,
            defaults,
            eos_token_ids: Arc::new(eos_token_ids(&model, &tokenizer)),
            bos_token_id,
            guard: Guard::new(&tokenizer)?,
            chat_template,
            seeds: AtomicU64::new(0),
            settings,
            engine,
            tokenizer,
            model,
        })
    }

    /// The direct door: what an OpenAI client sent.
    pub async fn call(self: &Arc<Self>, call: Call) -> Result<Answer, Failure> {
        openai::call(self, call).await
    }

    /// The queue's door: the `input` of a RunPod job (`messages`, `prompt`, `openai_route`, `route` …).
    pub async fn job(self: &Arc<Self>, input: Value, job_id: &str) -> Result<Answer, Failure> {
        native::job(self, input, job_id).await
    }

    /// The names clients may use; the first is the one answers carry.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    pub fn name(&self) -> &str {
        self.names.first().map_or(self.model.public_name(), String::as_str)
    }

    /// The template with the form of contents that it takes, or a 400 that says what to set.
    pub(crate) fn chat_template(&self) -> Result<&(ChatTemplate, Contents), Failure> {
        self.chat_template.as_ref().map_err(|reason| Failure::bad_request("messages", reason.clone()).code("unsupported_value"))
    }

    /// Whether the request's `model` is one of ours.
    pub(crate) fn check_model(&self, fields: &Fields<'_>) -> Result<(), Failure> {
        match fields.string("model")? {
            None | Some("" | "null" | "default") => Ok(()),
            Some(name) => self.check_model_name(name),
        }
    }

    pub(crate) fn check_model_name(&self, name: &str) -> Result<(), Failure> {
        let known = self.names.iter().any(|served| served == name) || name == self.model.name || name == self.model.last_segment();
        if known || self.settings.any_model_name {
            return Ok(());
        }
        let message = format!("The model `{name}` does not exist. This server serves: {}.", self.names.join(", "));
        Err(Failure::new(Kind::NotFound, message).param("model").code("model_not_found"))
    }

    pub(crate) fn options(&self, fields: &Fields<'_>, form: Form) -> Result<Options, Failure> {
        let context = Context {
            settings: &self.settings,
            defaults: &self.defaults,
            limits: self.engine.limits(),
            eos_token_ids: &self.eos_token_ids,
            encode: &|text| self.tokenizer.encode(text, Special::Text),
        };
        Options::read(fields, form, &context)
    }

    /// A seed for one sequence of a request without one: random, or the next in the sequence that `SEED` fixes.
    pub(crate) fn pick_seed(&self) -> u64 {
        match self.settings.seed {
            None => uuid::Uuid::new_v4().as_u64_pair().0,
            Some(base) => splitmix(base.wrapping_add(self.seeds.fetch_add(1, Ordering::Relaxed))),
        }
    }

    /// Cuts a prompt if the request asks for it, and checks that it leaves room for an answer.
    pub(crate) fn fit(&self, mut ids: Vec<u32>, options: &Options, noun: &str) -> Result<Arc<Vec<u32>>, Failure> {
        let context = self.engine.limits().max_model_len;
        let keep = match options.truncate {
            None => ids.len(),
            // A limit that is no limit keeps no place free.
            Some(Truncate::ToContext) => {
                context.saturating_sub(options.max_tokens.filter(|most| *most < context).unwrap_or(1).max(1)).max(1)
            }
            Some(Truncate::Last(keep)) => keep,
        };
        ids.drain(..ids.len().saturating_sub(keep));
        if ids.is_empty() {
            return Err(fields::missing(noun, format!("The {noun} came to no tokens at all. There must be at least one.")));
        }
        if ids.len() >= context {
            let hint = self.engine.limits().memory_hint();
            let message = format!(
                "This model's maximum context length is {context} tokens. However, your {noun} resulted in {} tokens. Please reduce the \
                 length of the {noun} (context_length_exceeded: prompt is too long).{hint}",
                ids.len()
            );
            return Err(Failure::bad_request(noun, message).code("context_length_exceeded"));
        }
        Ok(Arc::new(ids))
    }

    /// Runs a request's checks, template and tokenization on a thread of their own: long prompts must not hold up the sockets.
    pub(crate) async fn prepare(
        self: &Arc<Self>,
        work: impl FnOnce(&Service) -> Result<Prepared, Failure> + Send + 'static,
    ) -> Result<Prepared, Failure> {
        let service = self.clone();
        let task = tokio::task::spawn_blocking(move || work(&service));
        task.await.unwrap_or_else(|error| {
            tracing::error!("a request could not be read: {error}");
            Err(Failure::internal("The request could not be read."))
        })
    }
}

/// The ids that end a sequence: those of the configuration, and ERNIE's end of an assistant turn.
fn eos_token_ids(model: &ModelInfo, tokenizer: &Tokenizer) -> Vec<u32> {
    let mut ids = model.eos_token_ids();
    if model.is_ernie() {
        ids.extend(tokenizer.token_id("<|end_of_sentence|>"));
    }
    if ids.is_empty() {
        let named = model.special_tokens.get("eos_token").and_then(Value::as_str);
        ids.extend(named.and_then(|token| tokenizer.token_id(token)));
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Spreads consecutive numbers over all of 64 bits (SplitMix64's finalizer).
fn splitmix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
