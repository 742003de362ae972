//! What downloads from every hub have in common: which files, how often, and the reference that is written last.

use std::path::Path;
use std::time::Duration;

use super::folder::{self, Need, Target};
use crate::checkpoint::files::{INDEX, TEKKEN, is_module_file, is_tiktoken, weight_files};
use crate::checkpoint::gguf;

/// Tries per file and per question, the first included.
pub const TRIES: u32 = 5;
/// A download that brings nothing for so long is begun anew.
pub const STALL: Duration = Duration::from_secs(60);
pub const QUESTION: Duration = Duration::from_secs(30);

/// Of a repository's files those that are fetched at once, and whether weights follow, which an index among them may name.
///
/// # Errors
/// What is missing, in words that can follow "lacks".
pub fn choose(all: &[&str], target: &Target<'_>, need: Need) -> Result<(Vec<String>, bool), String> {
    let names: Vec<&str> = all.iter().copied().filter(|name| folder::wanted(name, need)).collect();
    let is_vocabulary = |name: &str| name.starts_with("tokenizer.") || name == TEKKEN || is_tiktoken(name);
    let is_plain = |name: &&str| name.ends_with(".safetensors") || (need == Need::Tokenizer && is_vocabulary(name));
    if target.gguf.is_some() || (!names.iter().any(is_plain) && all.iter().any(|path| gguf::is_model_part(path))) {
        return Ok((gguf::pick(all, target.gguf)?, false));
    }
    let first = names.iter().filter(|name| !name.ends_with(".safetensors") || is_module_file(name));
    Ok((first.map(|name| (*name).to_owned()).collect(), need != Need::Tokenizer))
}

/// The weight files among a repository's, by its index where there is one.
///
/// # Errors
/// What is wrong with it.
pub fn weights(snapshot: &Path, all: &[&str], need: Need) -> Result<Vec<String>, String> {
    let names: Vec<&str> = all.iter().copied().filter(|name| folder::wanted(name, need)).collect();
    let index = if names.contains(&INDEX) {
        let read = std::fs::read(snapshot.join(INDEX)).map_err(|error| error.to_string());
        let parsed = read.and_then(|bytes| serde_json::from_slice(&bytes).map_err(|error| error.to_string()));
        Some(parsed.map_err(|error| format!("{INDEX}: {error}"))?)
    } else {
        None
    };
    weight_files(&names, index.as_ref()).map_err(|lost| format!("the repository lacks {lost}"))
}

/// Writes the reference by which caches find a snapshot. Renamed into place, since others may read it now.
pub fn point_to(repository: &Path, revision: &str, snapshot: &str) -> Result<(), String> {
    let path = repository.join("refs").join(revision);
    let write = || {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let beside = repository.join(format!(".ref-{}", uuid::Uuid::new_v4()));
        std::fs::write(&beside, snapshot)?;
        std::fs::rename(&beside, &path)
    };
    write().map_err(|error: std::io::Error| format!("{}: {error}", path.display()))
}

/// An error with its causes: reqwest's own text names none.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Worth another try.
pub fn passing(status: u16) -> bool {
    matches!(status, 408 | 425 | 429 | 500..)
}

pub fn pause(tries: u32) -> Duration {
    Duration::from_millis(500 << (tries - 1).min(4))
}
