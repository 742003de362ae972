//! Looking through folders laid out as the Hugging Face cache: `models--{owner}--{name}/{refs,snapshots}`, and what ModelScope gave beside
//! it in the same form, `modelscope--{owner}--{name}`.

use std::path::{Path, PathBuf};

use super::folder::{self, Need, Target};
use super::unavailable;
use crate::checkpoint::files::ModelFiles;
use crate::config::{HubSettings, ModelSource};
use crate::error::Failure;

/// What a search gave: the model, or the places it is not, each with its reason.
pub struct Search {
    pub found: Option<ModelFiles>,
    pub looked: Vec<String>,
}

/// Looks in `LOCAL_MODEL_ROOT` and the caches. A place with an incomplete model is passed over.
pub fn search(target: &Target<'_>, settings: &HubSettings, need: Need) -> Result<Search, Failure> {
    if let Some(revision) = &settings.revision
        && !folder::is_revision(revision)
    {
        return Err(unavailable(format!("REVISION {revision:?} is not a branch, tag or commit")));
    }
    let mut looked = Vec::new();
    let model = target.place;
    let last = model.rsplit('/').next().unwrap_or(model);
    let local = settings.local_model_root.iter().map(|root| (root.join(last), Ok(root.join(last))));
    let caches = settings.caches.iter().map(|cache| (cache.clone(), snapshot(cache, model, settings)));
    for (place, folder) in local.chain(caches) {
        let seen = match folder {
            Err(why) => why,
            Ok(folder) if !folder.is_dir() => "not there".to_owned(),
            Ok(folder) => match folder::read(&folder, target, origin(&place, &folder)) {
                Err(failure) => failure.message,
                Ok(files) => match folder::missing(&files, need) {
                    None => return Ok(Search { found: Some(files), looked }),
                    Some(what) => format!("incomplete, it lacks {what}"),
                },
            },
        };
        looked.push(format!("{} ({seen})", place.display()));
    }
    Ok(Search { found: None, looked })
}

fn origin(place: &Path, folder: &Path) -> String {
    match folder.file_name() {
        Some(commit) if place != folder => format!("cache {}, commit {}", place.display(), commit.to_string_lossy()),
        _ => format!("folder {}", folder.display()),
    }
}

/// The folder of `model` at `revision` in one cache: by its reference, else by the commit's own name; without any reference and without
/// a wish, the first snapshot. The platform's store may hold names in lower case.
fn snapshot(cache: &Path, model: &str, settings: &HubSettings) -> Result<PathBuf, String> {
    let revision = settings.revision.as_deref();
    let repository = repository(cache, &folder_name(settings.source, model)).ok_or("not there")?;
    let snapshots = repository.join("snapshots");
    let name = revision.unwrap_or(settings.source.default_revision());
    if let Ok(commit) = std::fs::read_to_string(repository.join("refs").join(name))
        && folder::is_revision(commit.trim())
    {
        return Ok(snapshots.join(commit.trim()));
    }
    if let Some(revision) = revision {
        let commit = snapshots.join(revision);
        return if commit.is_dir() { Ok(commit) } else { Err(format!("no revision {revision}")) };
    }
    let mut folders: Vec<_> = std::fs::read_dir(&snapshots).map_err(|_| "no snapshots")?.flatten().map(|entry| entry.path()).collect();
    folders.retain(|folder| folder.is_dir());
    folders.sort();
    folders.into_iter().next().ok_or_else(|| "no snapshots".to_owned())
}

/// What the folder of a repository is called. The two hubs may have different models under one id.
pub fn folder_name(source: ModelSource, model: &str) -> String {
    let prefix = match source {
        ModelSource::HuggingFace => "models",
        ModelSource::ModelScope => "modelscope",
    };
    format!("{prefix}--{}", model.replace('/', "--"))
}

/// The repository's folder in a cache, whatever its case; the exact name first.
fn repository(cache: &Path, name: &str) -> Option<PathBuf> {
    let exact = cache.join(name);
    if exact.is_dir() {
        return Some(exact);
    }
    let mut alike: Vec<_> = std::fs::read_dir(cache).ok()?.flatten().filter(|entry| entry.file_name().eq_ignore_ascii_case(name)).collect();
    alike.sort_by_key(|entry| entry.file_name());
    alike.into_iter().map(|entry| entry.path()).find(|path| path.is_dir())
}
