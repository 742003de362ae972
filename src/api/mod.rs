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
use crate::text::tokenizer::{Special, Tokenizer};

mod answer;
pub mod body;
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
pub mod reclaim;
pub mod tally;
#[cfg(test)]
mod tests;

use body::BodyLimits;
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
    /// Ids from here on have no row in the model's embedding.
    embedding_rows: usize,
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
        let embedding_rows =
            model.config.get("vocab_size").and_then(Value::as_u64).map_or(engine.limits().vocab_size, |rows| rows as usize);
        warn_of_tokens_beyond(&tokenizer, embedding_rows);
        Ok(Self {
            names,
            defaults,
            eos_token_ids: Arc::new(eos_token_ids(&model, &tokenizer)?),
            bos_token_id,
            embedding_rows,
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

    /// How large requests may be.
    pub fn body_limits(&self) -> BodyLimits {
        BodyLimits::of_model(self.engine.limits(), self.tokenizer.longest_token())
    }

    /// The part of a prompt's text that is to be tokenized. A text that cannot fit the context, however it is cut, is refused: that is told
    /// from its bytes, since to tokenize tens of megabytes takes seconds. Of one that is to be cut to its last tokens the end is enough.
    pub(crate) fn fit_text<'a>(&self, text: &'a str, options: &Options, noun: &str) -> Result<&'a str, Failure> {
        let context = self.engine.limits().max_model_len;
        if text.len() < context {
            return Ok(text);
        }
        let Some(keep) = self.keep(options) else {
            let least = self.tokenizer.least_tokens(text);
            return if least < context { Ok(text) } else { Err(self.too_long(noun, &format!("at least {least} tokens"))) };
        };
        let bytes = keep.saturating_mul(self.tokenizer.longest_token().unwrap_or(UNKNOWN_TOKEN)).max(CUT_WHOLE);
        Ok(end_of(text, bytes))
    }

    /// Tokens of a prompt that the request wants kept, when it wants it cut.
    fn keep(&self, options: &Options) -> Option<usize> {
        let context = self.engine.limits().max_model_len;
        match options.truncate? {
            // A limit that is no limit keeps no place free.
            Truncate::ToContext => {
                Some(context.saturating_sub(options.max_tokens.filter(|most| *most < context).unwrap_or(1).max(1)).max(1))
            }
            Truncate::Last(keep) => Some(keep),
        }
    }

    /// `length`: what the prompt came to, in words.
    fn too_long(&self, noun: &str, length: &str) -> Failure {
        let limits = self.engine.limits();
        let (context, hint) = (limits.max_model_len, limits.memory_hint());
        let message = format!(
            "This model's maximum context length is {context} tokens. However, your {noun} resulted in {length}. Please reduce the \
             length of the {noun} (context_length_exceeded: prompt is too long).{hint}"
        );
        Failure::bad_request(noun, message).code("context_length_exceeded")
    }

    /// Cuts a prompt if the request asks for it, and checks that it leaves room for an answer.
    pub(crate) fn fit(&self, mut ids: Vec<u32>, options: &Options, noun: &str) -> Result<Arc<Vec<u32>>, Failure> {
        let context = self.engine.limits().max_model_len;
        if let Some(keep) = self.keep(options) {
            ids.drain(..ids.len().saturating_sub(keep));
        }
        if ids.is_empty() {
            return Err(fields::missing(noun, format!("The {noun} came to no tokens at all. There must be at least one.")));
        }
        // The device would fail on such an id, and with it every request of the step.
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.embedding_rows) {
            let name = String::from_utf8_lossy(self.tokenizer.token_bytes(*id).unwrap_or_default()).into_owned();
            let message = format!(
                "The {noun} came to the token {name:?} (id {id}), which the model cannot read: its embedding has {} rows. Leave that token out.",
                self.embedding_rows
            );
            return Err(Failure::bad_request(noun, message).code("invalid_value"));
        }
        if ids.len() >= context {
            return Err(self.too_long(noun, &format!("{} tokens", ids.len())));
        }
        Ok(Arc::new(ids))
    }

    /// Runs a request's checks, template and tokenization on a thread of their own: long prompts must not hold up the sockets.
    pub(crate) async fn prepare(
        self: &Arc<Self>,
        work: impl FnOnce(&Service) -> Result<Prepared, Failure> + Send + 'static,
    ) -> Result<Prepared, Failure> {
        let service = self.clone();
        let task = tokio::task::spawn_blocking(move || {
            let prepared = work(&service);
            reclaim::freed();
            prepared
        });
        task.await.unwrap_or_else(|error| {
            tracing::error!("a request could not be read: {error}");
            Err(Failure::internal("The request could not be read."))
        })
    }
}

/// A text up to this length is tokenized whole before it is cut to its last tokens.
const CUT_WHOLE: usize = 1 << 20;
/// Bytes of a token, where the tokenizer promises no bound.
const UNKNOWN_TOKEN: usize = 256;

/// The last `bytes` of a text and a little more or less: from a place between words, where there is one near, so that the words after it are
/// cut into tokens as in the whole text.
fn end_of(text: &str, bytes: usize) -> &str {
    const NEAR: usize = 1024;
    let Some(from) = text.len().checked_sub(bytes + NEAR) else { return text };
    let from = (from..text.len()).find(|&at| text.is_char_boundary(at)).unwrap_or(text.len());
    let tail = &text[from..];
    let near = tail.char_indices().take_while(|(at, _)| *at < NEAR).find(|(_, character)| character.is_whitespace());
    &tail[near.map_or(0, |(at, _)| at)..]
}

/// The ids that end a sequence: those of the configuration files, the tokenizer's own end of sequence, and ERNIE's end of an assistant turn.
fn eos_token_ids(model: &ModelInfo, tokenizer: &Tokenizer) -> Result<Vec<u32>, Failure> {
    let mut ids = model.eos_token_ids()?;
    if model.is_ernie() {
        ids.extend(tokenizer.token_id("<|end_of_sentence|>"));
    }
    let named = model.special_tokens.get("eos_token").and_then(Value::as_str);
    ids.extend(named.and_then(|token| tokenizer.token_id(token)));
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// Says which tokens no prompt can hold: the vocabulary names them, but the embedding ends before them.
fn warn_of_tokens_beyond(tokenizer: &Tokenizer, rows: usize) {
    const SHOWN: usize = 5;
    let beyond: Vec<String> = tokenizer.tokens_from(rows).map(|(id, name)| format!("{name:?} ({id})")).collect();
    if !beyond.is_empty() {
        let (shown, count) = (beyond.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", "), beyond.len());
        let more = if count > SHOWN { format!(" and {} more", count - SHOWN) } else { String::new() };
        tracing::warn!(
            "the model's embedding has {rows} rows, and none for the tokens {shown}{more}: prompts that come to one of them are refused"
        );
    }
}

/// Spreads consecutive numbers over all of 64 bits (SplitMix64's finalizer).
fn splitmix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
