//! BPE over bytes as tiktoken does it: a regular expression cuts a text, and of all neighbours in a piece whose union is a token those of
//! the lowest rank are joined first.
//!
//! A list of merges for the `tokenizers` crate, which converters make of the ranks, is not the same: where a token is the union of several
//! pairs, the list puts one before the other.

use tokenizers::utils::SysRegex;

use super::added::Added;
use super::json::byte_level_alphabet;
use super::token_bytes::TokenBytes;
use crate::text::sentencepiece::{Bpe, Kind, Piece, Pieces};

/// Ranks above this are not told apart by their 32-bit scores. No vocabulary has as many.
const MOST_TOKENS: usize = 1 << 24;

/// A vocabulary of ranks with its special tokens.
pub struct Vocabulary {
    pub ranks: Ranks,
    /// Each token's bytes by rank.
    pub tokens: Vec<Vec<u8>>,
    /// The id of rank 0.
    pub first: u32,
    pub added: Added,
    /// What stands before every text.
    pub before: Vec<u32>,
}

impl Vocabulary {
    /// The bytes of all tokens, special ones by their names.
    pub fn bytes(&self) -> TokenBytes {
        let mut table = TokenBytes::default();
        (self.first..).zip(&self.tokens).for_each(|(id, bytes)| table.set(id, bytes));
        self.added.names().iter().zip(self.added.ids()).for_each(|(name, id)| table.set(*id, name.as_bytes()));
        table
    }
}

/// Cuts text into ranks, counted from `first` on.
pub struct Ranks {
    /// Tokens with a letter for each byte.
    pieces: Pieces,
    bpe: Bpe,
    pattern: SysRegex,
    letters: [char; 256],
    first: u32,
}

impl Ranks {
    /// `tokens`: each token's bytes by rank.
    pub fn new(tokens: &[Vec<u8>], first: u32, pattern: &str) -> Result<Self, String> {
        if tokens.len() > MOST_TOKENS {
            return Err(format!("it has {} tokens, more than any vocabulary", tokens.len()));
        }
        let mut letters = ['\0'; 256];
        byte_level_alphabet().into_iter().for_each(|(letter, byte)| letters[usize::from(byte)] = letter);
        let texts: Vec<String> = tokens.iter().map(|token| spell(&letters, token)).collect();
        let piece = |(rank, text)| Piece { text, score: -(rank as f32), kind: Kind::Normal };
        let list: Vec<Piece<'_>> = texts.iter().map(String::as_str).enumerate().map(piece).collect();
        let pieces = Pieces::new(&list, |_| false);
        if let Some(byte) = (0..=255u8).find(|byte| pieces.find(&spell(&letters, &[*byte])).is_none()) {
            return Err(format!("the byte {byte} has no token"));
        }
        let pattern = SysRegex::new(pattern).map_err(|error| format!("its pattern {pattern:?} is no regular expression: {error}"))?;
        Ok(Self { pieces, bpe: Bpe::new(&[])?, pattern, letters, first })
    }

    /// Appends the ids of `text`.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        let mut done = 0;
        // Text that the pattern leaves out is a piece as well. No published pattern leaves any.
        for (start, end) in self.pattern.find_iter(text) {
            self.piece(&text[done..start], ids);
            self.piece(&text[start..end], ids);
            done = end;
        }
        self.piece(&text[done..], ids);
    }

    fn piece(&self, text: &str, ids: &mut Vec<u32>) {
        if text.is_empty() {
            return;
        }
        let text = spell(&self.letters, text.as_bytes());
        match self.pieces.find(&text) {
            Some(id) => ids.push(self.first + id),
            None => self.bpe.cut(&self.pieces, &text, |_, id| ids.extend(id.map(|id| self.first + id))),
        }
    }

    /// The id of a token by its text.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.pieces.find(&spell(&self.letters, token.as_bytes())).map(|id| self.first + id)
    }
}

fn spell(letters: &[char; 256], bytes: &[u8]) -> String {
    bytes.iter().map(|byte| letters[usize::from(*byte)]).collect()
}
