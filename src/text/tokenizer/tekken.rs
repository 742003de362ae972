//! Mistral's `tekken.json`: ranks of tiktoken behind a block of special tokens, with the pattern that cuts texts.

use base64::Engine as _;
use serde::Deserialize;

use super::added::Added;
use super::ranks::{Ranks, Vocabulary};

#[derive(Deserialize)]
struct File {
    config: Config,
    vocab: Vec<Token>,
    special_tokens: Option<Vec<Special>>,
}

#[derive(Deserialize)]
struct Config {
    pattern: String,
    /// Of all tokens; `vocab` may list more.
    default_vocab_size: usize,
    default_num_special_tokens: usize,
    #[serde(default)]
    version: String,
}

#[derive(Deserialize)]
struct Token {
    rank: usize,
    token_bytes: String,
}

#[derive(Deserialize)]
struct Special {
    rank: usize,
    token_str: String,
    is_control: bool,
}

/// The special tokens of files that do not list them, which only the first versions may.
const OLDEST: [&str; 20] = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
];
/// Versions of such files.
const WITHOUT_LIST: [&str; 5] = ["v1", "v2", "v3", "v3_tekken", "v7"];
/// More than any vocabulary has: such a file is damaged, and not worth tables of that size.
const MOST_SPECIALS: usize = 1 << 20;
/// Stands before every text.
const BEGIN: &str = "<s>";

/// Reads the file.
pub fn read(file: &[u8]) -> Result<Vocabulary, String> {
    let file: File = serde_json::from_slice(file).map_err(|error| format!("not a tekken vocabulary: {error}"))?;
    let first = file.config.default_num_special_tokens;
    if first > MOST_SPECIALS {
        return Err(format!("default_num_special_tokens is {first}, more than any vocabulary has"));
    }
    let count = file.config.default_vocab_size.checked_sub(first).filter(|count| *count <= file.vocab.len()).ok_or_else(|| {
        let Config { default_vocab_size, .. } = file.config;
        format!("default_vocab_size {default_vocab_size} and default_num_special_tokens {first} do not fit its {} tokens", file.vocab.len())
    })?;
    let tokens = file.vocab.iter().take(count).enumerate().map(bytes).collect::<Result<Vec<_>, _>>()?;
    let added = specials(&file)?;
    let begin = added.iter().find(|(name, ..)| name == BEGIN).map(|(_, id, _)| *id);
    let added = Added::new(added);
    let ranks = Ranks::new(&tokens, first as u32, &file.config.pattern)?;
    Ok(Vocabulary { ranks, tokens, first: first as u32, added, before: begin.into_iter().collect() })
}

fn bytes((index, token): (usize, &Token)) -> Result<Vec<u8>, String> {
    if token.rank != index {
        return Err(format!("vocab[{index}] has rank {}: ranks must follow one another", token.rank));
    }
    let bytes = base64::engine::general_purpose::STANDARD.decode(&token.token_bytes);
    bytes.map_err(|error| format!("token_bytes of vocab[{index}]: {error}"))
}

/// Those of the file, and a name for every id before the first rank.
fn specials(file: &File) -> Result<Vec<(String, u32, bool)>, String> {
    let version = &file.config.version;
    let listed: Vec<(String, bool)> = match &file.special_tokens {
        None if !WITHOUT_LIST.contains(&version.as_str()) => {
            return Err(format!("it has no special_tokens, which version {version:?} must list"));
        }
        None => OLDEST.iter().map(|name| ((*name).to_owned(), true)).collect(),
        Some(listed) => {
            if let Some((index, special)) = listed.iter().enumerate().find(|(index, special)| special.rank != *index) {
                return Err(format!("special_tokens[{index}] has rank {}: ranks must follow one another", special.rank));
            }
            listed.iter().map(|special| (special.token_str.clone(), special.is_control)).collect()
        }
    };
    let count = file.config.default_num_special_tokens;
    if listed.len() > count {
        return Err(format!("it has {} special tokens, and default_num_special_tokens is {count}", listed.len()));
    }
    let fill = (listed.len()..count).map(|id| (format!("<SPECIAL_{id}>"), true));
    let all = listed.into_iter().chain(fill).enumerate();
    Ok(all.map(|(id, (name, special))| (name, id as u32, special)).collect())
}
