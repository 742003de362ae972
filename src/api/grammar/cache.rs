//! The grammars that were compiled last.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::api::grammar::CompiledGrammar;

/// So many are kept, and texts of so many bytes in all.
const MOST: usize = 64;
const MOST_BYTES: usize = 4 << 20;

/// Least recently used last. A few dozen: a search is cheaper than a table.
#[derive(Default)]
pub struct Cache {
    entries: VecDeque<(String, Arc<CompiledGrammar>)>,
}

impl Cache {
    pub fn get(&mut self, key: &str) -> Option<Arc<CompiledGrammar>> {
        let at = self.entries.iter().position(|(known, _)| known == key)?;
        let entry = self.entries.remove(at)?;
        let compiled = entry.1.clone();
        self.entries.push_front(entry);
        Some(compiled)
    }

    pub fn put(&mut self, key: String, compiled: Arc<CompiledGrammar>) {
        self.entries.retain(|(known, _)| *known != key);
        self.entries.push_front((key, compiled));
        let mut bytes = 0;
        let fits = self.entries.iter().take(MOST).take_while(|(key, _)| {
            bytes += key.len();
            bytes <= MOST_BYTES
        });
        let fits = fits.count();
        self.entries.truncate(fits);
    }
}
