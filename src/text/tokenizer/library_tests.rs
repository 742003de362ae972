//! `handler-tests/fixtures/tokenizers/tokenizers.json`: vocabularies of every kind, and how the libraries that they come from cut texts.

use std::collections::BTreeMap;

use base64::Engine as _;
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::Value as Json;

use super::*;
use crate::checkpoint::files::Source;
use crate::checkpoint::gguf::writer;
use crate::text::detokenize::Detokenizer;

#[derive(Deserialize)]
struct Fixture {
    texts: Vec<String>,
    /// Tokens in base64.
    ranks: Vec<String>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    /// Each in base64.
    files: BTreeMap<String, String>,
    gguf: Option<serde_json::Map<String, Json>>,
    ids: Vec<Vec<u32>>,
    /// What the ids read as behind other text; none where one of them is unknown. Or that they read as the texts.
    decoded: Option<Decoded>,
    #[serde(default)]
    special: BTreeMap<String, u32>,
    /// A text with control tokens, and its ids.
    control: Option<(String, Vec<u32>)>,
    #[serde(default)]
    before: Vec<u32>,
    #[serde(default)]
    after: Vec<u32>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Decoded {
    Same(bool),
    Texts(Vec<Option<String>>),
}

impl Decoded {
    fn get<'a>(&'a self, index: usize, text: &'a str) -> Option<&'a str> {
        match self {
            Self::Same(same) => same.then_some(text),
            Self::Texts(texts) => texts[index].as_deref(),
        }
    }
}

fn fixture() -> Fixture {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("handler-tests/fixtures/tokenizers/tokenizers.json");
    let mut fixture: Fixture = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let lines = || fixture.ranks.iter().enumerate();
    let tiktoken: String = lines().map(|(rank, token)| format!("{token} {rank}\n")).collect();
    let vocab: Json = lines().map(|(rank, token)| serde_json::json!({"rank": rank, "token_bytes": token, "token_str": null})).collect();
    for (name, file) in fixture.cases.iter_mut().flat_map(|case| &mut case.files) {
        if name == TEKKEN {
            let mut tekken: Json = serde_json::from_slice(&decode(file)).unwrap();
            tekken["vocab"] = vocab.clone();
            *file = encode(tekken.to_string());
        } else if file.is_empty() {
            *file = encode(&tiktoken);
        }
    }
    fixture
}

fn encode(bytes: impl AsRef<[u8]>) -> String {
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

fn decode(text: &str) -> Vec<u8> {
    base64::engine::general_purpose::STANDARD.decode(text).unwrap()
}

fn value(key: &str, value: &Json) -> writer::Value {
    let numbers = |list: &[Json]| list.iter().map(|value| value.as_f64().unwrap() as f32).collect();
    match value {
        Json::Bool(flag) => writer::Value::Bool(*flag),
        Json::Number(number) => writer::Value::U32(number.as_u64().unwrap() as u32),
        Json::String(text) if key == "precompiled_charsmap" => writer::Value::Bytes(decode(text)),
        Json::String(text) => writer::Value::Text(text.clone()),
        Json::Array(list) if key == "tokens" => writer::Value::Texts(list.iter().map(|text| text.as_str().unwrap().to_owned()).collect()),
        Json::Array(list) if key == "scores" => writer::Value::Floats(numbers(list)),
        Json::Array(list) => writer::Value::Integers(list.iter().map(|value| value.as_i64().unwrap() as i32).collect()),
        _ => panic!("{key}"),
    }
}

impl Case {
    fn tokenizer(&self) -> Tokenizer {
        let made = |bytes: Vec<u8>| Source::Made(bytes.into());
        let mut files: Vec<_> = self.files.iter().map(|(name, text)| (name.clone(), made(decode(text)))).collect();
        if let Some(entries) = &self.gguf {
            let metadata: Vec<_> = entries.iter().map(|(key, json)| (format!("tokenizer.ggml.{key}"), value(key, json))).collect();
            files.push((TOKENIZER.to_owned(), made(writer::write(&metadata, &[]))));
        }
        Tokenizer::load(&ModelFiles::new(&*self.name, "test", files)).unwrap()
    }
}

/// The text as it is sent while tokens come.
fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let (mut detokenizer, mut text) = (Detokenizer::new(&[], false), String::new());
    for id in ids {
        detokenizer.push(tokenizer.token_bytes(*id).unwrap(), true, &mut text);
    }
    detokenizer.finish(true, &mut text);
    text
}

#[test]
fn every_kind_of_vocabulary_agrees_with_its_library() {
    let Fixture { texts, cases, .. } = fixture();
    assert!(texts.len() > 30 && cases.len() >= 14);
    let mut wrong = Vec::new();
    for case in &cases {
        let tokenizer = case.tokenizer();
        for (index, (text, want)) in texts.iter().zip(&case.ids).enumerate() {
            let got = tokenizer.encode(text, Special::Text).unwrap();
            if got != *want {
                wrong.push(format!("{}, {text:?}: {got:?}, expected {want:?}", case.name));
            }
            let least = tokenizer.least_tokens(text);
            assert!(least <= got.len(), "{}, {text:?}: {least}", case.name);
            if let Some(read) = case.decoded.as_ref().and_then(|decoded| decoded.get(index, text)) {
                assert_eq!(streamed(&tokenizer, want), read, "{}", case.name);
            }
        }
        for (name, id) in &case.special {
            assert_eq!(tokenizer.token_id(name), Some(*id), "{}, {name}", case.name);
            assert_eq!(tokenizer.encode(name, Special::Control).unwrap(), [*id], "{}, {name}", case.name);
            assert!(!tokenizer.encode(name, Special::Text).unwrap().contains(id), "{}, {name}", case.name);
        }
        if let Some((text, ids)) = &case.control {
            assert_eq!(&tokenizer.encode(text, Special::Control).unwrap(), ids, "{}", case.name);
        }
        assert_eq!(tokenizer.added_around(), (&case.before[..], &case.after[..]), "{}", case.name);
    }
    assert!(wrong.is_empty(), "{}\n{}", wrong.len(), wrong.join("\n"));
}

/// Not a copy of the algorithm: of all ways to cut a short text none has a greater sum of scores.
fn best_sum(pieces: &BTreeMap<&str, f64>, unknown: f64, text: &str) -> f64 {
    let mut best = vec![f64::NEG_INFINITY; text.len() + 1];
    best[0] = 0.0;
    for (start, character) in text.char_indices() {
        for (piece, score) in pieces.iter().filter(|(piece, _)| text[start..].starts_with(**piece)) {
            best[start + piece.len()] = best[start + piece.len()].max(best[start] + score);
        }
        let end = start + character.len_utf8();
        if !pieces.contains_key(&text[start..end]) {
            best[end] = best[end].max(best[start] + unknown);
        }
    }
    best[text.len()]
}

proptest! {
    #[test]
    fn a_unigram_models_pieces_have_the_greatest_sum(
        words in proptest::collection::btree_map("[abéк]{1,4}", -9.0f32..-0.5, 1..20),
        text in "[abcéк]{0,14}",
    ) {
        use sentencepiece::{Algorithm, Encoder, Kind, Model, NormalizerSpec, Piece};
        let mut list = vec![Piece { text: "<unk>", score: 0.0, kind: Kind::Unknown }];
        list.extend(words.iter().map(|(text, score)| Piece { text, score: *score, kind: Kind::Normal }));
        let normalizer = NormalizerSpec { dummy_prefix: false, remove_extra_whitespaces: false, ..Default::default() };
        let scores: BTreeMap<&str, f64> = words.iter().map(|(text, score)| (text.as_str(), f64::from(*score))).collect();
        let unknown = scores.values().copied().fold(f64::MAX, f64::min) - 10.0;
        let model = Model::of_pieces(list.clone(), Algorithm::Unigram, normalizer);
        let mut ids = Vec::new();
        Encoder::new(&model, |_| false).unwrap().encode(&text, true, &mut ids);
        // A run of unknown characters is one id: compared where there is none.
        if !ids.contains(&0) {
            let sum: f64 = ids.iter().map(|id| f64::from(list[*id as usize].score)).sum();
            let read: String = ids.iter().map(|id| list[*id as usize].text).collect();
            prop_assert_eq!(&read, &text);
            prop_assert!((sum - best_sum(&scores, unknown, &text)).abs() < 1e-3);
        }
    }

    /// Ranks and models that replace nothing: the bytes of the ids are the text, however it is cut, and streamed it is the same.
    #[test]
    fn texts_come_back_from_every_vocabulary_that_loses_nothing(text in "(\\PC|[ -~]| |\n|'s|<\\|im_end\\|>|[\u{0}-\u{20}]|[\u{4e00}-\u{4e20}]|\\d{1,5}|[A-Z][a-z]{1,4}){0,60}") {
        static TOKENIZERS: std::sync::LazyLock<Vec<(String, Tokenizer)>> = std::sync::LazyLock::new(|| {
            let lossless = |case: &&Case| case.name.starts_with("tek") || case.name.starts_with("tik") || case.name == "unigram";
            fixture().cases.iter().filter(lossless).map(|case| (case.name.clone(), case.tokenizer())).collect()
        });
        prop_assert!(TOKENIZERS.len() == 6);
        for (name, tokenizer) in TOKENIZERS.iter() {
            let ids = tokenizer.encode(&text, Special::Text).unwrap();
            let shown = if name == "unigram" { text.replace('▁', " ") } else { text.clone() };
            prop_assert_eq!(streamed(tokenizer, &ids), shown, "{}", name);
            prop_assert!(!ids.iter().any(|id| tokenizer.added.contains(*id)), "{}", name);
            prop_assert!(tokenizer.least_tokens(&text) <= ids.len(), "{}", name);
        }
    }
}

/// Files that cannot be read exactly are refused with what is wrong.
#[test]
fn vocabularies_that_cannot_be_exact_are_refused() {
    let fixture = fixture();
    let case = |name: &str| fixture.cases.iter().find(|case| case.name == name).unwrap();
    let refused = |files: &[(&str, Vec<u8>)]| {
        let files = files.iter().map(|(name, bytes)| ((*name).to_owned(), Source::Made(bytes.clone().into()))).collect();
        Tokenizer::load(&ModelFiles::new("test", "test", files)).err().unwrap().message
    };
    let file = |name: &str, file: &str| decode(&case(name).files[file]);
    let ranks = file("tiktoken, qwen", "qwen.tiktoken");
    assert!(refused(&[("other.tiktoken", ranks.clone())]).contains("nothing tells how its model cuts texts (known: qwen.tiktoken"));
    assert!(refused(&[("tokenizer.model", ranks.clone())]).contains("in tiktoken's form"));
    let llama = ("config.json", br#"{"model_type": "llama"}"#.to_vec());
    assert!(refused(&[("tokenizer.model", ranks.clone()), llama]).contains("added_tokens_decoder"));
    let mut gap = ranks.clone();
    gap.drain(..gap.iter().position(|byte| *byte == b'\n').unwrap() + 1);
    assert!(refused(&[("qwen.tiktoken", gap)]).contains("rank 0"));
    assert!(refused(&[("qwen.tiktoken", b"YQ== 0\nYg== x\n".to_vec())]).contains("line 2"));
    assert!(refused(&[("qwen.tiktoken", b"YQ== 0\n".to_vec())]).contains("the byte 0 has no token"));
    let ids = ("tokenizer_config.json", br#"{"added_tokens_decoder": {"4000000000": {"content": "<x>"}}}"#.to_vec());
    assert!(refused(&[("qwen.tiktoken", ranks), ids]).contains("4000000000"));
    let tekken: Json = serde_json::from_slice(&file("tekken v11", "tekken.json")).unwrap();
    for (pointer, wrong, says) in [
        ("/config/default_vocab_size", serde_json::json!(10), "do not fit"),
        ("/config/default_vocab_size", serde_json::json!(100_000), "do not fit"),
        ("/config/default_num_special_tokens", serde_json::json!(3), "6 special tokens"),
        ("/config/default_num_special_tokens", serde_json::json!(1_u64 << 40), "more than any vocabulary has"),
        ("/config/pattern", serde_json::json!("(a"), "no regular expression"),
        ("/special_tokens", Json::Null, "no special_tokens"),
        ("/vocab/5/rank", serde_json::json!(7), "vocab[5] has rank 7"),
        ("/vocab/5/token_bytes", serde_json::json!("?"), "vocab[5]"),
        ("/special_tokens/1/rank", serde_json::json!(0), "special_tokens[1]"),
    ] {
        let mut file = tekken.clone();
        *file.pointer_mut(pointer).unwrap() = wrong;
        let message = refused(&[("tekken.json", file.to_string().into_bytes())]);
        assert!(message.contains(says), "{pointer}: {message}");
    }
    let mut cased = case("GGUF, WordPiece, cased").gguf.clone().unwrap();
    cased.remove("normalizer.lowercase");
    let metadata: Vec<_> = cased.iter().map(|(key, json)| (format!("tokenizer.ggml.{key}"), value(key, json))).collect();
    assert!(refused(&[(TOKENIZER, writer::write(&metadata, &[]))]).contains("capitals"));
}

/// Bytes changed, cut off, doubled: an error, or a tokenizer that cuts some text. `FUZZ_SECONDS=60` goes on for so long.
#[test]
fn damaged_vocabularies_never_panic() {
    let seconds = std::env::var("FUZZ_SECONDS").ok().and_then(|seconds| seconds.parse().ok()).unwrap_or(0);
    let (begun, mut state) = (std::time::Instant::now(), 7u64);
    let mut next = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below.max(1)
    };
    let cases = fixture().cases;
    let mut rounds = 0;
    while rounds < 20 || begun.elapsed().as_secs() < seconds {
        rounds += 1;
        for case in &cases {
            let mut files: Vec<(String, Vec<u8>)> = case.files.iter().map(|(name, text)| (name.clone(), decode(text))).collect();
            let Some((_, bytes)) = files.iter_mut().max_by_key(|(_, bytes)| bytes.len()) else { continue };
            for _ in 0..1 + next(3) {
                let at = next(bytes.len());
                match next(4) {
                    0 => bytes.truncate(at),
                    1 => bytes.extend_from_within(at..(at + next(40)).min(bytes.len())),
                    // The end of a SentencePiece model, where its settings and tables are.
                    2 => {
                        let from = bytes.len().saturating_sub(300);
                        let at = from + next(bytes.len() - from);
                        bytes.get_mut(at).into_iter().for_each(|byte| *byte = next(256) as u8);
                    }
                    _ => bytes.get_mut(at).into_iter().for_each(|byte| *byte ^= 1 << next(8)),
                }
            }
            let files = files.into_iter().map(|(name, bytes)| (name, Source::Made(bytes.into()))).collect();
            if let Ok(tokenizer) = Tokenizer::load(&ModelFiles::new("damaged", "test", files)) {
                let text = "Hello ﬁne  中文 ① e\u{301}12 <s>\n";
                let ids = tokenizer.encode(text, Special::Control).unwrap();
                assert!(ids.iter().all(|id| tokenizer.token_bytes(*id).is_some()), "{}", case.name);
                assert!(tokenizer.least_tokens(text) <= ids.len(), "{}", case.name);
            }
        }
    }
}

/// The space before the first word: behind each special token, or before the whole text alone (`legacy: false`), or not at all.
#[test]
fn where_a_space_is_put_before_words_the_configuration_says() {
    let fixture = fixture();
    let case = fixture.cases.iter().find(|case| case.name == "bpe with a prefix").unwrap();
    let tokenizer = |config: &str| {
        let model = Source::Made(decode(&case.files["tokenizer.model"]).into());
        let config = Source::Made(config.as_bytes().into());
        let files = vec![("tokenizer.model".to_owned(), model), ("tokenizer_config.json".to_owned(), config)];
        Tokenizer::load(&ModelFiles::new("test", "test", files)).unwrap()
    };
    for (config, expected) in [
        ("{}", " hello<s> hello"),
        (r#"{"legacy": true}"#, " hello<s> hello"),
        (r#"{"legacy": false}"#, " hello<s>hello"),
        (r#"{"add_prefix_space": false}"#, "hello<s>hello"),
    ] {
        let tokenizer = tokenizer(config);
        let ids = tokenizer.encode("hello<s>hello", Special::Control).unwrap();
        assert_eq!(streamed(&tokenizer, &ids), expected, "{config}");
    }
}
