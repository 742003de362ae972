//! Prompts to token ids. Strings inside user text that spell a special token stay plain text: a user cannot end the turn, or speak as
//! the system, by writing `<|end_of_sentence|>`.

use std::collections::HashSet;

use aho_corasick::{AhoCorasick, MatchKind};
use serde_json::{Map, Value};

use crate::error::Failure;
use crate::models::tokenizer::{Special, Tokenizer};

/// Two noncharacters that a request does not contain: one breaks special-token strings, the other marks a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marks {
    pub break_mark: char,
    pub place_mark: char,
}

/// Knows the strings that spell special tokens.
///
/// User text is broken *inside* each such string with a noncharacter before the template is rendered. Whatever the template then does with
/// the text (cut, trim, join), no special token can come out of it. After rendering, only the pieces that hold a break are encoded as plain
/// text without the mark; all the rest is encoded together, exactly as the whole would be.
pub struct Guard {
    /// Every occurrence, overlapping ones too.
    anywhere: AhoCorasick,
    /// As a tokenizer splits: leftmost, longest.
    split: AhoCorasick,
    /// Every proper beginning of a special token.
    beginnings: HashSet<String>,
}

impl Guard {
    pub fn new(special_tokens: &[String]) -> Result<Self, Failure> {
        let tokens: Vec<&String> = special_tokens.iter().filter(|token| !token.is_empty()).collect();
        let build = |kind| {
            AhoCorasick::builder()
                .match_kind(kind)
                .build(&tokens)
                .map_err(|error| Failure::internal(format!("cannot index the special tokens: {error}")))
        };
        let beginnings = tokens.iter().flat_map(|token| token.char_indices().skip(1).map(|(at, _)| token[..at].to_owned())).collect();
        Ok(Self { anywhere: build(MatchKind::Standard)?, split: build(MatchKind::LeftmostLongest)?, beginnings })
    }

    /// Marks that occur nowhere in `values`.
    pub fn marks(values: &[&Value]) -> Result<Marks, Failure> {
        let mut free = ('\u{FDD0}'..='\u{FDEF}').filter(|mark| !values.iter().any(|value| contains(value, *mark)));
        match (free.next(), free.next()) {
            (Some(break_mark), Some(place_mark)) => Ok(Marks { break_mark, place_mark }),
            _ => Err(Failure::bad_request(
                "messages",
                "The text holds nearly every Unicode noncharacter from U+FDD0 to U+FDEF. Remove some.",
            )
            .code("invalid_value")),
        }
    }

    /// Breaks special-token strings in every string below `value`; true when there were any. Roles are names of ours already.
    pub fn break_in(&self, value: &mut Value, mark: char) -> bool {
        match value {
            Value::String(text) => match self.broken(text, mark) {
                Some(broken) => {
                    *text = broken;
                    true
                }
                None => false,
            },
            Value::Array(list) => list.iter_mut().fold(false, |any, value| self.break_in(value, mark) | any),
            Value::Object(object) => self.break_in_object(object, mark),
            _ => false,
        }
    }

    fn break_in_object(&self, object: &mut Map<String, Value>, mark: char) -> bool {
        let mut any = false;
        // Keys reach the text too (arguments of tool calls written as JSON).
        if object.keys().any(|key| self.broken(key, mark).is_some()) {
            *object = std::mem::take(object).into_iter().map(|(key, value)| (self.broken(&key, mark).unwrap_or(key), value)).collect();
            any = true;
        }
        object.iter_mut().filter(|(key, _)| *key != "role").fold(any, |any, (_, value)| self.break_in(value, mark) | any)
    }

    /// `text` with the mark after the first character of each special-token string, and at the end if the text after it could complete
    /// one; `None` when there is nothing to break.
    fn broken(&self, text: &str, mark: char) -> Option<String> {
        let mut places: Vec<usize> = self
            .anywhere
            .find_overlapping_iter(text)
            .map(|found| found.start() + text[found.start()..].chars().next().map_or(0, char::len_utf8))
            .collect();
        if text.char_indices().rev().take(64).any(|(at, _)| self.beginnings.contains(&text[at..])) {
            places.push(text.len());
        }
        if places.is_empty() {
            return None;
        }
        places.sort_unstable();
        places.dedup();
        let mut broken = String::with_capacity(text.len() + 3 * places.len());
        let mut start = 0;
        for place in places {
            broken.push_str(&text[start..place]);
            broken.push(mark);
            start = place;
        }
        broken.push_str(&text[start..]);
        Some(broken)
    }

    /// Token ids of a rendered prompt, in which user text is broken with `mark`.
    pub fn encode(&self, tokenizer: &Tokenizer, rendered: &str, mark: char) -> Result<Vec<u32>, Failure> {
        if !rendered.contains(mark) {
            return tokenizer.encode(rendered, Special::Control);
        }
        let mut ids = Vec::new();
        // Pieces lie between the real special tokens. Those without a mark run on together from `start`.
        let (mut start, mut piece) = (0, 0);
        let ends = self.split.find_iter(rendered).map(|found| (found.start(), found.end()));
        for (end, next) in ends.chain([(rendered.len(), rendered.len())]) {
            if rendered[piece..end].contains(mark) {
                ids.extend(tokenizer.encode(&rendered[start..piece], Special::Control)?);
                ids.extend(tokenizer.encode(&rendered[piece..end].replace(mark, ""), Special::Text)?);
                start = end;
            }
            piece = next;
        }
        ids.extend(tokenizer.encode(&rendered[start..], Special::Control)?);
        Ok(ids)
    }
}

fn contains(value: &Value, mark: char) -> bool {
    match value {
        Value::String(text) => text.contains(mark),
        Value::Array(list) => list.iter().any(|value| contains(value, mark)),
        Value::Object(object) => object.iter().any(|(key, value)| key.contains(mark) || contains(value, mark)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const MARK: char = '\u{FDD0}';

    fn guard() -> Guard {
        Guard::new(&["<|end|>".to_owned(), "<|end|>x".to_owned(), "aXa".to_owned()]).unwrap()
    }

    #[test]
    fn special_strings_are_broken_and_other_text_is_left_alone() {
        let mut value = json!({"content": "a<|end|>b", "role": "user", "list": ["fine", {"k<|end|>": 1}]});
        assert!(guard().break_in(&mut value, MARK));
        // The last one is also the beginning of a longer one, which the template might complete.
        assert_eq!(value, json!({"content": "a<\u{FDD0}|end|>b", "role": "user", "list": ["fine", {"k<\u{FDD0}|end|>\u{FDD0}": 1}]}));
        let mut fine = json!(["a < b", "<|END|>"]);
        assert!(!guard().break_in(&mut fine, MARK));
    }

    #[test]
    fn a_beginning_at_the_end_is_closed_off() {
        assert_eq!(guard().broken("x<|en", MARK).as_deref(), Some("x<|en\u{FDD0}"));
        assert_eq!(guard().broken("xa", MARK).as_deref(), Some("xa\u{FDD0}"));
        assert_eq!(guard().broken("x<|ex", MARK), None);
    }

    #[test]
    fn marks_are_not_in_the_request() {
        let marks = Guard::marks(&[&json!({"\u{FDD0}": ["\u{FDD2}"]})]).unwrap();
        assert_eq!((marks.break_mark, marks.place_mark), ('\u{FDD1}', '\u{FDD3}'));
        let all: String = ('\u{FDD0}'..='\u{FDEF}').collect();
        assert_eq!(Guard::marks(&[&json!(all)]).unwrap_err().status(), 400);
    }

    proptest! {
        #[test]
        fn no_special_string_survives_however_texts_are_cut_or_joined(texts in prop::collection::vec("[aX<|end>x]{0,12}", 1..4), from in 0_usize..6) {
            let guard = guard();
            let broken: Vec<String> = texts.iter().map(|text| guard.broken(text, MARK).unwrap_or_else(|| text.clone())).collect();
            prop_assert_eq!(broken.concat().replace(MARK, ""), texts.concat(), "only marks are added");
            let joined: String = broken.concat().chars().skip(from).collect();
            prop_assert!(!guard.anywhere.is_match(&joined), "{joined:?}");
        }
    }
}
