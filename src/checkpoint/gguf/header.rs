//! The head of a GGUF file: metadata by key, and where each tensor lies. Nothing is believed before it was measured against the file: a
//! lying count or length is an error that names its field, and no more is allocated than the file has bytes for.
//!
//! Of our own: candle's reader makes a `Vec` of enums of every array, of which a vocabulary has three as long as itself. Here arrays stay
//! where they are.

use std::collections::HashSet;

use super::formats::TensorType;

/// Where tensors may begin, unless `general.alignment` says otherwise.
const ALIGNMENT: u64 = 32;
/// The longest key and tensor name.
const LONGEST_NAME: usize = 65_535;
/// As many as ggml allows.
const MOST_DIMENSIONS: u32 = 4;

/// One value of the metadata.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value<'a> {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(&'a str),
    Array(Array<'a>),
}

/// An array, whose values stay in the file. They were all looked at once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Array<'a> {
    kind: u32,
    pub len: usize,
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    pub fn iter(self) -> impl Iterator<Item = Value<'a>> {
        let mut cursor = Cursor { bytes: self.bytes, at: 0 };
        (0..self.len).map_while(move |_| cursor.value(self.kind).ok())
    }
}

impl<'a> Value<'a> {
    pub fn text(self) -> Option<&'a str> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    /// A whole number that is not negative.
    pub fn integer(self) -> Option<u64> {
        match self {
            Self::Unsigned(number) => Some(number),
            Self::Signed(number) => u64::try_from(number).ok(),
            _ => None,
        }
    }

    pub fn number(self) -> Option<f64> {
        match self {
            Self::Float(number) => Some(number),
            Self::Unsigned(number) => Some(number as f64),
            Self::Signed(number) => Some(number as f64),
            _ => None,
        }
    }
}

/// One tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor<'a> {
    pub name: &'a str,
    pub kind: TensorType,
    /// The slowest dimension first, as safetensors have it: the file says it the other way round.
    pub shape: Vec<usize>,
    /// Bytes of the file.
    pub range: std::ops::Range<usize>,
}

/// What stands before the tensors' numbers.
#[derive(Debug)]
pub struct Header<'a> {
    pub metadata: Vec<(&'a str, Value<'a>)>,
    pub tensors: Vec<Tensor<'a>>,
}

impl<'a> Header<'a> {
    /// Reads the head of a whole file.
    pub fn parse(file: &'a [u8]) -> Result<Self, String> {
        let mut cursor = Cursor { bytes: file, at: 0 };
        if cursor.take(4, "the magic number")? != b"GGUF" {
            return Err("it does not begin with GGUF: not a GGUF file".to_owned());
        }
        match cursor.u32("the version")? {
            2 | 3 => {}
            version if matches!(version.swap_bytes(), 1..=3) => {
                return Err("its byte order is big-endian, which is not supported".to_owned());
            }
            version => return Err(format!("GGUF version {version} is not supported (2 and 3 are)")),
        }
        let tensors = cursor.u64("the number of tensors")?;
        let entries = cursor.u64("the number of metadata entries")?;
        let metadata = cursor.metadata(entries)?;
        let alignment = match metadata.iter().find(|(key, _)| *key == "general.alignment") {
            None => ALIGNMENT,
            Some((_, value)) => value
                .integer()
                .filter(|alignment| *alignment <= 1 << 20 && alignment.is_power_of_two() && *alignment >= 8)
                .ok_or("\"general.alignment\" must be a power of two from 8 on")?,
        };
        let tensors = cursor.tensors(tensors, alignment)?;
        Ok(Self { metadata, tensors })
    }

    pub fn get(&self, key: &str) -> Option<Value<'a>> {
        self.metadata.iter().find(|(name, _)| *name == key).map(|(_, value)| *value)
    }

    /// A string. An error names the key.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>, String> {
        self.get(key).map(|value| value.text().ok_or_else(|| format!("metadata \"{key}\" must be a string"))).transpose()
    }

    /// A whole number that is not negative, and so for the others.
    pub fn integer(&self, key: &str) -> Result<Option<u64>, String> {
        self.get(key).map(|value| value.integer().ok_or_else(|| format!("metadata \"{key}\" must be a whole number"))).transpose()
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>, String> {
        let flag = |value| if let Value::Bool(flag) = value { Ok(flag) } else { Err(format!("metadata \"{key}\" must be true or false")) };
        self.get(key).map(flag).transpose()
    }

    pub fn array(&self, key: &str) -> Result<Option<Array<'a>>, String> {
        let array = |value| if let Value::Array(array) = value { Ok(array) } else { Err(format!("metadata \"{key}\" must be an array")) };
        self.get(key).map(array).transpose()
    }

    pub fn tensor(&self, name: &str) -> Option<&Tensor<'a>> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8], String> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let taken = usize::try_from(len).ok().and_then(|len| rest.get(..len)).ok_or_else(|| {
            format!(
                "{what}: {len} bytes at byte {} are asked for, and the file has {} more: it is cut short or damaged",
                self.at,
                rest.len()
            )
        })?;
        self.at += taken.len();
        Ok(taken)
    }

    fn fixed<const N: usize>(&mut self, what: &str) -> Result<[u8; N], String> {
        let bytes = self.take(N as u64, what)?;
        bytes.try_into().map_err(|_| format!("{what}: cut short"))
    }

    fn u32(&mut self, what: &str) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.fixed(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.fixed(what)?))
    }

    fn text(&mut self, what: &str) -> Result<&'a str, String> {
        let len = self.u64(what)?;
        std::str::from_utf8(self.take(len, what)?).map_err(|_| format!("{what} is not UTF-8"))
    }

    fn name(&mut self, what: &str) -> Result<&'a str, String> {
        let name = self.text(what)?;
        if name.is_empty() || name.len() > LONGEST_NAME {
            return Err(format!("{what} has {} bytes (1 to {LONGEST_NAME} are allowed)", name.len()));
        }
        Ok(name)
    }

    fn metadata(&mut self, entries: u64) -> Result<Vec<(&'a str, Value<'a>)>, String> {
        let (mut metadata, mut seen) = (Vec::new(), HashSet::new());
        for index in 0..entries {
            let key = self.name(&format!("the key of metadata entry {index} of {entries}"))?;
            let named = |problem: String| format!("metadata \"{key}\": {problem}");
            if !seen.insert(key) {
                return Err(named("it is there twice".to_owned()));
            }
            let kind = self.u32("its type").map_err(named)?;
            metadata.push((key, self.value(kind).map_err(named)?));
        }
        Ok(metadata)
    }

    fn value(&mut self, kind: u32) -> Result<Value<'a>, String> {
        let what = "its value";
        Ok(match kind {
            0 => Value::Unsigned(u64::from(self.fixed::<1>(what)?[0])),
            1 => Value::Signed(i64::from(i8::from_le_bytes(self.fixed(what)?))),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.fixed(what)?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.fixed(what)?))),
            4 => Value::Unsigned(u64::from(self.u32(what)?)),
            5 => Value::Signed(i64::from(i32::from_le_bytes(self.fixed(what)?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.fixed(what)?))),
            7 => match self.fixed::<1>(what)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(format!("{other} is neither true (1) nor false (0)")),
            },
            8 => Value::Text(self.text(what)?),
            9 => Value::Array(self.array()?),
            10 => Value::Unsigned(self.u64(what)?),
            11 => Value::Signed(i64::from_le_bytes(self.fixed(what)?)),
            12 => Value::Float(f64::from_le_bytes(self.fixed(what)?)),
            other => return Err(format!("type {other} of a value is not known")),
        })
    }

    /// Walks over an array, so that nothing in it can fail later.
    fn array(&mut self) -> Result<Array<'a>, String> {
        let kind = self.u32("the type of its values")?;
        let len = self.u64("its length")?;
        let width = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 => 0,
            9 => return Err("arrays of arrays are not supported".to_owned()),
            other => return Err(format!("type {other} of an array's values is not known")),
        };
        let start = self.at;
        if width > 0 {
            let bytes = len.checked_mul(width).ok_or_else(|| format!("an array of {len} values is larger than any file"))?;
            let bytes = self.take(bytes, "an array")?;
            if let Some(other) = bytes.iter().find(|byte| kind == 7 && **byte > 1) {
                return Err(format!("{other} is neither true (1) nor false (0)"));
            }
        } else {
            for index in 0..len {
                self.text("a string of an array").map_err(|problem| format!("string {index} of {len}: {problem}"))?;
            }
        }
        Ok(Array { kind, len: len as usize, bytes: &self.bytes[start..self.at] })
    }

    fn tensors(&mut self, count: u64, alignment: u64) -> Result<Vec<Tensor<'a>>, String> {
        let (mut found, mut seen) = (Vec::new(), HashSet::new());
        for index in 0..count {
            let name = self.name(&format!("the name of tensor {index} of {count}"))?;
            let named = |problem: String| format!("tensor {name}: {problem}");
            if !seen.insert(name) {
                return Err(named("it is there twice".to_owned()));
            }
            found.push(self.tensor(name, alignment).map_err(named)?);
        }
        let data = (self.at as u64).next_multiple_of(alignment);
        let mut tensors = Vec::new();
        for (tensor, offset) in found {
            let (len, file) = (tensor.range.len() as u64, self.bytes.len());
            let from = data.checked_add(offset);
            let to = from.and_then(|from| from.checked_add(len)).filter(|to| *to <= file as u64).ok_or_else(|| {
                format!(
                    "tensor {}: its {len} bytes from byte {offset} of the data on do not lie in the file, which has {file} bytes: it is cut short \
                     or damaged",
                    tensor.name
                )
            })?;
            tensors.push(Tensor { range: (to - len) as usize..to as usize, ..tensor });
        }
        let mut order: Vec<&Tensor<'_>> = tensors.iter().collect();
        order.sort_by_key(|tensor| tensor.range.start);
        match order.windows(2).find(|pair| pair[0].range.end > pair[1].range.start) {
            Some(pair) => Err(format!("tensors {} and {} lie over each other", pair[0].name, pair[1].name)),
            None => Ok(tensors),
        }
    }

    /// A tensor whose range still counts from 0, and where it starts in the data.
    fn tensor(&mut self, name: &'a str, alignment: u64) -> Result<(Tensor<'a>, u64), String> {
        let dimensions = self.u32("the number of its dimensions")?;
        if dimensions > MOST_DIMENSIONS {
            return Err(format!("it has {dimensions} dimensions (at most {MOST_DIMENSIONS} are allowed)"));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = self.u64("a dimension")?;
            shape.push(usize::try_from(size).ok().filter(|size| *size > 0).ok_or_else(|| format!("a dimension of {size} cannot be"))?);
        }
        let kind = self.u32("its type")?;
        let kind = TensorType::of(kind).ok_or_else(|| format!("type {kind} of a tensor is not known"))?;
        let offset = self.u64("where it lies")?;
        if !offset.is_multiple_of(alignment) {
            return Err(format!("it lies at byte {offset} of the data, which is no multiple of the alignment ({alignment})"));
        }
        let (row, numbers) = (shape.first().copied().unwrap_or(1), shape.iter().try_fold(1usize, |all, size| all.checked_mul(*size)));
        if row % kind.block() != 0 {
            return Err(format!("rows of {row} numbers cannot be cut into blocks of {} ({})", kind.block(), kind.name()));
        }
        let bytes = numbers.and_then(|numbers| (numbers / kind.block()).checked_mul(kind.bytes()));
        let bytes = bytes.ok_or_else(|| format!("a tensor of shape {shape:?} is larger than any file"))?;
        shape.reverse();
        Ok((Tensor { name, kind, shape, range: 0..bytes }, offset))
    }
}
