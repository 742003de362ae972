//! Matrices of quantized Safetensors checkpoints: several tensors that together are one, `weight = (level(code) − zero) · scale`.
//!
//! [`gather`] finds them by the method that `quantization_config` names and puts one entry in the place of each set of tensors, under the
//! name of the plain weight, so that nothing behind knows the difference. Rows are decoded while they are read.

use half::{bf16, f16};

use super::Bytes;
use super::stored::{Number, Stored};

mod codes;
mod gather;
mod methods;
#[cfg(test)]
mod tests;

use codes::{Codes, Place};
pub use gather::{Found, gather};
pub use methods::READABLE;

/// One such matrix.
#[derive(Debug)]
pub struct Packed {
    /// Of a stack of matrices the rows of all.
    pub rows: usize,
    pub width: usize,
    codes: Codes,
    scales: Scales,
    /// What stands for zero, for each scale.
    zeros: Option<Zeros>,
    /// The numbers are rounded to this type: the one that the method's own implementation computes in.
    round: Stored,
}

#[derive(Debug)]
struct Scales {
    numbers: Numbers,
    grid: Grid,
    /// Weights are multiplied by it in the end.
    factor: f32,
}

/// Which scale a weight has.
#[derive(Debug)]
enum Grid {
    /// One for each block of `rows × columns`: block row `r` and block column `c` have scale `r · row_stride + c · column_stride`.
    Blocks { rows: usize, columns: usize, row_stride: usize, column_stride: usize },
    /// Columns are in groups by a list of i32: group `g` of row `r` has scale `r · row_stride + g · column_stride`.
    Listed { groups: Place, row_stride: usize, column_stride: usize },
    /// One for each so many weights in the order of rows.
    Flat(usize),
}

/// Numbers by index.
#[derive(Debug)]
enum Numbers {
    Plain {
        place: Place,
        stored: Stored,
    },
    /// Exponents of two, 127 standing for 1.
    Exponents(Place),
    /// Quantized themselves: `levels[code] · scales[index / block] + offset` (bitsandbytes).
    Nested {
        place: Place,
        levels: Vec<f32>,
        scales: Vec<f32>,
        block: usize,
        offset: f32,
    },
}

#[derive(Debug)]
struct Zeros {
    codes: Codes,
    /// They lie `[groups, rows]`.
    turned: bool,
}

/// A matrix with the bytes of its files.
#[derive(Clone, Copy)]
pub struct View<'a> {
    packed: &'a Packed,
    files: &'a [Bytes],
}

/// Weights of one row that share a scale.
struct Run {
    end: usize,
    scale: f32,
    zero: f32,
}

impl<'a> View<'a> {
    pub fn new(packed: &'a Packed, files: &'a [Bytes]) -> Self {
        Self { packed, files }
    }

    fn bytes(self, place: &Place) -> &'a [u8] {
        &self.files[place.file].get()[place.range.clone()]
    }

    /// What the numbers are exactly, of the types that weights are held in.
    pub fn is_bf16(self) -> bool {
        self.packed.round == Stored::Bf16
    }

    fn number(self, index: usize) -> f32 {
        match &self.packed.scales.numbers {
            Numbers::Plain { place, stored } => plain(self.bytes(place), *stored, index),
            Numbers::Exponents(place) => exponent(self.bytes(place)[index]),
            Numbers::Nested { place, levels, scales, block, offset } => {
                levels[usize::from(self.bytes(place)[index])] * scales[index / block] + offset
            }
        }
    }

    /// The weights from `column` on, up to `limit`, that have one scale.
    fn run(self, row: usize, column: usize, limit: usize) -> Run {
        let width = self.packed.width;
        let (end, index, zero) = match &self.packed.scales.grid {
            Grid::Blocks { rows, columns, row_stride, column_stride } => {
                let (block, group) = (row / rows, column / columns);
                ((group + 1) * columns, block * row_stride + group * column_stride, (block, group))
            }
            Grid::Listed { groups, row_stride, column_stride } => {
                let at = &self.bytes(groups)[4 * column..][..4];
                let group = i32::from_le_bytes([at[0], at[1], at[2], at[3]]) as usize;
                (column + 1, row * row_stride + group * column_stride, (row, group))
            }
            Grid::Flat(block) => {
                let index = (row * width + column) / block;
                ((index + 1) * block - row * width, index, (0, index))
            }
        };
        let zero = self.packed.zeros.as_ref().map_or(0.0, |zeros| {
            let (row, column) = if zeros.turned { (zero.1, zero.0) } else { zero };
            zeros.codes.at(self.bytes(&zeros.codes.place), row, column)
        });
        Run { end: end.min(limit), scale: self.number(index), zero }
    }

    /// Calls `each(start, codes, run)` for the parts of a row's columns that have one scale; places count from the first column.
    fn runs(self, row: usize, first: usize, width: usize, mut each: impl FnMut(usize, &[u8], &Run)) {
        let packed = self.packed;
        let mut codes = vec![0; width];
        packed.codes.layout.read(self.bytes(&packed.codes.place), row, first, &mut codes);
        let mut at = first;
        while at < first + width {
            let run = self.run(row, at, first + width);
            each(at - first, &codes[at - first..run.end - first], &run);
            at = run.end;
        }
    }

    /// A row's weights from a column on.
    pub fn row<T: Number>(self, row: usize, first: usize, target: &mut [T]) {
        let (packed, factor) = (self.packed, self.packed.scales.factor);
        self.runs(row, first, target.len(), |start, codes, run| {
            for (target, code) in target[start..].iter_mut().zip(codes) {
                let value = (packed.codes.levels[usize::from(*code)] - run.zero) * run.scale * factor;
                *target = match packed.round {
                    Stored::Bf16 => T::from_bf16(bf16::from_f32(value)),
                    Stored::F16 => T::from_f32(f16::from_f32(value).to_f32()),
                    _ => T::from_f32(value),
                };
            }
        });
    }

    /// A row in the form of 8 bits, whole numbers from -127 to 127 and for each 32 of them a scale, where that form holds it without loss;
    /// `false` where it does not.
    pub fn row_int8(self, row: usize, first: usize, width: usize, values: &mut Vec<i8>, scales: &mut Vec<f16>) -> bool {
        const BLOCK: usize = 32;
        let packed = self.packed;
        // Levels that are halves of whole numbers are doubled.
        let double = packed.codes.levels.iter().any(|level| level.fract() != 0.0);
        let unit = if double { 2.0 } else { 1.0 };
        let is_whole = packed.codes.levels.iter().all(|level| (level * unit).fract() == 0.0 && level.abs() * unit <= 128.0);
        if !is_whole || packed.scales.factor != 1.0 || !width.is_multiple_of(BLOCK) {
            return false;
        }
        values.clear();
        scales.clear();
        let mut is_exact = true;
        self.runs(row, first, width, |start, codes, run| {
            let scale = f16::from_f32(run.scale / unit);
            is_exact &= scale.to_f32() == run.scale / unit && start.is_multiple_of(BLOCK) && codes.len().is_multiple_of(BLOCK);
            scales.extend(std::iter::repeat_n(scale, codes.len() / BLOCK));
            for code in codes {
                let value = (packed.codes.levels[usize::from(*code)] - run.zero) * unit;
                is_exact &= value.abs() <= 127.0;
                values.push(value as i8);
            }
        });
        is_exact
    }
}

fn plain(bytes: &[u8], stored: Stored, index: usize) -> f32 {
    match stored {
        Stored::F16 => f16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]).to_f32(),
        Stored::Bf16 => bf16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]).to_f32(),
        _ => {
            let bytes = &bytes[4 * index..][..4];
            f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
        }
    }
}

/// `2^(byte − 127)`; 255 is no number.
fn exponent(byte: u8) -> f32 {
    match byte {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        byte => f32::from_bits(u32::from(byte) << 23),
    }
}
