//! How log probabilities are written: as chat choices have them, as text choices have them, and those of a prompt.

use serde_json::{Map, Value, json};

use crate::api::logprobs::{TokenLogprobs, token_name};
use crate::models::Logprobs;
use crate::text::tokenizer::Tokenizer;

/// JSON has no −∞: this stands for it, as in vLLM.
const LEAST: f32 = -9999.0;

/// Writes log probabilities as JSON.
pub struct TokenNames<'a> {
    pub tokenizer: &'a Tokenizer,
    pub as_ids: bool,
}

impl TokenNames<'_> {
    /// A token by itself.
    fn alone(&self, id: u32) -> String {
        if self.as_ids { format!("token_id:{id}") } else { token_name(self.tokenizer, id) }
    }

    fn in_text(&self, token: &TokenLogprobs) -> String {
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
    pub fn chat(&self, tokens: &[TokenLogprobs], top: u32) -> Value {
        json!({"content": self.items(tokens, top), "refusal": null})
    }

    /// One object a token, with `top` alternatives each.
    pub fn items(&self, tokens: &[TokenLogprobs], top: u32) -> Vec<Value> {
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
        content.collect()
    }

    /// The `logprobs` of a text choice: the most probable `top` and the token itself. The first token of an echoed prompt has none.
    pub fn text<'t>(&self, tokens: impl Iterator<Item = (&'t TokenLogprobs, bool)>, top: u32) -> Value {
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
        let names = TokenNames { as_ids: false, ..*self };
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
