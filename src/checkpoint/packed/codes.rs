//! Codes of few bits, as they lie in a tensor, and the numbers they stand for.

use std::ops::Range;

/// Where in a file a tensor's bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub file: usize,
    pub range: Range<usize>,
}

/// How the codes of a matrix lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Row by row, each from a byte of its own on; within a row `bits` after `bits`, from the lowest bit of the first byte on.
    Rows { bits: usize, row_bytes: usize },
    /// Row by row, two codes a byte, the first in the high bits (bitsandbytes).
    HighFirst { row_bytes: usize },
    /// Column by column: words of 32 bits `[words, rows]`; a row's codes fill its words from the lowest bit on (GPTQ).
    Columns { bits: usize, rows: usize },
    /// Words of 32 bits `[width, rows / 8]`, each with the codes of eight rows in AWQ's order.
    Awq { row_words: usize },
}

/// Which place of a word holds the code of row `i` of its eight.
const AWQ_PLACES: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

impl Layout {
    /// The code at a place of the matrix.
    pub fn at(self, bytes: &[u8], row: usize, column: usize) -> u8 {
        match self {
            Self::Rows { bits, row_bytes } => bits_at(&bytes[row * row_bytes..], column * bits, bits),
            Self::HighFirst { row_bytes } => {
                let byte = bytes[row * row_bytes + column / 2];
                if column.is_multiple_of(2) { byte >> 4 } else { byte & 15 }
            }
            Self::Columns { bits, rows } => {
                let (index, shift) = (column * bits / 32, column * bits % 32);
                let mut code = word(bytes, index * rows + row) >> shift;
                if shift + bits > 32 {
                    code |= word(bytes, (index + 1) * rows + row) << (32 - shift);
                }
                code as u8 & mask(bits)
            }
            Self::Awq { row_words } => (word(bytes, column * row_words + row / 8) >> (4 * AWQ_PLACES[row % 8])) as u8 & 15,
        }
    }

    /// A row's codes from `first` on, as many as there is room for.
    pub fn read(self, bytes: &[u8], row: usize, first: usize, codes: &mut [u8]) {
        match self {
            Self::Rows { bits: 8, row_bytes } => {
                let count = codes.len();
                codes.copy_from_slice(&bytes[row * row_bytes + first..][..count]);
            }
            Self::Rows { bits: 4, row_bytes } if first.is_multiple_of(2) => pairs(&bytes[row * row_bytes + first / 2..], codes, 0, 4),
            Self::HighFirst { row_bytes } if first.is_multiple_of(2) => pairs(&bytes[row * row_bytes + first / 2..], codes, 4, 0),
            _ => codes.iter_mut().enumerate().for_each(|(i, code)| *code = self.at(bytes, row, first + i)),
        }
    }

    /// Bytes that a matrix of so many rows and columns takes; `None`: it cannot lie so.
    pub fn bytes(self, rows: usize, width: usize) -> Option<usize> {
        match self {
            Self::Rows { bits, row_bytes } => (row_bytes >= (width * bits).div_ceil(8)).then_some(rows * row_bytes),
            Self::HighFirst { row_bytes } => (row_bytes * 2 == width).then_some(rows * row_bytes),
            Self::Columns { bits, rows: stride } => (stride == rows).then_some((width * bits).div_ceil(32) * 4 * rows),
            Self::Awq { row_words } => (row_words * 8 == rows).then_some(width * row_words * 4),
        }
    }
}

/// The largest code of so many bits.
pub fn mask(bits: usize) -> u8 {
    (0xff_u16 >> (8 - bits)) as u8
}

fn word(bytes: &[u8], index: usize) -> u32 {
    let bytes = &bytes[4 * index..][..4];
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// Up to eight bits from a bit's place on.
fn bits_at(bytes: &[u8], bit: usize, bits: usize) -> u8 {
    let (at, shift) = (bit / 8, bit % 8);
    let high = if shift + bits > 8 { u16::from(bytes[at + 1]) } else { 0 };
    ((u16::from(bytes[at]) | high << 8) >> shift) as u8 & mask(bits)
}

/// Two codes a byte, taken out with these shifts.
fn pairs(bytes: &[u8], codes: &mut [u8], first: u32, second: u32) {
    for (pair, byte) in codes.chunks_mut(2).zip(bytes) {
        pair[0] = byte >> first & 15;
        if let Some(code) = pair.get_mut(1) {
            *code = byte >> second & 15;
        }
    }
}

/// Codes with the numbers they stand for.
#[derive(Debug, Clone)]
pub struct Codes {
    pub place: Place,
    pub layout: Layout,
    /// By code.
    pub levels: Vec<f32>,
}

impl Codes {
    pub fn at(&self, bytes: &[u8], row: usize, column: usize) -> f32 {
        self.levels[usize::from(self.layout.at(bytes, row, column))]
    }
}

/// Whole numbers, the lowest code being `-offset`.
pub fn integers(bits: usize, offset: i32) -> Vec<f32> {
    (0..1i32 << bits).map(|code| (code - offset) as f32).collect()
}

/// Whole numbers of 8 bits with a sign.
pub fn signed() -> Vec<f32> {
    (0..=255u8).map(|code| f32::from(code as i8)).collect()
}

/// The floating point numbers of 8 bits without infinities: one sign, four bits of exponent, three of mantissa.
pub fn e4m3() -> Vec<f32> {
    (0..=255u8).map(|code| if code & 127 == 127 { f32::NAN } else { small_float(code, 3, 7) }).collect()
}

/// Those with five bits of exponent and two of mantissa, as in f16's upper half.
pub fn e5m2() -> Vec<f32> {
    (0..=255u8).map(|code| half::f16::from_bits(u16::from(code) << 8).to_f32()).collect()
}

fn small_float(code: u8, mantissa_bits: u32, bias: i32) -> f32 {
    let sign = if code & 128 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from((code & 127) >> mantissa_bits), f32::from(code & ((1 << mantissa_bits) - 1)));
    let fraction = mantissa / f32::from(1u8 << mantissa_bits);
    let size = if exponent == 0 { fraction * 2f32.powi(1 - bias) } else { (1.0 + fraction) * 2f32.powi(exponent - bias) };
    sign * size
}

/// The floating point numbers of 4 bits.
pub fn e2m1() -> Vec<f32> {
    let half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    half.into_iter().chain(half.map(|level: f32| -level)).collect()
}
