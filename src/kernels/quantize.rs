//! Weights at 8 and 4 bits: two block forms as plain data, and how a row of numbers is put into them.
//!
//! | form | of | stored | a weight is |
//! |---|---|---|---|
//! | 8-bit, ggml's Q8_0 | 32 weights | one f16 `d`, 32 × i8 | `d · q` |
//! | 4-bit, ggml's Q4_K | 256 weights in 8 × 32 | f16 `d` and `dmin`; a 6-bit scale and minimum for each 32; 256 × 4 bits | `d · scale · q − dmin · min` |
//!
//! The 4-bit encoder minimises the squared error. For every 32 weights it tries several grids, fits scale and minimum to each by least
//! squares (the idea of ggml's k-quants) and keeps the best; then the shared units are fitted to all 256, every scale and minimum moves
//! to the best of its neighbours, and the units are fitted once more. The eight groups of 32 are the lanes of the vectors it computes with.

use half::f16;

use crate::cpu::vectorize::{Vectorize, vectorize};

/// Weights that share a scale.
pub const BLOCK: usize = 32;
/// Weights that share the 4-bit form's units.
pub const SUPER_BLOCK: usize = 256;
/// Groups of a super-block.
const GROUPS: usize = SUPER_BLOCK / BLOCK;
/// Adding it rounds a small number to a whole one, which then stands in the low bits: 1.5 · 2^23.
const ROUND: f32 = 12_582_912.0;
/// Largest 4-bit number, and largest 6-bit scale.
const MAX_LEVEL: f32 = 15.0;
const MAX_SCALE: f32 = 63.0;
/// Grids that are tried, as the number of steps the range of a group is cut into. Fewer than 15 leave room at the ends, more clip.
const GRIDS: [f32; 8] = [12.6, 13.0, 13.4, 13.8, 14.2, 14.6, 15.0, 15.4];

/// A number that has no quantized form.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Unquantizable {
    /// Where in the row its block starts.
    pub block: usize,
}

impl std::fmt::Display for Unquantizable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the block of weights from column {} on holds NaN, infinity or numbers whose f16 scale would overflow", self.block)
    }
}

/// One row's 8-bit blocks.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Row8 {
    /// From -127 to 127, as many as weights.
    pub values: Vec<i8>,
    /// One for each 32.
    pub scales: Vec<f16>,
}

impl Row8 {
    pub fn dequantize(&self) -> Vec<f32> {
        self.values.iter().enumerate().map(|(i, q)| self.scales[i / BLOCK].to_f32() * f32::from(*q)).collect()
    }
}

/// One row's 4-bit super-blocks.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Row4 {
    /// Below 16, one a byte, as many as weights.
    pub values: Vec<u8>,
    /// Below 64, one for each 32.
    pub scales: Vec<u8>,
    /// Below 64, one for each 32.
    pub mins: Vec<u8>,
    /// Unit of the scales, one for each 256.
    pub d: Vec<f16>,
    /// Unit of the minima, one for each 256.
    pub dmin: Vec<f16>,
}

impl Row4 {
    pub fn dequantize(&self) -> Vec<f32> {
        let weight = |(i, q): (usize, &u8)| {
            let (unit, group) = (i / SUPER_BLOCK, i / BLOCK);
            let scale = self.d[unit].to_f32() * f32::from(self.scales[group]);
            scale * f32::from(*q) - self.dmin[unit].to_f32() * f32::from(self.mins[group])
        };
        self.values.iter().enumerate().map(weight).collect()
    }
}

impl Row8 {
    /// Writes the row as ggml stores Q8_0, 34 bytes for each 32 weights.
    pub fn write_ggml(&self, out: &mut [u8]) {
        for (block, (values, d)) in out.chunks_exact_mut(34).zip(self.values.as_chunks::<BLOCK>().0.iter().zip(&self.scales)) {
            block[..2].copy_from_slice(&d.to_le_bytes());
            block[2..].iter_mut().zip(values).for_each(|(byte, q)| *byte = *q as u8);
        }
    }
}

impl Row4 {
    /// Writes the row as ggml stores Q4_K, 144 bytes for each 256 weights: scales and minima in 12 bytes, two groups' levels side by side.
    pub fn write_ggml(&self, out: &mut [u8]) {
        for (i, block) in out.chunks_exact_mut(144).enumerate() {
            block[..2].copy_from_slice(&self.d[i].to_le_bytes());
            block[2..4].copy_from_slice(&self.dmin[i].to_le_bytes());
            let (scales, mins) = (&self.scales[i * GROUPS..][..GROUPS], &self.mins[i * GROUPS..][..GROUPS]);
            for j in 0..4 {
                block[4 + j] = scales[j] | scales[j + 4] >> 4 << 6;
                block[8 + j] = mins[j] | mins[j + 4] >> 4 << 6;
                block[12 + j] = (scales[j + 4] & 15) | (mins[j + 4] & 15) << 4;
            }
            for (pair, levels) in self.values[i * SUPER_BLOCK..][..SUPER_BLOCK].chunks_exact(2 * BLOCK).enumerate() {
                for l in 0..BLOCK {
                    block[16 + pair * BLOCK + l] = levels[l] | levels[BLOCK + l] << 4;
                }
            }
        }
    }
}

/// [`row8_into`] new buffers.
pub fn row8(row: &[f32]) -> Result<Row8, Unquantizable> {
    let mut out = Row8::default();
    row8_into(row, &mut out.values, &mut out.scales)?;
    Ok(out)
}

/// [`row4_into`] new buffers.
pub fn row4(row: &[f32]) -> Result<Row4, Unquantizable> {
    let mut out = Row4::default();
    row4_into(row, &mut out.values, &mut out.scales, &mut out.mins, &mut out.d, &mut out.dmin)?;
    Ok(out)
}

/// Puts a row into the 8-bit form; see [`Row8`] for what the buffers then hold. The row's length must be a multiple of 32.
pub fn row8_into(row: &[f32], values: &mut Vec<i8>, scales: &mut Vec<f16>) -> Result<(), Unquantizable> {
    let (blocks, rest) = row.as_chunks::<BLOCK>();
    assert!(rest.is_empty(), "a row of {} weights has no 8-bit form", row.len());
    values.resize(row.len(), 0);
    scales.resize(blocks.len(), f16::ZERO);
    let failed = vectorize(Rows8 { blocks, values: values.as_chunks_mut().0, scales });
    failed.map_or(Ok(()), |block| Err(Unquantizable { block: block * BLOCK }))
}

/// Puts a row into the 4-bit form; see [`Row4`] for what the buffers then hold. The row's length must be a multiple of 256.
pub fn row4_into(
    row: &[f32],
    values: &mut Vec<u8>,
    scales: &mut Vec<u8>,
    mins: &mut Vec<u8>,
    d: &mut Vec<f16>,
    dmin: &mut Vec<f16>,
) -> Result<(), Unquantizable> {
    let (blocks, rest) = row.as_chunks::<SUPER_BLOCK>();
    assert!(rest.is_empty(), "a row of {} weights has no 4-bit form", row.len());
    values.resize(row.len(), 0);
    scales.resize(row.len() / BLOCK, 0);
    mins.resize(row.len() / BLOCK, 0);
    d.resize(blocks.len(), f16::ZERO);
    dmin.resize(blocks.len(), f16::ZERO);
    for (i, weights) in blocks.iter().enumerate() {
        let mut block = Block4 { values: [0; SUPER_BLOCK], scales: [0.0; GROUPS], mins: [0.0; GROUPS], d: f16::ZERO, dmin: f16::ZERO };
        vectorize(Encode4 { weights, block: &mut block });
        if !block.d.is_finite() || !block.dmin.is_finite() {
            return Err(Unquantizable { block: i * SUPER_BLOCK });
        }
        values[i * SUPER_BLOCK..][..SUPER_BLOCK].copy_from_slice(&block.values);
        for group in 0..GROUPS {
            scales[i * GROUPS + group] = block.scales[group] as u8;
            mins[i * GROUPS + group] = block.mins[group] as u8;
        }
        (d[i], dmin[i]) = (block.d, block.dmin);
    }
    Ok(())
}

/// Encodes blocks at 8 bits; gives the first that cannot be.
struct Rows8<'a> {
    blocks: &'a [[f32; BLOCK]],
    values: &'a mut [[i8; BLOCK]],
    scales: &'a mut [f16],
}

impl Vectorize for Rows8<'_> {
    type Output = Option<usize>;

    #[inline(always)]
    fn run(self) -> Option<usize> {
        for (i, (block, (values, scale))) in self.blocks.iter().zip(self.values.iter_mut().zip(self.scales.iter_mut())).enumerate() {
            let mut lanes = [0f32; 8];
            // Stays 0 unless something is not finite.
            let mut poison = [0f32; 8];
            for part in block.as_chunks::<8>().0 {
                for lane in 0..8 {
                    lanes[lane] = larger(lanes[lane], part[lane].abs());
                    poison[lane] += part[lane] * 0.0;
                }
            }
            let largest = lanes.into_iter().fold(0.0, larger);
            *scale = f16::from_f32(largest / 127.0);
            if largest > 127.5 * scale.to_f32() {
                // Where f16 is coarse, a scale rounded down would clip.
                *scale = f16_above(largest / 127.0);
            }
            if !scale.is_finite() || poison.iter().any(|lane| lane.is_nan()) {
                return Some(i);
            }
            let inverse = inverse(scale.to_f32());
            for (value, weight) in values.iter_mut().zip(block) {
                let scaled = larger(smaller(weight * inverse, 127.0), -127.0);
                *value = (scaled + ROUND).to_bits() as i8;
            }
        }
        None
    }
}

/// One number of each group of a super-block.
type Lanes = [f32; GROUPS];

/// A super-block on its way. Scales and minima are whole numbers.
struct Block4 {
    values: [u8; SUPER_BLOCK],
    scales: Lanes,
    mins: Lanes,
    d: f16,
    dmin: f16,
}

struct Encode4<'a> {
    weights: &'a [f32; SUPER_BLOCK],
    block: &'a mut Block4,
}

/// Sums of each group over its 32 weights w and their levels q.
struct Sums {
    q: Lanes,
    qq: Lanes,
    wq: Lanes,
}

impl Vectorize for Encode4<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { weights, block } = self;
        let mut columns = [[0f32; GROUPS]; BLOCK];
        for (i, column) in columns.iter_mut().enumerate() {
            *column = lanes(|group| weights[group * BLOCK + i]);
        }
        let sum = columns.iter().fold([0.0; GROUPS], |sum, column| lanes(|l| sum[l] + column[l]));
        if sum.iter().any(|sum| !sum.is_finite()) {
            block.d = f16::INFINITY;
            return;
        }
        let (scale, min) = fit_groups(&columns, &sum);
        // Rounded up, so that the largest needs no more than 63, even where f16 is coarse.
        block.d = f16_above(scale.into_iter().fold(0.0, larger) / MAX_SCALE);
        block.dmin = f16_above(min.into_iter().fold(0.0, larger) / MAX_SCALE);
        let (to_scale, to_min) = (inverse(block.d.to_f32()), inverse(block.dmin.to_f32()));
        block.scales = lanes(|l| smaller(round(scale[l] * to_scale), MAX_SCALE));
        block.mins = lanes(|l| smaller(round(min[l] * to_min), MAX_SCALE));
        block.fit_units(&columns, &sum);
        block.move_to_neighbours(&columns);
        // The levels belong to the units before they are fitted for the last time: that is the fit of least error to these levels.
        let (multiply, offset) = block.grids();
        for (i, column) in columns.iter().enumerate() {
            for group in 0..GROUPS {
                block.values[group * BLOCK + i] = (level(column[group], multiply[group], offset[group]) + ROUND).to_bits() as u8;
            }
        }
        block.fit_units(&columns, &sum);
    }
}

/// The scale and the minimum of each group, `w ≈ scale · q − min` with neither below 0, that leave the least squared error of all [`GRIDS`].
#[inline(always)]
fn fit_groups(columns: &[Lanes; BLOCK], sum: &Lanes) -> (Lanes, Lanes) {
    let (mut low, mut high) = ([0f32; GROUPS], [f32::MIN; GROUPS]);
    for column in columns {
        low = lanes(|l| smaller(column[l], low[l]));
        high = lanes(|l| larger(column[l], high[l]));
    }
    let per_range = lanes(|l| inverse(high[l] - low[l]));
    let mut scale = lanes(|l| larger(high[l] - low[l], 0.0) / MAX_LEVEL);
    let mut min = lanes(|l| -low[l]);
    // How much of Σw² the fit explains.
    let mut gain = [f32::MIN; GROUPS];
    let n = BLOCK as f32;
    for grid in GRIDS {
        let multiply = lanes(|l| grid * per_range[l]);
        let offset = lanes(|l| -low[l] * multiply[l]);
        let sums = sums(columns, &multiply, &offset);
        for l in 0..GROUPS {
            let (q, qq, wq, w) = (sums.q[l], sums.qq[l], sums.wq[l], sum[l]);
            let determinant = n * qq - q * q;
            let m = (q * wq - qq * w) / determinant;
            let s = if m > 0.0 { (n * wq - q * w) / determinant } else { wq / qq };
            let m = larger(m, 0.0);
            let explained = 2.0 * (s * wq - m * w + s * m * q) - s * s * qq - n * m * m;
            // False for the NaN of a group whose levels are all the same.
            let better = explained > gain[l] && s >= 0.0;
            scale[l] = if better { s } else { scale[l] };
            min[l] = if better { m } else { min[l] };
            gain[l] = if better { explained } else { gain[l] };
        }
    }
    (scale, min)
}

impl Block4 {
    /// What turns weights into levels: `w · multiply + offset`.
    #[inline(always)]
    fn grids(&self) -> (Lanes, Lanes) {
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        let multiply = lanes(|l| inverse(d * self.scales[l]));
        (multiply, lanes(|l| dmin * self.mins[l] * multiply[l]))
    }

    /// The units of least squared error for the present scales, minima and levels.
    #[inline(always)]
    fn fit_units(&mut self, columns: &[Lanes; BLOCK], sum: &Lanes) {
        let (multiply, offset) = self.grids();
        let sums = sums(columns, &multiply, &offset);
        let (mut ss, mut sm, mut mm, mut sw, mut mw) = (0f32, 0f32, 0f32, 0f32, 0f32);
        for l in 0..GROUPS {
            let (s, m) = (self.scales[l], self.mins[l]);
            ss += s * s * sums.qq[l];
            sm += s * m * sums.q[l];
            mm += m * m * BLOCK as f32;
            sw += s * sums.wq[l];
            mw -= m * sum[l];
        }
        let (d, dmin) = if mm > 0.0 {
            let determinant = ss * mm - sm * sm;
            ((sw * mm + mw * sm) / determinant, (mw * ss + sw * sm) / determinant)
        } else {
            (sw / ss, 0.0)
        };
        let (d, dmin) = (f16::from_f32(d), f16::from_f32(dmin));
        // Neither NaN nor infinite: then the equations had no solution, and the units stay.
        if d > f16::ZERO && d.is_finite() && dmin >= f16::ZERO && dmin.is_finite() {
            (self.d, self.dmin) = (d, dmin);
        }
    }

    /// Moves every group's scale and minimum by at most one, to where the squared error is least.
    #[inline(always)]
    fn move_to_neighbours(&mut self, columns: &[Lanes; BLOCK]) {
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        let (scales, mins) = (self.scales, self.mins);
        let mut least = [f32::MAX; GROUPS];
        for (by_scale, by_min) in [(0, 0), (0, -1), (0, 1), (-1, 0), (-1, -1), (-1, 1), (1, 0), (1, -1), (1, 1)] {
            let s = lanes(|l| smaller(larger(scales[l] + by_scale as f32, 0.0), MAX_SCALE));
            let m = lanes(|l| smaller(larger(mins[l] + by_min as f32, 0.0), MAX_SCALE));
            let scale = lanes(|l| d * s[l]);
            let min = lanes(|l| dmin * m[l]);
            let multiply = lanes(|l| inverse(scale[l]));
            let offset = lanes(|l| min[l] * multiply[l]);
            let mut error = [0f32; GROUPS];
            for column in columns {
                for l in 0..GROUPS {
                    let off = column[l] + min[l] - scale[l] * level(column[l], multiply[l], offset[l]);
                    error[l] += off * off;
                }
            }
            for l in 0..GROUPS {
                let better = error[l] < least[l];
                self.scales[l] = if better { s[l] } else { self.scales[l] };
                self.mins[l] = if better { m[l] } else { self.mins[l] };
                least[l] = if better { error[l] } else { least[l] };
            }
        }
    }
}

#[inline(always)]
fn sums(columns: &[Lanes; BLOCK], multiply: &Lanes, offset: &Lanes) -> Sums {
    let mut sums = Sums { q: [0.0; GROUPS], qq: [0.0; GROUPS], wq: [0.0; GROUPS] };
    for column in columns {
        for l in 0..GROUPS {
            let q = level(column[l], multiply[l], offset[l]);
            sums.q[l] += q;
            sums.qq[l] += q * q;
            sums.wq[l] += column[l] * q;
        }
    }
    sums
}

#[inline(always)]
fn lanes(value: impl Fn(usize) -> f32) -> Lanes {
    let mut lanes = [0.0; GROUPS];
    for (l, lane) in lanes.iter_mut().enumerate() {
        *lane = value(l);
    }
    lanes
}

/// The level of a weight: a whole number from 0 to 15.
#[inline(always)]
fn level(weight: f32, multiply: f32, offset: f32) -> f32 {
    round(smaller(larger(weight * multiply + offset, 0.0), MAX_LEVEL))
}

/// To the nearest whole number, for numbers below 2^22.
#[inline(always)]
fn round(x: f32) -> f32 {
    (x + ROUND) - ROUND
}

/// 1 / x, and 0 where that is not a number to compute with.
#[inline(always)]
fn inverse(x: f32) -> f32 {
    if x > f32::MIN_POSITIVE { 1.0 / x } else { 0.0 }
}

/// Minimum and maximum as one instruction each; what happens to NaN is no matter here.
#[inline(always)]
fn smaller(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// The nearest f16 that is not below `x ≥ 0`.
#[inline(always)]
fn f16_above(x: f32) -> f16 {
    let nearest = f16::from_f32(x);
    if nearest.to_f32() < x { f16::from_bits(nearest.to_bits() + 1) } else { nearest }
}

#[cfg(test)]
mod tests;
