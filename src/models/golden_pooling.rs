//! Tiny models that embed and score against the results of Hugging Face transformers, in `handler-tests/fixtures/pooling`.

use std::sync::Arc;

use super::golden_families::{Golden, Sequence, base64, divided, on_thread, settings};
use super::pooling::Pooling;
use super::runner::ModelRunner;
use super::{Plan, Row, Runner};
use crate::checkpoint::files::ModelFiles;
use crate::config::{EngineSettings, Quantization, TaskChoice};
use crate::kernels::cuda::Dtype;

const TOLERANCE: f32 = 2e-6;
const BLOCK: usize = 4;

/// Families that have their goldens here.
pub(super) const FAMILIES: &[&str] = &["bert", "roberta", "xlm-roberta", "modernbert", "nomic_bert", "gte", "new"];

impl Sequence {
    fn pooled(&self) -> Vec<f32> {
        base64(&self.result).as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }
}

/// Adds tokens of a sequence in place `place` to a plan; it pools with its last token.
fn add(plan: &mut Plan, sequence: &Sequence, tokens: std::ops::Range<usize>, place: usize) {
    let blocks: Vec<u32> = (0..tokens.end.div_ceil(BLOCK)).map(|i| (place * 16 + (i ^ 1)) as u32).collect();
    let start = plan.tokens.len();
    plan.slots.extend(tokens.clone().map(|p| blocks[p / BLOCK] * BLOCK as u32 + (p % BLOCK) as u32));
    plan.tokens.extend(&sequence.ids[tokens.clone()]);
    plan.positions.extend(tokens.clone().map(|p| p as u32));
    plan.types.extend(tokens.clone().map(|p| u32::from(sequence.second_text.is_some_and(|second| p >= second))));
    plan.rows.push(Row {
        start,
        len: tokens.len(),
        context: tokens.end,
        blocks: Arc::new(blocks),
        sampling: None,
        draft_len: 0,
        pools: tokens.end == sequence.ids.len(),
        score: None,
    });
}

/// Results of the golden's sequences, all in one step.
fn together(runner: &mut ModelRunner, golden: &Golden) -> Vec<Vec<f32>> {
    let mut plan = Plan::default();
    golden.sequences.iter().enumerate().for_each(|(place, sequence)| add(&mut plan, sequence, 0..sequence.ids.len(), place));
    results(runner, &plan)
}

fn results(runner: &mut ModelRunner, plan: &Plan) -> Vec<Vec<f32>> {
    let normalize = runner.shape().pooling.as_ref().unwrap().normalize;
    let mut results = runner.step(plan).unwrap().pooled;
    for result in results.iter_mut().filter(|_| normalize) {
        let length = result.iter().map(|x| x * x).sum::<f32>().sqrt();
        result.iter_mut().for_each(|x| *x /= length);
    }
    results
}

/// Results of the golden's sequences by a model in these files, vectors made to length 1 whatever the files say.
pub(super) fn results_of(files: &ModelFiles, golden: &Golden) -> Vec<Vec<f32>> {
    let embeds = golden.files.contains_key("modules.json");
    let pooler = embeds.then(|| serde_json::json!({"normalize": true}).as_object().cloned()).flatten();
    let settings = EngineSettings { pooler, ..settings_of(Quantization::AsStored) };
    on_thread(|| together(&mut ModelRunner::load(files, || Ok(usize::MAX), &settings).unwrap(), golden))
}

fn settings_of(quantization: Quantization) -> EngineSettings {
    EngineSettings { max_num_seqs: Some(4), ..settings(quantization) }
}

fn load(files: &ModelFiles, quantization: Quantization) -> ModelRunner {
    ModelRunner::load(files, || Ok(usize::MAX), &settings_of(quantization)).unwrap()
}

#[track_caller]
fn close(got: &[Vec<f32>], sequences: &[Sequence], what: &str) {
    assert_eq!(got.len(), sequences.len(), "{what}");
    let mut worst = 0f32;
    for (sequence, got) in sequences.iter().zip(got) {
        let want = sequence.pooled();
        assert_eq!(got.len(), want.len(), "{what}");
        let largest = want.iter().fold(1f32, |largest, x| largest.max(x.abs()));
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() <= TOLERANCE * largest, "{what}: {got}, expected {want}");
            worst = worst.max((got - want).abs());
        }
    }
    println!("{what}: {worst:.1e}");
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
    (dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()) as f32
}

fn check(golden: &Golden, files: &ModelFiles, name: &str) {
    on_thread(|| {
        let mut runner = load(files, Quantization::AsStored);
        close(&together(&mut runner, golden), &golden.sequences, name);
        // Alone, and what does not see later tokens in chunks, too.
        let mut alone = Vec::new();
        for sequence in &golden.sequences {
            let mut plan = Plan::default();
            add(&mut plan, sequence, 0..sequence.ids.len(), 1);
            alone.extend(results(&mut runner, &plan));
        }
        assert_eq!(alone, together(&mut runner, golden), "{name}: the same alone and in company, to the bit");
        if !runner.shape().whole_prompts {
            let (mut chunk, sequence) = (Plan::default(), &golden.sequences[0]);
            add(&mut chunk, sequence, 0..17, 2);
            assert!(results(&mut runner, &chunk).is_empty());
            chunk.clear();
            add(&mut chunk, sequence, 17..sequence.ids.len(), 2);
            assert_eq!(results(&mut runner, &chunk), alone[..1], "{name}, in chunks");
        }
    });
    let ranks = EngineSettings { max_num_seqs: Some(4), ..divided(Quantization::AsStored, 2) };
    on_thread(|| {
        let mut runner = ModelRunner::load(files, || Ok(usize::MAX), &ranks).unwrap();
        close(&together(&mut runner, golden), &golden.sequences, &format!("{name}, 2 ranks"));
    });
    let reference = || ModelRunner::load_reference(files, &settings_of(Quantization::AsStored)).unwrap();
    on_thread(|| close(&together(&mut reference(), golden), &golden.sequences, &format!("{name}, candle")));
    on_thread(|| {
        let mut runner = load(files, Quantization::Wint8);
        assert!(runner.about.weights.starts_with("8-bit"), "{}", runner.about.weights);
        for (got, sequence) in together(&mut runner, golden).iter().zip(&golden.sequences) {
            let want = sequence.pooled();
            // Measured: 0.9995 and more; scores are up to 3e-2 apart.
            match want.as_slice() {
                [want] => assert!((got[0] - want).abs() < 0.1, "{name}, 8-bit: {}, expected {want}", got[0]),
                want => assert!(cosine(got, want) > 0.999, "{name}, 8-bit: cosine {}", cosine(got, want)),
            }
        }
    });
}

/// All sequences but the longest in one step, through the CUDA kernels, emulated on this processor.
fn check_emulated(name: &str, golden: &Golden, files: &ModelFiles) {
    on_thread(|| {
        let Some(runner) = ModelRunner::load_emulated(files, &settings_of(Quantization::AsStored), Dtype::F32) else { return };
        let (mut plan, rest) = (Plan::default(), &golden.sequences[1..]);
        rest.iter().enumerate().for_each(|(place, sequence)| add(&mut plan, sequence, 0..sequence.ids.len(), place));
        close(&results(&mut runner.unwrap(), &plan), rest, &format!("{name}, CUDA kernels"));
    });
}

fn model(name: &str) {
    let golden = Golden::read_from("pooling", name);
    check(&golden, &golden.files(), name);
}

/// A test for each file.
macro_rules! models {
    ($($test:ident $name:literal)*) => {
        $(#[test]
        fn $test() {
            model($name);
        })*

        mod emulated {
            $(#[test]
            fn $test() {
                let golden = super::Golden::read_from("pooling", $name);
                super::check_emulated($name, &golden, &golden.files());
            })*
        }

        #[test]
        fn every_golden_is_tested() {
            let tested = [$($name),*];
            let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("handler-tests/fixtures/pooling");
            let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
            for name in files.filter_map(|file| file.strip_suffix(".json").map(str::to_owned)) {
                assert!(tested.contains(&name.as_str()), "{name}.json is not tested");
            }
        }
    };
}

models! {
    bert "bert" bert_plain "bert_plain" bert_score "bert_score" roberta "roberta" xlm_roberta "xlm-roberta" xlm_roberta_score "xlm-roberta_score"
    modernbert "modernbert" modernbert_score "modernbert_score" nomic_bert "nomic_bert" gte "gte" gte_score "gte_score" qwen3 "qwen3"
    qwen3_score "qwen3_score" mistral "mistral" gemma3_text "gemma3_text"
}

/// Alibaba's own repositories: another `model_type` and prefix, and a rope that is stretched.
#[test]
fn gte_as_alibaba_has_it() {
    let golden = Golden::read_from("pooling", "gte_score");
    let mut config = golden.config.clone();
    let keys = config.as_object_mut().unwrap();
    keys.shift_remove("rope_parameters");
    keys.insert("model_type".into(), "new".into());
    keys.insert("rope_theta".into(), 160_000.into());
    check(&golden, &golden.files_as(&config, |name| name.replace("gte.", "new.")), "new");
}

/// nomic-ai's own repositories have other keys in config.json.
#[test]
fn nomic_bert_as_nomic_has_it() {
    let golden = Golden::read_from("pooling", "nomic_bert");
    let config = serde_json::json!({"model_type": "nomic_bert", "architectures": ["NomicBertModel"], "n_embd": 64, "n_head": 4, "n_inner": 96, "n_layer": 3,
        "n_positions": 8192, "max_trained_positions": 64, "layer_norm_epsilon": 1e-12, "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": false, "activation_function": "swiglu", "type_vocab_size": 2, "vocab_size": 97, "prenorm": false,
        "qkv_proj_bias": false, "mlp_fc1_bias": false, "mlp_fc2_bias": false, "causal": false, "rotary_scaling_factor": null});
    check(&golden, &golden.files_as(&config, str::to_owned), "nomic_bert by nomic-ai");
}

#[test]
fn settings_come_before_the_models_files() {
    let golden = Golden::read_from("pooling", "bert");
    let files = golden.files();
    let given = |task: TaskChoice, pooler: serde_json::Value| {
        let settings = EngineSettings { task, pooler: pooler.as_object().cloned(), ..EngineSettings::default() };
        super::families::Model::from_files(&files).unwrap().for_task(&files, &settings).map(|model| model.spec.pooling.unwrap())
    };
    let spec = given(TaskChoice::Auto, serde_json::json!({})).unwrap();
    assert_eq!((spec.pooling, spec.normalize, spec.width), (Pooling::Cls, true, 64));
    let spec = given(TaskChoice::Pooling, serde_json::json!({"pooling_type": "mean", "normalize": false, "is_matryoshka": true})).unwrap();
    assert_eq!((spec.pooling, spec.normalize, spec.dimensions), (Pooling::Mean, false, super::Dimensions::Any));
    let (plain, asked) = (Golden::read("qwen3").files(), serde_json::json!({"pooling_type": "LAST"}).as_object().cloned());
    let of_plain = |settings: &EngineSettings| super::families::Model::from_files(&plain).unwrap().for_task(&plain, settings);
    let failure = of_plain(&EngineSettings { pooler: asked.clone(), ..EngineSettings::default() }).unwrap_err();
    assert!(failure.message.contains("POOLER_CONFIG is set, and this model generates text"), "{failure}");
    let embeds = of_plain(&EngineSettings { task: TaskChoice::Embed, pooler: asked, ..EngineSettings::default() }).unwrap();
    assert_eq!(embeds.spec.pooling.map(|spec| spec.pooling), Some(Pooling::Last));
    assert_eq!(of_plain(&EngineSettings::default()).unwrap().spec.pooling, None);
    for (task, pooler, words) in [
        (TaskChoice::Generate, serde_json::json!({}), "cannot generate text"),
        (TaskChoice::Score, serde_json::json!({}), "2 labels"),
        (TaskChoice::Auto, serde_json::json!({"pooling_type": "STEP"}), "POOLER_CONFIG: \"pooling_type\": \"STEP\" is not supported"),
        (TaskChoice::Auto, serde_json::json!({"step_tag_id": 1}), "\"step_tag_id\" is not supported"),
        (TaskChoice::Auto, serde_json::json!({"matryoshka_dimensions": [32, 65]}), "names 65, and vectors have 64 numbers"),
    ] {
        let failure = given(task, pooler).unwrap_err();
        assert!(failure.message.contains(words), "{failure}");
    }
}
