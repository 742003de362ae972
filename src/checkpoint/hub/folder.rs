//! What belongs to a model, and what a folder holds of it.

use std::path::{Path, PathBuf};

use super::unavailable;
use crate::checkpoint::files::{
    INDEX, ModelFiles, SENTENCEPIECE_FILES, Source, TEKKEN, TOKENIZERS, is_module_file, is_tiktoken, weight_files,
};
use crate::checkpoint::gguf;
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

/// A model as it was asked for: a folder or a repository, and of several GGUF files in it the one that stands behind a colon.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// As it was written.
    pub name: &'a str,
    /// Without what stands behind the colon.
    pub place: &'a str,
    pub gguf: Option<&'a str>,
}

impl<'a> Target<'a> {
    pub fn of(name: &'a str) -> Self {
        match name.split_once(':') {
            // Neither an address nor a drive.
            Some((place, gguf))
                if !gguf.is_empty()
                    && !gguf.starts_with('/')
                    && !gguf.contains('\\')
                    && !Path::new(name).exists()
                    && (is_hub_id(place) || Path::new(place).is_dir()) =>
            {
                Self { name, place, gguf: Some(gguf) }
            }
            _ => Self { name, place: name, gguf: None },
        }
    }
}

/// Files that a model is made of. Weights in other formats, images and texts are left where they are.
pub fn wanted(name: &str, need: Need) -> bool {
    let weights = name.ends_with(".safetensors") || name == INDEX;
    let configuration = matches!(
        name,
        "config.json" | "generation_config.json" | "modules.json" | "sentence_bert_config.json" | "config_sentence_transformers.json"
    );
    let weights = weights || is_module_file(name);
    (!name.contains(['/', '\\']) || is_module_file(name))
        && match need {
            Need::Model => weights || configuration || of_tokenizer(name),
            Need::Weights => weights || configuration,
            Need::Tokenizer => of_tokenizer(name),
        }
}

fn of_tokenizer(name: &str) -> bool {
    name.starts_with("tokenizer.")
        || SENTENCEPIECE_FILES.contains(&name)
        || name == TEKKEN
        || is_tiktoken(name)
        || name.ends_with(".jinja")
        || matches!(name, "tokenizer_config.json" | "special_tokens_map.json" | "added_tokens.json" | "chat_template.json")
}

/// The wanted files in a folder. Links are resolved; a dangling one (a download that was cut) is left out. A GGUF file is taken where one is
/// asked for, or nothing else is there.
pub fn read(folder: &Path, target: &Target<'_>, origin: String) -> Result<ModelFiles, Failure> {
    let files = plain_files(folder, target.name, &origin)?;
    if target.gguf.is_none() && files.iter().any(|(name, _)| name.ends_with(".safetensors")) {
        return Ok(without_doubles(files));
    }
    let found = gguf_files(folder)?;
    if target.gguf.is_none() && found.is_empty() {
        return Ok(files);
    }
    gguf_model(&found, target.gguf, target.name, &origin)
        .map_err(|lost| unavailable(format!("the model's folder {} lacks {lost}", folder.display())))?
}

/// The model of a GGUF file, with the other parts of a set that it belongs to.
pub fn gguf_file(path: &Path, name: &str) -> Result<ModelFiles, Failure> {
    let folder = path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
    let file = path.file_name().map(|file| file.to_string_lossy().into_owned()).unwrap_or_default();
    if !gguf::is_model_part(&file) {
        return Err(unavailable(format!("model {name} is a file that is no GGUF model (*.gguf): a model is such a file, or a folder")));
    }
    let found: Vec<_> = gguf_files(folder)?.into_iter().filter(|(path, _)| !path.contains('/')).collect();
    gguf_model(&found, Some(&file), name, &format!("file {}", path.display()))
        .map_err(|lost| unavailable(format!("model {name}: the folder {} lacks {lost}", folder.display())))?
}

/// GGUF models in a folder and in the folders in it, by their path below it: a set of parts often has a folder of its own.
fn gguf_files(folder: &Path) -> Result<Vec<(String, PathBuf)>, Failure> {
    let broken = |error: std::io::Error| unavailable(format!("the model's folder {}: {error}", folder.display()));
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(broken)? {
        let entry = entry.map_err(broken)?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if !entry.path().is_dir() {
            found.push((name, entry.path()));
            continue;
        }
        // What is not ours to read is passed over.
        for inner in std::fs::read_dir(entry.path()).into_iter().flatten().flatten() {
            if let Ok(file) = inner.file_name().into_string() {
                found.push((format!("{name}/{file}"), inner.path()));
            }
        }
    }
    found.retain(|(path, _)| gguf::is_model_part(path));
    Ok(found)
}

/// The model that `wanted` names among `found`. The outer error: what is lacking, in words.
fn gguf_model(found: &[(String, PathBuf)], wanted: Option<&str>, name: &str, origin: &str) -> Result<Result<ModelFiles, Failure>, String> {
    // A link that leads nowhere is a download that was cut.
    let found: Vec<(&str, PathBuf)> = found.iter().filter_map(|(path, place)| Some((path.as_str(), place.canonicalize().ok()?))).collect();
    let picked = gguf::pick(&found.iter().map(|(path, _)| *path).collect::<Vec<_>>(), wanted)?;
    let source = |path: String| {
        let (_, place) = found.iter().find(|(other, _)| *other == path)?;
        Some((path, Source::Path(place.clone())))
    };
    Ok(gguf::model_files(name, origin, picked.into_iter().filter_map(source).collect()))
}

fn plain_files(folder: &Path, name: &str, origin: &str) -> Result<ModelFiles, Failure> {
    let broken = |error: std::io::Error| unavailable(format!("the model's folder {}: {error}", folder.display()));
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(broken)? {
        let entry = entry.map_err(broken)?;
        let Ok(file) = entry.file_name().into_string() else { continue };
        // Modules of Sentence Transformers have folders of their own.
        let of_module = ["config.json", "model.safetensors"].map(|inner| format!("{file}/{inner}"));
        for name in of_module.into_iter().chain([file]).filter(|name| wanted(name, Need::Model)) {
            if let Ok(path) = folder.join(&name).canonicalize()
                && path.is_file()
            {
                files.push((name, Source::Path(path)));
            }
        }
    }
    Ok(ModelFiles::new(name, origin, files))
}

/// Drops weight files that are not the model's.
fn without_doubles(files: ModelFiles) -> ModelFiles {
    let names: Vec<&str> = files.iter().map(|(name, _)| name).collect();
    let index = files.read_json(INDEX).ok().flatten();
    let Ok(weights) = weight_files(&names, index.as_ref()) else { return files };
    let is_kept = |name: &str| !name.ends_with(".safetensors") || is_module_file(name) || weights.iter().any(|weight| weight == name);
    let kept = files.iter().filter(|(name, _)| is_kept(name));
    let kept = kept.map(|(name, source)| (name.to_owned(), source.clone())).collect();
    ModelFiles::new(files.name.clone(), files.origin.clone(), kept)
}

/// What is missing of `need`, in words; `None` when it is whole.
pub fn missing(files: &ModelFiles, need: Need) -> Option<String> {
    let names: Vec<&str> = files.iter().map(|(name, _)| name).collect();
    let is_vocabulary = |name: &&str| ["tokenizer.json", TEKKEN, gguf::TOKENIZER].contains(name) || SENTENCEPIECE_FILES.contains(name);
    if need != Need::Weights && !names.iter().any(|name| is_vocabulary(name) || is_tiktoken(name)) {
        return Some(format!("a tokenizer ({TOKENIZERS})"));
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
