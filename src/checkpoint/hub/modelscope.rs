//! Downloads from ModelScope: one GET lists a repository's files with their sizes and SHA-256, one GET brings a file, from a byte on.
//!
//! The hub names no commit of the whole, so a snapshot is named by what the list says: another list is another snapshot, and a file that
//! changed since is told by its hash. A file grows beside the snapshot and is renamed into it when it is whole and its hash is right.

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::ProgressBar;
use reqwest::{RequestBuilder, StatusCode, header};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;

use super::cache;
use super::folder::{self, Need, Target};
use super::transfer::{self, QUESTION, STALL, TRIES, chain, choose, passing, pause, weights};
use super::unavailable;
use crate::checkpoint::files::ModelFiles;
use crate::config::{ExposeSecret, HubSettings, defaults};
use crate::error::Failure;

/// The answer to the question for files.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Listing {
    data: Option<Data>,
    message: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Data {
    #[serde(default)]
    files: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    path: String,
    #[serde(default)]
    size: u64,
    /// `tree`: a folder.
    r#type: Option<String>,
    sha256: Option<String>,
}

pub struct Download<'a> {
    model: &'a str,
    target: Target<'a>,
    revision: &'a str,
    cache: &'a Path,
    endpoint: String,
    token: Option<String>,
    bars: bool,
    client: reqwest::Client,
}

impl<'a> Download<'a> {
    pub fn new(model: &'a str, settings: &'a HubSettings, cache: &'a Path, bars: bool) -> Result<Self, Failure> {
        let endpoint = settings.endpoint.as_deref().unwrap_or(defaults::MODELSCOPE_ENDPOINT);
        let agent = format!("worker-candle/{}", env!("CARGO_PKG_VERSION"));
        let client = reqwest::Client::builder().user_agent(agent).connect_timeout(QUESTION).read_timeout(STALL).build();
        Ok(Self {
            model,
            target: Target::of(model),
            revision: settings.revision.as_deref().unwrap_or(settings.source.default_revision()),
            cache,
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: settings.token.as_ref().map(|token| token.expose_secret().to_owned()),
            bars: bars && std::io::stderr().is_terminal(),
            client: client.map_err(|error| unavailable(format!("the hub's client cannot be made: {error}")))?,
        })
    }

    pub async fn run(self, need: Need) -> Result<ModelFiles, Failure> {
        let entries = self.list().await?;
        let all: Vec<&str> = entries.iter().map(|entry| entry.path.as_str()).collect();
        let snapshot_name = name_of(&entries);
        let repository = self.cache.join(cache::folder_name(crate::config::ModelSource::ModelScope, self.target.place));
        let snapshot = repository.join("snapshots").join(&snapshot_name);
        let (first, has_weights) = choose(&all, &self.target, need).map_err(|lost| self.cannot(format!("the repository lacks {lost}")))?;
        let parts = repository.join("parts").join(&snapshot_name);
        let fetch = async |names: &[String]| {
            for name in names {
                let entry = entries.iter().find(|entry| entry.path == *name);
                let entry = entry.ok_or_else(|| self.cannot(format!("the repository lacks {name}")))?;
                self.file(entry, &snapshot.join(name), &parts.join(name)).await?;
            }
            Ok::<(), Failure>(())
        };
        fetch(&first).await?;
        if has_weights {
            fetch(&weights(&snapshot, &all, need).map_err(|lost| self.cannot(lost))?).await?;
        }
        let files = folder::read(&snapshot, &self.target, format!("download from {}, revision {}", self.endpoint, self.revision))?;
        if let Some(what) = folder::missing(&files, need) {
            return Err(self.cannot(format!("the repository lacks {what}")));
        }
        transfer::point_to(&repository, self.revision, &snapshot_name).map_err(|why| self.cannot(why))?;
        Ok(files)
    }

    fn get(&self, url: &str) -> RequestBuilder {
        let request = self.client.get(url);
        match &self.token {
            // Older deployments know the token as a session alone.
            Some(token) => request.bearer_auth(token).header(header::COOKIE, format!("m_session_id={token}")),
            None => request,
        }
    }

    /// The repository's files, folders left out.
    async fn list(&self) -> Result<Vec<Entry>, Failure> {
        let url = format!("{}/api/v1/models/{}/repo/files", self.endpoint, self.target.place);
        for tries in 1.. {
            let asked = self.get(&url).query(&[("Revision", self.revision), ("Recursive", "true")]).timeout(QUESTION).send().await;
            let why = match asked {
                Ok(answer) if answer.status().is_success() => match answer.json::<Listing>().await {
                    Ok(Listing { data: Some(data), .. }) => return self.checked(data.files),
                    Ok(Listing { message, .. }) => return Err(self.cannot(message.unwrap_or_else(|| "the hub lists no files".to_owned()))),
                    Err(error) => format!("the hub's answer is not what was asked for: {}", chain(&error.without_url())),
                },
                Ok(answer) if !passing(answer.status().as_u16()) => return Err(self.refused(answer.status())),
                Ok(answer) => format!("{} answers {}", self.endpoint, answer.status()),
                Err(error) => format!("{} cannot be reached: {}", self.endpoint, chain(&error.without_url())),
            };
            if tries == TRIES {
                return Err(self.cannot(why));
            }
            tracing::warn!("model {}: {why}; trying again", self.model);
            tokio::time::sleep(pause(tries)).await;
        }
        Err(self.cannot("the hub lists no files"))
    }

    /// Paths stay in the snapshot, and hashes are hashes.
    fn checked(&self, files: Vec<Entry>) -> Result<Vec<Entry>, Failure> {
        let mut files: Vec<Entry> = files.into_iter().filter(|file| file.r#type.as_deref() != Some("tree")).collect();
        let leads_out = |path: &str| path.is_empty() || path.contains('\\') || path.split('/').any(|part| matches!(part, "" | "." | ".."));
        if let Some(file) = files.iter().find(|file| leads_out(&file.path)) {
            return Err(self.cannot(format!("the hub lists a file {:?}, which is no path in a repository", file.path)));
        }
        files.iter_mut().for_each(|file| file.sha256 = file.sha256.take().filter(|hash| !hash.is_empty()).map(|hash| hash.to_lowercase()));
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(files)
    }

    /// Fetches one file unless it is there, going on where an earlier try ended.
    async fn file(&self, entry: &Entry, to: &Path, part: &Path) -> Result<(), Failure> {
        let broken = |path: &Path, error: std::io::Error| self.cannot(format!("{}: {error}", path.display()));
        for folder in [to, part].into_iter().filter_map(Path::parent) {
            std::fs::create_dir_all(folder).map_err(|error| broken(folder, error))?;
        }
        let mut tries = 0;
        while !to.is_file() {
            let locked = self.locked(part, to).await.map_err(|error| broken(part, error))?;
            let Some(locked) = locked else { return Ok(()) };
            let why = match self.attempt(entry, part).await {
                Ok(()) => {
                    std::fs::rename(part, to).map_err(|error| broken(to, error))?;
                    return Ok(());
                }
                Err(Trouble::Final(failure)) => return Err(failure),
                Err(Trouble::Passing(why)) => why,
            };
            drop(locked);
            tries += 1;
            if tries == TRIES {
                return Err(self.cannot(format!("{}: {why}", entry.path)));
            }
            tracing::warn!("{}: {why}; trying again", entry.path);
            tokio::time::sleep(pause(tries)).await;
        }
        Ok(())
    }

    /// The lock of a part that grows: another process may be at it. `None`: it has brought the file meanwhile.
    async fn locked(&self, part: &Path, to: &Path) -> std::io::Result<Option<std::fs::File>> {
        let lock = std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(lock_of(part))?;
        let mut told = false;
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok((!to.is_file()).then_some(lock)),
                Err(std::fs::TryLockError::Error(error)) => return Err(error),
                Err(std::fs::TryLockError::WouldBlock) => {}
            }
            if !std::mem::replace(&mut told, true) {
                tracing::info!("{} is being downloaded by another process: waiting for it", part.display());
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    async fn attempt(&self, entry: &Entry, part: &Path) -> Result<(), Trouble> {
        use std::io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem, StorageFull};
        let disk = |error: std::io::Error| match error.kind() {
            PermissionDenied | ReadOnlyFilesystem | StorageFull => Trouble::Final(self.cannot(format!("{}: {error}", entry.path))),
            _ => Trouble::Passing(error.to_string()),
        };
        let there = std::fs::metadata(part).map_or(0, |meta| meta.len());
        // More than there is to fetch: of another file.
        let there = if there > entry.size { 0 } else { there };
        if there < entry.size || entry.size == 0 {
            self.transfer(entry, part, there, disk).await?;
        }
        let size = std::fs::metadata(part).map_err(disk)?.len();
        if size != entry.size {
            return Err(Trouble::Passing(format!("it ended after {size} of {} bytes", entry.size)));
        }
        let (path, wanted) = (part.to_owned(), entry.sha256.clone());
        let hash = tokio::task::spawn_blocking(move || wanted.map(|wanted| Ok((sha256(&path)?, wanted))).transpose());
        match hash.await.map_err(|error| Trouble::Passing(error.to_string()))?.map_err(disk)? {
            Some((found, wanted)) if found != wanted => {
                std::fs::remove_file(part).map_err(disk)?;
                let why = format!("its SHA-256 is {found}, and the hub says {wanted}");
                // What an earlier try left may have been the wrong part; all of it at once is what the hub has.
                Err(if there > 0 { Trouble::Passing(why) } else { Trouble::Final(self.cannot(format!("{}: {why}", entry.path))) })
            }
            _ => Ok(()),
        }
    }

    /// Appends to the part what comes from `there` on.
    async fn transfer(&self, entry: &Entry, part: &Path, there: u64, disk: impl Fn(std::io::Error) -> Trouble) -> Result<(), Trouble> {
        let path: String =
            entry.path.split('/').map(|part| percent_encoding::utf8_percent_encode(part, PATH).to_string()).collect::<Vec<_>>().join("/");
        let url = format!("{}/models/{}/resolve/{}/{path}", self.endpoint, self.target.place, self.revision);
        let passing_on = |error: reqwest::Error| Trouble::Passing(chain(&error.without_url()));
        let mut answer = self.get(&url).header(header::RANGE, format!("bytes={there}-")).send().await.map_err(passing_on)?;
        let status = answer.status();
        if !status.is_success() {
            let why = format!("{} answers {status}", self.endpoint);
            return Err(if passing(status.as_u16()) { Trouble::Passing(why) } else { Trouble::Final(self.refused(status)) });
        }
        // A whole answer although a part was asked for: from the beginning.
        let there = if status == StatusCode::PARTIAL_CONTENT { there } else { 0 };
        let file = std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(part).map_err(&disk)?;
        file.set_len(there).map_err(&disk)?;
        let mut file = tokio::fs::File::from_std(file);
        tokio::io::AsyncSeekExt::seek(&mut file, std::io::SeekFrom::Start(there)).await.map_err(&disk)?;
        let bar = self.bars.then(|| ProgressBar::new(entry.size));
        match &bar {
            Some(bar) => bar.set_position(there),
            None => tracing::info!("downloading {} ({})", entry.path, indicatif::HumanBytes(entry.size)),
        }
        let mut done = there;
        let received = loop {
            let chunk = match answer.chunk().await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => break Ok(()),
                Err(error) => break Err(passing_on(error)),
            };
            done += chunk.len() as u64;
            if done > entry.size {
                return Err(Trouble::Passing(format!("it is longer than the {} bytes that the hub lists", entry.size)));
            }
            file.write_all(&chunk).await.map_err(&disk)?;
            bar.iter().for_each(|bar| bar.inc(chunk.len() as u64));
        };
        // However it ended, the next try goes on behind what came.
        file.flush().await.map_err(&disk)?;
        file.sync_all().await.map_err(disk)?;
        received
    }

    fn refused(&self, status: StatusCode) -> Failure {
        let token = if self.token.is_some() {
            "the MODELSCOPE_API_TOKEN given does not open it"
        } else {
            "set MODELSCOPE_API_TOKEN if it is private"
        };
        self.cannot(match status.as_u16() {
            401 | 403 => format!("the hub answers {status}: {token}"),
            404 => format!("the hub answers 404: check the model's name and REVISION ({}); {token}", self.revision),
            _ => format!("the hub answers {status}"),
        })
    }

    fn cannot(&self, why: impl std::fmt::Display) -> Failure {
        unavailable(format!("model {} cannot be fetched from {}: {why}. `--model demo` needs no network", self.model, self.endpoint))
    }
}

/// What a path's part is not written with.
const PATH: &percent_encoding::AsciiSet = &percent_encoding::NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

enum Trouble {
    /// Another try would fail the same way.
    Final(Failure),
    Passing(String),
}

fn lock_of(part: &Path) -> PathBuf {
    part.with_file_name(format!("{}.lock", part.file_name().unwrap_or_default().to_string_lossy()))
}

/// A snapshot's name, by the files that are listed.
fn name_of(entries: &[Entry]) -> String {
    let mut hasher = Sha256::new();
    for Entry { path, size, sha256, .. } in entries {
        hasher.update(format!("{path}\0{size}\0{}\n", sha256.as_deref().unwrap_or_default()));
    }
    hasher.finalize().iter().take(20).map(|byte| format!("{byte:02x}")).collect()
}

fn sha256(path: &Path) -> std::io::Result<String> {
    let (mut file, mut hasher, mut buffer) = (std::fs::File::open(path)?, Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            read => hasher.update(&buffer[..read]),
        }
    }
}
