//! The control tokens with which code models mark what stands before a hole and what follows it. They tell whether a model can fill in the
//! middle, and which layout it knows.

use serde_json::{Map, Value};

use crate::text::tokenizer::Tokenizer;

/// How a family of models marks the parts.
struct Layout {
    prefix: &'static str,
    suffix: &'static str,
    /// Before the answer. None: it follows the last part at once.
    middle: Option<&'static str>,
    suffix_first: bool,
}

const fn layout(prefix: &'static str, suffix: &'static str, middle: &'static str) -> Layout {
    Layout { prefix, suffix, middle: Some(middle), suffix_first: false }
}

/// All of them. The first whose tokens a vocabulary has is the model's.
const LAYOUTS: &[Layout] = &[
    // Qwen2.5-Coder, CodeGemma, Granite 4.
    layout("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    // StarCoder, Granite Code.
    layout("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    // SantaCoder, Granite 3.
    layout("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    // DeepSeek.
    layout("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    // Code Llama, as its SentencePiece vocabulary and as others write them.
    layout("▁<PRE>", "▁<SUF>", "▁<MID>"),
    layout("<PRE>", "<SUF>", "<MID>"),
    // Seed-Coder.
    Layout { suffix_first: true, ..layout("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>") },
    // Codestral.
    Layout { prefix: "[PREFIX]", suffix: "[SUFFIX]", middle: None, suffix_first: true },
];

/// What stands before the name of a repository, and of each file.
const REPOSITORY: &[&str] = &["<|repo_name|>", "<|reponame|>", "<repo_name>", "<reponame>"];
const FILE: &[&str] = &["<|file_sep|>", "<|file_separator|>", "<file_sep>", "<|filename|>", "<filename>"];

/// Tokens that end a filling beside the model's own ends, the marks of parts and those of files.
const ENDS: &[&str] = &[
    "<|endoftext|>",
    "<|im_end|>",
    "<|fim_pad|>",
    "<fim_pad>",
    "<fim-pad>",
    "▁<EOT>",
    "<EOT>",
    "<｜end▁of▁sentence｜>",
    "<|end_of_text|>",
];

/// The keys of `tokenizer_config.json` that name marks; those of a GGUF file's metadata are read as these.
pub const ROLES: [&str; 5] = ["prefix_token", "suffix_token", "middle_token", "fim_repository_token", "fim_file_token"];

/// A model's tokens for filling in the middle.
#[derive(Debug, PartialEq)]
pub struct InfillTokens {
    pub(super) prefix: u32,
    pub(super) suffix: u32,
    pub(super) middle: Option<u32>,
    pub(super) suffix_first: bool,
    pub(super) repository: Option<u32>,
    pub(super) file: Option<u32>,
    /// Each of them ends a filling.
    pub(super) ends: Vec<u32>,
}

impl InfillTokens {
    /// Those that the model's files name by their [`ROLES`], else those of the first layout that the vocabulary has. `rows`: ids from here on
    /// have no row in the model's embedding.
    pub fn find(tokenizer: &Tokenizer, named: &Map<String, Value>, rows: usize) -> Option<Self> {
        let id = |name: &str| tokenizer.token_id(name).filter(|id| (*id as usize) < rows);
        let role = |role: &str| named.get(role).and_then(Value::as_str);
        let named_marks = match (role("prefix_token"), role("suffix_token"), role("middle_token")) {
            (Some(prefix), Some(suffix), Some(middle)) => id(prefix).zip(id(suffix)).zip(id(middle)).map(|marks| (prefix, marks)),
            _ => None,
        };
        let (prefix, suffix, middle, suffix_first) = match named_marks {
            Some((name, ((prefix, suffix), middle))) => {
                let suffix_first = LAYOUTS.iter().any(|layout| layout.prefix == name && layout.suffix_first);
                (prefix, suffix, Some(middle), suffix_first)
            }
            None => LAYOUTS.iter().find_map(|layout| {
                let middle = layout.middle.map(id);
                let is_known = middle.is_none_or(|middle| middle.is_some());
                let (prefix, suffix) = id(layout.prefix).zip(id(layout.suffix)).filter(|_| is_known)?;
                Some((prefix, suffix, middle.flatten(), layout.suffix_first))
            })?,
        };
        let first = |key: &str, names: &[&str]| role(key).and_then(id).or_else(|| names.iter().find_map(|name| id(name)));
        let (repository, file) = (first("fim_repository_token", REPOSITORY), first("fim_file_token", FILE));
        let mut ends: Vec<u32> = ENDS.iter().filter_map(|name| id(name)).collect();
        ends.extend([prefix, suffix].into_iter().chain(middle).chain(repository).chain(file));
        Some(Self { prefix, suffix, middle, suffix_first, repository, file, ends })
    }

    /// How many tokens mark the parts.
    pub(super) fn marks(&self) -> usize {
        2 + usize::from(self.middle.is_some())
    }
}
