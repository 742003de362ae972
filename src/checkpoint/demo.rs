//! The demo model, built into the binary: a real, tiny ERNIE 4.5 that works where nothing can be downloaded.
//!
//! What it is and how it was trained: `handler-tests/fixtures/demo-model/README.md`.

use crate::checkpoint::files::{ModelFiles, Source};

/// The name users ask for it by.
pub const NAME: &str = "demo";

macro_rules! embedded {
    ($($file:literal),* $(,)?) => {
        [$(($file, include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/handler-tests/fixtures/demo-model/", $file)).as_slice())),*]
    };
}

/// Its files, as a download of `baidu/ERNIE-4.5-0.3B-Paddle` has them.
pub fn files() -> ModelFiles {
    let files = embedded![
        "added_tokens.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ];
    let files = files.into_iter().map(|(name, bytes)| (name.to_owned(), Source::Embedded(bytes))).collect();
    ModelFiles::new(NAME, "built into this binary", files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::Tokenizer;

    #[test]
    fn is_complete_and_small() {
        let files = files();
        let config = files.read_json("config.json").unwrap().unwrap();
        assert!(config["max_position_embeddings"].as_u64().unwrap() >= 1024);
        assert!(files.read("model.safetensors").unwrap().unwrap().len() <= 3 * 1024 * 1024);
        let tokenizer = Tokenizer::load(&files).unwrap();
        assert!(
            tokenizer.vocab_size() < config["vocab_size"].as_u64().unwrap() as usize,
            "padding rows above the vocabulary, as in the original"
        );
        assert_eq!(tokenizer.token_id("</s>"), Some(config["eos_token_id"].as_u64().unwrap() as u32));
    }
}
