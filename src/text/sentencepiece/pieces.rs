//! The pieces that text can be made of, found by their text.

use std::hash::{BuildHasher, RandomState};

use aho_corasick::{AhoCorasick, MatchKind, StartKind};
use hashbrown::HashTable;

use super::{Kind, Piece};

#[derive(Clone, Copy)]
struct Entry {
    start: u32,
    len: u32,
    score: f32,
    unused: bool,
}

/// A vocabulary's pieces by id and by text. All texts lie in one buffer, one after another.
pub struct Pieces {
    text: String,
    entries: Vec<Entry>,
    /// Pieces that text can be made of.
    index: HashTable<u32>,
    hasher: RandomState,
    /// Bytes in the longest of them: no longer text needs to be looked up.
    pub longest: usize,
}

impl Pieces {
    /// `hidden` pieces are never made from text: those that only a chat template may write.
    pub fn new(pieces: &[Piece<'_>], hidden: impl Fn(&Piece<'_>) -> bool) -> Self {
        let mut table = Self {
            text: String::with_capacity(pieces.iter().map(|piece| piece.text.len()).sum()),
            entries: Vec::with_capacity(pieces.len()),
            index: HashTable::with_capacity(pieces.len()),
            hasher: RandomState::default(),
            longest: 0,
        };
        for (id, piece) in (0u32..).zip(pieces) {
            let start = table.text.len() as u32;
            let unused = piece.kind == Kind::Unused;
            table.text.push_str(piece.text);
            table.entries.push(Entry { start, len: piece.text.len() as u32, score: piece.score, unused });
            if is_text(piece) && !hidden(piece) {
                table.add(id, piece.text);
            }
        }
        table
    }

    fn add(&mut self, id: u32, piece: &str) {
        self.longest = self.longest.max(piece.len());
        let (text, entries, hasher) = (&self.text, &self.entries, &self.hasher);
        let rehash = |&id: &u32| hasher.hash_one(piece_text(text, entries, id));
        self.index.insert_unique(hasher.hash_one(piece), id, rehash);
    }

    /// The id of the piece that reads `text`, of those text can be made of.
    pub fn find(&self, text: &str) -> Option<u32> {
        let same = |&id: &u32| piece_text(&self.text, &self.entries, id) == text;
        self.index.find(self.hasher.hash_one(text), same).copied()
    }

    /// The id of the piece written `token`, whatever its kind. A search: for the few tokens that are asked for by name.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.find(token).or_else(|| (0..self.entries.len() as u32).find(|&id| piece_text(&self.text, &self.entries, id) == token))
    }

    pub fn score(&self, id: u32) -> f32 {
        self.entries[id as usize].score
    }

    /// Only a step to greater pieces: never an id of a text.
    pub fn is_unused(&self, id: u32) -> bool {
        self.entries[id as usize].unused
    }
}

/// Whether text may be made of a piece of that kind.
pub fn is_text(piece: &Piece<'_>) -> bool {
    !piece.text.is_empty() && matches!(piece.kind, Kind::Normal | Kind::UserDefined | Kind::Unused)
}

fn piece_text<'a>(text: &'a str, entries: &[Entry], id: u32) -> &'a str {
    let entry = entries[id as usize];
    &text[entry.start as usize..][..entry.len as usize]
}

/// Finds user-defined pieces, the longest at each place.
pub fn fixed_matcher(patterns: &[&str], start: StartKind) -> Result<AhoCorasick, String> {
    let builder = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).start_kind(start).build(patterns);
    builder.map_err(|error| format!("user-defined pieces: {error}"))
}
