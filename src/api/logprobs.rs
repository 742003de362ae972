//! Log probabilities: what a request may ask for, and how each dialect writes them.

use serde_json::{Map, Value, json};

use crate::api::fields::{Field, Fields, invalid, wrong_type};
use crate::config::{ApiSettings, defaults};
use crate::error::Failure;
use crate::models::{Logprobs, LogprobsSpec};
use crate::text::detokenize::Detokenizer;
use crate::text::tokenizer::Tokenizer;

/// JSON has no −∞: this stands for it, as in vLLM.
const LEAST: f32 = -9999.0;

/// How a route writes `logprobs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `logprobs: true, top_logprobs: n`.
    Chat,
    /// `logprobs: n`.
    Text,
    /// A job's own input takes both.
    NativeChat,
    NativeText,
}

impl Form {
    pub fn is_chat(self) -> bool {
        matches!(self, Form::Chat | Form::NativeChat)
    }
}

/// What a request asks for. `u32::MAX` = the whole vocabulary.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Asked {
    /// Alternatives at each token of the answer.
    pub output: Option<u32>,
    /// Alternatives at each token of the prompt, beside the token itself (`prompt_logprobs`).
    pub prompt: Option<u32>,
    /// Tokens are written `token_id:N`.
    pub as_ids: bool,
}

impl Asked {
    /// Reads `logprobs`, `top_logprobs` and `prompt_logprobs`.
    pub fn read(fields: &Fields<'_>, form: Form, stream: bool, settings: &ApiSettings) -> Result<Self, Failure> {
        let top = alternatives(fields.get("top_logprobs"), settings)?;
        let switch = fields.get("logprobs");
        let output = match (switch.as_ref().map(|field| field.value), form) {
            (None | Some(Value::Bool(false)), _) => None,
            (Some(Value::Bool(true)), Form::Chat | Form::NativeChat | Form::NativeText) => Some(top.unwrap_or(0)),
            (Some(Value::Number(_)), Form::Text | Form::NativeChat | Form::NativeText) => alternatives(fields.get("logprobs"), settings)?,
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
    let most = settings.max_logprobs.unwrap_or(defaults::MAX_LOGPROBS);
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
pub struct Reported {
    pub id: u32,
    /// Its part of the text: tokens' texts together are the text. Of several tokens that make up one character the last has it.
    pub text: String,
    /// Characters of the text before it.
    pub offset: usize,
    pub logprobs: Logprobs,
}

/// Writes log probabilities as JSON.
pub struct Names<'a> {
    pub tokenizer: &'a Tokenizer,
    pub as_ids: bool,
}

impl Names<'_> {
    /// A token by itself: its text, or `bytes:\xNN…` when it is a part of a character.
    fn alone(&self, id: u32) -> String {
        if self.as_ids {
            return format!("token_id:{id}");
        }
        let bytes = self.tokenizer.token_bytes(id).unwrap_or_default();
        match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => bytes.iter().fold("bytes:".to_owned(), |text, byte| format!("{text}\\x{byte:02x}")),
        }
    }

    fn in_text(&self, token: &Reported) -> String {
        if self.as_ids { self.alone(token.id) } else { token.text.clone() }
    }

    fn item(&self, id: u32, name: &str, value: f32) -> Map<String, Value> {
        Map::from_iter([
            ("token".to_owned(), json!(name)),
            ("logprob".to_owned(), number(value)),
            ("bytes".to_owned(), json!(self.tokenizer.token_bytes(id))),
        ])
    }

    /// The `logprobs` of a chat choice: `top` alternatives each.
    pub fn chat(&self, tokens: &[Reported], top: u32) -> Value {
        let content = tokens.iter().map(|token| {
            let own = self.in_text(token);
            let alternatives = token.logprobs.top.iter().take(top as usize).map(|(id, value)| {
                let name = if *id == token.id { own.clone() } else { self.alone(*id) };
                Value::Object(self.item(*id, &name, *value))
            });
            let mut item = self.item(token.id, &own, token.logprobs.own);
            item.insert("top_logprobs".to_owned(), alternatives.collect());
            Value::Object(item)
        });
        json!({"content": content.collect::<Vec<_>>(), "refusal": null})
    }

    /// The `logprobs` of a text choice: the most probable `top` and the token itself. The first token of an echoed prompt has none.
    pub fn text<'t>(&self, tokens: impl Iterator<Item = (&'t Reported, bool)>, top: u32) -> Value {
        let (mut names, mut own, mut tops, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (token, first) in tokens {
            let name = self.in_text(token);
            own.push(if first { Value::Null } else { number(token.logprobs.own) });
            tops.push(if first {
                Value::Null
            } else {
                let mut map = Map::from_iter([(name.clone(), number(token.logprobs.own))]);
                for (id, value) in token.logprobs.top.iter().take(top as usize).filter(|(id, _)| *id != token.id) {
                    map.entry(self.alone(*id)).or_insert_with(|| number(*value));
                }
                Value::Object(map)
            });
            names.push(Value::String(name));
            offsets.push(json!(token.offset));
        }
        json!({"tokens": names, "token_logprobs": own, "top_logprobs": tops, "text_offset": offsets})
    }

    /// `prompt_logprobs` in vLLM's form: null for the first token, then by id the token itself and the most probable `top`.
    pub fn prompt(&self, ids: &[u32], scores: &[Logprobs], top: u32) -> Value {
        let names = Names { as_ids: false, ..*self };
        let entry = |value: f32, rank: u32, id: u32| json!({"logprob": number(value), "rank": rank, "decoded_token": names.alone(id)});
        let of = |(id, score): (&u32, &Logprobs)| {
            let mut map = Map::from_iter([(id.to_string(), entry(score.own, score.rank, *id))]);
            for (rank, (other, value)) in (1..).zip(score.top.iter().take(top as usize)) {
                map.entry(other.to_string()).or_insert_with(|| entry(*value, rank, *other));
            }
            Value::Object(map)
        };
        std::iter::once(Value::Null).chain(ids.iter().skip(1).zip(scores).map(of)).collect()
    }
}

/// The number with as many digits as an f32 has.
fn number(value: f32) -> Value {
    let value = if value.is_nan() { LEAST } else { value.clamp(LEAST, f32::MAX) };
    json!(value.to_string().parse::<f64>().unwrap_or(f64::from(value)))
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
    pub fn reported(&self, tokenizer: &Tokenizer, ids: &[u32], scores: &[Logprobs]) -> Vec<Reported> {
        let none = Logprobs::default();
        let scores = std::iter::once(&none).chain(scores);
        let most = self.text.chars().count();
        let mut offset = 0;
        let mut tokens = Vec::with_capacity(ids.len());
        for ((id, text), score) in ids.iter().zip(texts(tokenizer, ids, self.hidden)).zip(scores) {
            let length = text.chars().count();
            let is_hidden = self.hidden && tokenizer.is_special(*id);
            let text = if is_hidden { Names { tokenizer, as_ids: false }.alone(*id) } else { text };
            tokens.push(Reported { id: *id, text, offset: offset.min(most), logprobs: score.clone() });
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
