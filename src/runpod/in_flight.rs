//! The jobs in flight: taken by this worker, and not yet answered.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::{oneshot, watch};

/// Shared by the poll (free slots), the heartbeat (ids) and the stop channel.
#[derive(Debug)]
pub(crate) struct InFlight {
    /// By the job's id, the sender that stops it.
    jobs: Mutex<BTreeMap<String, oneshot::Sender<()>>>,
    count: watch::Sender<usize>,
}

impl InFlight {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { jobs: Mutex::default(), count: watch::Sender::new(0) })
    }

    /// Counts `id` as in flight until the returned guard is dropped, and gives the receiver that hears of its stop. `None` when it is in flight
    /// already.
    pub fn begin(self: &Arc<Self>, id: &str) -> Option<(InFlightJob, oneshot::Receiver<()>)> {
        let (stop, stopped) = oneshot::channel();
        let mut jobs = self.lock();
        if jobs.contains_key(id) {
            return None;
        }
        jobs.insert(id.to_owned(), stop);
        self.count.send_replace(jobs.len());
        Some((InFlightJob { in_flight: Arc::clone(self), id: id.to_owned() }, stopped))
    }

    /// Stops `id`; false when it is not in flight.
    pub fn stop(&self, id: &str) -> bool {
        let mut jobs = self.lock();
        let Some(stop) = jobs.get_mut(id) else { return false };
        // The entry stays until the job's task lets go; a second stop finds the closed channel.
        let (spent, _) = oneshot::channel();
        std::mem::replace(stop, spent).send(()).is_ok()
    }

    /// All ids, in order.
    pub fn ids(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }

    pub fn len(&self) -> usize {
        *self.count.borrow()
    }

    /// Waits until fewer than `limit` jobs are in flight.
    pub async fn below(&self, limit: usize) {
        // The sender lives in `self`, so the channel cannot close.
        let _ = self.count.subscribe().wait_for(|&count| count < limit).await;
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, oneshot::Sender<()>>> {
        // Nothing panics while it holds the lock, and the list would be right even then.
        self.jobs.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// One job in flight. Dropped when the job is answered, or when its task ends in any other way.
#[derive(Debug)]
pub(crate) struct InFlightJob {
    in_flight: Arc<InFlight>,
    id: String,
}

impl Drop for InFlightJob {
    fn drop(&mut self) {
        let mut jobs = self.in_flight.lock();
        jobs.remove(&self.id);
        self.in_flight.count.send_replace(jobs.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn holds_once_counts_and_stops() {
        let in_flight = InFlight::new();
        let (first, mut stopped) = in_flight.begin("b").unwrap();
        assert!(in_flight.begin("b").is_none());
        let (second, _keep) = in_flight.begin("a").unwrap();
        assert_eq!((in_flight.ids(), in_flight.len()), (vec!["a".to_owned(), "b".to_owned()], 2));
        assert!(!in_flight.stop("c"));
        assert!(in_flight.stop("b"));
        assert!(!in_flight.stop("b"));
        assert_eq!(stopped.try_recv(), Ok(()));
        drop(first);
        in_flight.below(2).await;
        assert!(in_flight.begin("b").is_some(), "an id may come again once it has ended");
        drop(second);
        in_flight.below(1).await;
    }
}
