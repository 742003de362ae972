//! WordPiece in the metadata of a GGUF file. The converter writes a block before what begins a word, and leaves the `##` before what
//! continues one away; here it is turned back, and the `tokenizers` crate cuts as it does for the models themselves.

use tokenizers::AddedToken;
use tokenizers::decoders::wordpiece::WordPiece as Decoder;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::bert::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::processors::bert::BertProcessing;

use crate::checkpoint::gguf::Header;
use crate::text::sentencepiece::SPACE;

/// Before what continues a word.
const CONTINUES: &str = "##";
/// `tokenizer.ggml.token_type` of a token that text is not made of.
const CONTROL: u64 = 3;
/// The unknown token, the first and the last of a text: the keys of their ids, and BERT's own ids.
const UNKNOWN: (&[&str], u64) = (&["tokenizer.ggml.unknown_token_id"], 100);
const CLASS: (&[&str], u64) = (&["tokenizer.ggml.cls_token_id", "tokenizer.ggml.bos_token_id"], 101);
const SEPARATOR: (&[&str], u64) = (&["tokenizer.ggml.seperator_token_id", "tokenizer.ggml.eos_token_id"], 102);

/// Reads the vocabulary of tokens with their types.
pub fn read(header: &Header<'_>, tokens: &[(&str, u64)]) -> Result<tokenizers::Tokenizer, String> {
    let lowercase = header.flag("tokenizer.ggml.normalizer.lowercase")?;
    let is_cased = tokens.iter().any(|(text, _)| text.strip_prefix(SPACE).is_some_and(|word| word.chars().any(char::is_uppercase)));
    if is_cased && lowercase.is_none() {
        return Err(
            "its words have capitals, and tokenizer.ggml.normalizer.lowercase does not say that texts keep theirs; set TOKENIZER to the model \
             that the file was made of"
                .to_owned(),
        );
    }
    let lowercase = lowercase.unwrap_or(true);
    let strip_accents = header.flag("tokenizer.ggml.normalizer.strip_accents")?.unwrap_or(lowercase);
    let spelled: Vec<String> = tokens.iter().map(|(text, kind)| spelling(text, *kind)).collect();
    let role = |(keys, default): (&[&str], u64)| -> Result<(String, u32), String> {
        let given = keys.iter().find_map(|key| header.integer(key).transpose()).transpose()?;
        let id = given.unwrap_or(default);
        let text = spelled.get(id as usize);
        let text = text.ok_or_else(|| format!("metadata \"{}\" is {id}, and the vocabulary has {} tokens", keys[0], spelled.len()))?;
        Ok((text.clone(), id as u32))
    };
    let (unknown, class, separator) = (role(UNKNOWN)?, role(CLASS)?, role(SEPARATOR)?);
    let wrong = |error: tokenizers::Error| format!("its vocabulary cannot be read: {error}");
    let vocab: tokenizers::models::bpe::Vocab = spelled.iter().cloned().zip(0u32..).collect();
    let model = WordPiece::builder().vocab(vocab).unk_token(unknown.0.clone()).continuing_subword_prefix(CONTINUES.to_owned()).build();
    let mut tokenizer = tokenizers::Tokenizer::new(model.map_err(wrong)?);
    tokenizer.with_normalizer(Some(BertNormalizer::new(true, true, Some(strip_accents), lowercase))).map_err(wrong)?;
    tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
    tokenizer.with_decoder(Some(Decoder::new(CONTINUES.to_owned(), true)));
    tokenizer.with_post_processor(Some(BertProcessing::new(separator.clone(), class.clone())));
    let control = spelled.iter().zip(tokens).filter(|(_, (_, kind))| *kind == CONTROL).map(|(text, _)| text);
    let named = [unknown, class, separator].map(|(text, _)| text);
    let special = named.iter().chain(control).map(|text| AddedToken::from(text.clone(), true).normalized(false));
    tokenizer.add_special_tokens(special.collect::<Vec<_>>()).map_err(wrong)?;
    Ok(tokenizer)
}

/// A token as its model writes it.
fn spelling(text: &str, kind: u64) -> String {
    match text.strip_prefix(SPACE) {
        // A block of its own right that continues a word: nothing begins one.
        Some("") => format!("{CONTINUES}{SPACE}"),
        Some(word) => word.to_owned(),
        // Older converters told control tokens by their brackets.
        None if kind == CONTROL || (text.starts_with('[') && text.ends_with(']')) => text.to_owned(),
        None => format!("{CONTINUES}{text}"),
    }
}
