//! The KV cache in types of fewer bits: the same bits however a text is run, and how far its logits are from those with float32.

use super::families::Model;
use super::golden_families::{Golden, on_thread, settings};
use super::quality::{Comparison, logits_of};
use super::runner::ModelRunner;
use crate::checkpoint::demo;
use crate::checkpoint::files::ModelFiles;
use crate::config::{EngineSettings, KvCacheDtype, Quantization};
use crate::text::tokenizer::{Special, Tokenizer};

const NARROW: [KvCacheDtype; 3] = [KvCacheDtype::Float16, KvCacheDtype::Bfloat16, KvCacheDtype::Int8];

/// The logits after every token of each text, in steps of at most so many tokens.
fn logits(files: &ModelFiles, kv_cache_dtype: KvCacheDtype, most: usize, texts: &[Vec<u32>]) -> Vec<Vec<f32>> {
    let usual = EngineSettings { block_size: 16, kv_cache_gb: Some(0.02), ..settings(Quantization::AsStored) };
    let settings = EngineSettings { kv_cache_dtype, max_num_seqs: Some(1), max_num_batched_tokens: Some(most), ..usual };
    on_thread(|| {
        let mut runner = ModelRunner::load(files, || Ok(usize::MAX), &settings).unwrap();
        texts.iter().flat_map(|ids| logits_of(&mut runner, ids).unwrap()).collect()
    })
}

fn compare(exact: &[Vec<f32>], other: &[Vec<f32>]) -> Comparison {
    assert_eq!(exact.len(), other.len());
    let mut comparison = Comparison::default();
    exact.iter().zip(other).for_each(|(exact, other)| comparison.add(exact, other));
    comparison
}

fn demo_texts() -> Vec<Vec<u32>> {
    let texts = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/quality/texts.txt")).unwrap();
    let tokenizer = Tokenizer::load(&demo::files()).unwrap();
    texts.split("\n\n").map(|text| tokenizer.encode(text, Special::Control).unwrap()).collect()
}

/// Bounds of about twice what was measured: means of 4.4e-7, 3.0e-5 and 2.6e-4.
#[test]
fn how_far_narrower_caches_are_from_float32() {
    let texts = demo_texts();
    let exact = logits(&demo::files(), KvCacheDtype::Auto, 256, &texts);
    assert!(exact == logits(&demo::files(), KvCacheDtype::Float32, 256, &texts), "float32 is what a CPU computes with");
    for (dtype, mean, largest, logit) in
        [(KvCacheDtype::Float16, 1e-6, 3e-5, 0.03), (KvCacheDtype::Bfloat16, 6e-5, 2e-3, 0.15), (KvCacheDtype::Int8, 6e-4, 1e-2, 0.7)]
    {
        let found = compare(&exact, &logits(&demo::files(), dtype, 256, &texts));
        let (p95, max, most) = (found.quantile(0.95), found.quantile(1.0), found.farthest);
        println!("{dtype:?}: mean {:.1e}, p95 {p95:.1e}, max {max:.1e}, logits {most:.1e}, same {}", found.mean(), found.agreement());
        assert!(found.mean() > 0.0 && found.mean() < mean && max < largest && most < logit, "{dtype:?}: {} {max} {most}", found.mean());
    }
}

#[test]
fn steps_of_any_length_give_the_same_bits() {
    let texts = [(0..150).map(|i| 40 + i * 7 % 1000).collect()];
    for dtype in NARROW {
        let whole = logits(&demo::files(), dtype, 256, &texts);
        for most in [1, 5, 64] {
            assert!(logits(&demo::files(), dtype, most, &texts) == whole, "{dtype:?} in steps of {most}");
        }
    }
}

/// Every kind of attention over keys: plain, with windows and soft caps, with sinks, latent, beside recurrent states.
#[test]
fn families_stay_near_their_goldens() {
    for family in ["ernie4_5", "qwen3", "gemma2", "gpt_oss", "deepseek_v3", "qwen3_5_text"] {
        let golden = Golden::read(family);
        let (files, sequence) = (golden.files(), &golden.sequences[0]);
        let routed = Model::from_config(&golden.config).unwrap().spec.expert_limits().is_some();
        for (dtype, divergence, logit) in
            [(KvCacheDtype::Float16, 3e-7, 6e-3), (KvCacheDtype::Bfloat16, 2e-5, 5e-2), (KvCacheDtype::Int8, 2e-4, 0.15)]
        {
            let found = compare(&sequence.rows(golden.vocab()), &logits(&files, dtype, 64, std::slice::from_ref(&sequence.ids)));
            let most = found.farthest;
            println!("{family}, {dtype:?}: KL {:.1e}, at most {:.1e}, logits {most:.1e}", found.mean(), found.quantile(1.0));
            // Where rounding sends a token to another expert, its logits are others: up to 1.5 apart, and a divergence of up to 2.5e-3.
            let (divergence, logit) = if routed { (1e-2, 4.0) } else { (divergence, logit) };
            assert!(found.mean() < divergence && most < logit, "{family}, {dtype:?}: KL {}, logits {most}", found.mean());
        }
    }
}
