//! JSON of requests, read within bounds.
//!
//! Parsed JSON takes far more memory than its text: a small object in a list is a dozen bytes of text and half a kilobyte of tree. So the
//! tree is counted while it is built, and a text whose tree grows beyond its bound is refused.

use std::cell::Cell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Number, Value};

use super::reclaim;
use crate::config::defaults;
use crate::engine::Limits;
use crate::error::{Failure, Kind};

const MIB: usize = 1 << 20;

/// How large a request may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BodyLimits {
    /// Bytes of its text.
    pub bytes: usize,
    /// Bytes that its parsed tree takes, as [`read`] estimates them.
    pub tree: usize,
    /// Lists and objects within each other.
    pub depth: usize,
}

impl Default for BodyLimits {
    /// The most that any model gets.
    fn default() -> Self {
        Self { bytes: 32 * MIB, tree: 48 * MIB, depth: defaults::MAX_JSON_DEPTH }
    }
}

impl BodyLimits {
    /// What a model can use: every sequence that may run or wait, each as long as the context. `longest_token`: the most bytes of text that
    /// one token stands for, where that is known.
    pub fn of_model(limits: &Limits, longest_token: Option<usize>) -> Self {
        let most = Self::default();
        // One token of text: JSON writes a byte in six at most (`\u0001`). One token as an id: up to ten digits and a comma.
        let token = longest_token.map_or(usize::MAX, |bytes| bytes.saturating_mul(6).max(11));
        let sequences = limits.max_num_seqs.saturating_add(limits.max_waiting);
        let text = sequences.saturating_mul(limits.max_model_len).saturating_mul(token);
        // One prompt of token ids always fits, however long the context is.
        let ids = limits.max_model_len.saturating_mul(ELEMENT).saturating_add(MIB);
        Self { bytes: text.saturating_add(MIB).min(most.bytes), tree: most.tree.max(ids), ..most }
    }

    /// For requests that may be for either.
    pub fn widest(self, other: Self) -> Self {
        Self { bytes: self.bytes.max(other.bytes), tree: self.tree.max(other.tree), depth: self.depth.max(other.depth) }
    }
}

/// Why a text was not read.
#[derive(Debug)]
pub enum Unread {
    /// Its tree would be too large.
    TooLarge(Failure),
    /// Its values lie too deep.
    TooDeep(Failure),
    Invalid(serde_json::Error),
}

impl From<Unread> for Failure {
    fn from(unread: Unread) -> Self {
        match unread {
            Unread::TooLarge(failure) | Unread::TooDeep(failure) => failure,
            Unread::Invalid(error) => Failure::new(Kind::BadRequest, format!("The request body is not valid JSON: {error}.")),
        }
    }
}

/// Parses JSON whose tree takes at most `limits.tree` bytes.
pub fn read(text: &[u8], limits: &BodyLimits) -> Result<Value, Unread> {
    reclaim::after(text.len());
    let budget =
        Budget { left: Cell::new(limits.tree), spent: Cell::new(false), deeper: Cell::new(limits.depth), too_deep: Cell::new(false) };
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let value = budget.deserialize(&mut deserializer).and_then(|value| deserializer.end().map(|()| value));
    if budget.too_deep.get() {
        let message = format!("The request's JSON is nested deeper than the limit of {} levels (MAX_JSON_DEPTH).", limits.depth);
        return Err(Unread::TooDeep(Failure::new(Kind::BadRequest, message)));
    }
    value.map_err(|error| match budget.spent.get() {
        true => Unread::TooLarge(Failure::new(
            Kind::TooLarge,
            format!(
                "The request's JSON holds too many values: parsed, it takes more than the limit of {} MiB. Send fewer in one request.",
                limits.tree / MIB
            ),
        )),
        false => Unread::Invalid(error),
    })
}

/// What parts of a tree take, allocator's share included. A unit test compares the first two with the types themselves.
const ELEMENT: usize = 72;
const ENTRY: usize = 104 + 32;
/// A list's or an object's first allocations: room for four elements or entries, and an object's index.
const LIST: usize = 4 * ELEMENT;
const OBJECT: usize = 4 * 104 + 80;
/// A string's allocation beside its bytes.
const STRING: usize = 24;

/// Bytes that a tree may still take.
struct Budget {
    left: Cell<usize>,
    spent: Cell<bool>,
    /// How much deeper lists and objects may lie.
    deeper: Cell<usize>,
    too_deep: Cell<bool>,
}

impl Budget {
    fn charge<E: Error>(&self, bytes: usize) -> Result<(), E> {
        match self.left.get().checked_sub(bytes) {
            Some(left) => {
                self.left.set(left);
                Ok(())
            }
            None => {
                self.spent.set(true);
                Err(E::custom("too many values"))
            }
        }
    }

    /// A list or an object begins.
    fn down<E: Error>(&self) -> Result<(), E> {
        match self.deeper.get().checked_sub(1) {
            Some(deeper) => {
                self.deeper.set(deeper);
                Ok(())
            }
            None => {
                self.too_deep.set(true);
                Err(E::custom("too deep"))
            }
        }
    }

    /// It ends.
    fn up(&self) {
        self.deeper.set(self.deeper.get() + 1);
    }
}

impl<'de> DeserializeSeed<'de> for &Budget {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for &Budget {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("any JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        self.charge(STRING + value.len())?;
        Ok(Value::String(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        self.down()?;
        let mut list = Vec::new();
        while let Some(value) = access.next_element_seed(self)? {
            self.charge(if list.is_empty() { LIST + ELEMENT } else { ELEMENT })?;
            list.push(value);
        }
        self.up();
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        self.down()?;
        let mut object = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            self.charge(if object.is_empty() { OBJECT + ENTRY } else { ENTRY })?;
            self.charge(key.len())?;
            let value = access.next_value_seed(self)?;
            object.insert(key, value);
        }
        self.up();
        Ok(Value::Object(object))
    }
}

/// Members of a JSON object as they are written: no tree is built. The whole text is checked as if it were. Of a name that comes twice the
/// last counts.
pub fn members<'a, const N: usize>(text: &'a [u8], names: [&str; N]) -> Result<[Option<&'a RawValue>; N], Failure> {
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    Checked.deserialize(&mut deserializer).and_then(|()| deserializer.end()).map_err(Unread::Invalid)?;
    if text.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'{') {
        return Err(Failure::new(Kind::BadRequest, "The request body must be a JSON object."));
    }
    let found = Members(names).deserialize(&mut serde_json::Deserializer::from_slice(text));
    Ok(found.map_err(Unread::Invalid)?)
}

/// Reads a value and keeps nothing. Other than serde's `IgnoredAny` it is as strict as a reader that keeps it: about nesting, halves of
/// surrogate pairs, and numbers too large.
struct Checked;

impl<'de> DeserializeSeed<'de> for Checked {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Checked {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("any JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<(), A::Error> {
        while access.next_element_seed(Checked)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<(), A::Error> {
        while access.next_key_seed(Checked)?.is_some() {
            access.next_value_seed(Checked)?;
        }
        Ok(())
    }
}

struct Members<'n, const N: usize>([&'n str; N]);

impl<'de, const N: usize> DeserializeSeed<'de> for Members<'_, N> {
    type Value = [Option<&'de RawValue>; N];

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, const N: usize> Visitor<'de> for Members<'_, N> {
    type Value = [Option<&'de RawValue>; N];

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
        let mut found = [None; N];
        while let Some(key) = access.next_key::<String>()? {
            match self.0.iter().position(|name| *name == key) {
                Some(place) => found[place] = Some(access.next_value()?),
                None => drop(access.next_value::<IgnoredAny>()?),
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn with(tree: usize) -> BodyLimits {
        BodyLimits { tree, ..BodyLimits::default() }
    }

    #[test]
    fn the_estimates_are_those_of_the_types() {
        assert_eq!(size_of::<Value>(), ELEMENT);
        // A key, a value, a hash.
        assert_eq!(size_of::<String>() + size_of::<Value>() + 8, 104);
    }

    #[test]
    fn a_tree_is_bounded_whatever_its_shape() {
        let shapes = [
            format!("[{}0]", "0,".repeat(100_000)),
            format!("[{}{{}}]", r#"{"a":1},"#.repeat(3_000)),
            format!("[{}[1]]", "[1],".repeat(10_000)),
            format!(r#"[{}""]"#, r#""","#.repeat(50_000)),
            format!(r#""{}""#, "x".repeat(2 * MIB)),
            format!("{{{}\"\":0}}", (0..20_000).map(|i| format!("\"{i}\":0,")).collect::<String>()),
        ];
        for text in shapes {
            assert!(read(text.as_bytes(), &BodyLimits::default()).is_ok(), "{:.40}", text);
            let refused = read(text.as_bytes(), &with(MIB)).unwrap_err();
            assert!(matches!(&refused, Unread::TooLarge(failure) if failure.status() == 413), "{refused:?} for {text:.40}");
        }
    }

    #[test]
    fn the_largest_prompt_of_token_ids_fits() {
        let limits = Limits { max_model_len: 1 << 20, vocab_size: 10, max_num_seqs: 1, max_waiting: 1, memory_bound: None };
        let ids = format!(r#"{{"prompt":[{}1]}}"#, "1,".repeat((1 << 20) - 1));
        assert!(read(ids.as_bytes(), &BodyLimits::of_model(&limits, Some(8))).is_ok());
        assert!(read(ids.as_bytes(), &BodyLimits::default()).is_err());
    }

    #[test]
    fn a_small_model_needs_no_large_bodies() {
        let limits =
            |max_model_len, max_waiting| Limits { max_model_len, vocab_size: 10, max_num_seqs: 1, max_waiting, memory_bound: None };
        assert_eq!(BodyLimits::of_model(&limits(1000, 0), Some(10)).bytes, 60_000 + MIB);
        assert_eq!(BodyLimits::of_model(&limits(1000, 9), Some(1)).bytes, 110_000 + MIB);
        assert_eq!(BodyLimits::of_model(&limits(100_000, 500), Some(100)), BodyLimits::default());
        assert_eq!(BodyLimits::of_model(&limits(1000, 0), None), BodyLimits::default());
    }

    #[test]
    fn members_are_taken_as_they_are_written() {
        let text = br#" {"a": 1, "b": {"x": [1, 2]}, "a": "last\u0041", "c": null} "#;
        let [a, b, missing] = members(text, ["a", "b", "d"]).unwrap();
        assert_eq!((a.unwrap().get(), b.unwrap().get(), missing.is_none()), (r#""last\u0041""#, r#"{"x": [1, 2]}"#, true));
        for (text, word) in
            [("[1]", "must be a JSON object"), ("{", "not valid JSON"), ("{} {}", "not valid JSON"), ("x", "not valid JSON")]
        {
            let failure = members(text.as_bytes(), ["a"]).unwrap_err();
            assert!(failure.status() == 400 && failure.message.contains(word), "{text}: {failure}");
        }
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::vec((".{0,4}", inner), 0..6).prop_map(|entries| Value::Object(entries.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn it_reads_what_the_parser_reads(value in any_json(), cut in 0_usize..40) {
            let mut text = value.to_string();
            text.truncate(text.char_indices().map(|(at, _)| at).nth(text.chars().count().saturating_sub(cut)).unwrap_or(text.len()));
            let plain = serde_json::from_str::<Value>(&text);
            match (read(text.as_bytes(), &BodyLimits::default()), plain) {
                (Ok(ours), Ok(plain)) => prop_assert_eq!(ours, plain),
                (Err(Unread::Invalid(ours)), Err(plain)) => prop_assert_eq!(ours.to_string(), plain.to_string()),
                (ours, plain) => prop_assert!(false, "{ours:?} and {plain:?}"),
            }
            let text = format!("{{\"a\":{text}}}");
            prop_assert_eq!(members(text.as_bytes(), ["a"]).is_ok(), serde_json::from_str::<Value>(&text).is_ok());
        }
    }

    #[test]
    fn nesting_is_bounded() {
        let deep = format!("{}1{}", "[".repeat(5000), "]".repeat(5000));
        assert!(matches!(read(deep.as_bytes(), &BodyLimits::default()), Err(Unread::Invalid(_))));
        for value in [deep.as_str(), r#""half \ud83d""#, "1e999"] {
            let text = format!(r#"{{"input":{value}}}"#);
            assert_eq!(members(text.as_bytes(), ["input"]).unwrap_err().status(), 400, "{value:.20}");
        }
        for (text, fits) in [("[[1]]", true), ("[[1], {\"a\": 2}, [3]]", true), ("[[[]]]", false), ("{\"a\": [{}]}", false)] {
            let limits = BodyLimits { depth: 2, ..BodyLimits::default() };
            match read(text.as_bytes(), &limits) {
                Ok(_) => assert!(fits, "{text}"),
                Err(Unread::TooDeep(failure)) => {
                    assert!(!fits && failure.status() == 400 && failure.message.contains("MAX_JSON_DEPTH"), "{text}")
                }
                Err(other) => panic!("{text}: {other:?}"),
            }
        }
        let value = json!({"a": [1.5, -2, "x", null, true]});
        assert_eq!(read(value.to_string().as_bytes(), &BodyLimits::default()).unwrap(), value);
    }
}
