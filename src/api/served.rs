//! The served model as requests are read and answers are written against it: its files, its limits and the settings. No engine.

use std::sync::Arc;

use serde_json::Value;

use crate::api::fields::Fields;
use crate::api::logprobs::LogprobsForm;
use crate::api::model::ModelInfo;
use crate::api::options::{Context, GenerationOptions, SamplingDefaults};
use crate::api::prompt::contents::Contents;
use crate::api::prompt::guard::Guard;
use crate::api::prompt::template::{self, ChatTemplate};
use crate::api::response_store::{ResponseStore, StoreLimits};
use crate::config::{ApiSettings, defaults};
use crate::engine::Limits;
use crate::error::{Failure, Kind};
use crate::text::tokenizer::{Special, Tokenizer};

pub struct ServedModel {
    pub settings: ApiSettings,
    pub limits: Limits,
    pub tokenizer: Arc<Tokenizer>,
    pub model: ModelInfo,
    /// Served names; at least one.
    names: Vec<String>,
    defaults: SamplingDefaults,
    pub eos_token_ids: Arc<Vec<u32>>,
    pub bos_token_id: Option<u32>,
    /// Ids from here on have no row in the model's embedding.
    pub embedding_rows: usize,
    pub guard: Guard,
    /// What `/v1/responses` has given; `None` when responses are not stored.
    pub responses: Option<Arc<ResponseStore>>,
    /// The template with the form of contents that it takes, or why there is none.
    chat_template: Result<(ChatTemplate, Contents), String>,
}

impl ServedModel {
    /// Fails on settings that do not hold (`CHAT_TEMPLATE`, whose file is read here, and `OVERRIDE_GENERATION_CONFIG`); a model's own
    /// template that does not compile fails chat requests only.
    pub fn new(settings: ApiSettings, limits: Limits, tokenizer: Arc<Tokenizer>, mut model: ModelInfo) -> Result<Self, Failure> {
        let defaults = SamplingDefaults::new(&model.generation_config, &settings)?;
        let chat_template = match (&settings.chat_template, &model.chat_template) {
            (Some(setting), _) => Ok(ChatTemplate::compile(&template::of_setting(setting)?)
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
        let embedding_rows = model.config.get("vocab_size").and_then(Value::as_u64).map_or(limits.vocab_size, |rows| rows as usize);
        warn_of_tokens_beyond(&tokenizer, embedding_rows);
        Ok(Self {
            names,
            defaults,
            eos_token_ids: Arc::new(eos_token_ids(&model, &tokenizer)?),
            bos_token_id,
            embedding_rows,
            guard: Guard::new(&tokenizer)?,
            responses: response_store(&settings),
            chat_template,
            settings,
            limits,
            tokenizer,
            model,
        })
    }

    /// The names clients may use; the first is the one answers carry.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    pub fn name(&self) -> &str {
        self.names.first().map_or(self.model.public_name(), String::as_str)
    }

    /// Who answers in chats.
    pub fn response_role(&self) -> &str {
        self.settings.response_role.as_deref().unwrap_or(defaults::RESPONSE_ROLE)
    }

    /// The template with the form of contents that it takes, or a 400 that says what to set.
    pub fn chat_template(&self) -> Result<&(ChatTemplate, Contents), Failure> {
        self.chat_template.as_ref().map_err(|reason| Failure::bad_request("messages", reason.clone()).code("unsupported_value"))
    }

    /// Whether the request's `model` is one of ours.
    pub fn check_model(&self, fields: &Fields<'_>) -> Result<(), Failure> {
        match fields.string("model")? {
            None | Some("" | "null" | "default") => Ok(()),
            Some(name) => self.check_model_name(name),
        }
    }

    pub fn check_model_name(&self, name: &str) -> Result<(), Failure> {
        let known = self.names.iter().any(|served| served == name) || name == self.model.name || name == self.model.last_segment();
        if known || self.settings.any_model_name {
            return Ok(());
        }
        let message = format!("The model `{name}` does not exist. This server serves: {}.", self.names.join(", "));
        Err(Failure::new(Kind::NotFound, message).param("model").code("model_not_found"))
    }

    /// The options that all routes share, read and checked.
    pub fn options(&self, fields: &Fields<'_>, form: LogprobsForm) -> Result<GenerationOptions, Failure> {
        let context = Context {
            settings: &self.settings,
            defaults: &self.defaults,
            limits: &self.limits,
            eos_token_ids: &self.eos_token_ids,
            encode: &|text| self.tokenizer.encode(text, Special::Text),
        };
        GenerationOptions::read(fields, form, &context)
    }
}

/// Where responses are kept, unless the settings say that they are not.
fn response_store(settings: &ApiSettings) -> Option<Arc<ResponseStore>> {
    let limits = StoreLimits {
        entries: settings.responses_store_entries.unwrap_or(defaults::RESPONSES_STORE_ENTRIES),
        bytes: settings.responses_store_mb.unwrap_or(defaults::RESPONSES_STORE_MB).saturating_mul(1 << 20),
        ttl: settings.responses_store_ttl.unwrap_or(defaults::RESPONSES_STORE_TTL),
    };
    settings.responses_store.unwrap_or(true).then(|| Arc::new(ResponseStore::new(limits)))
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
