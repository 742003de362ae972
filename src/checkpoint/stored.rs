//! Weight matrices as they lie in the files: read row by row, so that no second copy of a matrix is ever made.

use std::ops::Range;

use half::{bf16, f16};

use super::gguf::{Blocks, TensorType};
use super::packed::View;

/// The type of a stored tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored {
    F32,
    F16,
    /// Also U16: older Paddle versions write bf16 bits under that name.
    Bf16,
    /// Quantized, in a GGUF file.
    Blocks(Blocks),
    /// Quantized, in several tensors.
    Packed,
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

    /// The same of a GGUF file's tensor.
    pub fn of_gguf(kind: TensorType) -> Option<Self> {
        match kind.name() {
            "F32" => Some(Self::F32),
            "F16" => Some(Self::F16),
            "BF16" => Some(Self::Bf16),
            _ => kind.blocks().map(Self::Blocks),
        }
    }
}

/// A matrix `[rows, width]` as it lies in the files: one tensor or a part of it, or several one below the other.
pub struct StoredMatrix<'a> {
    pub(super) model: &'a str,
    /// Numbers in a row.
    pub width: usize,
    pub(super) parts: Vec<StoredPart<'a>>,
}

pub(super) struct StoredPart<'a> {
    pub name: String,
    /// Of the whole tensor.
    pub bytes: &'a [u8],
    pub stored: Stored,
    /// Of [`Stored::Packed`].
    pub packed: Option<View<'a>>,
    /// The tensor's `(outputs, inputs)`.
    pub shape: (usize, usize),
    /// Of these outputs, each so many behind the last,
    pub rows: Range<usize>,
    pub step: usize,
    /// and of each its inputs from here on.
    pub first_column: usize,
    /// Stored as `[inputs, outputs]`.
    pub transposed: bool,
}

/// Rows that are read together: of a transposed tensor their numbers are neighbours.
const TILE: usize = 32;

/// Columns of such a tile that are turned round together.
const SQUARE: usize = 16;

/// What a thread keeps between the rows it reads: the rows beside them, of two places, since gates and what they gate are read in turn.
#[derive(Default)]
pub struct Tiles<T> {
    tiles: [(Range<usize>, Vec<T>); 2],
    oldest: usize,
}

impl StoredMatrix<'_> {
    pub fn rows(&self) -> usize {
        self.parts.iter().map(StoredPart::row_count).sum()
    }

    /// All of it is bf16.
    pub fn is_bf16(&self) -> bool {
        let is_bf16 = |part: &StoredPart<'_>| part.packed.map_or(part.stored == Stored::Bf16, View::is_bf16);
        self.parts.iter().all(is_bf16)
    }

    /// Some of it is quantized.
    pub fn is_quantized(&self) -> bool {
        self.parts.iter().any(|part| matches!(part.stored, Stored::Blocks(_) | Stored::Packed))
    }

    /// The same numbers, however they are stored.
    pub fn equals(&self, other: &Self) -> bool {
        if let ([one], [two]) = (self.parts.as_slice(), other.parts.as_slice())
            && one.packed.is_none()
            && (one.stored, one.transposed, one.shape) == (two.stored, two.transposed, two.shape)
            && (&one.rows, one.first_column) == (&two.rows, two.first_column)
            && one.row_count() == one.shape.0
            && self.width == one.shape.1
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
            let count = if part.transposed { TILE.min(part.row_count() - start) } else { 1 };
            let (rows, values) = &mut tiles.tiles[at];
            *rows = first + start..first + start + count;
            values.resize(count * self.width, T::default());
            part.copy(start, values, self.width);
            at
        });
        let (rows, values) = &tiles.tiles[at];
        &values[(row - rows.start) * self.width..][..self.width]
    }

    /// Row `row` in the form of 8 bits, where that loses nothing: see [`View::row_int8`].
    pub fn row_int8(&self, row: usize, values: &mut Vec<i8>, scales: &mut Vec<f16>) -> bool {
        let (part, first) = self.part(row);
        part.packed.is_some_and(|view| view.row_int8(part.row_of(row - first), part.first_column, self.width, values, scales))
    }

    /// The part that holds a row, and that part's first row.
    fn part(&self, row: usize) -> (&StoredPart<'_>, usize) {
        let (mut first, mut last) = (0, &self.parts[0]);
        for part in &self.parts[1..] {
            if row < first + last.row_count() {
                break;
            }
            (first, last) = (first + last.row_count(), part);
        }
        (last, first)
    }
}

impl StoredPart<'_> {
    pub fn row_count(&self) -> usize {
        self.rows.len().div_ceil(self.step)
    }

    /// Of the part's row, the one of the tensor.
    fn row_of(&self, row: usize) -> usize {
        self.rows.start + row * self.step
    }

    /// Reads the part's rows from its `first` on into `target [rows, width]`.
    pub fn copy<T: Number>(&self, first: usize, target: &mut [T], width: usize) {
        match self.stored {
            Stored::F32 => self.copy_as(first, target, width, |b: [u8; 4]| T::from_f32(f32::from_le_bytes(b))),
            Stored::F16 => self.copy_as(first, target, width, |b: [u8; 2]| T::from_f32(f16::from_le_bytes(b).to_f32())),
            Stored::Bf16 => self.copy_as(first, target, width, |b: [u8; 2]| T::from_bf16(bf16::from_le_bytes(b))),
            Stored::Blocks(blocks) => self.copy_blocks(blocks, first, target, width),
            Stored::Packed => {
                for (row, target) in target.chunks_exact_mut(width).enumerate() {
                    self.packed.iter().for_each(|view| view.row(self.row_of(first + row), self.first_column, target));
                }
            }
        }
    }

    /// Of each row the blocks that hold its columns. Such tensors are never transposed.
    fn copy_blocks<T: Number>(&self, blocks: Blocks, first: usize, target: &mut [T], width: usize) {
        let (size, bytes) = (blocks.kind.block(), blocks.kind.bytes());
        let row_bytes = self.shape.1 / size * bytes;
        let columns = self.first_column / size..(self.first_column + width).div_ceil(size);
        let mut decoded = Vec::new();
        for (row, target) in target.chunks_exact_mut(width).enumerate() {
            let row = &self.bytes[self.row_of(first + row) * row_bytes..][..row_bytes];
            blocks.decode(&row[columns.start * bytes..columns.end * bytes], &mut decoded);
            let source = &decoded[self.first_column - columns.start * size..];
            target.iter_mut().zip(source).for_each(|(target, value)| *target = T::from_f32(*value));
        }
    }

    fn copy_as<T: Number, const N: usize>(&self, first: usize, target: &mut [T], width: usize, read: impl Fn([u8; N]) -> T) {
        let (values, _) = self.bytes.as_chunks::<N>();
        let (outputs, inputs) = self.shape;
        if self.transposed {
            // By way of a small square: writing one column at a time would touch a cache line of every row for each number.
            let (count, mut square) = (target.len() / width, [[T::default(); TILE]; SQUARE]);
            for start in (0..width).step_by(SQUARE) {
                let columns = SQUARE.min(width - start);
                for (i, line) in square[..columns].iter_mut().enumerate() {
                    let column = &values[(self.first_column + start + i) * outputs + self.row_of(first)..];
                    match self.step {
                        1 => line[..count].iter_mut().zip(column).for_each(|(to, value)| *to = read(*value)),
                        step => line[..count].iter_mut().zip(column.iter().step_by(step)).for_each(|(to, value)| *to = read(*value)),
                    }
                }
                for (row, target) in target.chunks_exact_mut(width).enumerate() {
                    target[start..start + columns].iter_mut().zip(&square).for_each(|(to, line)| *to = line[row]);
                }
            }
        } else {
            for (row, target) in target.chunks_exact_mut(width).enumerate() {
                let source = &values[self.row_of(first + row) * inputs + self.first_column..][..width];
                target.iter_mut().zip(source).for_each(|(target, value)| *target = read(*value));
            }
        }
    }
}

/// A type weights are read as.
pub trait Number: Copy + Default + Send + Sync {
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
            Stored::Blocks(_) | Stored::Packed => unreachable!("blocks have tests of their own"),
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
            let part = |(n, (rows, kind, transposed)): (usize, &(usize, usize, bool))| StoredPart {
                name: "w".into(), bytes: &data[n], stored: kinds[*kind], shape: (*rows, width), rows: 0..*rows, first_column: 0,
                packed: None, step: 1, transposed: *transposed,
            };
            let matrix = StoredMatrix { model: "test", width, parts: parts.iter().enumerate().map(part).collect() };
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
            // A part of each tensor: some of its rows, and of those some columns.
            let cut = |(n, (rows, ..)): (usize, &(usize, usize, bool))| {
                let part = part((n, &parts[n]));
                StoredPart { rows: rows / 3..*rows, first_column: width / 2, ..part }
            };
            let cut = StoredMatrix { model: "test", width: width - width / 2, parts: parts.iter().enumerate().map(cut).collect() };
            let expected: Vec<Vec<f32>> = parts.iter().enumerate()
                .flat_map(|(n, (rows, ..))| (rows / 3..*rows).map(move |row| (width / 2..width).map(|i| value(n, row, i)).collect()))
                .collect();
            let mut tiles = Tiles::<f32>::default();
            for (row, expected) in expected.iter().enumerate() {
                prop_assert_eq!(cut.row(row, &mut tiles), &expected[..]);
            }
        }
    }
}
