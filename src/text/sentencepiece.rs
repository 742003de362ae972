//! SentencePiece: reads `tokenizer.model` and cuts text into pieces exactly as the SentencePiece library does.
//!
//! Of our own rather than a table of merges for the `tokenizers` crate, since it is what SentencePiece itself does (join the two
//! neighbours whose union is the piece of greatest score; of unigrams the way with the greatest sum) and loads a vocabulary of 100,000 pieces
//! in some milliseconds: the merge table alone would cost a good part of a cold start.
//!
//! Only what can be honoured to the letter is accepted: BPE and unigram models with spaces written as blocks. Anything else is refused.

mod bpe;
mod normalizer;
mod pieces;
mod unigram;

pub use bpe::Bpe;
use normalizer::Normalizer;
pub use normalizer::NormalizerSpec;
pub use pieces::Pieces;
use unigram::Unigram;

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

/// How pieces are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    Bpe,
    Unigram,
}

/// A parsed `tokenizer.model`, borrowing the file's bytes.
pub struct Model<'a> {
    pub pieces: Vec<Piece<'a>>,
    pub algorithm: Algorithm,
    pub normalizer: NormalizerSpec<'a>,
    byte_fallback: bool,
}

impl<'a> Model<'a> {
    /// Reads a `ModelProto`. The error says what is wrong with the file, or which of its settings this build does not do.
    pub fn parse(file: &'a [u8]) -> Result<Self, String> {
        let (mut pieces, mut trainer, mut normalizer) = (Vec::new(), Trainer::default(), NormalizerSpec::default());
        for field in Fields::new(file) {
            match field? {
                (1, Value::Bytes(bytes)) => pieces.push(parse_piece(bytes).map_err(|error| format!("piece {}: {error}", pieces.len()))?),
                (2, Value::Bytes(bytes)) => trainer = Trainer::parse(bytes)?,
                (3, Value::Bytes(bytes)) => normalizer = parse_normalizer(bytes)?,
                _ => {}
            }
        }
        if pieces.is_empty() {
            return Err("it holds no pieces: not a SentencePiece model, or cut off".into());
        }
        Ok(Self { pieces, algorithm: trainer.algorithm()?, normalizer, byte_fallback: trainer.byte_fallback })
    }

    /// A vocabulary that came another way.
    pub fn of_pieces(pieces: Vec<Piece<'a>>, algorithm: Algorithm, normalizer: NormalizerSpec<'a>) -> Self {
        let byte_fallback = pieces.iter().any(|piece| matches!(piece.kind, Kind::Byte(_)));
        Self { pieces, algorithm, normalizer, byte_fallback }
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

    fn algorithm(&self) -> Result<Algorithm, String> {
        let name = match self.model_type {
            1 | 2 if self.whitespace_as_suffix => return Err(unsupported("treat_whitespace_as_suffix")),
            1 => return Ok(Algorithm::Unigram),
            2 => return Ok(Algorithm::Bpe),
            3 => "word",
            4 => "char",
            _ => "unknown",
        };
        Err(unsupported(&format!("model_type {} ({name})", self.model_type)))
    }
}

/// A `NormalizerSpec`.
fn parse_normalizer(bytes: &[u8]) -> Result<NormalizerSpec<'_>, String> {
    let mut spec = NormalizerSpec::default();
    for field in Fields::new(bytes) {
        match field? {
            (2, Value::Bytes(bytes)) => spec.charsmap = bytes.into(),
            (3, Value::Varint(number)) => spec.dummy_prefix = number != 0,
            (4, Value::Varint(number)) => spec.remove_extra_whitespaces = number != 0,
            (5, Value::Varint(0)) => return Err(unsupported("escape_whitespaces off")),
            _ => {}
        }
    }
    Ok(spec)
}

fn unsupported(what: &str) -> String {
    format!("it asks for {what}, which is not supported in tokenizer.model; put the tokenizer.json of the same model beside it")
}

/// Cuts text into the ids of a [`Model`].
pub struct Encoder {
    pieces: Pieces,
    normalizer: Normalizer,
    cutter: Cutter,
    bytes: [Option<u32>; 256],
    unknown: Option<u32>,
    byte_fallback: bool,
}

enum Cutter {
    Bpe(Bpe),
    Unigram(Unigram),
}

impl Encoder {
    /// `hidden` pieces are never made from text: those that only a chat template may write.
    pub fn new(model: &Model<'_>, hidden: impl Fn(&Piece<'_>) -> bool) -> Result<Self, String> {
        let is_fixed = |piece: &&Piece<'_>| piece.kind == Kind::UserDefined && !piece.text.is_empty() && !hidden(piece);
        let fixed: Vec<&str> = model.pieces.iter().filter(is_fixed).map(|piece| piece.text).collect();
        let cutter = match model.algorithm {
            Algorithm::Bpe => Cutter::Bpe(Bpe::new(&fixed)?),
            Algorithm::Unigram => Cutter::Unigram(Unigram::new(&model.pieces, &hidden)?),
        };
        let mut encoder = Self {
            pieces: Pieces::new(&model.pieces, hidden),
            normalizer: Normalizer::new(&model.normalizer, &fixed)?,
            cutter,
            bytes: [None; 256],
            unknown: None,
            byte_fallback: model.byte_fallback,
        };
        for (id, piece) in (0u32..).zip(&model.pieces) {
            match piece.kind {
                Kind::Byte(byte) => encoder.bytes[byte as usize] = Some(id),
                Kind::Unknown => encoder.unknown = Some(id),
                _ => {}
            }
        }
        match (encoder.byte_fallback, encoder.unknown) {
            (true, _) if encoder.bytes.contains(&None) => Err("byte_fallback is on but a byte has no piece".into()),
            (false, None) => Err("it has neither byte_fallback nor an unknown piece".into()),
            _ => Ok(encoder),
        }
    }

    /// Appends the ids of `text`. `begins`: a space may be put before it.
    pub fn encode(&self, text: &str, begins: bool, ids: &mut Vec<u32>) {
        let (text, from) = (self.normalizer.normalize(text, begins), ids.len());
        let emit = |piece: &str, id: Option<u32>| match (id, self.unknown) {
            (Some(id), _) => ids.push(id),
            _ if self.byte_fallback => ids.extend(piece.bytes().filter_map(|byte| self.bytes[byte as usize])),
            // A run of unknown characters is one unknown token.
            (None, Some(unknown)) if ids[from..].last() != Some(&unknown) => ids.push(unknown),
            _ => {}
        };
        match &self.cutter {
            Cutter::Bpe(bpe) => bpe.cut(&self.pieces, &text, emit),
            Cutter::Unigram(unigram) => unigram.cut(&text, emit),
        }
    }

    /// The id of the piece written `token`, whatever its kind.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.pieces.id_of(token)
    }

    /// Whether every byte of a text is one of its tokens': characters that no piece has become byte tokens, and nothing is replaced.
    pub fn is_lossless(&self) -> bool {
        self.byte_fallback && self.normalizer.is_lossless()
    }
}
