//! The table of families: `config.json` → what the model computes ([`ModelSpec`]) and what its tensors are called ([`TensorNames`]).
//!
//! A family is a row of [`dense::FAMILIES`], [`routed::FAMILIES`], [`mixers::FAMILIES`] or [`encoders::FAMILIES`]: its defaults for keys that config.json may leave out, and a function that says in what it
//! differs from Llama. What decoders can differ in is a field of the spec, so a row holds no arithmetic of a forward pass.

use serde_json::Value;

use crate::checkpoint::files::ModelFiles;
use crate::error::Failure;
use crate::kernels::{Activation, AttentionSpec, NormExtent, NormKind, Pairing, QkNorm, Rope, RopeTable, RoutingSpec};
use crate::models::config::Config;
use crate::models::pooling::Classifier;
use crate::models::rope;
use crate::models::spec::{
    AttentionLayer, DenseSpec, EmbeddingsSpec, ExpertsSpec, FeedForward, LayerSpec, LongRopes, Mixer, ModelSpec, NormSpec, Residual,
};

mod dense;
mod encoders;
mod mixers;
mod names;
mod routed;

pub use names::TensorNames;

/// What config.json says of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    pub spec: ModelSpec,
    pub names: TensorNames,
    /// Behind the pooling, if it is a cross-encoder.
    pub classifier: Classifier,
}

/// One `model_type`.
struct Family {
    model_type: &'static str,
    defaults: Defaults,
    /// Changes what [`llama_like`] made of the configuration.
    adapt: fn(Config<'_>, &mut Model) -> Result<(), String>,
}

/// What a family's configuration means where it leaves a key out.
#[derive(Clone, Copy)]
struct Defaults {
    pairing: Pairing,
    activation: &'static str,
    /// `hidden_act` or `hidden_activation`.
    activation_key: &'static str,
    eps: f64,
    eps_key: &'static str,
    rope_theta: f64,
    /// The share of a head's components that is rotated.
    rotary_share: f64,
    tied: bool,
    max_positions: u64,
    /// Which layers see a window only; `None`: the family has no such layers.
    sliding: Option<Sliding>,
}

/// Which layers see a window only, where `layer_types` does not say so.
#[derive(Clone, Copy)]
enum Sliding {
    /// All, if there is a `sliding_window`; so many positions where that key is absent.
    All(Option<usize>),
    /// With `use_sliding_window`, those from `max_window_layers` on (Qwen).
    AfterFirst,
    /// All but every n-th (Gemma), and how many positions they see, where no key says so.
    AllBut { nth: u64, window: usize },
    /// All but the first of every n, and over how many positions their windows go, half of them on each side (ModernBERT).
    Around { nth: u64, window: usize },
}

const LLAMA: Defaults = Defaults {
    pairing: Pairing::Half,
    activation: "silu",
    activation_key: "hidden_act",
    eps: 1e-6,
    eps_key: "rms_norm_eps",
    rope_theta: 10_000.0,
    rotary_share: 1.0,
    tied: false,
    max_positions: 2_048,
    sliding: None,
};

/// Every family that is served.
fn families() -> impl Iterator<Item = &'static Family> {
    dense::FAMILIES.iter().chain(routed::FAMILIES).chain(mixers::FAMILIES).chain(encoders::FAMILIES)
}

/// The `model_type`s that are served.
pub fn model_types() -> impl Iterator<Item = &'static str> {
    families().map(|family| family.model_type)
}

impl Model {
    /// Reads config.json. An unsupported model is refused by name; a key that would change the numbers and that we do not know is refused too.
    pub fn from_files(files: &ModelFiles) -> Result<Self, Failure> {
        let Some(config) = files.model_config()? else {
            return Err(Failure::internal(format!(
                "{} ({}) has no config.json: is it a model folder in Hugging Face or Paddle form?",
                files.name, files.origin
            )));
        };
        Self::from_config(&config).map_err(|problem| Failure::internal(format!("config.json of {}: {problem}", files.name)))
    }

    pub fn from_config(config: &Value) -> Result<Self, String> {
        let translated = encoders::in_common_words(config)?;
        let config = Config(translated.as_ref().unwrap_or(config));
        let model_type = config.text("model_type")?.unwrap_or_default();
        let family = families().find(|family| family.model_type == model_type).ok_or_else(|| {
            let known: Vec<_> = model_types().collect();
            format!("model_type \"{model_type}\" is not supported; this version serves {}", known.join(", "))
        })?;
        let mut model = llama_like(config, family)?;
        (family.adapt)(config, &mut model)?;
        if config.flag("is_causal")? == Some(false) {
            if model.spec.layers.iter().any(|layer| layer.attention().is_none()) {
                return Err(format!("\"is_causal\": false is not supported for {model_type}"));
            }
            model.attention(|spec| spec.causal = false);
        }
        if config.has("gguf") {
            model.as_converted(config.object("gguf")?)?;
        }
        Ok(model)
    }

    /// What llama.cpp's converter does to weights: norms are stored as they are multiplied, and the rows of queries and keys may be moved so
    /// that neighbours are rotated together.
    fn as_converted(&mut self, gguf: Config<'_>) -> Result<(), String> {
        self.spec.norm.plus_one = false;
        let pairing = if gguf.flag("interleaved")?.unwrap_or(false) { Pairing::Interleaved } else { Pairing::Half };
        self.attention(|spec| {
            if let Some(rope) = &mut spec.rope {
                rope.pairing = pairing;
            }
        });
        Ok(())
    }

    /// Changes the attention of every layer.
    fn attention(&mut self, change: impl Fn(&mut AttentionSpec)) {
        self.attention_layers().for_each(|layer| change(&mut layer.spec));
    }

    fn attention_layers(&mut self) -> impl Iterator<Item = &mut AttentionLayer> {
        self.spec.layers.iter_mut().filter_map(LayerSpec::attention_mut)
    }

    fn biases(&mut self, qkv: bool, output: bool, feed_forward: bool) {
        self.attention_layers().for_each(|layer| (layer.qkv_bias, layer.output_bias) = (qkv, output));
        for layer in &mut self.spec.layers {
            if let FeedForward::Dense(dense) = &mut layer.feed_forward {
                (dense.bias, dense.down_bias) = (feed_forward, feed_forward);
            }
        }
    }

    /// Biases on all projections of attention where `attention_bias` says so, and nowhere else.
    fn attention_biases(&mut self, config: Config<'_>) -> Result<(), String> {
        let bias = config.flag("attention_bias")?.unwrap_or(false);
        self.biases(bias, bias, false);
        Ok(())
    }

    /// Each head of queries and keys is normalized before the rotation.
    fn head_norms(&mut self) {
        self.qk_norms(NormExtent::Head, false);
    }

    fn qk_norms(&mut self, extent: NormExtent, after_rope: bool) {
        let eps = self.spec.norm.eps;
        self.attention(|spec| spec.qk_norm = Some(QkNorm { extent, after_rope, eps }));
    }

    /// Where every layer's norms are, and what they are called.
    fn residual(&mut self, residual: Residual, names: TensorNames) {
        self.spec.layers.iter_mut().for_each(|layer| layer.residual = residual);
        self.names = names;
    }

    /// LayerNorm instead of RMS norm.
    fn layer_norms(&mut self, bias: bool) {
        (self.spec.norm.kind, self.spec.norm.bias) = (NormKind::Layer, bias);
    }

    /// Feed-forward networks without gates.
    fn without_gates(&mut self) {
        for layer in &mut self.spec.layers {
            if let FeedForward::Dense(dense) = &mut layer.feed_forward {
                dense.gated = false;
            }
        }
    }

    /// Layers without a rotation.
    fn without_rope(&mut self, is_without: impl Fn(usize, &AttentionSpec) -> bool) {
        for (index, layer) in self.attention_layers().enumerate() {
            if is_without(index, &layer.spec) {
                layer.spec.rope = None;
            }
        }
    }

    /// Each layer's own base of its rotation; 0 stands for no rotation.
    fn layer_ropes(&mut self, thetas: &[f64]) -> Result<(), String> {
        if thetas.len() != self.spec.layers.len() {
            return Err(format!("\"layer_rope_theta\" has {} numbers, and num_hidden_layers is {}", thetas.len(), self.spec.layers.len()));
        }
        let ropes = &mut self.spec.ropes;
        for (layer, theta) in self.spec.layers.iter_mut().zip(thetas) {
            let Some(AttentionLayer { spec: attention, .. }) = layer.attention_mut() else { continue };
            let Some(rope) = attention.rope.filter(|_| *theta > 0.0) else {
                attention.rope = None;
                continue;
            };
            let made = rope::table(Config(&Value::Null), attention.head_dim, *theta)?;
            let table = ropes.iter().position(|table| *table == made).unwrap_or_else(|| {
                ropes.push(made);
                ropes.len() - 1
            });
            attention.rope = Some(Rope { table, ..rope });
        }
        Ok(())
    }

    /// Norm weights stored around zero and a scaled embedding.
    fn like_gemma(&mut self) {
        self.spec.norm.plus_one = true;
        self.spec.embedding_scale = (self.spec.hidden_size as f32).sqrt();
    }

    /// Gemma's scale of scores and its caps; defaults are those of the family.
    fn gemma_scores(&mut self, config: Config<'_>, soft_cap: Option<f64>, logit_cap: Option<f64>) -> Result<(), String> {
        let cap = |key: &str, default: Option<f64>| -> Result<Option<f32>, String> {
            let default = default.filter(|_| config.is_absent(key));
            Ok(config.number(key)?.or(default).map(|cap| cap as f32))
        };
        let scale = config.number("query_pre_attn_scalar")?.unwrap_or(256.0).powf(-0.5) as f32;
        let soft_cap = cap("attn_logit_softcapping", soft_cap)?;
        self.attention(|spec| (spec.scale, spec.soft_cap) = (scale, soft_cap));
        self.spec.logit_cap = cap("final_logit_softcapping", logit_cap)?;
        Ok(())
    }

    /// Granite's multipliers.
    fn granite_scales(&mut self, config: Config<'_>) -> Result<(), String> {
        let number = |key: &str| Ok::<_, String>(config.number(key)?.unwrap_or(1.0) as f32);
        let (attention, residual) = (number("attention_multiplier")?, number("residual_multiplier")?);
        self.attention(|spec| spec.scale = attention);
        self.spec.layers.iter_mut().for_each(|layer| layer.residual_scale = residual);
        self.spec.embedding_scale = number("embedding_multiplier")?;
        self.spec.logit_scale = 1.0 / number("logits_scaling")?;
        Ok(())
    }

    /// Replaces the dense networks of some layers by routed experts.
    fn experts(&mut self, routed: Routed, is_routed: impl Fn(usize) -> bool) -> Result<(), String> {
        let Routed { routing, intermediate, choice_bias, shared, shared_gate } = routed;
        if routing.top_k > routing.experts {
            return Err(format!("\"num_experts_per_tok\": {} of {} experts cannot be picked", routing.top_k, routing.experts));
        }
        for (index, layer) in self.spec.layers.iter_mut().enumerate().filter(|(index, _)| is_routed(*index)) {
            let FeedForward::Dense(dense) = &layer.feed_forward else { return Err(format!("layer {index} has experts already")) };
            let shared = shared.map(|intermediate| DenseSpec { intermediate, ..dense.clone() });
            let (activation, bias, router_bias) = (dense.activation, false, false);
            let spec = ExpertsSpec { routing, choice_bias, intermediate, activation, bias, router_bias, shared, shared_gate };
            layer.feed_forward = FeedForward::Experts(spec);
        }
        Ok(())
    }
}

/// The experts of a family.
struct Routed {
    routing: RoutingSpec,
    /// Of each expert.
    intermediate: usize,
    choice_bias: bool,
    /// The inner width of a network that every token goes through besides.
    shared: Option<usize>,
    shared_gate: bool,
}

/// A decoder with RMS norms before attention and a gated network, full attention, one rope table for each type of layer.
fn llama_like<'a>(config: Config<'a>, family: &'a Family) -> Result<Model, String> {
    let defaults = &family.defaults;
    let heads = config.size("num_attention_heads", None)?;
    let hidden_size = config.size("hidden_size", None)?;
    // Latent attention rotates a part of its own.
    let head_dim = match config.count("qk_rope_head_dim")? {
        Some(rotated) => rotated,
        None => config.size("head_dim", Some((hidden_size / heads.max(1)) as u64))?,
    };
    let kv_heads = config.size("num_key_value_heads", Some(heads as u64))?;
    let types = layer_types(config, defaults.sliding)?;
    let mut ropes = Ropes { config, defaults, types: Vec::new(), tables: Vec::new() };
    let (intermediate, activation) = (dense_width(config)?, activation(config, defaults)?);
    let dense = DenseSpec { intermediate, activation, gated: true, bias: false, down_bias: false };
    let mut layer = |(index, layer_type): (usize, &LayerType<'a>)| -> Result<LayerSpec, String> {
        let (kv_heads, head_dim) = heads_of_layer(config, index, layer_type, (kv_heads, head_dim))?;
        let spec = AttentionSpec {
            heads,
            kv_heads,
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            causal: true,
            window: layer_type.window,
            soft_cap: None,
            rope: Some(Rope { table: ropes.of(layer_type.name, head_dim)?, pairing: defaults.pairing }),
            qk_norm: None,
            value_norm: None,
            query_growth: None,
        };
        Ok(plain_layer(spec, dense.clone()))
    };
    let layers = types.iter().enumerate().map(&mut layer).collect::<Result<Vec<_>, _>>()?;
    let spec = ModelSpec {
        model_type: family.model_type.to_owned(),
        vocab_size: config.size("vocab_size", None)?,
        hidden_size,
        max_positions: config.size("max_position_embeddings", Some(defaults.max_positions))?,
        embedding_scale: 1.0,
        embeddings: EmbeddingsSpec::default(),
        final_norm: true,
        pooling: None,
        layers,
        long_ropes: ropes.long()?,
        ropes: ropes.tables,
        norm: NormSpec {
            kind: NormKind::Rms,
            eps: config.number(defaults.eps_key)?.unwrap_or(defaults.eps) as f32,
            plus_one: false,
            bias: false,
        },
        tied: config.flag("tie_word_embeddings")?.unwrap_or(defaults.tied),
        logit_scale: 1.0,
        logit_cap: None,
        quantized: quantized(config)?,
    };
    Ok(Model { spec, names: TensorNames::LLAMA, classifier: Classifier::of_decoder(hidden_size) })
}

/// A layer as Llama's are.
fn plain_layer(spec: AttentionSpec, dense: DenseSpec) -> LayerSpec {
    let attention = AttentionLayer { spec, qkv_bias: false, output_bias: false, sinks: false, values_are_keys: false, output_gate: false };
    LayerSpec {
        mixer: Mixer::Attention(attention),
        feed_forward: FeedForward::Dense(dense),
        residual: Residual::Sequential,
        bare_attention: false,
        residual_scale: 1.0,
        scalar: false,
    }
}

/// The inner width of dense networks.
fn dense_width(config: Config<'_>) -> Result<usize, String> {
    // The first releases of LFM2 called it otherwise, and where every layer has experts some do not say it at all.
    let key = ["block_ff_dim", "intermediate_size", "moe_intermediate_size"].into_iter().find(|key| config.has(key));
    config.size(key.unwrap_or("intermediate_size"), None)
}

/// The key/value heads and the components of a head of one layer: `common`, unless the configuration says otherwise of this layer or of those
/// without a window (Gemma 4).
fn heads_of_layer(config: Config<'_>, index: usize, layer: &LayerType<'_>, common: (usize, usize)) -> Result<(usize, usize), String> {
    let own = config.object("per_layer_config")?.object(&index.to_string())?;
    let of = |key: &str, global: &str, common: usize| match (own.count(key)?, layer.window) {
        (Some(own), _) => Ok(own),
        (None, None) => Ok::<_, String>(config.count(global)?.unwrap_or(common)),
        (None, Some(_)) => Ok(common),
    };
    let heads = config.size("num_attention_heads", None)?;
    let kv_heads = of("num_key_value_heads", "num_global_key_value_heads", common.0)?;
    let head_dim = of("head_dim", "global_head_dim", common.1)?;
    if kv_heads == 0 || heads % kv_heads != 0 || head_dim == 0 || head_dim % 2 != 0 {
        return Err(format!(
            "{heads} heads, {kv_heads} key/value heads, head_dim {head_dim}: heads must be a multiple of key/value heads, and head_dim even"
        ));
    }
    Ok((kv_heads, head_dim))
}

/// What one layer sees.
struct LayerType<'a> {
    name: &'a str,
    window: Option<usize>,
}

/// The type of each layer: what `layer_types` says, else what the family means without it.
fn layer_types<'a>(config: Config<'a>, sliding: Option<Sliding>) -> Result<Vec<LayerType<'a>>, String> {
    const FULL: &str = "full_attention";
    const SLIDING: &str = "sliding_attention";
    let layers = config.size("num_hidden_layers", None)?;
    let full = |_| LayerType { name: FULL, window: None };
    let Some(sliding) = sliding else { return Ok((0..layers).map(full).collect()) };
    let window = match sliding {
        Sliding::All(absent) => config.count("sliding_window")?.or(absent.filter(|_| config.is_absent("sliding_window"))),
        Sliding::AfterFirst if !config.flag("use_sliding_window")?.unwrap_or(false) => None,
        Sliding::AfterFirst => config.count("sliding_window")?,
        Sliding::AllBut { window, .. } => Some(config.count("sliding_window")?.unwrap_or(window)),
        Sliding::Around { window, .. } => Some(config.count("local_attention")?.unwrap_or(window) / 2 + 1),
    };
    let Some(window) = window.filter(|window| *window > 0) else { return Ok((0..layers).map(full).collect()) };
    let of = |name: &'a str| match name {
        FULL => Ok(LayerType { name, window: None }),
        SLIDING => Ok(LayerType { name, window: Some(window) }),
        other => Err(format!("\"layer_types\": layers of type \"{other}\" are not supported")),
    };
    if let Some(names) = config.texts("layer_types")?.filter(|_| !matches!(sliding, Sliding::All(_))) {
        if names.len() != layers {
            return Err(format!("\"layer_types\" names {} layers, and num_hidden_layers is {layers}", names.len()));
        }
        return names.into_iter().map(of).collect();
    }
    let is_sliding: Box<dyn Fn(usize) -> bool> = match sliding {
        Sliding::All(_) => Box::new(|_| true),
        Sliding::AfterFirst => {
            let first = config.count("max_window_layers")?.unwrap_or(28);
            Box::new(move |layer| layer >= first)
        }
        Sliding::AllBut { nth, .. } => {
            let nth = config.size("sliding_window_pattern", Some(nth))?;
            Box::new(move |layer| (layer + 1) % nth != 0)
        }
        Sliding::Around { nth, .. } => {
            let nth = config.size("global_attn_every_n_layers", Some(nth))?;
            Box::new(move |layer| layer % nth != 0)
        }
    };
    (0..layers).map(|layer| of(if is_sliding(layer) { SLIDING } else { FULL })).collect()
}

/// The rope tables of the types of layers seen so far.
struct Ropes<'a> {
    config: Config<'a>,
    defaults: &'a Defaults,
    /// Type and components of a head, and the index of their table.
    types: Vec<((&'a str, usize), usize)>,
    tables: Vec<RopeTable>,
}

impl<'a> Ropes<'a> {
    /// The index of the table of a layer type with so many components a head.
    fn of(&mut self, layer_type: &'a str, head_dim: usize) -> Result<usize, String> {
        if let Some((_, table)) = self.types.iter().find(|(of, _)| *of == (layer_type, head_dim)) {
            return Ok(*table);
        }
        let made = self.table(layer_type, head_dim)?;
        let table = self.tables.iter().position(|table| *table == made).unwrap_or_else(|| {
            self.tables.push(made);
            self.tables.len() - 1
        });
        self.types.push(((layer_type, head_dim), table));
        Ok(table)
    }

    /// The tables of long contexts, in the same order, where the configuration has some.
    fn long(&self) -> Result<Option<LongRopes>, String> {
        let mut long = LongRopes { beyond: 0, longest: 0, tables: Vec::new() };
        for index in 0..self.tables.len() {
            let Some(((layer_type, head_dim), _)) = self.types.iter().find(|(_, table)| *table == index) else { continue };
            let parameters = self.config.rope_parameters(layer_type)?;
            if rope::is_dynamic(parameters)? {
                let (width, theta) = (self.rotated(parameters, *head_dim)?, self.theta(parameters)?);
                let (table, longest) = rope::dynamic(parameters, width, theta, self.context()?)?;
                (long.beyond, long.longest) = (self.context()?, longest);
                long.tables.push(table);
                continue;
            }
            if !rope::is_long(parameters)? {
                return Ok(None);
            }
            let (original, context) = (original_context(self.config, parameters)?, self.context()?);
            (long.beyond, long.longest) = (original, context);
            long.tables.push(rope::long(
                parameters,
                self.rotated(parameters, *head_dim)?,
                self.theta(parameters)?,
                (original, context),
                "long_factor",
            )?);
        }
        Ok((!long.tables.is_empty()).then_some(long))
    }

    fn context(&self) -> Result<usize, String> {
        self.config.size("max_position_embeddings", Some(self.defaults.max_positions))
    }

    /// transformers 5 writes rope_parameters {rope_theta}, and lets it win; everybody else writes the plain key.
    fn theta(&self, parameters: Config<'_>) -> Result<f64, String> {
        let theta = match parameters.number("rope_theta")? {
            Some(theta) => Some(theta),
            None => self.config.number("rope_theta")?,
        };
        Ok(theta.unwrap_or(self.defaults.rope_theta))
    }

    fn table(&self, layer_type: &str, head_dim: usize) -> Result<RopeTable, String> {
        let config = self.config;
        let is_sliding = layer_type == "sliding_attention";
        // Before transformers 5, Gemma 3 gave the base of layers with a window a key of its own, which nothing stretches.
        if let Some(theta) = config.number("rope_local_base_freq")?.filter(|_| is_sliding) {
            return rope::table(Config(&Value::Null), head_dim, theta);
        }
        let mut parameters = config.rope_parameters(layer_type)?;
        // ModernBERT's older keys.
        let older = if is_sliding { "local_rope_theta" } else { "global_rope_theta" };
        if let Some(theta) = config.number(older)?.filter(|_| !parameters.has("rope_theta")) {
            return rope::table(parameters, self.rotated(parameters, head_dim)?, theta);
        }
        let theta = self.theta(parameters)?;
        // Olmo 3 stretches its layers without a window alone.
        if is_sliding && self.config.text("model_type")? == Some("olmo3") && !parameters.has("rope_theta") {
            parameters = Config(&Value::Null);
        }
        let width = self.rotated(parameters, head_dim)?;
        if rope::is_long(parameters)? {
            let contexts = (original_context(config, parameters)?, self.context()?);
            return rope::long(parameters, width, theta, contexts, "short_factor");
        }
        rope::table(parameters, width, theta)
    }

    /// How many components of a head are rotated.
    fn rotated(&self, parameters: Config<'_>, head_dim: usize) -> Result<usize, String> {
        if let Some(width) = self.config.count("rotary_dim")? {
            return Ok(width.min(head_dim) / 2 * 2);
        }
        if parameters.text("rope_type")? == Some("proportional") {
            return Ok(head_dim);
        }
        let share = match parameters.number("partial_rotary_factor")? {
            Some(share) => Some(share),
            None => self.config.number("partial_rotary_factor")?,
        };
        let width = (share.unwrap_or(self.defaults.rotary_share) * head_dim as f64) as usize;
        if width > head_dim || !width.is_multiple_of(2) {
            return Err(format!("\"partial_rotary_factor\" rotates {width} of {head_dim} components of a head, which is no even part"));
        }
        Ok(width)
    }
}

/// The context that a model was trained for before it was stretched.
fn original_context(config: Config<'_>, parameters: Config<'_>) -> Result<usize, String> {
    let key = "original_max_position_embeddings";
    if parameters.has(key) { parameters.size(key, None) } else { config.size(key, None) }
}

fn activation(config: Config<'_>, defaults: &Defaults) -> Result<Activation, String> {
    let key = if config.has(defaults.activation_key) { defaults.activation_key } else { "hidden_act" };
    match config.text(key)?.unwrap_or(defaults.activation) {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
        // The first releases of Gemma wrote this and meant the other.
        "gelu" if defaults.activation == "gelu" => Ok(Activation::Gelu),
        "gelu" if defaults.activation == "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        "relu2" => Ok(Activation::Relu2),
        other => Err(format!("{key} \"{other}\" is not supported (silu, gelu_pytorch_tanh and relu2 are)")),
    }
}

/// The method of `quantization_config`, in the words of whoever wrote it.
fn quantized(config: Config<'_>) -> Result<Option<String>, String> {
    let quantization = config.object("quantization_config")?;
    let named = ["quant_method", "quantization", "quant_algo"].iter().find_map(|key| quantization.0[*key].as_str());
    Ok((!quantization.is_empty()).then(|| named.unwrap_or("of an unnamed method").to_owned()))
}

/// Expert groups, of which only the best would be looked at.
fn refuse_groups(config: Config<'_>) -> Result<(), String> {
    match config.count("n_group")? {
        None | Some(0 | 1) => Ok(()),
        Some(groups) => Err(format!("\"n_group\": {groups} groups of experts are not supported (1 is)")),
    }
}

/// A family without experts whose configuration has some.
fn refuse_experts(config: Config<'_>, key: &str) -> Result<(), String> {
    match &config.0[key] {
        Value::Null => Ok(()),
        experts if experts.as_u64() == Some(0) => Ok(()),
        Value::Number(_) | Value::Array(_) => Err(format!("\"{key}\": mixture-of-experts models of this type are not supported")),
        value => Err(format!("\"{key}\" must be an integer, found {value}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn ernie() -> Value {
        json!({"model_type": "ernie4_5", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 18, "num_attention_heads": 16,
            "num_key_value_heads": 2, "head_dim": 128, "hidden_act": "silu", "vocab_size": 103424, "rms_norm_eps": 1e-5, "rope_theta": 500000,
            "tie_word_embeddings": true, "max_position_embeddings": 131072})
    }

    /// The base of the first table, from its second frequency.
    fn theta(spec: &ModelSpec) -> f64 {
        let (table, width) = (&spec.ropes[0], spec.layers[0].attention().unwrap().spec.head_dim as f64);
        (f64::from(table.frequencies[1]).powf(-width / 2.0)).round()
    }

    #[test]
    fn the_default_model_by_numbers() {
        let spec = Model::from_config(&ernie()).unwrap().spec;
        let attention = spec.layers[0].attention().unwrap().spec;
        assert_eq!((attention.q_width(), attention.kv_width()), (2048, 256));
        assert_eq!(spec.parameters(), 360_748_032);
        assert_eq!(attention.rope, Some(Rope { table: 0, pairing: Pairing::Interleaved }));
    }

    #[test]
    fn both_spellings_of_theta_and_absent_keys() {
        let mut config = ernie();
        let map = config.as_object_mut().unwrap();
        for key in ["rope_theta", "rms_norm_eps", "head_dim", "tie_word_embeddings"] {
            map.shift_remove(key);
        }
        map.insert("rope_parameters".into(), json!({"rope_theta": 10000.0, "rope_type": "default"}));
        let spec = Model::from_config(&config).unwrap().spec;
        assert_eq!((theta(&spec), spec.layers[0].attention().unwrap().spec.head_dim, spec.tied), (10000.0, 64, true));
    }

    #[test]
    fn nested_rope_parameters_win() {
        for (parameters, theta) in [
            (json!(null), 500_000.0),
            (json!({}), 500_000.0),
            (json!({"rope_type": "default"}), 500_000.0),
            (json!({"rope_theta": 10000, "rope_type": "default"}), 10_000.0),
            (json!({"full_attention": {"rope_theta": 20000.0}, "sliding_attention": {"rope_theta": 5.0}}), 20_000.0),
            (json!({"all": {"rope_theta": 30000.0}}), 30_000.0),
        ] {
            for key in ["rope_parameters", "rope_scaling"] {
                let mut config = ernie();
                config[key] = parameters.clone();
                let found = super::tests::theta(&Model::from_config(&config).unwrap().spec);
                assert!((found - theta).abs() < 1e-3 * theta, "{key} {parameters}: {found}");
            }
        }
    }

    #[test]
    fn a_quantization_is_known_by_its_method() {
        let method = |quantization: Value| {
            let mut config = ernie();
            config["quantization_config"] = quantization;
            Model::from_config(&config).unwrap().spec.quantized
        };
        assert_eq!(method(json!({"quant_method": "gptq", "bits": 4})).as_deref(), Some("gptq"));
        assert_eq!(method(json!({"quantization": "wint4"})).as_deref(), Some("wint4"));
        assert_eq!(method(json!({"bits": 4})).as_deref(), Some("of an unnamed method"));
        assert_eq!((method(json!(null)), method(json!({}))), (None, None));
    }

    #[test]
    fn long_rope_has_a_table_for_the_served_context() {
        let config = json!({"model_type": "phi3", "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 9, "max_position_embeddings": 64, "original_max_position_embeddings": 8,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 2.0, 1.0, 1.0], "long_factor": [4.0, 1.0, 1.0, 1.0]}});
        let spec = Model::from_config(&config).unwrap().spec;
        let first_two = |context: usize| {
            let table = spec.clone().for_context(context).ropes.remove(0);
            (table.frequencies[0], table.frequencies[1], table.factor)
        };
        let sharper = (1.0f32 + 64f32.log2() / 3.0 - 1.0).sqrt();
        assert_eq!((first_two(8).0, first_two(8).1), (1.0, 0.05));
        assert_eq!((first_two(9).0, first_two(9).1), (0.25, 0.1));
        assert!((first_two(9).2 - sharper).abs() < 1e-6 && first_two(8).2 == first_two(9).2, "{:?}", first_two(9));
        let mut short = config.clone();
        short["rope_scaling"]["long_factor"] = json!([1.0]);
        assert!(Model::from_config(&short).unwrap_err().contains("\"long_factor\" has 1 numbers for 4 frequencies"));
    }

    #[test]
    fn dynamic_rope_is_plain_within_the_original_context() {
        let mut config = ernie();
        let plain = Model::from_config(&config).unwrap().spec.ropes;
        config["rope_scaling"] = json!({"type": "dynamic", "factor": 2.0});
        let spec = Model::from_config(&config).unwrap().spec;
        assert_eq!((spec.max_positions, spec.longest_context()), (131_072, 262_144));
        assert_eq!(spec.clone().for_context(131_072).ropes, plain);
        let long = spec.for_context(131_073).ropes;
        assert!(long[0].frequencies[0] == 1.0 && long[0].frequencies[5] < plain[0].frequencies[5], "{:?}", long[0]);
    }

    #[test]
    fn what_we_cannot_serve_is_refused_by_name() {
        for (key, value, word) in [
            ("model_type", json!("mamba"), "mamba"),
            ("hidden_act", json!("gelu"), "hidden_act \"gelu\""),
            ("rope_scaling", json!({"rope_type": "dynamic"}), "\"factor\" is missing"),
            ("rope_scaling", json!({"rope_type": "xpos"}), "xpos"),
            ("moe_num_experts", json!(64), "mixture"),
            ("num_key_value_heads", json!(3), "multiple"),
            ("vocab_size", json!("many"), "vocab_size"),
            ("rope_parameters", json!({"full_attention": {"rope_type": "xpos"}}), "xpos"),
            ("rope_parameters", json!({"a": {"rope_theta": 1}, "b": {"rope_theta": 2}}), "full_attention"),
            ("rope_parameters", json!({"rope_theta": 1, "partial_rotary_factor": 1.5}), "\"partial_rotary_factor\" rotates 192 of 128"),
            // A value of the wrong type is named, and no default takes its place.
            ("model_type", json!(["ernie4_5"]), "[\"ernie4_5\"]"),
            ("rms_norm_eps", json!("0.1"), "\"rms_norm_eps\" must be a positive number, found \"0.1\""),
            ("rms_norm_eps", json!(-0.5), "found -0.5"),
            ("rope_theta", json!("500000"), "\"rope_theta\" must be a positive number"),
            ("rope_parameters", json!({"rope_theta": "1e4"}), "found \"1e4\""),
            ("rope_parameters", json!("default"), "\"rope_parameters\" must be an object"),
            ("rope_scaling", json!({"type": 5}), "\"type\" must be a string"),
            ("tie_word_embeddings", json!("false"), "\"tie_word_embeddings\" must be true or false"),
            ("use_bias", json!(1), "\"use_bias\" must be true or false"),
            ("hidden_act", json!(["silu"]), "\"hidden_act\" must be a string"),
            ("head_dim", json!("128"), "\"head_dim\" must be a positive integer"),
            ("max_position_embeddings", json!(4096.5), "\"max_position_embeddings\" must be a positive integer"),
            ("moe_num_experts", json!("64"), "found \"64\""),
            ("moe_num_experts", json!([64, 64]), "mixture"),
            ("quantization_config", json!("gptq"), "\"quantization_config\" must be an object"),
        ] {
            let mut config = ernie();
            config[key] = value;
            let error = Model::from_config(&config).unwrap_err();
            assert!(error.contains(word), "{key}: {error}");
        }
    }
}
