//! Every CPU kernel against its composition of candle operations, on random shapes.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;

use super::cpu::attention::Shape;
use super::cpu::packed::{Columns, Form, Packed};
use super::{BatchRow, Inputs, Matrix, Products, Rope, Sizes, composed, cpu};

fn random(shape: &[usize], seed: &mut u64) -> Tensor {
    let n: usize = shape.iter().product();
    let values: Vec<f32> = (0..n)
        .map(|_| {
            *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (*seed >> 40) as f32 / (1u32 << 24) as f32 * 2.0 - 1.0
        })
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn assert_close(ours: &[f32], theirs: &Tensor, tolerance: f32, what: &str) {
    let theirs = values(theirs);
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (i, (a, b)) in ours.iter().zip(&theirs).enumerate() {
        assert!((a - b).abs() <= tolerance * (1.0 + b.abs()), "{what}, value {i}: {a} {b}");
    }
}

fn pack(w: &Tensor, columns: Columns) -> Packed {
    let (n, k) = w.dims2().unwrap();
    let numbers = values(w);
    Packed::new(n, k, Form::F32, columns, &|row, (): &mut (), out| {
        out.f32.clear();
        out.f32.extend_from_slice(&numbers[row * k..(row + 1) * k]);
    })
    .unwrap()
}

/// A step: rows of the given (context, len), each with its own blocks.
struct Step {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    slots: Vec<u32>,
    rows: Vec<BatchRow>,
    blocks: usize,
}

fn step(rows: &[(usize, usize)], block_size: usize) -> Step {
    let (mut start, mut next) = (0, 0u32);
    let mut step = Step { tokens: vec![], positions: vec![], slots: vec![], rows: vec![], blocks: 0 };
    for (context, len) in rows {
        let count = context.div_ceil(block_size) as u32;
        // Descending, so that the order of blocks matters.
        let blocks: Vec<u32> = (next..next + count).rev().collect();
        next += count;
        step.slots.extend((context - len..*context).map(|p| blocks[p / block_size] * block_size as u32 + (p % block_size) as u32));
        step.positions.extend((context - len..*context).map(|p| p as u32));
        step.rows.push(BatchRow { start, len: *len, context: *context, blocks: Arc::new(blocks) });
        start += len;
    }
    step.tokens = vec![0; start];
    step.blocks = next as usize;
    step
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The whole of a layer's attention, in both forms, for random rows; then the same tokens one row at a time, to the bit.
    #[test]
    fn attention_and_rope(
        contexts in prop::collection::vec((1usize..70, 1usize..20), 1..7), kv in 1usize..4, group in 1usize..14,
        d in prop::sample::select(vec![4usize, 8, 10, 16, 32, 64, 72]), block_size in prop::sample::select(vec![1usize, 4, 16, 20, 32, 48]),
        half in any::<bool>(), scores in 1usize..3000, gathered in 1usize..20_000, long in 0usize..900, threads in 1usize..4, mut seed in any::<u64>(),
    ) {
        let mut rows: Vec<(usize, usize)> = contexts.into_iter().map(|(context, len)| (context, len.min(context))).collect();
        rows[0].0 += long;
        let step = step(&rows, block_size);
        let heads = kv * group;
        let t = step.tokens.len();
        let width = (heads + 2 * kv) * d;
        let sizes = Sizes { max_tokens: t, max_logits: 1, hidden: width, heads, kv, d, intermediate: 2, vocab: 2, block_size };
        let frequencies: Vec<f32> = values(&random(&[d / 2], &mut seed));
        let inputs = Inputs { tokens: &step.tokens, positions: &step.positions, slots: &step.slots, rows: &step.rows, frequencies: &frequencies };
        let rope = if half { Rope::Half } else { Rope::Interleaved };
        // Keys and values of earlier steps: stored as if they were computed, every position of every row.
        let earlier = random(&[step.blocks * block_size, width], &mut seed);
        let identity = {
            let mut numbers = vec![0f32; width * width];
            (0..width).for_each(|i| numbers[i * width + i] = 1.0);
            Tensor::from_vec(numbers, (width, width), &Device::Cpu).unwrap()
        };
        let packed = pack(&identity, Columns::Plain);
        let weight = Tensor::ones(width, DType::F32, &Device::Cpu).unwrap();
        let x = random(&[t, width], &mut seed);

        let mut cache = cpu::Cache::new(step.blocks, Shape { kv, d, block_size }).unwrap();
        let zeros = || Tensor::zeros((step.blocks, block_size, kv, d), DType::F32, &Device::Cpu).unwrap();
        let tensors = composed::KvCache { k: zeros(), v: zeros() };
        let all = step.blocks * block_size;
        let everywhere: Vec<u32> = (0..all as u32).collect();
        {
            let row = [BatchRow { start: 0, len: all, context: all, blocks: Arc::new((0..step.blocks as u32).collect()) }];
            let inputs = Inputs { tokens: &everywhere, positions: &everywhere, slots: &everywhere, rows: &row, frequencies: &frequencies };
            let mut ours = cpu::Activations::new(Sizes { max_tokens: all, ..sizes }, threads, Products::F32).unwrap();
            ours.begin(&inputs).unwrap();
            ours.set_x(&values(&earlier));
            ours.norm(&weight, 1e-5).unwrap();
            ours.project(&packed, None).unwrap();
            ours.rope_and_store(rope, &mut cache).unwrap();
            let mut theirs = composed::Activations::new(&Device::Cpu, block_size);
            theirs.begin(&inputs).unwrap();
            theirs.set_x(earlier);
            theirs.norm(&weight, 1e-5).unwrap();
            theirs.project(&Matrix::Tensor(identity.clone()), None).unwrap();
            theirs.rope_and_store(heads, rope, &tensors).unwrap();
        }

        let mut ours = cpu::Activations::new(sizes, threads, Products::F32).unwrap();
        ours.begin(&inputs).unwrap();
        ours.set_x(&values(&x));
        ours.norm(&weight, 1e-5).unwrap();
        ours.project(&packed, None).unwrap();
        ours.rope_and_store(rope, &mut cache).unwrap();
        ours.attend(&cache).unwrap();
        let attended = ours.values("attended").to_vec();

        let mut theirs = composed::Activations::new(&Device::Cpu, block_size);
        theirs.begin(&inputs).unwrap();
        theirs.set_x(x.clone());
        theirs.norm(&weight, 1e-5).unwrap();
        theirs.project(&Matrix::Tensor(identity.clone()), None).unwrap();
        theirs.rope_and_store(heads, rope, &tensors).unwrap();
        theirs.attend(&tensors).unwrap();
        assert_close(&attended, theirs.value("attended").unwrap(), 3e-5, "attended");
        let q = theirs.value("qkv").unwrap();
        let our_q: Vec<f32> = ours.values("qkv").chunks_exact(width).flat_map(|row| row[..heads * d].to_vec()).collect();
        assert_close(&our_q, q, 2e-5, "q");
        for slot in &step.slots {
            for head in 0..kv {
                let (key, value) = cache.read(*slot as usize, head);
                let at = |cache: &Tensor| {
                    let block = cache.get(*slot as usize / block_size).unwrap();
                    block.get(*slot as usize % block_size).unwrap().get(head).unwrap()
                };
                assert_close(&key, &at(&tensors.k), 2e-5, "key");
                assert_close(&value, &at(&tensors.v), 2e-5, "value");
            }
        }
        // Cut finely, too.
        let batch = composed::Batch::new(&inputs, block_size, &Device::Cpu).unwrap();
        let groups = composed::groups(&batch, heads, kv * d, composed::Bounds { scores, gathered }, &Device::Cpu).unwrap();
        let cut = composed::Batch { groups: groups.into(), ..batch };
        assert_close(&attended, &composed::paged_attention(q, &cut, &tensors).unwrap(), 3e-5, "cut finely");

        // Token by token, alone: the same bits.
        let (x, mut alone) = (values(&x), cpu::Activations::new(sizes, 1, Products::F32).unwrap());
        for row in &step.rows {
            for i in 0..row.len {
                let at = row.start + i;
                let rows = [BatchRow { start: 0, len: 1, context: row.context - row.len + i + 1, blocks: row.blocks.clone() }];
                let one = |all: &[u32]| [all[at]];
                let (tokens, positions, slots) = (one(&step.tokens), one(&step.positions), one(&step.slots));
                alone.begin(&Inputs { tokens: &tokens, positions: &positions, slots: &slots, rows: &rows, frequencies: &frequencies }).unwrap();
                alone.set_x(&x[at * width..(at + 1) * width]);
                alone.norm(&weight, 1e-5).unwrap();
                alone.project(&packed, None).unwrap();
                alone.rope_and_store(rope, &mut cache).unwrap();
                alone.attend(&cache).unwrap();
                prop_assert_eq!(alone.values("attended"), &attended[at * heads * d..(at + 1) * heads * d]);
            }
        }
    }

    #[test]
    fn rows(t in 1usize..30, hidden in 1usize..70, half in 1usize..40, vocab in 1usize..70, mut seed in any::<u64>()) {
        let sizes = Sizes { max_tokens: t, max_logits: t, hidden, heads: 1, kv: 1, d: 2, intermediate: half, vocab, block_size: 16 };
        let (x, weight) = (random(&[t, hidden], &mut seed), random(&[hidden], &mut seed));
        let (gate_up, bias) = ((random(&[2 * half, hidden], &mut seed) * 0.5).unwrap(), random(&[2 * half], &mut seed));
        let (down, down_bias, table) = (random(&[hidden, half], &mut seed), random(&[hidden], &mut seed), random(&[vocab, hidden], &mut seed));
        let tokens: Vec<u32> = (0..t as u32).map(|i| i * 7 % vocab as u32).collect();
        let positions: Vec<u32> = (0..t as u32).collect();
        let rows = [BatchRow { start: 0, len: t, context: t, blocks: Arc::new((0..t.div_ceil(16) as u32).collect()) }];
        let inputs = Inputs { tokens: &tokens, positions: &positions, slots: &positions, rows: &rows, frequencies: &[1.0] };
        let (mut ours, mut theirs) = (cpu::Activations::new(sizes, 2, Products::F32).unwrap(), composed::Activations::new(&Device::Cpu, 16));
        ours.begin(&inputs).unwrap();
        theirs.begin(&inputs).unwrap();
        let packed = pack(&table, Columns::Plain);
        ours.embed(&packed).unwrap();
        theirs.embed(&Matrix::Tensor(table.clone())).unwrap();
        assert_close(ours.values("x"), theirs.value("x").unwrap(), 0.0, "embed");
        ours.set_x(&values(&x));
        theirs.set_x(x);
        ours.norm(&weight, 1e-5).unwrap();
        theirs.norm(&weight, 1e-5).unwrap();
        assert_close(ours.values("normed"), theirs.value("normed").unwrap(), 1e-5, "norm");
        for bias in [None, Some(&bias)] {
            ours.gate(&pack(&gate_up, Columns::Gated), bias).unwrap();
            theirs.gate(&Matrix::Tensor(gate_up.clone()), bias).unwrap();
            assert_close(ours.values("gated"), theirs.value("gated").unwrap(), 1e-5, "gate");
        }
        for bias in [None, Some(&down_bias)] {
            ours.add_gated(&pack(&down, Columns::Plain), bias).unwrap();
            theirs.add_gated(&Matrix::Tensor(down.clone()), bias).unwrap();
            assert_close(ours.values("x"), theirs.value("x").unwrap(), 2e-5, "down");
        }
        let picked: Vec<usize> = (0..t).step_by(2).collect();
        ours.head(&picked, &weight, 1e-5, &packed).unwrap();
        theirs.head(&picked, &weight, 1e-5, &Matrix::Tensor(table.clone())).unwrap();
        assert_close(ours.logits(), theirs.logits().unwrap(), 3e-5, "logits");
        prop_assert!(super::Activations::Cpu(Box::new(ours)).embed(&Matrix::Tensor(table)).is_err());
    }
}
