//! The jobs that this worker holds: taken, and not yet answered.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::{oneshot, watch};

/// Shared by the poll (free slots), the heartbeat (ids) and the stop channel.
#[derive(Debug)]
pub(crate) struct Held {
    /// By id: the sender that stops the job.
    jobs: Mutex<BTreeMap<String, oneshot::Sender<()>>>,
    count: watch::Sender<usize>,
}

impl Held {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { jobs: Mutex::default(), count: watch::Sender::new(0) })
    }

    /// Holds `id` until the returned guard is dropped. `None`: it is held already.
    pub fn hold(self: &Arc<Self>, id: &str) -> Option<(Holding, oneshot::Receiver<()>)> {
        let (stop, stopped) = oneshot::channel();
        let mut jobs = self.lock();
        if jobs.contains_key(id) {
            return None;
        }
        jobs.insert(id.to_owned(), stop);
        self.count.send_replace(jobs.len());
        Some((Holding { held: Arc::clone(self), id: id.to_owned() }, stopped))
    }

    /// Stops `id`; false when it is not held.
    pub fn stop(&self, id: &str) -> bool {
        let mut jobs = self.lock();
        let Some(stop) = jobs.get_mut(id) else { return false };
        // The entry stays until the job's task lets go; a second stop finds the closed channel.
        let (spent, _) = oneshot::channel();
        std::mem::replace(stop, spent).send(()).is_ok()
    }

    /// In order of id.
    pub fn ids(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }

    pub fn len(&self) -> usize {
        *self.count.borrow()
    }

    /// Waits until fewer than `limit` jobs are held.
    pub async fn below(&self, limit: usize) {
        // The sender lives in `self`, so the channel cannot close.
        let _ = self.count.subscribe().wait_for(|&count| count < limit).await;
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, oneshot::Sender<()>>> {
        // Nothing panics while it holds the lock; and a job list that was poisoned is still the job list.
        self.jobs.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Keeps one job held. Dropped when the job was answered, or when its task ends in whatever way.
#[derive(Debug)]
pub(crate) struct Holding {
    held: Arc<Held>,
    id: String,
}

impl Drop for Holding {
    fn drop(&mut self) {
        let mut jobs = self.held.lock();
        jobs.remove(&self.id);
        self.held.count.send_replace(jobs.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn holds_once_counts_and_stops() {
        let held = Held::new();
        let (first, mut stopped) = held.hold("b").unwrap();
        assert!(held.hold("b").is_none());
        let (second, _keep) = held.hold("a").unwrap();
        assert_eq!((held.ids(), held.len()), (vec!["a".to_owned(), "b".to_owned()], 2));
        assert!(!held.stop("c"));
        assert!(held.stop("b"));
        assert!(!held.stop("b"));
        assert_eq!(stopped.try_recv(), Ok(()));
        drop(first);
        held.below(2).await;
        assert!(held.hold("b").is_some(), "an id may come again once it has ended");
        drop(second);
        held.below(1).await;
    }
}
