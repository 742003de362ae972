//! The files of one model, wherever they lie: a folder, a hub cache, or built into this binary (the demo model).

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;

use crate::error::Failure;

/// Says which shard holds which tensor.
pub const INDEX: &str = "model.safetensors.index.json";

/// Names under which a SentencePiece vocabulary lies beside a model, the usual one first. The others are those of older ERNIE releases.
pub const SENTENCEPIECE_FILES: [&str; 3] = ["tokenizer.model", "spm.model", "ernie_token_100k.model"];

/// Mistral's vocabulary.
pub const TEKKEN: &str = "tekken.json";

/// The files that a tokenizer may be read from, for messages.
pub const TOKENIZERS: &str = "tokenizer.json, tekken.json, tokenizer.model, spm.model, ernie_token_100k.model or *.tiktoken";

/// A vocabulary in tiktoken's form under a name of its own.
pub fn is_tiktoken(name: &str) -> bool {
    name.ends_with(".tiktoken") || name == "tiktoken.model"
}

/// Where the bytes of one file are.
#[derive(Debug, Clone)]
pub enum Source {
    Path(PathBuf),
    Embedded(&'static [u8]),
    /// Made of what another file says: the configuration of a GGUF file.
    Made(Arc<[u8]>),
}

/// A model's files by name (`config.json`, `model-00001-of-00002.safetensors` …).
#[derive(Debug, Clone)]
pub struct ModelFiles {
    /// What the user asked for: `baidu/ERNIE-4.5-0.3B-Paddle`, a path, or `demo`.
    pub name: String,
    /// Where they were found, for logs and `check`.
    pub origin: String,
    files: Vec<(String, Source)>,
}

impl ModelFiles {
    pub fn new(name: impl Into<String>, origin: impl Into<String>, mut files: Vec<(String, Source)>) -> Self {
        files.sort_by(|a, b| a.0.cmp(&b.0));
        Self { name: name.into(), origin: origin.into(), files }
    }

    pub fn get(&self, file: &str) -> Option<&Source> {
        self.files.iter().find(|(name, _)| name == file).map(|(_, source)| source)
    }

    /// The whole content of a small file; `None` when the model does not have it.
    pub fn read(&self, file: &str) -> Result<Option<Cow<'static, [u8]>>, Failure> {
        match self.get(file) {
            None => Ok(None),
            Some(Source::Embedded(bytes)) => Ok(Some(Cow::Borrowed(bytes))),
            Some(Source::Made(bytes)) => Ok(Some(Cow::Owned(bytes.to_vec()))),
            Some(Source::Path(path)) => match std::fs::read(path) {
                Ok(bytes) => Ok(Some(Cow::Owned(bytes))),
                Err(error) => Err(Failure::internal(format!("model file {}: {error}", path.display()))),
            },
        }
    }

    /// The same as JSON.
    pub fn read_json(&self, file: &str) -> Result<Option<Value>, Failure> {
        let Some(bytes) = self.read(file)? else { return Ok(None) };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| Failure::internal(format!("model file {file} of {} is not valid JSON: {error}", self.name)))
    }

    /// config.json. Of a model that reads more than text, what it says of its language part (`text_config`), with what it says of the whole
    /// (ids that end a text, quantization) below it.
    pub fn model_config(&self) -> Result<Option<Value>, Failure> {
        let Some(mut config) = self.read_json("config.json")? else { return Ok(None) };
        let nested = config.get_mut("text_config").map(Value::take);
        if let (Some(Value::Object(nested)), Value::Object(whole)) = (nested, &mut config) {
            whole.extend(nested.into_iter().filter(|(_, value)| !value.is_null()));
        }
        Ok(Some(config))
    }

    /// The names of the weight files, by [`weight_files`].
    pub fn weight_files(&self) -> Result<Vec<String>, Failure> {
        let names: Vec<&str> = self.iter().map(|(name, _)| name).collect();
        weight_files(&names, self.read_json(INDEX)?.as_ref()).map_err(|missing| {
            let pickled = names.iter().any(|name| name.ends_with(".pdparams") || name.ends_with(".bin"));
            let hint = if pickled { "; pickled weights (.pdparams, .bin) are not supported" } else { "" };
            Failure::internal(format!("{} ({}) lacks {missing}{hint}", self.name, self.origin))
        })
    }

    /// All files, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Source)> {
        self.files.iter().map(|(name, source)| (name.as_str(), source))
    }
}

/// The name under which the tokenizer of a GGUF file finds it again. It begins as other tokenizer files do, so that it goes where those go.
pub const GGUF_TOKENIZER: &str = "tokenizer.gguf";

/// A GGUF file with weights.
pub fn is_gguf(name: &str) -> bool {
    name.ends_with(".gguf") && name != GGUF_TOKENIZER
}

/// A file of a module of Sentence Transformers, which has a folder of its own: `2_Dense/model.safetensors`.
pub fn is_module_file(name: &str) -> bool {
    name.split_once('/').is_some_and(|(folder, file)| {
        let number = folder.split_once('_').map_or("", |(number, _)| number);
        let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        is_number && matches!(file, "config.json" | "model.safetensors")
    })
}

/// The weight files among `names`: GGUF files (of a model that has one, nothing else is looked at), else those of the index when there is one (a repository may hold the same weights twice), else
/// `model.safetensors`, else the parts of a set (`model-00001-of-00002.safetensors` …), else a single file of another name.
///
/// # Errors
/// What is missing, in words that can follow "lacks".
pub fn weight_files(names: &[&str], index: Option<&Value>) -> Result<Vec<String>, String> {
    let gguf: Vec<String> = names.iter().filter(|name| is_gguf(name)).map(|name| (*name).to_owned()).collect();
    if !gguf.is_empty() {
        return Ok(gguf);
    }
    if let Some(index) = index {
        let map = index.get("weight_map").and_then(Value::as_object).ok_or_else(|| format!("a \"weight_map\" in {INDEX}"))?;
        let mut shards = BTreeSet::new();
        for (tensor, shard) in map {
            shards.insert(shard.as_str().ok_or_else(|| format!("the name of a file for tensor {tensor} in {INDEX}, which has {shard}"))?);
        }
        let lost: Vec<String> = shards.iter().filter(|shard| !names.contains(shard)).map(|shard| (*shard).to_owned()).collect();
        return match lost.as_slice() {
            [] => Ok(shards.into_iter().map(str::to_owned).collect()),
            [one] => Err(format!("{one}, a shard of {INDEX}")),
            several => Err(format!("{}, shards of {INDEX}", first_few(several))),
        };
    }
    let all: Vec<&str> = names.iter().copied().filter(|name| name.ends_with(".safetensors") && !is_module_file(name)).collect();
    if all.contains(&"model.safetensors") {
        return Ok(vec!["model.safetensors".to_owned()]);
    }
    let mut sets: BTreeSet<(&str, &str)> = all.iter().filter_map(|name| set_of(name)).map(|(prefix, _, total)| (prefix, total)).collect();
    if sets.iter().any(|(prefix, _)| *prefix == "model") {
        sets.retain(|(prefix, _)| *prefix == "model");
    }
    match (sets.len(), all.as_slice()) {
        (_, []) => Err("weights (*.safetensors)".to_owned()),
        (1, _) => sets.first().map_or(Ok(Vec::new()), |(prefix, total)| whole_set(&all, prefix, total)),
        (0, [one]) => Ok(vec![(*one).to_owned()]),
        _ => {
            let all: Vec<String> = all.iter().map(|name| (*name).to_owned()).collect();
            Err(format!("an {INDEX} that says which of its weight files are the model's ({})", first_few(&all)))
        }
    }
}

/// `("model", "00001", "00003")` of `model-00001-of-00003.safetensors`.
fn set_of(name: &str) -> Option<(&str, &str, &str)> {
    let (rest, total) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (prefix, number) = rest.rsplit_once('-')?;
    let is_number = |text: &str| !text.is_empty() && text.len() <= 6 && text.bytes().all(|byte| byte.is_ascii_digit());
    (is_number(number) && is_number(total)).then_some((prefix, number, total))
}

/// The names of a set without an index, of which no part may be missing.
fn whole_set(names: &[&str], prefix: &str, total: &str) -> Result<Vec<String>, String> {
    let width = names.iter().find_map(|name| set_of(name).filter(|set| (set.0, set.2) == (prefix, total))).map_or(0, |set| set.1.len());
    let count: usize = total.parse().unwrap_or_default();
    let parts = (1..=count).map(|index| format!("{prefix}-{index:0width$}-of-{total}.safetensors"));
    let (there, lost): (Vec<_>, Vec<_>) = parts.partition(|part| names.contains(&part.as_str()));
    if lost.is_empty() { Ok(there) } else { Err(first_few(&lost)) }
}

/// Some names for a message, and how many more there are.
fn first_few(names: &[String]) -> String {
    const SHOWN: usize = 4;
    let shown = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN { format!("{shown} and {} more", names.len() - SHOWN) } else { shown }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn parts_of_a_set_without_an_index() {
        let part = |index: usize| format!("model-{index:05}-of-00007.safetensors");
        let all: Vec<String> = (1..=7).map(part).collect();
        let names: Vec<&str> = all.iter().map(String::as_str).collect();
        assert_eq!(weight_files(&names, None).unwrap(), all);
        assert_eq!(weight_files(&names[..6], None).unwrap_err(), all[6]);
        let message = weight_files(&names[..1], None).unwrap_err();
        assert!(message.contains(&all[1]) && message.ends_with("and 2 more"), "{message}");
        assert_eq!(weight_files(&[&names[..], &["adapter.safetensors"]].concat(), None).unwrap(), all, "what is not of the set is left");
        let both = [names[0], "consolidated-00001-of-00001.safetensors", "x.safetensors"];
        assert!(weight_files(&both, None).unwrap_err().contains(&all[1]));
    }

    #[test]
    fn single_files_and_several_that_nothing_tells_apart() {
        assert_eq!(weight_files(&["x.safetensors", "model.safetensors"], None).unwrap(), ["model.safetensors"]);
        assert_eq!(weight_files(&["x.safetensors", "config.json"], None).unwrap(), ["x.safetensors"]);
        assert_eq!(weight_files(&["config.json"], None).unwrap_err(), "weights (*.safetensors)");
        let message = weight_files(&["a.safetensors", "b.safetensors"], None).unwrap_err();
        assert!(message.contains("a.safetensors, b.safetensors") && message.contains(INDEX), "{message}");
    }

    #[test]
    fn shards_of_an_index() {
        let index = json!({"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}});
        let names = ["model.safetensors", "one.safetensors", "two.safetensors"];
        assert_eq!(weight_files(&names, Some(&index)).unwrap(), names[1..]);
        assert!(weight_files(&names[..1], Some(&index)).unwrap_err().starts_with("one.safetensors, two.safetensors, shards of"));
        assert!(weight_files(&names, Some(&json!({"metadata": {}}))).unwrap_err().contains("weight_map"));
        assert!(weight_files(&names, Some(&json!({"weight_map": {"a": 1}}))).unwrap_err().contains("tensor a"));
    }
}
