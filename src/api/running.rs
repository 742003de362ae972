//! The requests that run, by the ids that their callers know them by: `/v1/abort_requests` ends them from elsewhere.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// What answers put before a request's id.
const PREFIXES: [&str; 2] = ["chatcmpl-", "cmpl-"];

/// All of them.
#[derive(Default)]
pub struct Running(Mutex<Requests>);

#[derive(Default)]
struct Requests {
    next: u64,
    running: HashMap<u64, Entry>,
}

struct Entry {
    /// As it came, and without an answer's prefix.
    id: String,
    abort: watch::Sender<bool>,
    output_tokens: Arc<AtomicUsize>,
}

/// A request in the list, until this is dropped.
pub struct Registered {
    list: Arc<Running>,
    number: u64,
    /// Becomes true when the request is aborted.
    pub aborted: watch::Receiver<bool>,
    /// Tokens that it has generated so far.
    pub output_tokens: Arc<AtomicUsize>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.list.lock().running.remove(&self.number);
    }
}

/// A request that was told to end.
#[derive(Debug, PartialEq, Eq)]
pub struct Aborted {
    pub id: String,
    pub output_tokens: usize,
}

impl Running {
    fn lock(&self) -> MutexGuard<'_, Requests> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn register(self: &Arc<Self>, id: &str) -> Registered {
        let (abort, aborted) = watch::channel(false);
        let output_tokens = Arc::new(AtomicUsize::new(0));
        let mut list = self.lock();
        let number = list.next;
        list.next += 1;
        list.running.insert(number, Entry { id: id.to_owned(), abort, output_tokens: output_tokens.clone() });
        Registered { list: self.clone(), number, aborted, output_tokens }
    }

    /// Ends every request of this id, with or without an answer's prefix on either side.
    pub fn abort(&self, id: &str) -> Vec<Aborted> {
        self.abort_where(|entry| bare(&entry.id) == bare(id))
    }

    pub fn abort_all(&self) -> Vec<Aborted> {
        self.abort_where(|_| true)
    }

    /// In the order in which they came.
    fn abort_where(&self, is_meant: impl Fn(&Entry) -> bool) -> Vec<Aborted> {
        let list = self.lock();
        let mut meant: Vec<(&u64, &Entry)> = list.running.iter().filter(|(_, entry)| is_meant(entry)).collect();
        meant.sort_by_key(|(number, _)| **number);
        let end = |(_, entry): (&u64, &Entry)| {
            entry.abort.send_replace(true);
            Aborted { id: entry.id.clone(), output_tokens: entry.output_tokens.load(Ordering::Relaxed) }
        };
        meant.into_iter().map(end).collect()
    }
}

fn bare(id: &str) -> &str {
    PREFIXES.iter().find_map(|prefix| id.strip_prefix(prefix)).unwrap_or(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_known_by_every_form_of_their_id_for_as_long_as_they_run() {
        let list = Arc::new(Running::default());
        let (one, other) = (list.register("a"), list.register("chatcmpl-b"));
        one.output_tokens.store(3, Ordering::Relaxed);
        assert_eq!(list.abort("cmpl-a"), [Aborted { id: "a".to_owned(), output_tokens: 3 }]);
        assert_eq!((*one.aborted.borrow(), *other.aborted.borrow()), (true, false));
        assert_eq!((list.abort("b").len(), list.abort("c").len()), (1, 0));
        drop(one);
        assert!(list.abort("a").is_empty());
        assert_eq!(list.abort_all().len(), 1);
    }
}
