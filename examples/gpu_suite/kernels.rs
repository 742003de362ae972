//! A backend on the device, candle's operations or our own kernels, against the CPU kernels in f32, on random shapes: one body runs on all.
//!
//! Both sides see the same numbers: inputs are rounded to the type under test first. What is left is the rounding of results and of
//! what lies between, 2⁻⁹ of the value per rounding in bf16, which the tolerances below allow for a handful of roundings.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use worker_candle::kernels::candle::{self, Candle};
use worker_candle::kernels::cpu::{self, Cpu};
use worker_candle::kernels::testing::{TestMatrix, plain_attention, read, write};
use worker_candle::kernels::{
    Activation, AttentionSpec, AttentionWeights, Backend, Batch, BatchRow, Columns, ComputeDtype, Epilogue, Expert, ExpertLimits, Experts,
    Norm, NormExtent, NormKind, Normalize, Pairing, QkNorm, Rope, RopeTable, RouterScore, RoutingSpec, StepLimits,
};

use crate::Fail;
use crate::report::Part;

const CASES: usize = 40;
/// Two, so that work is shared out on the CPU, too.
const CPU_THREADS: usize = 2;

/// A small generator, the same everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    pub fn between(&mut self, from: usize, to: usize) -> usize {
        from + self.next() as usize % (to - from)
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.between(0, from.len())]
    }

    /// Numbers in `[-1, 1)`.
    fn numbers(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.next() & 0xff_ffff) as f32 / (1u32 << 23) as f32 - 1.0).collect()
    }

    /// Values in `[-1, 1)`, f32 on the CPU.
    pub fn tensor(&mut self, shape: &[usize]) -> Result<Tensor, Fail> {
        Ok(Tensor::from_vec(self.numbers(shape.iter().product()), shape, &Device::Cpu)?)
    }

    /// Numbers in `[-most, most)` that the type under test holds exactly.
    fn rounded(&mut self, n: usize, most: f32, dtype: DType) -> Vec<f32> {
        let round = |x: f32| if dtype == DType::BF16 { bf16::from_f32(x).to_f32() } else { x };
        self.numbers(n).into_iter().map(|x| round(x * most)).collect()
    }
}

/// How near a result must be to the CPU's.
#[derive(Debug, Clone, Copy)]
enum Nearness {
    /// To the bit.
    Same,
    /// But for the rounding of a rotation.
    Rotated,
    /// But for the rounding of a few operations.
    Near,
    /// But for the rounding of long sums.
    Sums,
}

impl Nearness {
    /// Of `1 + |expected|`.
    fn tolerance(self, dtype: DType) -> f64 {
        match (self, dtype) {
            (Self::Same, _) => 0.0,
            (Self::Rotated | Self::Near, DType::F32) => 2e-5,
            (Self::Sums, DType::F32) => 1e-4,
            (Self::Rotated, _) => 1e-2,
            (Self::Near | Self::Sums, _) => 2e-2,
        }
    }
}

/// What one operation gave on one backend.
struct Outcome {
    operation: &'static str,
    nearness: Nearness,
    values: Vec<f32>,
}

fn outcome(operation: &'static str, nearness: Nearness, values: Vec<f32>) -> Outcome {
    Outcome { operation, nearness, values }
}

/// One sequence whose tokens are `tokens`, at the positions from 0 on.
fn one_row(t: usize) -> BatchRow {
    BatchRow { start: 0, len: t, context: t, blocks: Arc::new(vec![0]) }
}

/// The inputs of the operations that take each row on its own.
struct RowsCase {
    tokens: Vec<u32>,
    hidden: usize,
    x: Vec<f32>,
    weight: Vec<f32>,
    /// The table of an embedding, too.
    matrix: TestMatrix,
    bias: Vec<f32>,
    gate_up: TestMatrix,
}

impl RowsCase {
    fn new(random: &mut Random, dtype: DType) -> Self {
        let (t, hidden, out) = (random.between(1, 40), random.pick(&[8, 70, 128, 1024]), random.between(1, 400));
        let inner = random.between(1, 200);
        Self {
            tokens: (0..t).map(|_| random.between(0, out) as u32).collect(),
            hidden,
            x: random.rounded(t * hidden, 1.0, dtype),
            weight: random.rounded(hidden, 1.0, dtype),
            matrix: TestMatrix::new(random.rounded(out * hidden, 1.0, dtype), hidden),
            bias: random.rounded(out, 1.0, dtype),
            // Gates of up to about 20, where the activation is steep and where it is flat.
            gate_up: TestMatrix::new(random.rounded(2 * inner * hidden, 20.0 / (hidden as f32).sqrt(), dtype), hidden),
        }
    }

    fn cpu(&self) -> Result<Cpu, Fail> {
        // The table goes through the backend as a matrix, and a step holds as many tokens as the table has rows.
        cpu_backend(self.tokens.len().max(self.matrix.rows), self.hidden, &[plain_attention(1, 1, 2)], 16, None)
    }

    fn run<B: Backend>(&self, backend: &mut B) -> Result<Vec<Outcome>, Fail> {
        let (t, tokens) = (self.tokens.len(), &self.tokens);
        let x = write(backend, &self.x, self.hidden);
        backend.begin(&Batch {
            tokens,
            positions: tokens,
            slots: tokens,
            types: &[],
            rows: &[one_row(t)],
            ropes: &[],
            states: &Default::default(),
        })?;
        let mut outcomes = Vec::new();

        let mut like_x = backend.buffer(t, self.hidden)?;
        let norm = Norm { kind: NormKind::Rms, weight: backend.vector(self.weight.clone())?, bias: None, eps: 1e-5 };
        backend.norm(&x, &norm, &mut like_x)?;
        outcomes.push(outcome("rms_norm", Nearness::Near, read(backend, &mut like_x)));

        let mut product = backend.buffer(t, self.matrix.rows)?;
        for (operation, bias) in [("linear", None), ("linear + bias", Some(self.bias.as_slice()))] {
            let linear = self.matrix.linear(backend, Columns::Plain, bias);
            backend.linear(&x, &linear, Epilogue::Store, &mut product)?;
            outcomes.push(outcome(operation, Nearness::Sums, read(backend, &mut product)));
        }

        let mut inner = backend.buffer(t, self.gate_up.rows)?;
        for (operation, activation) in [("gated by silu", Activation::Silu), ("gated by gelu", Activation::GeluTanh)] {
            let gate_up = self.gate_up.linear(backend, Columns::Gated, None);
            backend.linear(&x, &gate_up, Epilogue::Gated(activation), &mut inner)?;
            outcomes.push(outcome(operation, Nearness::Sums, read(backend, &mut inner)));
        }

        let table = self.matrix.load(backend, None, Columns::Plain);
        backend.embed(&table, 1.0, &mut like_x)?;
        outcomes.push(outcome("embed", Nearness::Same, read(backend, &mut like_x)));
        Ok(outcomes)
    }
}

/// The inputs of attention: a step, and a cache that earlier steps filled.
struct AttentionCase {
    /// What the outcomes are called: rope, keys, values, attention.
    names: [&'static str; 4],
    attention: AttentionSpec,
    ropes: [RopeTable; 1],
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
    sinks: Option<Vec<f32>>,
    block_size: usize,
    blocks: usize,
    positions: Vec<u32>,
    slots: Vec<u32>,
    rows: Vec<BatchRow>,
    qkv: Vec<f32>,
    /// Queries, keys and values of every slot of the cache, as earlier steps left them.
    earlier: Vec<f32>,
}

impl AttentionCase {
    /// As most models attend: rotated, over everything before.
    fn plain(random: &mut Random, dtype: DType) -> Self {
        let (d, kv, group) = (random.pick(&[4, 10, 32, 64, 128]), random.between(1, 4), random.between(1, 9));
        let block_size = random.pick(&[4usize, 16, 32]);
        let rows: Vec<(usize, usize)> = (0..random.between(1, 6))
            .map(|_| {
                let context = random.between(1, 300);
                (context, if random.next().is_multiple_of(2) { 1 } else { random.between(1, context + 1) })
            })
            .collect();
        let pairing = random.pick(&[Pairing::Interleaved, Pairing::Half]);
        let attention = AttentionSpec { rope: Some(Rope { table: 0, pairing }), ..plain_attention(kv * group, kv, d) };
        let mut case = Self {
            names: ["rope", "keys stored", "values stored", "paged_attention"],
            attention,
            ropes: [RopeTable { frequencies: random.numbers(d / 2), factor: 1.0 }],
            q_norm: Vec::new(),
            k_norm: Vec::new(),
            sinks: None,
            block_size,
            blocks: 0,
            positions: Vec::new(),
            slots: Vec::new(),
            rows: Vec::new(),
            qkv: Vec::new(),
            earlier: Vec::new(),
        };
        case.place(&rows);
        case.qkv = random.rounded(case.positions.len() * attention.qkv_width(), 1.0, dtype);
        case.earlier = random.rounded(case.blocks * block_size * attention.qkv_width(), 1.0, dtype);
        case
    }

    /// With the norms of queries and keys, window, soft cap and sinks that some families have.
    fn varied(random: &mut Random, dtype: DType) -> Self {
        let mut case = Self::plain(random, dtype);
        let attention = &mut case.attention;
        attention.window = Some(random.between(1, 200));
        attention.soft_cap = Some(2.0);
        attention.qk_norm = Some(QkNorm { extent: NormExtent::Head, after_rope: false, eps: 1e-6 });
        case.q_norm = random.rounded(attention.head_dim, 1.0, dtype);
        case.k_norm = random.rounded(attention.head_dim, 1.0, dtype);
        case.sinks = Some(random.rounded(attention.heads, 1.0, dtype));
        case.names = ["rope after norms", "normed keys stored", "values beside normed keys", "attention with window, cap and sinks"];
        case
    }

    /// Rows of the given (context, len), each with blocks of its own, in descending order, so that the order matters.
    fn place(&mut self, rows: &[(usize, usize)]) {
        let (block_size, mut start, mut next) = (self.block_size, 0, 0u32);
        for (context, len) in rows {
            let count = context.div_ceil(block_size) as u32;
            let blocks: Vec<u32> = (next..next + count).rev().collect();
            next += count;
            self.positions.extend((context - len..*context).map(|p| p as u32));
            self.slots.extend((context - len..*context).map(|p| blocks[p / block_size] * block_size as u32 + (p % block_size) as u32));
            self.rows.push(BatchRow { start, len: *len, context: *context, blocks: Arc::new(blocks) });
            start += len;
        }
        self.blocks = next as usize;
    }

    fn cpu(&self) -> Result<Cpu, Fail> {
        let most = self.blocks * self.block_size;
        cpu_backend(most, self.attention.qkv_width(), &[self.attention, self.stored_as_is()], self.block_size, None)
    }

    /// Attention that puts keys and values into the cache as they are.
    fn stored_as_is(&self) -> AttentionSpec {
        AttentionSpec { rope: None, qk_norm: None, ..self.attention }
    }

    fn filled_cache<B: Backend>(&self, backend: &mut B) -> Result<B::KvCache, Fail> {
        let mut cache = backend.kv_cache(self.attention.kv_shape(self.blocks, self.block_size))?;
        let all: Vec<u32> = (0..(self.blocks * self.block_size) as u32).collect();
        let blocks = Arc::new((0..self.blocks as u32).collect());
        let rows = [BatchRow { start: 0, len: all.len(), context: all.len(), blocks }];
        let mut qkv = write(backend, &self.earlier, self.attention.qkv_width());
        backend.begin(&Batch {
            tokens: &all,
            positions: &all,
            slots: &all,
            types: &[],
            rows: &rows,
            ropes: &self.ropes,
            states: &Default::default(),
        })?;
        backend.rope_and_store(&mut qkv, &self.stored_as_is(), &AttentionWeights::default(), &mut cache)?;
        Ok(cache)
    }

    /// `stored`: keys and values of the whole cache, slot by slot.
    fn run<B: Backend>(
        &self,
        backend: &mut B,
        stored: impl Fn(&B, &B::KvCache) -> Result<KeysAndValues, Fail>,
    ) -> Result<Vec<Outcome>, Fail> {
        let mut cache = self.filled_cache(backend)?;
        let vector = |backend: &B, values: &Vec<f32>| backend.vector(values.clone());
        let normed = self.attention.qk_norm.is_some();
        let weights = AttentionWeights {
            q_norm: normed.then(|| vector(backend, &self.q_norm)).transpose()?,
            k_norm: normed.then(|| vector(backend, &self.k_norm)).transpose()?,
            sinks: self.sinks.as_ref().map(|sinks| vector(backend, sinks)).transpose()?,
        };
        let (positions, slots) = (&self.positions, &self.slots);
        let mut qkv = write(backend, &self.qkv, self.attention.qkv_width());
        backend.begin(&Batch {
            tokens: positions,
            positions,
            slots,
            types: &[],
            rows: &self.rows,
            ropes: &self.ropes,
            states: &Default::default(),
        })?;
        backend.rope_and_store(&mut qkv, &self.attention, &weights, &mut cache)?;
        let mut attended = backend.buffer(positions.len(), self.attention.q_width())?;
        backend.attend(&qkv, &self.attention, &weights, &cache, &mut attended)?;
        backend.end();
        // What follows the queries in a row is a backend's own.
        let q = read(backend, &mut qkv);
        let q = q.chunks_exact(q.len() / positions.len()).flat_map(|row| &row[..self.attention.q_width()]).copied().collect();
        let (keys, values) = stored(backend, &cache)?;
        let [rope, stored_keys, stored_values, attention] = self.names;
        let rotated = if normed { Nearness::Near } else { Nearness::Rotated };
        Ok(vec![
            outcome(rope, rotated, q),
            outcome(stored_keys, rotated, keys),
            outcome(stored_values, Nearness::Same, values),
            outcome(attention, Nearness::Sums, read(backend, &mut attended)),
        ])
    }
}

/// Keys and values `[slots, kv, d]`.
pub type KeysAndValues = (Vec<f32>, Vec<f32>);

fn stored_on_cpu(cache: &cpu::KvCache, case: &AttentionCase) -> KeysAndValues {
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    for slot in 0..case.blocks * case.block_size {
        for head in 0..case.attention.kv_heads {
            let (key, value) = cache.read(slot, head);
            keys.extend(key);
            values.extend(value);
        }
    }
    (keys, values)
}

fn stored_on_device(cache: &candle::KvCache) -> Result<KeysAndValues, Fail> {
    let all = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1();
    Ok((all(&cache.k)?, all(&cache.v)?))
}

/// The inputs of routed experts.
struct ExpertsCase {
    routing: RoutingSpec,
    hidden: usize,
    inner: usize,
    t: usize,
    x: Vec<f32>,
    router: Vec<f32>,
    /// Of each expert `gate_up` and `down`.
    matrices: Vec<(TestMatrix, TestMatrix)>,
}

impl ExpertsCase {
    fn new(random: &mut Random, dtype: DType) -> Self {
        let (t, hidden, inner) = (random.between(1, 30), random.pick(&[8, 70, 128]), random.between(1, 80));
        let (count, score) = (random.between(2, 9), random.pick(&[RouterScore::Softmax, RouterScore::TopKSoftmax, RouterScore::Sigmoid]));
        let normalize = random.next().is_multiple_of(2).then_some(Normalize { epsilon: 0.0, least: 0.0 });
        let routing = RoutingSpec { experts: count, top_k: random.between(1, count + 1), score, normalize, scale: 1.0, groups: None };
        // Weights that keep the size of what they multiply.
        let mut matrix =
            |rows: usize, width: usize| TestMatrix::new(random.rounded(rows * width, (3.0 / width as f32).sqrt(), dtype), width);
        let matrices = (0..count).map(|_| (matrix(2 * inner, hidden), matrix(hidden, inner))).collect();
        let (x, router) = (random.rounded(t * hidden, 1.0, dtype), random.rounded(t * count, 4.0, dtype));
        Self { routing, hidden, inner, t, x, router, matrices }
    }

    fn cpu(&self) -> Result<Cpu, Fail> {
        let RoutingSpec { experts, top_k, .. } = self.routing;
        let limits = ExpertLimits { hidden: self.hidden, intermediate: self.inner, experts, top_k };
        let widest = self.hidden.max(self.inner).max(experts);
        cpu_backend(self.t, widest, &[plain_attention(1, 1, 2)], 16, Some(limits))
    }

    fn run<B: Backend>(&self, backend: &mut B) -> Result<Vec<Outcome>, Fail> {
        let expert = |(gate_up, down): &(TestMatrix, TestMatrix)| Expert {
            gate_up: gate_up.linear(backend, Columns::Gated, None),
            down: down.linear(backend, Columns::Plain, None),
        };
        let experts = self.matrices.iter().map(expert).collect();
        let experts = Experts { routing: self.routing, choice_bias: None, activation: Activation::Silu, experts };
        let x = write(backend, &self.x, self.hidden);
        let router = write(backend, &self.router, self.routing.experts);
        let mut out = backend.buffer(self.t, self.hidden)?;
        backend.experts(&x, &router, &experts, Epilogue::Store, &mut out)?;
        Ok(vec![outcome("experts", Nearness::Sums, read(backend, &mut out))])
    }
}

fn cpu_backend(
    max_tokens: usize,
    widest: usize,
    attention: &[AttentionSpec],
    block_size: usize,
    experts: Option<ExpertLimits>,
) -> Result<Cpu, Fail> {
    let limits = StepLimits { max_tokens, max_logits: 1, widest, block_size, attention: attention.to_vec(), frequencies: 64, experts };
    Ok(Cpu::new(&limits, CPU_THREADS, ComputeDtype::F32)?)
}

/// The worst distance of one operation so far.
struct Worst {
    operation: &'static str,
    distance: f64,
    tolerance: f64,
}

/// Distances are relative to `1 + |expected|`.
fn compare(all: &mut Vec<Worst>, dtype: DType, want: Vec<Outcome>, got: Vec<Outcome>) -> Result<(), Fail> {
    for (want, got) in want.into_iter().zip(got) {
        let Outcome { operation, nearness, values } = want;
        if values.len() != got.values.len() {
            return Err(format!("{operation}: {} numbers, expected {}", got.values.len(), values.len()).into());
        }
        let distance = |(got, want): (&f32, &f32)| {
            let distance = f64::from((got - want).abs() / (1.0 + want.abs()));
            if distance.is_nan() { f64::INFINITY } else { distance }
        };
        let distance = got.values.iter().zip(&values).map(distance).fold(0.0, f64::max);
        match all.iter_mut().find(|worst| worst.operation == operation) {
            Some(worst) => worst.distance = worst.distance.max(distance),
            None => all.push(Worst { operation, distance, tolerance: nearness.tolerance(dtype) }),
        }
    }
    Ok(())
}

/// The part of the suite: candle's operations.
pub fn run(part: &mut Part, device: &Device) -> Result<(), Fail> {
    for dtype in [DType::F32, DType::BF16] {
        let mut theirs = Candle::new(device);
        theirs.dtype = dtype;
        compare_all(part, dtype, &mut theirs, |_, cache| stored_on_device(cache))?;
    }
    argmax(part, device)
}

/// A backend that computes in this type against the CPU's. `stored`: keys and values of the whole cache, slot by slot.
pub fn compare_all<B: Backend>(
    part: &mut Part,
    dtype: DType,
    theirs: &mut B,
    stored: impl Fn(&B, &B::KvCache) -> Result<KeysAndValues, Fail> + Copy,
) -> Result<(), Fail> {
    let (mut worst, mut random) = (Vec::new(), Random(7));
    for _ in 0..CASES {
        let rows = RowsCase::new(&mut random, dtype);
        compare(&mut worst, dtype, rows.run(&mut rows.cpu()?)?, rows.run(theirs)?)?;
        for attention in [AttentionCase::plain(&mut random, dtype), AttentionCase::varied(&mut random, dtype)] {
            let want = attention.run(&mut attention.cpu()?, |_, cache| Ok(stored_on_cpu(cache, &attention)))?;
            compare(&mut worst, dtype, want, attention.run(theirs, stored)?)?;
        }
        let experts = ExpertsCase::new(&mut random, dtype);
        compare(&mut worst, dtype, experts.run(&mut experts.cpu()?)?, experts.run(theirs)?)?;
    }
    for Worst { operation, distance, tolerance } in worst {
        let detail = format!("worst distance {distance:.2e} of 1 + |value|, allowed {tolerance:.0e}, {CASES} random shapes");
        part.check(format!("{operation}, {}", dtype.as_str()), distance <= tolerance, detail);
    }
    Ok(())
}

/// The greedy choice on the device: rows of a real vocabulary's length, coarse enough to hold ties for the greatest value.
fn argmax(part: &mut Part, device: &Device) -> Result<(), Fail> {
    let vocab = 100_295;
    let logits = (Random(11).tensor(&[5, 103_424])? * 1000.0)?.round()?;
    let rows: Vec<Vec<f32>> = logits.narrow(1, 0, vocab)?.to_vec2()?;
    let want: Vec<u32> = rows.iter().map(|row| worker_candle::models::sample::argmax(row)).collect();
    let got = candle::argmax(&logits.to_device(device)?.narrow(1, 0, vocab)?.contiguous()?)?;
    part.check("argmax with ties", got == want, format!("{got:?}, expected {want:?}"));
    // The backend's own leaves columns out; on a CPU it leaves the whole choice to the host.
    let mut backend = Candle::new(device);
    let buffer = candle::Buffer::of(logits.to_device(device)?);
    let Some(got) = backend.argmax(&buffer, vocab, &want)? else {
        part.note("argmax of masked rows: left to the host on a CPU, not checked");
        return Ok(());
    };
    let mut rows = rows;
    rows.iter_mut().for_each(|row| want.iter().for_each(|masked| row[*masked as usize] = f32::NEG_INFINITY));
    let want: Vec<Option<u32>> = rows.iter().map(|row| Some(worker_candle::models::sample::argmax(row))).collect();
    part.check("argmax of masked rows", got == want, format!("{got:?}, expected {want:?}"));
    Ok(())
}
