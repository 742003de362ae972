//! Whether a prompt fits the model's context: the one place that cuts it, where the request asks for that, and that refuses it.

use std::sync::Arc;

use serde_json::Value;

use crate::api::fields;
use crate::api::options::{GenerationOptions, Truncate};
use crate::api::served::ServedModel;
use crate::error::Failure;

/// The context, as the prompts of one request are to fit it.
pub struct Fit<'a> {
    pub served: &'a ServedModel,
    pub options: &'a GenerationOptions,
    /// The field that the prompts come from, for messages: `prompt` or `messages`.
    pub noun: &'static str,
}

impl Fit<'_> {
    /// The part of a prompt's text that is to be tokenized. A text that cannot fit the context, however it is cut, is refused: that is told
    /// from its bytes, since to tokenize tens of megabytes takes seconds. Of one that is to be cut to its last tokens the end is enough.
    pub fn text<'t>(&self, text: &'t str) -> Result<&'t str, Failure> {
        Ok(self.most_bytes(text)?.map_or(text, |bytes| end_of(text, bytes)))
    }

    /// The same of a text of which the first tokens are wanted.
    pub fn beginning<'t>(&self, text: &'t str) -> Result<&'t str, Failure> {
        let Some(bytes) = self.most_bytes(text)? else { return Ok(text) };
        let end = (0..=bytes.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or_default();
        Ok(&text[..end])
    }

    /// Bytes of a text that are enough for all tokens that may be kept of it; none where it is to be read whole.
    fn most_bytes(&self, text: &str) -> Result<Option<usize>, Failure> {
        let context = self.served.limits.max_model_len;
        if text.len() < context {
            return Ok(None);
        }
        let Some(keep) = self.keep() else {
            let least = self.served.tokenizer.least_tokens(text);
            return if least < context { Ok(None) } else { Err(self.too_long(&format!("at least {least} tokens"))) };
        };
        Ok(Some(keep.saturating_mul(self.served.tokenizer.longest_token().unwrap_or(UNKNOWN_TOKEN)).max(CUT_WHOLE)))
    }

    /// Adds what the answer has begun with, cuts a prompt if the request asks for it, and checks that it leaves room for an answer.
    pub fn ids(&self, mut ids: Vec<u32>) -> Result<Arc<Vec<u32>>, Failure> {
        let (context, noun, rows) = (self.served.limits.max_model_len, self.noun, self.served.embedding_rows);
        ids.extend(&self.options.completion_token_ids);
        if let Some(keep) = self.keep() {
            ids.drain(..ids.len().saturating_sub(keep));
        }
        if ids.is_empty() {
            return Err(fields::missing(noun, format!("The {noun} came to no tokens at all. There must be at least one.")));
        }
        // The device would fail on such an id, and with it every request of the step.
        if let Some(id) = ids.iter().find(|id| **id as usize >= rows) {
            let name = String::from_utf8_lossy(self.served.tokenizer.token_bytes(*id).unwrap_or_default()).into_owned();
            let message = format!(
                "The {noun} came to the token {name:?} (id {id}), which the model cannot read: its embedding has {rows} rows. Leave that token out."
            );
            return Err(Failure::bad_request(noun, message).code("invalid_value"));
        }
        if ids.len() >= context {
            return Err(self.too_long(&format!("{} tokens", ids.len())));
        }
        Ok(Arc::new(ids))
    }

    /// Refuses messages of which what users wrote, and the first system text where the template shows it, is alone too long, before anything is
    /// done with them. White space around a text is left out: templates strip it. What the model and its tools wrote does not count:
    /// templates leave out earlier thoughts. `own_template`: the request brings a template of its own.
    pub fn given_text(&self, messages: &Value, own_template: bool) -> Result<(), Failure> {
        if self.options.truncate.is_some() {
            return Ok(());
        }
        let context = self.served.limits.max_model_len;
        let shows_system = self.served.shows_system && !own_template;
        let is_shown = |(place, message): &(usize, &Value)| match message.get("role").and_then(Value::as_str) {
            Some("user") => true,
            // Many templates look for one at the beginning alone.
            Some("system" | "developer") => *place == 0 && shows_system,
            _ => false,
        };
        let least = |text: &str| if text.len() < context { 0 } else { self.served.tokenizer.least_tokens(text.trim()) };
        let messages = messages.as_array().into_iter().flatten().enumerate().filter(is_shown);
        let texts = messages.filter_map(|(_, message)| message.get("content"));
        let least: usize = texts
            .map(|content| match content {
                Value::Array(parts) => {
                    parts.iter().filter_map(|part| part.as_str().or_else(|| part.get("text")?.as_str())).map(least).sum()
                }
                content => content.as_str().map_or(0, least),
            })
            .sum();
        if least < context { Ok(()) } else { Err(self.too_long(&format!("at least {least} tokens"))) }
    }

    /// Tokens of a prompt that the request wants kept, when it wants it cut.
    pub fn keep(&self) -> Option<usize> {
        let context = self.served.limits.max_model_len;
        match self.options.truncate? {
            // A limit that is no limit keeps no place free.
            Truncate::ToContext => {
                Some(context.saturating_sub(self.options.max_tokens.filter(|most| *most < context).unwrap_or(1).max(1)).max(1))
            }
            Truncate::Last(keep) => Some(keep),
        }
    }

    /// `length`: what the prompt came to, in words.
    fn too_long(&self, length: &str) -> Failure {
        let (context, noun, hint) = (self.served.limits.max_model_len, self.noun, self.served.limits.memory_hint());
        let message = format!(
            "This model's maximum context length is {context} tokens. However, your {noun} resulted in {length}. Please reduce the \
             length of the {noun} (context_length_exceeded: prompt is too long).{hint}"
        );
        Failure::bad_request(noun, message).code("context_length_exceeded")
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
