//! Each kernel against its CPU twin, on random and odd shapes, in three orders of threads. In f32 the bodies of [`crate::twin_tests`] run on
//! both; what there is for bf16 alone is compared on numbers that bf16 holds exactly.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use super::backend::{self, Choices, Dtype};
use super::emulator::{Emulator, Memory, ORDERS};
use crate::cpu::Cpu;
use crate::testing::{TestMatrix, plain_attention, read, write, write_over};
use crate::twin_tests::{Case, assert_close, cpu, experts_on, limits_of, random, rows_on, rows_through, step};
use crate::*;

mod faults;
mod logits;
mod products;
mod roofline;
mod self_check;
mod states;

/// The kernels on this machine's processor.
pub type Cuda = backend::Cuda<&'static Emulator>;

/// Numbers as memory of a type.
pub fn memory(emulator: &Emulator, dtype: Dtype, values: &[f32], name: &'static std::ffi::CStr) -> Memory {
    match dtype {
        Dtype::F32 => Memory::of(emulator, values, name),
        Dtype::Bf16 => Memory::of(emulator, &values.iter().map(|value| half::bf16::from_f32(*value)).collect::<Vec<_>>(), name),
    }
}

/// Random choices, repeatable by their seed.
pub struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }

    pub fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    pub fn one_of<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    pub fn flip(&mut self) -> bool {
        self.below(2) == 1
    }

    /// Numbers in `[-1, 1)` that bf16 holds exactly.
    pub fn numbers(&mut self, n: usize) -> Vec<f32> {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        random(n, &mut self.0).into_iter().map(|x| half::bf16::from_f32(x).to_f32()).collect()
    }
}

/// Runs `body` for each seed in each order of threads; nothing where there is no C++ compiler, which is said.
#[track_caller]
pub fn in_every_order(seeds: std::ops::Range<u64>, body: impl Fn(&'static Emulator, &mut Dice)) {
    let Some(emulator) = Emulator::here() else { return };
    for seed in seeds {
        for order in ORDERS {
            emulator.set_order(order);
            // Seen where the body fails.
            eprintln!("seed {seed}, {order:?}");
            body(emulator, &mut Dice(seed.wrapping_mul(0xD134_2543_DE82_EF95) + 1));
        }
    }
}

/// What `handler-tests/run` reads: whether these tests ran or were passed over.
#[test]
fn the_kernels_are_built_where_a_compiler_is() {
    println!(
        "cuda kernels: {}",
        if Emulator::here().is_some() { "tested" } else { "not tested, no C++ compiler; on Debian and Ubuntu: apt-get install g++" }
    );
}

#[test]
fn rows() {
    in_every_order(0..8, |emulator, dice| {
        let (t, hidden, half, vocab) =
            (dice.between(1, 12), dice.one_of(&[1, 5, 8, 24, 40, 64, 70]), dice.between(1, 20), dice.between(1, 40));
        let theirs =
            rows_on(&mut cpu(t.max(vocab).max(3), hidden.max(half), &[plain_attention(1, 1, 2)], 16, 2), t, hidden, half, vocab, dice.0);
        let ours = rows_on(&mut Cuda::new(emulator, Dtype::F32), t, hidden, half, vocab, dice.0);
        for ((name, tolerance, theirs), (_, _, ours)) in theirs.iter().zip(&ours) {
            assert_close(ours, theirs, *tolerance, name);
        }
    });
}

/// Each operation in bf16 on the very numbers that its twin is given: its result is rounded once, to 8 significant bits, which moves a number
/// v by |v|·2⁻⁸ at most. (No such bound holds of many operations one
/// after another: what is rounded first is multiplied and summed by those that follow.)
#[test]
fn rows_in_bf16() {
    in_every_order(0..12, |emulator, dice| {
        let shape @ [t, hidden, half, vocab] =
            [dice.between(1, 12), dice.one_of(&[1, 5, 8, 24, 40, 64, 70]), dice.between(1, 20), dice.between(1, 40)];
        let mut same = Dice(dice.0);
        let ours = rows_through(&mut Cuda::new(emulator, Dtype::Bf16), shape, |n| dice.numbers(n), read);
        let mut twin = cpu(t.max(vocab).max(3), hidden.max(half), &[plain_attention(1, 1, 2)], 16, 2);
        let mut at = 0;
        let theirs = rows_through(
            &mut twin,
            shape,
            |n| same.numbers(n),
            |twin, buffer| {
                let (rows, wanted) = (AtomicUsize::new(0), read(twin, buffer));
                twin.each_row(buffer, &|_, _| {
                    rows.fetch_add(1, Relaxed);
                })
                .unwrap();
                write_over(twin, &ours[at].2, wanted.len() / rows.into_inner(), buffer);
                at += 1;
                wanted
            },
        );
        for ((name, tolerance, theirs), (_, _, ours)) in theirs.iter().zip(&ours) {
            assert_eq!(theirs.len(), ours.len(), "{name}");
            for (i, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                let bound = theirs.abs() / 256.0 + tolerance * (1.0 + theirs.abs());
                assert!((ours - theirs).abs() <= bound, "{name}, value {i} of {shape:?}: {ours} {theirs}");
            }
        }
    });
}

/// Beyond the limit on either side, which random sums do not reach.
#[test]
fn clamped_gates() {
    fn gated<B: Backend>(mut backend: B) -> Vec<f32> {
        let x = write(&mut backend, &[20.0, -20.0, 3.0, 7.5], 1);
        let matrix = TestMatrix::new(vec![1.0, 1.0, -0.25, 1.0, -1.0, 0.5], 1).linear(&backend, Columns::Gated, None);
        let mut out = backend.buffer(4, 3).unwrap();
        backend.linear(&x, &matrix, Epilogue::Gated(Activation::ClampedSwiglu), &mut out).unwrap();
        read(&mut backend, &mut out)
    }
    in_every_order(0..1, |emulator, _| {
        let wanted = gated(cpu(4, 6, &[plain_attention(1, 1, 2)], 16, 1));
        assert_close(&gated(Cuda::new(emulator, Dtype::F32)), &wanted, 1e-5, "gated");
    });
}

/// A pass that adds a branch, normalized or not, and normalizes the sum for the next one, at widths with whole vectors and without.
#[test]
fn norms_with_what_surrounds_them() {
    in_every_order(0..6, |emulator, dice| {
        let (t, width) = (dice.between(1, 4), dice.one_of(&[7, 64, 200, 520, 1024, 1032]));
        let (x, before, first, second) = (dice.numbers(t * width), dice.numbers(t * width), dice.numbers(width), dice.numbers(width));
        let (normed, dtype) = (dice.flip(), dice.one_of(&[Dtype::F32, Dtype::Bf16]));
        let norm = |weight| Norm { kind: NormKind::Rms, weight, bias: None, eps: 1e-5 };
        let mut twin = cpu(t, width, &[plain_attention(1, 1, 2)], 16, 1);
        let (branch, mut sum) = (write(&mut twin, &x, width), write(&mut twin, &before, width));
        let mut wanted = twin.buffer(t, width).unwrap();
        if normed {
            twin.norm_add(&branch, &norm(first.clone()), 0.5, &mut sum).unwrap();
        } else {
            let added: Vec<f32> = before.iter().zip(&x).map(|(before, x)| before + 0.5 * x).collect();
            sum = write(&mut twin, &added, width);
        }
        twin.norm(&sum, &norm(second.clone()), &mut wanted).unwrap();

        let mut ours = Cuda::new(emulator, dtype);
        let (branch, mut residual) = (write(&mut ours, &x, width), write(&mut ours, &before, width));
        let (first, second) = (ours.vector(first).unwrap(), ours.vector(second).unwrap());
        let of = |weight: &Memory, there: bool| super::functions::NormOf {
            weight: if there { weight.ptr() } else { std::ptr::null() },
            bias: std::ptr::null(),
            epsilon: 1e-5,
            is_layer: 0,
        };
        let mut out = ours.buffer(t, width).unwrap();
        ours.norms(&branch, of(&first, normed), Some(&mut residual), 0.5, of(&second, true), Some(&mut out)).unwrap();
        let tolerance = if dtype == Dtype::F32 { 2e-5 } else { 0.012 };
        assert_close(&read(&mut ours, &mut residual), &read(&mut twin, &mut sum), tolerance, "sum");
        assert_close(&read(&mut ours, &mut out), &read(&mut twin, &mut wanted), tolerance, "out");
    });
}

/// Attention of every kind for random rows; returns what was asked for.
fn attention_case(dice: &mut Dice, sizes: &[usize], most: usize) -> (AttentionSpec, Vec<(usize, usize)>, usize) {
    let d = dice.one_of(sizes);
    let (kv, group) = if d > 256 { (1, dice.one_of(&[3, 8, 35])) } else { (dice.between(1, 2), dice.one_of(&[1, 2, 3, 4, 5, 8])) };
    let mut row = |_| {
        let context = dice.between(1, most);
        (context, dice.between(1, 9).min(context))
    };
    let rows: Vec<(usize, usize)> = [0; 3].map(&mut row).to_vec();
    let rows = rows[..dice.between(1, 3)].to_vec();
    let pairs = dice.one_of(&[0, d / 2, d / 4]);
    let extent = dice.one_of(&[NormExtent::Head, NormExtent::Token]);
    let spec = AttentionSpec {
        causal: dice.below(3) > 0,
        window: Some(dice.between(1, 50)).filter(|_| dice.flip()),
        soft_cap: dice.flip().then_some(2.5),
        rope: (pairs > 0).then_some(Rope { table: 1, pairing: dice.one_of(&[Pairing::Half, Pairing::Interleaved]) }),
        qk_norm: Some(QkNorm { extent, after_rope: dice.flip(), eps: 1e-5 }).filter(|_| dice.flip()),
        value_norm: dice.flip().then_some(1e-6),
        query_growth: dice.flip().then_some(QueryGrowth { beta: 0.1, length: 16 }),
        ..plain_attention(kv * group, kv, d)
    };
    (spec, rows, pairs)
}

fn attention_on(emulator: &'static Emulator, dice: &mut Dice, dtype: Dtype, sizes: &[usize], most: usize, tolerance: f32) {
    let (attention, rows, pairs) = attention_case(dice, sizes, most);
    let block_size = dice.one_of(&[1, 4, 16, 20, 32]);
    let step = step(&rows, block_size);
    let (heads, kv, d) = (attention.heads, attention.kv_heads, attention.head_dim);
    let norm_width = |heads: usize| match attention.qk_norm {
        Some(QkNorm { extent: NormExtent::Token, .. }) => heads * d,
        _ => d,
    };
    let ropes = [RopeTable { frequencies: dice.numbers(3), factor: 1.0 }, RopeTable { frequencies: dice.numbers(pairs), factor: 1.2 }];
    let width = attention.qkv_width();
    let case = Case {
        attention,
        ropes: &ropes,
        q_norm: dice.numbers(norm_width(heads)),
        k_norm: dice.numbers(norm_width(kv)),
        sinks: dice.flip().then(|| dice.numbers(heads)),
        block_size,
        earlier: dice.numbers(step.blocks * block_size * width),
    };
    let x = dice.numbers(step.positions.len() * width);
    let places = (step.positions.as_slice(), step.slots.as_slice());
    let mut twin = cpu(step.blocks * block_size, width, &[attention], block_size, 1);
    let mut cache = case.filled_cache(&mut twin, step.blocks);
    let (q, wanted) = case.run(&mut twin, &mut cache, &step.rows, places, &x);
    let mut ours = Cuda::new(emulator, dtype);
    ours.choices = Choices { splits: Some(dice.between(1, 5)), ..Choices::default() };
    let mut pages = case.filled_cache(&mut ours, step.blocks);
    let (our_q, attended) = case.run(&mut ours, &mut pages, &step.rows, places, &x);
    assert_close(&our_q, &q, tolerance, "q");
    let stored = |memory: &Memory| dtype.read(&emulator, memory, step.blocks * block_size * kv * d).unwrap();
    let (keys, values) = (stored(&pages.keys), stored(&pages.values));
    for slot in step.slots {
        for head in 0..kv {
            let (key, value) = cache.read(slot as usize, head);
            let at = (slot as usize * kv + head) * d;
            assert_close(&keys[at..at + d], &key, tolerance, "key");
            assert_close(&values[at..at + d], &value, tolerance, "value");
        }
    }
    assert_close(&attended, &wanted, tolerance, &format!("attended, {attention:?} {rows:?} {:?}", ours.choices));
}

#[test]
fn rope_and_attention_by_token() {
    in_every_order(0..12, |emulator, dice| attention_on(emulator, dice, Dtype::F32, &[4, 8, 10, 16, 32, 40, 64, 72, 136], 60, 5e-5));
}

#[test]
fn rope_and_attention_by_token_in_bf16() {
    in_every_order(0..4, |emulator, dice| attention_on(emulator, dice, Dtype::Bf16, &[10, 16, 48], 60, 0.02));
}

/// As latent attention has them: heads wider than any lane holds at once, and many of them to a key, so that several blocks rotate a token.
#[test]
fn attention_over_wide_heads() {
    in_every_order(0..3, |emulator, dice| {
        let dtype = dice.one_of(&[Dtype::F32, Dtype::Bf16]);
        attention_on(emulator, dice, dtype, &[300, 576, 576], 40, if dtype == Dtype::F32 { 5e-5 } else { 0.02 });
    });
}

/// Growth, norms and caps make queries long, so that weights of bf16 show: the tolerance is that of 8 bits on values up to 1.
#[test]
fn attention_on_tensor_cores() {
    in_every_order(0..10, |emulator, dice| attention_on(emulator, dice, Dtype::Bf16, &[64, 64, 128], 150, 0.02));
    in_every_order(0..1, |emulator, dice| attention_on(emulator, dice, Dtype::Bf16, &[256], 80, 0.02));
}

#[test]
fn routed_experts() {
    in_every_order(0..6, |emulator, dice| {
        let (t, hidden, inner, count) =
            (dice.one_of(&[1, 9, 20, 150]), dice.one_of(&[8, 13, 40]), dice.one_of(&[7, 16, 24]), dice.between(2, 9));
        let (score, biased) = (dice.one_of(&[RouterScore::Softmax, RouterScore::TopKSoftmax, RouterScore::Sigmoid]), dice.flip());
        let groups = (dice.flip() && count % 2 == 0).then_some(ExpertGroups { count: 2, keep: 1, best: dice.between(1, count / 2) });
        let normalize = biased.then_some(Normalize { epsilon: 1e-20, least: 0.0 });
        let top_k = dice.between(1, 3).min(if groups.is_some() { count / 2 } else { count });
        let routing = RoutingSpec { experts: count, top_k, score, normalize, scale: 1.5, groups };
        let limits = ExpertLimits { hidden, intermediate: inner, experts: count, top_k };
        let limits = StepLimits { experts: Some(limits), ..limits_of(t, hidden.max(inner).max(count)) };
        let mut twin = Cpu::new(&limits, 2, ComputeDtype::F32).unwrap();
        let (wanted, _) = experts_on(&mut twin, routing, biased, t, hidden, inner, dice.0, None);
        let (got, _) = experts_on(&mut Cuda::new(emulator, Dtype::F32), routing, biased, t, hidden, inner, dice.0, None);
        assert_close(&got, &wanted, 3e-5, "experts");
    });
}

/// Of equal scores the lower expert is taken, and a sum runs in the order of experts: the same as on the CPU.
#[test]
fn equal_scores_go_to_the_lower_expert() {
    in_every_order(0..2, |emulator, dice| {
        let routing = RoutingSpec { experts: 40, top_k: 6, score: RouterScore::Sigmoid, normalize: None, scale: 1.0, groups: None };
        let logits: Vec<f32> = (0..3 * 40).map(|_| dice.below(4) as f32).collect();
        let mut ours = Cuda::new(emulator, Dtype::F32);
        // Expert e adds e + 1.
        let expert = |e: usize, ours: &Cuda| Expert {
            gate_up: TestMatrix::new(vec![1.0; 2], 1).linear(ours, Columns::Gated, None),
            down: TestMatrix::new(vec![(e + 1) as f32], 1).linear(ours, Columns::Plain, None),
        };
        let all = (0..40).map(|e| expert(e, &ours)).collect();
        let experts = Experts { routing, choice_bias: None, activation: Activation::Relu2, experts: all };
        let (x, router) = (write(&mut ours, &[1.0; 3], 1), write(&mut ours, &logits, 40));
        let mut out = ours.buffer(3, 1).unwrap();
        ours.experts(&x, &router, &experts, Epilogue::Store, &mut out).unwrap();
        let mut picked = Vec::new();
        for (row, got) in logits.chunks_exact(40).zip(read(&mut ours, &mut out)) {
            routing.route(row, None, &mut picked);
            picked.sort_by_key(|(expert, _)| *expert);
            let wanted: f32 = picked.iter().map(|(expert, weight)| weight * (*expert + 1) as f32).sum();
            assert!((got - wanted).abs() < 1e-4, "{got} {wanted}");
        }
    });
}

/// Of many experts in many groups, with equal scores among them, the same are picked as on the CPU.
#[test]
fn the_best_groups_are_kept() {
    in_every_order(0..4, |emulator, dice| {
        let (count, size) = (dice.one_of(&[4, 8, 40]), dice.one_of(&[1, 3, 8]));
        let keep = dice.between(1, count);
        let groups = Some(ExpertGroups { count, keep, best: dice.between(1, size) });
        let (experts, top_k) = (count * size, dice.between(1, (keep * size).min(6)));
        let routing = RoutingSpec { experts, top_k, score: RouterScore::Sigmoid, normalize: None, scale: 1.0, groups };
        let (bias, logits): (Vec<f32>, Vec<f32>) =
            ((0..experts).map(|_| dice.below(3) as f32 * 0.5).collect(), (0..3 * experts).map(|_| dice.below(3) as f32).collect());
        let mut ours = Cuda::new(emulator, Dtype::F32);
        let router = write(&mut ours, &logits, experts);
        let choice_bias = ours.vector(bias.clone()).unwrap();
        let picked = ours.picked_experts(&router, &routing, Some(&choice_bias)).unwrap();
        let mut wanted = Vec::new();
        for (row, picked) in logits.chunks_exact(experts).zip(picked.chunks_exact(top_k)) {
            routing.route(row, Some(&bias), &mut wanted);
            wanted.sort_by_key(|(expert, _)| *expert);
            let wanted: Vec<u32> = wanted.iter().map(|(expert, _)| *expert as u32).collect();
            assert_eq!(picked, wanted, "{routing:?}");
        }
    });
}

/// What is refused on the host, before a launch.
#[test]
fn what_does_not_belong_together_is_an_error() {
    in_every_order(0..1, |emulator, _| {
        let mut ours = Cuda::new(emulator, Dtype::F32);
        let x = write(&mut ours, &[1.0; 8], 4);
        let matrix = TestMatrix::new(vec![1.0; 8], 4);
        let mut out = ours.buffer(2, 2).unwrap();
        let gated = matrix.linear(&ours, Columns::Gated, None);
        assert!(ours.linear(&x, &gated, Epilogue::Store, &mut out).is_err());
        assert!(ours.pick(&x, &[2], &mut out).is_err());
        let row = BatchRow { start: 0, len: 1, context: 1, blocks: std::sync::Arc::new(vec![0]) };
        ours.begin(&Batch {
            tokens: &[2],
            positions: &[0],
            slots: &[4],
            types: &[],
            rows: &[row],
            ropes: &[],
            states: &Default::default(),
        })
        .unwrap();
        let table = matrix.load(&ours, None, Columns::Plain);
        assert!(ours.embed(&table, 1.0, &mut out).is_err(), "a token outside the vocabulary");
        let spec = plain_attention(1, 1, 4);
        let mut cache = ours.kv_cache(spec.kv_shape(1, 4)).unwrap();
        let mut qkv = write(&mut ours, &[1.0; 12], 12);
        let row = BatchRow { start: 0, len: 1, context: 1, blocks: std::sync::Arc::new(vec![0]) };
        ours.begin(&Batch {
            tokens: &[0],
            positions: &[0],
            slots: &[4],
            types: &[],
            rows: &[row],
            ropes: &[],
            states: &Default::default(),
        })
        .unwrap();
        assert!(ours.rope_and_store(&mut qkv, &spec, &AttentionWeights::default(), &mut cache).is_err(), "a slot outside the pool");
    });
}
