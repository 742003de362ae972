//! Weights in the order in which the matrix kernels read them.
//!
//! A panel is 32 columns of the output (rows of the weight matrix) over all of k. Within it, numbers that meet the same activations lie
//! side by side, so that one vector of weights is multiplied by one number of x, sums stay in their lanes, and a panel is one stream of memory:
//!
//! | format | in a panel | bits a weight |
//! |---|---|---|
//! | f32 | `[k][32]` | 32 |
//! | bf16 | `[k/2][32][2]` | 16 |
//! | 8-bit | `[k/32]` × ( scales f16 `[32]`, `[8][32][4]` bytes, stored as w + 128 ) | 8.5 |
//! | 4-bit | `[k/256]` × ( d f16 `[32]`, dmin f16 `[32]`, `[8]` × ( scales u8 `[32]`, mins u8 `[32]`, `[4][32][4]` bytes, two weights each ) ) | 4.625 |

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::{Mmap, MmapMut};

use super::simd;
use crate::{Columns, WeightFormat};

/// Columns of a panel.
pub const PANEL: usize = 32;
/// Weights that share a scale.
pub const BLOCK: usize = 32;
/// Weights of a 4-bit super-block.
pub const SUPER: usize = 256;
pub(super) const BLOCK8: usize = 2 * PANEL + BLOCK * PANEL;
pub(super) const SUB4: usize = 2 * PANEL + BLOCK * PANEL / 2;
pub(super) const SUPER4: usize = 4 * PANEL + 8 * SUB4;

/// One row of weights in the format it is to be packed in; buffers are reused from row to row.
#[derive(Debug, Default)]
pub struct Row {
    pub f32: Vec<f32>,
    pub bf16: Vec<bf16>,
    /// 8-bit: `k` numbers from -127 to 127, and a scale for each 32.
    pub int8: Vec<i8>,
    pub scales8: Vec<f16>,
    /// 4-bit: `k` numbers below 16; for each 32 a scale and a minimum below 64; for each 256 their units. `w = d · scale · q − dmin · min`.
    pub int4: Vec<u8>,
    pub scales4: Vec<u8>,
    pub mins4: Vec<u8>,
    pub d: Vec<f16>,
    pub dmin: Vec<f16>,
}

/// A weight matrix `[n, k]`, packed.
pub struct Packed {
    pub n: usize,
    pub k: usize,
    pub format: WeightFormat,
    pub columns: Columns,
    /// Columns side by side of one kind: the lanes of a vector when gated.
    run: usize,
    data: PackedBytes,
}

/// The bytes of a packed matrix. They never change, so that they can be written to a file while they are in use.
#[derive(Clone)]
pub enum PackedBytes {
    /// Packed by this process.
    Made(Arc<MmapMut>),
    /// A part of a file that an earlier process wrote.
    Kept(Arc<Mmap>, Range<usize>),
}

impl std::ops::Deref for PackedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Made(bytes) => bytes,
            Self::Kept(file, range) => &file[range.clone()],
        }
    }
}

/// What a packed matrix is: two matrices with the same weights and this in common have the same bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedShape {
    pub n: usize,
    pub k: usize,
    pub format: WeightFormat,
    pub columns: Columns,
    /// Columns side by side of one kind, which depends on the processor's vectors.
    pub run: usize,
}

impl PackedShape {
    pub fn new(n: usize, k: usize, format: WeightFormat, columns: Columns) -> Self {
        let run = if columns == Columns::Plain { 0 } else { simd::lanes() };
        Self { n, k, format, columns, run }
    }

    pub fn bytes(&self) -> usize {
        Packed::bytes_of(self.n, self.k, self.format, self.columns)
    }
}

/// Where packed matrices are kept from one process to the next.
pub trait PackedStore: Send + Sync {
    /// The bytes of a matrix, as many as its shape says, when they were kept. `name` is that of its first tensor; a model asks for its
    /// matrices in the same order each time, and may have several of one name.
    fn find(&self, name: &str, shape: &PackedShape) -> Option<PackedBytes>;

    /// Takes note of a matrix that was not found and has been packed.
    fn keep(&self, name: &str, shape: &PackedShape, bytes: PackedBytes);
}

impl std::fmt::Debug for Packed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{}, {}] {:?} {:?}", self.n, self.k, self.format, self.columns)
    }
}

/// Memory that starts at a page and, where the system can, lies in large ones: a decode step walks through all of it.
pub(crate) fn pages(bytes: usize) -> std::io::Result<MmapMut> {
    let map = MmapMut::map_anon(bytes.max(1))?;
    #[cfg(target_os = "linux")]
    if bytes >= 1 << 21 {
        let _ = map.advise(memmap2::Advice::HugePage);
    }
    Ok(map)
}

/// Bytes of a panel of width `k`.
pub(super) fn panel_bytes(format: WeightFormat, k: usize) -> usize {
    match format {
        WeightFormat::F32 => k * PANEL * 4,
        WeightFormat::Bf16 => k.div_ceil(2) * PANEL * 4,
        WeightFormat::Int8 => k / BLOCK * BLOCK8,
        WeightFormat::Int4 => k / SUPER * SUPER4,
    }
}

impl Packed {
    /// Packs `[n, k]`; `fill(row, kept, buffers)` writes the buffers of the format, and may keep something of its own from row to row. Rows are
    /// asked for on all of rayon's threads, those of a panel one after another.
    pub fn new<T: Default>(
        n: usize,
        k: usize,
        format: WeightFormat,
        columns: Columns,
        fill: &(dyn Fn(usize, &mut T, &mut Row) + Sync),
    ) -> std::io::Result<Self> {
        assert!(k.is_multiple_of(format.block()), "rows of {k} weights cannot be {format:?}");
        assert!(columns == Columns::Plain || n.is_multiple_of(2), "gates and what they gate are as many");
        let per_panel = if columns == Columns::Plain { PANEL } else { PANEL / 2 };
        let panels = (if columns == Columns::Plain { n } else { n / 2 }).div_ceil(per_panel);
        let bytes = panel_bytes(format, k);
        let mut data = pages(panels * bytes)?;
        let mut packed = Self { n, k, format, columns, run: simd::lanes(), data: PackedBytes::Made(Arc::new(MmapMut::map_anon(1)?)) };
        use rayon::prelude::*;
        data[..panels * bytes].par_chunks_exact_mut(bytes).enumerate().for_each_init(
            || (T::default(), <[Row; PANEL]>::default()),
            |(kept, rows), (panel, bytes)| {
                for (column, buffers) in rows.iter_mut().enumerate() {
                    match packed.row_at(panel, column) {
                        Some(row) => fill(row, kept, buffers),
                        None => buffers.clear(format, k),
                    }
                }
                place(format, k, rows, bytes);
            },
        );
        packed.data = PackedBytes::Made(Arc::new(data));
        Ok(packed)
    }

    /// A matrix whose bytes were kept.
    ///
    /// # Panics
    /// When they are not as many as the shape says.
    pub fn kept(shape: &PackedShape, data: PackedBytes) -> Self {
        assert!(data.len() >= shape.bytes(), "{} bytes for {shape:?}", data.len());
        Self { n: shape.n, k: shape.k, format: shape.format, columns: shape.columns, run: simd::lanes(), data }
    }

    /// What it holds, for whoever keeps it.
    pub fn packed_bytes(&self) -> PackedBytes {
        self.data.clone()
    }

    pub fn panels(&self) -> usize {
        panels(self.n, self.columns)
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        Self::bytes_of(self.n, self.k, self.format, self.columns)
    }

    /// Bytes that a matrix would take.
    pub fn bytes_of(n: usize, k: usize, format: WeightFormat, columns: Columns) -> usize {
        panels(n, columns) * panel_bytes(format, k)
    }

    pub(super) fn data(&self) -> *const u8 {
        self.data.as_ptr()
    }

    /// The weight row that a panel's column holds.
    fn row_at(&self, panel: usize, column: usize) -> Option<usize> {
        let (half, row) = match self.columns {
            Columns::Plain => return Some(panel * PANEL + column).filter(|row| *row < self.n),
            Columns::Gated => {
                let (pair, within) = (column / (2 * self.run), column % (2 * self.run));
                (within / self.run, panel * PANEL / 2 + pair * self.run + within % self.run)
            }
        };
        (row < self.n / 2).then_some(half * self.n / 2 + row)
    }

    /// Row `row` of the matrix in f32, which for a tied head is the embedding of that token.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(self.columns == Columns::Plain && row < self.n && out.len() == self.k, "row {row} of {self:?}");
        let bytes = panel_bytes(self.format, self.k);
        let panel = &self.data[row / PANEL * bytes..][..bytes];
        let column = row % PANEL;
        let half = |at: usize| f16::from_le_bytes([panel[at], panel[at + 1]]).to_f32();
        match self.format {
            WeightFormat::F32 => out.iter_mut().enumerate().for_each(|(i, out)| {
                let at = (i * PANEL + column) * 4;
                *out = f32::from_le_bytes([panel[at], panel[at + 1], panel[at + 2], panel[at + 3]]);
            }),
            WeightFormat::Bf16 => out.iter_mut().enumerate().for_each(|(i, out)| {
                let at = ((i / 2 * PANEL + column) * 2 + i % 2) * 2;
                *out = bf16::from_le_bytes([panel[at], panel[at + 1]]).to_f32();
            }),
            WeightFormat::Int8 => out.iter_mut().enumerate().for_each(|(i, out)| {
                let block = i / BLOCK * BLOCK8;
                let at = block + 2 * PANEL + (i % BLOCK / 4 * PANEL + column) * 4 + i % 4;
                *out = half(block + 2 * column) * (i32::from(panel[at]) - 128) as f32;
            }),
            WeightFormat::Int4 => out.iter_mut().enumerate().for_each(|(i, out)| {
                let start = i / SUPER * SUPER4;
                let sub = start + 4 * PANEL + i % SUPER / BLOCK * SUB4;
                let group = i % BLOCK / 4;
                let byte = panel[sub + 2 * PANEL + (group % 4 * PANEL + column) * 4 + i % 4];
                let q = if group < 4 { byte & 15 } else { byte >> 4 };
                let (scale, min) = (f32::from(panel[sub + column]), f32::from(panel[sub + PANEL + column]));
                *out = half(start + 2 * column) * scale * f32::from(q) - half(start + 2 * PANEL + 2 * column) * min;
            }),
        }
    }
}

fn panels(n: usize, columns: Columns) -> usize {
    match columns {
        Columns::Plain => n.div_ceil(PANEL),
        Columns::Gated => (n / 2).div_ceil(PANEL / 2),
    }
}

impl Row {
    /// Makes it a row of zeros.
    fn clear(&mut self, format: WeightFormat, k: usize) {
        fn zeros<T: Clone>(buffer: &mut Vec<T>, len: usize, zero: T) {
            buffer.clear();
            buffer.resize(len, zero);
        }
        match format {
            WeightFormat::F32 => zeros(&mut self.f32, k, 0.0),
            WeightFormat::Bf16 => zeros(&mut self.bf16, k, bf16::ZERO),
            WeightFormat::Int8 => {
                zeros(&mut self.int8, k, 0);
                zeros(&mut self.scales8, k / BLOCK, f16::ZERO);
            }
            WeightFormat::Int4 => {
                zeros(&mut self.int4, k, 0);
                zeros(&mut self.scales4, k / BLOCK, 0);
                zeros(&mut self.mins4, k / BLOCK, 0);
                zeros(&mut self.d, k / SUPER, f16::ZERO);
                zeros(&mut self.dmin, k / SUPER, f16::ZERO);
            }
        }
    }
}

/// Bytes of one word of each of a panel's rows.
const LINE: usize = 4 * PANEL;

/// Writes rows side by side: `out[word][column]` is word `word` of row `column`. `read(row, first, words)` gives some words of a row from
/// `first` on. Done in tiles, since reading all rows at once, or writing one row at a time, would touch a cache line for each word.
fn interleave<const TILE: usize>(rows: &[Row; PANEL], out: &mut [u8], read: impl Fn(&Row, usize, &mut [u32])) {
    let mut tile = [[0u32; TILE]; PANEL];
    for (number, out) in out.chunks_mut(TILE * LINE).enumerate() {
        let words = out.len() / LINE;
        for (row, words_of_row) in rows.iter().zip(&mut tile) {
            read(row, number * TILE, &mut words_of_row[..words]);
        }
        for (word, line) in out.as_chunks_mut::<LINE>().0.iter_mut().enumerate() {
            for (bytes, words_of_row) in line.as_chunks_mut::<4>().0.iter_mut().zip(&tile) {
                *bytes = words_of_row[word].to_le_bytes();
            }
        }
    }
}

/// Writes a panel's rows into it.
fn place(format: WeightFormat, k: usize, rows: &[Row; PANEL], panel: &mut [u8]) {
    match format {
        WeightFormat::F32 => interleave::<16>(rows, panel, |row, first, words| {
            words.iter_mut().zip(&row.f32[first..k]).for_each(|(word, value)| *word = value.to_bits());
        }),
        WeightFormat::Bf16 => interleave::<16>(rows, panel, |row, first, words| {
            for (word, pair) in words.iter_mut().zip(row.bf16[2 * first..k].chunks(2)) {
                // Of an odd number of weights the last has no neighbour.
                let second = pair.get(1).copied().unwrap_or(bf16::ZERO);
                *word = u32::from(pair[0].to_bits()) | u32::from(second.to_bits()) << 16;
            }
        }),
        WeightFormat::Int8 => {
            for (index, block) in panel.chunks_exact_mut(BLOCK8).enumerate() {
                let (scales, values) = block.split_at_mut(2 * PANEL);
                scales.as_chunks_mut().0.iter_mut().zip(rows).for_each(|(bytes, row)| *bytes = row.scales8[index].to_le_bytes());
                interleave::<{ BLOCK / 4 }>(rows, values, |row, _, words| {
                    let (quads, _) = row.int8[index * BLOCK..][..BLOCK].as_chunks::<4>();
                    let word = |quad: &[i8; 4]| u32::from_le_bytes(quad.map(|value| value as u8)) ^ 0x8080_8080;
                    words.iter_mut().zip(quads).for_each(|(out, quad)| *out = word(quad));
                });
            }
        }
        WeightFormat::Int4 => panel.chunks_exact_mut(SUPER4).enumerate().for_each(|(index, block)| place4(index, rows, block)),
    }
}

/// Writes the 4-bit super-blocks of this number.
fn place4(index: usize, rows: &[Row; PANEL], block: &mut [u8]) {
    let (units, subs) = block.split_at_mut(4 * PANEL);
    let (d, dmin) = units.split_at_mut(2 * PANEL);
    d.as_chunks_mut().0.iter_mut().zip(rows).for_each(|(bytes, row)| *bytes = row.d[index].to_le_bytes());
    dmin.as_chunks_mut().0.iter_mut().zip(rows).for_each(|(bytes, row)| *bytes = row.dmin[index].to_le_bytes());
    for (sub, bytes) in subs.chunks_exact_mut(SUB4).enumerate() {
        let at = index * (SUPER / BLOCK) + sub;
        let (scales, rest) = bytes.split_at_mut(PANEL);
        let (mins, values) = rest.split_at_mut(PANEL);
        for (column, row) in rows.iter().enumerate() {
            (scales[column], mins[column]) = (row.scales4[at], row.mins4[at]);
        }
        interleave::<{ BLOCK / 8 }>(rows, values, |row, _, words| {
            let (low, high) = row.int4[at * BLOCK..][..BLOCK].split_at(BLOCK / 2);
            for (word, (low, high)) in words.iter_mut().zip(low.as_chunks::<4>().0.iter().zip(high.as_chunks::<4>().0)) {
                *word = u32::from_le_bytes(*low) | u32::from_le_bytes(*high) << 4;
            }
        });
    }
}
