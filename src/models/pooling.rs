//! What an embedding model or a reranker makes of a sequence, read from the model's files: config.json, and those of Sentence Transformers
//! (`modules.json`, `1_Pooling/config.json`, `2_Dense/config.json`, `sentence_bert_config.json`).

use serde_json::Value;

use crate::checkpoint::files::ModelFiles;
use crate::config::{EngineSettings, TaskChoice};
use crate::error::Failure;
use crate::kernels::Activation;
use crate::models::config::Config;
use crate::models::families::Model;

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

/// Above this many tokens a model whose sequences run whole gets no longer context by itself: every buffer of a step has that many rows.
const LONGEST_WHOLE: usize = 8_192;

impl Model {
    /// The model as it is to be served: with what pools its sequences, if it is an embedding model or a reranker by its own files, or the
    /// settings say so.
    pub fn for_task(mut self, files: &ModelFiles, settings: &EngineSettings) -> Result<Self, Failure> {
        let config = files.model_config()?.unwrap_or_default();
        let modules = SentenceTransformers::read(files)?;
        let named = |problem: String| Failure::internal(format!("{}: {problem}", files.name));
        let task = self.task(Config(&config), modules.is_some(), settings.task).map_err(named)?;
        let Some(task) = task else {
            return match settings.pooler {
                None => Ok(self),
                Some(_) => Err(named("POOLER_CONFIG is set, and this model generates text; unset it, or set TASK=embed".to_owned())),
            };
        };
        let pooler = settings.pooler.as_ref().map(|pooler| Value::Object(pooler.clone())).unwrap_or_default();
        let in_files = |problem: String| named(format!("as a model that {} texts: {problem}", task.verb()));
        let mut spec = match task {
            PoolingTask::Embed => self.embedder(modules.as_ref()).map_err(in_files)?,
            PoolingTask::Score => self.reranker(Config(&config)).map_err(in_files)?,
        };
        spec.dimensions = dimensions(Config(&config)).map_err(in_files)?;
        overridden(&mut spec, Config(&pooler)).map_err(|problem| Failure::internal(format!("POOLER_CONFIG: {problem}")))?;
        let longest = modules.and_then(|modules| modules.max_seq_length);
        self.spec.max_positions = self.spec.max_positions.min(longest.unwrap_or(usize::MAX));
        self.spec.pooling = Some(spec);
        if self.spec.runs_whole() && settings.max_model_len.is_none() && self.spec.max_positions > LONGEST_WHOLE {
            tracing::info!("the context is {LONGEST_WHOLE} tokens of {}: MAX_MODEL_LEN allows for more", self.spec.max_positions);
            self.spec.max_positions = LONGEST_WHOLE;
        }
        // There is no LM head.
        self.spec.tied = true;
        Ok(self)
    }

    /// What the model is for; `None`: it generates text.
    fn task(&self, config: Config<'_>, has_modules: bool, asked: TaskChoice) -> Result<Option<PoolingTask>, String> {
        let architectures = config.texts("architectures")?.unwrap_or_default();
        let architecture = architectures.first().copied().unwrap_or_default();
        let is_causal = self.spec.is_causal();
        let classifies = architecture.ends_with("ForSequenceClassification");
        let task = match asked {
            TaskChoice::Generate => None,
            TaskChoice::Embed => Some(PoolingTask::Embed),
            TaskChoice::Score => Some(PoolingTask::Score),
            TaskChoice::Pooling if classifies => Some(PoolingTask::Score),
            TaskChoice::Pooling => Some(PoolingTask::Embed),
            TaskChoice::Auto if classifies => Some(PoolingTask::Score),
            TaskChoice::Auto => (has_modules || !is_causal || architecture.ends_with("Model")).then_some(PoolingTask::Embed),
        };
        if task.is_none() && !is_causal {
            let kind = &self.spec.model_type;
            return Err(format!(
                "a {kind} model whose tokens see later ones cannot generate text; unset TASK and RUNNER, or set TASK=embed"
            ));
        }
        Ok(task)
    }

    /// Without files that say otherwise: the mean of an encoder's tokens, the last token of a decoder, made to length 1.
    fn embedder(&self, modules: Option<&SentenceTransformers>) -> Result<PoolingSpec, String> {
        let hidden = self.spec.hidden_size;
        let is_causal = self.spec.is_causal();
        let mut spec = PoolingSpec {
            task: PoolingTask::Embed,
            pooling: if is_causal { Pooling::Last } else { Pooling::Mean },
            head: Vec::new(),
            normalize: modules.is_none_or(|modules| modules.normalize),
            sigmoid: false,
            dimensions: Dimensions::Whole,
            width: hidden,
        };
        if let Some(modules) = modules {
            spec.pooling = modules.pooling.unwrap_or(spec.pooling);
            spec.head.clone_from(&modules.dense);
        }
        for layer in &spec.head {
            if layer.input != spec.width {
                return Err(format!("{}: \"in_features\" is {} behind {} numbers", layer.name, layer.input, spec.width));
            }
            spec.width = layer.output;
        }
        Ok(spec)
    }

    fn reranker(&self, config: Config<'_>) -> Result<PoolingSpec, String> {
        let labels = match config.object("id2label")? {
            labels if labels.is_empty() => config.count("num_labels")?.unwrap_or(2),
            labels => labels.0.as_object().map_or(0, serde_json::Map::len),
        };
        if labels != 1 {
            return Err(format!("{labels} labels (id2label, num_labels) are not supported: a reranker has one"));
        }
        Ok(PoolingSpec {
            task: PoolingTask::Score,
            pooling: self.classifier.pooling,
            head: self.classifier.layers.clone(),
            normalize: false,
            sigmoid: score_is_sigmoid(config)?,
            dimensions: Dimensions::Whole,
            width: 1,
        })
    }
}

impl PoolingTask {
    fn verb(self) -> &'static str {
        match self {
            Self::Embed => "embeds",
            Self::Score => "scores pairs of",
        }
    }
}

/// The activation of scores: what Sentence Transformers wrote into config.json, else the sigmoid, which is its default for one label.
fn score_is_sigmoid(config: Config<'_>) -> Result<bool, String> {
    let newer = config.object("sentence_transformers")?.text("activation_fn")?;
    let older = config.text("sbert_ce_default_activation_function")?;
    match newer.or(older).map(last_part) {
        None | Some("Sigmoid") => Ok(true),
        Some("Identity") => Ok(false),
        Some(other) => Err(format!("the activation of scores \"{other}\" is not supported (Sigmoid and Identity are)")),
    }
}

/// Which lengths vectors may be cut to, by vLLM's keys.
fn dimensions(config: Config<'_>) -> Result<Dimensions, String> {
    let listed: Vec<usize> = config.integers("matryoshka_dimensions")?.into_iter().map(|size| size as usize).collect();
    Ok(match config.flag("is_matryoshka")?.unwrap_or(false) {
        _ if !listed.is_empty() => Dimensions::Of(listed),
        true => Dimensions::Any,
        false => Dimensions::Whole,
    })
}

/// Lays vLLM's pooler configuration over what the files say.
fn overridden(spec: &mut PoolingSpec, pooler: Config<'_>) -> Result<(), String> {
    const KNOWN: &[&str] =
        &["pooling_type", "seq_pooling_type", "normalize", "use_activation", "activation", "is_matryoshka", "matryoshka_dimensions"];
    if let Some(key) = pooler.0.as_object().and_then(|keys| keys.keys().find(|key| !KNOWN.contains(&key.as_str()))) {
        return Err(format!("\"{key}\" is not supported; {} are", KNOWN.join(", ")));
    }
    let named = pooler.text("seq_pooling_type")?.or(pooler.text("pooling_type")?);
    if let Some(name) = named {
        spec.pooling = match name.to_ascii_uppercase().as_str() {
            "CLS" => Pooling::Cls,
            "MEAN" => Pooling::Mean,
            "LAST" => Pooling::Last,
            _ => return Err(format!("\"pooling_type\": \"{name}\" is not supported (CLS, MEAN and LAST are)")),
        };
    }
    for key in ["activation", "use_activation", "normalize"] {
        if let Some(on) = pooler.flag(key)? {
            match spec.task {
                PoolingTask::Embed => spec.normalize = on,
                PoolingTask::Score => spec.sigmoid = on,
            }
        }
    }
    match dimensions(pooler)? {
        Dimensions::Whole => {}
        given => spec.dimensions = given,
    }
    if let Dimensions::Of(listed) = &spec.dimensions
        && let Some(size) = listed.iter().find(|size| **size == 0 || **size > spec.width)
    {
        return Err(format!("\"matryoshka_dimensions\" names {size}, and vectors have {} numbers", spec.width));
    }
    Ok(())
}

/// What the files of Sentence Transformers say.
#[derive(Debug, Default, PartialEq)]
struct SentenceTransformers {
    pooling: Option<Pooling>,
    dense: Vec<HeadLayer>,
    normalize: bool,
    max_seq_length: Option<usize>,
}

impl SentenceTransformers {
    /// `None`: the model has no `modules.json`.
    fn read(files: &ModelFiles) -> Result<Option<Self>, Failure> {
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
fn last_part(name: &str) -> &str {
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
