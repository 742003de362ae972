//! Downloads by hf-hub, which locks each file, writes beside it and renames: several workers may share one cache.
//!
//! Everything is fetched at one commit, and the reference (`refs/main`) is written last: it never points to half a model.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hf_hub::api::RepoInfo;
use hf_hub::api::tokio::{Api, ApiBuilder, ApiError, ApiRepo, Progress};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::ProgressBar;

use super::folder::{self, Need, Target};
use super::unavailable;
use crate::checkpoint::files::{INDEX, ModelFiles, Source, is_module_file, weight_files};
use crate::checkpoint::gguf;
use crate::config::{ExposeSecret, HubSettings, defaults};
use crate::error::Failure;

/// Tries per file and per question, the first included.
const TRIES: u32 = 5;
/// A download that brings nothing for so long is begun anew.
const STALL: Duration = Duration::from_secs(60);
const QUESTION: Duration = Duration::from_secs(30);

/// Downloads what `need` asks for into the first cache that can be written.
pub async fn into_cache(model: &str, settings: &HubSettings, need: Need, bars: bool) -> Result<ModelFiles, Failure> {
    let Some(cache) = settings.caches.iter().find(|cache| writable(cache)) else {
        let caches: Vec<_> = settings.caches.iter().map(|cache| cache.display().to_string()).collect();
        return Err(unavailable(format!(
            "model {model} cannot be fetched: no cache folder can be written ({}); set HF_HOME to one that can",
            caches.join(", ")
        )));
    };
    Download::new(model, settings, cache, bars)?.run(need).await
}

/// Downloads a model's files into `folder`. They come through a cache inside it, which goes when all are there, so that a second try
/// goes on where the first ended.
pub async fn into_folder(model: &str, settings: &HubSettings, folder: &Path) -> Result<ModelFiles, Failure> {
    let cache = folder.join(".download");
    let files = Download::new(model, settings, &cache, true)?.run(Need::Model).await?;
    let broken =
        |error: std::io::Error| unavailable(format!("model {model} is fetched, but cannot be moved to {}: {error}", folder.display()));
    // A GGUF file is its own tokenizer.
    for (name, source) in files.iter().filter(|(name, _)| *name != gguf::TOKENIZER) {
        if let Source::Path(path) = source {
            let to = folder.join(name);
            to.parent().map_or(Ok(()), std::fs::create_dir_all).map_err(broken)?;
            std::fs::rename(path, to).map_err(broken)?;
        }
    }
    std::fs::remove_dir_all(&cache).map_err(broken)?;
    let files = folder::read(folder, &Target::of(model), format!("folder {}", folder.display()))?;
    match folder::missing(&files, Need::Model) {
        Some(what) => Err(unavailable(format!("the folder {} lacks {what} after the download", folder.display()))),
        None => Ok(files),
    }
}

/// True when files can be made in `folder`, which is made if need be.
fn writable(folder: &Path) -> bool {
    let probe = folder.join(format!(".probe-{}", uuid::Uuid::new_v4()));
    std::fs::create_dir_all(folder).is_ok() && std::fs::write(&probe, []).is_ok() && std::fs::remove_file(&probe).is_ok()
}

struct Download<'a> {
    model: &'a str,
    target: Target<'a>,
    revision: &'a str,
    cache: PathBuf,
    /// Shown in messages: no credentials in it.
    endpoint: String,
    has_token: bool,
    bars: bool,
    api: Api,
}

impl<'a> Download<'a> {
    fn new(model: &'a str, settings: &'a HubSettings, cache: &Path, bars: bool) -> Result<Self, Failure> {
        let endpoint = settings.endpoint.clone();
        let token = settings.token.as_ref().map(|token| token.expose_secret().to_owned());
        let has_token = token.is_some();
        let shown = endpoint.rsplit_once('@').map_or(endpoint.clone(), |(_, host)| host.to_owned());
        let api = ApiBuilder::from_cache(Cache::new(cache.to_owned()))
            .with_endpoint(endpoint)
            .with_token(token)
            .with_max_files(8)
            .with_user_agent("worker-candle", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|_| unavailable("the hub's client cannot be made: HF_TOKEN holds characters that no token has".to_owned()))?;
        let revision = settings.revision.as_deref().unwrap_or(defaults::REVISION);
        let bars = bars && std::io::stderr().is_terminal();
        Ok(Self { model, target: Target::of(model), revision, cache: cache.to_owned(), endpoint: shown, has_token, bars, api })
    }

    async fn run(&self, need: Need) -> Result<ModelFiles, Failure> {
        let info = self.info().await?;
        let commit = info.sha.as_str();
        if !folder::is_revision(commit) || commit.contains('/') {
            return Err(self.cannot("the hub names a commit that is none"));
        }
        // Pinned: a push in between must not mix two versions.
        let repo = self.api.repo(self.repo(commit));
        let snapshot = Cache::new(self.cache.clone()).repo(self.repo(commit)).pointer_path(commit);
        let all: Vec<&str> = info.siblings.iter().map(|file| file.rfilename.as_str()).collect();
        let names: Vec<&str> = all.iter().copied().filter(|name| folder::wanted(name, need)).collect();
        let is_plain = |name: &&str| name.ends_with(".safetensors") || (need == Need::Tokenizer && name.starts_with("tokenizer."));
        if self.target.gguf.is_some() || (!names.iter().any(is_plain) && all.iter().any(|path| gguf::is_model_part(path))) {
            let files = gguf::pick(&all, self.target.gguf).map_err(|lost| self.cannot(format!("the repository lacks {lost}")))?;
            for name in files {
                self.file(&repo, &snapshot, &name).await?;
            }
        } else {
            self.plain_files(&repo, &snapshot, &names, need).await?;
        }
        let files = folder::read(&snapshot, &self.target, format!("download from {}, commit {commit}", self.endpoint))?;
        if let Some(what) = folder::missing(&files, need) {
            return Err(self.cannot(format!("the repository lacks {what}")));
        }
        self.point_to(commit)?;
        Ok(files)
    }

    async fn plain_files(&self, repo: &ApiRepo, snapshot: &Path, names: &[&str], need: Need) -> Result<(), Failure> {
        for name in names.iter().filter(|name| !name.ends_with(".safetensors") || is_module_file(name)) {
            self.file(repo, snapshot, name).await?;
        }
        if need != Need::Tokenizer {
            for name in self.weights(snapshot, names)? {
                self.file(repo, snapshot, &name).await?;
            }
        }
        Ok(())
    }

    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.target.place.to_owned(), RepoType::Model, revision.to_owned())
    }

    fn weights(&self, snapshot: &Path, names: &[&str]) -> Result<Vec<String>, Failure> {
        let index = if names.contains(&INDEX) {
            let read = std::fs::read(snapshot.join(INDEX)).map_err(|error| error.to_string());
            let parsed = read.and_then(|bytes| serde_json::from_slice(&bytes).map_err(|error| error.to_string()));
            Some(parsed.map_err(|error| self.cannot(format!("{INDEX}: {error}")))?)
        } else {
            None
        };
        weight_files(names, index.as_ref()).map_err(|lost| self.cannot(format!("the repository lacks {lost}")))
    }

    /// The repository's files and commit.
    async fn info(&self) -> Result<RepoInfo, Failure> {
        let mut tries = 0;
        loop {
            tries += 1;
            let answer = self.api.repo(self.repo(self.revision)).info_request().timeout(QUESTION).send().await;
            let why = match answer {
                Ok(response) if response.status().is_success() => match response.json().await {
                    Ok(info) => return Ok(info),
                    Err(error) => format!("the hub's answer is not what was asked for: {}", chain(&error.without_url())),
                },
                Ok(response) if !passing(response.status().as_u16()) => {
                    let code = response.headers().get("x-error-code").and_then(|code| code.to_str().ok()).unwrap_or_default().to_owned();
                    return Err(self.refused(response.status().as_u16(), &code));
                }
                Ok(response) => format!("{} answers {}", self.endpoint, response.status()),
                Err(error) => format!("{} cannot be reached: {}", self.endpoint, chain(&error.without_url())),
            };
            if tries == TRIES {
                return Err(self.cannot(why));
            }
            tracing::warn!("model {}: {why}; trying again", self.model);
            tokio::time::sleep(pause(tries)).await;
        }
    }

    /// Fetches one file unless it is there.
    async fn file(&self, repo: &ApiRepo, snapshot: &Path, name: &str) -> Result<(), Failure> {
        let mut tries = 0;
        let mut waited = false;
        let link = snapshot.join(name);
        while !link.is_file() {
            // A link that leads nowhere, which hf-hub would not replace.
            if link.is_symlink() {
                let _ = std::fs::remove_file(&link);
            }
            let error = match self.attempt(repo, name).await {
                Ok(()) => return Ok(()),
                // Another process is at it. It will be there, or the lock will be free.
                Err(Trouble::Api(ApiError::LockAcquisition(_))) => {
                    if !std::mem::replace(&mut waited, true) {
                        tracing::info!("{name} is being downloaded by another process: waiting for it");
                    }
                    continue;
                }
                Err(error) => error,
            };
            tries += 1;
            let why = error.to_string();
            if let Trouble::Api(ApiError::RequestError(error)) = &error
                && let Some(status) = error.status()
                && !passing(status.as_u16())
            {
                return Err(self.refused(status.as_u16(), ""));
            }
            if tries == TRIES || error.is_final() {
                return Err(self.cannot(format!("{name}: {why}")));
            }
            tracing::warn!("{name}: {why}; trying again");
            tokio::time::sleep(pause(tries)).await;
        }
        Ok(())
    }

    /// One try, given up when nothing comes any more.
    async fn attempt(&self, repo: &ApiRepo, name: &str) -> Result<(), Trouble> {
        let watched = Watched::new(self.bars.then(|| ProgressBar::new(0)));
        let download = repo.download_with_progress(name, watched.clone());
        tokio::pin!(download);
        loop {
            tokio::select! {
                done = &mut download => return done.map(|_| ()).map_err(Trouble::Api),
                () = tokio::time::sleep(Duration::from_secs(1)) => if watched.idle() > STALL {
                    return Err(Trouble::Stalled);
                },
            }
        }
    }

    /// Writes the reference by which caches find a commit. Renamed into place, since others may read it now.
    fn point_to(&self, commit: &str) -> Result<(), Failure> {
        if self.revision == commit {
            return Ok(());
        }
        let repository = self.cache.join(self.repo(commit).folder_name());
        let path = repository.join("refs").join(self.revision);
        let write = || {
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent)?;
            }
            let beside = repository.join(format!(".ref-{}", uuid::Uuid::new_v4()));
            std::fs::write(&beside, commit)?;
            std::fs::rename(&beside, &path)
        };
        write().map_err(|error: std::io::Error| self.cannot(format!("{}: {error}", path.display())))
    }

    /// The hub says no: what that means, and what to do.
    fn refused(&self, status: u16, code: &str) -> Failure {
        let Self { model, endpoint, revision, .. } = self;
        let token = if self.has_token { "the HF_TOKEN given does not open it" } else { "set HF_TOKEN if it is private or gated" };
        self.cannot(match (status, code) {
            (_, "RevisionNotFound") => format!("it has no revision {revision}; check REVISION"),
            (403, _) | (_, "GatedRepo") => {
                format!("it is gated: ask for access at {endpoint}/{model} and set HF_TOKEN to a token of that account")
            }
            (401, _) => format!("the hub answers 401: check the model's name; {token}"),
            (404, _) => format!("the hub answers 404: check the model's name and REVISION ({revision}); {token}"),
            _ => format!("the hub answers {status}"),
        })
    }

    fn cannot(&self, why: impl std::fmt::Display) -> Failure {
        unavailable(format!("model {} cannot be fetched from {}: {why}. `--model demo` needs no network", self.model, self.endpoint))
    }
}

/// Why a try failed.
enum Trouble {
    Api(ApiError),
    Stalled,
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            // Addresses of files may be signed: not shown.
            Trouble::Api(ApiError::RequestError(error)) => f.write_str(&without_address(&chain(error), error)),
            Trouble::Api(error) => write!(f, "{error}"),
            Trouble::Stalled => write!(f, "nothing came for {} s", STALL.as_secs()),
        }
    }
}

impl Trouble {
    /// Another try would fail the same way. (Other faults of the disk pass: two processes may make the same link at once.)
    fn is_final(&self) -> bool {
        use std::io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem, StorageFull};
        matches!(self, Trouble::Api(ApiError::IoError(error)) if matches!(error.kind(), PermissionDenied | ReadOnlyFilesystem | StorageFull))
    }
}

fn without_address(text: &str, error: &reqwest::Error) -> String {
    match error.url() {
        Some(url) => text.replace(&format!(" for url ({url})"), "").replace(url.as_str(), "the file"),
        None => text.to_owned(),
    }
}

/// An error with its causes: reqwest's own text names none.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Worth another try.
fn passing(status: u16) -> bool {
    matches!(status, 408 | 425 | 429 | 500..)
}

fn pause(tries: u32) -> Duration {
    Duration::from_millis(500 << (tries - 1).min(4))
}

/// Progress of one file: a bar, or a log line every few seconds; and when the last bytes came.
#[derive(Clone)]
struct Watched {
    bar: Option<ProgressBar>,
    name: Arc<str>,
    begun: Instant,
    size: u64,
    /// Bytes so far; moments in milliseconds since `begun`.
    done: Arc<AtomicU64>,
    moved: Arc<AtomicU64>,
    told: Arc<AtomicU64>,
}

impl Watched {
    fn new(bar: Option<ProgressBar>) -> Self {
        Self { bar, name: Arc::from(""), begun: Instant::now(), size: 0, done: Arc::default(), moved: Arc::default(), told: Arc::default() }
    }

    fn idle(&self) -> Duration {
        self.begun.elapsed().saturating_sub(Duration::from_millis(self.moved.load(Ordering::Relaxed)))
    }
}

impl Progress for Watched {
    async fn init(&mut self, size: usize, filename: &str) {
        self.name = filename.into();
        self.size = size as u64;
        match &mut self.bar {
            Some(bar) => Progress::init(bar, size, filename).await,
            None => tracing::info!("downloading {filename} ({})", indicatif::HumanBytes(size as u64)),
        }
    }

    async fn update(&mut self, size: usize) {
        let now = self.begun.elapsed().as_millis() as u64;
        self.moved.store(now, Ordering::Relaxed);
        let done = self.done.fetch_add(size as u64, Ordering::Relaxed) + size as u64;
        if let Some(bar) = &mut self.bar {
            return Progress::update(bar, size).await;
        }
        let told = self.told.load(Ordering::Relaxed);
        if now >= told + 5000 && self.told.compare_exchange(told, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            tracing::info!("downloading {}: {} %", self.name, done * 100 / self.size.max(1));
        }
    }

    async fn finish(&mut self) {
        if let Some(bar) = &mut self.bar {
            Progress::finish(bar).await;
        }
    }
}
