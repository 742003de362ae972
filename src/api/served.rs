//! The served model as requests are read and answers are written against it: its files, its limits and the settings. No engine.

use std::collections::HashSet;
use std::sync::Arc;

use serde_json::Value;

use crate::api::fields::Fields;
use crate::api::grammar::Grammars;
use crate::api::logprobs::LogprobsForm;
use crate::api::model::ModelInfo;
use crate::api::options::{Context, GenerationOptions, SamplingDefaults};
use crate::api::parse::reasoning::{self, ReasoningFormat};
use crate::api::parse::tools::table::{self as tool_formats, ToolFormat};
use crate::api::prompt::contents::{self, Contents};
use crate::api::prompt::guard::Guard;
use crate::api::prompt::infill_tokens::InfillTokens;
use crate::api::prompt::template::{self, ChatTemplate};
use crate::api::response_store::{ResponseStore, StoreLimits};
use crate::config::ApiSettings;
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
    /// All names that are served, those of other models among them.
    pub listed: Vec<String>,
    defaults: SamplingDefaults,
    pub eos_token_ids: Arc<Vec<u32>>,
    pub bos_token_id: Option<u32>,
    /// Ids from here on have no row in the model's embedding.
    pub embedding_rows: usize,
    pub guard: Guard,
    /// None: the model cannot fill in the middle.
    pub infill: Option<InfillTokens>,
    pub grammars: Grammars,
    /// What `/v1/responses` has given; `None` when responses are not stored.
    pub responses: Option<Arc<ResponseStore>>,
    /// The template with the form of contents that it takes, or why there is none.
    chat_template: Result<(ChatTemplate, Contents), String>,
    /// The template writes the text of system messages into the prompt.
    pub shows_system: bool,
    pub tool_support: ToolSupport,
    pub reasoning_format: Option<&'static ReasoningFormat>,
}

/// How the model's tool calls are read.
#[derive(Debug, Clone, Copy)]
pub enum ToolSupport {
    Format(&'static ToolFormat),
    /// Not at all, as the settings want it: they are text.
    Off,
    /// The chat template shows no format that is known.
    Unknown,
}

impl ToolSupport {
    fn new(setting: Option<&str>, template: &str) -> Result<Self, Failure> {
        match setting {
            None | Some("auto") => Ok(tool_formats::detect(template).map_or(Self::Unknown, Self::Format)),
            Some(name) if name.eq_ignore_ascii_case("none") => Ok(Self::Off),
            Some(name) => {
                tool_formats::find(name).map(Self::Format).ok_or_else(|| unknown_parser("TOOL_CALL_PARSER", name, &tool_formats::names()))
            }
        }
    }
}

fn reasoning_format(setting: Option<&str>, template: &str) -> Result<Option<&'static ReasoningFormat>, Failure> {
    match setting {
        None | Some("auto") => Ok(reasoning::detect(template)),
        Some(name) if name.eq_ignore_ascii_case("none") => Ok(None),
        Some(name) => reasoning::find_format(name).map(Some).ok_or_else(|| unknown_parser("REASONING_PARSER", name, &reasoning::names())),
    }
}

fn unknown_parser(setting: &str, name: &str, known: &[&str]) -> Failure {
    Failure::internal(format!("{setting}: {name:?} is no parser that is known here. Set auto, none or one of {}.", known.join(", ")))
}

/// What of the settings would stop a start, whatever the model is.
pub fn check_settings(settings: &ApiSettings) -> Result<(), Failure> {
    ToolSupport::new(settings.tool_call_parser.as_deref(), "")?;
    reasoning_format(settings.reasoning_parser.as_deref(), "")?;
    SamplingDefaults::new(&Value::Null, settings)?;
    own_template(settings).map(|_| ())
}

/// The template of the settings with its text, where they have one.
fn own_template(settings: &ApiSettings) -> Result<Option<(String, ChatTemplate)>, Failure> {
    let Some(setting) = &settings.chat_template else { return Ok(None) };
    let text = template::of_setting(setting)?;
    let compiled = ChatTemplate::compile(&text);
    let compiled = compiled.map_err(|error| Failure::internal(format!("CHAT_TEMPLATE is not a valid template: {error}")))?;
    Ok(Some((text, compiled)))
}

impl ServedModel {
    /// Fails on settings that do not hold (`CHAT_TEMPLATE`, whose file is read here, and `OVERRIDE_GENERATION_CONFIG`); a model's own
    /// template that does not compile fails chat requests only.
    pub fn new(settings: ApiSettings, limits: Limits, tokenizer: Arc<Tokenizer>, mut model: ModelInfo) -> Result<Self, Failure> {
        let defaults = SamplingDefaults::new(&model.generation_config, &settings)?;
        let (template_text, chat_template) = match (own_template(&settings)?, &model.chat_template) {
            (Some((text, compiled)), _) => (text, Ok(compiled)),
            (None, Some((text, origin))) => {
                let compiled = ChatTemplate::compile(text).map_err(|error| {
                    format!("The model's chat template ({origin}) is not valid: {error}. Set CHAT_TEMPLATE to one that is.")
                });
                (text.clone(), compiled)
            }
            (None, None) => (String::new(), Err("The model has no chat template. Set CHAT_TEMPLATE, or use /v1/completions.".to_owned())),
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
        let shows_system =
            chat_template.as_ref().is_ok_and(|(template, contents)| contents::shows_system(template, *contents, &model.special_tokens));
        let bos_token_id = model.special_tokens.get("bos_token").and_then(Value::as_str).and_then(|token| tokenizer.token_id(token));
        let embedding_rows = model.config.get("vocab_size").and_then(Value::as_u64).map_or(limits.vocab_size, |rows| rows as usize);
        warn_of_tokens_beyond(&tokenizer, embedding_rows);
        let eos_token_ids = Arc::new(eos_token_ids(&model, &tokenizer)?);
        Ok(Self {
            listed: names.clone(),
            names,
            defaults,
            grammars: Grammars::new(tokenizer.clone(), limits.vocab_size, eos_token_ids.clone()),
            eos_token_ids,
            bos_token_id,
            embedding_rows,
            tool_support: ToolSupport::new(settings.tool_call_parser.as_deref(), &template_text)?,
            reasoning_format: reasoning_format(settings.reasoning_parser.as_deref(), &template_text)?,
            guard: Guard::new(&tokenizer)?,
            infill: InfillTokens::find(&tokenizer, &model.infill_tokens, embedding_rows),
            responses: response_store(&settings),
            chat_template,
            shows_system,
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
        self.settings.response_role.as_str()
    }

    /// The template with the form of contents that it takes, or a 400 that says what to set.
    pub fn chat_template(&self) -> Result<&(ChatTemplate, Contents), Failure> {
        self.chat_template.as_ref().map_err(|reason| Failure::bad_request("messages", reason.clone()).code("unsupported_value"))
    }

    /// The special tokens among the marks of the formats that a request's answers are parsed by.
    pub fn marks(&self, texts: &[&str]) -> HashSet<u32> {
        let is_mark = |name: &&String| texts.iter().any(|text| text.contains(name.as_str()));
        self.tokenizer.special_tokens().iter().filter(is_mark).filter_map(|name| self.tokenizer.token_id(name)).collect()
    }

    /// Whether the request's `model` is one of ours.
    pub fn check_model(&self, fields: &Fields<'_>) -> Result<(), Failure> {
        match fields.string("model")? {
            None | Some("" | "null" | "default") => Ok(()),
            Some(name) => self.check_model_name(name),
        }
    }

    /// The model's own name, or its last part.
    pub fn is_own_name(&self, name: &str) -> bool {
        name == self.model.name || name == self.model.last_segment()
    }

    pub fn check_model_name(&self, name: &str) -> Result<(), Failure> {
        let known = self.names.iter().any(|served| served == name) || self.is_own_name(name);
        if known || self.settings.any_model_name {
            return Ok(());
        }
        let message = format!("The model `{name}` does not exist. This server serves: {}.", self.listed.join(", "));
        Err(Failure::new(Kind::NotFound, message).param("model").code("model_not_found"))
    }

    /// The options that all routes share, read and checked.
    pub fn options(&self, fields: &Fields<'_>, form: LogprobsForm) -> Result<GenerationOptions, Failure> {
        let context = Context {
            settings: &self.settings,
            defaults: &self.defaults,
            limits: &self.limits,
            infills: self.infill.is_some(),
            eos_token_ids: &self.eos_token_ids,
            encode: &|text| self.tokenizer.encode(text, Special::Text),
            compile: &|grammar| self.grammars.compile(grammar),
        };
        GenerationOptions::read(fields, form, &context)
    }
}

/// Where responses are kept, unless the settings say that they are not.
fn response_store(settings: &ApiSettings) -> Option<Arc<ResponseStore>> {
    let limits = StoreLimits {
        entries: settings.responses_store_entries,
        bytes: settings.responses_store_mb.saturating_mul(1 << 20),
        ttl: settings.responses_store_ttl,
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
