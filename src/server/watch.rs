//! Files that are read again when they change.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::config::keys_file::{Stamp, stamp};

/// How often files are looked at, at most.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Files, and their state when they were last looked at.
pub struct Watch {
    paths: Vec<PathBuf>,
    looked: Mutex<(Instant, Vec<Stamp>)>,
}

impl Watch {
    /// `stamps`: their states when they were read. What has changed since is seen at the first look.
    pub fn new(paths: Vec<PathBuf>, stamps: Vec<Stamp>) -> Self {
        Self { paths, looked: Mutex::new((Instant::now(), stamps)) }
    }

    /// Whether it is time for a look, which is then the caller's to take.
    pub fn is_due(&self) -> bool {
        let mut looked = self.lock();
        let due = looked.0.elapsed() >= LOOK_EVERY;
        if due {
            looked.0 = Instant::now();
        }
        due
    }

    /// Whether one has changed since the last time that this was asked. It asks the file system.
    pub fn changed(&self) -> bool {
        let stamps: Vec<Stamp> = self.paths.iter().map(|path| stamp(path)).collect();
        let before = std::mem::replace(&mut self.lock().1, stamps.clone());
        before != stamps
    }

    fn lock(&self) -> MutexGuard<'_, (Instant, Vec<Stamp>)> {
        self.looked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
