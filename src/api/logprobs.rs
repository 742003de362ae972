//! Log probabilities: what a request may ask for, and what is known of each token.

use serde_json::Value;

use crate::api::fields::{Field, Fields, invalid, wrong_type};
use crate::config::ApiSettings;
use crate::error::Failure;
use crate::models::{Logprobs, LogprobsSpec};
use crate::text::detokenize::Detokenizer;
use crate::text::tokenizer::Tokenizer;

/// How a route writes `logprobs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogprobsForm {
    /// `logprobs: true, top_logprobs: n`.
    Chat,
    /// `logprobs: n`.
    Text,
    /// The same on `/infill`, where an answer may be as long as it likes, or of no length at all.
    Infill,
    /// A job's own input takes both.
    NativeChat,
    NativeText,
}

impl LogprobsForm {
    pub fn is_chat(self) -> bool {
        matches!(self, LogprobsForm::Chat | LogprobsForm::NativeChat)
    }
}

/// What a request asks for. `u32::MAX` = the whole vocabulary.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LogprobsRequest {
    /// Alternatives at each token of the answer.
    pub output: Option<u32>,
    /// Alternatives at each token of the prompt, beside the token itself (`prompt_logprobs`).
    pub prompt: Option<u32>,
    /// Tokens are written `token_id:N`.
    pub as_ids: bool,
}

impl LogprobsRequest {
    /// Reads `logprobs`, `top_logprobs` and `prompt_logprobs`.
    pub fn read(fields: &Fields<'_>, form: LogprobsForm, stream: bool, settings: &ApiSettings) -> Result<Self, Failure> {
        let top = alternatives(fields.get("top_logprobs"), settings)?;
        let switch = fields.get("logprobs");
        let output = match (switch.as_ref().map(|field| field.value), form) {
            (None | Some(Value::Bool(false)), _) => None,
            (Some(Value::Bool(true)), LogprobsForm::Chat | LogprobsForm::NativeChat | LogprobsForm::NativeText) => Some(top.unwrap_or(0)),
            (Some(Value::Number(_)), LogprobsForm::Text | LogprobsForm::Infill | LogprobsForm::NativeChat | LogprobsForm::NativeText) => {
                alternatives(fields.get("logprobs"), settings)?
            }
            _ => {
                let expected = if form.is_chat() { "true or false" } else { "an integer" };
                return Err(switch.map_or_else(|| Failure::internal("a field has gone"), |field| wrong_type(&field, expected)));
            }
        };
        let switched = matches!(switch.as_ref().map(|field| field.value), Some(Value::Bool(true)));
        if let (Some(field), true, false) = (fields.get("top_logprobs"), top.is_some_and(|top| top > 0), switched) {
            return Err(invalid(&field, "when using `top_logprobs`, `logprobs` must be set to true."));
        }
        let prompt_field = || fields.get("prompt_logprobs").filter(|field| field.value != &Value::Bool(false));
        let prompt = alternatives(prompt_field(), settings)?;
        if let (Some(field), true) = (prompt_field(), stream) {
            return Err(invalid(&field, "`prompt_logprobs` are not available when `stream=True`."));
        }
        let asked = Self { output, prompt, as_ids: fields.bool("return_tokens_as_token_ids")?.unwrap_or(settings.tokens_as_ids) };
        if let (true, Some(field)) = (settings.refuse_logprobs, asked.field(fields)) {
            let message = "Logprobs is disabled, please enable it in startup config (ENABLE_LOGPROB).";
            return Err(Failure::bad_request(field.name, message).code("unsupported_parameter"));
        }
        Ok(asked)
    }

    /// The field that asks for anything at all.
    pub fn field<'a>(&self, fields: &Fields<'a>) -> Option<Field<'a>> {
        let name = if self.output.is_some() { "logprobs" } else { "prompt_logprobs" };
        (self.output.or(self.prompt).is_some()).then(|| fields.get(name)).flatten()
    }

    /// What the prompt must be scored with; an answer that repeats the prompt tells of its tokens, too.
    pub fn of_prompt(&self, echo: bool, settings: &ApiSettings) -> Option<LogprobsSpec> {
        let top = self.prompt.max(self.output.filter(|_| echo))?;
        Some(LogprobsSpec { top, mode: settings.logprobs_mode })
    }
}

/// A number of alternatives; −1 = the whole vocabulary, where that is allowed.
fn alternatives(field: Option<Field<'_>>, settings: &ApiSettings) -> Result<Option<u32>, Failure> {
    let Some(field) = field else { return Ok(None) };
    let most = settings.max_logprobs;
    let number = field.value.as_f64().filter(|number| number.fract() == 0.0).ok_or_else(|| wrong_type(&field, "an integer"))?;
    let name = &field.name;
    if number == -1.0 && most == u32::MAX {
        return Ok(Some(u32::MAX));
    }
    if number < 0.0 {
        return Err(invalid(&field, format!("Invalid '{name}': must be >= 0, got {number}.")));
    }
    if number > f64::from(most) {
        return Err(invalid(&field, format!("Invalid value for '{name}': must be <= {most}.")));
    }
    Ok(Some(number as u32))
}

/// A token of the answer and how probable it was.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    pub id: u32,
    /// Its part of the text: tokens' texts together are the text. Of several tokens that make up one character the last has it.
    pub text: String,
    /// Characters of the text before it.
    pub offset: usize,
    pub logprobs: Logprobs,
}

/// A token by itself: its text, or `bytes:\\xNN…` when it is a part of a character.
pub fn token_name(tokenizer: &Tokenizer, id: u32) -> String {
    let bytes = tokenizer.token_bytes(id).unwrap_or_default();
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |text, byte| format!("{text}\\x{byte:02x}")),
    }
}

/// A prompt that is repeated at the beginning of its answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Echo {
    pub text: String,
    /// Control tokens are not part of `text`.
    hidden: bool,
}

impl Echo {
    /// Only a text.
    pub fn of_text(text: String) -> Self {
        Self { text, hidden: true }
    }

    /// `given`: the text that `ids` come from, if they do, whole. `skip_special`: whether control tokens are left out otherwise.
    pub fn of_prompt(tokenizer: &Tokenizer, given: Option<&str>, ids: &[u32], skip_special: bool) -> Self {
        let with = |hidden: bool| Self { text: texts(tokenizer, ids, hidden).concat(), hidden };
        let Some(given) = given else { return with(skip_special) };
        [true, false].map(with).into_iter().find(|echo| echo.text == given).unwrap_or_else(|| Self { text: given.to_owned(), hidden: true })
    }

    /// The prompt's tokens as parts of the text, with their scores; the first has none and gets an empty one.
    pub fn reported(&self, tokenizer: &Tokenizer, ids: &[u32], scores: &[Logprobs]) -> Vec<TokenLogprobs> {
        let none = Logprobs::default();
        let scores = std::iter::once(&none).chain(scores);
        let most = self.text.chars().count();
        let mut offset = 0;
        let mut tokens = Vec::with_capacity(ids.len());
        for ((id, text), score) in ids.iter().zip(texts(tokenizer, ids, self.hidden)).zip(scores) {
            let length = text.chars().count();
            let is_hidden = self.hidden && tokenizer.is_special(*id);
            let text = if is_hidden { token_name(tokenizer, *id) } else { text };
            tokens.push(TokenLogprobs { id: *id, text, offset: offset.min(most), logprobs: score.clone() });
            offset += length;
        }
        tokens
    }
}

/// Each token's part of the text that all of them make up.
fn texts(tokenizer: &Tokenizer, ids: &[u32], hidden: bool) -> Vec<String> {
    let mut detokenizer = Detokenizer::new(&[], false);
    let mut texts = Vec::with_capacity(ids.len());
    for id in ids {
        let mut text = String::new();
        if !(hidden && tokenizer.is_special(*id)) {
            detokenizer.push(tokenizer.token_bytes(*id).unwrap_or_default(), false, &mut text);
        }
        texts.push(text);
    }
    if let Some(last) = texts.last_mut() {
        detokenizer.finish(false, last);
    }
    texts
}
