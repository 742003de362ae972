//! The vocabulary as llguidance needs it: the bytes of each token in a trie, and text cut into tokens.

use std::sync::Arc;

use llguidance::toktrie::{INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use crate::text::tokenizer::{Special, Tokenizer};

/// Longer tokens are beyond what the trie holds. No grammar ever allows them.
const LONGEST_TOKEN: usize = 1000;

struct Environment {
    trie: TokTrie,
    tokenizer: Arc<Tokenizer>,
}

/// Ids from `vocab_size` on are unknown to it.
pub fn environment(tokenizer: &Arc<Tokenizer>, vocab_size: usize, eos_token_ids: &[u32]) -> TokEnv {
    let size = tokenizer.vocab_size().min(vocab_size);
    let names: std::collections::HashSet<&str> = tokenizer.special_tokens().iter().map(String::as_str).collect();
    let words: Vec<Vec<u8>> = (0..size as u32).map(|id| word(tokenizer, &names, id)).collect();
    let eos: Vec<u32> = eos_token_ids.iter().copied().filter(|id| (*id as usize) < size).collect();
    let info = TokRxInfo::new(size as u32, eos.first().copied().unwrap_or(INVALID_TOKEN));
    let mut trie = TokTrie::from(&info, &words);
    if eos.len() > 1 {
        trie = trie.with_eos_tokens(&eos);
    }
    Arc::new(Environment { trie, tokenizer: tokenizer.clone() })
}

/// The bytes of a token; empty for an id that no grammar allows. Control tokens and markup (`<think>`) are apart from text: only a grammar that
/// names them allows them.
fn word(tokenizer: &Tokenizer, names: &std::collections::HashSet<&str>, id: u32) -> Vec<u8> {
    let Some(bytes) = tokenizer.token_bytes(id).filter(|_| tokenizer.vocabulary().unassigned.binary_search(&id).is_err()) else {
        return Vec::new();
    };
    // The marker is a byte that no text holds.
    if bytes.len() > LONGEST_TOKEN || bytes.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) {
        return Vec::new();
    }
    let named = std::str::from_utf8(bytes).is_ok_and(|text| names.contains(text) && tokenizer.token_id(text) == Some(id));
    if tokenizer.is_special(id) || named {
        return [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat();
    }
    bytes.to_vec()
}

/// Tokens of `text` as they stand inside a longer text; `None` where the tokenizer would write something else.
pub fn tokens_within(tokenizer: &Tokenizer, text: &str) -> Option<Vec<TokenId>> {
    let spells = |ids: &[u32], bytes: &[u8]| {
        let spelled = ids.iter().flat_map(|id| tokenizer.token_bytes(*id).unwrap_or_default());
        spelled.eq(bytes.iter())
    };
    let plain = tokenizer.encode(text, Special::Text).ok()?;
    if spells(&plain, text.as_bytes()) {
        return Some(plain);
    }
    // Some tokenizers begin every text with a space. After a line break there is none.
    let after = tokenizer.encode(&format!("\n{text}"), Special::Text).ok()?;
    let from = (1..=after.len().min(3)).find(|at| spells(&after[..*at], b"\n") || spells(&after[..*at], b" \n"))?;
    let ids = after.get(from..)?;
    spells(ids, text.as_bytes()).then(|| ids.to_vec())
}

impl TokenizerEnv for Environment {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| {
            let ids = tokens_within(&self.tokenizer, text).filter(|ids| ids.iter().all(|id| (*id as usize) < self.trie.vocab_size()));
            ids.unwrap_or_else(|| self.trie.greedy_tokenize(text.as_bytes()))
        })
    }
}
