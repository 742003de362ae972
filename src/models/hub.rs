//! Finding a model: a local folder, the Hugging Face cache, RunPod's cached-model store, else a download.

use crate::config::HubSettings;
use crate::error::Failure;
use crate::models::files::ModelFiles;

/// Finds `model` without the network, in this order: `demo`, a folder, `local_model_root`, the caches.
pub fn find_local(model: &str, settings: &HubSettings) -> Result<Option<ModelFiles>, Failure> {
    let _ = (model, settings);
    Ok(None)
}

/// Finds `model`, downloading what is missing unless offline.
pub async fn fetch(model: &str, settings: &HubSettings) -> Result<ModelFiles, Failure> {
    let _ = settings;
    Err(Failure::internal(format!("model {model} not found")))
}
