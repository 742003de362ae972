//! Text to token ids and back.

use crate::error::Failure;
use crate::models::files::ModelFiles;

/// How strings that spell a special token are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// As the control token they name.
    Control,
    /// As plain text.
    Text,
}

/// A model's vocabulary and merges.
pub struct Tokenizer {}

impl Tokenizer {
    /// From `tokenizer.json`, else from `tokenizer.model` (SentencePiece).
    pub fn load(files: &ModelFiles) -> Result<Self, Failure> {
        Err(Failure::internal(format!("no tokenizer in {}", files.name)))
    }

    /// Token ids of `text`. No token is added around it.
    pub fn encode(&self, _text: &str, _special: Special) -> Result<Vec<u32>, Failure> {
        Ok(Vec::new())
    }

    /// The bytes a token stands for in running text (`▁the` → ` the`, `<0xE4>` → E4); `None` for ids without a token.
    /// For special tokens: the bytes of their name.
    pub fn token_bytes(&self, _id: u32) -> Option<&[u8]> {
        None
    }

    /// A control token: hidden from text unless the request says `skip_special_tokens: false`.
    pub fn is_special(&self, _id: u32) -> bool {
        false
    }

    pub fn token_id(&self, _token: &str) -> Option<u32> {
        None
    }

    /// Ids below this have a token.
    pub fn vocab_size(&self) -> usize {
        0
    }

    /// Every special token's text, longest first.
    pub fn special_tokens(&self) -> &[String] {
        &[]
    }
}
