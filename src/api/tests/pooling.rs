//! Embeddings, rerank and score on the real engine. The model is scripted: it makes of a sequence its length, the sum of its ids and how many
//! of its tokens are of the second type.

use super::*;
use crate::engine::{Dimensions, PoolingSpec, PoolingTask};
use crate::models::pooling::Pooling;

struct Pooler {
    shape: Shape,
}

impl Runner for Pooler {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn step(&mut self, plan: &Plan) -> Result<Output, StepError> {
        let mut output = Output::default();
        for row in plan.rows.iter().filter(|row| row.pools) {
            let tokens = row.start..row.start + row.len;
            let sum: u32 = plan.tokens[tokens.clone()].iter().sum();
            let second: u32 = if plan.types.is_empty() { 0 } else { plan.types[tokens].iter().sum() };
            let all = [row.len as f32, sum as f32, second as f32];
            output.pooled.push(if self.shape.pooling.as_ref().unwrap().task == PoolingTask::Score {
                vec![row.len as f32 / 10.0]
            } else {
                all.to_vec()
            });
        }
        Ok(output)
    }
}

fn spec(task: PoolingTask, dimensions: Dimensions) -> PoolingSpec {
    let width = if task == PoolingTask::Score { 1 } else { 3 };
    PoolingSpec { task, pooling: Pooling::Mean, head: Vec::new(), normalize: false, sigmoid: true, dimensions, width }
}

async fn pooling_world(spec: PoolingSpec, extra: &[(&str, &str)]) -> World {
    let mut tokenizer: Value = serde_json::from_str(&tokenizer_json()).unwrap();
    tokenizer["post_processor"] = json!({"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]});
    let tokenizer = tokenizer.to_string();
    let mut all = vec![("tokenizer.json", tokenizer.as_str())];
    all.extend(extra);
    let files = files(&all);
    let tokenizer = Arc::new(Tokenizer::load(&files).unwrap());
    let shape = Shape {
        max_model_len: 32,
        vocab_size: tokenizer.vocab_size(),
        block_size: 16,
        state_slots: 0,
        blocks: 16,
        kv_cache_dtype: "float32",
        max_num_seqs: 2,
        max_num_batched_tokens: 32,
        memory_bound: false,
        pooling: Some(Arc::new(spec)),
        whole_prompts: true,
    };
    let options = engine::EngineOptions { max_waiting: 3, ..Default::default() };
    let engine = engine::start(move || Ok(Pooler { shape }), options).await.unwrap();
    let service =
        Arc::new(Service::new(ApiSettings::default(), engine, tokenizer.clone(), ModelInfo::from_files(&files).unwrap()).unwrap());
    World { service, tokenizer }
}

async fn embedder() -> World {
    pooling_world(spec(PoolingTask::Embed, Dimensions::Of(vec![2])), &[]).await
}

async fn reranker() -> World {
    pooling_world(spec(PoolingTask::Score, Dimensions::Whole), &[]).await
}

fn vectors(answer: &Value) -> Vec<Vec<f64>> {
    let numbers = |row: &Value| row["embedding"].as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect();
    answer["data"].as_array().unwrap().iter().map(numbers).collect()
}

#[tokio::test]
async fn every_form_of_input() {
    let world = embedder().await;
    let hello = world.ids("Hello", Special::Text);
    let sum = f64::from(hello.iter().sum::<u32>());
    let of = |input: Value| world.post("/v1/embeddings", json!({"input": input}));
    let one = of(json!("Hello")).await.unwrap();
    assert_eq!(vectors(&one), [[3.0, sum + 3.0, 0.0]], "with what stands around a text");
    assert_eq!(
        (&one["object"], &one["data"][0]["object"], &one["model"]),
        (&json!("list"), &json!("embedding"), &json!("baidu/ERNIE-test"))
    );
    assert_eq!(one["usage"], json!({"prompt_tokens": 3, "total_tokens": 3}));
    assert_eq!(vectors(&of(json!(["Hello", "Hello world"])).await.unwrap())[0], vectors(&one)[0]);
    assert_eq!(vectors(&of(json!(hello)).await.unwrap()), [[1.0, sum, 0.0]], "token ids are taken as they are");
    assert_eq!(vectors(&of(json!([hello, [5, 6]])).await.unwrap())[1], [2.0, 11.0, 0.0]);
    // More than run and wait at a time, in order.
    let many: Vec<Value> = (1..60).map(|len| json!(vec![7; len % 30 + 1])).collect();
    let answer = of(json!(many)).await.unwrap();
    assert_eq!(
        vectors(&answer).iter().map(|vector| vector[0]).collect::<Vec<_>>(),
        (1..60).map(|len| f64::from(len % 30 + 1)).collect::<Vec<_>>()
    );
    assert_eq!(world.service.engine().load(), 0);
}

#[tokio::test]
async fn forms_of_vectors() {
    let world = embedder().await;
    let of = |more: Value| world.post("/v1/embeddings", with(json!({"input": [[3, 1]]}), more));
    assert_eq!(vectors(&of(json!({})).await.unwrap()), [[2.0, 4.0, 0.0]]);
    let unit = of(json!({"normalize": true})).await.unwrap();
    assert_eq!(unit["data"][0]["embedding"].to_string(), format!("[{},{},0.0]", 2.0 / 20f32.sqrt(), 4.0 / 20f32.sqrt()));
    assert_eq!(vectors(&of(json!({"dimensions": 2})).await.unwrap()), [[2.0, 4.0]]);
    assert_eq!(vectors(&of(json!({"dimensions": 3})).await.unwrap()), [[2.0, 4.0, 0.0]]);
    let encoded = of(json!({"encoding_format": "base64"})).await.unwrap();
    assert_eq!(encoded["data"][0]["embedding"], "AAAAQAAAgEAAAAAA");
    let failure = of(json!({"dimensions": 1})).await.unwrap_err();
    assert_eq!((failure.param.as_deref(), failure.code), (Some("dimensions"), Some("unsupported_value")));
    assert!(failure.message.contains("lengths [2]"), "{failure}");
}

#[tokio::test]
async fn what_cannot_be_embedded_is_named() {
    let world = embedder().await;
    for (body, param, words) in [
        (json!({}), "input", "missing"),
        (json!({"input": []}), "input", "empty list"),
        (json!({"input": 5}), "input", "string"),
        (json!({"input": ["a", 5]}), "input[1]", "string"),
        (json!({"input": vec!["a"; 2049]}), "input", "2048"),
        (json!({"input": [[1], [9999]]}), "input[1][0]", "check_embedding_ctx_length=False"),
        (json!({"input": ["a", "x".repeat(40)]}), "input[1]", "maximum context length is 32"),
        (json!({"input": "a", "encoding_format": "hex"}), "encoding_format", "base64"),
        (json!({"input": "a", "dimensions": 0}), "dimensions", "minimum"),
        (json!({"input": "a", "truncate_prompt_tokens": 0}), "truncate_prompt_tokens", "no tokens"),
        (json!({"input": "a", "truncate": "START"}), "truncate", "END"),
        (json!({"input": "a", "prompt_name": "query"}), "prompt_name", "it has none"),
        (json!({"input": "a", "priority": 1}), "priority", "not supported"),
        (json!({"input": "a", "normalize": "yes"}), "normalize", "true or false"),
        (json!({"input": "", "add_special_tokens": false}), "input", "no tokens"),
    ] {
        let failure = world.post("/v1/embeddings", body.clone()).await.unwrap_err();
        assert_eq!((failure.param.as_deref(), failure.status()), (Some(param), 400), "{body}: {failure}");
        assert!(failure.message.contains(words), "{failure}");
    }
    assert_eq!(world.post("/v1/embeddings", json!({"input": "a", "model": "gpt"})).await.unwrap_err().status(), 404);
}

#[tokio::test]
async fn long_texts_are_cut_where_that_is_wanted() {
    let world = embedder().await;
    for (more, length) in
        [(json!({"truncate_prompt_tokens": -1}), 32.0), (json!({"truncate_prompt_tokens": 7}), 7.0), (json!({"truncate": true}), 32.0)]
    {
        let answer = world.post("/v1/embeddings", with(json!({"input": "x".repeat(40)}), more)).await.unwrap();
        let x = f64::from(world.ids("x", Special::Text)[0]);
        assert_eq!(vectors(&answer), [[length, (length - 2.0) * x + 3.0, 0.0]], "what stands around the text stays");
    }
}

#[tokio::test]
async fn prompts_of_the_models_files() {
    let prompts = r#"{"prompts": {"query": "He", "document": ""}, "default_prompt_name": "query"}"#;
    let world = pooling_world(spec(PoolingTask::Embed, Dimensions::Whole), &[("config_sentence_transformers.json", prompts)]).await;
    let of = |more: Value| world.post("/v1/embeddings", with(json!({"input": "llo"}), more));
    assert_eq!(vectors(&of(json!({})).await.unwrap()), vectors(&of(json!({"input": "Hello", "prompt_name": "document"})).await.unwrap()));
    let failure = of(json!({"prompt_name": "passage"})).await.unwrap_err();
    assert!(failure.message.contains("it has \"query\", \"document\""), "{failure}");
    let failure = of(json!({"dimensions": 2})).await.unwrap_err();
    assert!(failure.message.contains("is_matryoshka"), "{failure}");
}

#[tokio::test]
async fn documents_by_their_scores() {
    let world = reranker().await;
    let documents = json!(["ab", "abcd", {"text": "abc"}]);
    let sigmoid = |x: f32| 1.0 / (1.0 + (-f64::from(x)).exp());
    let answer = world.post("/v1/rerank", json!({"query": "q", "documents": documents})).await.unwrap();
    let results = answer["results"].as_array().unwrap();
    let found: Vec<(u64, &str)> =
        results.iter().map(|one| (one["index"].as_u64().unwrap(), one["document"]["text"].as_str().unwrap())).collect();
    assert_eq!(found, [(1, "abcd"), (2, "abc"), (0, "ab")]);
    // Of the query one token, and three that stand around and between.
    assert!((results[0]["relevance_score"].as_f64().unwrap() - sigmoid(0.8)).abs() < 1e-6, "{answer}");
    assert_eq!(answer["usage"], json!({"prompt_tokens": 21, "total_tokens": 21}));
    let top = world.post("/v2/rerank", json!({"query": "q", "docs": documents, "top_n": 1, "return_documents": false, "raw_scores": true}));
    assert_eq!(top.await.unwrap()["results"], json!([{"index": 1, "relevance_score": 0.8}]));
    let cut = json!({"query": "q", "documents": documents, "max_tokens_per_doc": 1, "use_activation": false});
    let cut = world.post("/rerank", cut).await.unwrap();
    assert!(cut["results"].as_array().unwrap().iter().all(|one| one["relevance_score"] == 0.5), "{cut}");
    // Of a pair that is too long the longer text is cut.
    let long = json!({"text_1": "q", "text_2": "x".repeat(50), "truncate_prompt_tokens": -1, "use_activation": false});
    assert_eq!(world.post("/v1/score", long).await.unwrap()["data"][0]["score"], 3.2);
}

#[tokio::test]
async fn scores_of_pairs() {
    let world = reranker().await;
    let of = |a: Value, b: Value| world.post("/v1/score", json!({"text_1": a, "text_2": b, "use_activation": false}));
    let scores = |answer: Value| answer["data"].as_array().unwrap().iter().map(|one| one["score"].as_f64().unwrap()).collect::<Vec<_>>();
    assert_eq!(scores(of(json!("a"), json!("b")).await.unwrap()), [0.5]);
    assert_eq!(scores(of(json!("a"), json!(["b", "bb"])).await.unwrap()), [0.5, 0.6]);
    assert_eq!(scores(of(json!(["a", "aa"]), json!(["b", "bb"])).await.unwrap()), [0.5, 0.7]);
    for (body, param) in [
        (json!({"text_1": ["a", "b"], "text_2": ["c"]}), "text_1"),
        (json!({"text_1": "a"}), "text_2"),
        (json!({"text_2": "a"}), "text_1"),
        (json!({"text_1": "a", "text_2": []}), "text_2"),
        (json!({"text_1": "a", "text_2": [5]}), "text_2[0]"),
        (json!({"queries": "a", "documents": "x".repeat(40)}), "documents"),
    ] {
        let failure = world.post("/score", body.clone()).await.unwrap_err();
        assert_eq!((failure.param.as_deref(), failure.status()), (Some(param), 400), "{body}: {failure}");
    }
}

#[tokio::test]
async fn the_second_text_is_of_another_type() {
    let world = embedder().await;
    assert!(world.tokenizer.around_pair().has_types);
    // An embedding model has no pairs: its scores are cosines.
    let answer = world.post("/v1/score", json!({"text_1": "Hello", "text_2": ["Hello", "Hello world"]})).await.unwrap();
    assert_eq!(answer["data"][0]["score"], 1.0);
    assert!(answer["data"][1]["score"].as_f64().unwrap() < 1.0);
}

#[tokio::test]
async fn each_model_does_what_it_is_for() {
    let (embedder, reranker) = (embedder().await, reranker().await);
    for (world, path, body, words) in [
        (&embedder, "/v1/chat/completions", json!({"messages": "Hi"}), "embeds texts and generates none; use /v1/embeddings"),
        (&embedder, "/v1/completions", json!({"prompt": "Hi"}), "embeds texts and generates none"),
        (&embedder, "/v1/responses", json!({"input": "Hi"}), "embeds texts and generates none"),
        (&reranker, "/v1/messages", json!({"messages": [], "max_tokens": 1}), "scores pairs of texts and generates none; use /v1/rerank"),
        (&reranker, "/v1/embeddings", json!({"input": "Hi"}), "scores pairs of texts and does not support the Embeddings API"),
    ] {
        let failure = world.post(path, body).await.unwrap_err();
        assert_eq!((failure.param.as_deref(), failure.code, failure.status()), (Some("model"), Some("unsupported_value"), 400), "{path}");
        assert!(failure.message.contains(words), "{failure}");
    }
    let generates = saying("x").await;
    for path in ["/v1/embeddings", "/v1/rerank", "/v1/score"] {
        let failure = generates.post(path, json!({"input": "x"})).await.unwrap_err();
        assert!(failure.message.contains("generates text and does not support the"), "{failure}");
    }
}

#[tokio::test]
async fn jobs_take_the_same() {
    let world = embedder().await;
    let same = |mut answer: Value| {
        let fields = answer.as_object_mut().unwrap();
        fields.shift_remove("id");
        fields.shift_remove("created");
        answer
    };
    let body = json!({"input": ["Hello", "world"], "encoding_format": "base64"});
    let direct = same(world.post("/v1/embeddings", body.clone()).await.unwrap());
    assert_eq!(same(world.job(json!({"openai_route": "/v1/embeddings", "openai_input": body})).await.unwrap()), direct);
    assert_eq!(same(world.job(body.clone()).await.unwrap()), direct);
    assert_eq!(same(world.job(json!({"input": body})).await.unwrap()), direct);
    let ranked = world.job(json!({"query": "Hello", "docs": ["world", "Hello"], "return_docs": false})).await.unwrap();
    assert_eq!(ranked["results"][0], json!({"index": 1, "relevance_score": 1.0}));
    let scored = world.job(json!({"text_1": "Hello", "text_2": "Hello"})).await.unwrap();
    assert_eq!(scored["data"][0]["score"], 1.0);
}
