//! Golden numbers: a tiny decoder with generated weights, in every layout, against the logits of the reference implementation
//! (Hugging Face transformers, f32). Source of the numbers and of the generator: the default model's specification.

use std::sync::Arc;

use half::bf16;
use serde_json::json;

use super::families::Model;
use super::runner::ModelRunner;
use super::tensors::Tensors;
use super::{Plan, Row, Runner, SamplingMetadata, SamplingParams, StateSave, StepStates};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::files::{ModelFiles, Source};
use crate::config::{DeviceChoice, EngineSettings};
use crate::kernels::candle::Candle;
use crate::kernels::cpu::Cpu;
use crate::kernels::testing::{TestMatrix, plain_attention, read};
use crate::kernels::{
    Activation, AttentionSpec, AttentionWeights, Backend, Batch, BatchRow, Columns, ComputeDtype, Epilogue, Norm, NormKind, Pairing, Rope,
    RopeTable, StepLimits,
};

const IDS: [u32; 6] = [1, 5, 9, 3, 14, 7];
const TOLERANCE: f32 = 1e-4;

const LAST: [f32; 16] = [
    -0.61482, 0.95325, -1.02181, 1.87285, -2.51625, -5.37679, 5.49408, -0.28680, -1.66509, -2.09583, -0.13191, -1.79441, -1.27698,
    -1.32641, -1.66897, -0.07837,
];
const FIRST: [f32; 16] = [
    0.56585, -1.27189, -3.63880, 2.39474, -1.36082, -3.81413, 1.83407, 0.04110, -2.44800, -2.09408, -2.39325, -2.51100, 0.64125, -1.20503,
    -0.87523, -1.97761,
];
const ARGMAX: [u32; 6] = [3, 7, 15, 15, 12, 6];

/// `f(seed, k)` of the generator, in `[-0.5, 0.5)`.
fn noise(seed: u32, k: u32) -> f32 {
    let mut x = (seed << 16).wrapping_add(k).wrapping_add(1);
    x ^= x >> 16;
    x = x.wrapping_mul(0x85eb_ca6b);
    x ^= x >> 13;
    x = x.wrapping_mul(0xc2b2_ae35);
    x ^= x >> 16;
    (x >> 8) as f32 / (1u32 << 24) as f32 - 0.5
}

/// A tensor in the `[out, in]` layout.
#[derive(Clone)]
struct Weights {
    name: String,
    shape: Vec<usize>,
    values: Vec<f32>,
}

impl Weights {
    fn new(seed: u32, name: &str, shape: &[usize]) -> Self {
        let value = |k: usize| if name.contains("norm") { 1.0 + 0.5 * noise(seed, k as u32) } else { 2.0 * noise(seed, k as u32) };
        Self { name: name.into(), shape: shape.to_vec(), values: (0..shape.iter().product()).map(value).collect() }
    }

    fn transposed(&self) -> Self {
        let [rows, columns] = self.shape[..] else { return self.clone() };
        let values = (0..rows * columns).map(|i| self.values[i % rows * columns + i / rows]).collect();
        Self { name: self.name.clone(), shape: vec![columns, rows], values }
    }
}

/// The tiny model, seeds in the specification's order.
fn tiny() -> Vec<Weights> {
    let mut all = vec![Weights::new(0, "embed_tokens.weight", &[16, 8])];
    let parts: [(&str, &[usize]); 9] = [
        ("self_attn.q_proj", &[16, 8]),
        ("self_attn.k_proj", &[8, 8]),
        ("self_attn.v_proj", &[8, 8]),
        ("self_attn.o_proj", &[8, 16]),
        ("mlp.gate_proj", &[12, 8]),
        ("mlp.up_proj", &[12, 8]),
        ("mlp.down_proj", &[8, 12]),
        ("input_layernorm", &[8]),
        ("post_attention_layernorm", &[8]),
    ];
    for layer in 0..2 {
        for (i, (name, shape)) in parts.iter().enumerate() {
            all.push(Weights::new(1 + layer * 9 + i as u32, &format!("layers.{layer}.{name}.weight"), shape));
        }
    }
    all.push(Weights::new(19, "norm.weight", &[8]));
    all
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Stored {
    F32,
    Bf16,
    U16,
}

/// A checkpoint file of these tensors.
fn safetensors(tensors: &[Weights], prefix: &str, stored: Stored) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for tensor in tensors {
        let from = data.len();
        for value in &tensor.values {
            match stored {
                Stored::F32 => data.extend(value.to_le_bytes()),
                Stored::Bf16 | Stored::U16 => data.extend(bf16::from_f32(*value).to_le_bytes()),
            }
        }
        let name = if tensor.name.starts_with("lm_head") { tensor.name.clone() } else { format!("{prefix}{}", tensor.name) };
        header.insert(
            name,
            json!({"dtype": format!("{stored:?}").to_uppercase(), "shape": tensor.shape, "data_offsets": [from, data.len()]}),
        );
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    file
}

fn config() -> serde_json::Value {
    json!({"model_type": "ernie4_5", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 4, "hidden_act": "silu", "vocab_size": 16, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": true,
        "max_position_embeddings": 64, "use_bias": false})
}

fn files(weights: Vec<u8>) -> ModelFiles {
    files_with(config(), weights)
}

fn files_with(config: serde_json::Value, weights: Vec<u8>) -> ModelFiles {
    let leak = |bytes: Vec<u8>| Source::Embedded(Box::leak(bytes.into_boxed_slice()));
    ModelFiles::new(
        "tiny",
        "test",
        vec![("config.json".into(), leak(serde_json::to_vec(&config).unwrap())), ("model.safetensors".into(), leak(weights))],
    )
}

/// On a thread of its own, since a runner makes its thread a computing one for good.
fn on_thread<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(f).join().unwrap())
}

fn load(files: &ModelFiles) -> Result<ModelRunner, crate::error::Failure> {
    let settings =
        EngineSettings { device: DeviceChoice::Cpu, threads: Some(2), block_size: 4, kv_cache_gb: Some(0.001), ..Default::default() };
    ModelRunner::load(files, || Ok(usize::MAX), &settings)
}

pub(crate) fn greedy() -> SamplingMetadata {
    SamplingParams { temperature: 0.0, ..Default::default() }.into()
}

/// A plan that runs `ids[from..to]` of one sequence whose blocks are scattered over the pool.
pub(crate) fn chunk(ids: &[u32], from: usize, to: usize, block_size: usize) -> Plan {
    let blocks: Vec<u32> = (0..ids.len().div_ceil(block_size) as u32).map(|i| 2 * i + 1).collect();
    let slot = |position: usize| blocks[position / block_size] * block_size as u32 + (position % block_size) as u32;
    Plan {
        tokens: ids[from..to].to_vec(),
        positions: (from as u32..to as u32).collect(),
        slots: (from..to).map(slot).collect(),
        types: Vec::new(),
        rows: vec![Row {
            start: 0,
            len: to - from,
            context: to,
            blocks: Arc::new(blocks),
            sampling: Some(greedy()),
            draft_len: 0,
            pools: false,
            score: None,
        }],
        states: StepStates { slots: vec![0], saves: vec![StateSave { token: (to - from) as u32 - 1, slot: 0 }], ..Default::default() },
    }
}

/// Logits of every position, run one token at a time after a first chunk of `first`.
fn logits(runner: &mut ModelRunner, first: usize) -> Vec<Vec<f32>> {
    let mut all = vec![Vec::new(); first - 1];
    all.push(runner.logits(&chunk(&IDS, 0, first, 4)).unwrap().remove(0));
    all.extend((first..IDS.len()).map(|i| runner.logits(&chunk(&IDS, i, i + 1, 4)).unwrap().remove(0)));
    all
}

fn close(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() < tolerance, "{what}, id {i}: {got}, expected {want}");
    }
}

fn check(files: &ModelFiles, tolerance: f32, what: &str) {
    on_thread(|| {
        let mut runner = load(files).unwrap();
        let all = logits(&mut runner, 1);
        close(&all[0], &FIRST, tolerance, what);
        close(&all[5], &LAST, tolerance, what);
        for (position, logits) in all.iter().enumerate() {
            assert_eq!(super::sample::argmax(logits), ARGMAX[position], "{what}, position {position}");
        }
        for first in 2..=IDS.len() {
            assert_eq!(
                logits(&mut runner, first)[5],
                all[5],
                "{what}: a prompt in one chunk of {first} and then single tokens must give the very same bits"
            );
        }
        let output = runner.step(&chunk(&IDS, 0, 6, 4)).unwrap();
        assert_eq!(output.tokens, [6]);
    });
}

fn named(tensors: &[Weights], name: &str) -> Weights {
    tensors.iter().find(|tensor| tensor.name == name).cloned().unwrap()
}

/// Parts side by side: along the output, which is columns in the transposed layout.
fn fused(parts: &[Weights], name: &str, transposed: bool) -> Weights {
    let out: usize = parts.iter().map(|part| part.shape[0]).sum();
    let joined = Weights {
        name: name.into(),
        shape: vec![out, parts[0].shape[1]],
        values: parts.iter().flat_map(|part| part.values.clone()).collect(),
    };
    if transposed { joined.transposed() } else { joined }
}

/// The same model with q/k/v and gate/up stored as one tensor each.
fn fuse(tensors: &[Weights], transposed: bool) -> Vec<Weights> {
    let mut all = Vec::new();
    for tensor in tensors {
        let Some((layer, part)) = tensor.name.rsplit_once("self_attn.").or_else(|| tensor.name.rsplit_once("mlp.")) else {
            all.push(tensor.clone());
            continue;
        };
        let get = |part: &str| named(tensors, &format!("{layer}{part}.weight"));
        match part {
            "q_proj.weight" => {
                let parts = [get("self_attn.q_proj"), get("self_attn.k_proj"), get("self_attn.v_proj")];
                all.push(fused(&parts, &format!("{layer}self_attn.qkv_proj.weight"), transposed));
            }
            "gate_proj.weight" => {
                all.push(fused(&[get("mlp.gate_proj"), get("mlp.up_proj")], &format!("{layer}mlp.up_gate_proj.weight"), transposed))
            }
            "o_proj.weight" | "down_proj.weight" => all.push(if transposed { tensor.transposed() } else { tensor.clone() }),
            _ => {}
        }
    }
    all
}

fn paddle(tensors: &[Weights]) -> Vec<Weights> {
    tensors.iter().map(|tensor| if tensor.name.contains("_proj") { tensor.transposed() } else { tensor.clone() }).collect()
}

#[test]
fn the_generator_gives_the_numbers_of_the_specification() {
    for (seed, k, want) in
        [(0, 0, -0.18240118), (0, 1, -0.30876523), (0, 2, 0.02320409), (0, 3, -0.35698402), (3, 0, 0.10146916), (3, 1, 0.49783564)]
    {
        assert!((noise(seed, k) - want).abs() < 1e-8, "f({seed},{k}) = {}", noise(seed, k));
    }
}

#[test]
fn every_layout_gives_the_reference_logits() {
    let pt = tiny();
    for prefix in ["model.", "ernie."] {
        check(&files(safetensors(&pt, prefix, Stored::F32)), TOLERANCE, "Hugging Face layout, separate");
        check(&files(safetensors(&fuse(&pt, false), prefix, Stored::F32)), TOLERANCE, "Hugging Face layout, fused");
        check(&files(safetensors(&paddle(&pt), prefix, Stored::F32)), TOLERANCE, "Paddle layout, separate");
        check(&files(safetensors(&fuse(&pt, true), prefix, Stored::F32)), TOLERANCE, "Paddle layout, fused");
    }
}

#[test]
fn bf16_under_either_name() {
    let pt = tiny();
    let run = |stored| on_thread(|| logits(&mut load(&files(safetensors(&fuse(&pt, true), "ernie.", stored))).unwrap(), 3)[5].clone());
    let (bf16, u16) = (run(Stored::Bf16), run(Stored::U16));
    close(&bf16, &LAST, 0.1, "bf16 weights");
    assert_eq!(bf16, u16);
}

#[test]
fn a_row_does_not_depend_on_the_others() {
    let pt = tiny();
    on_thread(|| {
        let mut runner = load(&files(safetensors(&pt, "model.", Stored::Bf16))).unwrap();
        let alone = runner.logits(&chunk(&IDS, 0, 6, 4)).unwrap().remove(0);
        // The same row as the second of three, its blocks elsewhere.
        let mut plan = Plan::default();
        for (i, ids) in [&IDS[..3], &IDS[..], &IDS[1..5]].into_iter().enumerate() {
            let mut part = chunk(ids, 0, ids.len(), 4);
            let blocks: Vec<u32> = part.rows[0].blocks.iter().map(|block| block + 8 * i as u32).collect();
            part.slots.iter_mut().for_each(|slot| *slot += 32 * i as u32);
            part.rows[0].blocks = Arc::new(blocks);
            part.rows[0].start = plan.tokens.len();
            plan.tokens.extend(part.tokens);
            plan.positions.extend(part.positions);
            plan.slots.extend(part.slots);
            plan.rows.extend(part.rows);
        }
        assert_eq!(runner.logits(&plan).unwrap()[1], alone);
    });
}

#[test]
fn an_untied_head_is_read_in_both_layouts() {
    let mut config = config();
    config["tie_word_embeddings"] = json!(false);
    let pt = tiny();
    let mut head = named(&pt, "embed_tokens.weight");
    head.name = "lm_head.weight".into();
    let with_head = |tensors: &[Weights], head: Weights| tensors.iter().cloned().chain([head]).collect::<Vec<_>>();
    check(&files_with(config.clone(), safetensors(&with_head(&pt, head.clone()), "model.", Stored::F32)), TOLERANCE, "untied");
    check(
        &files_with(config.clone(), safetensors(&with_head(&fuse(&pt, true), head.transposed()), "ernie.", Stored::F32)),
        TOLERANCE,
        "untied, Paddle",
    );
    let error = on_thread(|| load(&files_with(config, safetensors(&pt, "model.", Stored::F32))).err().unwrap());
    assert!(error.message.contains("lm_head.weight"), "{error}");
}

/// A checkpoint file with one more tensor, of zeros, in whatever type.
fn with_tensor(file: &[u8], name: &str, dtype: &str, shape: &[usize], bytes: usize) -> Vec<u8> {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut header: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&file[8..8 + length]).unwrap();
    header.remove(name);
    let data = &file[8 + length..];
    header.insert(name.into(), json!({"dtype": dtype, "shape": shape, "data_offsets": [data.len(), data.len() + bytes]}));
    let mut header = serde_json::to_vec(&header).unwrap();
    header.resize(header.len().next_multiple_of(8), b' ');
    [&(header.len() as u64).to_le_bytes(), header.as_slice(), data, &vec![0; bytes]].concat()
}

#[test]
fn tensors_of_other_types_matter_only_where_they_are_used() {
    let mut file = safetensors(&tiny(), "model.", Stored::F32);
    for (name, dtype, bytes) in [
        ("model.position_ids", "I64", 32),
        ("model.layers.0.mask", "BOOL", 4),
        ("model.layers.0.scale", "U8", 4),
        ("model.layers.1.mlp.scale", "F8_E4M3", 4),
        ("model.statistics", "F64", 32),
    ] {
        file = with_tensor(&file, name, dtype, &[4], bytes);
    }
    check(&files(file), TOLERANCE, "with tensors of other types");

    let without = |name: &str| tiny().into_iter().filter(|tensor| tensor.name != name).collect::<Vec<_>>();
    for (name, dtype, shape, bytes) in [
        ("layers.0.mlp.down_proj.weight", "I8", &[8, 12][..], 96),
        ("norm.weight", "F64", &[8], 64),
        ("embed_tokens.weight", "I64", &[16, 8], 1024),
    ] {
        let name_in_file = format!("model.{name}");
        let file = with_tensor(&safetensors(&without(name), "model.", Stored::F32), &name_in_file, dtype, shape, bytes);
        let message = on_thread(|| load(&files(file)).err().unwrap().message);
        assert!(message.contains(&format!("tensor {name_in_file} has type {dtype}")), "{message}");
        assert!(!message.contains("quantization_config"), "{message}");
    }
}

/// What transformers 5 does: an LM head that is stored and is not the embedding counts, whatever `tie_word_embeddings` says.
#[test]
fn a_stored_head_counts_where_it_differs_from_the_embedding() {
    let pt = tiny();
    let embedding = named(&pt, "embed_tokens.weight");
    let with_head = |head: Weights| [&pt[..], &[Weights { name: "lm_head.weight".into(), ..head }]].concat();
    let opened = |files: &ModelFiles| {
        let model = Model::from_files(files).unwrap();
        let checkpoint = Checkpoint::open(files, None).unwrap();
        let tensors = Tensors::find(&checkpoint, &model).unwrap();
        (tensors.tied, tensors.warnings.clone(), tensors.unused())
    };
    for (head, layout) in [(embedding.clone(), "[out, in]"), (embedding.transposed(), "[in, out]")] {
        let equal = files(safetensors(&with_head(head), "model.", Stored::F32));
        let (tied, warnings, unused) = opened(&equal);
        assert_eq!((tied, warnings), (true, vec![]), "{layout}");
        assert!(!unused.contains(&"lm_head.weight".to_owned()));
        check(&equal, TOLERANCE, layout);
    }
    for head in [Weights::new(77, "lm_head.weight", &[16, 8]), Weights::new(77, "lm_head.weight", &[16, 8]).transposed()] {
        let mut untied = config();
        untied["tie_word_embeddings"] = json!(false);
        let bytes = safetensors(&with_head(head), "model.", Stored::F32);
        let (told, plain) = (files_with(untied, bytes.clone()), files(bytes));
        let (tied, warnings, _) = opened(&plain);
        assert!(!tied && warnings[0].contains("lm_head.weight is there and is different"), "{warnings:?}");
        let logits = |files: &ModelFiles| on_thread(|| load(files).unwrap().logits(&chunk(&IDS, 0, 6, 4)).unwrap());
        let (told, plain) = (logits(&told), logits(&plain));
        assert_eq!(told, plain);
        assert!(told[0].iter().zip(LAST).any(|(a, b)| (a - b).abs() > 0.1), "not the embedding's logits");
    }
}

#[test]
fn a_quantization_over_plain_tensors_is_told_and_packed_ones_are_refused() {
    let mut quantized = config();
    quantized["quantization_config"] = json!({"quant_method": "gptq", "bits": 4});
    let plain = files_with(quantized.clone(), safetensors(&tiny(), "model.", Stored::F32));
    let model = Model::from_files(&plain).unwrap();
    let warnings = Tensors::find(&Checkpoint::open(&plain, None).unwrap(), &model).unwrap().warnings;
    assert!(
        warnings.len() == 1 && warnings[0].contains("quantization_config (gptq)") && warnings[0].contains("not applied"),
        "{warnings:?}"
    );
    check(&plain, TOLERANCE, "plain tensors");
    // A method that cannot be read.
    quantized["quantization_config"] = json!({"quant_method": "aqlm"});
    let packed = tiny().into_iter().filter(|tensor| tensor.name != "layers.0.mlp.down_proj.weight").collect::<Vec<_>>();
    let packed = with_tensor(&safetensors(&packed, "model.", Stored::F32), "model.layers.0.mlp.down_proj.qweight", "I32", &[2, 8], 64);
    let message = on_thread(|| load(&files_with(quantized, packed)).err().unwrap().message);
    assert!(message.contains("down_proj.weight is missing") && message.contains("quantization_config (aqlm)"), "{message}");
    assert!(message.contains("fp8, compressed-tensors, gptq, awq, mxfp4 and bitsandbytes"), "{message}");
}

#[test]
fn shards_load_without_an_index() {
    let pt = tiny();
    let leak = |tensors: &[Weights]| Source::Embedded(Box::leak(safetensors(tensors, "model.", Stored::F32).into_boxed_slice()));
    let config = Source::Embedded(Box::leak(serde_json::to_vec(&config()).unwrap().into_boxed_slice()));
    let mut all = vec![
        ("config.json".to_owned(), config),
        ("model-00001-of-00002.safetensors".to_owned(), leak(&pt[..7])),
        ("model-00002-of-00002.safetensors".to_owned(), leak(&pt[7..])),
    ];
    check(&ModelFiles::new("tiny", "test", all.clone()), TOLERANCE, "shards");
    all.remove(1);
    let message = on_thread(|| load(&ModelFiles::new("tiny", "test", all)).err().unwrap().message);
    assert!(message.contains("lacks model-00001-of-00002.safetensors"), "{message}");
}

#[test]
fn a_wrong_or_missing_tensor_is_named_with_its_shape() {
    let failure = |tensors: Vec<Weights>| on_thread(|| load(&files(safetensors(&tensors, "ernie.", Stored::F32))).err().unwrap().message);
    let without = |name: &str| tiny().into_iter().filter(|tensor| tensor.name != name).collect::<Vec<_>>();
    let message = failure(without("layers.1.mlp.down_proj.weight"));
    assert!(message.contains("ernie.layers.1.mlp.down_proj.weight is missing (expected shape [8, 12])"), "{message}");
    let message = failure(without("layers.0.self_attn.k_proj.weight"));
    assert!(message.contains("ernie.layers.0.self_attn.k_proj.weight or ernie.layers.0.self_attn.qkv_proj.weight is missing"), "{message}");
    let message = failure(without("norm.weight"));
    assert!(message.contains("ernie.norm.weight is missing (expected shape [8])"), "{message}");
    let mut tensors = tiny();
    tensors[1] = Weights::new(1, "layers.0.self_attn.q_proj.weight", &[16, 9]);
    let message = failure(tensors);
    assert!(message.contains("ernie.layers.0.self_attn.q_proj.weight has shape [16, 9], expected [16, 8]"), "{message}");
    let message = failure(without("embed_tokens.weight"));
    assert!(message.contains("embed_tokens.weight"), "{message}");
}

#[test]
fn a_cut_file_is_an_error() {
    let mut bytes = safetensors(&tiny(), "model.", Stored::F32);
    bytes.truncate(bytes.len() - 10);
    let error = on_thread(|| load(&files(bytes)).err().unwrap());
    assert!(error.message.contains("model.safetensors"), "{error}");
}

/// The specification's intermediate values of layer 0 and the final norm, at the last position: they tell which kernel is wrong when the logits are.
fn values_inside_the_layers<B: Backend>(mut backend: B, what: &str) {
    let all = tiny();
    let weights = |name: &str| {
        let weights = named(&all, &format!("{name}.weight"));
        let width = *weights.shape.last().unwrap();
        TestMatrix::new(weights.values, width)
    };
    let stacked = |names: &[&str]| {
        let parts: Vec<TestMatrix> = names.iter().map(|name| weights(name)).collect();
        TestMatrix::new(parts.iter().flat_map(|part| part.values.clone()).collect(), parts[0].width)
    };
    let t = IDS.len();
    let positions: Vec<u32> = (0..t as u32).collect();
    let rows = [BatchRow { start: 0, len: t, context: t, blocks: Arc::new(vec![0]) }];
    let frequencies = (0..2).map(|i| 500_000f32.powf(-2.0 * i as f32 / 4.0)).collect();
    let ropes = [RopeTable { frequencies, factor: 1.0 }];
    let rope = Rope { table: 0, pairing: Pairing::Interleaved };
    let attention = AttentionSpec { rope: Some(rope), ..plain_attention(4, 2, 4) };
    let vectors = AttentionWeights::default();
    let norm = |backend: &B, name: &str| Norm {
        kind: NormKind::Rms,
        weight: backend.vector(weights(name).values).unwrap(),
        bias: None,
        eps: 1e-5,
    };
    let buffer = |backend: &B, width: usize| backend.buffer(8, width).unwrap();
    let (mut x, mut normed, mut qkv) = (buffer(&backend, 8), buffer(&backend, 8), buffer(&backend, 32));
    let (mut attended, mut hidden, mut output) = (buffer(&backend, 16), buffer(&backend, 12), buffer(&backend, 8));
    let last = |backend: &mut B, buffer: &mut B::Buffer| {
        let values = read(backend, buffer);
        values[values.len() / t * (t - 1)..].to_vec()
    };
    let embedding = weights("embed_tokens").linear(&backend, Columns::Plain, None);
    backend
        .begin(&Batch {
            tokens: &IDS,
            positions: &positions,
            slots: &positions,
            types: &[],
            rows: &rows,
            ropes: &ropes,
            states: &Default::default(),
        })
        .unwrap();
    backend.embed(&embedding.weight, 1.0, &mut x).unwrap();
    for n in 0..2 {
        let what = |value: &str| format!("{what}: {value}");
        let name = |part: &str| format!("layers.{n}.{part}");
        let mut cache = backend.kv_cache(attention.kv_shape(1, 8)).unwrap();
        let input_norm = norm(&backend, &name("input_layernorm"));
        backend.norm(&x, &input_norm, &mut normed).unwrap();
        let projections = stacked(&[&name("self_attn.q_proj"), &name("self_attn.k_proj"), &name("self_attn.v_proj")]);
        let projections = projections.linear(&backend, Columns::Plain, None);
        backend.linear(&normed, &projections, Epilogue::Store, &mut qkv).unwrap();
        let (first_norm, before_rope) = (last(&mut backend, &mut normed), last(&mut backend, &mut qkv));
        backend.rope_and_store(&mut qkv, &attention, &vectors, &mut cache).unwrap();
        let after_rope = last(&mut backend, &mut qkv);
        backend.attend(&qkv, &attention, &vectors, &cache, &mut attended).unwrap();
        let projection = weights(&name("self_attn.o_proj")).linear(&backend, Columns::Plain, None);
        backend.linear(&attended, &projection, Epilogue::Store, &mut output).unwrap();
        let attention_output = last(&mut backend, &mut output);
        backend.linear(&attended, &projection, Epilogue::Add(1.0), &mut x).unwrap();
        let post_norm = norm(&backend, &name("post_attention_layernorm"));
        backend.norm(&x, &post_norm, &mut normed).unwrap();
        let gate_up = stacked(&[&name("mlp.gate_proj"), &name("mlp.up_proj")]).linear(&backend, Columns::Gated, None);
        backend.linear(&normed, &gate_up, Epilogue::Gated(Activation::Silu), &mut hidden).unwrap();
        let down = weights(&name("mlp.down_proj")).linear(&backend, Columns::Plain, None);
        backend.linear(&hidden, &down, Epilogue::Add(1.0), &mut x).unwrap();
        if n == 0 {
            let want = [0.05375, -0.68647, -1.34548, -1.20313, 0.35758, 0.42115, -0.16891, 1.98315];
            close(&first_norm, &want, TOLERANCE, &what("input norm"));
            close(&before_rope[..4], &[0.67490, 2.45845, 1.76291, 1.30635], TOLERANCE, &what("q before rope"));
            close(&after_rope[..4], &[2.54891, 0.05019, 1.75363, 1.31878], TOLERANCE, &what("q after rope"));
            let want = [1.82623, 4.48758, 1.69352, 0.27170, -6.48794, -1.84224, -0.56767, -4.05965];
            close(&attention_output, &want, TOLERANCE, &what("attention output"));
            let want = [-1.15668, 14.35059, -2.46583, 2.17769, -11.50883, -5.31448, 0.13706, -10.63215];
            close(&last(&mut backend, &mut x), &want, TOLERANCE, &what("layer output"));
        }
    }
    let final_norm = norm(&backend, "norm");
    backend.norm(&x, &final_norm, &mut normed).unwrap();
    let want = [0.33707, 2.35069, -1.01576, -0.46335, -1.07550, -0.91664, -0.98052, -0.63853];
    close(&last(&mut backend, &mut normed), &want, TOLERANCE, &format!("{what}: final norm"));
    let (mut picked, mut logits) = (buffer(&backend, 8), buffer(&backend, 16));
    backend.pick(&x, &[t - 1], &mut picked).unwrap();
    backend.norm(&picked, &final_norm, &mut normed).unwrap();
    backend.linear(&normed, &embedding, Epilogue::Store, &mut logits).unwrap();
    let logits = read(&mut backend, &mut logits);
    close(&logits, &LAST, TOLERANCE, &format!("{what}: logits"));
    let log_sum = logits.iter().map(|logit| logit.exp()).sum::<f32>().ln();
    close(&[logits[6] - log_sum, logits[3] - log_sum], &[-0.05537, -3.67661], TOLERANCE, "log-softmax at 6 and 3");
}

#[test]
fn the_values_inside_the_layers() {
    let limits = StepLimits {
        max_tokens: 8,
        max_logits: 1,
        widest: 16,
        block_size: 8,
        attention: vec![plain_attention(4, 2, 4)],
        frequencies: 2,
        experts: None,
    };
    values_inside_the_layers(Cpu::new(&limits, 2, ComputeDtype::F32).unwrap(), "our kernels");
    values_inside_the_layers(Candle::new(&candle_core::Device::Cpu), "candle");
}
