//! What belongs to a model, and what a folder holds of it.

use std::path::Path;

use super::unavailable;
use crate::checkpoint::files::{INDEX, ModelFiles, SENTENCEPIECE_FILES, Source, weight_files};
use crate::error::Failure;

/// Which part of a repository is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Everything a model needs.
    Model,
    /// The same without a tokenizer.
    Weights,
    /// The tokenizer alone.
    Tokenizer,
}

/// Files that a model is made of. Weights in other formats, images and texts are left where they are.
pub fn wanted(name: &str, need: Need) -> bool {
    let weights = name.ends_with(".safetensors") || name == INDEX;
    let configuration = matches!(name, "config.json" | "generation_config.json");
    !name.contains(['/', '\\'])
        && match need {
            Need::Model => weights || configuration || of_tokenizer(name),
            Need::Weights => weights || configuration,
            Need::Tokenizer => of_tokenizer(name),
        }
}

fn of_tokenizer(name: &str) -> bool {
    name.starts_with("tokenizer.")
        || SENTENCEPIECE_FILES.contains(&name)
        || name.ends_with(".jinja")
        || matches!(name, "tokenizer_config.json" | "special_tokens_map.json" | "added_tokens.json" | "chat_template.json")
}

/// The wanted files in a folder. Links are resolved; a dangling one (a download that was cut) is left out.
pub fn read(folder: &Path, name: &str, origin: String) -> Result<ModelFiles, Failure> {
    let broken = |error: std::io::Error| unavailable(format!("the model's folder {}: {error}", folder.display()));
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(broken)? {
        let entry = entry.map_err(broken)?;
        let Ok(file) = entry.file_name().into_string() else { continue };
        if !wanted(&file, Need::Model) {
            continue;
        }
        if let Ok(path) = entry.path().canonicalize()
            && path.is_file()
        {
            files.push((file, Source::Path(path)));
        }
    }
    let files = ModelFiles::new(name, origin, files);
    Ok(without_doubles(files))
}

/// Drops weight files that are not the model's.
fn without_doubles(files: ModelFiles) -> ModelFiles {
    let names: Vec<&str> = files.iter().map(|(name, _)| name).collect();
    let index = files.read_json(INDEX).ok().flatten();
    let Ok(weights) = weight_files(&names, index.as_ref()) else { return files };
    let kept = files.iter().filter(|(name, _)| !name.ends_with(".safetensors") || weights.iter().any(|weight| weight == name));
    let kept = kept.map(|(name, source)| (name.to_owned(), source.clone())).collect();
    ModelFiles::new(files.name.clone(), files.origin.clone(), kept)
}

/// What is missing of `need`, in words; `None` when it is whole.
pub fn missing(files: &ModelFiles, need: Need) -> Option<String> {
    let names: Vec<&str> = files.iter().map(|(name, _)| name).collect();
    let tokenizer = files.get("tokenizer.json").is_some() || SENTENCEPIECE_FILES.iter().any(|file| files.get(file).is_some());
    if need != Need::Weights && !tokenizer {
        return Some(format!("a tokenizer (tokenizer.json, {})", SENTENCEPIECE_FILES.join(" or ")));
    }
    if need == Need::Tokenizer {
        return None;
    }
    if files.get("config.json").is_none() {
        return Some("config.json".to_owned());
    }
    match files.read_json(INDEX) {
        Ok(index) => weight_files(&names, index.as_ref()).err(),
        Err(_) => Some(format!("a readable {INDEX}")),
    }
}

/// `files` with the tokenizer of `other`.
pub fn with_tokenizer(files: ModelFiles, other: &ModelFiles) -> ModelFiles {
    let own = files.iter().filter(|(name, _)| !of_tokenizer(name));
    let others = other.iter().filter(|(name, _)| of_tokenizer(name));
    let all = own.chain(others).map(|(name, source)| (name.to_owned(), source.clone())).collect();
    ModelFiles::new(files.name.clone(), format!("{}, tokenizer from {}", files.origin, other.origin), all)
}

/// `name` or `owner/name` as the hub allows them; never something that climbs out of a folder.
pub fn is_hub_id(id: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && part.len() <= 96
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
            && !part.starts_with(['-', '.'])
            && !part.ends_with(['-', '.'])
            && !part.contains("--")
            && !part.contains("..")
    };
    let mut parts = id.split('/');
    parts.next().is_some_and(part) && parts.next().is_none_or(part) && parts.next().is_none()
}

/// A branch, tag or commit that is safe as a path below `refs`.
pub fn is_revision(revision: &str) -> bool {
    !revision.is_empty()
        && revision.chars().all(|c| c.is_ascii_graphic() && !matches!(c, '\\' | ':' | '?' | '*' | '~' | '^'))
        && revision.split('/').all(|part| !matches!(part, "" | "." | ".."))
}
