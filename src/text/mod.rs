//! Token ids ⇄ text: the tokenizers, and the way back while tokens are still coming.

pub mod detokenize;
mod protobuf;
pub mod sentencepiece;
pub mod tokenizer;
