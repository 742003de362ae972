//! The types of a GGUF file's tensors. Numbers of the quantized ones lie in blocks of 32 or 256.

use std::borrow::Cow;

use candle_core::CpuStorage;
use candle_core::quantized::GgmlDType;

/// The number in the file, the name, numbers in a block and its bytes.
type Row = (u32, &'static str, usize, usize);

/// Every type that ggml has, so that one which is not read is refused by its name.
const TYPES: &[Row] = &[
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 36),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
];

/// A row of the table of types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorType(&'static Row);

impl TensorType {
    pub fn of(number: u32) -> Option<Self> {
        TYPES.iter().find(|(id, ..)| *id == number).map(Self)
    }

    pub fn name(self) -> &'static str {
        self.0.1
    }

    /// Numbers in a block.
    pub fn block(self) -> usize {
        self.0.2
    }

    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        self.0.3
    }

    /// How its blocks are read; `None`: they are plain numbers, or not read.
    pub fn blocks(self) -> Option<Blocks> {
        let decoder = match self.name() {
            "Q4_0" => Decoder::Candle(GgmlDType::Q4_0),
            "Q4_1" => Decoder::Candle(GgmlDType::Q4_1),
            "Q5_0" => Decoder::Candle(GgmlDType::Q5_0),
            "Q5_1" => Decoder::Candle(GgmlDType::Q5_1),
            "Q8_0" => Decoder::Candle(GgmlDType::Q8_0),
            "Q2_K" => Decoder::Candle(GgmlDType::Q2K),
            "Q3_K" => Decoder::Candle(GgmlDType::Q3K),
            "Q4_K" => Decoder::Candle(GgmlDType::Q4K),
            "Q5_K" => Decoder::Candle(GgmlDType::Q5K),
            "Q6_K" => Decoder::Candle(GgmlDType::Q6K),
            "IQ4_NL" => Decoder::Ours(iq4_nl),
            "IQ4_XS" => Decoder::Ours(iq4_xs),
            "MXFP4" => Decoder::Ours(mxfp4),
            _ => return None,
        };
        Some(Blocks { kind: self, decoder })
    }
}

/// Blocks that can be read.
#[derive(Debug, Clone, Copy)]
pub struct Blocks {
    pub kind: TensorType,
    decoder: Decoder,
}

impl PartialEq for Blocks {
    fn eq(&self, other: &Self) -> bool {
        self.kind == other.kind
    }
}

impl Eq for Blocks {}

#[derive(Debug, Clone, Copy)]
enum Decoder {
    Candle(GgmlDType),
    /// Those that candle lacks: the bytes of one block, and its numbers.
    Ours(fn(&[u8], &mut [f32])),
}

impl Blocks {
    /// The numbers of whole blocks.
    pub fn decode(self, bytes: &[u8], numbers: &mut Vec<f32>) {
        let count = bytes.len() / self.kind.bytes() * self.kind.block();
        match self.decoder {
            Decoder::Ours(decode) => {
                numbers.resize(count, 0.0);
                let blocks = bytes.chunks_exact(self.kind.bytes()).zip(numbers.chunks_exact_mut(self.kind.block()));
                blocks.for_each(|(block, numbers)| decode(block, numbers));
            }
            Decoder::Candle(dtype) => {
                let mut copy = Vec::new();
                match dtype.from_data(Cow::Borrowed(at_even_address(bytes, &mut copy))).dequantize(count) {
                    Ok(CpuStorage::F32(decoded)) => *numbers = decoded,
                    // Whoever reads them says which tensor holds NaN.
                    _ => *numbers = vec![f32::NAN; count],
                }
            }
        }
    }
}

/// candle takes blocks at even addresses only. Mapped files have them there; other bytes are copied.
fn at_even_address<'a>(bytes: &'a [u8], copy: &'a mut Vec<u8>) -> &'a [u8] {
    let is_odd = |bytes: &[u8]| !bytes.as_ptr().addr().is_multiple_of(2);
    if !is_odd(bytes) {
        return bytes;
    }
    copy.reserve_exact(bytes.len() + 1);
    let from = usize::from(is_odd(copy));
    copy.resize(from, 0);
    copy.extend_from_slice(bytes);
    &copy[from..]
}

fn half(bytes: &[u8]) -> f32 {
    half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// The 16 levels of IQ4.
const IQ4_LEVELS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// Twice the 16 numbers that 4 bits of floating point can be.
const FP4_LEVELS: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// 32 numbers in 16 bytes: the first half in the low bits, the second in the high ones.
fn nibbles(bytes: &[u8], scale: f32, levels: &[i8; 16], numbers: &mut [f32]) {
    for (i, byte) in bytes.iter().enumerate() {
        numbers[i] = scale * f32::from(levels[usize::from(byte & 15)]);
        numbers[i + 16] = scale * f32::from(levels[usize::from(byte >> 4)]);
    }
}

fn iq4_nl(block: &[u8], numbers: &mut [f32]) {
    nibbles(&block[2..], half(block), &IQ4_LEVELS, numbers);
}

/// Eight groups of 32, each with a scale of 6 bits: four in one place, two in another.
fn iq4_xs(block: &[u8], numbers: &mut [f32]) {
    let (unit, high) = (half(block), u16::from_le_bytes([block[2], block[3]]));
    for (group, numbers) in numbers.chunks_exact_mut(32).enumerate() {
        let low = block[4 + group / 2] >> (4 * (group % 2)) & 15;
        let scale = i32::from(low) | i32::from(high >> (2 * group) & 3) << 4;
        nibbles(&block[8 + 16 * group..][..16], unit * (scale - 32) as f32, &IQ4_LEVELS, numbers);
    }
}

/// The scale is a power of two: an exponent of f32, halved for the levels that are doubled.
fn mxfp4(block: &[u8], numbers: &mut [f32]) {
    let scale = match block[0] {
        exponent @ 0..=1 => f32::from_bits(0x0020_0000 << exponent),
        exponent => f32::from_bits(u32::from(exponent - 1) << 23),
    };
    nibbles(&block[1..], scale, &FP4_LEVELS, numbers);
}

#[cfg(test)]
mod tests;
