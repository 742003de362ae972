//! SentencePiece BPE: reads `tokenizer.model` and cuts text into pieces exactly as the SentencePiece library does.
//!
//! Of our own rather than a table of merges for the `tokenizers` crate, since it is what SentencePiece itself does (join the two
//! neighbours whose union is the piece of greatest score) and loads a vocabulary of 100,000 pieces in some milliseconds: the
//! merge table alone would cost a good part of a cold start.
//!
//! Only what can be honoured to the letter is accepted: BPE, identity normalisation, no dummy prefix. Anything else is refused.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};
use std::hash::{BuildHasher, RandomState};

use aho_corasick::{AhoCorasick, MatchKind};
use hashbrown::HashTable;

use crate::text::protobuf::{Fields, Value};

/// What SentencePiece writes for a space.
pub const SPACE: &str = "\u{2581}";

/// The role of a piece (`ModelProto.SentencePiece.Type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte(u8),
}

/// One entry of the vocabulary; its id is its place in the file.
#[derive(Debug, Clone, Copy)]
pub struct Piece<'a> {
    pub text: &'a str,
    pub score: f32,
    pub kind: Kind,
}

/// A parsed `tokenizer.model`, borrowing the file's bytes.
pub struct Model<'a> {
    pub pieces: Vec<Piece<'a>>,
    byte_fallback: bool,
    /// Text begins as if a space stood before it.
    space_prefix: bool,
}

impl<'a> Model<'a> {
    /// Reads a `ModelProto`. The error says what is wrong with the file, or which of its settings this build does not do.
    pub fn parse(file: &'a [u8]) -> Result<Self, String> {
        let (mut pieces, mut trainer, mut normalizer) = (Vec::new(), Trainer::default(), Normalizer::default());
        for field in Fields::new(file) {
            match field? {
                (1, Value::Bytes(bytes)) => pieces.push(parse_piece(bytes).map_err(|error| format!("piece {}: {error}", pieces.len()))?),
                (2, Value::Bytes(bytes)) => trainer = Trainer::parse(bytes)?,
                (3, Value::Bytes(bytes)) => normalizer = Normalizer::parse(bytes)?,
                _ => {}
            }
        }
        if pieces.is_empty() {
            return Err("it holds no pieces: not a SentencePiece model, or cut off".into());
        }
        trainer.check()?;
        normalizer.check()?;
        Ok(Self { pieces, byte_fallback: trainer.byte_fallback, space_prefix: false })
    }

    /// A vocabulary that came another way.
    pub fn of_pieces(pieces: Vec<Piece<'a>>, space_prefix: bool) -> Self {
        let byte_fallback = pieces.iter().any(|piece| matches!(piece.kind, Kind::Byte(_)));
        Self { pieces, byte_fallback, space_prefix }
    }
}

fn parse_piece(bytes: &[u8]) -> Result<Piece<'_>, String> {
    let (mut text, mut score, mut kind) = ("", 0.0, 1);
    for field in Fields::new(bytes) {
        match field? {
            (1, Value::Bytes(bytes)) => text = std::str::from_utf8(bytes).map_err(|_| "its text is not UTF-8")?,
            (2, Value::Fixed32(bits)) => score = f32::from_bits(bits),
            (3, Value::Varint(number)) => kind = number,
            _ => {}
        }
    }
    let kind = match kind {
        1 => Kind::Normal,
        2 => Kind::Unknown,
        3 => Kind::Control,
        4 => Kind::UserDefined,
        5 => Kind::Unused,
        6 => Kind::Byte(byte_piece(text).ok_or_else(|| format!("{text:?} is marked as a byte but not written <0xNN>"))?),
        other => return Err(format!("unknown piece type {other}")),
    };
    Ok(Piece { text, score, kind })
}

/// The byte that `<0xNN>` names.
pub fn byte_piece(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// The parts of `TrainerSpec` that decide how text is cut; defaults as in the schema.
struct Trainer {
    model_type: u64,
    byte_fallback: bool,
    whitespace_as_suffix: bool,
}

impl Default for Trainer {
    fn default() -> Self {
        Self { model_type: 1, byte_fallback: false, whitespace_as_suffix: false }
    }
}

impl Trainer {
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut spec = Self::default();
        for field in Fields::new(bytes) {
            match field? {
                (3, Value::Varint(number)) => spec.model_type = number,
                (24, Value::Varint(number)) => spec.whitespace_as_suffix = number != 0,
                (35, Value::Varint(number)) => spec.byte_fallback = number != 0,
                _ => {}
            }
        }
        Ok(spec)
    }

    fn check(&self) -> Result<(), String> {
        let name = match self.model_type {
            2 if self.whitespace_as_suffix => return Err(unsupported("treat_whitespace_as_suffix")),
            2 => return Ok(()),
            1 => "unigram",
            3 => "word",
            4 => "char",
            _ => "unknown",
        };
        Err(unsupported(&format!("model_type {} ({name})", self.model_type)))
    }
}

/// `NormalizerSpec`; defaults as in the schema.
struct Normalizer {
    charsmap: bool,
    dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    escape_whitespaces: bool,
}

impl Default for Normalizer {
    fn default() -> Self {
        Self { charsmap: false, dummy_prefix: true, remove_extra_whitespaces: true, escape_whitespaces: true }
    }
}

impl Normalizer {
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut spec = Self::default();
        for field in Fields::new(bytes) {
            match field? {
                (2, Value::Bytes(bytes)) => spec.charsmap = !bytes.is_empty(),
                (3, Value::Varint(number)) => spec.dummy_prefix = number != 0,
                (4, Value::Varint(number)) => spec.remove_extra_whitespaces = number != 0,
                (5, Value::Varint(number)) => spec.escape_whitespaces = number != 0,
                _ => {}
            }
        }
        Ok(spec)
    }

    fn check(&self) -> Result<(), String> {
        let refused = [
            (self.charsmap, "a precompiled_charsmap (text normalisation)"),
            (self.dummy_prefix, "add_dummy_prefix"),
            (self.remove_extra_whitespaces, "remove_extra_whitespaces"),
            (!self.escape_whitespaces, "escape_whitespaces off"),
        ];
        match refused.iter().find(|(set, _)| *set) {
            Some((_, what)) => Err(unsupported(what)),
            None => Ok(()),
        }
    }
}

fn unsupported(what: &str) -> String {
    format!("it asks for {what}, which is not supported in tokenizer.model; put the tokenizer.json of the same model beside it")
}

#[derive(Clone, Copy)]
struct Entry {
    start: u32,
    len: u32,
    score: f32,
    unused: bool,
}

/// Cuts text into the ids of a [`Model`].
pub struct Bpe {
    /// The text of all pieces, one after another, and where each lies.
    text: String,
    entries: Vec<Entry>,
    /// Pieces that text can be made of, by their text.
    index: HashTable<u32>,
    hasher: RandomState,
    /// User-defined pieces: found first, and never merged.
    fixed: AhoCorasick,
    fixed_ids: Vec<u32>,
    /// Bytes in the longest piece: no longer union needs to be looked up.
    longest: usize,
    bytes: [Option<u32>; 256],
    unknown: Option<u32>,
    byte_fallback: bool,
    space_prefix: bool,
}

impl Bpe {
    /// `hidden` pieces are never made from text: those that only a chat template may write.
    pub fn new(model: &Model<'_>, hidden: impl Fn(&Piece<'_>) -> bool) -> Result<Self, String> {
        let mut bpe = Self {
            text: String::with_capacity(model.pieces.iter().map(|piece| piece.text.len()).sum()),
            entries: Vec::with_capacity(model.pieces.len()),
            index: HashTable::with_capacity(model.pieces.len()),
            hasher: RandomState::default(),
            fixed: matcher(&[])?,
            fixed_ids: Vec::new(),
            longest: 0,
            bytes: [None; 256],
            unknown: None,
            byte_fallback: model.byte_fallback,
            space_prefix: model.space_prefix,
        };
        let mut fixed = Vec::new();
        for (id, piece) in (0u32..).zip(&model.pieces) {
            let entry = Entry {
                start: bpe.text.len() as u32,
                len: piece.text.len() as u32,
                score: piece.score,
                unused: piece.kind == Kind::Unused,
            };
            bpe.text.push_str(piece.text);
            bpe.entries.push(entry);
            match piece.kind {
                Kind::Byte(byte) => bpe.bytes[byte as usize] = Some(id),
                Kind::Unknown => bpe.unknown = Some(id),
                Kind::Control => {}
                _ if hidden(piece) || piece.text.is_empty() => {}
                kind => {
                    if kind == Kind::UserDefined {
                        fixed.push(piece.text);
                        bpe.fixed_ids.push(id);
                    }
                    bpe.add(id, piece.text);
                }
            }
        }
        bpe.fixed = matcher(&fixed)?;
        let fallback_complete = bpe.bytes.iter().all(Option::is_some);
        match (bpe.byte_fallback, bpe.unknown) {
            (true, _) if !fallback_complete => Err("byte_fallback is on but a byte has no piece".into()),
            (false, None) => Err("it has neither byte_fallback nor an unknown piece".into()),
            _ => Ok(bpe),
        }
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

    /// Whether characters that no piece has become byte tokens, rather than one unknown token for a run of them.
    pub fn falls_back_to_bytes(&self) -> bool {
        self.byte_fallback
    }

    /// Appends the ids of `text`. Time is n log n in its length.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        if text.is_empty() {
            return;
        }
        let mut text = text.replace(' ', SPACE);
        if self.space_prefix {
            text.insert_str(0, SPACE);
        }
        let (mut symbols, mut unused) = (self.symbols(&text), HashMap::new());
        let mut queue = Vec::with_capacity(symbols.len());
        for right in 1..symbols.len() {
            queue.extend(self.candidate(&text, &symbols, right - 1, right, &mut unused));
        }
        let mut queue = BinaryHeap::from(queue);
        while let Some(best) = queue.pop() {
            let (left, right) = (best.left as usize, best.right as usize);
            // Stale when either side has been merged away or has grown since.
            if symbols[left].len == 0 || symbols[right].len == 0 || symbols[left].len + symbols[right].len != best.len {
                continue;
            }
            symbols[left].len = best.len;
            symbols[right].len = 0;
            symbols[left].next = symbols[right].next;
            if let Some(next) = symbols[left].next {
                symbols[next as usize].prev = Some(best.left);
                queue.extend(self.candidate(&text, &symbols, left, next as usize, &mut unused));
            }
            if let Some(prev) = symbols[left].prev {
                queue.extend(self.candidate(&text, &symbols, prev as usize, left, &mut unused));
            }
        }
        let mut at = Some(0);
        while let Some(place) = at {
            let symbol = symbols[place as usize];
            self.emit(&text[symbol.start as usize..][..symbol.len as usize], &unused, ids);
            at = symbol.next;
        }
    }

    /// One symbol for each user-defined piece, else for each character.
    fn symbols(&self, text: &str) -> Vec<Symbol> {
        let mut symbols = Vec::with_capacity(text.len() / 2);
        let mut push = |start: usize, len: usize, frozen| {
            let place = symbols.len() as u32;
            symbols.push(Symbol { start: start as u32, len: len as u32, prev: place.checked_sub(1), next: Some(place + 1), frozen });
        };
        let mut done = 0;
        let found = self.fixed.find_iter(text).map(|found| found.range()).chain(std::iter::once(text.len()..text.len()));
        for fixed in found {
            for (offset, character) in text[done..fixed.start].char_indices() {
                push(done + offset, character.len_utf8(), false);
            }
            if !fixed.is_empty() {
                push(fixed.start, fixed.len(), true);
            }
            done = fixed.end;
        }
        if let Some(last) = symbols.last_mut() {
            last.next = None;
        }
        symbols
    }

    /// The merge of two neighbours, if their union is a piece.
    fn candidate(&self, text: &str, symbols: &[Symbol], left: usize, right: usize, unused: &mut HashMap<u32, usize>) -> Option<Candidate> {
        let (a, b) = (symbols[left], symbols[right]);
        let len = a.len + b.len;
        if a.frozen || b.frozen || len as usize > self.longest {
            return None;
        }
        let id = self.find(&text[a.start as usize..][..len as usize])?;
        let entry = self.entries[id as usize];
        if entry.unused {
            unused.insert(id, a.len as usize);
        }
        Some(Candidate { score: entry.score, left: left as u32, right: right as u32, len })
    }

    /// The ids of one symbol. Unused pieces only serve as steps to greater ones: what is left of them is taken apart again.
    fn emit(&self, symbol: &str, unused: &HashMap<u32, usize>, ids: &mut Vec<u32>) {
        match self.find(symbol) {
            Some(id) => match unused.get(&id) {
                Some(&cut) if cut < symbol.len() => {
                    self.emit(&symbol[..cut], unused, ids);
                    self.emit(&symbol[cut..], unused, ids);
                }
                _ => ids.push(id),
            },
            None if self.byte_fallback => ids.extend(symbol.bytes().filter_map(|byte| self.bytes[byte as usize])),
            // A run of unknown characters is one unknown token.
            None => {
                if let Some(unknown) = self.unknown
                    && ids.last() != Some(&unknown)
                {
                    ids.push(unknown);
                }
            }
        }
    }
}

fn piece_text<'a>(text: &'a str, entries: &[Entry], id: u32) -> &'a str {
    let entry = entries[id as usize];
    &text[entry.start as usize..][..entry.len as usize]
}

fn matcher(patterns: &[&str]) -> Result<AhoCorasick, String> {
    AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(patterns).map_err(|error| format!("user-defined pieces: {error}"))
}

#[derive(Clone, Copy)]
struct Symbol {
    start: u32,
    /// 0 once it has been merged into its left neighbour.
    len: u32,
    prev: Option<u32>,
    next: Option<u32>,
    frozen: bool,
}

struct Candidate {
    score: f32,
    left: u32,
    right: u32,
    /// Bytes of the union.
    len: u32,
}

impl Ord for Candidate {
    /// Greatest score first, then the leftmost.
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then_with(|| other.left.cmp(&self.left))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}
