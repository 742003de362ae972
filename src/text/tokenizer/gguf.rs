//! The tokenizer in the metadata of a GGUF file: SentencePiece BPE (`llama`) or BPE over bytes (`gpt2`), cut as llama.cpp cuts, or unigrams
//! (`t5`) and WordPiece (`bert`), cut as the models' own libraries do.

use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizer::SplitDelimiterBehavior;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};

use super::AroundPair;
use super::pre_tokenizers::{Pre, pre_tokenizer};
use super::wordpiece;
use crate::checkpoint::gguf::{Header, Value};
use crate::text::sentencepiece::{self, Algorithm, Kind, NormalizerSpec, Piece, byte_piece};

/// `tokenizer.ggml.token_type`.
const NORMAL: u64 = 1;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const UNUSED: u64 = 5;

/// What a file's metadata holds.
pub enum Vocabulary<'a> {
    SentencePiece(sentencepiece::Model<'a>),
    Library(Box<tokenizers::Tokenizer>),
}

/// Reads the vocabulary. Kinds of tokenizers that are not known are refused by their names.
pub fn read<'a>(header: &Header<'a>) -> Result<Vocabulary<'a>, String> {
    let library = |tokenizer| Vocabulary::Library(Box::new(tokenizer));
    match header.text("tokenizer.ggml.model")? {
        Some("llama") => sentencepiece(header, Algorithm::Bpe).map(Vocabulary::SentencePiece),
        Some("t5") => sentencepiece(header, Algorithm::Unigram).map(Vocabulary::SentencePiece),
        Some("gpt2") => bytes(header).map(library),
        Some("bert") => wordpiece::read(header, &tokens(header)?).map(library),
        Some(other) => Err(format!(
            "tokenizer.ggml.model \"{other}\" is not supported (llama, t5, gpt2 and bert are); set TOKENIZER to a model with a tokenizer.json"
        )),
        None => Err("it has no tokenizer (tokenizer.ggml.model); set TOKENIZER to a model with one".to_owned()),
    }
}

/// What the metadata wants around a text, beyond the token at its beginning that the configuration has, and around two texts.
pub fn around(header: &Header<'_>) -> Result<(Vec<u32>, AroundPair), String> {
    let flag = |key: &str, default| header.flag(key).map(|flag| flag.unwrap_or(default));
    let id = |key: &str, wanted: bool| -> Result<Vec<u32>, String> {
        let id = if wanted { header.integer(key)? } else { None };
        Ok(id.into_iter().map(|id| id as u32).collect())
    };
    let unigram = header.text("tokenizer.ggml.model")? == Some("t5");
    let after = id("tokenizer.ggml.eos_token_id", flag("tokenizer.ggml.add_eos_token", unigram)?)?;
    let before = id("tokenizer.ggml.bos_token_id", flag("tokenizer.ggml.add_bos_token", false)?)?;
    if !unigram {
        return Ok((after, AroundPair::default()));
    }
    let between = [&after[..], &after[..]].concat();
    Ok((after.clone(), AroundPair { before, between, after, has_types: false }))
}

/// Each token's text and type, in the order of ids.
fn tokens<'a>(header: &Header<'a>) -> Result<Vec<(&'a str, u64)>, String> {
    let tokens = header.array("tokenizer.ggml.tokens")?.ok_or("metadata \"tokenizer.ggml.tokens\" is missing")?;
    let types = header.array("tokenizer.ggml.token_type")?;
    if let Some(types) = types.filter(|types| types.len != tokens.len) {
        return Err(format!("metadata \"tokenizer.ggml.token_type\" has {} values, and there are {} tokens", types.len, tokens.len));
    }
    let mut types = types.into_iter().flat_map(|types| types.iter());
    let token = |(id, token): (usize, Value<'a>)| {
        let text = token.text().ok_or("metadata \"tokenizer.ggml.tokens\" must hold strings")?;
        let kind = types.next().map_or(Some(NORMAL), Value::integer).filter(|kind| *kind <= 6);
        Ok((text, kind.ok_or_else(|| format!("metadata \"tokenizer.ggml.token_type\": the type of token {id} is not known"))?))
    };
    let mut tokens = tokens.iter().enumerate().map(token).collect::<Result<Vec<_>, String>>()?;
    // What the converter writes for rows of the embedding that have no token.
    while tokens.last().is_some_and(|(text, kind)| *kind == UNUSED && text.starts_with("[PAD")) {
        tokens.pop();
    }
    Ok(tokens)
}

fn sentencepiece<'a>(header: &Header<'a>, algorithm: Algorithm) -> Result<sentencepiece::Model<'a>, String> {
    let tokens = tokens(header)?;
    let scores = header.array("tokenizer.ggml.scores")?.filter(|scores| scores.len >= tokens.len());
    let scores =
        scores.ok_or_else(|| format!("metadata \"tokenizer.ggml.scores\" must have a score for each of the {} tokens", tokens.len()))?;
    let piece = |((text, kind), score): ((&'a str, u64), Value<'a>)| {
        let kind = match kind {
            0 | NORMAL => Kind::Normal,
            2 => Kind::Unknown,
            CONTROL => Kind::Control,
            USER_DEFINED => Kind::UserDefined,
            UNUSED => Kind::Unused,
            _ => Kind::Byte(byte_piece(text).ok_or_else(|| format!("token {text:?} is marked as a byte but not written <0xNN>"))?),
        };
        let score = score.number().ok_or("metadata \"tokenizer.ggml.scores\" must hold numbers")? as f32;
        Ok(Piece { text, score, kind })
    };
    let pieces = tokens.into_iter().zip(scores.iter()).map(piece).collect::<Result<Vec<_>, String>>()?;
    let dummy_prefix = header.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(algorithm == Algorithm::Bpe);
    let mut normalizer = NormalizerSpec { charsmap: Default::default(), dummy_prefix, remove_extra_whitespaces: false };
    if algorithm != Algorithm::Bpe {
        normalizer.charsmap = charsmap(header)?.into();
        normalizer.remove_extra_whitespaces = header.flag("tokenizer.ggml.remove_extra_whitespaces")?.unwrap_or(false);
        if normalizer.remove_extra_whitespaces && !dummy_prefix {
            // llama.cpp then puts a space before texts all the same, which the models do not.
            return Err("tokenizer.ggml.remove_extra_whitespaces without add_space_prefix is not supported".to_owned());
        }
    }
    Ok(sentencepiece::Model::of_pieces(pieces, algorithm, normalizer))
}

fn charsmap(header: &Header<'_>) -> Result<Vec<u8>, String> {
    let Some(array) = header.array("tokenizer.ggml.precompiled_charsmap")? else { return Ok(Vec::new()) };
    let byte = |value| match value {
        Value::Unsigned(number) => u8::try_from(number).ok(),
        Value::Signed(number) => i8::try_from(number).ok().map(i8::cast_unsigned),
        _ => None,
    };
    let bytes: Option<Vec<u8>> = array.iter().map(byte).collect();
    bytes.ok_or_else(|| "metadata \"tokenizer.ggml.precompiled_charsmap\" must hold bytes".to_owned())
}

fn bytes(header: &Header<'_>) -> Result<tokenizers::Tokenizer, String> {
    // Files from before there were names for them.
    let name = header.text("tokenizer.ggml.pre")?.unwrap_or("default");
    let pre = pre_tokenizer(name)
        .ok_or_else(|| format!("tokenizer.ggml.pre \"{name}\" is not supported; set TOKENIZER to the model that the file was made of"))?;
    let tokens = tokens(header)?;
    let vocab: Vocab = (0u32..).zip(&tokens).map(|(id, (text, _))| ((*text).to_owned(), id)).collect();
    let merges = header.array("tokenizer.ggml.merges")?.ok_or("metadata \"tokenizer.ggml.merges\" is missing")?;
    let merges = merges.iter().map(|merge| pair(merge, &vocab)).filter_map(Result::transpose).collect::<Result<Vec<_>, String>>()?;
    let wrong = |error: tokenizers::Error| format!("its vocabulary cannot be read: {error}");
    let bpe = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(pre.ignore_merges).build().map_err(wrong)?;
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(splits(pre).map_err(wrong)?));
    tokenizer.with_decoder(Some(ByteLevel::new(false, false, false)));
    let added = |wanted: u64, special: bool| {
        let tokens = tokens.iter().filter(move |(text, kind)| *kind == wanted && !text.is_empty());
        tokens.map(move |(text, _)| AddedToken::from(*text, special).normalized(false)).collect::<Vec<_>>()
    };
    tokenizer.add_special_tokens(added(CONTROL, true)).map_err(wrong)?;
    tokenizer.add_tokens(added(USER_DEFINED, false)).map_err(wrong)?;
    Ok(tokenizer)
}

/// Both sides of a merge; `None`: what it would make is no token, so that it never happens.
fn pair(merge: Value<'_>, vocab: &Vocab) -> Result<Option<(String, String)>, String> {
    let text = merge.text().ok_or("metadata \"tokenizer.ggml.merges\" must hold strings")?;
    // A space of a token's own is written otherwise, but for a first character nobody promises that.
    let space = text.char_indices().skip(1).find(|(_, character)| *character == ' ').map(|(at, _)| at);
    let (left, right) =
        space.map(|at| (&text[..at], &text[at + 1..])).ok_or_else(|| format!("metadata \"tokenizer.ggml.merges\": {text:?} is no pair"))?;
    let whole = format!("{left}{right}");
    let is_known = [left, right, whole.as_str()].iter().all(|token| vocab.contains_key(*token));
    Ok(is_known.then(|| (left.to_owned(), right.to_owned())))
}

fn splits(pre: &Pre) -> Result<PreTokenizerWrapper, tokenizers::Error> {
    let split = |regex: &&str| {
        let pattern = SplitPattern::Regex((*regex).to_owned());
        Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map(PreTokenizerWrapper::from)
    };
    let mut steps = pre.regexes.iter().map(split).collect::<Result<Vec<_>, _>>()?;
    steps.push(ByteLevel::new(false, false, false).into());
    Ok(Sequence::new(steps).into())
}
