//! The whole API on the real engine. Only the model is scripted: the seed of a request chooses what it "writes".

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use serde_json::{Value, json};

use crate::api::{Call, ModelInfo, Reply, Service};
use crate::checkpoint::files::{ModelFiles, Source};
use crate::config::ApiSettings;
use crate::engine;
use crate::error::Failure;
use crate::models::{Logprobs, LogprobsMode, LogprobsSpec, Output, Plan, Runner, Shape, StepError};
use crate::text::tokenizer::{Special, Tokenizer};

mod calls;
mod errors;
mod fastdeploy;
mod infill;
mod logprobs;
mod native;
mod pooling;
mod prompts;
mod round_trip;
mod streams;
mod tools;
mod whole;

pub const CONTEXT: usize = 96;

/// Writes `script[seed]`, then the end of sequence. `None` fails the step.
struct Scripted {
    shape: Shape,
    scripts: Vec<Vec<Option<u32>>>,
    pace: Duration,
}

impl Runner for Scripted {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn step(&mut self, plan: &Plan) -> Result<Output, StepError> {
        std::thread::sleep(self.pace);
        let mut output = Output::default();
        for sampling in plan.rows.iter().filter_map(|row| row.sampling.as_ref()) {
            let params = &sampling.params;
            let script = &self.scripts[params.seed as usize % self.scripts.len()];
            let token = match script.get(sampling.index as usize) {
                Some(token) => token.ok_or_else(|| Failure::internal("told to fail"))?,
                None => 2,
            };
            output.tokens.push(token);
            output.logprobs.push(params.logprobs.map(|spec| logprobs(token, -0.5 - (params.seed % 8) as f32, spec)));
        }
        for score in plan.rows.iter().filter_map(|row| row.score.as_ref()) {
            output.scores.extend(score.targets.iter().map(|target| logprobs(*target, -0.125, score.logprobs)));
        }
        Ok(output)
    }
}

/// A part of a character, as a token of its own.
pub const PARTIAL: u32 = 3 + 0xE4;

/// What the scripted model says of a token: it is the most probable one, then come a part of a character and the end of sequence.
fn logprobs(token: u32, own: f32, spec: LogprobsSpec) -> Logprobs {
    let mut top = vec![(token, own), (PARTIAL, own - 1.0), (2, f32::NEG_INFINITY)];
    top.truncate(spec.top as usize);
    // Other numbers than log probabilities say nothing of which answer is the better one: here they say the opposite.
    let raw = own;
    let own = if spec.mode == LogprobsMode::RawLogprobs { own } else { -own };
    Logprobs { own, rank: 1, top, raw }
}

pub struct World {
    pub service: Arc<Service>,
    pub tokenizer: Arc<Tokenizer>,
}

/// What the scripted model writes: text, raw tokens, or a fault.
#[derive(Clone)]
pub enum Say {
    Text(&'static str),
    Bytes(&'static [u8]),
    Fail,
}

/// A vocabulary of ASCII, byte pieces and a few words: every other character comes in several tokens.
pub fn tokenizer_json() -> String {
    let mut vocab: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    vocab.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    vocab.extend((33..127_u8).map(|byte| char::from(byte).to_string()));
    vocab.extend(["▁", "He", "ll", "Hell", "Hello", "▁w", "or", "▁wor", "ld", "▁world"].map(str::to_owned));
    let merges = [["H", "e"], ["l", "l"], ["He", "ll"], ["Hell", "o"], ["▁", "w"], ["o", "r"], ["▁w", "or"], ["l", "d"], ["▁wor", "ld"]];
    let ids: serde_json::Map<String, Value> = vocab.iter().enumerate().map(|(id, piece)| (piece.clone(), json!(id))).collect();
    let count = ids.len();
    let token = |id: usize, content: &str, special: bool| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": special});
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [
            token(0, "<unk>", true), token(1, "<s>", true), token(2, "</s>", true),
            token(count, "<|begin_of_sentence|>", true), token(count + 1, "<|end_of_sentence|>", true), token(count + 2, "<think>", false),
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true, "vocab": ids, "merges": merges},
    })
    .to_string()
}

pub fn files(extra: &[(&str, &str)]) -> ModelFiles {
    let mut files = vec![
        ("tokenizer.json".to_owned(), tokenizer_json()),
        ("config.json".to_owned(), json!({"model_type": "ernie4_5", "eos_token_id": 2}).to_string()),
        ("tokenizer_config.json".to_owned(), json!({"cls_token": "<|begin_of_sentence|>", "bos_token": "<s>"}).to_string()),
    ];
    for (name, text) in extra {
        files.retain(|(present, _)| present != name);
        files.push(((*name).to_owned(), (*text).to_owned()));
    }
    let files = files.into_iter().map(|(name, text)| (name, Source::Embedded(text.into_bytes().leak()))).collect();
    ModelFiles::new("baidu/ERNIE-test", "test", files)
}

pub async fn world_with(says: &[Vec<Say>], settings: ApiSettings, files: ModelFiles, pace: Duration) -> Result<World, Failure> {
    let tokenizer = Arc::new(Tokenizer::load(&files)?);
    let byte = |byte: &u8| tokenizer.token_id(&format!("<0x{byte:02X}>"));
    let scripts = says
        .iter()
        .map(|says| {
            let tokens = says.iter().map(|say| match say {
                Say::Text(text) => tokenizer.encode(text, Special::Control).unwrap().into_iter().map(Some).collect::<Vec<_>>(),
                Say::Bytes(bytes) => bytes.iter().map(byte).collect(),
                Say::Fail => vec![None],
            });
            tokens.flatten().collect()
        })
        .collect();
    let shape = Shape {
        max_model_len: CONTEXT,
        vocab_size: tokenizer.vocab_size(),
        block_size: 16,
        blocks: 64,
        kv_cache_dtype: "float32",
        state_slots: 0,
        max_num_seqs: 8,
        max_num_batched_tokens: 64,
        memory_bound: false,
        pooling: None,
        whole_prompts: false,
    };
    let engine =
        engine::start(move || Ok(Scripted { shape, scripts, pace }), engine::EngineOptions { max_waiting: 32, ..Default::default() })
            .await?;
    let service = Arc::new(Service::new(settings, engine, tokenizer.clone(), ModelInfo::from_files(&files)?)?);
    Ok(World { service, tokenizer })
}

pub async fn world(says: &[Vec<Say>]) -> World {
    world_with(says, ApiSettings::default(), files(&[]), Duration::ZERO).await.unwrap()
}

/// A world whose model always writes the same.
pub async fn saying(text: &'static str) -> World {
    world(&[vec![Say::Text(text)]]).await
}

impl World {
    pub async fn call(&self, path: &str, body: Value) -> Result<Reply, Failure> {
        let method = if body.is_null() { "GET" } else { "POST" };
        self.service.call(Call { method: method.to_owned(), path: path.to_owned(), body, request_id: "r1".to_owned(), client: None }).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Result<Value, Failure> {
        self.call(path, body).await.map(whole)
    }

    pub async fn chat(&self, more: Value) -> Result<Value, Failure> {
        self.post("/v1/chat/completions", with(json!({"messages": [{"role": "user", "content": "Hi"}], "seed": 0}), more)).await
    }

    pub async fn complete(&self, more: Value) -> Result<Value, Failure> {
        self.post("/v1/completions", with(json!({"prompt": "Hi", "seed": 0}), more)).await
    }

    /// The events of a stream, which must end with `[DONE]`.
    pub async fn events(&self, path: &str, body: Value) -> Vec<Value> {
        let frames = items(self.call(path, with(body, json!({"stream": true}))).await.unwrap()).await;
        events(&frames.into_iter().map(Result::unwrap).collect::<Vec<_>>())
    }

    pub async fn job(&self, input: Value) -> Result<Value, Failure> {
        self.service.job(input, "j1").await.map(whole)
    }

    pub async fn job_stream(&self, input: Value) -> Vec<Value> {
        items(self.service.job(input, "j1").await.unwrap()).await.into_iter().map(Result::unwrap).collect()
    }

    /// Token ids that a text stands for.
    pub fn ids(&self, text: &str, special: Special) -> Vec<u32> {
        self.tokenizer.encode(text, special).unwrap()
    }
}

/// `base` with the keys of `more` over it.
pub fn with(mut base: Value, more: Value) -> Value {
    if let (Value::Object(base), Value::Object(more)) = (&mut base, more) {
        base.extend(more);
    }
    base
}

pub fn whole(answer: Reply) -> Value {
    match answer {
        Reply::Whole(value) => value,
        Reply::Stream(_) => panic!("a stream"),
    }
}

pub async fn items(answer: Reply) -> Vec<Result<Value, Failure>> {
    match answer {
        Reply::Stream(pieces) => pieces.collect().await,
        Reply::Whole(value) => panic!("not a stream: {value}"),
    }
}

/// Events of strings of whole frames, of which the last is `[DONE]`.
pub fn events(pieces: &[Value]) -> Vec<Value> {
    let mut events = Vec::new();
    let mut done = false;
    for piece in pieces {
        let text = piece.as_str().expect("a string");
        assert!(text.ends_with("\n\n"), "whole frames: {text:?}");
        for frame in text.split_terminator("\n\n") {
            assert!(!done, "nothing after [DONE]");
            let data = frame.strip_prefix("data: ").expect("data");
            match data {
                "[DONE]" => done = true,
                data => events.push(serde_json::from_str(data).unwrap()),
            }
        }
    }
    assert!(done, "no [DONE]");
    events
}

/// Named events of strings of whole frames: each is named as its type, and only the last one ends the stream.
pub fn named_events(pieces: &[Value]) -> Vec<Value> {
    let text: String = pieces.iter().map(|piece| piece.as_str().expect("a string")).collect();
    assert!(crate::api::frames::end_stream(&text), "{text}");
    let read = |frame: &str| {
        let (name, data) = frame.split_once('\n').expect("two lines");
        let event: Value = serde_json::from_str(data.strip_prefix("data: ").expect("data")).unwrap();
        assert_eq!(Some(event["type"].as_str().unwrap()), name.strip_prefix("event: "));
        event
    };
    text.split_terminator("\n\n").map(read).collect()
}
