//! Tiny models with the linear layers packed by quantization methods (`handler-tests/fixtures/quantized/models.json`), against the logits of
//! Hugging Face transformers with what the methods' own implementations read in them.

use serde::Deserialize;
use serde_json::{Value, json};

use super::golden_families::{Golden, Sequence, Tensor, base64, check, divided, on_thread, settings};
use super::quality::{Comparison, logits_of};
use super::runner::ModelRunner;
use crate::checkpoint::files::{ModelFiles, Source};
use crate::config::Quantization;

#[derive(Deserialize)]
struct Model {
    name: String,
    config: Value,
    tensors: Vec<Tensor>,
    packed: serde_json::Map<String, Value>,
    sequences: Vec<Sequence>,
}

fn models() -> Vec<Model> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("handler-tests/fixtures/quantized/models.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

impl Model {
    fn files(&self) -> ModelFiles {
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for tensor in &self.tensors {
            let from = data.len();
            (0..tensor.shape.iter().product()).for_each(|index| data.extend(tensor.value(index).to_le_bytes()));
            header.insert(tensor.name.clone(), json!({"dtype": "F32", "shape": tensor.shape, "data_offsets": [from, data.len()]}));
        }
        for (name, tensor) in &self.packed {
            let from = data.len();
            data.extend(base64(tensor["data"].as_str().unwrap()));
            header.insert(name.clone(), json!({"dtype": tensor["dtype"], "shape": tensor["shape"], "data_offsets": [from, data.len()]}));
        }
        let header = serde_json::to_vec(&header).unwrap();
        let bytes = [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat();
        let files = [("config.json", serde_json::to_vec(&self.config).unwrap()), ("model.safetensors", bytes)];
        ModelFiles::new("packed", "test", files.map(|(name, bytes)| (name.to_owned(), Source::Made(bytes.into()))).into())
    }
}

/// Widened, they give the reference's logits with our kernels and with candle's; at 8 bits, which is the rule, nearly nothing is lost.
#[test]
fn packed_models_give_the_references_logits() {
    let models = models();
    assert!(models.len() >= 6);
    for model in models {
        let (files, name) = (model.files(), model.name.clone());
        let golden = Golden::of(model.config, model.sequences);
        on_thread(|| {
            let mut runner = ModelRunner::load(&files, || Ok(usize::MAX), &settings(Quantization::Unquantized)).unwrap();
            assert_eq!(runner.about.weights, "f32", "{name}");
            check(&mut runner, &golden, &name);
        });
        // Their heads, blocks and groups are cut in two.
        let what = format!("{name}, 2 ranks");
        on_thread(|| {
            check(&mut ModelRunner::load(&files, || Ok(usize::MAX), &divided(Quantization::Unquantized, 2)).unwrap(), &golden, &what)
        });
        let what = format!("{name}, candle");
        on_thread(|| check(&mut ModelRunner::load_reference(&files, &settings(Quantization::Unquantized)).unwrap(), &golden, &what));
        let held = on_thread(|| {
            let mut runner = ModelRunner::load(&files, || Ok(usize::MAX), &settings(Quantization::AsStored)).unwrap();
            assert!(runner.about.weights.starts_with("8-bit"), "{name}: {}", runner.about.weights);
            logits_of(&mut runner, &golden.sequences[0].ids).unwrap()
        });
        let mut comparison = Comparison::default();
        golden.sequences[0].rows(golden.vocab()).iter().zip(&held).for_each(|(want, got)| comparison.add(want, got));
        println!("{name}, 8-bit: KL {:.1e}", comparison.mean());
        // As for families: rounding may send a token to another expert.
        let most = if name.contains("moe") || name.contains("gpt_oss") { 2e-2 } else { 2e-3 };
        assert!(comparison.mean() > 0.0 && comparison.mean() < most, "{name}: KL {}", comparison.mean());
    }
}
