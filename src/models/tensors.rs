//! A model's tensors in a checkpoint: under which prefix they are, which way matrices lie, fused or in parts.

use std::ops::Range;

use half::{bf16, f16};

use crate::checkpoint::{Checkpoint, Slice, StoredMatrix, Tiles};
use crate::error::Failure;
use crate::kernels::MatrixSource;
use crate::models::families::{Model, TensorNames};
use crate::models::spec::{AttentionLayer, FeedForward, ModelSpec};

/// What stands before `embed_tokens` and `layers`.
const PREFIXES: [&str; 9] = ["model.", "ernie.", "", "language_model.model.", "model.language_model.", "bert.", "roberta.", "new.", "gte."];

/// What a pooling model was trained with beside what it is used for, and positions that some versions stored.
const OTHER_HEADS: [&str; 8] = ["lm_head.", "cls.", "pooler.", "classifier.", "head.", "decoder.", "score.", "position_ids"];

/// Rows of a matrix: its name below the prefix, without `.weight`, how many rows it has in all, and which of them.
#[derive(Debug, Clone)]
pub struct Part<'a> {
    pub name: &'a str,
    pub out: usize,
    pub rows: Range<usize>,
}

impl<'a> Part<'a> {
    pub fn new(name: &'a str, out: usize, rows: Range<usize>) -> Self {
        Self { name, out, rows }
    }

    pub fn whole(name: &'a str, out: usize) -> Self {
        Self::new(name, out, 0..out)
    }
}

/// The columns of a matrix: how many it has in all, and which of them.
#[derive(Debug, Clone)]
pub struct Inputs {
    pub width: usize,
    pub columns: Range<usize>,
}

/// All of them.
impl From<usize> for Inputs {
    fn from(width: usize) -> Self {
        Self { width, columns: 0..width }
    }
}

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

    /// Whether the experts of a layer lie in one tensor of this name, with or without a suffix.
    pub fn is_stacked(&self, name: &str) -> bool {
        self.checkpoint.contains(&self.stacked_name(name))
    }

    fn stacked_name(&self, name: &str) -> String {
        let plain = self.full(name);
        if self.checkpoint.contains(&plain) { plain } else { format!("{plain}.weight") }
    }

    /// The matrix of one expert, `(number, experts)`, from a tensor `[experts, out, inputs]`. `gated`: half of its rows are gates, in turns or
    /// before the others, and these of the gates and of what they gate are wanted, one kind after the other.
    pub fn stacked(
        &self,
        name: &str,
        (number, experts): (usize, usize),
        out: usize,
        inputs: Inputs,
        gated: Option<Range<usize>>,
    ) -> Result<StoredMatrix<'a>, Failure> {
        let (name, in_turns) = (self.stacked_name(name), self.names.stacked_in_turns);
        let whole = if in_turns && !self.checkpoint.is_packed(&name) {
            Slice { stack: Some((number, experts)), ..Slice::whole(name, out, inputs.width, true) }
        } else {
            Slice { rows: number * out..(number + 1) * out, ..Slice::whole(name, experts * out, inputs.width, false) }
        };
        let whole = Slice { columns: inputs.columns, ..whole };
        let Some(wanted) = gated else { return self.checkpoint.matrix(&[whole]) };
        let kind = |nth: usize| {
            let (rows, step) = self.gated_rows(nth, out, &wanted);
            Slice { rows: whole.rows.start + rows.start..whole.rows.start + rows.end, step, ..whole.clone() }
        };
        self.checkpoint.matrix(&[kind(0), kind(1)])
    }

    /// Of the `out` rows of an expert's gates (0) or what they gate (1) those `wanted`, and their distance.
    fn gated_rows(&self, kind: usize, out: usize, wanted: &Range<usize>) -> (Range<usize>, usize) {
        match self.names.stacked_in_turns {
            true => (2 * wanted.start + kind..2 * wanted.end, 2),
            false => (kind * out / 2 + wanted.start..kind * out / 2 + wanted.end, 1),
        }
    }

    /// The bias that belongs to [`Tensors::stacked`].
    pub fn stacked_bias(
        &self,
        name: &str,
        (number, experts): (usize, usize),
        out: usize,
        gated: Option<Range<usize>>,
    ) -> Result<Vec<f32>, Failure> {
        let whole = Slice::whole(self.full(&format!("{name}_bias")), experts, out, false);
        let values = self.checkpoint.matrix(&[Slice { rows: number..number + 1, ..whole }])?.row(0, &mut Tiles::default()).to_vec();
        let Some(wanted) = gated else { return Ok(values) };
        let kinds = [0, 1].map(|kind| self.gated_rows(kind, out, &wanted));
        Ok(kinds.into_iter().flat_map(|(rows, step)| values[rows].iter().step_by(step).copied()).collect())
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

    /// The `wanted` ones of gates and of what they gate, `inner` each, of a tensor that has the gates last.
    pub fn gates_first(&self, name: &str, inner: usize, wanted: Range<usize>, input: usize) -> Result<StoredMatrix<'a>, Failure> {
        let half = |rows| Slice { rows, ..Slice::whole(self.full(&format!("{name}.weight")), 2 * inner, input, self.transposed) };
        self.checkpoint.matrix(&[half(inner + wanted.start..inner + wanted.end), half(wanted)])
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

    /// These channels of a tensor `[all, 1, kernel]`, with those of its first column first.
    pub fn taps(&self, name: &str, all: usize, wanted: &[Range<usize>], kernel: usize) -> Result<Vec<f32>, Failure> {
        let slice = |rows: &Range<usize>| Slice { rows: rows.clone(), ..Slice::whole(self.full(name), all, kernel, false) };
        let source = self.checkpoint.matrix(&wanted.iter().map(slice).collect::<Vec<_>>())?;
        let channels = source.rows();
        let (mut taps, mut reader) = (vec![0.0; channels * kernel], Reader::default());
        for channel in 0..channels {
            let row = MatrixSource::row_f32(&source, channel, &mut reader);
            row.iter().enumerate().for_each(|(tap, weight)| taps[tap * channels + channel] = *weight);
        }
        Ok(taps)
    }

    /// Some rows of a matrix `[out, input]`, turned into columns: `[input, rows]`.
    pub fn transposed_rows(&self, name: &str, out: usize, rows: Range<usize>, input: usize) -> Result<StoredMatrix<'a>, Failure> {
        let whole = Slice::whole(self.full(&format!("{name}.weight")), input, out, !self.transposed);
        self.checkpoint.matrix(&[Slice { columns: rows, ..whole }])
    }

    /// A matrix of these rows of its `parts`, one part below the other, from a tensor for each, or from one that holds them all in this order.
    pub fn matrix(&self, fused: &[String], parts: &[Part<'_>], inputs: Inputs) -> Result<StoredMatrix<'a>, Failure> {
        let input = inputs.width;
        let slice = |name: &str, out: usize, rows: Range<usize>| {
            let whole = Slice::whole(self.full(&format!("{name}.weight")), out, input, self.transposed);
            Slice { rows, columns: inputs.columns.clone(), ..whole }
        };
        if let Some(name) = self.stored_fused(fused, "weight") {
            let all: usize = parts.iter().map(|part| part.out).sum();
            return self.checkpoint.matrix(&places(parts).map(|rows| slice(name, all, rows)).collect::<Vec<_>>());
        }
        let slices: Vec<Slice> = parts.iter().map(|part| slice(part.name, part.out, part.rows.clone())).collect();
        if let Some(missing) = slices.iter().find(|slice| !self.checkpoint.contains(&slice.name)) {
            let fused: Vec<String> = fused.iter().map(|name| self.full(&format!("{name}.weight"))).collect();
            let names: Vec<&str> = std::iter::once(missing.name.as_str()).chain(fused.iter().map(String::as_str)).collect();
            return Err(self.checkpoint.missing(&names, &[missing.outputs, input]));
        }
        self.checkpoint.matrix(&slices)
    }

    /// Biases belonging to [`Tensors::matrix`].
    pub fn bias(&self, fused: &[String], parts: &[Part<'_>]) -> Result<Vec<f32>, Failure> {
        if let Some(name) = self.stored_fused(fused, "bias") {
            let all = self.vector(&format!("{name}.bias"), parts.iter().map(|part| part.out).sum())?;
            return Ok(places(parts).flat_map(|rows| all[rows].iter().copied()).collect());
        }
        let bias = |part: &Part<'_>| Ok(self.vector(&format!("{}.bias", part.name), part.out)?[part.rows.clone()].to_vec());
        Ok(parts.iter().map(bias).collect::<Result<Vec<_>, Failure>>()?.concat())
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

/// Where the parts' rows are in a tensor that holds all of them.
fn places<'p>(parts: &'p [Part<'_>]) -> impl Iterator<Item = Range<usize>> + 'p {
    parts.iter().scan(0, |before, part| {
        let first = std::mem::replace(before, *before + part.out);
        Some(first + part.rows.start..first + part.rows.end)
    })
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
