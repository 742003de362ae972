//! The tiny families as llama.cpp's own converter writes them (`handler-tests/fixtures/gguf/heads.json`), and the demo model in quantized
//! forms: what a GGUF file computes is what the folder computes that it was made of.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::families::Model;
use super::golden_families::{Golden, check, on_thread, settings};
use super::quality::{Comparison, logits_of};
use super::runner::ModelRunner;
use super::tensors::{Part, Tensors};
use crate::checkpoint::files::{ModelFiles, Source};
use crate::checkpoint::gguf::{self, writer};
use crate::checkpoint::{Checkpoint, StoredMatrix, Tiles, demo};
use crate::config::{EngineSettings, Quantization};

#[derive(Deserialize)]
struct Head {
    tweaks: serde_json::Map<String, Value>,
    metadata: Vec<Entry>,
    tensors: Vec<Tensor>,
}

#[derive(Deserialize)]
struct Entry {
    key: String,
    #[serde(rename = "type")]
    kind: String,
    value: Value,
}

#[derive(Deserialize)]
struct Tensor {
    name: String,
    shape: Vec<usize>,
    #[serde(default)]
    from: Vec<String>,
    change: Option<String>,
    values: Option<Vec<f32>>,
}

fn heads() -> BTreeMap<String, Head> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("handler-tests/fixtures/gguf/heads.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

impl Entry {
    fn write(&self) -> (String, writer::Value) {
        let integers = || self.value.as_array().unwrap().iter().map(|value| value.as_i64().unwrap() as i32).collect();
        let value = match self.kind.as_str() {
            "STRING" => writer::Value::Text(self.value.as_str().unwrap().to_owned()),
            "UINT32" => writer::Value::U32(self.value.as_u64().unwrap() as u32),
            "FLOAT32" => writer::Value::F32(self.value.as_f64().unwrap() as f32),
            "BOOL" => writer::Value::Bool(self.value.as_bool().unwrap()),
            "ARRAY_BOOL" => writer::Value::Flags(self.value.as_array().unwrap().iter().map(|value| value.as_bool().unwrap()).collect()),
            "ARRAY_INT32" | "ARRAY_UINT32" => writer::Value::Integers(integers()),
            other => panic!("{other}"),
        };
        (self.key.clone(), value)
    }
}

impl Tensor {
    fn write(&self, golden: &Golden) -> writer::Tensor {
        let numbers = match &self.values {
            Some(values) => values.clone(),
            None => self.from.iter().flat_map(|name| self.numbers(golden, name)).collect(),
        };
        (self.name.clone(), self.shape.clone(), 0, numbers.into_iter().flat_map(f32::to_le_bytes).collect())
    }

    fn numbers(&self, golden: &Golden, name: &str) -> Vec<f32> {
        let tensor = golden.tensors.iter().find(|tensor| tensor.name == name).unwrap();
        let rows = tensor.shape[0];
        let width = tensor.shape.iter().skip(1).product::<usize>();
        let value = |row: usize| (0..width).map(move |i| tensor.value(row * width + i));
        match self.change.as_deref().map(|change| change.split_once(' ').unwrap_or((change, ""))) {
            None => (0..rows).flat_map(value).collect(),
            Some(("plus_one", _)) => (0..rows).flat_map(value).map(|number| number + 1.0).collect(),
            // Of each head, first and second half row by row.
            Some(("permute", heads)) => {
                let head = rows / heads.parse::<usize>().unwrap();
                let source = |row: usize| row / head * head + row % head / 2 + row % 2 * (head / 2);
                (0..rows).map(source).flat_map(value).collect()
            }
            Some((other, _)) => panic!("{other}"),
        }
    }
}

fn as_files(name: &str, metadata: &[(String, writer::Value)], tensors: &[writer::Tensor]) -> ModelFiles {
    let bytes = Source::Made(writer::write(metadata, tensors).into());
    gguf::model_files(name, "test", vec![(format!("{name}.gguf"), bytes)]).unwrap()
}

/// What a golden file's logits are where its configuration is another: those of the checkpoint in Safetensors.
fn twin(golden: &Golden, tweaks: &serde_json::Map<String, Value>) -> Vec<Vec<f32>> {
    let mut config = golden.config.clone();
    config.as_object_mut().unwrap().extend(tweaks.clone());
    let files = golden.files();
    let config = Source::Made(serde_json::to_vec(&config).unwrap().into());
    let weights = files.get("model.safetensors").unwrap().clone();
    let files = ModelFiles::new("twin", "test", vec![("config.json".to_owned(), config), ("model.safetensors".to_owned(), weights)]);
    on_thread(|| {
        let mut runner = ModelRunner::load(&files, || Ok(usize::MAX), &settings(Quantization::AsStored)).unwrap();
        logits_of(&mut runner, &golden.sequences[0].ids).unwrap()
    })
}

fn family(name: &str, head: &Head) {
    let golden = Golden::read(name);
    let metadata: Vec<_> = head.metadata.iter().map(Entry::write).collect();
    let tensors: Vec<_> = head.tensors.iter().map(|tensor| tensor.write(&golden)).collect();
    let files = as_files(name, &metadata, &tensors);
    let runner = || ModelRunner::load(&files, || Ok(usize::MAX), &settings(Quantization::AsStored)).unwrap();
    if head.tweaks.is_empty() {
        return on_thread(|| check(&mut runner(), &golden, &format!("{name}, GGUF")));
    }
    let got = on_thread(|| logits_of(&mut runner(), &golden.sequences[0].ids).unwrap());
    for (position, (got, want)) in got.iter().zip(&twin(&golden, &head.tweaks)).enumerate() {
        let worst = got.iter().zip(want).map(|(got, want)| (got - want).abs()).fold(0f32, f32::max);
        assert!(worst < 1e-4, "{name}, position {position}: {worst}");
    }
}

#[test]
fn families_as_the_converter_writes_them() {
    let heads = heads();
    assert!(heads.len() >= 28, "{}", heads.len());
    // One after another: a runner is a pool of threads, and holds that of its thread.
    let is_wrong = |(name, head): &(&String, &Head)| std::thread::scope(|scope| scope.spawn(|| family(name, head)).join().is_err());
    let failed: Vec<&String> = heads.iter().filter(is_wrong).map(|(name, _)| name).collect();
    assert!(failed.is_empty(), "{failed:?}");
}

/// Every row of the table of architectures was written by the converter.
#[test]
fn every_architecture_has_a_head() {
    let heads = heads();
    let written: Vec<&str> = heads
        .values()
        .flat_map(|head| &head.metadata)
        .filter(|entry| entry.key == "general.architecture")
        .map(|entry| entry.value.as_str().unwrap())
        .collect();
    for name in gguf::architectures() {
        assert!(written.contains(&name), "{name}");
    }
}

/// The demo model's matrices by their names in a GGUF file, with their widths; norms have a width of 0.
fn demo_tensors() -> Vec<(String, usize, Vec<f32>)> {
    let files = demo::files();
    let model = Model::from_files(&files).unwrap();
    let checkpoint = Checkpoint::open(&files, None).unwrap();
    let tensors = Tensors::find(&checkpoint, &model).unwrap();
    let (spec, hidden) = (&model.spec, model.spec.hidden_size);
    let attention = spec.layers[0].attention().unwrap().spec;
    let (q, kv) = (attention.q_width(), attention.kv_width());
    let inner = spec.widest_intermediate();
    let read = |matrix: &StoredMatrix<'_>| {
        let mut tiles = Tiles::<f32>::default();
        (0..matrix.rows()).flat_map(|row| matrix.row(row, &mut tiles).to_vec()).collect::<Vec<f32>>()
    };
    let mut all = vec![
        ("token_embd.weight".to_owned(), hidden, read(&tensors.embedding(spec).unwrap())),
        ("output_norm.weight".to_owned(), 0, tensors.vector("norm.weight", hidden).unwrap()),
    ];
    for layer in 0..spec.layers.len() {
        let name = |part: &str| format!("layers.{layer}.{part}");
        let theirs = |part: &str| format!("blk.{layer}.{part}.weight");
        for (ours, part) in [("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")] {
            all.push((theirs(part), 0, tensors.vector(&name(&format!("{ours}.weight")), hidden).unwrap()));
        }
        let qkv =
            read(&tensors.matrix(&[name("self_attn.qkv_proj")], &[q, kv, kv].map(|out| Part::whole("", out)), hidden.into()).unwrap());
        let gate_up =
            read(&tensors.matrix(&[name("mlp.up_gate_proj")], &[inner, inner].map(|out| Part::whole("", out)), hidden.into()).unwrap());
        let output = read(&tensors.matrix(&[], &[Part::whole(&name("self_attn.o_proj"), hidden)], q.into()).unwrap());
        let down = read(&tensors.matrix(&[], &[Part::whole(&name("mlp.down_proj"), hidden)], inner.into()).unwrap());
        let parts = [("attn_q", 0..q), ("attn_k", q..q + kv), ("attn_v", q + kv..q + 2 * kv)];
        all.extend(parts.map(|(part, rows)| (theirs(part), hidden, qkv[rows.start * hidden..rows.end * hidden].to_vec())));
        let parts = [("ffn_gate", 0..inner), ("ffn_up", inner..2 * inner)];
        all.extend(parts.map(|(part, rows)| (theirs(part), hidden, gate_up[rows.start * hidden..rows.end * hidden].to_vec())));
        all.extend([(theirs("attn_output"), q, output), (theirs("ffn_down"), inner, down)]);
    }
    all
}

/// ggml's own rounding of 32 numbers: the scale, then 8 or 4 bits.
fn block(kind: u32, numbers: &[f32]) -> Vec<u8> {
    let greatest = numbers.iter().copied().fold(0f32, |most, number| if number.abs() > most.abs() { number } else { most });
    let scale = if kind == 8 { greatest.abs() / 127.0 } else { greatest / -8.0 };
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let mut bytes = half::f16::from_f32(scale).to_le_bytes().to_vec();
    match kind {
        8 => bytes.extend(numbers.iter().map(|number| (number * inverse).round() as i8 as u8)),
        _ => {
            let level = |number: f32| ((number * inverse + 8.5) as u8).min(15);
            bytes.extend((0..16).map(|i| level(numbers[i]) | level(numbers[i + 16]) << 4));
        }
    }
    bytes
}

/// The demo model with matrices of one type, and the same numbers as f32.
fn quantized_demo(kind: u32) -> [ModelFiles; 2] {
    let blocks = gguf::TensorType::of(kind).unwrap().blocks().unwrap();
    let (mut packed, mut wide) = (Vec::new(), Vec::new());
    let f32s = |numbers: &[f32]| numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>();
    for (name, width, numbers) in demo_tensors() {
        if width == 0 {
            let norm: writer::Tensor = (name, vec![numbers.len()], 0, f32s(&numbers));
            packed.push(norm.clone());
            wide.push(norm);
            continue;
        }
        let bytes: Vec<u8> = numbers.chunks_exact(32).flat_map(|numbers| block(kind, numbers)).collect();
        let mut decoded = Vec::new();
        blocks.decode(&bytes, &mut decoded);
        let shape = vec![numbers.len() / width, width];
        packed.push((name.clone(), shape.clone(), kind, bytes));
        wide.push((name, shape, 0, f32s(&decoded)));
    }
    let config = demo::files().read_json("config.json").unwrap().unwrap();
    let number = |key: &str| writer::Value::U32(config[key].as_u64().unwrap() as u32);
    let key = |key: &str, value: writer::Value| (format!("ernie4_5.{key}"), value);
    let metadata = [
        ("general.architecture".to_owned(), writer::Value::Text("ernie4_5".into())),
        key("block_count", number("num_hidden_layers")),
        key("context_length", number("max_position_embeddings")),
        key("embedding_length", number("hidden_size")),
        key("feed_forward_length", number("intermediate_size")),
        key("attention.head_count", number("num_attention_heads")),
        key("attention.head_count_kv", number("num_key_value_heads")),
        key("attention.key_length", number("head_dim")),
        key("attention.layer_norm_rms_epsilon", writer::Value::F32(1e-5)),
        key("rope.freq_base", writer::Value::F32(500_000.0)),
    ];
    [packed, wide].map(|tensors| as_files("demo", &metadata, &tensors))
}

/// What is held at 8 bits answers as the file's own numbers do in f32. The 8 bits of a Q8_0 file are held as they are: what is left is the
/// rounding of activations.
#[test]
fn quantized_files_are_held_at_8_bits_and_nearly_nothing_is_lost() {
    let tokenizer = crate::text::tokenizer::Tokenizer::load(&demo::files()).unwrap();
    let text =
        "User: What is the capital of France?\nAssistant: Paris is the capital of France.</s>Once upon a time there was a small bird.";
    let ids = tokenizer.encode(text, crate::text::tokenizer::Special::Control).unwrap();
    for (kind, name, most) in [(8, "Q8_0", 4e-3), (2, "Q4_0", 4e-3)] {
        let run = |files: &ModelFiles, held: &str| {
            on_thread(|| {
                let settings = EngineSettings { kv_cache_gb: Some(0.02), ..settings(Quantization::AsStored) };
                let mut runner = ModelRunner::load(files, || Ok(usize::MAX), &settings).unwrap();
                assert!(runner.about.weights.starts_with(held), "{name}: {}", runner.about.weights);
                logits_of(&mut runner, &ids).unwrap()
            })
        };
        let [packed, wide] = quantized_demo(kind);
        let (got, want) = (run(&packed, "8-bit"), run(&wide, "f32"));
        let mut comparison = Comparison::default();
        want.iter().zip(&got).for_each(|(want, got)| comparison.add(want, got));
        println!("{name}: KL {:.1e} over {} positions, same top token {:.3}", comparison.mean(), ids.len(), comparison.agreement());
        assert!(comparison.mean() > 0.0 && comparison.mean() < most, "{name}: {}", comparison.mean());
    }
}

/// Blocks of Q8_0 as ggml writes them come out of our own 8-bit form unchanged.
#[test]
fn q8_0_is_held_without_loss() {
    let blocks = gguf::TensorType::of(8).unwrap().blocks().unwrap();
    for (name, width, numbers) in demo_tensors().into_iter().filter(|(_, width, _)| *width > 0) {
        let bytes: Vec<u8> = numbers.chunks_exact(32).flat_map(|numbers| block(8, numbers)).collect();
        let mut decoded = Vec::new();
        blocks.decode(&bytes, &mut decoded);
        for row in decoded.chunks_exact(width) {
            assert_eq!(crate::kernels::quantize::row8(row).unwrap().dequantize(), row, "{name}");
        }
    }
}
