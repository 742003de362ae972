//! Files of ranks in tiktoken's form: a line for each token, its bytes in base64 and its rank. How texts are cut, and which special tokens
//! follow, stands in the code beside a model, which is never run: families whose code is known are rows here, others are refused.

use std::collections::BTreeMap;

use base64::Engine as _;
use serde_json::Value;

use super::added::Added;
use super::ranks::{Ranks, Vocabulary};
use crate::checkpoint::files::{ModelFiles, SENTENCEPIECE_FILES};
use crate::error::Failure;

/// How a family cuts texts, and what it has besides its ranks.
struct Family {
    /// What tells that a file is of this family.
    told_by: &'static str,
    is: fn(&Signs<'_>) -> bool,
    pattern: &'static str,
    /// Names of the ids behind the ranks.
    special: fn(usize) -> Option<String>,
    /// How many those are.
    specials: usize,
    /// The special token before every text.
    before: Option<&'static str>,
}

/// By what a family is known.
struct Signs<'a> {
    file: &'a str,
    /// `model_type` of config.json.
    model_type: &'a str,
    /// `auto_map.AutoTokenizer` of tokenizer_config.json: `module.Class`.
    code: &'a str,
}

/// Ids above any vocabulary's.
const MOST_IDS: usize = 1 << 24;

const KIMI: &str = r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const FAMILIES: &[Family] = &[
    Family {
        told_by: "qwen.tiktoken",
        is: |signs| signs.file == "qwen.tiktoken",
        pattern: QWEN,
        special: |index| match index {
            0..3 => Some(["<|endoftext|>", "<|im_start|>", "<|im_end|>"][index].to_owned()),
            _ => Some(format!("<|extra_{}|>", index - 3)),
        },
        specials: 208,
        before: None,
    },
    Family {
        told_by: "Kimi's tiktoken.model (auto_map in tokenizer_config.json)",
        is: |signs| {
            signs.file == "tiktoken.model"
                && matches!(signs.code, "tokenization_kimi.TikTokenTokenizer" | "tokenization_moonshot.TikTokenTokenizer")
        },
        pattern: KIMI,
        // Reserved ones, named by their ids.
        special: |_| None,
        specials: 256,
        before: None,
    },
    Family {
        told_by: "Llama 3's tokenizer.model (model_type llama)",
        is: |signs| SENTENCEPIECE_FILES.contains(&signs.file) && signs.model_type == "llama",
        pattern: LLAMA3,
        special: |_| None,
        specials: 0,
        before: Some("<|begin_of_text|>"),
    },
];

/// Whether a file begins as these do. A SentencePiece model begins with a line break.
pub fn is_ranks(file: &[u8]) -> bool {
    let line = file.split(|byte| *byte == b'\n').next().unwrap_or_default();
    parse_line(line).is_some()
}

/// Reads `file`, which is called `name`.
pub fn read(name: &str, file: &[u8], files: &ModelFiles) -> Result<Vocabulary, Failure> {
    let broken = |problem: String| Failure::internal(format!("{name} of {}: {problem}", files.name));
    let (config, tokenizer) = (files.model_config()?.unwrap_or_default(), files.read_json("tokenizer_config.json")?.unwrap_or_default());
    let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_owned();
    let code = tokenizer.pointer("/auto_map/AutoTokenizer");
    let (model_type, code) = (text(config.get("model_type")), text(code.and_then(|code| code.get(0)).or(code)));
    let signs = Signs { file: name, model_type: &model_type, code: code.rsplit("--").next().unwrap_or_default() };
    let family = FAMILIES.iter().find(|family| (family.is)(&signs)).ok_or_else(|| {
        let known: Vec<_> = FAMILIES.iter().map(|family| family.told_by).collect();
        broken(format!(
            "it is a vocabulary in tiktoken's form, and nothing tells how its model cuts texts (known: {}); put its tokenizer.json beside it",
            known.join(", ")
        ))
    })?;
    let tokens = ranks(file).map_err(broken)?;
    let named = named(&tokenizer, tokens.len()).map_err(broken)?;
    if family.specials == 0 && named.is_empty() {
        return Err(broken("its special tokens have no names: tokenizer_config.json must list them (added_tokens_decoder)".to_owned()));
    }
    let added = Added::new(specials(family, tokens.len(), named));
    let before = family.before.and_then(|name| added.id(name)).into_iter().collect();
    let ranks = Ranks::new(&tokens, 0, family.pattern).map_err(broken)?;
    Ok(Vocabulary { ranks, tokens, first: 0, added, before })
}

fn parse_line(line: &[u8]) -> Option<(Vec<u8>, usize)> {
    let mut words = line.split(|byte| byte.is_ascii_whitespace()).filter(|word| !word.is_empty());
    let (token, rank, rest) = (words.next()?, words.next()?, words.next());
    let token = base64::engine::general_purpose::STANDARD.decode(token).ok().filter(|token| !token.is_empty())?;
    let rank = std::str::from_utf8(rank).ok()?.parse().ok()?;
    rest.is_none().then_some((token, rank))
}

/// Each token's bytes by rank.
fn ranks(file: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    let lines = file.split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.trim_ascii().is_empty());
    let mut tokens: Vec<(Vec<u8>, usize)> = Vec::new();
    for (number, line) in lines {
        tokens.push(parse_line(line).ok_or_else(|| format!("line {} is not a token in base64 and its rank", number + 1))?);
    }
    tokens.sort_by_key(|(_, rank)| *rank);
    match tokens.iter().enumerate().find(|(index, (_, rank))| rank != index) {
        Some((index, _)) => Err(format!("no token, or more than one, has rank {index}")),
        None => Ok(tokens.into_iter().map(|(token, _)| token).collect()),
    }
}

/// What tokenizer_config.json calls the ids behind the ranks, and whether they are hidden from text.
fn named(tokenizer: &Value, ranks: usize) -> Result<BTreeMap<u32, (String, bool)>, String> {
    let mut named = BTreeMap::new();
    for (id, token) in tokenizer.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten() {
        let content = token.get("content").and_then(Value::as_str);
        let wrong = || format!("added_tokens_decoder in tokenizer_config.json: {id:?} is no id of a token behind its {ranks} ranks");
        let (id, content) =
            id.parse().ok().filter(|id: &u32| (ranks..MOST_IDS).contains(&(*id as usize))).zip(content).ok_or_else(wrong)?;
        named.insert(id, (content.to_owned(), token.get("special").and_then(Value::as_bool).unwrap_or(true)));
    }
    Ok(named)
}

fn specials(family: &Family, ranks: usize, mut named: BTreeMap<u32, (String, bool)>) -> Vec<(String, u32, bool)> {
    for index in 0..family.specials {
        let id = (ranks + index) as u32;
        named.entry(id).or_insert_with(|| ((family.special)(index).unwrap_or_else(|| format!("<|reserved_token_{id}|>")), true));
    }
    named.into_iter().map(|(id, (name, special))| (name, id, special)).collect()
}
