//! Text to token ids and back.
//!
//! Several ways lead to a [`Tokenizer`]: a `tokenizer.json`, run by the `tokenizers` crate ([`json`]), else Mistral's `tekken.json`
//! ([`tekken`]), else a SentencePiece `tokenizer.model` with the special tokens that the files beside it name
//! ([`crate::text::sentencepiece`], [`added`]), else a file of ranks in tiktoken's form ([`tiktoken`]), else the metadata of a GGUF file
//! ([`gguf`]), which becomes the first or the third.

use std::ops::Range;

use aho_corasick::{AhoCorasick, Input, MatchKind};

use crate::checkpoint::files::{ModelFiles, SENTENCEPIECE_FILES, TEKKEN, TOKENIZERS, is_tiktoken};
use crate::checkpoint::gguf::{File, Header, TOKENIZER};
use crate::error::Failure;
use crate::models::Vocabulary;
use crate::text::sentencepiece;

mod added;
mod gguf;
mod json;
mod least;
mod pre_tokenizers;
mod ranks;
mod tekken;
mod tiktoken;
mod token_bytes;
mod wordpiece;

use added::Added;
use least::{Coverage, Spelling};
use ranks::Ranks;
use token_bytes::TokenBytes;

/// How strings that spell a special token are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// As the control token they name.
    Control,
    /// As plain text.
    Text,
}

/// A part of a text: plain, or one special token.
struct Part {
    range: Range<usize>,
    token: Option<u32>,
}

/// What a post-processor puts around two texts.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct AroundPair {
    pub before: Vec<u32>,
    pub between: Vec<u32>,
    pub after: Vec<u32>,
    /// The second text, with what comes after it, is of another type.
    pub has_types: bool,
}

/// A model's vocabulary and merges.
pub struct Tokenizer {
    encoder: Encoder,
    bytes: TokenBytes,
    added: Added,
    matcher: AhoCorasick,
    vocabulary: Vocabulary,
    coverage: Coverage,
    around: Around,
}

/// What is put around texts.
#[derive(Default)]
struct Around {
    before: Vec<u32>,
    after: Vec<u32>,
    pair: AroundPair,
}

enum Encoder {
    SentencePiece {
        encoder: Box<sentencepiece::Encoder>,
        /// The space before a text's first word stands before the whole of it only, not behind each special token too.
        once: bool,
    },
    Ranks(Box<Ranks>),
    Json(Box<json::Json>),
}

impl Tokenizer {
    /// From the first that there is of `tokenizer.json`, `tekken.json`, `tokenizer.model` (SentencePiece, or ranks), a file of ranks, a GGUF
    /// file.
    pub fn load(files: &ModelFiles) -> Result<Self, Failure> {
        let named = |file: &str| {
            let file = file.to_owned();
            move |error: String| Failure::internal(format!("{file} of {}: {error}", files.name))
        };
        if let Some(bytes) = files.read("tokenizer.json")? {
            return json::load(&bytes).and_then(Self::of_json).map_err(named("tokenizer.json"));
        }
        if let Some(bytes) = files.read(TEKKEN)? {
            return tekken::read(&bytes).and_then(Self::of_ranks).map_err(named(TEKKEN));
        }
        let ranks = files.iter().map(|(name, _)| name).filter(|name| is_tiktoken(name));
        for file in SENTENCEPIECE_FILES.into_iter().chain(ranks) {
            let Some(bytes) = files.read(file)? else { continue };
            if is_tiktoken(file) || tiktoken::is_ranks(&bytes) {
                return Self::of_ranks(tiktoken::read(file, &bytes, files)?).map_err(named(file));
            }
            let mut model = sentencepiece::Model::parse(&bytes).map_err(named(file))?;
            let added = Added::beside_sentencepiece(&model, files)?;
            let config = files.read_json("tokenizer_config.json")?.unwrap_or_default();
            let is_off = |key: &str| config.get(key).and_then(serde_json::Value::as_bool) == Some(false);
            model.normalizer.dummy_prefix &= !is_off("add_prefix_space");
            return Self::of_sentencepiece(&model, added, is_off("legacy")).map_err(named(file));
        }
        if let Some(source) = files.get(TOKENIZER) {
            let file = File::open(source)?;
            return file.header().and_then(|header| Self::of_gguf(&header)).map_err(named("the tokenizer in the GGUF file"));
        }
        Err(Failure::internal(format!("model {} ({}) has no tokenizer: put its {TOKENIZERS} beside its weights", files.name, files.origin)))
    }

    fn of_gguf(header: &Header<'_>) -> Result<Self, String> {
        let mut tokenizer = match gguf::read(header)? {
            gguf::Vocabulary::SentencePiece(model) => Self::of_sentencepiece(&model, Added::of_pieces(&model), false)?,
            gguf::Vocabulary::Library(tokenizer) => Self::of_json(json::of(*tokenizer)?)?,
        };
        if tokenizer.around.after.is_empty() {
            let (after, pair) = gguf::around(header)?;
            tokenizer.around = Around { before: pair.before.clone(), after, pair };
        }
        Ok(tokenizer)
    }

    fn of_json((json, bytes, added): (json::Json, TokenBytes, Added)) -> Result<Self, String> {
        let vocabulary = vocabulary(&bytes, &added, 0);
        let (before, after) = json.around.clone();
        let around = Around { before, after, pair: json.around_pair.clone() };
        Ok(Self { around, ..Self::assemble(Encoder::Json(Box::new(json)), bytes, added, vocabulary)? })
    }

    fn of_ranks(ranks: ranks::Vocabulary) -> Result<Self, String> {
        let bytes = ranks.bytes();
        let vocabulary = vocabulary(&bytes, &ranks.added, 0);
        let around = Around { before: ranks.before, ..Around::default() };
        Ok(Self { around, ..Self::assemble(Encoder::Ranks(Box::new(ranks.ranks)), bytes, ranks.added, vocabulary)? })
    }

    fn of_sentencepiece(model: &sentencepiece::Model<'_>, added: Added, once: bool) -> Result<Self, String> {
        let encoder = Box::new(sentencepiece::Encoder::new(model, |piece| added.id(piece.text).is_some())?);
        let bytes = TokenBytes::of_sentencepiece(model, &added);
        let vocabulary = vocabulary(&bytes, &added, model.pieces.len());
        let tokenizer = Self::assemble(Encoder::SentencePiece { encoder, once }, bytes, added, vocabulary)?;
        if model.pieces.len() == ernie::PIECES {
            ernie::self_test(&tokenizer);
        }
        Ok(tokenizer)
    }

    fn assemble(encoder: Encoder, bytes: TokenBytes, added: Added, vocabulary: Vocabulary) -> Result<Self, String> {
        let matcher = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(added.names())
            .map_err(|error| format!("its special tokens cannot be searched for: {error}"))?;
        let spelling = match &encoder {
            Encoder::SentencePiece { encoder, .. } => {
                encoder.is_lossless().then_some(Spelling { shrinks: 1, blocks: true, swallows_space: false })
            }
            Encoder::Ranks(_) => Some(Spelling { shrinks: 1, blocks: false, swallows_space: false }),
            Encoder::Json(json) => json.spelling,
        };
        let coverage = Coverage::new(&bytes, spelling);
        Ok(Self { encoder, bytes, added, matcher, vocabulary, coverage, around: Around::default() })
    }

    /// Token ids of `text`. No token is added around it.
    ///
    /// [`Special::Control`]: where several special tokens match, the leftmost and longest wins, and the text between
    /// them is cut on its own. [`Special::Text`]: no id that [`Self::special_tokens`] names ever comes out.
    pub fn encode(&self, text: &str, special: Special) -> Result<Vec<u32>, Failure> {
        match (&self.encoder, special) {
            // The crate knows each added token's own whitespace rules.
            (Encoder::Json(json), Special::Control) => json.encode_control(text),
            (_, Special::Control) => self.encode_except(text, &[]),
            (_, Special::Text) => self.encode_parts(text, &[Part { range: 0..text.len(), token: None }]),
        }
    }

    /// Like [`Special::Control`], but what lies in `plain` (byte ranges, ascending, apart) is plain text whatever it spells. Elsewhere than
    /// at special tokens text is not cut at the edges of `plain`, so ids are those of the whole text.
    ///
    /// For a rendered chat template, where only the template may write control tokens and the ranges are what users wrote.
    pub fn encode_except(&self, text: &str, plain: &[Range<usize>]) -> Result<Vec<u32>, Failure> {
        let mut parts = Vec::new();
        let (mut done, mut from) = (0, 0);
        for gap in plain.iter().cloned().chain(std::iter::once(text.len()..text.len())) {
            for found in self.matcher.find_iter(Input::new(text).range(from..gap.start)) {
                let id = self.added.ids()[found.pattern().as_usize()];
                let Some(reach) = self.reach(id, text, done, found.range()) else { continue };
                parts.push(Part { range: done..reach.start, token: None });
                done = reach.end;
                parts.push(Part { range: reach, token: Some(id) });
            }
            from = gap.end;
        }
        parts.push(Part { range: done..text.len(), token: None });
        self.encode_parts(text, &parts)
    }

    /// What a special token found at `found` takes of the text, of which `done` bytes are used up: some take the spaces beside them too, and
    /// some are none inside a word.
    fn reach(&self, id: u32, text: &str, done: usize, found: Range<usize>) -> Option<Range<usize>> {
        let Encoder::Json(json) = &self.encoder else { return Some(found) };
        json.reach(id, text, found).map(|reach| reach.start.max(done)..reach.end)
    }

    fn encode_parts(&self, text: &str, parts: &[Part]) -> Result<Vec<u32>, Failure> {
        match &self.encoder {
            Encoder::SentencePiece { encoder, once } => Ok(Self::each_part(parts, |part, ids| {
                encoder.encode(&text[part.clone()], !once || part.start == 0, ids);
            })),
            Encoder::Ranks(ranks) => Ok(Self::each_part(parts, |part, ids| ranks.encode(&text[part], ids))),
            Encoder::Json(json) => json.encode_parts(text, parts, &|piece, tokens| {
                // The model itself (Unigram, WordLevel …) may have the special token's text as a piece: cut the text inside it.
                tokens.iter().any(|id| self.added.contains(*id)).then(|| {
                    let inside = |start: usize| start + piece[start..].chars().next().map_or(0, char::len_utf8);
                    self.matcher.find_iter(piece).map(|found| inside(found.start())).collect()
                })
            }),
        }
    }

    /// The special tokens of `parts`, and between them what `encode` makes of plain ones.
    fn each_part(parts: &[Part], encode: impl Fn(Range<usize>, &mut Vec<u32>)) -> Vec<u32> {
        let mut ids = Vec::new();
        for part in parts.iter().filter(|part| !part.range.is_empty()) {
            match part.token {
                Some(id) => ids.push(id),
                None => encode(part.range.clone(), &mut ids),
            }
        }
        ids
    }

    /// What the tokenizer's own rules (the post-processor of `tokenizer.json`) put before and after a text: mostly the
    /// beginning-of-sequence token.
    pub fn added_around(&self) -> (&[u32], &[u32]) {
        (&self.around.before, &self.around.after)
    }

    /// The same for two texts that are read together.
    pub fn around_pair(&self) -> &AroundPair {
        &self.around.pair
    }

    /// The tokens whose ids are `rows` or more, with their text.
    pub fn tokens_from(&self, rows: usize) -> impl Iterator<Item = (u32, String)> {
        let ids = rows..self.bytes.len();
        ids.filter_map(|id| Some((id as u32, String::from_utf8_lossy(self.bytes.get(id as u32)?).into_owned())))
    }

    /// The bytes a token stands for in running text (`▁the` → ` the`, `<0xE4>` → E4); `None` for ids without a token.
    /// For special tokens: the bytes of their name.
    ///
    /// Text is the concatenation of its tokens' bytes. That is exact for SentencePiece, ByteFallback, ByteLevel, Metaspace and Fuse decoders
    /// (a space that such a decoder strips at the very start of a text is kept: what a model writes is never the start, it follows a
    /// prompt). For WordPiece and suffix decoders it is exact but for their clean-up of spaces around punctuation. Other decoders are refused at load.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.bytes.get(id)
    }

    /// A control token: hidden from text unless the request says `skip_special_tokens: false`.
    pub fn is_special(&self, id: u32) -> bool {
        self.added.is_special(id)
    }

    /// The id of the token written `token` in the vocabulary (`▁the`, `<0x0A>`, `</s>`).
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.added.id(token).or_else(|| match &self.encoder {
            Encoder::SentencePiece { encoder, .. } => encoder.id_of(token),
            Encoder::Ranks(ranks) => ranks.id_of(token),
            Encoder::Json(json) => json.id(token),
        })
    }

    /// Some tokenizers begin every text with a space, which is none of it.
    pub fn begins_with_space(&self) -> Result<bool, Failure> {
        let ids = self.encode("a", Special::Text)?;
        Ok(ids.first().and_then(|id| self.token_bytes(*id)).is_some_and(|bytes| bytes.starts_with(b" ")))
    }

    /// However `text` is encoded, it has at least so many tokens. Takes a few milliseconds for ten megabytes, where encoding takes seconds.
    /// 0 where nothing can be promised.
    pub fn least_tokens(&self, text: &str) -> usize {
        self.coverage.least_tokens(text)
    }

    /// The most bytes of a text that one token stands for, where that is bounded.
    pub fn longest_token(&self) -> Option<usize> {
        self.coverage.longest()
    }

    /// Ids from here on have no token that a model may write. ERNIE's placeholders (`<|IMAGE_PLACEHOLDER|>`, `<|LOC_0|>` …) lie above it.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.size
    }

    /// The ids that a model may write.
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    /// The text of every token that [`Special::Control`] looks for, longest first: control tokens, and markup such as `<think>`
    /// that is visible ([`Self::is_special`] is false) but not for users to write.
    pub fn special_tokens(&self) -> &[String] {
        self.added.names()
    }
}

/// Of the first `pieces` ids even a placeholder is one to write: it is a piece like the others.
fn vocabulary(bytes: &TokenBytes, added: &Added, pieces: usize) -> Vocabulary {
    let has_token = |id: usize| bytes.get(id as u32).is_some() && (id < pieces || !added.is_placeholder(id as u32));
    let size = (0..bytes.len()).rfind(|id| has_token(*id)).map_or(0, |last| last + 1).max(pieces);
    Vocabulary { size, unassigned: (0..size).filter(|id| !has_token(*id)).map(|id| id as u32).collect() }
}

/// ERNIE 4.5's own vocabulary, which no test of ours can have: checked whenever it is loaded.
mod ernie {
    use super::{Special, Tokenizer};

    pub const PIECES: usize = 100_295;

    /// Texts and their ids, from the tests of Hugging Face transformers.
    const GOLDEN: &[(&str, &[u32])] = &[
        ("This is a test", &[1720, 357, 274, 1167]),
        ("The following string should be properly encoded: Hello.", &[700, 1997, 1530, 1189, 390, 10962, 20622, 93963, 30802, 93937]),
        ("But ird and ปี   ird   ด", &[2398, 93919, 2080, 326, 93919, 81175, 1111, 2080, 1111, 95676]),
        ("A sample test", &[93957, 3983, 1167]),
        (
            "Hey<eos>. \t\t \n\nyou  é  @#😈  🤗!       , 1234 15 5,61",
            &[
                25027, 93953, 92335, 6140, 93919, 22, 22, 93919, 23, 23, 5557, 269, 94039, 269, 94027, 93993, 253, 172, 165, 149, 269, 253,
                172, 177, 164, 94018, 426, 1089, 93919, 4, 5, 6, 7, 93919, 4, 8, 93919, 8, 93938, 9, 4,
            ],
        ),
        (" ", &[93919]),
        ("  ", &[269]),
        (" Hello", &[30802]),
        ("hello", &[18830]),
        ("lekacy", &[17289, 3004]),
        ("<s>", &[1]),
        ("<s> Hello<s>how", &[1, 30802, 1, 7413]),
        (" <s> Hello<s> how", &[93919, 1, 30802, 1, 1299]),
        ("<|begin_of_sentence|>User: Hello!\n", &[100_273, 2969, 93963, 30802, 94018, 23]),
        ("Assistant: ", &[92267, 93963, 93919]),
    ];

    /// Says in the log where this vocabulary is not the published one, or where we cut it otherwise than the reference.
    pub fn self_test(tokenizer: &Tokenizer) {
        for (text, expected) in GOLDEN {
            match tokenizer.encode(text, Special::Control) {
                Ok(ids) if ids == *expected => {}
                Ok(ids) => tracing::warn!(text, ?ids, ?expected, "the tokenizer differs from published ERNIE 4.5 encodings"),
                Err(error) => tracing::warn!(text, %error, "the tokenizer fails on a published ERNIE 4.5 encoding"),
            }
        }
    }
}

#[cfg(test)]
mod library_tests;
#[cfg(test)]
mod tests;
