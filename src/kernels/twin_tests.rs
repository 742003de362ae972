//! Every CPU kernel against candle's operations, on random shapes: one body runs on both backends. And each row against itself alone, to the bit.

use std::sync::Arc;

use candle_core::{DType, Device};
use proptest::prelude::*;

use super::candle::{Bounds, Candle};
use super::cpu::Cpu;
use super::testing::{TestMatrix, plain_attention, read, write};
use super::*;

/// Numbers in `[-1, 1)`.
pub(crate) fn random(n: usize, seed: &mut u64) -> Vec<f32> {
    let mut next = || {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*seed >> 40) as f32 / (1u32 << 24) as f32 * 2.0 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

#[track_caller]
pub(crate) fn assert_close(ours: &[f32], theirs: &[f32], tolerance: f32, what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!((a - b).abs() <= tolerance * (1.0 + b.abs()), "{what}, value {i}: {a} {b}");
    }
}

/// A step: rows of the given (context, len), each with its own blocks.
pub(crate) struct Step {
    pub positions: Vec<u32>,
    pub slots: Vec<u32>,
    pub rows: Vec<BatchRow>,
    pub blocks: usize,
}

pub(crate) fn step(rows: &[(usize, usize)], block_size: usize) -> Step {
    let (mut start, mut next) = (0, 0u32);
    let mut step = Step { positions: vec![], slots: vec![], rows: vec![], blocks: 0 };
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
    step.blocks = next as usize;
    step
}

/// What attention is tried on.
pub(crate) struct Case<'a> {
    pub attention: AttentionSpec,
    pub ropes: &'a [RopeTable],
    pub q_norm: Vec<f32>,
    pub k_norm: Vec<f32>,
    pub sinks: Option<Vec<f32>>,
    pub block_size: usize,
    /// Of every slot of the cache, as earlier steps left it.
    pub earlier: Vec<f32>,
}

impl Case<'_> {
    fn weights<B: Backend>(&self, backend: &B) -> AttentionWeights<B::Vector> {
        let vector = |values: &Vec<f32>| backend.vector(values.clone()).unwrap();
        let norms = self.attention.qk_norm.is_some();
        AttentionWeights {
            q_norm: norms.then(|| vector(&self.q_norm)),
            k_norm: norms.then(|| vector(&self.k_norm)),
            sinks: self.sinks.as_ref().map(vector),
        }
    }

    /// Stores keys and values of every slot, each as if it was computed at the position of its number.
    pub fn filled_cache<B: Backend>(&self, backend: &mut B, blocks: usize) -> B::KvCache {
        self.filled_cache_of(backend, blocks, None)
    }

    /// The same in a cache of another type.
    fn filled_cache_of<B: Backend>(&self, backend: &mut B, blocks: usize, dtype: Option<KvDtype>) -> B::KvCache {
        let (all, weights) = (blocks * self.block_size, self.weights(backend));
        let shape = KvShape { dtype, ..self.attention.kv_shape(blocks, self.block_size) };
        let mut cache = backend.kv_cache(shape).unwrap();
        let everywhere: Vec<u32> = (0..all as u32).collect();
        let rows = [BatchRow { start: 0, len: all, context: all, blocks: Arc::new((0..blocks as u32).collect()) }];
        let mut qkv = write(backend, &self.earlier, self.attention.qkv_width());
        backend
            .begin(&Batch {
                tokens: &everywhere,
                positions: &everywhere,
                slots: &everywhere,
                types: &[],
                rows: &rows,
                ropes: self.ropes,
                states: &Default::default(),
            })
            .unwrap();
        backend.rope_and_store(&mut qkv, &self.attention, &weights, &mut cache).unwrap();
        cache
    }

    /// Queries after rope, and what attention gives, of a step.
    pub fn run<B: Backend>(
        &self,
        backend: &mut B,
        cache: &mut B::KvCache,
        rows: &[BatchRow],
        (positions, slots): (&[u32], &[u32]),
        x: &[f32],
    ) -> (Vec<f32>, Vec<f32>) {
        let (weights, width) = (self.weights(backend), self.attention.qkv_width());
        let mut qkv = write(backend, x, width);
        backend
            .begin(&Batch { tokens: positions, positions, slots, types: &[], rows, ropes: self.ropes, states: &Default::default() })
            .unwrap();
        backend.rope_and_store(&mut qkv, &self.attention, &weights, cache).unwrap();
        let mut out = backend.buffer(positions.len(), self.attention.q_width()).unwrap();
        backend.attend(&qkv, &self.attention, &weights, cache, &mut out).unwrap();
        let q = read(backend, &mut qkv);
        let width = q.len() / positions.len();
        let q = q.chunks_exact(width).flat_map(|row| row[..self.attention.q_width()].to_vec()).collect();
        backend.end();
        (q, read(backend, &mut out))
    }
}

pub(crate) fn cpu(max_tokens: usize, widest: usize, attention: &[AttentionSpec], block_size: usize, threads: usize) -> Cpu {
    let limits =
        StepLimits { max_tokens, max_logits: 1, widest, block_size, attention: attention.to_vec(), frequencies: 64, experts: None };
    Cpu::new(&limits, threads, ComputeDtype::F32).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Rope, norms of queries and keys, and attention of every kind, for random rows; then the same tokens one at a time, to the bit.
    #[test]
    fn attention_and_rope(
        contexts in prop::collection::vec((1usize..70, 1usize..20), 1..7), kv in 1usize..4, group in 1usize..14,
        d in prop::sample::select(vec![4usize, 8, 10, 16, 32, 64, 72]), block_size in prop::sample::select(vec![1usize, 4, 16, 20, 32, 48]),
        half in any::<bool>(), bounds in (1usize..3000, 1usize..20_000), long in 0usize..900, threads in 1usize..4,
        window in prop::option::of(1usize..400), soft_cap in prop::option::of(0.5f32..5.0), norm in 0usize..5, part in 0usize..3,
        has_sinks in any::<bool>(), causal in any::<bool>(), value_norm in any::<bool>(), grows in any::<bool>(), held in 0usize..5, mut seed in any::<u64>(),
    ) {
        let mut rows: Vec<(usize, usize)> = contexts.into_iter().map(|(context, len)| (context, len.min(context))).collect();
        rows[0].0 += long;
        let step = step(&rows, block_size);
        let heads = kv * group;
        let pairs = match part { 0 => 0, 1 => d / 2, _ => d / 4 };
        let pairing = if half { Pairing::Half } else { Pairing::Interleaved };
        let extent = if norm % 2 == 0 { NormExtent::Head } else { NormExtent::Token };
        let attention = AttentionSpec {
            causal,
            window,
            soft_cap,
            rope: (pairs > 0).then_some(Rope { table: 1, pairing }),
            qk_norm: (norm > 0).then_some(QkNorm { extent, after_rope: norm > 2, eps: 1e-5 }),
            value_norm: value_norm.then_some(1e-6),
            query_growth: grows.then_some(QueryGrowth { beta: 0.1, length: 16 }),
            ..plain_attention(heads, kv, d)
        };
        let norm_width = |heads: usize| if extent == NormExtent::Head { d } else { heads * d };
        let ropes = [
            RopeTable { frequencies: random(3, &mut seed), factor: 1.0 },
            RopeTable { frequencies: random(pairs, &mut seed), factor: 1.2 },
        ];
        let width = attention.qkv_width();
        let case = Case {
            attention,
            ropes: &ropes,
            q_norm: random(norm_width(heads), &mut seed),
            k_norm: random(norm_width(kv), &mut seed),
            sinks: has_sinks.then(|| random(heads, &mut seed)),
            block_size,
            earlier: random(step.blocks * block_size * width, &mut seed),
        };
        // candle has no int8; where a number lies between two of a type, both may round it differently.
        let dtype = [None, Some(KvDtype::F32), Some(KvDtype::F16), Some(KvDtype::Bf16), Some(KvDtype::Int8)][held];
        let of_candle = dtype.filter(|dtype| *dtype != KvDtype::Int8);
        let (near, result_near) = match dtype {
            None | Some(KvDtype::F32) => (2e-5, 5e-5),
            Some(KvDtype::F16) => (1e-3, 4e-3),
            Some(KvDtype::Bf16) => (8e-3, 3e-2),
            Some(KvDtype::Int8) => (4e-2, 8e-2),
        };
        let x = random(step.positions.len() * width, &mut seed);
        let places = (step.positions.as_slice(), step.slots.as_slice());

        let mut ours = cpu(step.blocks * block_size, width, &[attention], block_size, threads);
        let mut cache = case.filled_cache_of(&mut ours, step.blocks, dtype);
        let (our_q, attended) = case.run(&mut ours, &mut cache, &step.rows, places, &x);
        let mut theirs = Candle::new(&Device::Cpu);
        let mut tensors = case.filled_cache_of(&mut theirs, step.blocks, of_candle);
        let (q, expected) = case.run(&mut theirs, &mut tensors, &step.rows, places, &x);
        assert_close(&our_q, &q, 2e-5, "q");
        assert_close(&attended, &expected, result_near, "attended");
        for slot in &step.slots {
            for head in 0..kv {
                let (key, value) = cache.read(*slot as usize, head);
                let at = |cache: &candle_core::Tensor| {
                    let block = cache.get(*slot as usize / block_size).unwrap();
                    block.get(*slot as usize % block_size).unwrap().get(head).unwrap().to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap()
                };
                assert_close(&key, &at(&tensors.k), near, "key");
                assert_close(&value, &at(&tensors.v), near, "value");
            }
        }
        // Cut finely, too.
        theirs.bounds = Bounds { scores: bounds.0, gathered: bounds.1 };
        let (_, cut) = case.run(&mut theirs, &mut tensors, &step.rows, places, &x);
        assert_close(&attended, &cut, result_near, "cut finely");

        // Token by token, alone: the same bits, where no token sees a later one.
        if !causal {
            return Ok(());
        }
        let mut alone = cpu(1, width, &[attention], block_size, 1);
        for row in &step.rows {
            for i in 0..row.len {
                let at = row.start + i;
                let rows = [BatchRow { start: 0, len: 1, context: row.context - row.len + i + 1, blocks: row.blocks.clone() }];
                let places = (&step.positions[at..at + 1], &step.slots[at..at + 1]);
                let (_, one) = case.run(&mut alone, &mut cache, &rows, places, &x[at * width..(at + 1) * width]);
                prop_assert_eq!(&one[..], &attended[at * heads * d..(at + 1) * heads * d]);
            }
        }
    }

    #[test]
    fn rows(t in 1usize..30, hidden in 1usize..70, half in 1usize..40, vocab in 1usize..70, seed in any::<u64>()) {
        let ours = rows_on(&mut cpu(t.max(vocab), hidden.max(half), &[plain_attention(1, 1, 2)], 16, 2), t, hidden, half, vocab, seed);
        let theirs = rows_on(&mut Candle::new(&Device::Cpu), t, hidden, half, vocab, seed);
        for ((name, tolerance, ours), (_, _, theirs)) in ours.iter().zip(&theirs) {
            assert_close(ours, theirs, *tolerance, name);
        }
    }

    #[test]
    fn experts(t in 1usize..24, hidden in 1usize..40, inner in 1usize..30, count in 2usize..9, top_k in 1usize..4, fn_of in 0usize..3,
        biased in any::<bool>(), grouped in any::<bool>(), seed in any::<u64>(),
    ) {
        let groups = (grouped && count % 2 == 0).then_some(ExpertGroups { count: 2, keep: 1, best: 1 });
        let top_k = if groups.is_some() { top_k.min(count / 2) } else { top_k };
        let score = [RouterScore::Softmax, RouterScore::TopKSoftmax, RouterScore::Sigmoid][fn_of];
        let normalize = biased.then_some(Normalize { epsilon: 1e-20, least: 0.0 });
        let routing = RoutingSpec { experts: count, top_k: top_k.min(count), score, normalize, scale: 1.5, groups };
        let limits = ExpertLimits { hidden, intermediate: inner, experts: count, top_k };
        let limits = StepLimits { experts: Some(limits), ..limits_of(t, hidden.max(inner).max(count)) };
        let mut ours = Cpu::new(&limits, 2, ComputeDtype::F32).unwrap();
        let (all, _) = experts_on(&mut ours, routing, biased, t, hidden, inner, seed, None);
        let (expected, _) = experts_on(&mut Candle::new(&Device::Cpu), routing, biased, t, hidden, inner, seed, None);
        assert_close(&all, &expected, 3e-5, "experts");
        for row in 0..t {
            let (one, _) = experts_on(&mut ours, routing, biased, t, hidden, inner, seed, Some(row));
            prop_assert_eq!(&one[..], &all[row * hidden..(row + 1) * hidden], "row {} alone", row);
        }
    }
}

pub(crate) fn limits_of(max_tokens: usize, widest: usize) -> StepLimits {
    let attention = vec![plain_attention(1, 1, 2)];
    StepLimits { max_tokens, max_logits: 1, widest, block_size: 16, attention, frequencies: 1, experts: None }
}

/// The operations on rows, each with its tolerance and its result.
pub(crate) fn rows_on<B: Backend>(
    backend: &mut B,
    t: usize,
    hidden: usize,
    half: usize,
    vocab: usize,
    mut seed: u64,
) -> Vec<(&'static str, f32, Vec<f32>)> {
    rows_through(backend, [t, hidden, half, vocab], |n| random(n, &mut seed), read)
}

/// The same on numbers of the caller's, whose `read` is given every buffer that an operation has written, before the next one reads it.
pub(crate) fn rows_through<B: Backend>(
    backend: &mut B,
    [t, hidden, half, vocab]: [usize; 4],
    mut numbers: impl FnMut(usize) -> Vec<f32>,
    mut read: impl FnMut(&mut B, &mut B::Buffer) -> Vec<f32>,
) -> Vec<(&'static str, f32, Vec<f32>)> {
    let (x_values, weight, bias) = (numbers(t * hidden), numbers(hidden), numbers(hidden));
    let gate_up = TestMatrix::new(numbers(2 * half * hidden).into_iter().map(|x| x * 0.5).collect(), hidden);
    let (gate_bias, down, down_bias) = (numbers(2 * half), TestMatrix::new(numbers(hidden * half), half), numbers(hidden));
    let table = TestMatrix::new(numbers(vocab * hidden), hidden);
    let gate_row = TestMatrix::new(numbers(hidden), hidden);
    let mut results = Vec::new();

    let mut x = write(backend, &x_values, hidden);
    let tokens: Vec<u32> = (0..t as u32).map(|i| i * 7 % vocab as u32).collect();
    let row = BatchRow { start: 0, len: t, context: t, blocks: Arc::new(vec![0]) };
    let (rows, states) = ([row], Default::default());
    let batch = Batch { tokens: &tokens, positions: &tokens, slots: &tokens, types: &[], rows: &rows, ropes: &[], states: &states };
    backend.begin(&batch).unwrap();
    let table = table.linear(backend, Columns::Plain, None);
    let mut out = backend.buffer(t, hidden).unwrap();
    backend.embed(&table.weight, 1.0, &mut out).unwrap();
    results.push(("embed", 0.0, read(backend, &mut out)));
    // Whoever has read may have begun a step.
    backend.begin(&batch).unwrap();
    backend.embed(&table.weight, 3.5, &mut out).unwrap();
    results.push(("embed scaled", 1e-6, read(backend, &mut out)));
    let positions: Vec<u32> = (0..t as u32).map(|i| i % 3).collect();
    let types: Vec<u32> = (0..t as u32).map(|i| u32::from(i % 5 > 2)).collect();
    let row = BatchRow { start: 0, len: t, context: t, blocks: Arc::new(vec![0]) };
    let few = TestMatrix::new(numbers(6 * hidden), hidden).load(backend, None, Columns::Plain);
    for (types, tables) in [(&types[..], [TableRow::Position(2), TableRow::Type]), (&[], [TableRow::Type, TableRow::Position(3)])] {
        let (rows, states) = (std::slice::from_ref(&row), &Default::default());
        for of in tables {
            backend.begin(&Batch { tokens: &tokens, positions: &positions, slots: &tokens, types, rows, ropes: &[], states }).unwrap();
            backend.embed_add(&few, of, &mut out).unwrap();
            results.push(("embed added", 1e-6, read(backend, &mut out)));
        }
    }
    assert!(backend.embed_add(&few, TableRow::Position(6), &mut out).is_err(), "a row that is not there");

    for (name, kind) in [("rms norm", NormKind::Rms), ("layer norm", NormKind::Layer)] {
        let bias = (kind == NormKind::Layer).then(|| backend.vector(bias.clone()).unwrap());
        let norm = Norm { kind, weight: backend.vector(weight.clone()).unwrap(), bias, eps: 1e-3 };
        backend.norm(&x, &norm, &mut out).unwrap();
        results.push((name, 2e-5, read(backend, &mut out)));
        backend.norm_add(&x, &norm, 0.5, &mut out).unwrap();
        results.push((name, 4e-5, read(backend, &mut out)));
    }
    let mut inner = backend.buffer(t, 2 * half).unwrap();
    for bias in [None, Some(gate_bias.as_slice())] {
        for activation in
            [Activation::Silu, Activation::GeluTanh, Activation::Relu2, Activation::ClampedSwiglu, Activation::Gelu, Activation::Tanh]
        {
            let gated = gate_up.linear(backend, Columns::Gated, bias);
            backend.linear(&x, &gated, Epilogue::Gated(activation), &mut inner).unwrap();
            results.push(("gated", 2e-5, read(backend, &mut inner)));
            let plain = gate_up.linear(backend, Columns::Plain, bias);
            backend.linear(&x, &plain, Epilogue::Activate(activation), &mut inner).unwrap();
            results.push(("activated", 2e-5, read(backend, &mut inner)));
        }
    }
    let gated = gate_up.linear(backend, Columns::Gated, None);
    backend.linear(&x, &gated, Epilogue::Gated(Activation::Silu), &mut inner).unwrap();
    results.push(("gated", 2e-5, read(backend, &mut inner)));
    for (bias, factor) in [(None, 1.0), (Some(down_bias.as_slice()), 0.25)] {
        let down = down.linear(backend, Columns::Plain, bias);
        backend.linear(&inner, &down, Epilogue::Add(factor), &mut x).unwrap();
        results.push(("down", 5e-5, read(backend, &mut x)));
    }
    let picked: Vec<usize> = (0..t).step_by(2).collect();
    let mut means = backend.buffer(3, hidden).unwrap();
    let (mut some, mut logits) = (backend.buffer(t, hidden).unwrap(), backend.buffer(t, vocab).unwrap());
    backend.mean(&x, &[0..1, 0..t, t / 2..t], &mut means).unwrap();
    results.push(("means", 5e-5, read(backend, &mut means)));
    backend.pick(&x, &picked, &mut some).unwrap();
    backend.linear(&some, &table, Epilogue::Store, &mut logits).unwrap();
    results.push(("logits", 1e-4, read(backend, &mut logits)));
    backend.scale_and_cap(&mut logits, 0.5, Some(3.0)).unwrap();
    results.push(("logits with a cap", 1e-4, read(backend, &mut logits)));
    backend.scale_and_cap(&mut logits, 2.0, None).unwrap();
    results.push(("logits scaled", 1e-4, read(backend, &mut logits)));
    backend.copy(&x, &mut out).unwrap();
    results.push(("copy", 5e-5, read(backend, &mut out)));
    let mut gates = backend.buffer(t, 1).unwrap();
    let gate = gate_row.linear(backend, Columns::Plain, None);
    backend.linear(&x, &gate, Epilogue::Store, &mut gates).unwrap();
    results.push(("gates", 5e-5, read(backend, &mut gates)));
    backend.gate_rows(&gates, &mut out).unwrap();
    results.push(("gated rows", 5e-5, read(backend, &mut out)));
    let whole_row = write(backend, &x_values, hidden);
    backend.gate_rows(&whole_row, &mut out).unwrap();
    results.push(("gated numbers", 5e-5, read(backend, &mut out)));
    backend.scale(&mut out, 0.5).unwrap();
    results.push(("scaled", 5e-5, read(backend, &mut out)));
    results
}

/// The routed experts of every row, or of one of them alone; and the router's logits.
#[allow(clippy::too_many_arguments)]
pub(crate) fn experts_on<B: Backend>(
    backend: &mut B,
    routing: RoutingSpec,
    biased: bool,
    t: usize,
    hidden: usize,
    inner: usize,
    mut seed: u64,
    alone: Option<usize>,
) -> (Vec<f32>, Vec<f32>) {
    let mut numbers = |n: usize| random(n, &mut seed);
    let (x, before, logits) = (numbers(t * hidden), numbers(t * hidden), numbers(t * routing.experts));
    let choice_bias = numbers(routing.experts);
    let experts = (0..routing.experts).map(|_| {
        let (gate_up, bias) = (TestMatrix::new(numbers(2 * inner * hidden), hidden), numbers(2 * inner));
        let (down, down_bias) = (TestMatrix::new(numbers(hidden * inner), inner), numbers(hidden));
        Expert {
            gate_up: gate_up.linear(backend, Columns::Gated, biased.then_some(&bias[..])),
            down: down.linear(backend, Columns::Plain, biased.then_some(&down_bias[..])),
        }
    });
    let experts = experts.collect();
    let choice_bias = biased.then(|| backend.vector(choice_bias).unwrap());
    let experts = Experts { routing, choice_bias, activation: Activation::Silu, experts };
    let of = |values: &[f32], width: usize| alone.map_or(values.to_vec(), |row| values[row * width..(row + 1) * width].to_vec());
    let x = write(backend, &of(&x, hidden), hidden);
    let mut router = write(backend, &of(&logits, routing.experts), routing.experts);
    let mut out = write(backend, &of(&before, hidden), hidden);
    backend.experts(&x, &router, &experts, Epilogue::Add(0.5), &mut out).unwrap();
    let added = read(backend, &mut out);
    backend.experts(&x, &router, &experts, Epilogue::Store, &mut out).unwrap();
    let stored = read(backend, &mut out);
    for ((added, stored), before) in added.iter().zip(&stored).zip(of(&before, hidden)) {
        assert!((added - (before + 0.5 * stored)).abs() < 1e-4 * (1.0 + added.abs()), "{added} {before} {stored}");
    }
    (stored, read(backend, &mut router))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Panels and ggml's blocks hold the numbers that the encoders give and take the bytes that were planned; candle's arithmetic on its
    /// blocks is near to f32 on the same numbers.
    #[test]
    fn both_backends_hold_the_same_quantized_weights(
        n in 1usize..70, supers in 1usize..4, t in 1usize..20, four in any::<bool>(), mut seed in any::<u64>(),
    ) {
        let k = supers * quantize::SUPER_BLOCK;
        let format = if four { WeightFormat::Int4 } else { WeightFormat::Int8 };
        let matrix = TestMatrix::new(random(n * k, &mut seed), k);
        let read_row = |row: &[f32]| match format {
            WeightFormat::Int4 => quantize::row4(row).unwrap().dequantize(),
            _ => quantize::row8(row).unwrap().dequantize(),
        };
        let exact: Vec<Vec<f32>> = matrix.values.chunks_exact(k).map(read_row).collect();
        let ours = cpu(1, k, &[plain_attention(1, 1, 2)], 16, 1);
        let packed = matrix.load(&ours, Some(format), Columns::Plain);
        prop_assert_eq!((packed.format, packed.bytes()), Cpu::weight_bytes(n, k, false, Some(format), Columns::Plain));
        let mut row = vec![0.0; k];
        for (i, exact) in exact.iter().enumerate() {
            packed.row(i, &mut row);
            prop_assert_eq!(&row, exact);
        }
        let mut theirs = Candle::new(&Device::Cpu);
        let weight = matrix.load(&theirs, Some(format), Columns::Plain);
        let candle::Matrix::Blocks(blocks) = &weight else { unreachable!() };
        prop_assert_eq!(blocks.storage_size_in_bytes(), Candle::weight_bytes(n, k, false, Some(format), Columns::Plain).1);
        prop_assert_eq!(blocks.dequantize(&Device::Cpu).unwrap().to_vec2::<f32>().unwrap(), exact.clone());
        let x = random(t * k, &mut seed);
        let mut out = theirs.buffer(t, n).unwrap();
        let buffer = write(&mut theirs, &x, k);
        theirs.linear(&buffer, &Linear { weight, bias: None }, Epilogue::Store, &mut out).unwrap();
        // Activations are rounded to 1/127 of the largest of 256, each by half a step at most and in a random direction.
        let tolerance = 4.0 * (k as f32).sqrt() / 254.0;
        let got = read(&mut theirs, &mut out);
        for (got, x) in got.chunks_exact(n).zip(x.chunks_exact(k)) {
            for (got, weights) in got.iter().zip(&exact) {
                let want: f32 = weights.iter().zip(x).map(|(w, x)| w * x).sum();
                prop_assert!((got - want).abs() < tolerance, "{} {}", got, want);
            }
        }
    }
}

#[test]
fn what_does_not_belong_together_is_an_error() {
    let mut backend = cpu(4, 8, &[plain_attention(1, 1, 2)], 16, 1);
    let x = write(&mut backend, &[1.0; 8], 4);
    let matrix = TestMatrix::new(vec![1.0; 8], 4);
    let gated = matrix.linear(&backend, Columns::Gated, None);
    let mut out = backend.buffer(4, 2).unwrap();
    assert!(backend.linear(&x, &gated, Epilogue::Store, &mut out).is_err(), "gates are not a sum");
    let plain = matrix.linear(&backend, Columns::Plain, None);
    assert!(backend.linear(&x, &plain, Epilogue::Gated(Activation::Silu), &mut out).is_err());
    assert!(backend.linear(&out, &plain, Epilogue::Store, &mut backend.buffer(4, 2).unwrap()).is_err(), "another width");
    assert!(backend.pick(&x, &[2], &mut out).is_err(), "a row that is not there");
}

/// An operation with a state: its inputs by position, and how it is called.
struct Stateful<B: Backend, F> {
    /// Each `[TEXT, width]`.
    inputs: Vec<(Vec<f32>, usize)>,
    state_width: usize,
    out_width: usize,
    run: F,
    backend: std::marker::PhantomData<B>,
}

impl<B: Backend, F: Fn(&mut B, &mut [B::Buffer], &mut B::State, &mut B::Buffer)> Stateful<B, F> {
    fn new(inputs: Vec<(Vec<f32>, usize)>, state_width: usize, out_width: usize, run: F) -> Self {
        Self { inputs, state_width, out_width, run, backend: std::marker::PhantomData }
    }

    /// What it gives for steps one after another, and then for one more token behind every slot: whatever is in the slots shows there.
    fn run(&self, backend: &mut B, steps: &[StateStep]) -> (Vec<f32>, Vec<f32>) {
        let mut state = backend.state(StateStep::SLOTS, self.state_width).unwrap();
        let mut one = |step: &StateStep| {
            let (mut inputs, mut out) = step.begin(backend, &self.inputs, self.out_width);
            backend.copy_states(&mut state).unwrap();
            (self.run)(backend, &mut inputs, &mut state, &mut out);
            read(backend, &mut out)
        };
        let all = steps.iter().flat_map(&mut one).collect();
        (all, one(&StateStep::of_all_slots()))
    }
}

pub(crate) fn convolved_on<B: Backend>(
    backend: &mut B,
    spec: ConvSpec,
    bias: bool,
    steps: &[StateStep],
    mut seed: u64,
) -> (Vec<f32>, Vec<f32>) {
    let mut numbers = |n: usize| random(n, &mut seed);
    let weight = backend.vector(numbers(spec.channels * spec.kernel)).unwrap();
    let vector = backend.vector(numbers(spec.channels)).unwrap();
    let conv = CausalConv { spec, weight, bias: bias.then_some(vector) };
    let inputs = vec![(numbers(TEXT * spec.input_width()), spec.input_width())];
    let run = |backend: &mut B, x: &mut [B::Buffer], state: &mut B::State, out: &mut B::Buffer| {
        backend.causal_conv(&x[0], &conv, state, out).unwrap();
    };
    Stateful::new(inputs, spec.state_width(), spec.channels, run).run(backend, steps)
}

pub(crate) fn delta_on<B: Backend>(backend: &mut B, spec: DeltaSpec, steps: &[StateStep], mut seed: u64) -> (Vec<f32>, Vec<f32>) {
    let mut numbers = |n: usize| random(n, &mut seed);
    let decay = backend.vector(numbers(spec.value_heads).into_iter().map(|x| x.abs() * 3.0).collect()).unwrap();
    let decay_bias = backend.vector(numbers(spec.value_heads)).unwrap();
    let norm = backend.vector(numbers(spec.value_dim)).unwrap();
    let delta = GatedDelta { spec, decay, decay_bias, norm };
    let inputs = [spec.qkv_width(), 2 * spec.value_heads, spec.value_width()].map(|width| (numbers(TEXT * width), width)).to_vec();
    let run = |backend: &mut B, x: &mut [B::Buffer], state: &mut B::State, out: &mut B::Buffer| {
        let [qkv, gates, z] = x else { unreachable!() };
        backend.gated_delta(qkv, gates, z, &delta, state, out).unwrap();
    };
    Stateful::new(inputs, spec.state_width(), spec.value_width(), run).run(backend, steps)
}

/// Queries, key and value of latent attention, and the products for each head around it.
pub(crate) fn latent_on<B: Backend>(backend: &mut B, spec: LatentSpec, t: usize, mut seed: u64) -> [Vec<f32>; 2] {
    let mut numbers = |n: usize| random(n, &mut seed);
    let LatentSpec { heads, nope_dim, rope_dim, rank, .. } = spec;
    let (q_width, norm) = (heads * (nope_dim + rope_dim), numbers(rank));
    let matrices = (0..heads).map(|_| TestMatrix::new(numbers(rank * nope_dim), nope_dim).linear(backend, Columns::Plain, None));
    let matrices: Vec<_> = matrices.collect();
    let norm = backend.vector(norm).unwrap();
    let (q, latent) = (numbers(t * q_width), numbers(t * spec.head_dim()));
    let (q, latent) = (write(backend, &q, q_width), write(backend, &latent, spec.head_dim()));
    let buffer = |width: usize| backend.buffer(t, width).unwrap();
    let (mut absorbed, mut rows, mut scratch) =
        (buffer(heads * rank), buffer((heads + 2) * spec.head_dim()), [buffer(nope_dim.max(rank)), buffer(nope_dim.max(rank))]);
    let columns = HeadColumns { first: 0, stride: nope_dim + rope_dim };
    backend.linear_heads(&q, columns, &matrices, &mut scratch, &mut absorbed).unwrap();
    backend.latent_rows(&q, &absorbed, &latent, &spec, &norm, &mut rows).unwrap();
    [read(backend, &mut absorbed), read(backend, &mut rows)]
}

/// Tokens of the one text that all sequences of these tests begin with.
pub(crate) const TEXT: usize = 40;

/// One step of sequences that keep states.
pub(crate) struct StateStep {
    /// Of each row the tokens before it, and its own.
    rows: Vec<(usize, usize)>,
    states: StepStates,
}

impl StateStep {
    const SLOTS: usize = 8;

    /// A row of one sequence, from the slot 0 on or from another; `extra` states are kept before the last one, which goes to the slot 0.
    pub(crate) fn row(known: usize, len: usize, extra: &[(usize, u32)]) -> Self {
        let mut saves: Vec<StateSave> = extra.iter().map(|(seen, slot)| StateSave { token: *seen as u32 - 1, slot: *slot }).collect();
        saves.push(StateSave { token: len as u32 - 1, slot: 0 });
        saves.sort_by_key(|save| save.token);
        Self { rows: vec![(known, len)], states: StepStates { copies: vec![], slots: vec![0], saves } }
    }

    /// One more token behind the state of every slot.
    fn of_all_slots() -> Self {
        let slots = (0..Self::SLOTS as u32).collect();
        Self { rows: vec![(TEXT - 1, 1); Self::SLOTS], states: StepStates { copies: vec![], slots, saves: vec![] } }
    }

    /// The step's inputs, cut from those of the text, and room for its outputs.
    fn begin<B: Backend>(&self, backend: &mut B, inputs: &[(Vec<f32>, usize)], out: usize) -> (Vec<B::Buffer>, B::Buffer) {
        let positions: Vec<u32> = self.rows.iter().flat_map(|(known, len)| *known as u32..(known + len) as u32).collect();
        let (mut rows, mut start) = (Vec::new(), 0);
        for (known, len) in &self.rows {
            rows.push(BatchRow { start, len: *len, context: known + len, blocks: Arc::new(vec![0]) });
            start += len;
        }
        let cut = |(values, width): &(Vec<f32>, usize)| {
            let values: Vec<f32> =
                positions.iter().flat_map(|at| &values[*at as usize * width..(*at as usize + 1) * width]).copied().collect();
            write(backend, &values, *width)
        };
        let x = inputs.iter().map(cut).collect();
        let states = &self.states;
        let batch = Batch { tokens: &positions, positions: &positions, slots: &positions, types: &[], rows: &rows, ropes: &[], states };
        backend.begin(&batch).unwrap();
        (x, backend.buffer(positions.len(), out).unwrap())
    }
}

/// A text in one piece; in chunks of these lengths; and the last chunk copied to another slot and gone on from there.
pub(crate) fn state_steps(cuts: &[usize], kept: (usize, usize)) -> [Vec<StateStep>; 3] {
    let mut ends: Vec<usize> = cuts.iter().copied().chain([TEXT - 1]).collect();
    ends.sort_unstable();
    ends.dedup();
    let starts = std::iter::once(0).chain(ends.iter().copied());
    let pieces: Vec<(usize, usize)> = starts.zip(&ends).map(|(from, to)| (from, to - from)).filter(|(_, len)| *len > 0).collect();
    // States inside the first piece, too, as for draft tokens and for the prefix cache.
    let (first, second) = (kept.0.min(pieces[0].1 - 1), kept.1.min(pieces[0].1 - 1));
    let extra: Vec<(usize, u32)> = [(first, 5), (second, 6)].into_iter().filter(|(seen, _)| *seen > 0).collect();
    let chunks = || pieces.iter().map(|(known, len)| StateStep::row(*known, *len, if *known == 0 { &extra } else { &[] }));
    let mut copied: Vec<StateStep> = chunks().collect();
    for step in &mut copied[1..] {
        // The sequence changes to the slot 3, which is another's afterwards, and back.
        step.states.copies = vec![(0, 3), (6, 4), (3, 0), (4, 6)];
    }
    [vec![StateStep::row(0, TEXT - 1, &extra)], chunks().collect(), copied]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn causal_convolutions(
        channels in 1usize..70, kernel in 2usize..6, is_gated in any::<bool>(), bias in any::<bool>(), cuts in prop::collection::vec(1usize..TEXT, 0..6),
        kept in (0usize..TEXT, 0usize..TEXT), seed in any::<u64>(),
    ) {
        let spec = ConvSpec { channels, kernel, kind: if is_gated { ConvKind::Gated } else { ConvKind::Silu } };
        let [whole, chunks, copied] = state_steps(&cuts, kept);
        let mut ours = Cpu::new(&limits_of(TEXT, spec.input_width()), 2, ComputeDtype::F32).unwrap();
        let (all, states) = convolved_on(&mut ours, spec, bias, &whole, seed);
        let theirs = convolved_on(&mut Candle::new(&Device::Cpu), spec, bias, &chunks, seed);
        assert_close(&all, &theirs.0, 2e-5, "convolved");
        let in_chunks = convolved_on(&mut ours, spec, bias, &chunks, seed);
        prop_assert_eq!(&in_chunks.0, &all);
        assert_close(&in_chunks.1, &theirs.1, 2e-5, "states");
        prop_assert_eq!(&convolved_on(&mut ours, spec, bias, &copied, seed).0, &all);
        if cuts.is_empty() {
            prop_assert_eq!(&in_chunks.1, &states);
        }
    }

    #[test]
    fn gated_deltas(
        key_heads in 1usize..4, group in 1usize..4, key_dim in 1usize..24, value_dim in 1usize..40, cuts in prop::collection::vec(1usize..TEXT, 0..6),
        kept in (0usize..TEXT, 0usize..TEXT), seed in any::<u64>(),
    ) {
        let spec = DeltaSpec { key_heads, value_heads: key_heads * group, key_dim, value_dim, eps: 1e-5 };
        let [whole, chunks, copied] = state_steps(&cuts, kept);
        let mut ours = Cpu::new(&limits_of(TEXT, spec.qkv_width()), 2, ComputeDtype::F32).unwrap();
        let (all, _) = delta_on(&mut ours, spec, &whole, seed);
        let theirs = delta_on(&mut Candle::new(&Device::Cpu), spec, &chunks, seed);
        assert_close(&all, &theirs.0, 1e-3, "gated delta");
        let in_chunks = delta_on(&mut ours, spec, &chunks, seed);
        prop_assert_eq!(&in_chunks.0, &all);
        assert_close(&in_chunks.1, &theirs.1, 1e-3, "states");
        prop_assert_eq!(&delta_on(&mut ours, spec, &copied, seed).0, &all);
    }

    #[test]
    fn latent_rows(
        heads in 1usize..6, nope_dim in 1usize..20, half_rope in 1usize..6, rank in 1usize..30, t in 1usize..20, seed in any::<u64>(),
    ) {
        let spec = LatentSpec { heads, nope_dim, rope_dim: 2 * half_rope, rank, eps: 1e-6 };
        let mut ours = Cpu::new(&limits_of(t, 256), 2, ComputeDtype::F32).unwrap();
        let ours = latent_on(&mut ours, spec, t, seed);
        let theirs = latent_on(&mut Candle::new(&Device::Cpu), spec, t, seed);
        assert_close(&ours[0], &theirs[0], 2e-5, "absorbed");
        assert_close(&ours[1], &theirs[1], 2e-5, "rows");
    }
}
