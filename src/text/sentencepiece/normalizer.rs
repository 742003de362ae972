//! What SentencePiece does to a text before it cuts it: replacements from a table, white space made one, a space before the first word.

use aho_corasick::{AhoCorasick, Anchored, Input, StartKind};

use super::SPACE;
use super::pieces::fixed_matcher;

/// The parts of `NormalizerSpec` that decide how a text is read; defaults as in the schema.
#[derive(Debug, Clone)]
pub struct NormalizerSpec<'a> {
    /// `precompiled_charsmap`; empty for none.
    pub charsmap: std::borrow::Cow<'a, [u8]>,
    /// A text begins as if a space stood before it.
    pub dummy_prefix: bool,
    /// Runs of white space become one, and none is left at the ends.
    pub remove_extra_whitespaces: bool,
}

impl Default for NormalizerSpec<'_> {
    fn default() -> Self {
        Self { charsmap: Default::default(), dummy_prefix: true, remove_extra_whitespaces: true }
    }
}

/// Makes of a text what the pieces are cut from; spaces are written [`SPACE`].
pub struct Normalizer {
    charsmap: Option<CharsMap>,
    /// User-defined pieces, which stay as they are written.
    fixed: Option<AhoCorasick>,
    dummy_prefix: bool,
    remove_extra_whitespaces: bool,
}

impl Normalizer {
    pub fn new(spec: &NormalizerSpec<'_>, fixed: &[&str]) -> Result<Self, String> {
        let fixed = if fixed.is_empty() { None } else { Some(fixed_matcher(fixed, StartKind::Anchored)?) };
        let charsmap = if spec.charsmap.is_empty() { None } else { Some(CharsMap::parse(&spec.charsmap)?) };
        let NormalizerSpec { dummy_prefix, remove_extra_whitespaces, .. } = *spec;
        Ok(Self { charsmap, fixed, dummy_prefix, remove_extra_whitespaces })
    }

    /// No text is lost but that each space becomes a block.
    pub fn is_lossless(&self) -> bool {
        self.charsmap.is_none() && !self.remove_extra_whitespaces
    }

    /// `begins`: a space may be put before the text.
    pub fn normalize(&self, text: &str, begins: bool) -> String {
        let mut rest = text;
        if self.remove_extra_whitespaces {
            while !rest.is_empty()
                && let (" ", len) = self.next(rest)
            {
                rest = &rest[len..];
            }
        }
        let mut normalized = String::with_capacity(rest.len() * 2 + SPACE.len());
        if rest.is_empty() {
            return normalized;
        }
        if self.dummy_prefix && begins {
            normalized.push_str(SPACE);
        }
        if self.is_lossless() {
            normalized.push_str(&rest.replace(' ', SPACE));
            return normalized;
        }
        let mut after_space = self.remove_extra_whitespaces;
        while !rest.is_empty() {
            let (mut piece, len) = self.next(rest);
            if after_space {
                piece = piece.trim_start_matches(' ');
            }
            if !piece.is_empty() {
                normalized.push_str(&piece.replace(' ', SPACE));
                after_space = self.remove_extra_whitespaces && piece.ends_with(' ');
            }
            rest = &rest[len..];
        }
        if self.remove_extra_whitespaces {
            normalized.truncate(normalized.trim_end_matches(SPACE).len());
        }
        normalized
    }

    /// What the beginning of `text` becomes, and how many bytes of it that are: the longest entry of the table, else one character.
    fn next<'a>(&'a self, text: &'a str) -> (&'a str, usize) {
        let anchored = Input::new(text).anchored(Anchored::Yes);
        if let Some(found) = self.fixed.as_ref().and_then(|fixed| fixed.find(anchored)) {
            return (&text[..found.end()], found.end());
        }
        let first = text.chars().next().map_or(0, char::len_utf8);
        self.charsmap.as_ref().and_then(|charsmap| charsmap.replace(text)).unwrap_or((&text[..first], first))
    }
}

/// A double array (darts-clone) over the texts to replace, and the replacements, each ended by a zero.
struct CharsMap {
    units: Vec<u32>,
    replacements: String,
}

impl CharsMap {
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let damaged = || "its precompiled_charsmap is damaged".to_owned();
        let (size, rest) = bytes.split_first_chunk::<4>().ok_or_else(damaged)?;
        let size = u32::from_le_bytes(*size) as usize;
        let (trie, replacements) = rest.split_at_checked(size).filter(|(trie, _)| trie.len() >= 4).ok_or_else(damaged)?;
        let units = trie.as_chunks::<4>().0.iter().map(|unit| u32::from_le_bytes(*unit)).collect();
        let replacements = std::str::from_utf8(replacements).map_err(|_| damaged())?.to_owned();
        Ok(Self { units, replacements })
    }

    /// The replacement of the longest entry that `text` begins with, and that entry's bytes.
    fn replace(&self, text: &str) -> Option<(&str, usize)> {
        let mut longest = None;
        let mut node = offset(*self.units.first()?);
        for (at, byte) in text.bytes().enumerate().take_while(|(_, byte)| *byte != 0) {
            node ^= usize::from(byte);
            let Some(unit) = self.units.get(node).filter(|unit| *unit & 0x8000_00ff == u32::from(byte)) else { break };
            node ^= offset(*unit);
            if unit >> 8 & 1 == 1 {
                longest = self.units.get(node).map(|value| (value & 0x7fff_ffff, at + 1)).or(longest);
            }
        }
        let (value, len) = longest.filter(|(_, len)| text.is_char_boundary(*len))?;
        let replacement = self.replacements.get(value as usize..)?;
        Some((replacement.split('\0').next()?, len))
    }
}

fn offset(unit: u32) -> usize {
    (unit as usize >> 10) << ((unit & 1 << 9) >> 6)
}
