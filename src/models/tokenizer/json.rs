//! `tokenizer.json`, run by the `tokenizers` crate.

use std::collections::HashMap;

use serde_json::Value;
use tokenizers::{Model, ModelWrapper, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use crate::error::Failure;
use crate::models::sentencepiece::byte_piece;
use crate::models::tokenizer::added::Added;
use crate::models::tokenizer::least::Spelling;
use crate::models::tokenizer::token_bytes::TokenBytes;

pub struct Json {
    inner: tokenizers::Tokenizer,
    /// `None`: tokens may stand for any amount of text.
    pub spelling: Option<Spelling>,
}

/// The tokenizer, what each token reads as, and its added vocabulary.
pub fn load(file: &[u8]) -> Result<(Json, TokenBytes, Added), String> {
    let mut inner = tokenizers::Tokenizer::from_bytes(file).map_err(|error| format!("not a tokenizer that can be read: {error}"))?;
    // Lengths are for the server to limit, with an error that says so.
    inner.with_truncation(None).map_err(|error| error.to_string())?;
    inner.with_padding(None);
    let added: HashMap<u32, (String, bool)> =
        inner.get_added_tokens_decoder().into_iter().map(|(id, token)| (id, (token.content, token.special))).collect();
    let steps = decoder_steps(&inner)?;
    let mut bytes = TokenBytes::default();
    let alphabet = byte_level_alphabet();
    for (token, id) in inner.get_vocab(true) {
        match added.get(&id) {
            Some((name, _)) => bytes.set(id, name.as_bytes()),
            None => bytes.set(id, &running_text(token, &steps, &alphabet)),
        }
    }
    let added = Added::new(added.into_iter().map(|(id, (name, special))| (name, id, special)));
    let spelling = spelling(&inner);
    Ok((Json { inner, spelling }, bytes, added))
}

impl Json {
    /// With the added vocabulary, each token by its own rules.
    pub fn encode_control(&self, text: &str) -> Result<Vec<u32>, Failure> {
        let encoding = self.inner.encode_fast(text, false).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Without the added vocabulary: normalizer, pre-tokenizer and model alone.
    pub fn encode_text(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), Failure> {
        if text.is_empty() {
            return Ok(());
        }
        let mut pieces = PreTokenizedString::from(text);
        if let Some(normalizer) = self.inner.get_normalizer() {
            pieces.normalize(|piece| normalizer.normalize(piece)).map_err(failed)?;
        }
        if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces).map_err(failed)?;
        }
        let model = self.inner.get_model();
        pieces.tokenize(|piece| model.tokenize(piece.get())).map_err(failed)?;
        for (_, _, tokens) in pieces.get_splits(OffsetReferential::Original, OffsetType::None) {
            ids.extend(tokens.iter().flatten().map(|token| token.id));
        }
        Ok(())
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
fn byte_level_alphabet() -> HashMap<char, u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let stand_ins = (256u32..).filter_map(char::from_u32);
    let plain = (0..=255u8).filter(|&byte| printable(byte)).map(|byte| (char::from(byte), byte));
    plain.chain(stand_ins.zip((0..=255u8).filter(|&byte| !printable(byte)))).collect()
}
