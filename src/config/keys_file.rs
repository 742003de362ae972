//! `API_KEYS_FILE`: keys of clients with what each may use, as YAML or JSON (which is YAML too).
//!
//! ```yaml
//! - name: team-a                # in the log
//!   key: sk-…                   # or sha256: the key's SHA-256 in hex
//!   requests_per_minute: 60     # each of these may be left out: no limit
//!   tokens_per_minute: 100000   # prompts and answers
//!   max_concurrency: 4
//!   models: [demo]
//! ```

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use sha2::{Digest, Sha256};
use yaml_rust2::parser::{Event, MarkedEventReceiver, Parser};
use yaml_rust2::scanner::{Marker, TScalarStyle};

/// A file as it was read.
#[derive(Debug, Clone)]
pub struct KeysFile {
    pub path: PathBuf,
    pub keys: Vec<ClientKey>,
    pub stamp: Stamp,
}

/// What tells one state of a file from another: its time and its size.
pub type Stamp = Option<(SystemTime, u64)>;

/// The present state of a file; `None` where there is none.
pub fn stamp(path: &Path) -> Stamp {
    let state = std::fs::metadata(path).ok()?;
    Some((state.modified().ok()?, state.len()))
}

impl KeysFile {
    /// The error names the line and the field.
    pub fn read(path: &Path) -> Result<Self, String> {
        let stamp = stamp(path);
        let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
        let keys = read(&text).map_err(|error| error.to_string())?;
        Ok(Self { path: path.to_owned(), keys, stamp })
    }
}

/// A key, of which only the digest is kept, and its limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientKey {
    pub name: String,
    /// SHA-256.
    pub digest: [u8; 32],
    pub requests_per_minute: Option<u32>,
    pub tokens_per_minute: Option<u32>,
    /// Requests at a time.
    pub max_concurrency: Option<u32>,
    /// Names of models that it may ask for; `None` = all.
    pub models: Option<Vec<String>>,
}

impl ClientKey {
    /// Whether it may ask for the model of this name.
    pub fn may_use(&self, model: &str) -> bool {
        self.models.as_ref().is_none_or(|models| models.iter().any(|name| name == model))
    }
}

/// What is wrong with a file, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeysFileError {
    pub line: usize,
    pub message: String,
}

impl fmt::Display for KeysFileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.message)
    }
}

fn wrong<T>(line: usize, message: impl Into<String>) -> Result<T, KeysFileError> {
    Err(KeysFileError { line, message: message.into() })
}

/// Reads the text of a file: a list of keys, or an object whose `keys` is one. At least one key.
pub fn read(text: &str) -> Result<Vec<ClientKey>, KeysFileError> {
    let root = Tree::read(text)?;
    let entries = match &root.value {
        NodeValue::Mapping(members) => match members.iter().find(|(name, _)| name.text() == Some("keys")) {
            Some((_, list)) if members.len() == 1 => list,
            _ => return wrong(root.line, "the file must be a list of keys, or an object with `keys` alone"),
        },
        _ => &root,
    };
    let NodeValue::Sequence(list) = &entries.value else {
        return wrong(entries.line, "a list of keys is expected, each with `name` and `key` or `sha256`");
    };
    if list.is_empty() {
        // Without a key everything would be open, which is not what a key file means.
        return wrong(entries.line, "the file holds no key");
    }
    let mut keys: Vec<ClientKey> = Vec::with_capacity(list.len());
    for node in list {
        let key = entry(node)?;
        if keys.iter().any(|known| known.name == key.name) {
            return wrong(node.line, format!("name: {:?} is the name of an earlier key, too", key.name));
        }
        if let Some(same) = keys.iter().find(|known| known.digest == key.digest) {
            return wrong(node.line, format!("key: {:?} and {:?} have the same key", same.name, key.name));
        }
        keys.push(key);
    }
    Ok(keys)
}

/// One key.
fn entry(node: &Node) -> Result<ClientKey, KeysFileError> {
    let NodeValue::Mapping(members) = &node.value else {
        return wrong(node.line, "a key is an object with `name` and `key` or `sha256`");
    };
    let (mut name, mut digest, mut models) = (None, None, None);
    let (mut requests_per_minute, mut tokens_per_minute, mut max_concurrency) = (None, None, None);
    for (field, value) in members {
        let Some(field_name) = field.text() else { return wrong(field.line, "a field's name must be a word") };
        if value.is_null() {
            continue;
        }
        match field_name {
            "name" => name = Some(text(field_name, value)?.to_owned()),
            "key" | "sha256" if digest.is_some() => return wrong(value.line, format!("{field_name}: give either `key` or `sha256`, once")),
            "key" => digest = Some(Sha256::digest(text(field_name, value)?.as_bytes()).into()),
            "sha256" => digest = Some(hexadecimal(value)?),
            "requests_per_minute" => requests_per_minute = Some(limit(field_name, value)?),
            "tokens_per_minute" => tokens_per_minute = Some(limit(field_name, value)?),
            "max_concurrency" => max_concurrency = Some(limit(field_name, value)?),
            "models" => models = Some(names(field_name, value)?),
            other => {
                let known = "name, key, sha256, requests_per_minute, tokens_per_minute, max_concurrency, models";
                return wrong(field.line, format!("{other}: no such field; there are {known}"));
            }
        }
    }
    let Some(name) = name else { return wrong(node.line, "name: it is missing") };
    let Some(digest) = digest else { return wrong(node.line, format!("key: {name:?} has neither `key` nor `sha256`")) };
    Ok(ClientKey { name, digest, requests_per_minute, tokens_per_minute, max_concurrency, models })
}

fn text<'a>(field: &str, node: &'a Node) -> Result<&'a str, KeysFileError> {
    match node.text().map(str::trim).filter(|text| !text.is_empty() && !text.chars().any(char::is_control)) {
        Some(text) => Ok(text),
        None => wrong(node.line, format!("{field}: a text of one line is expected")),
    }
}

fn limit(field: &str, node: &Node) -> Result<u32, KeysFileError> {
    match node.text().and_then(|text| text.parse().ok()).filter(|limit| *limit >= 1) {
        Some(limit) => Ok(limit),
        None => wrong(node.line, format!("{field}: a whole number from 1 to {} is expected; leave it out for no limit", u32::MAX)),
    }
}

fn names(field: &str, node: &Node) -> Result<Vec<String>, KeysFileError> {
    match &node.value {
        NodeValue::Sequence(list) if !list.is_empty() => list.iter().map(|node| text(field, node).map(str::to_owned)).collect(),
        _ => wrong(node.line, format!("{field}: a list of names is expected; leave it out to allow all")),
    }
}

/// 64 digits.
fn hexadecimal(node: &Node) -> Result<[u8; 32], KeysFileError> {
    let digits = node.text().unwrap_or_default();
    let mut digest = [0; 32];
    let fits = digits.len() == 64 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    for (byte, at) in digest.iter_mut().zip((0..64).step_by(2)) {
        match digits.get(at..at + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok()).filter(|_| fits) {
            Some(value) => *byte = value,
            None => return wrong(node.line, "sha256: 64 hexadecimal digits are expected"),
        }
    }
    Ok(digest)
}

/// A part of a YAML document, and where it begins: the loader of the crate keeps no lines.
struct Node {
    line: usize,
    value: NodeValue,
}

enum NodeValue {
    Scalar { text: String, is_plain: bool },
    Sequence(Vec<Node>),
    Mapping(Vec<(Node, Node)>),
}

impl Node {
    fn text(&self) -> Option<&str> {
        match &self.value {
            NodeValue::Scalar { text, .. } => Some(text),
            _ => None,
        }
    }

    fn is_null(&self) -> bool {
        matches!(&self.value, NodeValue::Scalar { text, is_plain: true } if matches!(text.as_str(), "" | "~" | "null"))
    }
}

/// A document while its events come in.
#[derive(Default)]
struct Tree {
    /// Sequences and mappings that are open, with their members so far; of a mapping names and values take turns.
    open: Vec<(usize, bool, Vec<Node>)>,
    roots: Vec<Node>,
    /// Where something stands that is not read.
    alias: Option<usize>,
}

impl Tree {
    fn read(text: &str) -> Result<Node, KeysFileError> {
        let mut tree = Self::default();
        let read = Parser::new_from_str(text).load(&mut tree, true);
        read.map_err(|error| KeysFileError { line: error.marker().line(), message: format!("not valid YAML: {}", error.info()) })?;
        if let Some(line) = tree.alias {
            return wrong(line, "aliases are not read here");
        }
        match (tree.roots.pop(), tree.roots.is_empty()) {
            (Some(root), true) => Ok(root),
            (Some(root), false) => wrong(root.line, "one document is expected"),
            (None, _) => wrong(1, "the file holds no key"),
        }
    }

    fn add(&mut self, node: Node) {
        match self.open.last_mut() {
            Some((_, _, members)) => members.push(node),
            None => self.roots.push(node),
        }
    }
}

impl MarkedEventReceiver for Tree {
    fn on_event(&mut self, event: Event, mark: Marker) {
        match event {
            Event::Scalar(text, style, ..) => {
                let value = NodeValue::Scalar { text, is_plain: style == TScalarStyle::Plain };
                self.add(Node { line: mark.line(), value });
            }
            Event::SequenceStart(..) => self.open.push((mark.line(), false, Vec::new())),
            Event::MappingStart(..) => self.open.push((mark.line(), true, Vec::new())),
            Event::SequenceEnd | Event::MappingEnd => {
                if let Some((line, is_mapping, members)) = self.open.pop() {
                    let mut rest = members.into_iter();
                    let value = match is_mapping {
                        true => NodeValue::Mapping(std::iter::from_fn(|| Some((rest.next()?, rest.next()?))).collect()),
                        false => NodeValue::Sequence(rest.collect()),
                    };
                    self.add(Node { line, value });
                }
            }
            Event::Alias(_) => self.alias = Some(mark.line()),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yaml_and_json_say_the_same() {
        let yaml = "# keys\nkeys:\n- name: a\n  key: first\n  requests_per_minute: 60\n  models: [demo, other]\n- name: b\n  sha256: 16367AACB67A4A017C8DA8AB95682CCB390863780F7114DDA0A0E0C55644C7C4\n  tokens_per_minute: 5\n  max_concurrency: 2\n";
        let json = r#"[{"name": "a", "key": "first", "requests_per_minute": 60, "models": ["demo", "other"], "max_concurrency": null},
            {"name": "b", "sha256": "16367aacb67a4a017c8da8ab95682ccb390863780f7114dda0a0e0c55644c7c4", "tokens_per_minute": 5, "max_concurrency": 2}]"#;
        let keys = read(yaml).unwrap();
        assert_eq!(keys, read(json).unwrap());
        assert_eq!(keys[1].digest, read("- {name: b, key: second}").unwrap()[0].digest);
        assert_eq!((keys[0].requests_per_minute, keys[0].max_concurrency), (Some(60), None));
        assert_eq!((keys[1].name.as_str(), keys[1].tokens_per_minute), ("b", Some(5)));
        assert!(keys[0].may_use("other") && !keys[0].may_use("b") && keys[1].may_use("b"));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, line, words) in [
            ("", 1, "no key"),
            ("[]", 1, "no key"),
            ("x: 1", 1, "list of keys"),
            ("- name: a\n  key: x\n  requests_per_minute: none\n", 3, "requests_per_minute: a whole number"),
            ("- name: a\n  key: x\n  max_concurrency: 0\n", 3, "max_concurrency"),
            ("- name: a\n  key: x\n  rpm: 1\n", 3, "rpm: no such field"),
            ("- name: a\n  key: x\n- name: a\n  key: y\n", 3, "name: \"a\""),
            ("- name: a\n  key: x\n- name: b\n  key: x\n", 3, "same key"),
            ("- name: a\n", 1, "neither `key` nor `sha256`"),
            ("- key: a\n", 1, "name: it is missing"),
            ("- name: a\n  sha256: abc\n", 2, "64 hexadecimal digits"),
            ("- name: a\n  key: x\n  sha256: abc\n", 3, "either"),
            ("- name: a\n  key: x\n  models: demo\n", 3, "models: a list"),
            ("- name: a\n  key: x\n  models: []\n", 3, "models: a list"),
            ("- name: a\n  key: [x\n", 3, "not valid YAML"),
            ("- x\n", 1, "a key is an object"),
            ("- &a {name: a, key: x}\n- *a\n", 2, "aliases"),
            ("[]\n---\n[]\n", 3, "one document"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.message.contains(words) && error.line == line, "{text:?}: {error}");
        }
        assert!(!format!("{:?}", read("- name: a\n  key: topsecret\n").unwrap()).contains("topsecret"));
    }
}
