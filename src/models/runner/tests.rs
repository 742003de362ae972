//! Several ranks against one, on every family: the same logits, and the same end when one of them fails.

use super::ranks::Break;
use super::*;
use crate::checkpoint::demo;
use crate::models::golden_families::{Golden, check, divided, on_thread};
use crate::models::quality::logits_of;
use crate::models::sample::argmax;

fn load(files: &ModelFiles, quantization: Quantization, ranks: usize) -> Result<ModelRunner, Failure> {
    ModelRunner::load(files, || Ok(usize::MAX), &divided(quantization, ranks))
}

fn families() -> Vec<String> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("handler-tests/fixtures/families");
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    files.filter_map(|file| file.strip_suffix(".json").map(str::to_owned)).collect()
}

/// Prefill, chunks, decode and a mixed batch against the reference's logits, and the same greedy tokens as one rank.
fn agrees(name: &str, ranks: usize) -> Result<(), Failure> {
    let golden = Golden::read(name);
    let files = golden.files();
    let tokens = |ranks| {
        on_thread(|| {
            let mut runner = load(&files, Quantization::AsStored, ranks)?;
            check(&mut runner, &golden, &format!("{name}, {ranks} ranks"));
            let logits = golden.sequences.iter().map(|sequence| logits_of(&mut runner, &sequence.ids).unwrap());
            Ok::<_, Failure>(logits.flatten().map(|row| argmax(&row)).collect::<Vec<_>>())
        })
    };
    assert_eq!(tokens(ranks)?, tokens(1)?, "{name}, {ranks} ranks");
    Ok(())
}

#[test]
fn two_ranks_agree_with_the_reference_on_every_family() {
    for name in families() {
        agrees(&name, 2).unwrap();
    }
}

#[test]
fn four_ranks_agree_wherever_they_can_divide_the_heads() {
    let (agreed, refused): (Vec<_>, Vec<_>) =
        families().into_iter().map(|name| (agrees(&name, 4), name)).partition(|(done, _)| done.is_ok());
    // Heads of keys and values that two ranks share, experts, latent attention, gated convolutions, norms over all heads.
    for name in
        ["llama", "gemma2", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "qwen2_moe", "granite", "lfm2", "lfm2_moe", "olmo2", "cohere2"]
    {
        assert!(agreed.iter().any(|(_, agreed)| agreed == name), "{name}: {:?}", refused.iter().find(|(_, refused)| refused == name));
    }
    for (done, name) in refused {
        let message = done.unwrap_err().message;
        assert!(message.starts_with("TENSOR_PARALLEL_SIZE=4: ") && message.contains("4 ranks cannot divide"), "{name}: {message}");
    }
}

#[test]
fn the_other_backend_has_ranks_too() {
    for name in ["llama", "gpt_oss", "qwen3_next", "deepseek_v2", "gemma2", "olmo2"] {
        let golden = Golden::read(name);
        on_thread(|| {
            let mut runner = ModelRunner::load_reference(&golden.files(), &divided(Quantization::AsStored, 2)).unwrap();
            check(&mut runner, &golden, &format!("{name}, candle, 2 ranks"));
        });
    }
}

/// Cut where blocks end, matrices hold the same values as whole ones.
#[test]
fn quantized_parts_hold_what_the_whole_holds() {
    let ids: Vec<u32> = (0..40).map(|at| 300 + at * 17 % 400).collect();
    let logits = |ranks| on_thread(|| logits_of(&mut load(&demo::files(), Quantization::Wint8, ranks).unwrap(), &ids).unwrap());
    let (one, two) = (logits(1), logits(2));
    for (one, two) in one.iter().flatten().zip(two.iter().flatten()) {
        assert!((one - two).abs() < 1e-4, "{one} and {two}");
    }
}

fn prompt(len: usize) -> Plan {
    let ids: Vec<u32> = (0..len as u32).map(|at| 300 + at).collect();
    let mut plan = Plan { positions: (0..len as u32).collect(), slots: (0..len as u32).collect(), tokens: ids, ..Default::default() };
    plan.rows.push(crate::models::Row {
        start: 0,
        len,
        context: len,
        blocks: Arc::new((0..len.div_ceil(4) as u32).collect()),
        sampling: Some(SamplingMetadata::from(crate::models::SamplingParams::default())),
        draft_len: 0,
        pools: false,
        score: None,
    });
    plan
}

#[test]
fn a_rank_that_fails_fails_the_step_for_good_and_nobody_waits() {
    for (what, reason) in
        [(Break::Panic, "rank 1 has panicked"), (Break::Error, "rank 1: told to fail"), (Break::Vanish, "rank 1 has ended")]
    {
        on_thread(|| {
            let mut runner = load(&demo::files(), Quantization::AsStored, 2).unwrap();
            let plan = prompt(12);
            assert_eq!(runner.step(&plan).unwrap().tokens.len(), 1, "{what:?}");
            runner.break_rank(1, what);
            for _ in 0..2 {
                let error = runner.step(&plan).unwrap_err();
                assert_eq!(error.fault, Fault::Device, "{what:?}: {error}");
                assert!(error.failure.message.contains(reason), "{what:?}: {error}");
            }
        });
    }
}

fn planned(quantization: Quantization, ranks: usize) -> Planned {
    let files = demo::files();
    let model = Model::from_files(&files).unwrap();
    let checkpoint = Checkpoint::open(&files, None).unwrap();
    let tensors = Tensors::find(&checkpoint, &model).unwrap();
    Planned::new(&model, &tensors, 1000, &divided(quantization, ranks), None).unwrap()
}

#[test]
fn a_rank_that_cannot_load_its_part_fails_the_start() {
    on_thread(|| {
        let settings = divided(Quantization::AsStored, 2);
        let plan = planned(Quantization::AsStored, 2).memory;
        let files = ModelFiles::new("none", "nowhere", Vec::new());
        let part = Part { files, settings, shard: Shard { rank: 1, ranks: 2 }, plan, kernels: Kernels::Cpu };
        let (_followers, leader) = Followers::start(vec![part]).unwrap();
        let reason = leader.meet().unwrap_err();
        assert!(reason.starts_with("rank 1: "), "{reason}");
    });
}

#[test]
fn every_rank_has_its_own_plan() {
    let (one, two) = (planned(Quantization::AsStored, 1), planned(Quantization::AsStored, 2));
    assert_eq!((one.lines(), two.parameters), (one.memory.lines(), one.parameters));
    assert_eq!(2 * two.memory.kv_bytes_per_token, one.memory.kv_bytes_per_token);
    assert!(two.memory.weights_bytes < one.memory.weights_bytes);
    let lines = two.lines();
    assert!(lines[0].starts_with("tensor parallel: 2 ranks"), "{lines:?}");
    assert!(
        lines.iter().any(|line| line.starts_with("rank 0: weights: ")) && lines.iter().any(|line| line.starts_with("rank 1: KV cache: "))
    );
}

/// Half a row of 256 weights is no block of 4 bits: such rows take 8, and that is said.
#[test]
fn rows_that_ranks_cut_short_take_a_finer_form() {
    let finer =
        |ranks| planned(Quantization::Wint4, ranks).warnings().filter(|line| line.contains("finer form")).cloned().collect::<String>();
    assert!(finer(1).contains("rows of 128, 384 weights") && finer(2).contains("rows of 128, 192 weights"), "{}; {}", finer(1), finer(2));
}
