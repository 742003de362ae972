//! What a model is for: whether it generates text, embeds texts or scores pairs of them, by its own files and by the settings.

use serde_json::Value;

use crate::checkpoint::files::ModelFiles;
use crate::config::{EngineSettings, TaskChoice};
use crate::error::Failure;
use crate::models::config::Config;
use crate::models::families::Model;
use crate::models::pooling::{Dimensions, Pooling, PoolingSpec, PoolingTask, SentenceTransformers, last_part};

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
