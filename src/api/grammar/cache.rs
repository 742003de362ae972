//! The grammars that were compiled last, those among them that were refused or are not ready yet.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::api::grammar::compiled::CompiledGrammar;
use crate::error::{Failure, Kind};

/// So many grammars compile at a time; those that have passed the limit and still run count.
pub const MOST_COMPILING: usize = 4;

/// No place to compile is free.
pub fn overloaded() -> Failure {
    let message = format!("{MOST_COMPILING} grammars are being compiled already; try again later");
    Failure::new(Kind::Overloaded, message).code("engine_overloaded").retry_after(1)
}

/// What a grammar compiles to, or why it does not.
type Compiled = Result<Arc<CompiledGrammar>, Failure>;

/// A grammar on its way through the compiler. Who wants the same one waits for the same.
#[derive(Default)]
pub struct Compiling {
    begun: OnceLock<Instant>,
    result: Mutex<Option<Compiled>>,
    ended: Condvar,
}

impl Compiling {
    pub fn begin(&self) {
        self.begun.get_or_init(Instant::now);
    }

    pub fn end(&self, result: Compiled) {
        *self.result.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        self.ended.notify_all();
    }

    /// What became of it; `None` when it takes longer than `limit` from its beginning on.
    pub fn wait(&self, limit: Duration) -> Option<Compiled> {
        let left = self.begun.get().map_or(limit, |begun| limit.saturating_sub(begun.elapsed()));
        let result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        let (result, _) = self.ended.wait_timeout_while(result, left, |result| result.is_none()).unwrap_or_else(PoisonError::into_inner);
        // Whoever is to compile it still waits for a place.
        result.clone().or_else(|| self.begun.get().is_none().then(|| Err(overloaded())))
    }
}

/// So many are kept, and texts of so many bytes in all.
const MOST: usize = 64;
const MOST_BYTES: usize = 4 << 20;

/// Least recently used last. A few dozen: a search is cheaper than a table.
#[derive(Default)]
pub struct Cache {
    entries: VecDeque<(String, Arc<Compiling>)>,
}

impl Cache {
    /// What is known of a grammar, and whether that is nothing: then it is the caller's to compile.
    pub fn get_or_put(&mut self, key: &str) -> (Arc<Compiling>, bool) {
        let known = self.entries.iter().position(|(known, _)| known == key).and_then(|at| self.entries.remove(at));
        let is_new = known.is_none();
        let entry = known.unwrap_or_else(|| (key.to_owned(), Arc::default()));
        let compiling = entry.1.clone();
        self.entries.push_front(entry);
        let mut bytes = 0;
        let fits = self.entries.iter().take(MOST).take_while(|(key, _)| {
            bytes += key.len();
            bytes <= MOST_BYTES
        });
        let fits = fits.count();
        self.entries.truncate(fits);
        (compiling, is_new)
    }

    pub fn remove(&mut self, key: &str) {
        self.entries.retain(|(known, _)| known != key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_wants_what_takes_too_long_waits_once() {
        let compiling = Compiling::default();
        assert!(compiling.wait(Duration::ZERO).unwrap().is_err_and(|failure| failure.code == Some("engine_overloaded")));
        compiling.begin();
        assert!(compiling.wait(Duration::ZERO).is_none());
        compiling.end(Err(Failure::internal("x")));
        assert!(compiling.wait(Duration::ZERO).unwrap().is_err());
    }
}
