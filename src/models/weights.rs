//! Checkpoints: safetensors in the Hugging Face or the Paddle layout, with fused or separate projections, under either prefix.
//!
//! Everything becomes `[out, in]`, row-major, q/k/v and gate/up fused. On the CPU bf16 stays bf16 (it widens without loss inside the
//! kernels) and everything else becomes f32; on a GPU everything becomes bf16.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use candle_core::{DType, Device, Tensor};

use crate::error::Failure;
use crate::models::architecture::Architecture;
use crate::models::files::{ModelFiles, Source};

mod stored;

use stored::{Stored, StoredPart};
pub use stored::{StoredMatrix, Tiles};

/// Bytes of one file.
enum Bytes {
    Mapped(memmap2::Mmap),
    Embedded(&'static [u8]),
}

impl Bytes {
    fn open(source: &Source) -> Result<Self, Failure> {
        let path = match source {
            Source::Embedded(bytes) => return Ok(Bytes::Embedded(bytes)),
            Source::Path(path) => path,
        };
        let failed = |error: std::io::Error| Failure::internal(format!("weights file {}: {error}", path.display()));
        let file = std::fs::File::open(path).map_err(failed)?;
        // SAFETY: weight files are not changed while they are in use; a writer that truncated one would kill us with SIGBUS, as with every mapped file.
        #[allow(unsafe_code)]
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(failed)?;
        Ok(Bytes::Mapped(map))
    }

    fn get(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Embedded(bytes) => bytes,
        }
    }
}

struct Entry {
    file: usize,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    range: std::ops::Range<usize>,
}

/// How linear weights lie in the file: decided once per checkpoint, since a square matrix does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orientation {
    /// `[out, in]`: Hugging Face.
    OutIn,
    /// `[in, out]`: Paddle.
    InOut,
}

/// An opened checkpoint.
pub struct Checkpoint {
    name: String,
    files: Vec<Bytes>,
    entries: BTreeMap<String, Entry>,
    /// `ernie.` or `model.`.
    prefix: String,
    pub orientation: Orientation,
    /// The LM head is the embedding: the configuration says so, and no other head is stored.
    pub tied: bool,
    /// The configuration says that the weights are quantized, and by which method.
    quantized: Option<String>,
    used: Mutex<BTreeSet<String>>,
}

/// A part of a fused matrix: its name and its output width.
type Part<'a> = (&'a str, usize);

impl Checkpoint {
    /// Maps the files, reads their headers, and finds out prefix and orientation.
    pub fn open(files: &ModelFiles, shape: &Architecture) -> Result<Self, Failure> {
        let mut checkpoint = Self {
            name: files.name.clone(),
            files: Vec::new(),
            entries: BTreeMap::new(),
            prefix: String::new(),
            orientation: Orientation::OutIn,
            tied: shape.tie_word_embeddings,
            quantized: shape.quantized.clone(),
            used: Mutex::default(),
        };
        for file in files.weight_files()? {
            let source = files.get(&file).ok_or_else(|| Failure::internal(format!("{} ({}) lacks {file}", files.name, files.origin)))?;
            checkpoint.add_file(&file, Bytes::open(source)?)?;
        }
        checkpoint.prefix = ["model.", "ernie.", ""]
            .into_iter()
            .find(|prefix| checkpoint.entries.contains_key(&format!("{prefix}embed_tokens.weight")))
            .ok_or_else(|| {
                Failure::internal(format!(
                    "{}: no tensor embed_tokens.weight (tried the prefixes \"model.\", \"ernie.\" and none)",
                    files.name
                ))
            })?
            .to_string();
        checkpoint.orientation = checkpoint.find_orientation(shape);
        checkpoint.tied = shape.tie_word_embeddings && checkpoint.head_is_embedding(shape)?;
        Ok(checkpoint)
    }

    fn add_file(&mut self, file: &str, bytes: Bytes) -> Result<(), Failure> {
        let broken = |problem: String| Failure::internal(format!("weights file {file} of {}: {problem}", self.name));
        let (header, metadata) = safetensors::SafeTensors::read_metadata(bytes.get()).map_err(|error| broken(error.to_string()))?;
        for (name, info) in metadata.tensors() {
            // The header's length field and the header come before the data.
            let (from, to) = (info.data_offsets.0 + header + 8, info.data_offsets.1 + header + 8);
            // That shape and type make these bytes was checked when the header was read. Types that cannot be read are refused where such
            // a tensor is asked for: others (positions, masks, statistics) may lie beside the weights.
            if to > bytes.get().len() {
                return Err(broken(format!("tensor {name}: the file is cut short or its header is wrong")));
            }
            let entry = Entry { file: self.files.len(), dtype: info.dtype, shape: info.shape.clone(), range: from..to };
            self.entries.insert(name.clone(), entry);
        }
        self.files.push(bytes);
        Ok(())
    }

    /// From the first matrix that is not square.
    fn find_orientation(&self, a: &Architecture) -> Orientation {
        let (h, q, kv, i) = (a.hidden_size, a.q_width(), a.kv_width(), a.intermediate_size);
        let shapes = [
            ("self_attn.k_proj", kv, h),
            ("self_attn.qkv_proj", q + 2 * kv, h),
            ("self_attn.q_proj", q, h),
            ("self_attn.o_proj", h, q),
            ("mlp.down_proj", h, i),
            ("mlp.up_gate_proj", 2 * i, h),
            ("mlp.gate_proj", i, h),
        ];
        for (name, out, input) in shapes {
            if let Some(entry) = self.entries.get(&format!("{}layers.0.{name}.weight", self.prefix)).filter(|_| out != input) {
                if entry.shape == [out, input] {
                    return Orientation::OutIn;
                }
                if entry.shape == [input, out] {
                    return Orientation::InOut;
                }
            }
        }
        Orientation::OutIn
    }

    /// A vector under the prefix, such as a norm's weight, in f32 on the CPU and bf16 on a GPU.
    pub fn vector(&self, name: &str, len: usize, device: &Device) -> Result<Tensor, Failure> {
        let full = format!("{}{name}", self.prefix);
        let (entry, stored) = self.entry(&full, &[len])?;
        if entry.shape != [len] {
            return Err(self.wrong_shape(&full, entry, &format!("[{len}]")));
        }
        let mut values = vec![0f32; len];
        StoredPart { name: full, bytes: self.bytes(entry), stored, rows: 1, transposed: false }.copy(0, &mut values, len);
        let dtype = if device.is_cpu() { DType::F32 } else { DType::BF16 };
        Tensor::from_vec(values, len, device).and_then(|t| t.to_dtype(dtype)).map_err(device_failure)
    }

    /// The embedding, `[vocab, hidden]` in every layout.
    pub fn embedding(&self, a: &Architecture) -> Result<StoredMatrix<'_>, Failure> {
        let name = format!("{}embed_tokens.weight", self.prefix);
        self.stack(&[(&name, a.vocab_size)], a.hidden_size, Some(false))
    }

    /// The LM head when it is not the embedding. Paddle stores an untied one as `[hidden, vocab]`.
    pub fn head(&self, a: &Architecture) -> Result<StoredMatrix<'_>, Failure> {
        let name = self.head_name();
        let transposed = self.entries.get(&name).map(|entry| entry.shape == [a.hidden_size, a.vocab_size] && a.hidden_size != a.vocab_size);
        self.stack(&[(&name, a.vocab_size)], a.hidden_size, transposed)
    }

    fn head_name(&self) -> String {
        let plain = "lm_head.weight";
        if self.entries.contains_key(plain) { plain.to_string() } else { format!("{}{plain}", self.prefix) }
    }

    /// No head is stored beside the embedding, or one that is equal to it. A different one counts, whatever the configuration says, as in
    /// transformers 5.
    fn head_is_embedding(&self, a: &Architecture) -> Result<bool, Failure> {
        if !self.entries.contains_key(&self.head_name()) {
            return Ok(true);
        }
        Ok(self.head(a)?.equals(&self.embedding(a)?))
    }

    /// A matrix `[Σ out, input]` from the separate `parts`, or from one stored tensor `fused` that holds them in this order.
    /// Names are without prefix and without `.weight`.
    pub fn matrix(&self, fused: Option<&str>, parts: &[Part<'_>], input: usize) -> Result<StoredMatrix<'_>, Failure> {
        let full = |name: &str| format!("{}{name}.weight", self.prefix);
        if let Some(fused) = fused.map(full).filter(|name| self.entries.contains_key(name)) {
            return self.stack(&[(&fused, parts.iter().map(|part| part.1).sum())], input, None);
        }
        let parts: Vec<(String, usize)> = parts.iter().map(|(name, out)| (full(name), *out)).collect();
        if let Some((missing, out)) = parts.iter().find(|(name, _)| !self.entries.contains_key(name)) {
            let fused: Vec<String> = fused.map(full).into_iter().collect();
            let names: Vec<&str> = std::iter::once(missing.as_str()).chain(fused.iter().map(String::as_str)).collect();
            return Err(self.missing(&names, &[*out, input]));
        }
        let parts: Vec<Part<'_>> = parts.iter().map(|(name, out)| (name.as_str(), *out)).collect();
        self.stack(&parts, input, None)
    }

    /// Biases `[Σ out]` belonging to [`Checkpoint::matrix`].
    pub fn bias(&self, fused: Option<&str>, parts: &[Part<'_>], device: &Device) -> Result<Tensor, Failure> {
        if let Some(fused) = fused.filter(|name| self.entries.contains_key(&format!("{}{name}.bias", self.prefix))) {
            return self.vector(&format!("{fused}.bias"), parts.iter().map(|part| part.1).sum(), device);
        }
        let parts = parts.iter().map(|(name, out)| self.vector(&format!("{name}.bias"), *out, device)).collect::<Result<Vec<_>, _>>()?;
        Tensor::cat(&parts, 0).map_err(device_failure)
    }

    fn stack(&self, parts: &[Part<'_>], width: usize, transposed: Option<bool>) -> Result<StoredMatrix<'_>, Failure> {
        let mut matrix = StoredMatrix { model: &self.name, width, parts: Vec::new() };
        for (name, rows) in parts {
            matrix.parts.push(self.checked(name, *rows, width, transposed)?);
        }
        Ok(matrix)
    }

    /// A matrix whose shape and type are right.
    fn checked(&self, name: &str, out: usize, input: usize, transposed: Option<bool>) -> Result<StoredPart<'_>, Failure> {
        let (entry, stored) = self.entry(name, &[out, input])?;
        let transposed = transposed.unwrap_or(self.orientation == Orientation::InOut);
        let expected = if transposed { [input, out] } else { [out, input] };
        if entry.shape != expected {
            return Err(self.wrong_shape(name, entry, &format!("{expected:?} ({:?})", self.orientation)));
        }
        Ok(StoredPart { name: name.to_string(), bytes: self.bytes(entry), stored, rows: out, transposed })
    }

    /// A tensor that is used from now on, and its type.
    fn entry(&self, name: &str, shape: &[usize]) -> Result<(&Entry, Stored), Failure> {
        let entry = self.entries.get(name).ok_or_else(|| self.missing(&[name], shape))?;
        let stored = Stored::of(entry.dtype).ok_or_else(|| {
            let (model, dtype, hint) = (&self.name, entry.dtype, self.quantization_hint());
            Failure::internal(format!(
                "{model}: tensor {name} has type {dtype:?}; F32, F16, BF16 (or U16 holding bf16 bits) can be read{hint}"
            ))
        })?;
        if let Ok(mut used) = self.used.lock() {
            used.insert(name.to_string());
        }
        Ok((entry, stored))
    }

    fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.files[entry.file].get()[entry.range.clone()]
    }

    fn missing(&self, names: &[&str], shape: &[usize]) -> Failure {
        let (model, names, hint) = (&self.name, names.join(" or "), self.quantization_hint());
        Failure::internal(format!("{model}: tensor {names} is missing (expected shape {shape:?}){hint}"))
    }

    /// The likely reason, when a tensor is not there or not a plain one.
    fn quantization_hint(&self) -> String {
        match &self.quantized {
            Some(method) => format!(
                ". Its config.json names quantization_config ({method}): weights packed so are not supported, use the model's unquantized weights"
            ),
            None => String::new(),
        }
    }

    /// What is unusual about this checkpoint and leads to no failure. To be asked when the weights were found to be readable.
    pub fn warnings(&self, shape: &Architecture) -> Vec<String> {
        let mut warnings = Vec::new();
        if shape.tie_word_embeddings && !self.tied {
            warnings.push(format!(
                "{}: config.json says that the LM head is the embedding (tie_word_embeddings), but {} is there and is different: it is used. \
                 Set tie_word_embeddings to false in config.json",
                self.name,
                self.head_name()
            ));
        }
        if let Some(method) = &self.quantized {
            warnings.push(format!(
                "{}: config.json names quantization_config ({method}), but the weights are plain numbers: they are used as they are, and the \
                 quantization is not applied",
                self.name
            ));
        }
        warnings
    }

    fn wrong_shape(&self, name: &str, entry: &Entry, expected: &str) -> Failure {
        Failure::internal(format!("{}: tensor {name} has shape {:?}, expected {expected}", self.name, entry.shape))
    }

    /// Tensors of the file that nothing asked for, multi-token-prediction heads left out.
    pub fn unused(&self) -> Vec<String> {
        let used = self.used.lock().map(|used| used.clone()).unwrap_or_default();
        self.entries.keys().filter(|name| !used.contains(*name) && !name.contains("mtp_")).cloned().collect()
    }

    /// A line for the log: `model. prefix, [out, in]`.
    pub fn describe(&self) -> String {
        format!(
            "prefix \"{}\", {}",
            self.prefix,
            if self.orientation == Orientation::OutIn { "[out, in] (Hugging Face layout)" } else { "[in, out] (Paddle layout)" }
        )
    }
}

pub(crate) fn device_failure(error: candle_core::Error) -> Failure {
    Failure::internal(format!("device: {error}"))
}
