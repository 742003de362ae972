//! Weight matrices as they lie in the files: read row by row, so that no second copy of a matrix is ever made, or as a tensor.

use std::ops::Range;

use candle_core::{Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use super::device_failure;
use crate::error::Failure;

/// The type of a stored tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored {
    F32,
    F16,
    /// Also U16: older Paddle versions write bf16 bits under that name.
    Bf16,
}

impl Stored {
    /// `None`: a type that no weights are read from.
    pub fn of(dtype: safetensors::Dtype) -> Option<Self> {
        match dtype {
            safetensors::Dtype::F32 => Some(Self::F32),
            safetensors::Dtype::F16 => Some(Self::F16),
            safetensors::Dtype::BF16 | safetensors::Dtype::U16 => Some(Self::Bf16),
            _ => None,
        }
    }
}

/// A matrix `[rows, width]` as it lies in the files: one tensor, or several one below the other.
pub struct StoredMatrix<'a> {
    pub(super) model: &'a str,
    /// Numbers in a row.
    pub width: usize,
    pub(super) parts: Vec<StoredPart<'a>>,
}

pub(super) struct StoredPart<'a> {
    pub name: String,
    pub bytes: &'a [u8],
    pub stored: Stored,
    pub rows: usize,
    /// Stored as `[width, rows]`.
    pub transposed: bool,
}

/// Rows that are read together: of a transposed tensor their numbers are neighbours.
const TILE: usize = 32;

/// What a thread keeps between the rows it reads: the rows beside them, of two places, since gates and what they gate are read in turn.
#[derive(Default)]
pub struct Tiles<T> {
    tiles: [(Range<usize>, Vec<T>); 2],
    oldest: usize,
}

impl<'a> StoredMatrix<'a> {
    /// One tensor of f32, for tests.
    #[cfg(test)]
    pub(crate) fn of_f32(bytes: &'a [u8], rows: usize, width: usize, transposed: bool) -> Self {
        let part = StoredPart { name: "test".into(), bytes, stored: Stored::F32, rows, transposed };
        Self { model: "test", width, parts: vec![part] }
    }
}

impl StoredMatrix<'_> {
    pub fn rows(&self) -> usize {
        self.parts.iter().map(|part| part.rows).sum()
    }

    /// All of it is bf16.
    pub fn is_bf16(&self) -> bool {
        self.parts.iter().all(|part| part.stored == Stored::Bf16)
    }

    /// The same numbers, however they are stored.
    pub fn equals(&self, other: &Self) -> bool {
        if let ([one], [two]) = (self.parts.as_slice(), other.parts.as_slice())
            && (one.stored, one.transposed, one.rows) == (two.stored, two.transposed, two.rows)
        {
            return one.bytes == two.bytes;
        }
        let (mut tiles, mut others) = (Tiles::<f32>::default(), Tiles::<f32>::default());
        (self.rows(), self.width) == (other.rows(), other.width)
            && (0..self.rows()).all(|row| self.row(row, &mut tiles) == other.row(row, &mut others))
    }

    /// The model and the tensor that row `row` belongs to, for messages.
    pub fn describe(&self, row: usize) -> String {
        let (part, _) = self.part(row);
        format!("{}: tensor {}", self.model, part.name)
    }

    /// Row `row`.
    pub fn row<'t, T: Number>(&self, row: usize, tiles: &'t mut Tiles<T>) -> &'t [T] {
        let found = tiles.tiles.iter().position(|(rows, _)| rows.contains(&row));
        let at = found.unwrap_or_else(|| {
            let at = tiles.oldest;
            tiles.oldest = 1 - at;
            let (part, first) = self.part(row);
            let within = row - first;
            // NOTE: counted from the part's start, so that a tile ends where its tensor ends.
            let start = if part.transposed { within / TILE * TILE } else { within };
            let count = if part.transposed { TILE.min(part.rows - start) } else { 1 };
            let (rows, values) = &mut tiles.tiles[at];
            *rows = first + start..first + start + count;
            values.resize(count * self.width, T::default());
            part.copy(start, values, self.width);
            at
        });
        let (rows, values) = &tiles.tiles[at];
        &values[(row - rows.start) * self.width..][..self.width]
    }

    /// The whole, on a device: bf16 on a GPU and where all of it is stored so, else f32.
    pub fn tensor(&self, device: &Device) -> Result<Tensor, Failure> {
        if device.is_cpu() && !self.is_bf16() { self.read::<f32>(device) } else { self.read::<bf16>(device) }
    }

    fn read<T: Number>(&self, device: &Device) -> Result<Tensor, Failure> {
        let mut values = vec![T::default(); self.rows() * self.width];
        let mut rest = values.as_mut_slice();
        for part in &self.parts {
            let (target, tail) = rest.split_at_mut(part.rows * self.width);
            let tiles = target.par_chunks_mut(TILE * self.width).enumerate();
            tiles.for_each(|(tile, target)| part.copy(tile * TILE, target, self.width));
            rest = tail;
        }
        Tensor::from_vec(values, (self.rows(), self.width), device).map_err(device_failure)
    }

    /// The part that holds a row, and that part's first row.
    fn part(&self, row: usize) -> (&StoredPart<'_>, usize) {
        let (mut first, mut last) = (0, &self.parts[0]);
        for part in &self.parts[1..] {
            if row < first + last.rows {
                break;
            }
            (first, last) = (first + last.rows, part);
        }
        (last, first)
    }
}

impl StoredPart<'_> {
    /// Reads the rows from `first` on into `target [rows, width]`.
    pub fn copy<T: Number>(&self, first: usize, target: &mut [T], width: usize) {
        match self.stored {
            Stored::F32 => self.copy_as(first, target, width, |b: [u8; 4]| T::from_f32(f32::from_le_bytes(b))),
            Stored::F16 => self.copy_as(first, target, width, |b: [u8; 2]| T::from_f32(f16::from_le_bytes(b).to_f32())),
            Stored::Bf16 => self.copy_as(first, target, width, |b: [u8; 2]| T::from_bf16(bf16::from_le_bytes(b))),
        }
    }

    fn copy_as<T: Number, const N: usize>(&self, first: usize, target: &mut [T], width: usize, read: impl Fn([u8; N]) -> T) {
        let (values, _) = self.bytes.as_chunks::<N>();
        if self.transposed {
            let count = target.len() / width;
            for i in 0..width {
                for (row, value) in values[i * self.rows + first..][..count].iter().enumerate() {
                    target[row * width + i] = read(*value);
                }
            }
        } else {
            target.iter_mut().zip(&values[first * width..]).for_each(|(target, value)| *target = read(*value));
        }
    }
}

/// A type weights are read as.
pub trait Number: Copy + Default + Send + Sync + candle_core::WithDType {
    fn from_f32(x: f32) -> Self;
    fn from_bf16(x: bf16) -> Self;
}

impl Number for f32 {
    fn from_f32(x: f32) -> Self {
        x
    }
    fn from_bf16(x: bf16) -> Self {
        x.to_f32()
    }
}

impl Number for bf16 {
    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }
    fn from_bf16(x: bf16) -> Self {
        x
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The value of row `row` of a part's column `i`: exact in every type.
    fn value(part: usize, row: usize, i: usize) -> f32 {
        ((part * 131 + row * 17 + i * 7) % 256) as f32 - 128.0
    }

    fn bytes(part: usize, rows: usize, width: usize, stored: Stored, transposed: bool) -> Vec<u8> {
        let at = |n: usize| if transposed { value(part, n % rows, n / rows) } else { value(part, n / width, n % width) };
        let number = |n: usize| match stored {
            Stored::F32 => at(n).to_le_bytes().to_vec(),
            Stored::F16 => f16::from_f32(at(n)).to_le_bytes().to_vec(),
            Stored::Bf16 => bf16::from_f32(at(n)).to_le_bytes().to_vec(),
        };
        (0..rows * width).flat_map(number).collect()
    }

    proptest! {
        /// Rows come right in any order, whatever they were stored as, from any thread's point of view.
        #[test]
        fn rows_in_any_order(
            parts in prop::collection::vec((1usize..80, 0usize..3, any::<bool>()), 1..4),
            width in 1usize..9,
            order in prop::collection::vec(any::<prop::sample::Index>(), 1..100),
        ) {
            let kinds = [Stored::F32, Stored::F16, Stored::Bf16];
            let data: Vec<_> =
                parts.iter().enumerate().map(|(n, (rows, kind, transposed))| bytes(n, *rows, width, kinds[*kind], *transposed)).collect();
            let stored = parts.iter().zip(&data).map(|((rows, kind, transposed), bytes)| StoredPart {
                name: "w".into(), bytes, stored: kinds[*kind], rows: *rows, transposed: *transposed,
            });
            let matrix = StoredMatrix { model: "test", width, parts: stored.collect() };
            let expected: Vec<Vec<f32>> = parts.iter().enumerate()
                .flat_map(|(n, (rows, ..))| (0..*rows).map(move |row| (0..width).map(|i| value(n, row, i)).collect()))
                .collect();
            prop_assert_eq!(matrix.rows(), expected.len());
            let (mut tiles, mut halves) = (Tiles::<f32>::default(), Tiles::<bf16>::default());
            for index in order {
                let row = index.index(expected.len());
                prop_assert_eq!(matrix.row(row, &mut tiles), &expected[row][..]);
                let half: Vec<f32> = matrix.row(row, &mut halves).iter().map(|x| x.to_f32()).collect();
                prop_assert_eq!(&half, &expected[row]);
            }
            let tensor = matrix.tensor(&Device::Cpu).unwrap().to_dtype(candle_core::DType::F32).unwrap();
            prop_assert_eq!(tensor.to_vec2::<f32>().unwrap(), expected);
        }
    }
}
