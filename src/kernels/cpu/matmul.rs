//! `out [m, n] = x [m, k] · wᵀ` for packed weights (see [`super::packed`]).
//!
//! Every output is summed in one lane of one accumulator in order of k, whatever else is computed beside it: a row's result depends neither
//! on how many rows there are nor on the number of threads, in any form. Registers hold `MR` rows of x by two vectors of columns. One row streams
//! the weights (memory-bound); many rows reuse each panel from the cache.
//!
//! Weights of 8 and 4 bits meet activations rounded to 8 bits, a scale for each 32 of a row: products are summed exactly in integers
//! over those 32, then in f32.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::packed::{self, BLOCK, BLOCK8, PANEL, Packed, SUB4, SUPER, SUPER4};
use super::pool::Pool;
use super::prefault;
#[cfg(target_arch = "x86_64")]
use super::simd::Level;
use super::simd::{self, Simd, dispatch};
use super::{Ptr, PtrMut, elementwise};
use crate::{Activation, Columns, ComputeDtype, Epilogue, WeightFormat};

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
mod forms;
#[cfg(target_arch = "x86_64")]
mod pairs;

use forms::{Weights4, Weights8, WeightsBf16, WeightsF32};

/// Below so many multiply-adds the work is not worth a second thread.
const SERIAL_WORK: usize = 64 * 1024;
/// Weights one task streams at least when there are few rows: a task then takes some microseconds.
const TASK_BYTES: usize = 128 * 1024;
/// How far ahead of the arithmetic weights are asked for.
const AHEAD: usize = 4096;
/// The same into the second cache (measured: 12 KB beats 4 and 24).
const FAR: usize = 12 * 1024;
/// Most regions that the panels of a matrix are cut into.
const REGIONS: usize = 64;
/// Numbers in a cache line.
const LINE: usize = 16;
/// Rows up to which memory is still as slow as the arithmetic, so that tasks are longer than a panel.
const FEW_ROWS: usize = 64;

/// How weights meet activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MatmulKernel {
    /// Weights widened to f32, multiplied and added at once.
    Fused,
    /// Activations of 8 bits.
    Integers,
    /// Activations rounded to bf16, two products at once.
    #[cfg(target_arch = "x86_64")]
    Pairs,
    /// The same in tiles.
    #[cfg(target_arch = "x86_64")]
    Tiles,
    /// Activations as two terms of bf16, in tiles.
    #[cfg(target_arch = "x86_64")]
    TilesSplit,
}

impl MatmulKernel {
    fn of(format: WeightFormat, dtype: ComputeDtype) -> Self {
        match (format, simd::level(), dtype) {
            (WeightFormat::Int8 | WeightFormat::Int4, ..) => Self::Integers,
            #[cfg(target_arch = "x86_64")]
            (WeightFormat::Bf16, Level::Amx, ComputeDtype::Bf16) => Self::Tiles,
            #[cfg(target_arch = "x86_64")]
            (WeightFormat::Bf16, Level::Amx, ComputeDtype::F32) => Self::TilesSplit,
            #[cfg(target_arch = "x86_64")]
            (WeightFormat::Bf16, Level::Avx512Bf16, ComputeDtype::Bf16) => Self::Pairs,
            _ => Self::Fused,
        }
    }
}

/// Whether this processor has products of bf16, so that [`ComputeDtype::Bf16`] makes a difference.
pub fn has_bf16() -> bool {
    !matches!(MatmulKernel::of(WeightFormat::Bf16, ComputeDtype::Bf16), MatmulKernel::Fused)
}

/// Activations that [`Scratch`] needs room for: `t` rows of `k`, in whole tiles; `None`: more than can be counted.
pub fn scratch_values(t: usize, k: usize) -> Option<usize> {
    t.checked_next_multiple_of(16)?.checked_mul(k.checked_next_multiple_of(32)?)
}

/// Room for activations as the kernels want them, made once: rows of a tile interleaved, so that what one step of k needs lies in one
/// line (rows a power of two apart would also fight for one set of the cache); for weights of 8 and 4 bits rounded to 8.
#[derive(Debug, Default)]
pub struct Scratch {
    x: Vec<f32>,
    values: Vec<i8>,
    scales: Vec<f32>,
    /// Sums of 32 rounded values, times -128: what the bias of stored weights adds to products, to be taken off.
    sums: Vec<i32>,
    dtype: ComputeDtype,
}

impl Scratch {
    /// For up to `values` activations.
    pub fn with_capacity(values: usize, dtype: ComputeDtype) -> Self {
        Self {
            dtype,
            x: vec![0.0; values + LINE],
            values: vec![0; values],
            scales: vec![0.0; values / BLOCK],
            sums: vec![0; values / BLOCK],
        }
    }

    /// Where arranged activations begin: at a cache line.
    fn aligned(&mut self) -> *mut f32 {
        let x = self.x.as_mut_ptr();
        x.wrapping_add(x.align_offset(4 * LINE))
    }

    /// Room for other rows of so many numbers, between two products.
    pub(super) fn rows(&mut self, values: usize) -> PtrMut<f32> {
        self.reserve(values);
        PtrMut(self.aligned())
    }

    /// Bytes of one for so many values; `None`: more than can be counted.
    pub fn bytes(values: usize) -> Option<usize> {
        values.checked_mul(4 + 1)?.checked_add(values / BLOCK * (4 + 4) + 4 * LINE)
    }

    /// The memory behind it.
    pub fn memory(&mut self) -> impl Iterator<Item = &mut [u8]> {
        let numbers = [prefault::bytes_of(&mut self.x), prefault::bytes_of(&mut self.scales)];
        numbers.into_iter().chain([prefault::bytes_of(&mut self.values), prefault::bytes_of(&mut self.sums)])
    }

    fn reserve(&mut self, values: usize) {
        if self.values.len() < values {
            *self = Self::with_capacity(values, self.dtype);
        }
    }
}

#[derive(Clone, Copy)]
struct MatmulJob {
    m: usize,
    k: usize,
    /// Width of a row of `out`.
    n: usize,
    x: Ptr<f32>,
    values: Ptr<i8>,
    scales: Ptr<f32>,
    sums: Ptr<i32>,
    w: Ptr<u8>,
    panel_bytes: usize,
    out: PtrMut<f32>,
    /// One number per row of the weight matrix, or null.
    bias: Ptr<f32>,
    columns: Columns,
    epilogue: Epilogue,
}

/// `x [m, k]` → `out [m, n]`, or `[m, n/2]` for gated columns; `bias [n]`.
pub fn matmul(pool: &mut Pool, x: &[f32], w: &Packed, bias: Option<&[f32]>, epilogue: Epilogue, scratch: &mut Scratch, out: &mut [f32]) {
    let (m, k) = (x.len() / w.k, w.k);
    let n = if w.columns == Columns::Gated { w.n / 2 } else { w.n };
    assert!(x.len() == m * k && out.len() == m * n, "matmul: x of {}, out of {} for {w:?}", x.len(), out.len());
    assert!(bias.is_none_or(|bias| bias.len() == w.n), "matmul: bias for {w:?}");
    assert!(matches!(epilogue, Epilogue::Gated(_)) == (w.columns == Columns::Gated), "matmul: {epilogue:?} of {w:?}");
    let kernel = MatmulKernel::of(w.format, scratch.dtype);
    match kernel {
        MatmulKernel::Integers => round(pool, x, k, scratch),
        MatmulKernel::Fused if m > 1 => interleave(pool, x, k, scratch),
        MatmulKernel::Fused => {}
        #[cfg(target_arch = "x86_64")]
        MatmulKernel::Pairs => pairs::arrange(pool, x, k, scratch),
        #[cfg(target_arch = "x86_64")]
        MatmulKernel::Tiles => amx::arrange::<1>(pool, x, k, scratch),
        #[cfg(target_arch = "x86_64")]
        MatmulKernel::TilesSplit => amx::arrange::<2>(pool, x, k, scratch),
    }
    let job = MatmulJob {
        m,
        k,
        n,
        x: Ptr(if kernel == MatmulKernel::Fused && m == 1 { x.as_ptr() } else { scratch.aligned() }),
        values: Ptr(scratch.values.as_ptr()),
        scales: Ptr(scratch.scales.as_ptr()),
        sums: Ptr(scratch.sums.as_ptr()),
        w: Ptr(w.data()),
        panel_bytes: packed::panel_bytes(w.format, k),
        out: PtrMut(out.as_mut_ptr()),
        bias: Ptr(bias.map_or(std::ptr::null(), <[f32]>::as_ptr)),
        columns: w.columns,
        epilogue,
    };
    let run = panels_of(kernel, w.format);
    let panels = w.panels();
    if m * panels * PANEL * k <= SERIAL_WORK {
        return run(job, 0, panels);
    }
    // Long streams for few rows; for many, one panel is work enough, and the last tasks end together.
    let many = match kernel {
        #[cfg(target_arch = "x86_64")]
        MatmulKernel::Tiles | MatmulKernel::TilesSplit => amx::PANELS,
        _ => 1,
    };
    let least = if m > FEW_ROWS { many } else { TASK_BYTES.div_ceil(job.panel_bytes) };
    by_regions(pool, panels, least, &|from, to| run(job, from, to));
}

/// Runs `f(from, to)` over all panels, at least about `least` of them at a time. Each thread goes through a region of its own, so that it reads one
/// stream of memory without a break, and helps in the others' when it is done; the last panels of a region are given out one by one, so that
/// all end together.
fn by_regions(pool: &mut Pool, panels: usize, least: usize, f: &(dyn Fn(usize, usize) + Sync)) {
    let regions = pool.threads().min(REGIONS);
    let begin = |region: usize| panels * region / regions;
    let next: [AtomicUsize; REGIONS] = std::array::from_fn(|region| AtomicUsize::new(begin(region.min(regions))));
    pool.run(pool.threads(), &|task, _| {
        for region in (0..regions).map(|i| (task + i) % regions) {
            let end = begin(region + 1);
            let after = |at: usize| if end - at > 2 * least { at + least } else { at + 1 };
            while let Ok(from) = next[region].fetch_update(Ordering::Relaxed, Ordering::Relaxed, |at| (at < end).then(|| after(at))) {
                f(from, after(from));
            }
        }
    });
}

/// Computes the panels `from..to` of a job. `kernel` is the one that [`MatmulKernel::of`] gives for `format`.
fn panels_of(kernel: MatmulKernel, format: WeightFormat) -> fn(MatmulJob, usize, usize) {
    // SAFETY: `MatmulKernel::of` chose a kernel whose instructions this processor has. The job's pointers are valid for its shape, by the asserts
    // of `matmul`, and every task has panels of its own.
    match (kernel, format) {
        #[cfg(target_arch = "x86_64")]
        (MatmulKernel::Pairs, _) => |job, from, to| unsafe { pairs::panels(job, from, to) },
        #[cfg(target_arch = "x86_64")]
        (MatmulKernel::Tiles, _) => |job, from, to| unsafe { amx::panels::<1>(job, from, to) },
        #[cfg(target_arch = "x86_64")]
        (MatmulKernel::TilesSplit, _) => |job, from, to| unsafe { amx::panels::<2>(job, from, to) },
        (_, WeightFormat::F32) => |job, from, to| dispatch!(panels::<WeightsF32>(job: MatmulJob, from: usize, to: usize)),
        (_, WeightFormat::Bf16) => |job, from, to| dispatch!(panels::<WeightsBf16>(job: MatmulJob, from: usize, to: usize)),
        (_, WeightFormat::Int8) => |job, from, to| dispatch!(panels::<Weights8>(job: MatmulJob, from: usize, to: usize)),
        (_, WeightFormat::Int4) => |job, from, to| dispatch!(panels::<Weights4>(job: MatmulJob, from: usize, to: usize)),
    }
}

/// The part of the next panel that is fetched while one tile is computed: when several tiles share a panel, memory would rest in all
/// but the first.
#[derive(Clone, Copy)]
struct Next {
    from: *const u8,
    /// Bytes of it for one of this panel, times 2^16.
    share: usize,
}

impl Next {
    #[inline(always)]
    fn fetch<S: Simd>(self, done: usize) {
        S::prefetch_far(self.from.wrapping_add((done * self.share) >> 16));
    }
}

/// How one form of weights is multiplied.
trait Weights {
    /// `MR` rows of x from `row` on against two vectors of columns, the `pass`-th of the panel; meanwhile some of `next` is fetched.
    ///
    /// # Safety
    /// As [`Simd`]; `panel` is whole, and rows are inside x.
    unsafe fn tile<S: Simd, const MR: usize>(job: &MatmulJob, panel: *const u8, row: usize, pass: usize, next: Next) -> [[S::V; 2]; MR];
}

/// Computes panels `from..to` for all rows.
///
/// # Safety
/// The job's pointers are valid for its shape, and no other thread writes these columns.
#[inline(always)]
unsafe fn panels<S: Simd, W: Weights>(job: MatmulJob, from: usize, to: usize) {
    // SAFETY: `from..to` are panels of the weights, and tiles end at the last row. What comes after the panel is only prefetched.
    unsafe {
        for index in from..to {
            let panel = job.w.0.add(index * job.panel_bytes);
            let tiles = job.m.div_ceil(S::MR);
            for pass in 0..PANEL / (2 * S::LANES) {
                let (mut row, mut tile) = (0, 0);
                while row < job.m {
                    let next = Next {
                        from: panel.wrapping_add(if tiles == 1 {
                            FAR.min(job.panel_bytes)
                        } else {
                            job.panel_bytes + tile * (job.panel_bytes / tiles)
                        }),
                        share: (1 << 16) / tiles,
                    };
                    tile += 1;
                    row += match tile_rows(job.m - row, S::MR) {
                        12 => strip::<S, W, 12>(&job, panel, index, row, pass, next),
                        8 => strip::<S, W, 8>(&job, panel, index, row, pass, next),
                        6 => strip::<S, W, 6>(&job, panel, index, row, pass, next),
                        4 => strip::<S, W, 4>(&job, panel, index, row, pass, next),
                        3 => strip::<S, W, 3>(&job, panel, index, row, pass, next),
                        2 => strip::<S, W, 2>(&job, panel, index, row, pass, next),
                        _ => strip::<S, W, 1>(&job, panel, index, row, pass, next),
                    };
                }
            }
        }
    }
}

/// Rows to take next of `left`: even shares rather than a full tile and a crumb.
#[inline(always)]
pub(super) fn tile_rows(left: usize, most: usize) -> usize {
    let share = left.div_ceil(left.div_ceil(most));
    [12, 8, 6, 4, 3, 2].into_iter().find(|rows| *rows <= share.min(most)).unwrap_or(1)
}

/// Multiplies `MR` rows by one panel and writes the sums. Returns `MR`.
///
/// # Safety
/// As for [`panels`]; `MR` rows from `row` on are inside the job.
#[inline(always)]
unsafe fn strip<S: Simd, W: Weights, const MR: usize>(
    job: &MatmulJob,
    panel: *const u8,
    index: usize,
    row: usize,
    pass: usize,
    next: Next,
) -> usize {
    unsafe {
        let sums = W::tile::<S, MR>(job, panel, row, pass, next);
        match job.columns {
            Columns::Plain => finish::<S, MR>(job, &sums, index * PANEL + pass * 2 * S::LANES, row),
            Columns::Gated => finish_gated::<S, MR>(job, &sums, index * PANEL / 2 + pass * S::LANES, row),
        }
    }
    MR
}

/// Writes the sums of a tile. Columns past the matrix's width are padding, and are not written.
///
/// # Safety
/// As for [`panels`]; `MR` rows from `row` on are inside out.
#[inline(always)]
unsafe fn finish<S: Simd, const MR: usize>(job: &MatmulJob, sums: &[[S::V; 2]; MR], column: usize, row: usize) {
    unsafe {
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                let column = column + v * S::LANES;
                let out = job.out.0.add((row + r) * job.n + column);
                if column + S::LANES <= job.n {
                    let mut sum = *sum;
                    if !job.bias.0.is_null() {
                        sum = S::add(sum, S::load(job.bias.0.add(column)));
                    }
                    if let Epilogue::Add(factor) = job.epilogue {
                        if factor != 1.0 {
                            sum = S::mul(sum, S::splat(factor));
                        }
                        sum = S::add(S::load(out), sum);
                    }
                    S::store(out, sum);
                    if let Epilogue::Activate(activation) = job.epilogue {
                        elementwise::activate_row(activation, std::slice::from_raw_parts_mut(out, S::LANES));
                    }
                } else if column < job.n {
                    let mut values = [0f32; 16];
                    S::store(values.as_mut_ptr(), *sum);
                    for (i, value) in values[..job.n - column].iter().enumerate() {
                        let bias = if job.bias.0.is_null() { 0.0 } else { *job.bias.0.add(column + i) };
                        let sum = value + bias;
                        *out.add(i) = match job.epilogue {
                            Epilogue::Add(factor) => *out.add(i) + if factor == 1.0 { sum } else { sum * factor },
                            _ => sum,
                        };
                    }
                    if let Epilogue::Activate(activation) = job.epilogue {
                        elementwise::activate_row(activation, std::slice::from_raw_parts_mut(out, job.n - column));
                    }
                }
            }
        }
    }
}

/// `activation(gate) · up`; the tile's first vector holds gates, its second what they gate.
///
/// # Safety
/// As for [`finish`].
#[inline(always)]
unsafe fn finish_gated<S: Simd, const MR: usize>(job: &MatmulJob, sums: &[[S::V; 2]; MR], column: usize, row: usize) {
    if column >= job.n {
        return;
    }
    unsafe {
        for (r, [gate, up]) in sums.iter().enumerate() {
            let (mut gates, mut ups) = ([0f32; 16], [0f32; 16]);
            S::store(gates.as_mut_ptr(), *gate);
            S::store(ups.as_mut_ptr(), *up);
            let width = S::LANES.min(job.n - column);
            if !job.bias.0.is_null() {
                for i in 0..width {
                    gates[i] += *job.bias.0.add(column + i);
                    ups[i] += *job.bias.0.add(job.n + column + i);
                }
            }
            match job.epilogue {
                Epilogue::Gated(Activation::Silu) => {
                    for i in 0..16 {
                        gates[i] = gates[i] / (1.0 + elementwise::exp(-gates[i])) * ups[i];
                    }
                }
                Epilogue::Gated(activation) => elementwise::gate_row(activation, &mut gates, &mut ups),
                _ => {}
            }
            std::ptr::copy_nonoverlapping(gates.as_ptr(), job.out.0.add((row + r) * job.n + column), width);
        }
    }
}

/// Writes the rows of each tile side by side: `[tile][k][rows]`.
fn interleave(pool: &mut Pool, x: &[f32], k: usize, scratch: &mut Scratch) {
    scratch.reserve(x.len());
    let target = PtrMut(scratch.aligned());
    by_tiles(pool, x.len() / k, k, &|row, rows| {
        // SAFETY: a tile's rows are this task's alone, and reserved above.
        let out = unsafe { std::slice::from_raw_parts_mut(target.ptr().add(row * k), rows * k) };
        for (r, x) in x[row * k..(row + rows) * k].chunks_exact(k).enumerate() {
            for (i, value) in x.iter().enumerate() {
                out[i * rows + r] = *value;
            }
        }
    });
}

/// Runs `f(row, rows)` for the tiles that [`panels`] will take of `m` rows, on all threads when it is worth it.
fn by_tiles(pool: &mut Pool, m: usize, k: usize, f: &(dyn Fn(usize, usize) + Sync)) {
    let most = simd::most_rows();
    let tiles = |from: usize, to: usize| {
        let mut row = 0;
        while row < to {
            let rows = tile_rows(m - row, most);
            if row >= from {
                f(row, rows);
            }
            row += rows;
        }
    };
    if m * k < SERIAL_WORK {
        tiles(0, m);
    } else {
        // A tile belongs to the task in whose share it begins.
        let share = m.div_ceil(4 * pool.threads()).max(most);
        pool.run(m.div_ceil(share), &|task, _| tiles(task * share, m.min((task + 1) * share)));
    }
}

/// Rounds rows of x to 8 bits, a scale for each 32: the greatest of them becomes 127.
fn round(pool: &mut Pool, x: &[f32], k: usize, scratch: &mut Scratch) {
    scratch.reserve(x.len());
    let m = x.len() / k;
    let (source, values, scales, sums) =
        (Ptr(x.as_ptr()), PtrMut(scratch.values.as_mut_ptr()), PtrMut(scratch.scales.as_mut_ptr()), PtrMut(scratch.sums.as_mut_ptr()));
    let row = move |row: usize| {
        let (x, values) = (Ptr(source.ptr().wrapping_add(row * k)), PtrMut(values.ptr().wrapping_add(row * k)));
        let (scales, sums) = (PtrMut(scales.ptr().wrapping_add(row * k / BLOCK)), PtrMut(sums.ptr().wrapping_add(row * k / BLOCK)));
        dispatch!(round_row::<>(x: Ptr<f32>, values: PtrMut<i8>, scales: PtrMut<f32>, sums: PtrMut<i32>, k: usize));
    };
    if m * k < SERIAL_WORK / 8 {
        (0..m).for_each(row);
    } else {
        pool.run(m.div_ceil(2), &|task, _| (task * 2..m.min(task * 2 + 2)).for_each(row));
    }
}

#[inline(always)]
unsafe fn round_row<S: Simd>(x: Ptr<f32>, values: PtrMut<i8>, scales: PtrMut<f32>, sums: PtrMut<i32>, k: usize) {
    // SAFETY: whole blocks inside the row.
    unsafe {
        for block in 0..k / BLOCK {
            let x = &*x.0.add(block * BLOCK).cast::<[f32; BLOCK]>();
            let values = &mut *values.0.add(block * BLOCK).cast::<[i8; BLOCK]>();
            let (mut most, minus, mut i) = (S::zero(), S::splat(-1.0), 0);
            while i < BLOCK {
                let v = S::load(x.as_ptr().add(i));
                most = S::max(S::max(v, S::mul(v, minus)), most);
                i += S::LANES;
            }
            let greatest = S::greatest(most);
            let inverse = if greatest > 0.0 { 127.0 / greatest } else { 0.0 };
            let mut sum = 0i32;
            for i in 0..BLOCK {
                // Adding 1.5 · 2^23 rounds to the nearest even integer, which the low bits then hold.
                let q = (x[i] * inverse + 12_582_912.0).to_bits() as i32 - 0x4b40_0000;
                values[i] = q as i8;
                sum += q;
            }
            *scales.0.add(block) = greatest / 127.0;
            *sums.0.add(block) = -128 * sum;
        }
    }
}

#[cfg(test)]
mod tests;
