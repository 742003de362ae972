//! A model's tensors in a checkpoint: under which prefix they are, which way matrices lie, fused or in parts.

use std::ops::Range;

use half::{bf16, f16};

use crate::checkpoint::{Checkpoint, Slice, StoredMatrix, Tiles};
use crate::error::Failure;
use crate::kernels::{Columns, MatrixSource};
use crate::models::families::{Model, TensorNames};
use crate::models::spec::{AttentionLayer, FeedForward, ModelSpec};

/// What stands before `embed_tokens` and `layers`.
const PREFIXES: [&str; 9] = ["model.", "ernie.", "", "language_model.model.", "model.language_model.", "bert.", "roberta.", "new.", "gte."];

/// What a pooling model was trained with beside what it is used for, and positions that some versions stored.
const OTHER_HEADS: [&str; 8] = ["lm_head.", "cls.", "pooler.", "classifier.", "head.", "decoder.", "score.", "position_ids"];

/// A part of a fused matrix: its name below the prefix, without `.weight`, and its output width.
pub type Part<'a> = (&'a str, usize);

/// See the module.
pub struct Tensors<'a> {
    checkpoint: &'a Checkpoint,
    pub names: TensorNames,
    prefix: &'static str,
    layers: usize,
    /// No text is generated, so that heads are none of the model.
    pools: bool,
    /// Linear weights are stored as `[in, out]`, as Paddle does.
    transposed: bool,
    /// The LM head is the embedding: the configuration says so, and no other head is stored.
    pub tied: bool,
    /// What is unusual and leads to no failure.
    pub warnings: Vec<String>,
}

impl<'a> Tensors<'a> {
    /// Finds out prefix and orientation, and whether a head of its own is stored.
    pub fn find(checkpoint: &'a Checkpoint, model: &Model) -> Result<Self, Failure> {
        let spec = &model.spec;
        let name = format!("{}.weight", model.names.embedding);
        let has_embedding = |prefix: &&str| checkpoint.contains(&format!("{prefix}{name}"));
        let prefix = PREFIXES.into_iter().find(has_embedding).ok_or_else(|| {
            let tried = format!("tried the prefixes {}", PREFIXES.map(|prefix| format!("{prefix:?}")).join(", "));
            Failure::internal(format!("{}: no tensor {name} ({tried})", checkpoint.name()))
        })?;
        let mut tensors = Self {
            checkpoint,
            names: model.names,
            prefix,
            layers: spec.layers.len(),
            pools: spec.pooling.is_some(),
            transposed: false,
            tied: spec.tied,
            warnings: Vec::new(),
        };
        tensors.transposed = tensors.is_transposed(spec);
        if spec.tied && spec.pooling.is_none() && checkpoint.contains(&tensors.head_name()) {
            tensors.tied = tensors.head(spec)?.equals(&tensors.embedding(spec)?);
        }
        tensors.warnings = tensors.unusual(spec);
        Ok(tensors)
    }

    fn unusual(&self, spec: &ModelSpec) -> Vec<String> {
        let (model, mut warnings) = (self.checkpoint.name(), Vec::new());
        if spec.tied && !self.tied {
            warnings.push(format!(
                "{model}: config.json says that the LM head is the embedding (tie_word_embeddings), but {} is there and is different: it is used. \
                 Set tie_word_embeddings to false in config.json",
                self.head_name()
            ));
        }
        if let Some(method) = spec.quantized.as_ref().filter(|_| self.checkpoint.packed_forms().is_none()) {
            warnings.push(format!(
                "{model}: config.json names quantization_config ({method}), but the weights are plain numbers: they are used as they are, and the \
                 quantization is not applied"
            ));
        }
        warnings
    }

    /// From the first layer's first matrix that is not square: a square one does not tell.
    fn is_transposed(&self, spec: &ModelSpec) -> bool {
        let (Some(layer), names) = (spec.layers.first(), &self.names) else { return false };
        let hidden = spec.hidden_size;
        let mut shapes = match layer.attention() {
            Some(AttentionLayer { spec: attention, .. }) => vec![
                (names.k, attention.kv_width(), hidden),
                (names.qkv, attention.qkv_width(), hidden),
                (names.q, attention.q_width(), hidden),
                (names.output, hidden, attention.q_width()),
            ],
            None => Vec::new(),
        };
        if let FeedForward::Dense(dense) = &layer.feed_forward {
            shapes.extend([(names.down, hidden, dense.intermediate), (names.gate, dense.intermediate, hidden)]);
            shapes.extend(names.gate_up.iter().map(|name| (*name, 2 * dense.intermediate, hidden)));
        }
        shapes.into_iter().filter(|(_, out, input)| out != input).find_map(|(name, out, input)| {
            let stored = self.checkpoint.shape(&self.full(&format!("{}.0.{name}.weight", names.layers)))?;
            if stored == [out, input] { Some(false) } else { (stored == [input, out]).then_some(true) }
        }) == Some(true)
    }

    fn full(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn head_name(&self) -> String {
        let plain = "lm_head.weight";
        let nested = self.prefix.strip_suffix("model.").map(|outer| format!("{outer}{plain}"));
        let names = [Some(plain.to_owned()), nested].into_iter().flatten();
        names.into_iter().find(|name| self.checkpoint.contains(name)).unwrap_or_else(|| self.full(plain))
    }

    /// Whether there is a matrix of this name.
    pub fn is_stored(&self, name: &str) -> bool {
        self.checkpoint.contains(&self.full(&format!("{name}.weight")))
    }

    /// Whether the experts of a layer lie in one tensor of this name, with or without a suffix.
    pub fn is_stacked(&self, name: &str) -> bool {
        self.checkpoint.contains(&self.stacked_name(name))
    }

    fn stacked_name(&self, name: &str) -> String {
        let plain = self.full(name);
        if self.checkpoint.contains(&plain) { plain } else { format!("{plain}.weight") }
    }

    /// The matrix `[out, input]` of one expert, `(number, experts)`, from a tensor `[experts, out, input]`; rows that take turns come one kind
    /// after the other.
    pub fn stacked(
        &self,
        name: &str,
        (number, experts): (usize, usize),
        out: usize,
        input: usize,
        columns: Columns,
    ) -> Result<StoredMatrix<'a>, Failure> {
        let (name, in_turns) = (self.stacked_name(name), self.names.stacked_in_turns);
        let whole = if in_turns && !self.checkpoint.is_packed(&name) {
            Slice { stack: Some((number, experts)), ..Slice::whole(name, out, input, true) }
        } else {
            Slice { rows: number * out..(number + 1) * out, ..Slice::whole(name, experts * out, input, false) }
        };
        if columns == Columns::Plain || !in_turns {
            return self.checkpoint.matrix(&[whole]);
        }
        let turn = |first: usize| Slice { rows: whole.rows.start + first..whole.rows.end, step: 2, ..whole.clone() };
        self.checkpoint.matrix(&[turn(0), turn(1)])
    }

    /// The bias `[out]` that belongs to [`Tensors::stacked`].
    pub fn stacked_bias(&self, name: &str, (number, experts): (usize, usize), out: usize, columns: Columns) -> Result<Vec<f32>, Failure> {
        let whole = Slice::whole(self.full(&format!("{name}_bias")), experts, out, false);
        let values = self.checkpoint.matrix(&[Slice { rows: number..number + 1, ..whole }])?.row(0, &mut Tiles::default()).to_vec();
        if columns == Columns::Plain || !self.names.stacked_in_turns {
            return Ok(values);
        }
        let turn = |first: usize| values.iter().skip(first).step_by(2).copied();
        Ok(turn(0).chain(turn(1)).collect())
    }

    /// The embedding, `[vocab, hidden]` in every layout.
    pub fn embedding(&self, spec: &ModelSpec) -> Result<StoredMatrix<'a>, Failure> {
        self.checkpoint.matrix(&[Slice::whole(
            self.full(&format!("{}.weight", self.names.embedding)),
            spec.vocab_size,
            spec.hidden_size,
            false,
        )])
    }

    /// The LM head when it is not the embedding. Paddle stores it as `[hidden, vocab]`.
    pub fn head(&self, spec: &ModelSpec) -> Result<StoredMatrix<'a>, Failure> {
        let (name, vocab, hidden) = (self.head_name(), spec.vocab_size, spec.hidden_size);
        let transposed = vocab != hidden && self.checkpoint.shape(&name) == Some(&[hidden, vocab]);
        self.checkpoint.matrix(&[Slice::whole(name, vocab, hidden, transposed)])
    }

    /// A table of rows under the prefix.
    pub fn table(&self, name: &str, rows: usize, width: usize) -> Result<StoredMatrix<'a>, Failure> {
        self.checkpoint.matrix(&[Slice::whole(self.full(&format!("{name}.weight")), rows, width, false)])
    }

    /// Gates and what they gate, of a tensor that has the gates last.
    pub fn gates_first(&self, name: &str, inner: usize, input: usize) -> Result<StoredMatrix<'a>, Failure> {
        let half = |rows| Slice { rows, ..Slice::whole(self.full(&format!("{name}.weight")), 2 * inner, input, self.transposed) };
        self.checkpoint.matrix(&[half(inner..2 * inner), half(0..inner)])
    }

    /// The matrix `[out, input]` of a layer behind the pooling. Heads stand beside the model or in it, and modules of Sentence
    /// Transformers in files of their own.
    pub fn head_matrix(&self, name: &str, out: usize, input: usize) -> Result<StoredMatrix<'a>, Failure> {
        self.checkpoint.matrix(&[Slice::whole(self.head_part(format!("{name}.weight")), out, input, false)])
    }

    pub fn head_vector(&self, name: &str, len: usize) -> Result<Vec<f32>, Failure> {
        self.checkpoint.vector(&self.head_part(name.to_owned()), len)
    }

    fn head_part(&self, name: String) -> String {
        let full = self.full(&name);
        if self.checkpoint.contains(&full) { full } else { name }
    }

    /// A vector under the prefix.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, Failure> {
        self.checkpoint.vector(&self.full(name), len)
    }

    /// A tensor `[channels, 1, kernel]` with all channels of its first column first.
    pub fn taps(&self, name: &str, channels: usize, kernel: usize) -> Result<Vec<f32>, Failure> {
        let source = self.checkpoint.matrix(&[Slice::whole(self.full(name), channels, kernel, false)])?;
        let (mut taps, mut reader) = (vec![0.0; channels * kernel], Reader::default());
        for channel in 0..channels {
            let row = MatrixSource::row_f32(&source, channel, &mut reader);
            row.iter().enumerate().for_each(|(tap, weight)| taps[tap * channels + channel] = *weight);
        }
        Ok(taps)
    }

    /// A matrix of rows of several tensors: of each its name, how many rows it has in all, and which of them.
    pub fn rows(&self, parts: &[(String, usize, Range<usize>)], input: usize) -> Result<StoredMatrix<'a>, Failure> {
        let slice = |(name, out, rows): &(String, usize, Range<usize>)| {
            let whole = Slice::whole(self.full(&format!("{name}.weight")), *out, input, self.transposed);
            Slice { rows: rows.clone(), ..whole }
        };
        self.checkpoint.matrix(&parts.iter().map(slice).collect::<Vec<_>>())
    }

    /// Some rows of a matrix `[out, input]`, turned into columns: `[input, rows]`.
    pub fn transposed_rows(&self, name: &str, out: usize, rows: Range<usize>, input: usize) -> Result<StoredMatrix<'a>, Failure> {
        let whole = Slice::whole(self.full(&format!("{name}.weight")), input, out, !self.transposed);
        self.checkpoint.matrix(&[Slice { columns: rows, ..whole }])
    }

    /// A matrix `[Σ out, input]` from its separate `parts`, or from one stored tensor that holds them in this order.
    pub fn matrix(&self, fused: &[String], parts: &[Part<'_>], input: usize) -> Result<StoredMatrix<'a>, Failure> {
        let slice = |name: &str, out: usize| Slice::whole(self.full(&format!("{name}.weight")), out, input, self.transposed);
        if let Some(name) = self.stored_fused(fused, "weight") {
            return self.checkpoint.matrix(&[slice(name, parts.iter().map(|part| part.1).sum())]);
        }
        let slices: Vec<Slice> = parts.iter().map(|(name, out)| slice(name, *out)).collect();
        if let Some(missing) = slices.iter().find(|slice| !self.checkpoint.contains(&slice.name)) {
            let fused: Vec<String> = fused.iter().map(|name| self.full(&format!("{name}.weight"))).collect();
            let names: Vec<&str> = std::iter::once(missing.name.as_str()).chain(fused.iter().map(String::as_str)).collect();
            return Err(self.checkpoint.missing(&names, &[missing.outputs, input]));
        }
        self.checkpoint.matrix(&slices)
    }

    /// Biases `[Σ out]` belonging to [`Tensors::matrix`].
    pub fn bias(&self, fused: &[String], parts: &[Part<'_>]) -> Result<Vec<f32>, Failure> {
        if let Some(name) = self.stored_fused(fused, "bias") {
            return self.vector(&format!("{name}.bias"), parts.iter().map(|part| part.1).sum());
        }
        let parts = parts.iter().map(|(name, out)| self.vector(&format!("{name}.bias"), *out)).collect::<Result<Vec<_>, _>>()?;
        Ok(parts.concat())
    }

    fn stored_fused<'n>(&self, fused: &'n [String], suffix: &str) -> Option<&'n String> {
        fused.iter().find(|name| self.checkpoint.contains(&self.full(&format!("{name}.{suffix}"))))
    }

    /// The model's name, for messages.
    pub fn model_name(&self) -> &str {
        self.checkpoint.name()
    }

    /// Tensors of the files that nothing asked for. Heads that predict several tokens are left out: some families call them so, others store
    /// them as layers after the last.
    pub fn unused(&self) -> Vec<String> {
        let layers = format!("{}{}.", self.prefix, self.names.layers);
        let is_beyond = |name: &str| {
            let index = name.strip_prefix(&layers).and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
            index.is_some_and(|index| index >= self.layers)
        };
        let is_head = |name: &str| self.pools && OTHER_HEADS.iter().any(|head| name.contains(head));
        self.checkpoint
            .unused()
            .into_iter()
            .filter(|name| !name.contains("mtp_") && !name.starts_with("mtp.") && !is_beyond(name) && !is_head(name))
            .collect()
    }

    /// A line for the log.
    pub fn describe(&self) -> String {
        if let Some(types) = self.checkpoint.gguf_types() {
            return format!("GGUF, {types}");
        }
        let layout = if self.transposed { "[in, out] (Paddle layout)" } else { "[out, in] (Hugging Face layout)" };
        let packed = self.checkpoint.packed_forms().map_or(String::new(), |forms| format!(", {forms}"));
        format!("prefix \"{}\", {layout}{packed}", self.prefix)
    }
}

/// What a thread keeps between the rows it reads.
#[derive(Default)]
pub struct Reader {
    f32: Tiles<f32>,
    bf16: Tiles<bf16>,
}

impl MatrixSource for StoredMatrix<'_> {
    type Reader = Reader;

    fn rows(&self) -> usize {
        StoredMatrix::rows(self)
    }

    fn width(&self) -> usize {
        self.width
    }

    fn is_bf16(&self) -> bool {
        StoredMatrix::is_bf16(self)
    }

    fn describe(&self, row: usize) -> String {
        StoredMatrix::describe(self, row)
    }

    fn row_f32<'r>(&'r self, row: usize, reader: &'r mut Reader) -> &'r [f32] {
        self.row(row, &mut reader.f32)
    }

    fn row_bf16<'r>(&'r self, row: usize, reader: &'r mut Reader) -> &'r [bf16] {
        self.row(row, &mut reader.bf16)
    }

    fn row_int8(&self, row: usize, values: &mut Vec<i8>, scales: &mut Vec<f16>) -> bool {
        StoredMatrix::row_int8(self, row, values, scales)
    }
}
