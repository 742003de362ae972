//! The files of one model, wherever they lie: a folder, a hub cache, or built into this binary (the demo model).

use std::borrow::Cow;
use std::path::PathBuf;

use crate::error::Failure;

/// Where the bytes of one file are.
#[derive(Debug, Clone)]
pub enum Source {
    Path(PathBuf),
    Embedded(&'static [u8]),
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
            Some(Source::Path(path)) => match std::fs::read(path) {
                Ok(bytes) => Ok(Some(Cow::Owned(bytes))),
                Err(error) => Err(Failure::internal(format!("model file {}: {error}", path.display()))),
            },
        }
    }

    /// The same as JSON.
    pub fn read_json(&self, file: &str) -> Result<Option<serde_json::Value>, Failure> {
        let Some(bytes) = self.read(file)? else { return Ok(None) };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| Failure::internal(format!("model file {file} of {} is not valid JSON: {error}", self.name)))
    }

    /// All files, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Source)> {
        self.files.iter().map(|(name, source)| (name.as_str(), source))
    }
}
