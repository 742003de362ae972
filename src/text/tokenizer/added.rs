//! The added vocabulary: tokens that are written by name (`</s>`, `<think>`) rather than made of text.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use crate::checkpoint::files::ModelFiles;
use crate::error::Failure;
use crate::text::sentencepiece::{Kind, Model};

/// The keys of `tokenizer_config.json` and `special_tokens_map.json` that name special tokens.
const ROLES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token"];
const ROLE_LISTS: [&str; 2] = ["additional_special_tokens", "extra_special_tokens"];

/// Ids above any vocabulary's: such an id is a damaged file, and not worth a table of that size.
const MAX_ID: u64 = 1 << 24;

/// Tokens by name, each either special (hidden from text) or visible markup.
#[derive(Default)]
pub struct Added {
    /// Longest first, as `ids`.
    names: Vec<String>,
    ids: Vec<u32>,
    by_name: HashMap<String, u32>,
    all: HashSet<u32>,
    special: HashSet<u32>,
    placeholders: HashSet<u32>,
}

impl Added {
    /// From `(name, id, special)`; an id's later entry overrides an earlier one.
    pub fn new(tokens: impl IntoIterator<Item = (String, u32, bool)>) -> Self {
        let mut added = Self::default();
        for (name, id, special) in tokens {
            if name.is_empty() {
                continue;
            }
            added.all.insert(id);
            if special {
                added.special.insert(id)
            } else {
                added.special.remove(&id)
            };
            if is_placeholder(&name) {
                added.placeholders.insert(id);
            }
            added.by_name.insert(name, id);
        }
        let mut tokens: Vec<_> = added.by_name.iter().map(|(name, &id)| (name.clone(), id)).collect();
        tokens.sort_by(|(a, _), (b, _)| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        (added.names, added.ids) = tokens.into_iter().unzip();
        added
    }

    /// The same by the pieces alone.
    pub fn of_pieces(model: &Model<'_>) -> Self {
        Self::new(List::of_pieces(model).tokens)
    }

    /// The recipe for a model without `tokenizer.json`: control pieces, the pieces and ids that the JSON files beside `tokenizer.model` name,
    /// and user-defined pieces that look like markup.
    pub fn beside_sentencepiece(model: &Model<'_>, files: &ModelFiles) -> Result<Self, Failure> {
        let mut list = List::of_pieces(model);
        let find = |name: &str| model.pieces.iter().position(|piece| piece.text == name).map(|id| id as u32);
        if let Some(Value::Object(tokens)) = files.read_json("added_tokens.json")? {
            for (name, id) in tokens {
                let id = checked_id(id.as_u64(), &name, "added_tokens.json", files)?;
                list.check(model, &name, id, "added_tokens.json", files)?;
                list.set(&name, id, true);
            }
        }
        for file in ["tokenizer_config.json", "special_tokens_map.json"] {
            let Some(config) = files.read_json(file)? else { continue };
            for (id, token) in config.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten() {
                let Some(name) = name_of(token) else { continue };
                let id = checked_id(id.parse().ok(), name, file, files)?;
                list.check(model, name, id, file, files)?;
                let special = token.get("special").and_then(Value::as_bool).unwrap_or(true);
                // A converter lists every user-defined piece here: digits, runs of spaces. Those are text.
                let text = !special && (id as usize) < model.pieces.len() && !looks_like_markup(name);
                if !text {
                    list.set(name, id, special);
                }
            }
            for name in roles(&config) {
                match list.id(name).or_else(|| find(name)) {
                    Some(id) => list.set(name, id, true),
                    None => tracing::warn!(
                        token = name,
                        file,
                        model = files.name,
                        "a special token is named that the vocabulary does not have: ignored"
                    ),
                }
            }
        }
        Ok(Self::new(list.tokens))
    }

    pub fn names(&self) -> &[String] {
        &self.names
    }

    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    pub fn id(&self, name: &str) -> Option<u32> {
        self.by_name.get(name).copied()
    }

    pub fn contains(&self, id: u32) -> bool {
        self.all.contains(&id)
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    pub fn is_placeholder(&self, id: u32) -> bool {
        self.placeholders.contains(&id)
    }
}

/// Tokens as they are collected; a later mention of a name overrides whether it is special.
struct List {
    tokens: Vec<(String, u32, bool)>,
    places: HashMap<String, usize>,
    pieces: usize,
}

impl List {
    /// Control pieces, and user-defined ones that look like markup.
    fn of_pieces(model: &Model<'_>) -> Self {
        let mut list = Self { tokens: Vec::new(), places: HashMap::new(), pieces: model.pieces.len() };
        for (id, piece) in (0u32..).zip(&model.pieces) {
            match piece.kind {
                Kind::Control | Kind::Unknown => list.set(piece.text, id, true),
                Kind::UserDefined if looks_like_markup(piece.text) => list.set(piece.text, id, false),
                _ => {}
            }
        }
        list
    }

    fn set(&mut self, name: &str, id: u32, special: bool) {
        match self.places.get(name) {
            Some(&place) => self.tokens[place] = (name.to_owned(), id, special),
            None => {
                self.places.insert(name.to_owned(), self.tokens.len());
                self.tokens.push((name.to_owned(), id, special));
            }
        }
    }

    fn id(&self, name: &str) -> Option<u32> {
        self.places.get(name).map(|&place| self.tokens[place].1)
    }

    /// A name must not claim the id of another piece.
    fn check(&self, model: &Model<'_>, name: &str, id: u32, file: &str, files: &ModelFiles) -> Result<(), Failure> {
        match model.pieces.get(id as usize) {
            Some(piece) if (id as usize) < self.pieces && piece.text != name => Err(Failure::internal(format!(
                "{file} of {} gives id {id} to {name:?}, but tokenizer.model has {:?} there: the files do not belong together",
                files.name, piece.text
            ))),
            _ => Ok(()),
        }
    }
}

fn checked_id(id: Option<u64>, name: &str, file: &str, files: &ModelFiles) -> Result<u32, Failure> {
    match id {
        Some(id) if id < MAX_ID => Ok(id as u32),
        _ => Err(Failure::internal(format!("{file} of {}: the id of {name:?} is not a token id", files.name))),
    }
}

/// A token is written as a string or as an object with `content`.
fn name_of(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

fn roles(config: &Value) -> impl Iterator<Item = &str> {
    let lists = ROLE_LISTS.iter().filter_map(|key| config.get(key)).flat_map(|list| match list {
        Value::Array(tokens) => tokens.iter().filter_map(name_of).collect::<Vec<_>>(),
        Value::Object(tokens) => tokens.values().filter_map(name_of).collect(),
        _ => Vec::new(),
    });
    ROLES.iter().filter_map(|key| name_of(config.get(key)?)).chain(lists)
}

/// `<think>`, `<|im_start|>`, `[INST]`: only a chat template may write these, so they are never made from users' text.
fn looks_like_markup(piece: &str) -> bool {
    piece.len() > 2 && (piece.starts_with('<') && piece.ends_with('>') || piece.starts_with('[') && piece.ends_with(']'))
}

/// ERNIE's tokens for pictures and sound: a text model has rows for them, but they are not for it to write.
pub fn is_placeholder(name: &str) -> bool {
    let Some(inner) = name.strip_prefix("<|").and_then(|name| name.strip_suffix("|>")) else { return false };
    ["IMAGE_PLACEHOLDER", "AUDIO_PLACEHOLDER", "VIDEO_PLACEHOLDER", "CROP_COL_SEP", "CROP_ROW_SEP", "IMAGE_SEP"].contains(&inner)
        || inner
            .strip_prefix("LOC_")
            .is_some_and(|rest| ["BEGIN", "END", "SEP"].contains(&rest) || rest.bytes().all(|byte| byte.is_ascii_digit()))
}
