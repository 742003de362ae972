//! `tokenizer.json`, run by the `tokenizers` crate.

use std::collections::HashMap;
use std::ops::Range;

use serde_json::Value;
use tokenizers::{
    AddedToken, Encoding, Model, ModelWrapper, Normalizer, OffsetReferential, OffsetType, PostProcessor, PreTokenizedString, PreTokenizer,
    Token, normalizer,
};

use crate::error::Failure;
use crate::text::sentencepiece::byte_piece;
use crate::text::tokenizer::added::Added;
use crate::text::tokenizer::least::Spelling;
use crate::text::tokenizer::token_bytes::TokenBytes;
use crate::text::tokenizer::{AroundPair, Part};

pub struct Json {
    inner: tokenizers::Tokenizer,
    added: HashMap<u32, AddedToken>,
    /// What the post-processor puts before and after a text.
    pub around: (Vec<u32>, Vec<u32>),
    pub around_pair: AroundPair,
    /// `None`: tokens may stand for any amount of text.
    pub spelling: Option<Spelling>,
}

/// Where to cut a piece of text that must not become these tokens.
type Cuts<'a> = &'a dyn Fn(&str, &[u32]) -> Option<Vec<usize>>;

/// The tokenizer, what each token reads as, and its added vocabulary.
pub fn load(file: &[u8]) -> Result<(Json, TokenBytes, Added), String> {
    let inner = tokenizers::Tokenizer::from_bytes(file).map_err(|error| format!("not a tokenizer that can be read: {error}"))?;
    of(inner)
}

/// The same of a tokenizer that came another way.
pub fn of(mut inner: tokenizers::Tokenizer) -> Result<(Json, TokenBytes, Added), String> {
    // Lengths are for the server to limit, with an error that says so.
    inner.with_truncation(None).map_err(|error| error.to_string())?;
    inner.with_padding(None);
    let added: HashMap<u32, AddedToken> = inner.get_added_tokens_decoder().into_iter().collect();
    let (around, around_pair) = (around(&inner)?, around_pair(&inner));
    let steps = decoder_steps(&inner)?;
    let mut bytes = TokenBytes::default();
    let alphabet = byte_level_alphabet();
    for (token, id) in inner.get_vocab(true) {
        match added.get(&id) {
            Some(added) => bytes.set(id, added.content.as_bytes()),
            None => bytes.set(id, &running_text(token, &steps, &alphabet)),
        }
    }
    let names = Added::new(added.iter().map(|(id, token)| (token.content.clone(), *id, token.special)));
    let spelling = spelling(&inner);
    Ok((Json { inner, added, around, around_pair, spelling }, bytes, names))
}

/// What the post-processor puts around a single text, told by one that stands for any.
fn around(inner: &tokenizers::Tokenizer) -> Result<(Vec<u32>, Vec<u32>), String> {
    const ANY: u32 = u32::MAX;
    let Some(post_processor) = inner.get_post_processor() else { return Ok(Default::default()) };
    let text = Encoding::from_tokens(vec![Token::new(ANY, "a".to_owned(), (0, 1))], 0);
    let processed = post_processor.process(text, None, true).map_err(|error| format!("its post-processor fails: {error}"))?;
    let mut parts = processed.get_ids().split(|id| *id == ANY);
    match (parts.next(), parts.next(), parts.next()) {
        (Some(before), Some(after), None) => Ok((before.to_vec(), after.to_vec())),
        _ => Err("its post-processor does not keep the text as one".to_owned()),
    }
}

/// The same of two texts; nothing where the post-processor is not made for two.
fn around_pair(inner: &tokenizers::Tokenizer) -> AroundPair {
    const FIRST: u32 = u32::MAX;
    const SECOND: u32 = u32::MAX - 1;
    let text = |id: u32| Encoding::from_tokens(vec![Token::new(id, "a".to_owned(), (0, 1))], 0);
    let processed = inner.get_post_processor().and_then(|processor| processor.process(text(FIRST), Some(text(SECOND)), true).ok());
    let Some(processed) = processed else { return AroundPair::default() };
    let ids = processed.get_ids();
    let place = |wanted: u32| ids.iter().position(|id| *id == wanted);
    match (place(FIRST), place(SECOND)) {
        (Some(first), Some(second)) if first < second => AroundPair {
            before: ids[..first].to_vec(),
            between: ids[first + 1..second].to_vec(),
            after: ids[second + 1..].to_vec(),
            has_types: processed.get_type_ids().get(second) == Some(&1),
        },
        _ => AroundPair::default(),
    }
}

impl Json {
    /// With the added vocabulary, each token by its own rules.
    pub fn encode_control(&self, text: &str) -> Result<Vec<u32>, Failure> {
        let encoding = self.inner.encode_fast(text, false).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// `parts` of `text`, which lie side by side and are all of it. Plain ones see normalizer, pre-tokenizer and model alone, as parts of one
    /// text: some tokenizers put a space before the first of them only. `cuts` may have a piece read again in several.
    pub fn encode_parts(&self, text: &str, parts: &[Part], cuts: Cuts<'_>) -> Result<Vec<u32>, Failure> {
        let mut pieces = PreTokenizedString::from(text);
        let split = |part: &Part| {
            let range = part.range.clone();
            let token = part.token.map(|id| vec![Token::new(id, text[range.clone()].to_owned(), (0, range.len()))]);
            (!range.is_empty()).then_some((range, token))
        };
        let splits: Vec<_> = parts.iter().filter_map(split).collect();
        pieces
            .split(|_, whole| {
                let slice = |(range, token): &(Range<usize>, Option<Vec<Token>>)| {
                    Some((whole.slice(normalizer::Range::Original(range.clone()))?, token.clone()))
                };
                Ok(splits.iter().filter_map(slice).collect::<Vec<_>>())
            })
            .map_err(failed)?;
        if let Some(normalizer) = self.inner.get_normalizer() {
            pieces.normalize(|piece| normalizer.normalize(piece)).map_err(failed)?;
        }
        if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces).map_err(failed)?;
        }
        let model = self.inner.get_model();
        let tokenize = |piece: &str| {
            let tokens = model.tokenize(piece)?;
            let Some(cuts) = cuts(piece, &tokens.iter().map(|token| token.id).collect::<Vec<_>>()) else { return Ok(tokens) };
            let ends = cuts.iter().copied().chain([piece.len()]);
            let starts = std::iter::once(0).chain(cuts.iter().copied());
            starts.zip(ends).try_fold(Vec::new(), |mut tokens, (start, end)| {
                tokens.extend(model.tokenize(&piece[start..end])?);
                Ok(tokens)
            })
        };
        pieces.tokenize(|piece| tokenize(piece.get())).map_err(failed)?;
        let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::None);
        Ok(splits.iter().flat_map(|(_, _, tokens)| tokens.iter().flatten().map(|token| token.id)).collect())
    }

    /// What the added token `id`, found at `found`, takes of the text by its own rules; `None` where it is none.
    pub fn reach(&self, id: u32, text: &str, found: Range<usize>) -> Option<Range<usize>> {
        let Some(token) = self.added.get(&id) else { return Some(found) };
        let (before, after) = (&text[..found.start], &text[found.end..]);
        let of_word = |character: char| character.is_alphanumeric() || character == '_';
        if token.single_word && (before.ends_with(of_word) || after.starts_with(of_word)) {
            return None;
        }
        let start = if token.lstrip { before.trim_end().len() } else { found.start };
        let end = if token.rstrip { text.len() - after.trim_start().len() } else { found.end };
        Some(start..end)
    }

    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }
}

/// What is known to hold for BPE over bytes, or with bytes to fall back to, behind steps that drop no text. Everything else is left open.
fn spelling(tokenizer: &tokenizers::Tokenizer) -> Option<Spelling> {
    let ModelWrapper::BPE(bpe) = tokenizer.get_model() else { return None };
    let affixes = [&bpe.continuing_subword_prefix, &bpe.end_of_word_suffix];
    if affixes.iter().any(|affix| affix.as_ref().is_some_and(|affix| !affix.is_empty())) {
        return None;
    }
    let mut shrinks = 1;
    if let Some(normalizer) = tokenizer.get_normalizer() {
        normalizes(&serde_json::to_value(normalizer).ok()?, &mut shrinks)?;
    }
    let mut by_bytes = false;
    if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
        splits(&serde_json::to_value(pre_tokenizer).ok()?, &mut by_bytes)?;
    }
    // Characters without a token would be dropped, or become one unknown token however many they are.
    let complete = match by_bytes {
        true => byte_level_alphabet().keys().all(|stand_in| tokenizer.token_to_id(&stand_in.to_string()).is_some()),
        false => bpe.byte_fallback && (0..=255u8).all(|byte| tokenizer.token_to_id(&format!("<0x{byte:02X}>")).is_some()),
    };
    let swallows_space = tokenizer.get_added_tokens_decoder().values().any(|token| token.lstrip || token.rstrip);
    complete.then_some(Spelling { shrinks, blocks: !by_bytes, swallows_space })
}

/// `None`: it may drop text.
fn normalizes(normalizer: &Value, shrinks: &mut usize) -> Option<()> {
    let steps = |key: &str| normalizer.get(key).and_then(Value::as_array);
    match normalizer.get("type").and_then(Value::as_str)? {
        "Sequence" => steps("normalizers")?.iter().try_for_each(|step| normalizes(step, shrinks)),
        "Prepend" => Some(()),
        "Replace" => (normalizer.pointer("/pattern/String")? == " " && normalizer.get("content")? == "\u{2581}").then_some(()),
        // Three conjoining Hangul letters of three bytes become one syllable of three: no text shrinks more.
        "NFC" => {
            *shrinks = 3;
            Some(())
        }
        _ => None,
    }
}

/// `None`: it may drop text.
fn splits(pre_tokenizer: &Value, by_bytes: &mut bool) -> Option<()> {
    match pre_tokenizer.get("type").and_then(Value::as_str)? {
        "Sequence" => {
            let steps = pre_tokenizer.get("pretokenizers").and_then(Value::as_array)?;
            steps.iter().try_for_each(|step| splits(step, by_bytes))
        }
        "ByteLevel" => {
            *by_bytes = true;
            Some(())
        }
        "Metaspace" | "Digits" => Some(()),
        "Split" | "Punctuation" => (pre_tokenizer.get("behavior")? != "Removed").then_some(()),
        _ => None,
    }
}

fn failed(error: tokenizers::Error) -> Failure {
    Failure::internal(format!("the tokenizer failed on a text: {error}"))
}

/// What a decoder does to one token, wherever it stands.
#[derive(Debug, PartialEq)]
enum Step {
    Replace(String, String),
    ByteFallback,
    ByteLevel,
    /// A prefix that says "no space before me"; without it there is one.
    WordPiece(String),
    /// A suffix that stands for the space after a word.
    Suffix(String),
    /// No decoder: tokens are joined by spaces.
    Joined,
}

fn decoder_steps(tokenizer: &tokenizers::Tokenizer) -> Result<Vec<Step>, String> {
    let Some(decoder) = tokenizer.get_decoder() else { return Ok(vec![Step::Joined]) };
    let decoder = serde_json::to_value(decoder).map_err(|error| error.to_string())?;
    let mut steps = Vec::new();
    add_steps(&decoder, &mut steps)?;
    Ok(steps)
}

fn add_steps(decoder: &Value, steps: &mut Vec<Step>) -> Result<(), String> {
    let text = |key: &str| decoder.get(key).and_then(Value::as_str).map(str::to_owned);
    let refuse = |what: &str| Err(format!("its decoder ({what}) is not supported: a token's text depends on its neighbours"));
    match decoder.get("type").and_then(Value::as_str).unwrap_or_default() {
        "Sequence" => {
            for decoder in decoder.get("decoders").and_then(Value::as_array).into_iter().flatten() {
                add_steps(decoder, steps)?;
            }
        }
        "Replace" => match (decoder.pointer("/pattern/String").and_then(Value::as_str), text("content")) {
            (Some(pattern), Some(content)) => steps.push(Step::Replace(pattern.to_owned(), content)),
            _ => return refuse("Replace with a regular expression"),
        },
        "ByteFallback" => steps.push(Step::ByteFallback),
        "ByteLevel" => steps.push(Step::ByteLevel),
        "Metaspace" => steps.push(Step::Replace(text("replacement").unwrap_or_else(|| "\u{2581}".into()), " ".into())),
        // One string of all tokens, and then perhaps less space at the very start: nothing that happens within running text.
        "Fuse" => {}
        "Strip" if decoder.get("stop").and_then(Value::as_u64) == Some(0) => {}
        "WordPiece" => steps.push(Step::WordPiece(text("prefix").unwrap_or_else(|| "##".into()))),
        "BPEDecoder" => steps.push(Step::Suffix(text("suffix").unwrap_or_else(|| "</w>".into()))),
        other => return refuse(other),
    }
    Ok(())
}

fn running_text(mut token: String, steps: &[Step], alphabet: &HashMap<char, u8>) -> Vec<u8> {
    for step in steps {
        match step {
            Step::Replace(pattern, content) => token = token.replace(pattern.as_str(), content),
            Step::ByteFallback => {
                if let Some(byte) = byte_piece(&token) {
                    return vec![byte];
                }
            }
            Step::ByteLevel => {
                // A token with a character outside the alphabet was added by name.
                if let Some(bytes) = token.chars().map(|character| alphabet.get(&character).copied()).collect() {
                    return bytes;
                }
            }
            Step::WordPiece(prefix) => {
                token = token.strip_prefix(prefix.as_str()).map_or_else(|| format!(" {token}"), str::to_owned);
            }
            Step::Suffix(suffix) => token = token.replace(suffix.as_str(), " "),
            Step::Joined => token.insert(0, ' '),
        }
    }
    token.into_bytes()
}

/// GPT-2's printable stand-in for each byte, the other way round.
pub fn byte_level_alphabet() -> HashMap<char, u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let stand_ins = (256u32..).filter_map(char::from_u32);
    let plain = (0..=255u8).filter(|&byte| printable(byte)).map(|byte| (char::from(byte), byte));
    plain.chain(stand_ins.zip((0..=255u8).filter(|&byte| !printable(byte)))).collect()
}
