//! Finding a model: a GGUF file, a local folder, `LOCAL_MODEL_ROOT`, the Hugging Face caches (the platform's store among them), else a
//! download from the hub that `MODEL_SOURCE` names.
//!
//! What lies on disk is used without asking the network, so that a cold start with a cached model needs none. A snapshot with a file
//! missing counts as not found, and a download completes it.

use std::path::Path;

use crate::checkpoint::demo;
use crate::checkpoint::files::ModelFiles;
#[cfg(test)]
use crate::checkpoint::files::Source;
use crate::config::HubSettings;
use crate::error::{Failure, Kind};

mod cache;
mod download;
mod folder;
mod modelscope;
#[cfg(test)]
mod modelscope_tests;
#[cfg(test)]
mod tests;
mod transfer;

use cache::Search;
use folder::{Need, Target};

/// Finds `model` without the network, in this order: `demo` (built in), a GGUF file, a folder, `local_model_root`, the caches.
///
/// # Errors
/// When `model` names a folder that is not there or lacks files.
pub fn find_local(model: &str, settings: &HubSettings) -> Result<Option<ModelFiles>, Failure> {
    let found = search(model, settings, need(settings))?.found;
    match (found, &settings.tokenizer) {
        (Some(files), Some(tokenizer)) => {
            Ok(search(tokenizer, settings, Need::Tokenizer)?.found.map(|other| folder::with_tokenizer(files, &other)))
        }
        (found, _) => Ok(found),
    }
}

/// Finds `model`, downloading what is missing unless offline.
///
/// # Errors
/// When it cannot be had: what was looked at, why, and what to do.
pub async fn fetch(model: &str, settings: &HubSettings) -> Result<ModelFiles, Failure> {
    let files = fetch_part(model, settings, need(settings)).await?;
    match &settings.tokenizer {
        Some(tokenizer) => Ok(folder::with_tokenizer(files, &fetch_part(tokenizer, settings, Need::Tokenizer).await?)),
        None => Ok(files),
    }
}

/// Downloads `model` into the cache, or its files into the folder `to`, with progress bars where there is a terminal. What is there
/// already is not fetched again.
pub async fn pull(model: &str, settings: &HubSettings, to: Option<&Path>) -> Result<ModelFiles, Failure> {
    if !folder::is_hub_id(Target::of(model).place) {
        return Err(unavailable(format!("model {model:?} is not the id of a model on the hub, like baidu/ERNIE-4.5-0.3B-Paddle")));
    }
    if settings.offline {
        return Err(unavailable(format!("model {model} cannot be fetched: HF_HUB_OFFLINE forbids the network; unset it")));
    }
    match to {
        Some(folder) => download::into_folder(model, settings, folder).await,
        None => download::into_cache(model, settings, Need::Model, true).await,
    }
}

async fn fetch_part(model: &str, settings: &HubSettings, need: Need) -> Result<ModelFiles, Failure> {
    let Search { found, looked } = search(model, settings, need)?;
    if let Some(files) = found {
        return Ok(files);
    }
    let tried = format!("looked at: {}", looked.join("; "));
    if settings.offline {
        return Err(unavailable(format!(
            "model {model} is not on this machine, and HF_HUB_OFFLINE forbids a download. {tried}. Fetch it with `worker-candle pull {model}`, \
             or try `--model demo`, which needs no network"
        )));
    }
    tracing::info!("model {model} is not on this machine, or not whole: downloading");
    download::into_cache(model, settings, need, false)
        .await
        .map_err(|failure| Failure { message: format!("{}. {tried}", failure.message), ..failure })
}

/// A model whose tokenizer comes from elsewhere need not bring one.
fn need(settings: &HubSettings) -> Need {
    if settings.tokenizer.is_some() { Need::Weights } else { Need::Model }
}

fn search(model: &str, settings: &HubSettings, need: Need) -> Result<Search, Failure> {
    if model == demo::NAME {
        return Ok(Search { found: Some(demo::files()), looked: Vec::new() });
    }
    let target = Target::of(model);
    let path = Path::new(target.place);
    if path.is_file() {
        return Ok(Search { found: Some(folder::gguf_file(path, model)?), looked: Vec::new() });
    }
    if path.is_dir() {
        let files = folder::read(path, &target, format!("folder {}", target.place))?;
        return match folder::missing(&files, need) {
            Some(what) => Err(unavailable(format!("the model's folder {} lacks {what}", target.place))),
            None => Ok(Search { found: Some(files), looked: Vec::new() }),
        };
    }
    if !folder::is_hub_id(target.place) {
        return Err(unavailable(format!(
            "model {model:?} is neither a folder or GGUF file that is there nor the id of a model on the hub"
        )));
    }
    cache::search(&target, settings, need)
}

fn unavailable(message: String) -> Failure {
    Failure::new(Kind::NotFound, message).code("model_unavailable")
}
