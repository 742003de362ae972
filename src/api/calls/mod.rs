//! Calls that generate nothing: what the tokenizer and the chat template make of a text, and what is at work.

use serde_json::{Value, json};

use crate::api::served::ServedModel;
use crate::error::Failure;

mod abort;
mod token_check;
mod tokenize;

pub use abort::abort;
pub use token_check::token_check;
pub use tokenize::{apply_template, detokenize, render, tokenize};

/// Answers a call from its body alone. It may take long: whoever calls it does so on a thread of its own.
pub type Compute = fn(&ServedModel, &Value) -> Result<Value, Failure>;

/// `GET /version`.
pub fn version() -> Value {
    json!({ "version": env!("CARGO_PKG_VERSION") })
}

/// `GET /load`: sequences that run or wait.
pub fn load(sequences: usize) -> Value {
    json!({ "server_load": sequences })
}
