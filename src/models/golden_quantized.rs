//! Whole quantized models: against the same model with the dequantized weights stored in its file, against the model as stored, and what
//! they take of memory.

use std::collections::HashMap;
use std::sync::OnceLock;

use half::bf16;
use safetensors::tensor::{Dtype, TensorView};

use super::Runner;
use super::decoder::{Decoder, Place, format_of};
use super::families::Model;
use super::quality::{Comparison, logits_of};
use super::runner::{self, ModelRunner};
use super::shard::Shard;
use super::tensors::Tensors;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::demo;
use crate::checkpoint::files::{ModelFiles, Source};
use crate::config::{DeviceChoice, EngineSettings, Quantization};
use crate::kernels::cpu::Cpu;
use crate::kernels::cpu::matmul::has_bf16;
use crate::kernels::quantize::{row4, row8};
use crate::kernels::{ComputeDtype, WeightFormat};
use crate::text::tokenizer::{Special, Tokenizer};

const STRATEGIES: [Quantization; 3] = [Quantization::AsStored, Quantization::Wint8, Quantization::Wint4];

fn settings(quantization: Quantization) -> EngineSettings {
    EngineSettings { device: DeviceChoice::Cpu, threads: Some(2), kv_cache_gb: Some(0.02), quantization, ..Default::default() }
}

/// The logits of every position of the committed texts.
fn logits(files: &ModelFiles, quantization: Quantization) -> Vec<Vec<f32>> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/quality/texts.txt");
    let texts = std::fs::read_to_string(path).unwrap();
    let tokenizer = Tokenizer::load(&demo::files()).unwrap();
    let work = || {
        let mut runner = ModelRunner::load(files, || Ok(tokenizer.vocab_size()), &settings(quantization)).unwrap();
        let of = |text: &str| logits_of(&mut runner, &tokenizer.encode(text, Special::Control).unwrap()).unwrap();
        texts.split("\n\n").flat_map(of).collect()
    };
    std::thread::scope(|scope| scope.spawn(work).join().unwrap())
}

fn as_stored() -> &'static [Vec<f32>] {
    static LOGITS: OnceLock<Vec<Vec<f32>>> = OnceLock::new();
    LOGITS.get_or_init(|| logits(&demo::files(), Quantization::AsStored))
}

fn compare(a: &[Vec<f32>], b: &[Vec<f32>]) -> Comparison {
    assert!(a.len() == b.len() && a.len() > 500, "{} positions", a.len());
    let mut comparison = Comparison::default();
    a.iter().zip(b).for_each(|(a, b)| comparison.add(a, b));
    comparison
}

/// The demo model with every matrix quantized and stored again as f32.
fn dequantized(quantization: Quantization) -> ModelFiles {
    let files = demo::files();
    let bytes = files.read("model.safetensors").unwrap().unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut changed: HashMap<String, (Vec<usize>, Vec<u8>)> = HashMap::new();
    for (name, tensor) in tensors.tensors() {
        assert_eq!(tensor.dtype(), Dtype::BF16);
        let values: Vec<f32> = tensor.data().as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect();
        let values = match *tensor.shape() {
            // Paddle's layout: the embedding by ids, everything else [in, out].
            [ids, hidden] if name.contains("embed") => rows(&values, ids, hidden, Place::Vocabulary, quantization),
            [input, output] => {
                let turned: Vec<f32> = (0..output * input).map(|n| values[n % input * output + n / input]).collect();
                let read = rows(&turned, output, input, Place::Layer, quantization);
                (0..input * output).map(|n| read[n % output * input + n / output]).collect()
            }
            _ => values,
        };
        changed.insert(name, (tensor.shape().to_vec(), values.into_iter().flat_map(f32::to_le_bytes).collect()));
    }
    let views = changed.iter().map(|(name, (shape, bytes))| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    let bytes: &'static [u8] = safetensors::serialize(views, None).unwrap().leak();
    let replaced = |(name, source): (&str, &Source)| match (name, source) {
        ("model.safetensors", _) => (name.to_owned(), Source::Embedded(bytes)),
        (_, source) => (name.to_owned(), source.clone()),
    };
    ModelFiles::new("dequantized", "test", files.iter().map(replaced).collect())
}

/// A matrix `[n, k]`, quantized row by row and read back.
fn rows(values: &[f32], n: usize, k: usize, place: Place, quantization: Quantization) -> Vec<f32> {
    assert_eq!(values.len(), n * k);
    let read = |row: &[f32]| match format_of(quantization, place, k) {
        Some(WeightFormat::Int4) => row4(row).unwrap().dequantize(),
        Some(WeightFormat::Int8) => row8(row).unwrap().dequantize(),
        _ => row.to_vec(),
    };
    values.chunks_exact(k).flat_map(read).collect()
}

/// What is left between the kernels' integer arithmetic and f32 on the very same weights is the rounding of activations to 8 bits.
#[test]
fn the_kernels_compute_with_the_quantized_weights() {
    for (quantization, most) in [(Quantization::Wint8, 2e-3), (Quantization::Wint4, 2e-3)] {
        let kernels = compare(&logits(&dequantized(quantization), Quantization::AsStored), &logits(&demo::files(), quantization));
        println!("{quantization:?}: {:.2e}, at most {:.2e}", kernels.mean(), kernels.quantile(1.0));
        assert!(kernels.mean() < most, "{quantization:?}: {}", kernels.mean());
    }
}

/// As with weights as stored: how a text is cut into steps changes no bit of its logits.
#[test]
fn steps_of_any_length_give_the_same_bits() {
    let ids: Vec<u32> = (0..150).map(|i| 40 + i * 7 % 1000).collect();
    for quantization in [Quantization::Wint8, Quantization::Wint4] {
        let in_steps_of = |most: usize| {
            let settings = EngineSettings { max_num_seqs: Some(1), max_num_batched_tokens: Some(most), ..settings(quantization) };
            let work = || logits_of(&mut ModelRunner::load(&demo::files(), || Ok(1500), &settings).unwrap(), &ids).unwrap();
            std::thread::scope(|scope| scope.spawn(work).join().unwrap())
        };
        let whole = in_steps_of(256);
        assert_eq!(whole.len(), ids.len());
        for most in [1, 5, 64] {
            assert!(in_steps_of(most) == whole, "{quantization:?} in steps of {most}");
        }
    }
}

/// Bounds of about twice what was measured.
#[test]
fn how_far_quantized_models_are_from_the_original() {
    for (quantization, mean, most, agreement) in [(Quantization::Wint8, 4.4e-3, 0.12, 0.95), (Quantization::Wint4, 0.03, 0.4, 0.86)] {
        let found = compare(as_stored(), &logits(&demo::files(), quantization));
        let (p95, max) = (found.quantile(0.95), found.quantile(1.0));
        println!("{quantization:?}: mean {:.2e}, p95 {p95:.2e}, max {max:.2e}, same {}", found.mean(), found.agreement());
        assert!(found.mean() > 0.0 && found.mean() < mean, "{quantization:?}: {}", found.mean());
        assert!(max < most && found.agreement() > agreement, "{quantization:?}: {max}, {}", found.agreement());
    }
}

/// `DTYPE=bfloat16`: how a text is cut into steps changes no bit; answers stay close to those of f32, and are theirs where the processor
/// is no faster with bf16.
#[test]
fn activations_of_bf16() {
    let tokenizer = Tokenizer::load(&demo::files()).unwrap();
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/quality/texts.txt")).unwrap();
    let ids = tokenizer.encode(&text, Special::Control).unwrap();
    let ids = &ids[..ids.len().min(700)];
    let of = |bf16_activations: bool, most: usize| {
        let settings = EngineSettings {
            max_num_seqs: Some(1),
            max_num_batched_tokens: Some(most),
            bf16_activations,
            ..settings(Quantization::AsStored)
        };
        let work = || logits_of(&mut ModelRunner::load(&demo::files(), || Ok(1500), &settings).unwrap(), ids).unwrap();
        std::thread::scope(|scope| scope.spawn(work).join().unwrap())
    };
    let rounded = of(true, 256);
    for most in [1, 5, 64] {
        assert!(of(true, most) == rounded, "in steps of {most}");
    }
    let found = compare(&of(false, 256), &rounded);
    println!("mean {:.2e}, max {:.2e}, same {}", found.mean(), found.quantile(1.0), found.agreement());
    assert_eq!(found.mean() > 0.0, has_bf16());
    // About three times what was measured: 7.3e-5, 8.1e-4 and 0.994.
    assert!(found.mean() < 2.2e-4 && found.quantile(1.0) < 2.5e-3 && found.agreement() > 0.98);
}

/// `check` plans without reading the weights what loading then takes.
#[test]
fn the_plan_is_what_is_held() {
    let files = demo::files();
    let model = Model::from_files(&files).unwrap();
    let checkpoint = Checkpoint::open(&files, None).unwrap();
    let tensors = Tensors::find(&checkpoint, &model).unwrap();
    let mut sizes = Vec::new();
    for quantization in STRATEGIES {
        let sized = runner::sized::<Cpu>(&model, &tensors, quantization, Shard::WHOLE).unwrap();
        let limits = model.spec.step_limits(1, 1, 16);
        let cpu = Cpu::new(&limits, 1, ComputeDtype::F32).unwrap();
        let decoder = Decoder::load(model.spec.clone(), Shard::WHOLE, &tensors, &cpu, quantization, &limits).unwrap();
        assert_eq!(sized.weight_bytes, decoder.weight_bytes());
        sizes.push((sized.formats, sized.weight_bytes));
    }
    assert_eq!(sizes[0].0, "bf16");
    assert_eq!(sizes[1].0, "8-bit (Q8_0 form)");
    // Most of its rows are too short for 4-bit blocks.
    assert_eq!(sizes[2].0, "4-bit (Q4_K form) and 8-bit (Q8_0 form); embedding and head 8-bit (Q8_0 form)");
    assert!(sizes[0].1 > sizes[1].1 && sizes[1].1 > sizes[2].1, "{sizes:?}");
}

#[test]
fn weights_that_are_no_numbers_are_refused_by_tensor() {
    let files = demo::files();
    let mut bytes = files.read("model.safetensors").unwrap().unwrap().to_vec();
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let name = metadata.tensors().into_keys().find(|name| name.contains("layers.1.mlp.down_proj")).unwrap();
    let at = 8 + header + metadata.tensors()[&name].data_offsets.0;
    bytes[at..at + 2].copy_from_slice(&bf16::NAN.to_le_bytes());
    let bytes: &'static [u8] = bytes.leak();
    let source =
        |name: &str| Source::Embedded(if name == "model.safetensors" { bytes } else { files.read(name).unwrap().unwrap().to_vec().leak() });
    let broken = ModelFiles::new("broken", "test", files.iter().map(|(name, _)| (name.to_owned(), source(name))).collect());
    let load = || ModelRunner::load(&broken, || Ok(1500), &settings(Quantization::Wint8)).map(|runner| runner.shape().blocks);
    let error = std::thread::scope(|scope| scope.spawn(load).join().unwrap()).unwrap_err();
    assert!(error.message.contains(&name) && error.message.contains("NaN"), "{error}");
}
