//! Finds the sets of tensors that a quantization method writes, and checks them. What is wrong with one is said with its file, its name and
//! the field.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value as Json;

use super::codes::{Codes, Layout, Place};
use super::{Grid, Numbers, Packed, Scales, Zeros, methods};
use crate::checkpoint::stored::Stored;
use crate::checkpoint::{Bytes, Entry, StoredType};
use crate::error::Failure;

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    pub method: String,
    /// The forms of the matrices, and how many have each.
    pub forms: BTreeMap<String, usize>,
}

/// A tensor as the file has it.
pub struct Raw {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    pub place: Place,
}

impl Raw {
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Replaces the tensors that the configuration's method writes by the matrices that they are. `config`: config.json; `names`: of the files.
/// A method that is not known changes nothing: whoever misses a weight says why.
pub fn gather(
    entries: &mut BTreeMap<String, Entry>,
    files: &[Bytes],
    names: &[String],
    model: &str,
    config: &Json,
) -> Result<Option<Found>, Failure> {
    let quantization = &config["quantization_config"];
    let Some((method, find)) = methods::of(quantization) else { return Ok(None) };
    let mut gatherer = Gatherer { entries, files, names, model, method, quantization, config, found: Found::default() };
    find(&mut gatherer)?;
    gatherer.drop_activation_scales();
    let found = Found { method: method.to_owned(), ..gatherer.found };
    Ok((!found.forms.is_empty()).then_some(found))
}

/// See [`gather`].
pub struct Gatherer<'a> {
    entries: &'a mut BTreeMap<String, Entry>,
    files: &'a [Bytes],
    names: &'a [String],
    model: &'a str,
    pub method: &'static str,
    /// `quantization_config`.
    pub quantization: &'a Json,
    config: &'a Json,
    found: Found,
}

/// Scales of what is not weights, by the ends of their names.
const ACTIVATION_SCALES: [&str; 10] = [
    ".input_scale",
    ".input_zero_point",
    ".input_global_scale",
    ".activation_scale",
    ".output_scale",
    ".output_zero_point",
    ".q_scale",
    ".k_scale",
    ".v_scale",
    ".weight_format",
];

impl Gatherer<'_> {
    /// The names that end so, without the end.
    pub fn ending(&self, end: &str) -> Vec<String> {
        self.entries.keys().filter_map(|name| name.strip_suffix(end)).map(str::to_owned).collect()
    }

    /// The names of tensors of one of these types.
    pub fn typed(&self, dtypes: &[&str]) -> Vec<String> {
        let is_one = |entry: &Entry| dtypes.contains(&entry.stored.name.as_ref());
        self.entries.iter().filter(|(_, entry)| is_one(entry)).map(|(name, _)| name.clone()).collect()
    }

    /// Takes a tensor that may be there, of one of these types.
    pub fn take_if(&mut self, name: &str, dtypes: &[&str]) -> Result<Option<Raw>, Failure> {
        let Some(entry) = self.entries.remove(name) else { return Ok(None) };
        let dtype = entry.stored.name.into_owned();
        let place = Place { file: entry.file, range: entry.range };
        let raw = Raw { name: name.to_owned(), dtype, shape: entry.shape, place };
        if !dtypes.contains(&raw.dtype.as_str()) {
            return Err(self.broken(&raw, format!("its type is {}, expected {}", raw.dtype, dtypes.join(" or "))));
        }
        Ok(Some(raw))
    }

    /// Takes a tensor that must be there, under any of these names, because `of` is.
    pub fn take(&mut self, of: &Raw, names: &[String], dtypes: &[&str]) -> Result<Raw, Failure> {
        for name in names {
            if let Some(raw) = self.take_if(name, dtypes)? {
                return Ok(raw);
            }
        }
        Err(self.broken(of, format!("it is packed by {}, and {} is missing", self.method, names.join(" or "))))
    }

    /// Puts a matrix in the place of its tensors; `shape` is that of the plain weight.
    pub fn put(&mut self, name: String, of: &Raw, shape: Vec<usize>, form: String, packed: Packed) -> Result<(), Failure> {
        let Codes { place, layout, .. } = &packed.codes;
        let needed = layout.bytes(packed.rows, packed.width);
        if needed.is_none_or(|needed| needed > place.range.len()) || packed.rows == 0 || packed.width == 0 {
            let problem = format!("its shape is {:?}, which does not hold the codes of a matrix {shape:?}", of.shape);
            return Err(self.broken(of, problem));
        }
        let stored = StoredType { name: format!("{} {form}", self.method).into(), stored: Some(Stored::Packed) };
        let entry = Entry { file: of.place.file, stored, shape, range: of.place.range.clone(), packed: Some(Box::new(packed)) };
        *self.found.forms.entry(form).or_default() += 1;
        if self.entries.insert(name.clone(), entry).is_some() {
            return Err(self.broken(of, format!("{name} is there too, as plain numbers")));
        }
        Ok(())
    }

    /// An error about a tensor.
    pub fn broken(&self, raw: &Raw, problem: String) -> Failure {
        let file = self.names.get(raw.place.file).map_or("", String::as_str);
        Failure::internal(format!("weights file {file} of {}: tensor {}: {problem}", self.model, raw.name))
    }

    pub fn expect_shape(&self, raw: &Raw, shapes: &[&[usize]]) -> Result<(), Failure> {
        if shapes.contains(&raw.shape.as_slice()) {
            return Ok(());
        }
        let shapes = shapes.iter().map(|shape| format!("{shape:?}")).collect::<Vec<_>>().join(" or ");
        Err(self.broken(raw, format!("its shape is {:?}, expected {shapes}", raw.shape)))
    }

    /// An error about a field of `quantization_config`.
    pub fn wrong_field(&self, field: &str, problem: &str) -> Failure {
        let value = &self.quantization[field];
        Failure::internal(format!("config.json of {}: quantization_config, \"{field}\": {value} {problem}", self.model))
    }

    /// A whole number of `quantization_config`.
    pub fn integer(&self, field: &str) -> Result<Option<i64>, Failure> {
        match &self.quantization[field] {
            Json::Null => Ok(None),
            value => value.as_i64().map(Some).ok_or_else(|| self.wrong_field(field, "is not a whole number")),
        }
    }

    /// The one of these bits that a field names.
    pub fn bits(&self, field: &str, allowed: &[usize]) -> Result<usize, Failure> {
        let list = allowed.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        let problem = format!("is not supported for {}: {list} bits can be read", self.method);
        let bits = self.integer(field)?.and_then(|bits| usize::try_from(bits).ok());
        bits.filter(|bits| allowed.contains(bits)).ok_or_else(|| self.wrong_field(field, &problem))
    }

    /// Refuses a text in a field that is none of these; absent is fine.
    pub fn one_of(&self, field: &str, allowed: &[&str]) -> Result<(), Failure> {
        match &self.quantization[field] {
            Json::Null => Ok(()),
            Json::String(text) if allowed.iter().any(|allowed| text.eq_ignore_ascii_case(allowed)) => Ok(()),
            _ => Err(self.wrong_field(field, &format!("is not supported for {}: {} can be read", self.method, allowed.join(", ")))),
        }
    }

    /// Two whole numbers of a block's rows and columns.
    pub fn block(&self, value: &Json) -> Option<[usize; 2]> {
        let size = |value: &Json| value.as_u64().filter(|size| *size > 0).map(|size| size as usize);
        match value.as_array()?.as_slice() {
            [rows, columns] => Some([size(rows)?, size(columns)?]),
            _ => None,
        }
    }

    /// The type that the model's own numbers have.
    pub fn model_dtype(&self) -> Stored {
        let dtype = ["dtype", "torch_dtype"].iter().find_map(|key| self.config[*key].as_str()).unwrap_or_default();
        match dtype.trim_start_matches("torch.") {
            "bfloat16" => Stored::Bf16,
            "float16" => Stored::F16,
            _ => Stored::F32,
        }
    }

    /// The numbers of a small tensor of integers.
    pub fn integers(&self, raw: &Raw) -> Vec<i64> {
        let bytes = &self.files[raw.place.file].get()[raw.place.range.clone()];
        match raw.dtype.as_str() {
            "I64" => bytes.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect(),
            _ => bytes.as_chunks::<4>().0.iter().map(|bytes| i64::from(i32::from_le_bytes(*bytes))).collect(),
        }
    }

    /// The numbers of a small tensor of floats.
    pub fn floats(&self, raw: &Raw) -> Vec<f32> {
        let bytes = &self.files[raw.place.file].get()[raw.place.range.clone()];
        let stored = self.stored(raw);
        (0..raw.count()).map(|index| super::plain(bytes, stored, index)).collect()
    }

    pub fn bytes(&self, raw: &Raw) -> &[u8] {
        &self.files[raw.place.file].get()[raw.place.range.clone()]
    }

    fn stored(&self, raw: &Raw) -> Stored {
        match raw.dtype.as_str() {
            "F16" => Stored::F16,
            "BF16" => Stored::Bf16,
            _ => Stored::F32,
        }
    }

    /// A tensor of scales as numbers, and the type that they are computed with.
    pub fn scale_numbers(&self, raw: &Raw) -> (Numbers, Stored) {
        match raw.dtype.as_str() {
            "U8" | "F8_E8M0" => (Numbers::Exponents(raw.place.clone()), Stored::Bf16),
            _ => (Numbers::Plain { place: raw.place.clone(), stored: self.stored(raw) }, self.stored(raw)),
        }
    }

    /// The grid of scales that lie in blocks of a matrix `[stack · out, width]`: one for all, one for each row, one for each group of columns,
    /// or one for each block: of the size that the configuration names, else of the size that the grid makes.
    pub fn block_grid(&self, scales: &Raw, [stack, out, width]: [usize; 3], block: Option<[usize; 2]>) -> Result<Grid, Failure> {
        let rows = stack * out;
        let count = scales.count();
        let dims: Vec<usize> = scales.shape.iter().copied().filter(|size| *size != 1).collect();
        if count == stack && dims.len() <= 1 {
            return Ok(Grid::Blocks { rows: out, columns: width, row_stride: 1, column_stride: 1 });
        }
        if dims == [rows] || dims == [stack, out] {
            return Ok(Grid::Blocks { rows: 1, columns: width, row_stride: 1, column_stride: 1 });
        }
        let dims = if scales.shape.len() == 2 || (scales.shape.len() == 3 && scales.shape[0] == stack) {
            let at = scales.shape.len() - 2;
            Some([scales.shape[at], scales.shape[at + 1]])
        } else {
            None
        };
        let wrong = || {
            let block = block.map_or(String::new(), |[rows, columns]| format!(" in blocks of {rows}×{columns}"));
            self.broken(scales, format!("its shape is {:?}, which does not fit a matrix [{out}, {width}]{block}", scales.shape))
        };
        let [down, across] = dims.filter(|dims| dims[0] * dims[1] * stack == count && dims[0] * dims[1] > 0).ok_or_else(wrong)?;
        let even = || (out.is_multiple_of(down) && width.is_multiple_of(across)).then(|| [out / down, width / across]);
        let [rows, columns] = block.or_else(even).ok_or_else(wrong)?;
        if down != out.div_ceil(rows) || across != width.div_ceil(columns) {
            return Err(wrong());
        }
        // Blocks of a stack must end where its matrices end.
        if stack > 1 && !out.is_multiple_of(rows) {
            return Err(wrong());
        }
        Ok(Grid::Blocks { rows, columns, row_stride: across, column_stride: 1 })
    }

    /// Scales of activations and of the cache have no use here: activations stay in 16 or 32 bits.
    fn drop_activation_scales(&mut self) {
        let is_one = |name: &String| ACTIVATION_SCALES.iter().any(|end| name.ends_with(end));
        let names: BTreeSet<String> = self.entries.keys().filter(|name| is_one(name)).cloned().collect();
        names.iter().for_each(|name| drop(self.entries.remove(name)));
        if let Some(first) = names.iter().find(|name| !name.ends_with(".weight_format")) {
            tracing::info!(
                "{}: {} scales of activations ({first} …) are not applied: activations and the KV cache are not quantized here",
                self.model,
                names.len()
            );
        }
    }
}

/// A matrix whose weights are `(level − zero) · scale`.
pub fn matrix(rows: usize, width: usize, codes: Codes, scales: (Numbers, Grid), zeros: Option<Zeros>, round: Stored) -> Packed {
    let scales = Scales { numbers: scales.0, grid: scales.1, factor: 1.0 };
    Packed { rows, width, codes, scales, zeros, round }
}

/// Codes of `bits` in rows that begin at a byte of their own.
pub fn rows_of(place: Place, bits: usize, row_bytes: usize, levels: Vec<f32>) -> Codes {
    Codes { place, layout: Layout::Rows { bits, row_bytes }, levels }
}
