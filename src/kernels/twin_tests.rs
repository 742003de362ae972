//! Every CPU kernel against its composition of candle operations, on random shapes.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;

use super::{Batch, BatchRow, KvCache, Rope, composed, cpu};

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

fn assert_close(a: &Tensor, b: &Tensor, tolerance: f32) {
    assert_eq!(a.dims(), b.dims());
    let (a, b): (Vec<f32>, Vec<f32>) = (a.flatten_all().unwrap().to_vec1().unwrap(), b.flatten_all().unwrap().to_vec1().unwrap());
    for (i, (a, b)) in a.iter().zip(&b).enumerate() {
        assert!((a - b).abs() <= tolerance * (1.0 + b.abs()), "value {i}: {a} {b}");
    }
}

/// Rows of the given (context, len), each with its own blocks.
fn batch(rows: &[(usize, usize)], block_size: usize, d: usize, seed: &mut u64) -> (Batch, usize) {
    let (mut start, mut next, mut slots, mut out) = (0, 0u32, Vec::new(), Vec::new());
    for (context, len) in rows {
        let count = context.div_ceil(block_size) as u32;
        // Descending, so that the order of blocks matters.
        let blocks: Vec<u32> = (next..next + count).rev().collect();
        next += count;
        slots.extend((context - len..*context).map(|p| blocks[p / block_size] * block_size as u32 + (p % block_size) as u32));
        out.push(BatchRow { start, len: *len, context: *context, blocks: Arc::new(blocks) });
        start += len;
    }
    let batch = Batch {
        tokens: Tensor::zeros(start, DType::U32, &Device::Cpu).unwrap(),
        slots: Tensor::from_vec(slots, start, &Device::Cpu).unwrap(),
        cos: random(&[start, d / 2], seed),
        sin: random(&[start, d / 2], seed),
        rows: out,
        block_size,
        groups: std::sync::OnceLock::new(),
    };
    (batch, next as usize)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn attention_and_rope(
        contexts in prop::collection::vec((1usize..70, 1usize..4), 1..7), kv in 1usize..4, group in 1usize..7,
        d in prop::sample::select(vec![4usize, 8, 10, 16, 32, 64, 72]), block_size in prop::sample::select(vec![1usize, 4, 16]),
        half in any::<bool>(), scores in 1usize..3000, gathered in 1usize..20_000, mut seed in any::<u64>(),
    ) {
        let rows: Vec<(usize, usize)> = contexts.into_iter().map(|(context, len)| (context, len.min(context))).collect();
        let (batch, blocks) = batch(&rows, block_size, d, &mut seed);
        let heads = kv * group;
        let t = batch.rows.iter().map(|row| row.len).sum::<usize>();
        let (k, v) = (random(&[blocks, block_size, kv, d], &mut seed), random(&[blocks, block_size, kv, d], &mut seed));
        let qkv = random(&[t, (heads + 2 * kv) * d], &mut seed);
        let rope = if half { Rope::Half } else { Rope::Interleaved };
        let (ours, theirs) = (KvCache { k: k.copy().unwrap(), v: v.copy().unwrap() }, KvCache { k, v });
        let q = cpu::rope_and_store(&qkv, heads, rope, &batch, &ours).unwrap();
        let q_composed = composed::rope_and_store(&qkv, heads, rope, &batch, &theirs).unwrap();
        assert_close(&q, &q_composed, 1e-5);
        assert_close(&ours.k, &theirs.k, 1e-5);
        assert_close(&ours.v, &theirs.v, 0.0);
        let attended = cpu::paged_attention(&q, &batch, &ours).unwrap();
        assert_close(&attended, &composed::paged_attention(&q, &batch, &ours).unwrap(), 2e-5);
        // Cut finely, too.
        let groups = composed::groups(&batch, heads, kv * d, composed::Bounds { scores, gathered }, &Device::Cpu).unwrap();
        let cut = Batch { groups: groups.into(), ..batch.clone() };
        assert_close(&attended, &composed::paged_attention(&q, &cut, &ours).unwrap(), 2e-5);
    }

    #[test]
    fn rows(t in 1usize..9, n in 1usize..70, out in 1usize..40, mut seed in any::<u64>()) {
        let (x, w, m) = (random(&[t, n], &mut seed), random(&[n], &mut seed), random(&[out, n], &mut seed));
        assert_close(&cpu::rms_norm(&x, &w, 1e-5).unwrap(), &composed::rms_norm(&x, &w, 1e-5).unwrap(), 1e-5);
        assert_close(&cpu::linear(&x, &m, None).unwrap(), &composed::linear(&x, &m, None).unwrap(), 1e-5);
        let bias = random(&[out], &mut seed);
        assert_close(&cpu::linear(&x, &m, Some(&bias)).unwrap(), &composed::linear(&x, &m, Some(&bias)).unwrap(), 1e-5);
        let gate_up = (random(&[t, 2 * n], &mut seed) * 20.0).unwrap();
        assert_close(&cpu::silu_mul(&gate_up).unwrap(), &composed::silu_mul(&gate_up).unwrap(), 1e-5);
        let ids = Tensor::from_vec((0..t as u32).map(|i| i * 7 % out as u32).collect::<Vec<_>>(), t, &Device::Cpu).unwrap();
        assert_close(&cpu::embed(&m, &ids).unwrap(), &composed::embed(&m, &ids).unwrap(), 0.0);
    }

    #[test]
    fn argmax_takes_the_lowest_on_ties(values in prop::collection::vec(0u8..4, 6..120)) {
        let n = values.len() / 3;
        let rows: Vec<f32> = values[..3 * n].iter().map(|value| f32::from(*value) - 1.5).collect();
        let columns = Tensor::arange(0f32, n as f32, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let got = composed::argmax(&Tensor::from_vec(rows.clone(), (3, n), &Device::Cpu).unwrap(), &columns).unwrap();
        let want: Vec<u32> = rows.chunks(n).map(|row| row.iter().position(|x| row.iter().all(|y| y <= x)).unwrap() as u32).collect();
        prop_assert_eq!(got, want);
    }
}
