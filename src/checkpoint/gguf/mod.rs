//! GGUF: one file with weights, configuration and tokenizer, as llama.cpp reads it. Here it is seen as a Hugging Face folder: its metadata
//! becomes the configuration files ([`config`]), its tensors get the names of that model family ([`names`]), and nothing behind knows the
//! difference. What lies beside the file (`config.json`, `tokenizer.json`) is not looked at: the file's own metadata is what it was made with.

use std::sync::Arc;

use serde_json::Value as Json;

use super::Bytes;
pub use super::files::GGUF_TOKENIZER as TOKENIZER;
use super::files::{ModelFiles, Source};
use crate::error::Failure;

mod architectures;
mod config;
mod formats;
mod header;
mod names;
mod pick;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub mod writer;

pub use formats::{Blocks, TensorType};
pub use header::{Header, Value};
pub use names::Naming;
pub use pick::{is_model_part, pick};

/// The types of tensors that can be read, for messages.
pub const READABLE: &str = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS and MXFP4";

/// The architectures that are served.
pub fn architectures() -> impl Iterator<Item = &'static str> {
    architectures::ARCHITECTURES.iter().map(|row| row.name)
}

/// The model in these files, the first of which has the metadata.
pub fn model_files(name: &str, origin: &str, files: Vec<(String, Source)>) -> Result<ModelFiles, Failure> {
    let Some((file, source)) = files.first().cloned() else { return Err(Failure::internal(format!("{name} has no GGUF file"))) };
    let broken = |problem: String| Failure::internal(format!("GGUF file {file} of {name}: {problem}"));
    let bytes = Bytes::open(&source)?;
    let header = Header::parse(bytes.get()).map_err(broken)?;
    let parts = header.integer("split.count").map_err(broken)?.unwrap_or(1).max(1);
    if parts != files.len() as u64 {
        return Err(broken(format!("it is one of {parts} files of a model, of which {} are there", files.len())));
    }
    let made = [
        ("config.json", config::model(&header, bytes.get())),
        ("tokenizer_config.json", config::tokenizer(&header)),
        ("generation_config.json", config::generation(&header)),
    ];
    let mut all = vec![(TOKENIZER.to_owned(), source)];
    let modules = config::modules(&header).map_err(broken)?.into_iter().flatten().map(|(name, json)| (name, Ok(json)));
    for (name, json) in made.into_iter().chain(modules) {
        let json: Json = json.map_err(broken)?;
        all.push((name.to_owned(), Source::Made(Arc::from(json.to_string().into_bytes()))));
    }
    all.extend(files);
    Ok(ModelFiles::new(name, origin, all))
}

/// A file whose metadata is asked for.
pub struct File {
    bytes: Bytes,
}

impl File {
    pub fn open(source: &Source) -> Result<Self, Failure> {
        Ok(Self { bytes: Bytes::open(source)? })
    }

    pub fn header(&self) -> Result<Header<'_>, String> {
        Header::parse(self.bytes.get())
    }
}
