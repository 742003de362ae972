//! What FastDeploy's own server writes beside OpenAI's keys: when a chunk came, and tokens by its names. `FASTDEPLOY_COMPATIBLE` asks for
//! it.

use std::time::Instant;

use serde_json::{Value, json};

use crate::text::tokenizer::Tokenizer;

/// One answer in that form.
pub struct FastDeploy {
    begun: Instant,
}

/// The tokens of one choice, or those of one chunk of it.
pub struct Tokens<'a> {
    pub tokenizer: &'a Tokenizer,
    pub prompt: &'a [u32],
    pub output: &'a [u32],
    /// `return_token_ids`.
    pub asked: bool,
}

impl FastDeploy {
    /// The request begins.
    pub fn begin() -> Self {
        Self { begun: Instant::now() }
    }

    /// Into a whole choice: the message's, or a text choice's own.
    pub fn put_whole(&self, choice: &mut Value, tokens: &Tokens<'_>) {
        if !tokens.asked {
            return;
        }
        let place = place(choice, "message");
        put_prompt(place, tokens);
        put_output(place, tokens);
    }

    /// Into a choice of a chunk. Deltas of chats carry their token ids, asked for or not, as those of its first versions.
    pub fn put_chunk(&self, choice: &mut Value, tokens: &Tokens<'_>, opens: bool) {
        choice["arrival_time"] = json!(self.begun.elapsed().as_secs_f64());
        let is_chat = choice.get("delta").is_some();
        let place = place(choice, "delta");
        if is_chat {
            place["token_ids"] = json!(tokens.output);
        }
        if !tokens.asked {
            return;
        }
        if opens {
            put_prompt(place, tokens);
        }
        put_output(place, tokens);
    }
}

/// Where FastDeploy writes tokens: in the message or delta of a chat choice, and in a text choice itself.
fn place<'a>(choice: &'a mut Value, inside: &str) -> &'a mut Value {
    if choice.get(inside).is_some() { &mut choice[inside] } else { choice }
}

fn put_prompt(place: &mut Value, tokens: &Tokens<'_>) {
    place["prompt_token_ids"] = json!(tokens.prompt);
    place["prompt_tokens"] = json!(text(tokens.tokenizer, tokens.prompt));
}

fn put_output(place: &mut Value, tokens: &Tokens<'_>) {
    place["completion_token_ids"] = json!(tokens.output);
    place["completion_tokens"] = json!(text(tokens.tokenizer, tokens.output));
}

/// The raw text of tokens, control tokens by their names. A character that is cut by the chunk's end is not whole in it.
fn text(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids.iter().filter_map(|id| tokenizer.token_bytes(*id)).flatten().copied().collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
