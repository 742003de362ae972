//! What a device is asked before a model is trusted to it: each kernel on small shapes, against the kernels for CPUs on the same numbers.

use std::sync::Arc;

use candle_core::{Error, Result};

use super::backend::{Choices, Cuda, Dtype};
use super::device::{Device, bytes_of};
use crate::cpu::Cpu;
use crate::testing::{TestMatrix, plain_attention};
use crate::{
    Activation, AttentionSpec, AttentionWeights, Backend, Batch, BatchRow, CausalConv, Columns, ComputeDtype, ConvKind, ConvSpec,
    DeltaSpec, Epilogue, Expert, ExpertLimits, Experts, GatedDelta, HeadColumns, LatentSpec, Linear, Norm, NormKind, Pairing, Rope,
    RopeTable, RouterScore, RoutingSpec, RowSampling, StateSave, StepLimits, StepStates, TableRow, WeightFormat, quantize,
};

/// A kernel that does not give what it should.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disagreement {
    /// Entry points of which at least one is at fault.
    pub kernels: &'static str,
    pub said: String,
}

/// What is computed.
#[derive(Debug, Clone, Copy)]
enum Case {
    Embed,
    EmbedAdd,
    Norm(NormKind),
    NormAdd,
    Product {
        format: WeightFormat,
        rows: usize,
        epilogue: Epilogue,
    },
    /// Of heads of so many numbers.
    Rope(usize),
    Attention(usize),
    Experts,
    Conv,
    Delta,
    Latent,
    Pick,
    Mean,
    Cap,
    Gates,
}

const GATED: Epilogue = Epilogue::Gated(Activation::Silu);
const MANY: usize = 70;

/// Entry points, what shows them, and in how many parts contexts are cut or which tiles are taken.
const CASES: [(&str, Case, Choices); 30] = {
    const fn product(format: WeightFormat, rows: usize, epilogue: Epilogue) -> Case {
        Case::Product { format, rows, epilogue }
    }
    const DEFAULT: Choices = Choices { splits: Some(1), gemv_rows: 8, large_tiles: Some(false), attention_tiles: true };
    const LARGE: Choices = Choices { large_tiles: Some(true), ..DEFAULT };
    const SPLIT: Choices = Choices { splits: Some(2), ..DEFAULT };
    const BY_TOKEN: Choices = Choices { attention_tiles: false, ..SPLIT };
    use WeightFormat::{Bf16, F32, Int4, Int8};
    [
        ("embed", Case::Embed, DEFAULT),
        ("embed_add", Case::EmbedAdd, DEFAULT),
        ("norm", Case::Norm(NormKind::Rms), DEFAULT),
        ("norm", Case::Norm(NormKind::Layer), DEFAULT),
        ("norm", Case::NormAdd, DEFAULT),
        ("gemv", product(F32, 1, Epilogue::Store), DEFAULT),
        ("gemv", product(Bf16, 1, Epilogue::Store), DEFAULT),
        ("gemv", product(Bf16, 5, GATED), DEFAULT),
        ("gemv", product(Int8, 2, Epilogue::Add(0.5)), DEFAULT),
        ("gemv", product(Int4, 8, Epilogue::Store), DEFAULT),
        ("matmul", product(Bf16, MANY, Epilogue::Add(0.5)), DEFAULT),
        ("matmul", product(Bf16, MANY, GATED), LARGE),
        ("matmul", product(Int8, MANY, Epilogue::Store), DEFAULT),
        ("matmul", product(Int8, MANY, GATED), LARGE),
        ("matmul", product(Int4, MANY, GATED), DEFAULT),
        ("matmul", product(Int4, MANY, Epilogue::Store), LARGE),
        ("angles, rope_and_store", Case::Rope(64), DEFAULT),
        ("attend, attend_merge", Case::Attention(64), BY_TOKEN),
        ("attend_tiles", Case::Attention(64), DEFAULT),
        ("attend_tiles, attend_merge", Case::Attention(128), SPLIT),
        ("attend_tiles", Case::Attention(256), DEFAULT),
        ("attend", Case::Attention(576), DEFAULT),
        ("route, combine", Case::Experts, DEFAULT),
        ("copy_states, causal_conv", Case::Conv, DEFAULT),
        ("gated_delta", Case::Delta, DEFAULT),
        ("gemv, latent_rows", Case::Latent, DEFAULT),
        ("pick", Case::Pick, DEFAULT),
        ("mean", Case::Mean, DEFAULT),
        ("scale_and_cap", Case::Cap, DEFAULT),
        ("gate_rows", Case::Gates, DEFAULT),
    ]
};

impl Case {
    /// Of the expected number and a usual one together, 1 at least: a result is rounded to 8 bits, and so are the weights of attention and, on tensor cores, those that were packed.
    fn tolerance(self, dtype: Dtype) -> f32 {
        match (dtype, self) {
            (Dtype::F32, _) => 1e-3,
            (_, Case::Product { format: WeightFormat::Int8 | WeightFormat::Int4, .. }) => 0.1,
            (_, Case::Delta) => 0.1,
            (_, Case::Product { .. } | Case::Attention(_) | Case::Experts | Case::Conv | Case::Latent) => 0.04,
            _ => 0.01,
        }
    }

    fn run<B: Backend>(self, side: &mut Side<'_, B>) -> Result<Vec<f32>> {
        match self {
            Self::Embed => {
                let mut x = side.rows(5, 40)?;
                side.read(&mut x)
            }
            Self::EmbedAdd => {
                let mut x = side.rows(5, 40)?;
                let table = side.weight(9, 40, WeightFormat::Bf16, Columns::Plain)?;
                side.backend.embed_add(&table, TableRow::Position(2), &mut x)?;
                side.read(&mut x)
            }
            Self::Norm(kind) => {
                let (x, mut out) = (side.rows(3, 264)?, side.backend.buffer(3, 264)?);
                let bias = (kind == NormKind::Layer).then(|| side.vector(264)).transpose()?;
                let norm = Norm { kind, weight: side.vector(264)?, bias, eps: 1e-5 };
                side.backend.norm(&x, &norm, &mut out)?;
                side.read(&mut out)
            }
            Self::NormAdd => {
                let (x, mut out) = (side.rows(3, 72)?, side.rows(3, 72)?);
                let norm = Norm { kind: NormKind::Rms, weight: side.vector(72)?, bias: None, eps: 1e-5 };
                side.backend.norm_add(&x, &norm, 0.5, &mut out)?;
                side.read(&mut out)
            }
            Self::Product { format, rows, epilogue } => side.product(format, rows, epilogue),
            Self::Rope(dim) => side.attention(dim, false),
            Self::Attention(dim) => side.attention(dim, true),
            Self::Experts => side.experts(),
            Self::Conv => side.conv(),
            Self::Delta => side.delta(),
            Self::Latent => side.latent(),
            Self::Pick => {
                let (x, mut out) = (side.rows(6, 33)?, side.backend.buffer(3, 33)?);
                side.backend.pick(&x, &[4, 0, 5], &mut out)?;
                side.read(&mut out)
            }
            Self::Mean => {
                let (x, mut out) = (side.rows(6, 33)?, side.backend.buffer(2, 33)?);
                side.backend.mean(&x, &[0..1, 2..6], &mut out)?;
                side.read(&mut out)
            }
            Self::Cap => {
                let mut x = side.rows(2, 50)?;
                side.backend.scale_and_cap(&mut x, 3.0, Some(2.0))?;
                side.read(&mut x)
            }
            Self::Gates => {
                let (gates, mut x) = (side.rows(3, 2)?, side.rows(3, 64)?);
                side.backend.gate_rows(&gates, &mut x)?;
                side.read(&mut x)
            }
        }
    }
}

/// One of the two that are compared. Both see the same numbers, which bf16 holds exactly.
struct Side<'a, B> {
    backend: &'a mut B,
    /// Weights are given to it as they are once they have been quantized, in f32.
    widens: bool,
    state: u64,
}

impl<B: Backend> Side<'_, B> {
    /// Multiples of 1/128 between -1 and 1.
    fn numbers(&mut self, count: usize) -> Vec<f32> {
        let mut next = || {
            self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((self.state >> 40) % 257) as f32 / 128.0 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    fn vector(&mut self, count: usize) -> Result<B::Vector> {
        let numbers = self.numbers(count);
        self.backend.vector(numbers)
    }

    fn weight(&mut self, rows: usize, width: usize, format: WeightFormat, columns: Columns) -> Result<B::Weight> {
        let numbers = self.numbers(rows * width);
        let quantized = |row: &[f32]| match format {
            WeightFormat::Int8 => quantize::row8(row).map(|row| row.dequantize()),
            WeightFormat::Int4 => quantize::row4(row).map(|row| row.dequantize()),
            WeightFormat::F32 | WeightFormat::Bf16 => Ok(row.to_vec()),
        };
        if !self.widens {
            return self.backend.weight(&TestMatrix::new(numbers, width), Some(format), columns);
        }
        let wide = numbers.chunks_exact(width).map(|row| quantized(row).map_err(|error| Error::Msg(error.to_string())));
        let wide = wide.collect::<Result<Vec<_>>>()?.concat();
        self.backend.weight(&TestMatrix::new(wide, width), Some(WeightFormat::F32), columns)
    }

    fn begin(&mut self, rows: &[BatchRow], ropes: &[RopeTable]) -> Result<()> {
        self.begin_with(rows, ropes, &StepStates::default())
    }

    fn begin_with(&mut self, rows: &[BatchRow], ropes: &[RopeTable], states: &StepStates) -> Result<()> {
        let t: usize = rows.iter().map(|row| row.len).sum();
        let tokens: Vec<u32> = (0..t as u32).collect();
        let positions: Vec<u32> =
            rows.iter().flat_map(|row| (row.context - row.len..row.context).map(|position| position as u32)).collect();
        let slot = |row: &BatchRow, position: usize| row.blocks[position / BLOCK] * BLOCK as u32 + (position % BLOCK) as u32;
        let slots: Vec<u32> =
            rows.iter().flat_map(|row| (row.context - row.len..row.context).map(move |position| slot(row, position))).collect();
        self.backend.begin(&Batch { tokens: &tokens, positions: &positions, slots: &slots, types: &[], rows, ropes, states })
    }

    /// A buffer of numbers: rows of an embedding.
    fn rows(&mut self, rows: usize, width: usize) -> Result<B::Buffer> {
        let numbers = self.numbers(rows * width);
        let blocks = Arc::new((0..rows.div_ceil(BLOCK) as u32).collect());
        self.begin(&[BatchRow { start: 0, len: rows, context: rows, blocks }], &[])?;
        let mut out = self.backend.buffer(rows, width)?;
        let table = self.backend.weight(&TestMatrix::new(numbers, width), None, Columns::Plain)?;
        self.backend.embed(&table, 1.0, &mut out)?;
        Ok(out)
    }

    fn read(&mut self, buffer: &mut B::Buffer) -> Result<Vec<f32>> {
        let rows = std::sync::Mutex::new(Vec::new());
        self.backend.each_row(buffer, &|row, values| {
            if let Ok(mut rows) = rows.lock() {
                rows.push((row, values.to_vec()));
            }
        })?;
        let mut rows = rows.into_inner().unwrap_or_default();
        rows.sort_by_key(|(row, _)| *row);
        Ok(rows.into_iter().flat_map(|(_, values)| values).collect())
    }

    fn product(&mut self, format: WeightFormat, rows: usize, epilogue: Epilogue) -> Result<Vec<f32>> {
        let (n, k) = (136, 256);
        let is_gated = matches!(epilogue, Epilogue::Gated(_));
        let columns = if is_gated { Columns::Gated } else { Columns::Plain };
        let (x, mut out) = (self.rows(rows, k)?, self.rows(rows, if is_gated { n / 2 } else { n })?);
        let weight = self.weight(n, k, format, columns)?;
        let linear = Linear { weight, bias: Some(self.vector(n)?) };
        self.backend.linear(&x, &linear, epilogue, &mut out)?;
        self.read(&mut out)
    }

    /// Two rows of many and of few tokens; what is put into the cache shows in what attention makes of it.
    fn attention(&mut self, dim: usize, attends: bool) -> Result<Vec<f32>> {
        let rope = Some(Rope { table: 0, pairing: Pairing::Half });
        let spec = AttentionSpec { rope, ..plain_attention(4, 2, dim) };
        let row = |start, len: usize, blocks: &[u32]| BatchRow { start, len, context: len, blocks: Arc::new(blocks.to_vec()) };
        let rows = [row(0, 37, &[2, 0, 3]), row(37, 3, &[1])];
        let frequencies = self.numbers(dim / 2);
        let mut qkv = self.rows(40, spec.qkv_width())?;
        self.begin(&rows, &[RopeTable { frequencies, factor: 1.0 }])?;
        let (weights, mut cache) = (AttentionWeights::default(), self.backend.kv_cache(spec.kv_shape(4, BLOCK))?);
        self.backend.rope_and_store(&mut qkv, &spec, &weights, &mut cache)?;
        if !attends {
            let rows = self.read(&mut qkv)?;
            return Ok(rows.chunks_exact(rows.len() / 40).flat_map(|row| row[..spec.q_width()].to_vec()).collect());
        }
        let mut out = self.backend.buffer(40, spec.q_width())?;
        self.backend.attend(&qkv, &spec, &weights, &cache, &mut out)?;
        self.read(&mut out)
    }

    fn experts(&mut self) -> Result<Vec<f32>> {
        let (t, hidden, inner, experts) = (9, 64, 32, 5);
        let (x, router, mut out) = (self.rows(t, hidden)?, self.rows(t, experts)?, self.backend.buffer(t, hidden)?);
        let expert = |side: &mut Self| -> Result<Expert<B::Weight, B::Vector>> {
            let gate_up = Linear { weight: side.weight(2 * inner, hidden, WeightFormat::Bf16, Columns::Gated)?, bias: None };
            Ok(Expert { gate_up, down: Linear { weight: side.weight(hidden, inner, WeightFormat::Bf16, Columns::Plain)?, bias: None } })
        };
        let all = (0..experts).map(|_| expert(self)).collect::<Result<Vec<_>>>()?;
        let routing = RoutingSpec { experts, top_k: 2, score: RouterScore::Softmax, normalize: None, scale: 1.0, groups: None };
        let experts = Experts { routing, choice_bias: None, activation: Activation::Silu, experts: all };
        self.backend.experts(&x, &router, &experts, Epilogue::Store, &mut out)?;
        self.read(&mut out)
    }
}

/// Six tokens of a sequence whose state is kept, and two more behind a copy of it.
fn two_steps() -> [(BatchRow, StepStates); 2] {
    let row = |len, context| BatchRow { start: 0, len, context, blocks: Arc::new(vec![0]) };
    let kept = StepStates { copies: vec![], slots: vec![0], saves: vec![StateSave { token: 5, slot: 0 }] };
    [(row(6, 6), kept), (row(2, 8), StepStates { copies: vec![(0, 1)], slots: vec![1], saves: vec![] })]
}

/// Operations with a state, and those of latent attention.
impl<B: Backend> Side<'_, B> {
    fn conv(&mut self) -> Result<Vec<f32>> {
        let spec = ConvSpec { channels: 40, kernel: 4, kind: ConvKind::Silu };
        let conv = CausalConv { spec, weight: self.vector(spec.channels * spec.kernel)?, bias: None };
        let (mut state, mut all) = (self.backend.state(2, spec.state_width())?, Vec::new());
        for (row, states) in two_steps() {
            let (x, mut out) = (self.rows(row.len, spec.input_width())?, self.backend.buffer(row.len, spec.channels)?);
            self.begin_with(&[row], &[], &states)?;
            self.backend.copy_states(&mut state)?;
            self.backend.causal_conv(&x, &conv, &mut state, &mut out)?;
            all.extend(self.read(&mut out)?);
        }
        Ok(all)
    }

    fn delta(&mut self) -> Result<Vec<f32>> {
        let spec = DeltaSpec { key_heads: 1, value_heads: 2, key_dim: 40, value_dim: 24, eps: 0.1 };
        let decay = self.numbers(spec.value_heads).into_iter().map(f32::abs).collect();
        let (decay, decay_bias, norm) = (self.backend.vector(decay)?, self.vector(spec.value_heads)?, self.vector(spec.value_dim)?);
        let delta = GatedDelta { spec, decay, decay_bias, norm };
        let (mut state, mut all) = (self.backend.state(2, spec.state_width())?, Vec::new());
        for (row, states) in two_steps() {
            let (mut qkv, mut gates) = (self.rows(row.len, spec.qkv_width())?, self.rows(row.len, 2 * spec.value_heads)?);
            let (z, mut out) = (self.rows(row.len, spec.value_width())?, self.backend.buffer(row.len, spec.value_width())?);
            self.begin_with(&[row], &[], &states)?;
            self.backend.copy_states(&mut state)?;
            self.backend.gated_delta(&mut qkv, &mut gates, &z, &delta, &mut state, &mut out)?;
            all.extend(self.read(&mut out)?);
        }
        Ok(all)
    }

    fn latent(&mut self) -> Result<Vec<f32>> {
        let (t, spec) = (3, LatentSpec { heads: 2, nope_dim: 16, rope_dim: 8, rank: 24, eps: 1e-5 });
        let width = spec.nope_dim + spec.rope_dim;
        let head = |side: &mut Self| -> Result<Linear<B::Weight, B::Vector>> {
            Ok(Linear { weight: side.weight(spec.rank, spec.nope_dim, WeightFormat::Bf16, Columns::Plain)?, bias: None })
        };
        let (heads, norm) = ([head(self)?, head(self)?], self.vector(spec.rank)?);
        let (q, latent) = (self.rows(t, spec.heads * width)?, self.rows(t, spec.head_dim())?);
        let room = |side: &Self, width| side.backend.buffer(t, width);
        let mut scratch = [room(self, spec.rank)?, room(self, spec.rank)?];
        let (mut absorbed, mut out) = (room(self, spec.heads * spec.rank)?, room(self, (spec.heads + 2) * spec.head_dim())?);
        self.backend.linear_heads(&q, HeadColumns { first: 0, stride: width }, &heads, &mut scratch, &mut absorbed)?;
        self.backend.latent_rows(&q, &absorbed, &latent, &spec, &norm, &mut out)?;
        self.read(&mut out)
    }
}

/// Tokens in a block of the cache.
const BLOCK: usize = 16;

fn twin() -> std::result::Result<Cpu, std::io::Error> {
    let limits = StepLimits {
        max_tokens: MANY.max(136),
        max_logits: 1,
        widest: 1024,
        block_size: BLOCK,
        attention: [64, 128, 256, 576].map(|dim| plain_attention(4, 2, dim)).to_vec(),
        frequencies: 128,
        experts: Some(ExpertLimits { hidden: 64, intermediate: 32, experts: 5, top_k: 2 }),
    };
    Cpu::new(&limits, 1, ComputeDtype::F32)
}

/// The first number that is not what it should be.
fn differs(ours: &[f32], theirs: &[f32], tolerance: f32) -> Option<String> {
    if ours.len() != theirs.len() {
        return Some(format!("{} numbers instead of {}", ours.len(), theirs.len()));
    }
    // Numbers near 0 are differences of large ones, whose rounding they keep: what is usual here counts, too.
    let usual = (theirs.iter().map(|number| number * number).sum::<f32>() / theirs.len().max(1) as f32).sqrt().max(1.0);
    // NOTE: of NaN nothing holds.
    let is_near = |(ours, theirs): (&f32, &f32)| (ours - theirs).abs() <= tolerance * (usual + theirs.abs());
    let at = ours.iter().zip(theirs).position(|pair| !is_near(pair))?;
    Some(format!("{} instead of {} (number {at} of {})", ours[at], theirs[at], ours.len()))
}

impl<D: Device> Cuda<D> {
    /// Every kernel on a few numbers: those that fail, or give something else than the CPU's. Ends at an error after which the device is lost.
    pub fn self_check(&mut self) -> Vec<Disagreement> {
        let mut found = Vec::new();
        let mut twin = match twin() {
            Ok(twin) => twin,
            Err(error) => return vec![Disagreement { kernels: "all", said: format!("no thread to compare with: {error}") }],
        };
        let choices = self.choices;
        for (state, (kernels, case, chosen)) in (1..).zip(CASES) {
            self.choices = chosen;
            let ours = case.run(&mut Side { backend: self, widens: false, state });
            let theirs = case.run(&mut Side { backend: &mut twin, widens: true, state });
            let said = match (ours, theirs) {
                (Ok(ours), Ok(theirs)) => differs(&ours, &theirs, case.tolerance(self.dtype)),
                (Err(error), _) | (_, Err(error)) => Some(error.to_string()),
            };
            found.extend(said.map(|said| Disagreement { kernels, said: format!("{case:?}: {said}") }));
            if self.check_device().is_err() {
                break;
            }
        }
        self.choices = choices;
        self.end();
        if self.check_device().is_ok() {
            for (kernels, width, rows) in [("argmax", 90, [row(0.0, 1.0, 0), row(0.0, 1.0, 0)]), ("adjust, sample", 64, draws())] {
                let said = self.draw(width, &rows).unwrap_or_else(|error| Some(error.to_string()));
                found.extend(said.map(|said| Disagreement { kernels, said }));
            }
        }
        found
    }

    /// What is wrong with the tokens of two rows of logits: one with a greatest number that comes twice, one of equals.
    fn draw(&mut self, width: usize, rows: &[RowSampling; 2]) -> Result<Option<String>> {
        const STRIDE: usize = 96;
        let mut logits = self.logits_buffer(2, STRIDE)?;
        let mut values = [0.5f32; 2 * STRIDE];
        (values[41], values[47]) = (3.0, 3.0);
        // Beyond the width nothing counts.
        (values[STRIDE - 1], values[2 * STRIDE - 1]) = (9.0, 9.0);
        self.device.write(&logits.memory, bytes_of(&values))?;
        let Some(tokens) = self.sample(&mut logits, width, &[], rows)? else { return Ok(Some("nothing was sampled".into())) };
        let wanted = match rows {
            [first, second] if first.is_plain_greedy() && second.is_plain_greedy() => [41, 0],
            // The ids that are left are 41 and 47, and the first is suppressed; of equals each is as likely.
            [_, second] => [47, (uniform(second.seed, second.index) * width as f64) as u32],
        };
        Ok((tokens != wanted.map(Some)).then(|| format!("tokens {tokens:?} instead of {wanted:?}")))
    }
}

fn row(inverse_temperature: f32, top_p: f32, top_k: u32) -> RowSampling {
    RowSampling { seed: 977, index: 3, inverse_temperature, top_p, top_k, ..RowSampling::default() }
}

fn draws() -> [RowSampling; 2] {
    let changes = [vec![(41, 0.0)], vec![(47, 1.0)], vec![(47, 2.0)], vec![(47, 0.25)]];
    [RowSampling { changes, ..row(1.0, 0.4, 3) }, row(1.0, 1.0, 0)]
}

/// As `models::sample` draws it.
fn uniform(seed: u64, index: u64) -> f64 {
    let mix = |z: u64| {
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    let bits = mix(mix(seed.wrapping_add(0x9E37_79B9_7F4A_7C15)) ^ index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}
