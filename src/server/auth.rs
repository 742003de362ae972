//! API keys: stored as digests, compared in constant time. Those of `API_KEYS_FILE` are read again when the file changes.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use axum::http::{HeaderMap, header};
use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};

use super::limits::{Client, Usage};
use super::watch::Watch;
use crate::config::{ClientKey, ExposeSecret, KeysFile, SecretString, keys_file};

/// The keys that open the door. None at all: the door is open.
#[derive(Clone, Default)]
pub struct Keys {
    digests: Vec<[u8; 32]>,
    file: Option<Arc<WatchedFile>>,
}

/// Whom a request is from.
#[derive(Debug, Clone)]
pub enum Caller {
    /// Somebody with a key of the settings, or anybody where there are no keys.
    Unlimited,
    /// Somebody with a key of the file.
    Client(Client),
}

impl Keys {
    pub fn new(keys: &[SecretString]) -> Self {
        Self { digests: keys.iter().map(|key| digest(key.expose_secret())).collect(), file: None }
    }

    /// Those and the keys of a file.
    pub fn with_file(self, file: Option<&KeysFile>) -> Self {
        Self { file: file.map(|file| Arc::new(WatchedFile::new(file))), ..self }
    }

    /// Who may pass with these headers: `Authorization: Bearer KEY` (the scheme in any case), the bare key as RunPod's workers send it, or
    /// `x-api-key`. `None`: nobody.
    pub fn admit(&self, headers: &HeaderMap) -> Option<Caller> {
        let clients = self.file.as_ref().map(|file| file.clients());
        if self.digests.is_empty() && clients.is_none() {
            return Some(Caller::Unlimited);
        }
        let authorization = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).map(credential);
        let api_key = headers.get("x-api-key").and_then(|value| value.to_str().ok());
        let clients = clients.unwrap_or_default();
        let known: Vec<&[u8; 32]> = self.digests.iter().chain(clients.iter().map(|client| &client.key.digest)).collect();
        let found = [authorization, api_key].into_iter().flatten().find_map(|key| position(&known, key))?;
        match found.checked_sub(self.digests.len()) {
            None => Some(Caller::Unlimited),
            Some(place) => clients.get(place).cloned().map(Caller::Client),
        }
    }

    /// Whether some keys may have limits.
    pub fn has_file(&self) -> bool {
        self.file.is_some()
    }

    /// Reads the file again if it has changed since it was last looked at.
    pub async fn refresh(&self) {
        if let Some(file) = self.file.clone().filter(|file| file.watch.is_due()) {
            // A file may lie on a network.
            if let Err(error) = tokio::task::spawn_blocking(move || file.look()).await {
                tracing::error!("API_KEYS_FILE could not be looked at: {error}");
            }
        }
    }
}

/// Where a key is among the known ones. Looks at every digest, whichever matches: the time taken says nothing about the keys.
fn position(known: &[&[u8; 32]], key: &str) -> Option<usize> {
    let offered = digest(key);
    let mut found = u64::MAX;
    for (place, digest) in (0..).zip(known) {
        found.conditional_assign(&place, offered.ct_eq(*digest));
    }
    usize::try_from(found).ok().filter(|place| *place < known.len())
}

/// The key inside an `Authorization` value.
fn credential(value: &str) -> &str {
    match value.split_once(' ') {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => key.trim(),
        _ => value.trim(),
    }
}

fn digest(text: &str) -> [u8; 32] {
    Sha256::digest(text.as_bytes()).into()
}

/// `API_KEYS_FILE` while the server runs.
struct WatchedFile {
    path: PathBuf,
    clients: RwLock<Arc<Vec<Client>>>,
    watch: Watch,
}

impl WatchedFile {
    fn new(file: &KeysFile) -> Self {
        let clients = file.keys.iter().map(|key| Client { key: Arc::new(key.clone()), usage: Usage::new() }).collect();
        let watch = Watch::new(vec![file.path.clone()], vec![file.stamp]);
        Self { path: file.path.clone(), clients: RwLock::new(Arc::new(clients)), watch }
    }

    fn clients(&self) -> Arc<Vec<Client>> {
        self.clients.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes over a file that has changed. One that is wrong changes nothing, and is told once.
    fn look(&self) {
        if !self.watch.changed() {
            return;
        }
        let path = self.path.display();
        let text = std::fs::read_to_string(&self.path).map_err(|error| error.to_string());
        match text.and_then(|text| keys_file::read(&text).map_err(|error| error.to_string())) {
            Ok(keys) => {
                tracing::info!("API_KEYS_FILE={path}: {} keys are in force", keys.len());
                self.replace(keys);
            }
            Err(error) => tracing::error!("API_KEYS_FILE={path}: {error}; the keys of before stay in force"),
        }
    }

    /// What a key has used stays with it.
    fn replace(&self, keys: Vec<ClientKey>) {
        let before = self.clients();
        let client = |key: ClientKey| {
            let known = before.iter().find(|client| client.key.digest == key.digest);
            Client { usage: known.map_or_else(Usage::new, |client| client.usage.clone()), key: Arc::new(key) }
        };
        let clients = keys.into_iter().map(client).collect();
        *self.clients.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(clients);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &'static str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.parse().unwrap());
        headers
    }

    #[test]
    fn no_keys_means_open() {
        assert!(Keys::default().admit(&HeaderMap::new()).is_some());
        assert!(Keys::new(&[]).admit(&headers("authorization", "Bearer anything")).is_some());
    }

    #[test]
    fn every_form_of_a_key_opens_and_nothing_else_does() {
        let keys = Keys::new(&[SecretString::from("first"), SecretString::from("second")]);
        for value in ["Bearer first", "bearer second", "BEARER  first", "second"] {
            assert!(keys.admit(&headers("authorization", value)).is_some(), "{value}");
        }
        assert!(keys.admit(&headers("x-api-key", "second")).is_some());
        assert!(keys.admit(&HeaderMap::new()).is_none());
        for value in ["Bearer firs", "Bearer first1", "Bearer", "Bearer ", "Basic first", "", "Bearer First"] {
            assert!(keys.admit(&headers("authorization", value)).is_none(), "{value}");
        }
        assert!(keys.admit(&headers("x-api-key", "Bearer first")).is_none());
    }

    fn name(keys: &Keys, value: &'static str) -> Option<String> {
        match keys.admit(&headers("authorization", value)) {
            Some(Caller::Client(client)) => Some(client.key.name.clone()),
            Some(Caller::Unlimited) => Some("unlimited".to_owned()),
            None => None,
        }
    }

    #[test]
    fn a_file_is_read_again_and_a_broken_one_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.yaml");
        let write = |text: &str| std::fs::write(&path, text).unwrap();
        write("- {name: a, key: x, requests_per_minute: 2}\n");
        let keys = Keys::new(&[SecretString::from("own")]).with_file(Some(&KeysFile::read(&path).unwrap()));
        assert_eq!(
            (name(&keys, "x").as_deref(), name(&keys, "Bearer own").as_deref(), name(&keys, "y")),
            (Some("a"), Some("unlimited"), None)
        );
        let Some(Caller::Client(client)) = keys.admit(&headers("x-api-key", "x")) else { panic!("a client") };
        drop(client.admit().unwrap());

        let file = keys.file.as_ref().unwrap();
        write("- {name: b, key: y}\n- {name: again, key: x, requests_per_minute: 1}\n");
        file.look();
        assert_eq!((name(&keys, "y").as_deref(), name(&keys, "x").as_deref()), (Some("b"), Some("again")));
        let Some(Caller::Client(client)) = keys.admit(&headers("x-api-key", "x")) else { panic!("a client") };
        assert!(client.admit().is_ok() && client.admit().is_err(), "one of two was left, and of one there is one");

        write("- {name: c, key: z, rpm: 1}\n");
        file.look();
        std::fs::remove_file(&path).unwrap();
        file.look();
        assert_eq!((name(&keys, "y").as_deref(), name(&keys, "z")), (Some("b"), None));
        assert!(name(&Keys::default().with_file(Some(&KeysFile { keys: Vec::new(), path, stamp: None })), "x").is_none(), "never open");
    }
}
