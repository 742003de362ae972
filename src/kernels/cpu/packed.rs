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

use half::{bf16, f16};
use memmap2::MmapMut;

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
    data: MmapMut,
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
        let mut packed = Self { n, k, format, columns, run: simd::lanes(), data: pages(panels * bytes)? };
        let mut data = std::mem::replace(&mut packed.data, MmapMut::map_anon(1)?);
        use rayon::prelude::*;
        data[..panels * bytes].par_chunks_exact_mut(bytes).enumerate().for_each_init(
            <(T, Row)>::default,
            |(kept, buffers), (panel, bytes)| {
                for column in 0..PANEL {
                    if let Some(row) = packed.row_at(panel, column) {
                        fill(row, kept, buffers);
                        place(format, k, buffers, column, bytes);
                    } else if format == WeightFormat::Int8 {
                        // The stored zero.
                        buffers.int8.clear();
                        buffers.int8.resize(k, 0);
                        buffers.scales8.clear();
                        buffers.scales8.resize(k / BLOCK, f16::ZERO);
                        place(format, k, buffers, column, bytes);
                    }
                }
            },
        );
        packed.data = data;
        Ok(packed)
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

/// Writes one row to its column of a panel.
fn place(format: WeightFormat, k: usize, row: &Row, column: usize, panel: &mut [u8]) {
    match format {
        WeightFormat::F32 => {
            for (i, value) in row.f32[..k].iter().enumerate() {
                panel[(i * PANEL + column) * 4..][..4].copy_from_slice(&value.to_le_bytes());
            }
        }
        WeightFormat::Bf16 => {
            for (i, value) in row.bf16[..k].iter().enumerate() {
                panel[((i / 2 * PANEL + column) * 2 + i % 2) * 2..][..2].copy_from_slice(&value.to_le_bytes());
            }
        }
        WeightFormat::Int8 => {
            for (block, (values, scale)) in panel.chunks_exact_mut(BLOCK8).zip(row.int8[..k].chunks_exact(BLOCK).zip(&row.scales8)) {
                block[2 * column..][..2].copy_from_slice(&scale.to_le_bytes());
                for (i, value) in values.iter().enumerate() {
                    block[2 * PANEL + (i / 4 * PANEL + column) * 4 + i % 4] = (*value as u8) ^ 0x80;
                }
            }
        }
        WeightFormat::Int4 => {
            for (index, block) in panel.chunks_exact_mut(SUPER4).enumerate() {
                block[2 * column..][..2].copy_from_slice(&row.d[index].to_le_bytes());
                block[2 * PANEL + 2 * column..][..2].copy_from_slice(&row.dmin[index].to_le_bytes());
                for (sub, bytes) in block[4 * PANEL..].chunks_exact_mut(SUB4).enumerate() {
                    let at = index * 8 + sub;
                    bytes[column] = row.scales4[at];
                    bytes[PANEL + column] = row.mins4[at];
                    let values = &row.int4[at * BLOCK..][..BLOCK];
                    for i in 0..BLOCK / 2 {
                        bytes[2 * PANEL + (i / 4 * PANEL + column) * 4 + i % 4] = values[i] | values[i + BLOCK / 2] << 4;
                    }
                }
            }
        }
    }
}
