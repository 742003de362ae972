//! One tiny model of each family against the logits of Hugging Face transformers, in `handler-tests/fixtures/families`: the weights are
//! made here, by the generator that its script describes.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use super::golden::greedy;
use super::quality::{Comparison, logits_of};
use super::runner::ModelRunner;
use super::{Plan, Row, StateSave};
use crate::checkpoint::files::{ModelFiles, Source};
use crate::config::{DeviceChoice, EngineSettings, Quantization, TensorParallel};
use crate::kernels::cuda::Dtype;

const TOLERANCE: f32 = 1e-4;
const BLOCK: usize = 4;

#[derive(Deserialize)]
pub(crate) struct Golden {
    generator: Generator,
    pub(super) config: Value,
    pub(super) tensors: Vec<Tensor>,
    pub(super) sequences: Vec<Sequence>,
    /// Further files of the model, of those that pool.
    #[serde(default)]
    pub(super) files: serde_json::Map<String, Value>,
}

#[derive(Deserialize)]
struct Generator {
    samples: Vec<Sample>,
}

#[derive(Deserialize)]
struct Sample {
    name: String,
    index: usize,
    bits: String,
}

#[derive(Deserialize)]
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    offset: f32,
    scale: f32,
}

#[derive(Deserialize)]
pub(super) struct Sequence {
    pub(super) ids: Vec<u32>,
    /// `[ids, vocab]`, f32 little-endian in base64.
    #[serde(default)]
    logits: String,
    /// `[width]`, of models that pool.
    #[serde(default)]
    pub(super) result: String,
    pub(super) second_text: Option<usize>,
}

impl Tensor {
    /// The generator's number at a flat index.
    pub(super) fn value(&self, index: usize) -> f32 {
        let hash = self.name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        let z = hash.wrapping_add((index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let uniform = ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 24) as f32;
        self.offset + self.scale * (2.0 * uniform - 1.0)
    }
}

pub(super) fn base64(text: &str) -> Vec<u8> {
    let digit = |c: u8| b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/".iter().position(|d| *d == c).unwrap() as u32;
    let group = |group: &[u8]| {
        let digits: Vec<u8> = group.iter().copied().filter(|c| *c != b'=').collect();
        let bits = digits.iter().fold(0, |bits, c| bits << 6 | digit(*c)) << (6 * (4 - digits.len()));
        bits.to_be_bytes()[1..digits.len()].to_vec()
    };
    text.as_bytes().chunks(4).flat_map(group).collect()
}

impl Sequence {
    pub(super) fn rows(&self, vocab: usize) -> Vec<Vec<f32>> {
        let numbers: Vec<f32> = base64(&self.logits).as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        assert_eq!(numbers.len(), vocab * self.ids.len());
        numbers.chunks_exact(vocab).map(<[f32]>::to_vec).collect()
    }
}

impl Golden {
    /// What is computed with a configuration, whose weights lie elsewhere.
    pub(super) fn of(config: Value, sequences: Vec<Sequence>) -> Self {
        Self { generator: Generator { samples: Vec::new() }, config, tensors: Vec::new(), sequences, files: Default::default() }
    }

    pub(crate) fn read(family: &str) -> Self {
        Self::read_from("families", family)
    }

    pub(super) fn read_from(folder: &str, family: &str) -> Self {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("handler-tests/fixtures").join(folder);
        let golden: Self = serde_json::from_slice(&std::fs::read(folder.join(format!("{family}.json"))).unwrap()).unwrap();
        for Sample { name, index, bits } in &golden.generator.samples {
            let tensor = golden.tensors.iter().find(|tensor| tensor.name == *name).unwrap();
            assert_eq!(format!("{:08x}", tensor.value(*index).to_bits()), *bits, "{name} [{index}]");
        }
        golden
    }

    pub(crate) fn files(&self) -> ModelFiles {
        self.files_as(&self.config, |name| name.to_owned())
    }

    /// With another config.json, and tensors under other names.
    pub(super) fn files_as(&self, config: &serde_json::Value, rename: impl Fn(&str) -> String) -> ModelFiles {
        let in_model = |name: &str| (!name.contains('/')).then(|| rename(name));
        let config = serde_json::to_vec(config).unwrap();
        let source = |bytes: Vec<u8>| Source::Embedded(bytes.leak());
        let mut files = vec![("config.json".to_owned(), source(config)), ("model.safetensors".to_owned(), source(self.weights(in_model)))];
        for (name, file) in &self.files {
            files.push((name.clone(), source(serde_json::to_vec(file).unwrap())));
            let folder = name.trim_end_matches("config.json");
            if folder.ends_with("_Dense/") {
                let weights = self.weights(|name| name.strip_prefix(folder).map(str::to_owned));
                files.push((format!("{folder}model.safetensors"), source(weights)));
            }
        }
        ModelFiles::new("golden", "test", files)
    }

    /// A file of the tensors that `rename` gives a name.
    fn weights(&self, rename: impl Fn(&str) -> Option<String>) -> Vec<u8> {
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, tensor) in self.tensors.iter().filter_map(|tensor| Some((rename(&tensor.name)?, tensor))) {
            let from = data.len();
            (0..tensor.shape.iter().product()).for_each(|index| data.extend(tensor.value(index).to_le_bytes()));
            let entry = serde_json::json!({"dtype": "F32", "shape": tensor.shape, "data_offsets": [from, data.len()]});
            header.insert(name, entry);
        }
        let header = serde_json::to_vec(&header).unwrap();
        [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
    }

    pub(super) fn vocab(&self) -> usize {
        self.config["vocab_size"].as_u64().unwrap() as usize
    }
}

pub(super) fn settings(quantization: Quantization) -> EngineSettings {
    EngineSettings {
        device: DeviceChoice::Cpu,
        threads: Some(2),
        block_size: BLOCK,
        kv_cache_gb: Some(0.002),
        quantization,
        ..Default::default()
    }
}

/// The same for a model that `ranks` compute together, each with as much memory.
pub(super) fn divided(quantization: Quantization, ranks: usize) -> EngineSettings {
    let alone = settings(quantization);
    let kv_cache_gb = alone.kv_cache_gb.map(|gb| gb * ranks as f64);
    EngineSettings { tensor_parallel: TensorParallel::Ranks(ranks), kv_cache_gb, ..alone }
}

/// Adds `ids[from..to]` of the sequence in place `place` to a plan, with a draw after every token.
fn add(plan: &mut Plan, ids: &[u32], from: usize, to: usize, place: usize) {
    let blocks: Vec<u32> = (0..to.div_ceil(BLOCK)).map(|i| (place * 16 + (i ^ 1)) as u32).collect();
    let start = plan.tokens.len();
    plan.tokens.extend(&ids[from..to]);
    plan.positions.extend(from as u32..to as u32);
    plan.slots.extend((from..to).map(|p| blocks[p / BLOCK] * BLOCK as u32 + (p % BLOCK) as u32));
    let (len, draft_len) = (to - from, to - from - 1);
    plan.states.slots.push(place as u32);
    plan.states.saves.push(StateSave { token: (start + len - 1) as u32, slot: place as u32 });
    plan.rows.push(Row {
        start,
        len,
        context: to,
        blocks: Arc::new(blocks),
        sampling: Some(greedy()),
        draft_len,
        pools: false,
        score: None,
    });
}

#[track_caller]
fn close(got: &[Vec<f32>], want: &[Vec<f32>], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let mut worst = 0f32;
    for (position, (got, want)) in got.iter().zip(want).enumerate() {
        for (id, (got, want)) in got.iter().zip(want).enumerate() {
            let distance = (got - want).abs();
            assert!(distance <= TOLERANCE, "{what}: position {position}, id {id}: {got}, expected {want}");
            worst = worst.max(distance);
        }
    }
    println!("{what}: {worst:.1e}");
}

/// Prefill, prefill in chunks, decode, and a mixed batch of the three sequences.
pub(super) fn check(runner: &mut ModelRunner, golden: &Golden, what: &str) {
    let want: Vec<Vec<Vec<f32>>> = golden.sequences.iter().map(|sequence| sequence.rows(golden.vocab())).collect();
    let ids: Vec<&[u32]> = golden.sequences.iter().map(|sequence| sequence.ids.as_slice()).collect();
    let mut run = |parts: &[(usize, usize, usize)]| {
        let mut plan = Plan::default();
        parts.iter().for_each(|(sequence, from, to)| add(&mut plan, ids[*sequence], *from, *to, *sequence));
        runner.logits(&plan).unwrap()
    };
    for sequence in 0..ids.len() {
        close(&run(&[(sequence, 0, ids[sequence].len())]), &want[sequence], &format!("{what}, prefill of sequence {sequence}"));
    }
    let steps = |cuts: &[usize]| cuts.windows(2).map(|cut| (cut[0], cut[1])).collect::<Vec<_>>();
    let mut chunked = Vec::new();
    for (from, to) in steps(&[0, 3, 4, 20, 33, 40]) {
        chunked.extend(run(&[(0, from, to)]));
    }
    close(&chunked, &want[0], &format!("{what}, prefill in chunks"));
    let mut decoded = run(&[(1, 0, 2)]);
    for position in 2..ids[1].len() {
        decoded.extend(run(&[(1, position, position + 1)]));
    }
    close(&decoded, &want[1], &format!("{what}, decode"));
    run(&[(0, 0, 25), (1, 0, 11)]);
    let mixed = run(&[(2, 0, 9), (0, 25, 26), (1, 11, 23)]);
    let expected = [&want[2][..], &want[0][25..26], &want[1][11..]].concat();
    close(&mixed, &expected, &format!("{what}, a mixed batch"));
}

/// The same through the CUDA kernels, emulated on this processor. In few steps, since they are slow there: a prompt, and two mixed batches of
/// what goes on and what begins.
pub(super) fn check_emulated(name: &str, golden: &Golden, files: &ModelFiles) {
    on_thread(|| {
        let settings = settings(Quantization::AsStored);
        let Some(runner) = ModelRunner::load_emulated(files, &settings, Dtype::F32) else { return };
        let (mut runner, what) = (runner.unwrap(), format!("{name}, CUDA kernels"));
        for parts in [&[(0, 0, 10)][..], &[(0, 10, 11), (2, 0, 3), (1, 0, 2)], &[(1, 2, 3), (0, 11, 13)]] {
            let (mut plan, mut want) = (Plan::default(), Vec::new());
            for (sequence, from, to) in parts.iter().copied() {
                let Sequence { ids, .. } = &golden.sequences[sequence];
                add(&mut plan, ids, from, to, sequence);
                want.extend_from_slice(&golden.sequences[sequence].rows(golden.vocab())[from..to]);
            }
            close(&runner.logits(&plan).unwrap(), &want, &what);
        }
    });
}

/// Runs `f` on a thread of its own, since a runner makes its thread a computing one for good.
pub(super) fn on_thread<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(f).join()).unwrap()
}

fn family(name: &str) {
    let golden = Golden::read(name);
    let files = golden.files();
    on_thread(|| check(&mut ModelRunner::load(&files, || Ok(usize::MAX), &settings(Quantization::AsStored)).unwrap(), &golden, name));
    let what = format!("{name}, candle");
    on_thread(|| check(&mut ModelRunner::load_reference(&files, &settings(Quantization::AsStored)).unwrap(), &golden, &what));
    let quantized = on_thread(|| {
        let mut runner = ModelRunner::load(&files, || Ok(usize::MAX), &settings(Quantization::Wint8)).unwrap();
        assert!(runner.about.weights.starts_with("8-bit"), "{}", runner.about.weights);
        logits_of(&mut runner, &golden.sequences[0].ids).unwrap()
    });
    let spec = super::families::Model::from_config(&golden.config).unwrap().spec;
    let mut comparison = Comparison::default();
    golden.sequences[0].rows(golden.vocab()).iter().zip(&quantized).for_each(|(want, got)| comparison.add(want, got));
    println!("{name}, 8-bit: KL {:.1e}", comparison.mean());
    // Measured: up to 5.4e-4. Where rounding sends a token to another expert, up to 7.7e-3.
    let most = if spec.expert_limits().is_some() { 2e-2 } else { 2e-3 };
    assert!(comparison.mean() > 0.0 && comparison.mean() < most, "{name}: KL {}", comparison.mean());
}

/// The language part of a model that reads images too, as older and newer checkpoints have it.
#[test]
fn a_language_part_is_served_by_its_own_config() {
    let golden = Golden::read("gemma3_text");
    let whole = serde_json::json!({"model_type": "gemma3", "text_config": golden.config, "vision_config": {"hidden_size": 8}});
    let older = |name: &str| format!("language_model.{name}");
    let newer = |name: &str| name.replace("model.", "model.language_model.");
    for files in [golden.files_as(&whole, older), golden.files_as(&whole, newer)] {
        on_thread(|| {
            let mut runner = ModelRunner::load(&files, || Ok(usize::MAX), &settings(Quantization::AsStored)).unwrap();
            check(&mut runner, &golden, "the language part");
        });
    }
}

/// A test for each family.
macro_rules! families {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            family(stringify!($name));
        })*

        mod emulated {
            $(#[test]
            fn $name() {
                let golden = super::Golden::read(stringify!($name));
                super::check_emulated(stringify!($name), &golden, &golden.files());
            })*
        }

        /// Every golden file is looked at, and every family that is served has one, and a line in the docs.
        #[test]
        fn every_family_has_a_golden() {
            let tested = [$(stringify!($name)),*];
            let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("handler-tests/fixtures/families");
            let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
            for family in files.filter_map(|file| file.strip_suffix(".json").map(str::to_owned)) {
                assert!(tested.contains(&family.as_str()), "{family}.json is not tested");
            }
            let docs = std::fs::read_to_string(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/models.md")).unwrap();
            for family in super::families::model_types() {
                assert!(tested.contains(&family) || super::golden_pooling::FAMILIES.contains(&family), "{family} has no golden");
                assert!(docs.lines().any(|line| line.starts_with('|') && line.contains(&format!("`{family}`"))), "{family} is not in docs/models.md");
            }
        }
    };
}

families! {
    ernie4_5 llama llama_biases llama_dynamic llama_yarn mistral ministral3 qwen2 qwen3 gemma gemma2 gemma3_text gemma4_text granite granite_swa phi3 phi3_longrope smollm3 seed_oss olmo2 olmo3 exaone4
    hunyuan_v1_dense arcee nemotron cohere2 starcoder2 glm glm4 lfm2
    ernie4_5_moe qwen2_moe qwen3_moe granitemoe mellum olmoe mixtral gpt_oss minimax_m2 glm4_moe solar_open lfm2_moe
    qwen3_next qwen3_5_text qwen3_5_moe_text deepseek_v2 deepseek_v3 glm4_moe_lite
}
