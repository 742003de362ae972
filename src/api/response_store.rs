//! Responses that `/v1/responses` has given, kept for a while: to be fetched again, and to be continued by their ids.
//!
//! In memory, bounded in number, bytes and time. The oldest go first.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::error::{Failure, Kind};

/// What a store holds at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreLimits {
    pub entries: usize,
    pub bytes: usize,
    /// A response is forgotten after so long.
    pub ttl: Duration,
}

pub struct ResponseStore {
    limits: StoreLimits,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    by_id: HashMap<String, Entry>,
    /// Oldest first.
    order: VecDeque<String>,
    bytes: usize,
}

struct Entry {
    response: Arc<StoredResponse>,
    since: Instant,
    bytes: usize,
}

/// A response with the conversation that it answered.
pub struct StoredResponse {
    /// The response object.
    pub response: Value,
    /// All input items, those of the responses before it and their output included.
    pub input: Vec<Arc<Value>>,
}

impl StoredResponse {
    /// The items that the response gave.
    pub fn output(&self) -> &[Value] {
        self.response["output"].as_array().map_or(&[], Vec::as_slice)
    }
}

impl ResponseStore {
    pub fn new(limits: StoreLimits) -> Self {
        Self { limits, held: Mutex::default() }
    }

    /// What is held now: what is too old has gone.
    fn held(&self) -> MutexGuard<'_, Held> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        while held.oldest().is_some_and(|entry| entry.since.elapsed() >= self.limits.ttl) {
            held.forget_oldest();
        }
        held
    }

    /// Keeps a response under its id. One that is larger than the store is not kept.
    pub fn put(&self, id: &str, stored: StoredResponse) {
        let bytes = size(&stored.response) + stored.input.iter().map(|item| size(item)).sum::<usize>();
        let mut held = self.held();
        if bytes > self.limits.bytes {
            return;
        }
        while held.order.len() >= self.limits.entries || held.bytes + bytes > self.limits.bytes {
            held.forget_oldest();
        }
        held.bytes += bytes;
        held.order.push_back(id.to_owned());
        held.by_id.insert(id.to_owned(), Entry { response: Arc::new(stored), since: Instant::now(), bytes });
    }

    pub fn get(&self, id: &str) -> Option<Arc<StoredResponse>> {
        self.held().by_id.get(id).map(|entry| entry.response.clone())
    }

    /// Whether there was one of this id.
    pub fn remove(&self, id: &str) -> bool {
        let mut held = self.held();
        let Some(entry) = held.by_id.remove(id) else { return false };
        held.bytes -= entry.bytes;
        held.order.retain(|known| known != id);
        true
    }

    /// An item of any response, by its id.
    pub fn item(&self, id: &str) -> Option<Value> {
        let held = self.held();
        let is_it = |item: &&Value| item["id"] == id;
        held.by_id.values().find_map(|entry| {
            let stored = &entry.response;
            stored.output().iter().find(is_it).or_else(|| stored.input.iter().map(Arc::as_ref).find(is_it)).cloned()
        })
    }
}

/// A stored response, or a 404 that says why there is none.
pub fn find(store: Option<&ResponseStore>, id: &str) -> Result<Arc<StoredResponse>, Failure> {
    let why = match store.map(|store| store.get(id)) {
        Some(Some(stored)) => return Ok(stored),
        Some(None) => {
            "It was never given here, was not to be stored, or has been deleted or driven out (RESPONSES_STORE_ENTRIES, RESPONSES_STORE_MB, \
             RESPONSES_STORE_TTL). Send the whole conversation in 'input'."
        }
        None => {
            "Responses are not stored here (RESPONSES_STORE is off, as it is by default on a queue worker): the next request may reach \
             another worker. Send the whole conversation in 'input'."
        }
    };
    let failure = Failure::new(Kind::NotFound, format!("There is no response with the id '{id}'. {why}"));
    Err(failure.param("response_id").code("response_not_found"))
}

/// An id that nobody can guess: who has a response's id can read it.
pub fn new_id(prefix: &str) -> String {
    format!("{prefix}_{}", uuid::Uuid::new_v4().simple())
}

impl Held {
    fn oldest(&self) -> Option<&Entry> {
        self.by_id.get(self.order.front()?)
    }

    fn forget_oldest(&mut self) {
        let Some(id) = self.order.pop_front() else {
            self.bytes = 0;
            return;
        };
        if let Some(entry) = self.by_id.remove(&id) {
            self.bytes -= entry.bytes;
        }
    }
}

/// What a tree of values takes in memory, roughly: its texts, and so much for each value and key.
fn size(value: &Value) -> usize {
    const VALUE: usize = 96;
    VALUE
        + match value {
            Value::String(text) => text.len(),
            Value::Array(list) => list.iter().map(size).sum(),
            Value::Object(map) => map.iter().map(|(key, value)| VALUE + key.len() + size(value)).sum(),
            Value::Null | Value::Bool(_) | Value::Number(_) => 0,
        }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn stored(id: &str, text: &str) -> StoredResponse {
        let item = json!({"id": format!("msg_{id}"), "text": text});
        StoredResponse { response: json!({"id": id, "output": [item]}), input: vec![Arc::new(json!({"id": format!("in_{id}")}))] }
    }

    fn store(entries: usize, bytes: usize, ttl: Duration) -> ResponseStore {
        ResponseStore::new(StoreLimits { entries, bytes, ttl })
    }

    const LONG: Duration = Duration::from_secs(3600);

    #[test]
    fn the_oldest_go_first() {
        let store = store(2, 1 << 20, LONG);
        for id in ["a", "b", "c"] {
            store.put(id, stored(id, "x"));
        }
        assert!(store.get("a").is_none() && store.get("b").is_some() && store.get("c").is_some());
        assert_eq!(store.item("msg_b").unwrap()["text"], "x");
        assert_eq!(store.item("in_c").unwrap(), json!({"id": "in_c"}));
        assert!(store.item("msg_a").is_none());
        assert!(store.remove("b") && !store.remove("b") && store.get("b").is_none());
        store.put("d", stored("d", "x"));
        assert!(store.get("c").is_some() && store.get("d").is_some(), "what was removed takes no place");
    }

    #[test]
    fn bytes_are_bounded() {
        let one = size(&stored("a", &"x".repeat(1000)).response) + size(&json!({"id": "in_a"}));
        let store = store(100, one * 2, LONG);
        for id in ["a", "b", "c"] {
            store.put(id, stored(id, &"x".repeat(1000)));
        }
        assert!(store.get("a").is_none() && store.get("b").is_some() && store.get("c").is_some());
        store.put("d", stored("d", &"x".repeat(10_000)));
        assert!(store.get("d").is_none() && store.get("c").is_some(), "one that can never fit drives out nothing");
        store.remove("b");
        store.remove("c");
        assert_eq!(store.held().bytes, 0);
    }

    #[test]
    fn what_is_old_is_gone() {
        let store = store(10, 1 << 20, Duration::ZERO);
        store.put("a", stored("a", "x"));
        assert!(store.get("a").is_none() && store.held().bytes == 0);
    }
}
