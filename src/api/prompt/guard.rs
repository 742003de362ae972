//! Prompts to token ids. Strings inside user text that spell a special token stay plain text: a user cannot end the turn, or speak as
//! the system, by writing `<|end_of_sentence|>`.

use std::collections::HashSet;

use aho_corasick::AhoCorasick;
use serde_json::Value;

use crate::error::Failure;
use crate::text::tokenizer::{Special, Tokenizer};

/// Two noncharacters that a request does not contain: one breaks special-token strings, the other marks a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marks {
    pub break_mark: char,
    pub place_mark: char,
}

/// Knows the strings that spell special tokens.
///
/// User text is broken *inside* each such string with a noncharacter before the template is rendered. Whatever the template then does with
/// the text (cut, trim, join), no special token can come out of it. After rendering the marks are taken out again, and no special token is
/// looked for across the places where they were; the text itself is not cut there, so it encodes as the whole would.
pub struct Guard {
    /// Everything that the tokenizer looks for.
    all: Strings,
    /// Without visible markup such as `<think>`.
    control: Strings,
}

/// Some strings to find.
struct Strings {
    names: Vec<String>,
    /// Every occurrence, overlapping ones too.
    anywhere: AhoCorasick,
    /// Every proper beginning of one.
    beginnings: HashSet<String>,
}

impl Guard {
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, Failure> {
        let all = tokenizer.special_tokens();
        let is_control = |name: &&String| tokenizer.token_id(name).is_none_or(|id| tokenizer.is_special(id));
        let control: Vec<String> = all.iter().filter(is_control).cloned().collect();
        Ok(Self { all: Strings::new(all)?, control: Strings::new(&control)? })
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

    /// Breaks special-token strings in a list of messages. The assistant's keep their markup: a model wrote it, and templates look for it
    /// (they leave out the thinking of earlier turns). That is visible markup, and the control tokens that `is_markup` names; with a mark
    /// inside, `'</think>' in content` would be false.
    pub fn break_in_messages(&self, messages: &mut Value, mark: char, is_markup: &dyn Fn(&str) -> bool) {
        for message in messages.as_array_mut().into_iter().flatten() {
            match message.get("role").and_then(Value::as_str) {
                Some("assistant") => self.control.break_in(message, mark, is_markup),
                _ => self.break_in(message, mark),
            }
        }
    }

    /// Breaks special-token strings in every string below `value`.
    pub fn break_in(&self, value: &mut Value, mark: char) {
        self.all.break_in(value, mark, &|_| false);
    }

    /// Token ids of a rendered prompt, in which user text is broken with `mark`. `fit` gives the end of the text that is to be tokenized.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        rendered: &str,
        mark: char,
        fit: impl FnOnce(&str) -> Result<&str, Failure>,
    ) -> Result<Vec<u32>, Failure> {
        let mut pieces = rendered.split(mark);
        let mut text = pieces.next().unwrap_or_default().to_owned();
        let mut places = Vec::new();
        for piece in pieces {
            places.push(text.len()..text.len());
            text.push_str(piece);
        }
        let end = fit(&text)?;
        let start = text.len() - end.len();
        let places: Vec<_> =
            places.into_iter().filter(|place| place.start >= start).map(|place| place.start - start..place.end - start).collect();
        match places.is_empty() {
            true => tokenizer.encode(end, Special::Control),
            false => tokenizer.encode_except(end, &places),
        }
    }
}

impl Strings {
    fn new(strings: &[String]) -> Result<Self, Failure> {
        let strings: Vec<&String> = strings.iter().filter(|string| !string.is_empty()).collect();
        let anywhere =
            AhoCorasick::new(&strings).map_err(|error| Failure::internal(format!("cannot index the special tokens: {error}")))?;
        let beginnings = strings.iter().flat_map(|string| string.char_indices().skip(1).map(|(at, _)| string[..at].to_owned())).collect();
        Ok(Self { names: strings.into_iter().cloned().collect(), anywhere, beginnings })
    }

    /// In every string below `value`, but for the strings that are `kept`.
    fn break_in(&self, value: &mut Value, mark: char, kept: &dyn Fn(&str) -> bool) {
        match value {
            Value::String(text) => {
                if let Some(broken) = self.broken(text, mark, kept) {
                    *text = broken;
                }
            }
            Value::Array(list) => list.iter_mut().for_each(|value| self.break_in(value, mark, kept)),
            Value::Object(object) => {
                // Keys reach the text too (arguments of tool calls written as JSON). Roles are ours already.
                if object.keys().any(|key| self.broken(key, mark, kept).is_some()) {
                    let entries = std::mem::take(object).into_iter();
                    *object = entries.map(|(key, value)| (self.broken(&key, mark, kept).unwrap_or(key), value)).collect();
                }
                object.iter_mut().filter(|(key, _)| *key != "role").for_each(|(_, value)| self.break_in(value, mark, kept));
            }
            _ => {}
        }
    }

    /// `text` with the mark after the first character of each special-token string, and at the end if the text after it could complete
    /// one; `None` when there is nothing to break.
    fn broken(&self, text: &str, mark: char, kept: &dyn Fn(&str) -> bool) -> Option<String> {
        let mut places: Vec<usize> = self
            .anywhere
            .find_overlapping_iter(text)
            .filter(|found| !kept(&self.names[found.pattern().as_usize()]))
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

    fn strings() -> Strings {
        Strings::new(&["<|end|>".to_owned(), "<|end|>x".to_owned(), "aXa".to_owned()]).unwrap()
    }

    #[test]
    fn special_strings_are_broken_and_other_text_is_left_alone() {
        let mut value = json!({"content": "a<|end|>b", "role": "user", "list": ["fine", {"k<|end|>": 1}]});
        strings().break_in(&mut value, MARK, &|_| false);
        // The last one is also the beginning of a longer one, which the template might complete.
        assert_eq!(value, json!({"content": "a<\u{FDD0}|end|>b", "role": "user", "list": ["fine", {"k<\u{FDD0}|end|>\u{FDD0}": 1}]}));
        let mut fine = json!(["a < b", "<|END|>"]);
        strings().break_in(&mut fine, MARK, &|_| false);
        assert_eq!(fine, json!(["a < b", "<|END|>"]));
    }

    #[test]
    fn what_is_kept_stays_whole_and_the_rest_is_broken() {
        let kept = |name: &str| name == "aXa";
        assert_eq!(strings().broken("aXa<|end|>b", MARK, &kept).as_deref(), Some("aXa<\u{FDD0}|end|>b"));
        assert_eq!(strings().broken("b aXa b", MARK, &kept), None);
    }

    #[test]
    fn a_beginning_at_the_end_is_closed_off() {
        assert_eq!(strings().broken("x<|en", MARK, &|_| false).as_deref(), Some("x<|en\u{FDD0}"));
        assert_eq!(strings().broken("xa", MARK, &|_| false).as_deref(), Some("xa\u{FDD0}"));
        assert_eq!(strings().broken("x<|ex", MARK, &|_| false), None);
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
            let strings = strings();
            let broken: Vec<String> = texts.iter().map(|text| strings.broken(text, MARK, &|_| false).unwrap_or_else(|| text.clone())).collect();
            prop_assert_eq!(broken.concat().replace(MARK, ""), texts.concat(), "only marks are added");
            let joined: String = broken.concat().chars().skip(from).collect();
            prop_assert!(!strings.anywhere.is_match(&joined), "{joined:?}");
        }
    }
}
