//! What a request gives as its prompt → token ids: the chat template, the guard against special tokens in user text, and the context's limit.

pub mod chat;
pub mod contents;
pub mod fit;
pub mod guard;
pub mod infill;
pub mod infill_tokens;
pub mod messages;
pub mod template;
pub mod text;
pub mod thinking;
