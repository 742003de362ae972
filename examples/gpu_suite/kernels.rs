//! The kernels as the device runs them against the CPU kernels in f32, on random shapes.
//!
//! Both sides see the same numbers: inputs are rounded to the type under test first. What is left is the rounding of results and of
//! what lies between, 2⁻⁹ of the value per rounding in bf16, which the tolerances below allow for a handful of roundings.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use worker_candle::kernels::composed::{self, Batch, KvCache};
use worker_candle::kernels::{BatchRow, Rope};

use crate::Fail;
use crate::report::Part;

const CASES: usize = 40;

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

    /// Values in `[-1, 1)`, f32 on the CPU.
    pub fn tensor(&mut self, shape: &[usize]) -> Result<Tensor, Fail> {
        let n: usize = shape.iter().product();
        let values: Vec<f32> = (0..n).map(|_| (self.next() & 0xff_ffff) as f32 / (1u32 << 23) as f32 - 1.0).collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }
}

/// The worst distance of each kernel, and the device's side of the numbers.
struct Twins<'a> {
    device: &'a Device,
    dtype: DType,
    worst: Vec<(&'static str, f64, f64)>,
}

impl Twins<'_> {
    /// `x` rounded to the type under test: f32 on the CPU, and the type itself on the device.
    fn both(&self, x: &Tensor) -> Result<(Tensor, Tensor), Fail> {
        let rounded = x.to_dtype(self.dtype)?;
        Ok((rounded.to_dtype(DType::F32)?, rounded.to_device(self.device)?))
    }

    /// Distances are relative to `1 + |expected|`.
    fn compare(&mut self, kernel: &'static str, tolerance: f64, want: &Tensor, got: &Tensor) -> Result<(), Fail> {
        if want.dims() != got.dims() {
            return Err(format!("{kernel}: shape {:?}, expected {:?}", got.dims(), want.dims()).into());
        }
        let got: Vec<f32> = got.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        let want: Vec<f32> = want.flatten_all()?.to_vec1()?;
        let distance = |(got, want): (&f32, &f32)| {
            let distance = f64::from((got - want).abs() / (1.0 + want.abs()));
            if distance.is_nan() { f64::INFINITY } else { distance }
        };
        let worst = got.iter().zip(&want).map(distance).fold(0.0, f64::max);
        match self.worst.iter_mut().find(|(name, ..)| *name == kernel) {
            Some((_, known, _)) => *known = known.max(worst),
            None => self.worst.push((kernel, worst, tolerance)),
        }
        Ok(())
    }

    fn rows(&mut self, random: &mut Random) -> Result<(), Fail> {
        let exact = if self.dtype == DType::F32 { 2e-5 } else { 2e-2 };
        let (t, n, out) = (random.between(1, 40), random.pick(&[8, 70, 128, 1024]), random.between(1, 400));
        let (x, x_dev) = self.both(&random.tensor(&[t, n])?)?;
        let (w, w_dev) = self.both(&random.tensor(&[n])?)?;
        self.compare("rms_norm", exact, &composed::rms_norm(&x, &w, 1e-5)?, &composed::rms_norm(&x_dev, &w_dev, 1e-5)?)?;
        let (m, m_dev) = self.both(&random.tensor(&[out, n])?)?;
        let (bias, bias_dev) = self.both(&random.tensor(&[out])?)?;
        let wide = if self.dtype == DType::F32 { 1e-4 } else { 2e-2 };
        self.compare("linear", wide, &composed::linear(&x, &m, None)?, &composed::linear(&x_dev, &m_dev, None)?)?;
        self.compare("linear + bias", wide, &composed::linear(&x, &m, Some(&bias))?, &composed::linear(&x_dev, &m_dev, Some(&bias_dev))?)?;
        let (gate_up, gate_up_dev) = self.both(&(random.tensor(&[t, 2 * n])? * 20.0)?)?;
        self.compare("silu_mul", exact, &composed::silu_mul(&gate_up)?, &composed::silu_mul(&gate_up_dev)?)?;
        let ids: Vec<u32> = (0..t).map(|_| random.between(0, out) as u32).collect();
        let ids = Tensor::from_vec(ids, t, &Device::Cpu)?;
        self.compare("embed", 0.0, &composed::embed(&m, &ids)?, &composed::embed(&m_dev, &ids.to_device(self.device)?)?)
    }

    fn attention(&mut self, random: &mut Random) -> Result<(), Fail> {
        let (d, kv, group) = (random.pick(&[4, 10, 32, 64, 128]), random.between(1, 4), random.between(1, 9));
        let block_size = random.pick(&[4usize, 16, 32]);
        let rows: Vec<(usize, usize)> = (0..random.between(1, 6))
            .map(|_| {
                let context = random.between(1, 300);
                (context, if random.next().is_multiple_of(2) { 1 } else { random.between(1, context + 1) })
            })
            .collect();
        let (batch, blocks) = batch(&rows, block_size, d, random)?;
        let batch_dev = Batch {
            tokens: batch.tokens.to_device(self.device)?,
            slots: batch.slots.to_device(self.device)?,
            cos: batch.cos.to_device(self.device)?,
            sin: batch.sin.to_device(self.device)?,
            ..batch.clone()
        };
        let (heads, t) = (kv * group, rows.iter().map(|row| row.1).sum::<usize>());
        let cache =
            || -> Result<(Tensor, Tensor), Fail> { self.both(&Tensor::zeros((blocks, block_size, kv, d), DType::F32, &Device::Cpu)?) };
        let ((k, k_dev), (v, v_dev)) = (cache()?, cache()?);
        let (cache, cache_dev) = (KvCache { k, v }, KvCache { k: k_dev, v: v_dev });
        // Fill the whole context, so that attention has something to read.
        for (cpu_side, device_side) in [(&cache.k, &cache_dev.k), (&cache.v, &cache_dev.v)] {
            let (filled, filled_dev) = self.both(&random.tensor(&[blocks, block_size, kv, d])?)?;
            cpu_side.slice_set(&filled, 0, 0)?;
            device_side.slice_set(&filled_dev, 0, 0)?;
        }
        let (qkv, qkv_dev) = self.both(&random.tensor(&[t, (heads + 2 * kv) * d])?)?;
        let rope = random.pick(&[Rope::Interleaved, Rope::Half]);
        let q = composed::rope_and_store(&qkv, heads, rope, &batch, &cache)?;
        let q_dev = composed::rope_and_store(&qkv_dev, heads, rope, &batch_dev, &cache_dev)?;
        let exact = if self.dtype == DType::F32 { 2e-5 } else { 1e-2 };
        self.compare("rope", exact, &q, &q_dev)?;
        self.compare("keys stored", exact, &cache.k, &cache_dev.k)?;
        self.compare("values stored", 0.0, &cache.v, &cache_dev.v)?;
        let wide = if self.dtype == DType::F32 { 1e-4 } else { 2e-2 };
        let (want, got) = (composed::paged_attention(&q, &batch, &cache)?, composed::paged_attention(&q_dev, &batch_dev, &cache_dev)?);
        self.compare("paged_attention", wide, &want, &got)
    }
}

/// Rows of the given (context, len), each with blocks of its own, in descending order, so that the order matters.
pub fn batch(rows: &[(usize, usize)], block_size: usize, d: usize, random: &mut Random) -> Result<(Batch, usize), Fail> {
    let (mut start, mut next, mut slots, mut out) = (0, 0u32, Vec::new(), Vec::new());
    for (context, len) in rows {
        let count = context.div_ceil(block_size) as u32;
        let blocks: Vec<u32> = (next..next + count).rev().collect();
        next += count;
        slots.extend((context - len..*context).map(|p| blocks[p / block_size] * block_size as u32 + (p % block_size) as u32));
        out.push(BatchRow { start, len: *len, context: *context, blocks: Arc::new(blocks) });
        start += len;
    }
    let batch = Batch {
        tokens: Tensor::zeros(start, DType::U32, &Device::Cpu)?,
        slots: Tensor::from_vec(slots, start, &Device::Cpu)?,
        cos: random.tensor(&[start, d / 2])?,
        sin: random.tensor(&[start, d / 2])?,
        rows: out,
        block_size,
        groups: std::sync::OnceLock::new(),
    };
    Ok((batch, next as usize))
}

/// The part of the suite.
pub fn run(part: &mut Part, device: &Device) -> Result<(), Fail> {
    for dtype in [DType::F32, DType::BF16] {
        let mut twins = Twins { device, dtype, worst: Vec::new() };
        let mut random = Random(7);
        for _ in 0..CASES {
            twins.rows(&mut random)?;
            twins.attention(&mut random)?;
        }
        for (kernel, worst, tolerance) in twins.worst {
            let detail = format!("worst distance {worst:.2e} of 1 + |value|, allowed {tolerance:.0e}, {CASES} random shapes");
            part.check(format!("{kernel}, {}", dtype.as_str()), worst <= tolerance, detail);
        }
    }
    argmax(part, device)
}

/// The greedy draw on the device: rows of a real vocabulary's length, coarse enough to hold ties for the greatest value.
fn argmax(part: &mut Part, device: &Device) -> Result<(), Fail> {
    let vocab = 100_295;
    let logits = (Random(11).tensor(&[5, 103_424])?.narrow(1, 0, vocab)? * 1000.0)?.round()?;
    let rows: Vec<Vec<f32>> = logits.to_vec2()?;
    let want: Vec<u32> = rows.iter().map(|row| worker_candle::models::sample::argmax(row)).collect();
    let columns = Tensor::arange(0f32, vocab as f32, device)?.unsqueeze(0)?;
    let got = composed::argmax(&logits.to_device(device)?.contiguous()?, &columns)?;
    part.check("argmax with ties", got == want, format!("{got:?}, expected {want:?}"));
    Ok(())
}
