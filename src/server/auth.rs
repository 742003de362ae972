//! API keys: stored as digests, compared in constant time.

use axum::http::{HeaderMap, header};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::config::{ExposeSecret, SecretString};

/// The keys that open the door. None at all: the door is open.
#[derive(Clone, Default)]
pub struct Keys {
    digests: Vec<[u8; 32]>,
}

impl Keys {
    pub fn new(keys: &[SecretString]) -> Self {
        Self { digests: keys.iter().map(|key| digest(key.expose_secret())).collect() }
    }

    /// Whether a request with these headers may pass: `Authorization: Bearer KEY` (the scheme in any case), the bare key as RunPod's
    /// workers send it, or `x-api-key`.
    pub fn admit(&self, headers: &HeaderMap) -> bool {
        if self.digests.is_empty() {
            return true;
        }
        let authorization = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).map(credential);
        let api_key = headers.get("x-api-key").and_then(|value| value.to_str().ok());
        [authorization, api_key].into_iter().flatten().any(|key| self.contains(key))
    }

    /// Looks at every digest, whichever matches: the time taken says nothing about the keys.
    fn contains(&self, key: &str) -> bool {
        let offered = digest(key);
        self.digests.iter().fold(Choice::from(0), |found, known| found | offered.ct_eq(known)).into()
    }
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
        assert!(Keys::default().admit(&HeaderMap::new()));
        assert!(Keys::new(&[]).admit(&headers("authorization", "Bearer anything")));
    }

    #[test]
    fn every_form_of_a_key_opens_and_nothing_else_does() {
        let keys = Keys::new(&[SecretString::from("first"), SecretString::from("second")]);
        for value in ["Bearer first", "bearer second", "BEARER  first", "second"] {
            assert!(keys.admit(&headers("authorization", value)), "{value}");
        }
        assert!(keys.admit(&headers("x-api-key", "second")));
        assert!(!keys.admit(&HeaderMap::new()));
        for value in ["Bearer firs", "Bearer first1", "Bearer", "Bearer ", "Basic first", "", "Bearer First"] {
            assert!(!keys.admit(&headers("authorization", value)), "{value}");
        }
        assert!(!keys.admit(&headers("x-api-key", "Bearer first")));
    }
}
