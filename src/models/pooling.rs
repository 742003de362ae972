//! What an embedding model or a reranker makes of a sequence, read from the model's files: config.json, and those of Sentence Transformers
//! (`modules.json`, `1_Pooling/config.json`, `2_Dense/config.json`, `sentence_bert_config.json`).

use crate::checkpoint::files::ModelFiles;
use crate::error::Failure;
use crate::kernels::Activation;
use crate::models::config::Config;

/// What one sequence becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolingTask {
    /// A vector.
    Embed,
    /// One number: how well a document answers a query.
    Score,
}

/// Which rows of the last layer a result is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The first token's.
    Cls,
    /// The mean over all tokens.
    Mean,
    /// The last token's.
    Last,
}

/// To which lengths a vector may be cut (`dimensions`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dimensions {
    /// To none.
    Whole,
    /// To any.
    Any,
    /// To these.
    Of(Vec<usize>),
}

/// See the module.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolingSpec {
    pub task: PoolingTask,
    pub pooling: Pooling,
    /// What the pooled row goes through, in order.
    pub head: Vec<HeadLayer>,
    /// Vectors are made to have length 1.
    pub normalize: bool,
    /// Scores become their sigmoid.
    pub sigmoid: bool,
    pub dimensions: Dimensions,
    /// Numbers of a result.
    pub width: usize,
}

/// A layer behind the pooling: `norm(activation(x · Wᵀ + b))`.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadLayer {
    /// Of its matrix in the checkpoint, with or without the model's prefix, without `.weight`.
    pub name: String,
    pub input: usize,
    pub output: usize,
    pub bias: bool,
    pub activation: Option<Activation>,
    /// The name of the norm, as that of the matrix.
    pub norm: Option<String>,
}

/// The head of a family's cross-encoders.
#[derive(Debug, Clone, PartialEq)]
pub struct Classifier {
    pub pooling: Pooling,
    pub layers: Vec<HeadLayer>,
}

impl PoolingSpec {
    /// A line for the log and `check`.
    pub fn describe(&self) -> String {
        let rows = match self.pooling {
            Pooling::Cls => "the first token's row",
            Pooling::Mean => "the mean of all rows",
            Pooling::Last => "the last token's row",
        };
        let head = match self.head.len() {
            0 => String::new(),
            layers => format!(" through {layers} layers"),
        };
        let result = match (self.task, self.normalize, self.sigmoid) {
            (PoolingTask::Embed, true, _) => format!("{} numbers of length 1", self.width),
            (PoolingTask::Embed, false, _) => format!("{} numbers", self.width),
            (PoolingTask::Score, _, true) => "a score from 0 to 1".to_owned(),
            (PoolingTask::Score, ..) => "a score".to_owned(),
        };
        format!("it {} texts: {rows}{head}, {result}", self.task.verb())
    }
}

impl HeadLayer {
    pub fn new(name: impl Into<String>, input: usize, output: usize) -> Self {
        Self { name: name.into(), input, output, bias: true, activation: None, norm: None }
    }
}

impl Classifier {
    /// Of decoders: one row against the last token.
    pub fn of_decoder(hidden: usize) -> Self {
        Self { pooling: Pooling::Last, layers: vec![HeadLayer { bias: false, ..HeadLayer::new("score", hidden, 1) }] }
    }
}

impl PoolingTask {
    pub fn verb(self) -> &'static str {
        match self {
            Self::Embed => "embeds",
            Self::Score => "scores pairs of",
        }
    }
}

/// What the files of Sentence Transformers say.
#[derive(Debug, Default, PartialEq)]
pub struct SentenceTransformers {
    pub pooling: Option<Pooling>,
    pub dense: Vec<HeadLayer>,
    pub normalize: bool,
    pub max_seq_length: Option<usize>,
}

impl SentenceTransformers {
    /// `None`: the model has no `modules.json`.
    pub fn read(files: &ModelFiles) -> Result<Option<Self>, Failure> {
        let Some(modules) = files.read_json("modules.json")? else { return Ok(None) };
        let mut read = Self::default();
        for module in modules.as_array().into_iter().flatten() {
            let module = Config(module);
            let named = |problem: String| Failure::internal(format!("modules.json of {}: {problem}", files.name));
            let kind = last_part(module.text("type").map_err(named)?.unwrap_or_default());
            let path = module.text("path").map_err(named)?.unwrap_or_default();
            let file = format!("{path}/config.json");
            let of_file = |problem: String| Failure::internal(format!("{file} of {}: {problem}", files.name));
            let config = || files.read_json(&file).map(Option::unwrap_or_default);
            match kind {
                "Transformer" => {}
                "Pooling" => read.pooling = Some(pooling(Config(&config()?)).map_err(of_file)?),
                "Dense" if !read.normalize => read.dense.push(dense(path, Config(&config()?)).map_err(of_file)?),
                "Normalize" => read.normalize = true,
                _ => return Err(named(format!("the module \"{kind}\" is not supported (Transformer, Pooling, Dense before Normalize)"))),
            }
        }
        if let Some(config) = files.read_json("sentence_bert_config.json")? {
            let named = |problem| Failure::internal(format!("sentence_bert_config.json of {}: {problem}", files.name));
            read.max_seq_length = Config(&config).count("max_seq_length").map_err(named)?.filter(|length| *length > 0);
        }
        Ok(Some(read))
    }
}

/// The last part of a class's name: `Pooling` of `sentence_transformers.models.Pooling`.
pub fn last_part(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// `1_Pooling/config.json`: one mode by its name, or a flag for each.
fn pooling(config: Config<'_>) -> Result<Pooling, String> {
    const MODES: &[(&str, &str, Option<Pooling>)] = &[
        ("cls", "pooling_mode_cls_token", Some(Pooling::Cls)),
        ("mean", "pooling_mode_mean_tokens", Some(Pooling::Mean)),
        ("lasttoken", "pooling_mode_lasttoken", Some(Pooling::Last)),
        ("max", "pooling_mode_max_tokens", None),
        ("mean_sqrt_len_tokens", "pooling_mode_mean_sqrt_len_tokens", None),
        ("weightedmean", "pooling_mode_weightedmean_tokens", None),
    ];
    let served = "is not supported (cls, mean and lasttoken are, one of them)";
    if config.flag("include_prompt")? == Some(false) {
        return Err("\"include_prompt\": false is not supported".to_owned());
    }
    if let Some(name) = config.text("pooling_mode")? {
        let mode = MODES.iter().find(|(mode, ..)| *mode == name);
        return mode.and_then(|(.., pooling)| *pooling).ok_or_else(|| format!("\"pooling_mode\": \"{name}\" {served}"));
    }
    let mut given = Vec::new();
    for (_, key, pooling) in MODES {
        if config.flag(key)?.unwrap_or(false) {
            given.push((*key, *pooling));
        }
    }
    match given.as_slice() {
        [(_, Some(pooling))] => Ok(*pooling),
        [] => Ok(Pooling::Mean),
        others => Err(format!("{} {served}", others.iter().map(|(key, _)| format!("\"{key}\"")).collect::<Vec<_>>().join(" and "))),
    }
}

/// `2_Dense/config.json`. The layer's matrix is `linear.weight` in the weights beside it.
fn dense(path: &str, config: Config<'_>) -> Result<HeadLayer, String> {
    let activation = match config.text("activation_function")?.map(last_part) {
        // The default of the module.
        None | Some("Tanh") => Some(Activation::Tanh),
        Some("Identity") => None,
        Some("GELU") => Some(Activation::Gelu),
        Some("SiLU") => Some(Activation::Silu),
        Some(other) => return Err(format!("\"activation_function\": \"{other}\" is not supported (Identity, Tanh, GELU and SiLU are)")),
    };
    Ok(HeadLayer {
        bias: config.flag("bias")?.unwrap_or(true),
        activation,
        ..HeadLayer::new(format!("{path}/linear"), config.size("in_features", None)?, config.size("out_features", None)?)
    })
}
