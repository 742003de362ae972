//! The prepared copy: a model's weights in the form in which our kernels read them, in one file that a start writes and later ones map, so
//! that nothing is converted twice (`PREPARED_CACHE`).

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use crate::checkpoint::files::{ModelFiles, Source, is_module_file};
use crate::config::{EngineSettings, PreparedCache, PreparedWriting, Quantization, TensorParallel};
use crate::kernels::cpu;
use crate::kernels::cpu::packed::{PackedBytes, PackedShape, PackedStore};

mod file;
mod key;

use file::Opened;

/// Smaller models are converted in no time, and get no copy unless a folder is named for it.
const LEAST_BYTES: usize = 32 << 20;
/// A disk must have room for the copy this many times.
const ROOM: u64 = 2;
/// What an older start left half written is removed after this.
const STALE: Duration = Duration::from_secs(3600);
const ENDING: &str = "prepared";

/// Where a model's prepared copy is, or will be.
pub struct PreparedCopy {
    path: PathBuf,
    /// The folder holds this model alone, so that copies which a newer one replaces are removed.
    is_beside: bool,
    opened: Option<Opened>,
    /// Matrices asked for so far.
    asked: AtomicUsize,
    /// Something was asked for that the copy does not hold.
    lacks: AtomicBool,
    /// Every matrix by its description.
    all: Mutex<Vec<(String, PackedBytes)>>,
}

impl PreparedCopy {
    /// Opens and checks the copy, if there is one; on all of rayon's threads. `None`: there is to be none.
    pub fn open(files: &ModelFiles, settings: &EngineSettings) -> Option<Arc<Self>> {
        let (path, is_beside) = path(files, settings)?;
        let opened = match Opened::read(&path) {
            Ok(opened) => opened,
            Err(problem) => {
                tracing::warn!("the prepared copy {} is not used: {problem}; it is made again", path.display());
                None
            }
        };
        let (asked, lacks, all) = Default::default();
        Some(Arc::new(Self { path, is_beside, opened, asked, lacks, all }))
    }

    /// Says where the weights came from, and writes the copy in the background when it is missing. To be called when everything is loaded.
    pub fn finish(self: Arc<Self>, writing: PreparedWriting) {
        let path = self.path.display();
        if !self.lacks.load(Ordering::Relaxed) {
            tracing::info!("weights mapped from the prepared copy {path}");
            self.all.lock().unwrap_or_else(PoisonError::into_inner).clear();
            return;
        }
        match writing {
            PreparedWriting::Never => {}
            PreparedWriting::Now => self.write_or_say(file::FAST),
            PreparedWriting::Background => {
                let copy = Arc::clone(&self);
                let started = std::thread::Builder::new().name("prepared-copy".into()).spawn(move || copy.write_or_say(file::GENTLE));
                if let Err(error) = started {
                    tracing::warn!("no prepared copy {path}: {error}");
                }
            }
        }
    }

    fn write_or_say(&self, pace: file::Pace) {
        let path = self.path.display();
        match self.write(pace) {
            Ok(None) => {}
            Ok(Some(bytes)) => tracing::info!(
                "prepared copy {path} written, {} MB: the next start maps it and converts nothing (PREPARED_CACHE=off: none)",
                bytes / 1_000_000
            ),
            Err(problem) => tracing::info!("no prepared copy {path}: {problem} (PREPARED_CACHE names another folder, or is `off`)"),
        }
    }

    /// Writes the copy, and gives its bytes; `None`: the model is too small for one.
    fn write(&self, pace: file::Pace) -> Result<Option<usize>, String> {
        let all = std::mem::take(&mut *self.all.lock().unwrap_or_else(PoisonError::into_inner));
        let bytes: usize = all.iter().map(|(_, bytes)| bytes.len()).sum();
        if self.is_beside && bytes < LEAST_BYTES {
            return Ok(None);
        }
        let folder = self.path.parent().ok_or("it has no folder")?;
        std::fs::create_dir_all(folder).map_err(|error| error.to_string())?;
        self.remove_stale(folder);
        let free = free_bytes(folder)?;
        if free < ROOM * bytes as u64 {
            return Err(format!("the disk has {} MB left, and {} MB are wanted", free / 1_000_000, ROOM * bytes as u64 / 1_000_000));
        }
        file::write(&self.path, &all, pace).map_err(|error| error.to_string())?;
        Ok(Some(bytes))
    }

    /// Removes what this copy replaces: in a folder of the model's own older copies of the same kind, everywhere what was left half written.
    fn remove_stale(&self, folder: &Path) {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let kind = name.rsplitn(3, '.').nth(2).unwrap_or(&name).to_owned();
        let Ok(entries) = std::fs::read_dir(folder) else { return };
        for entry in entries.flatten() {
            let other = entry.file_name().to_string_lossy().into_owned();
            let same_kind = other.starts_with(&format!("{kind}.")) && other.ends_with(&format!(".{ENDING}"));
            let replaced = self.is_beside && same_kind && other.matches('.').count() == name.matches('.').count() && other != name;
            let is_old = |modified: SystemTime| modified.elapsed().is_ok_and(|age| age > STALE);
            let half_written = other.ends_with(file::UNFINISHED) && other.contains(&format!(".{ENDING}."));
            if replaced || half_written && entry.metadata().and_then(|data| data.modified()).is_ok_and(is_old) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

impl PackedStore for PreparedCopy {
    fn find(&self, name: &str, shape: &PackedShape) -> Option<PackedBytes> {
        let index = self.asked.fetch_add(1, Ordering::Relaxed);
        let wanted = file::describe(name, shape);
        let found = self.opened.as_ref().and_then(|opened| opened.get(index, &wanted, shape.bytes()));
        match &found {
            // Only needed if another one is missing, and then without a copy in memory.
            Some(bytes) => self.all.lock().unwrap_or_else(PoisonError::into_inner).push((wanted, bytes.clone())),
            None => self.lacks.store(true, Ordering::Relaxed),
        }
        found
    }

    fn keep(&self, name: &str, shape: &PackedShape, bytes: PackedBytes) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).push((file::describe(name, shape), bytes));
    }
}

/// The copy's file, and whether it lies beside the model. Models that are in no file have none, nor have those that several ranks divide: each
/// reads its part from the model's own files.
fn path(files: &ModelFiles, settings: &EngineSettings) -> Option<(PathBuf, bool)> {
    let EngineSettings { prepared_cache: setting, quantization, tensor_parallel, .. } = settings;
    if *tensor_parallel != TensorParallel::Ranks(1) {
        return None;
    }
    let weights = weight_paths(files)?;
    let first = weights.first()?;
    let held = match *quantization {
        Quantization::Unquantized => "unquantized",
        other => other.name().unwrap_or("stored"),
    };
    let (folder, model) = match setting {
        PreparedCache::Off => return None,
        PreparedCache::Beside => (first.parent()?.to_owned(), first.file_stem()?.to_string_lossy().into_owned()),
        PreparedCache::Folder(folder) => (folder.clone(), files.name.trim_matches('/').replace(['/', ':', '\\'], "--")),
    };
    let lanes = cpu::lanes();
    let key = key::of(files, &weights, &[held, std::env::consts::ARCH, &lanes.to_string()])?;
    let name = format!("{model}.{held}-{}-{lanes}.{key}.{ENDING}", std::env::consts::ARCH);
    Some((folder.join(name), matches!(setting, PreparedCache::Beside)))
}

/// The weight files in their order, those of the model's modules last; `None` when one is not on disk.
pub fn weight_paths(files: &ModelFiles) -> Option<Vec<PathBuf>> {
    let path = |name: &str| match files.get(name) {
        Some(Source::Path(path)) => Some(path.clone()),
        _ => None,
    };
    let of_modules = files.iter().map(|(name, _)| name.to_owned()).filter(|name| is_module_file(name) && name.ends_with(".safetensors"));
    files.weight_files().ok()?.into_iter().chain(of_modules).map(|name| path(&name)).collect()
}

/// The copy's file, when it is there.
pub fn existing(files: &ModelFiles, settings: &EngineSettings) -> Option<PathBuf> {
    path(files, settings).map(|(path, _)| path).filter(|path| path.exists())
}

/// What `check` says of it.
pub fn describe(files: &ModelFiles, settings: &EngineSettings) -> String {
    match path(files, settings) {
        None => "prepared copy: none".to_owned(),
        Some((path, _)) => match std::fs::metadata(&path) {
            Ok(data) => format!("prepared copy: {} ({} MB)", path.display(), data.len() / 1_000_000),
            Err(_) => format!("prepared copy: not yet; a start on the CPU would write {}", path.display()),
        },
    }
}

/// Bytes that may still be written to the disk of a folder.
#[cfg(unix)]
fn free_bytes(folder: &Path) -> Result<u64, String> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(folder.as_os_str().as_bytes()).map_err(|error| error.to_string())?;
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path ends with a zero, and the structure is read only where the call says that it has been written.
    #[allow(unsafe_code)]
    let stat = unsafe {
        match libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) {
            0 => stat.assume_init(),
            _ => return Err(std::io::Error::last_os_error().to_string()),
        }
    };
    // Their types differ between systems.
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
    Ok(stat.f_bavail as u64 * stat.f_frsize as u64)
}

#[cfg(not(unix))]
fn free_bytes(_: &Path) -> Result<u64, String> {
    Ok(u64::MAX)
}

#[cfg(test)]
mod tests;
