//! Families whose tokens see the whole text: they embed it, or score it against another.

use serde_json::Value;

use super::{Config, Defaults, Family, LLAMA, Model, Sliding, TensorNames};
use crate::kernels::{Activation, Pairing};
use crate::models::pooling::{Classifier, HeadLayer, Pooling};
use crate::models::spec::{DenseSpec, FeedForward, PositionsSpec, Residual};

pub(super) const FAMILIES: &[Family] = &[
    Family {
        model_type: "bert",
        defaults: BERT,
        adapt: |config, model| {
            model.like_bert(config, BERT_NAMES)?;
            model.add_positions(config, 0)
        },
    },
    Family { model_type: "roberta", defaults: Defaults { eps: 1e-5, ..BERT }, adapt: roberta },
    Family { model_type: "xlm-roberta", defaults: Defaults { eps: 1e-5, ..BERT }, adapt: roberta },
    Family {
        model_type: "modernbert",
        defaults: Defaults {
            activation_key: "hidden_activation",
            eps: 1e-5,
            eps_key: "norm_eps",
            rope_theta: 160_000.0,
            max_positions: 8_192,
            sliding: Some(Sliding::Around { nth: 3, window: 128 }),
            ..BERT
        },
        adapt: modernbert,
    },
    Family {
        model_type: "nomic_bert",
        defaults: Defaults { activation: "silu", rope_theta: 1_000.0, max_positions: 2_048, ..BERT },
        adapt: |config, model| {
            model.like_bert(config, NOMIC_NAMES)?;
            for dense in model.dense_layers() {
                dense.gated = true;
            }
            model.biases(false, false, false);
            Ok(())
        },
    },
    Family { model_type: "gte", defaults: Defaults { rope_theta: 160_000.0, max_positions: 8_192, ..BERT }, adapt: gte },
    Family { model_type: "new", defaults: Defaults { max_positions: 8_192, ..BERT }, adapt: gte },
];

const BERT: Defaults =
    Defaults { pairing: Pairing::Half, activation: "gelu", eps: 1e-12, eps_key: "layer_norm_eps", max_positions: 512, tied: true, ..LLAMA };

const BERT_NAMES: TensorNames = TensorNames {
    embedding: "embeddings.word_embeddings",
    positions: "embeddings.position_embeddings",
    types: "embeddings.token_type_embeddings",
    embedding_norm: "embeddings.LayerNorm",
    layers: "encoder.layer",
    q: "attention.self.query",
    k: "attention.self.key",
    v: "attention.self.value",
    output: "attention.output.dense",
    attention_end_norm: "attention.output.LayerNorm",
    up: "intermediate.dense",
    down: "output.dense",
    feed_forward_end_norm: "output.LayerNorm",
    ..TensorNames::LLAMA
};

const MODERN_NAMES: TensorNames = TensorNames {
    embedding: "embeddings.tok_embeddings",
    embedding_norm: "embeddings.norm",
    final_norm: "final_norm",
    attention_norm: "attn_norm",
    qkv: "attn.Wqkv",
    output: "attn.Wo",
    feed_forward_norm: "mlp_norm",
    gate_up: &["mlp.Wi"],
    down: "mlp.Wo",
    ..TensorNames::LLAMA
};

/// As nomic-ai's own repositories have them.
const NOMIC_NAMES: TensorNames = TensorNames {
    embedding: "embeddings.word_embeddings",
    types: "embeddings.token_type_embeddings",
    embedding_norm: "emb_ln",
    layers: "encoder.layers",
    qkv: "attn.Wqkv",
    output: "attn.out_proj",
    attention_end_norm: "norm1",
    gate: "mlp.fc12",
    up: "mlp.fc11",
    down: "mlp.fc2",
    feed_forward_end_norm: "norm2",
    ..TensorNames::LLAMA
};

/// As Alibaba's own repositories have them, and as transformers writes them.
const NEW_NAMES: TensorNames = TensorNames {
    embedding: "embeddings.word_embeddings",
    types: "embeddings.token_type_embeddings",
    embedding_norm: "embeddings.LayerNorm",
    layers: "encoder.layer",
    qkv: "attention.qkv_proj",
    output: "attention.o_proj",
    attention_end_norm: "attn_ln",
    gate_up: &[],
    up_gate: Some("mlp.up_gate_proj"),
    down: "mlp.down_proj",
    feed_forward_end_norm: "mlp_ln",
    ..TensorNames::LLAMA
};

impl Model {
    /// Norms behind the sums, biases everywhere, no rotation, types of tokens, and a classifier behind a pooler.
    fn like_bert(&mut self, config: Config<'_>, names: TensorNames) -> Result<(), String> {
        let hidden = self.spec.hidden_size;
        self.residual(Residual::PostAdd, names);
        self.layer_norms(true);
        self.biases(true, true, true);
        self.attention(|spec| spec.causal = false);
        self.spec.final_norm = false;
        self.spec.embeddings.norm = true;
        self.spec.embeddings.types = config.count("type_vocab_size")?.unwrap_or(2);
        self.dense_layers().for_each(|dense| dense.gated = false);
        let pooler = HeadLayer { activation: Some(Activation::Tanh), ..HeadLayer::new("pooler.dense", hidden, hidden) };
        self.classifier = Classifier { pooling: Pooling::Cls, layers: vec![pooler, HeadLayer::new("classifier", hidden, 1)] };
        Ok(())
    }

    /// A learned vector for each position instead of a rotation; the table begins with `first` rows that no token has.
    fn add_positions(&mut self, config: Config<'_>, first: usize) -> Result<(), String> {
        match config.text("position_embedding_type")? {
            None | Some("absolute") => {}
            Some(other) => return Err(format!("\"position_embedding_type\": \"{other}\" is not supported (absolute is)")),
        }
        let rows = self.spec.max_positions;
        self.attention(|spec| spec.rope = None);
        self.spec.ropes.clear();
        self.spec.max_positions = rows.saturating_sub(first);
        self.spec.embeddings.positions = Some(PositionsSpec { rows, first });
        Ok(())
    }

    fn dense_layers(&mut self) -> impl Iterator<Item = &mut DenseSpec> {
        self.spec.layers.iter_mut().filter_map(|layer| match &mut layer.feed_forward {
            FeedForward::Dense(dense) => Some(dense),
            FeedForward::Experts(_) => None,
        })
    }
}

/// Positions are counted from behind the padding token's id.
fn roberta(config: Config<'_>, model: &mut Model) -> Result<(), String> {
    let hidden = model.spec.hidden_size;
    model.like_bert(config, BERT_NAMES)?;
    // llama.cpp's converter leaves the rows out that no token has.
    let first = if config.has("gguf") { 0 } else { config.count("pad_token_id")?.unwrap_or(1) + 1 };
    model.add_positions(config, first)?;
    let dense = HeadLayer { activation: Some(Activation::Tanh), ..HeadLayer::new("classifier.dense", hidden, hidden) };
    model.classifier.layers = vec![dense, HeadLayer::new("classifier.out_proj", hidden, 1)];
    Ok(())
}

fn modernbert(config: Config<'_>, model: &mut Model) -> Result<(), String> {
    let hidden = model.spec.hidden_size;
    let flag = |key: &str| Ok::<_, String>(config.flag(key)?.unwrap_or(false));
    model.names = MODERN_NAMES;
    model.layer_norms(flag("norm_bias")?);
    model.attention_biases(config)?;
    let bias = flag("mlp_bias")?;
    for dense in model.dense_layers() {
        (dense.bias, dense.down_bias) = (bias, bias);
    }
    model.attention(|spec| spec.causal = false);
    model.spec.embeddings.norm = true;
    if let Some(first) = model.spec.layers.first_mut() {
        first.bare_attention = true;
    }
    if config.text("classifier_activation")?.is_some_and(|name| name != "gelu") {
        return Err(format!("\"classifier_activation\": {} is not supported (gelu is)", config.0["classifier_activation"]));
    }
    let pooling = match config.text("classifier_pooling")? {
        None | Some("cls") => Pooling::Cls,
        Some("mean") => Pooling::Mean,
        Some(other) => return Err(format!("\"classifier_pooling\": \"{other}\" is not supported (cls and mean are)")),
    };
    let dense = HeadLayer {
        bias: flag("classifier_bias")?,
        activation: Some(Activation::Gelu),
        norm: Some("head.norm".to_owned()),
        ..HeadLayer::new("head.dense", hidden, hidden)
    };
    model.classifier = Classifier { pooling, layers: vec![dense, HeadLayer::new("classifier", hidden, 1)] };
    Ok(())
}

/// GTE, as Alibaba's repositories have it (`new`) and as transformers does.
fn gte(config: Config<'_>, model: &mut Model) -> Result<(), String> {
    for (key, served) in [("position_embedding_type", "rope"), ("layer_norm_type", "layer_norm")] {
        if let Some(other) = config.text(key)?.filter(|other| *other != served) {
            return Err(format!("\"{key}\": \"{other}\" is not supported ({served} is)"));
        }
    }
    if config.flag("logn_attention_scale")?.unwrap_or(false) {
        return Err("\"logn_attention_scale\": true is not supported".to_owned());
    }
    model.like_bert(config, NEW_NAMES)?;
    for dense in model.dense_layers() {
        (dense.gated, dense.bias) = (true, false);
    }
    Ok(())
}

/// A configuration in everybody's words, where it is in words of its own: the keys of nomic-ai's repositories are GPT-2's, and what
/// Alibaba's call `ntk` is a rule of their own.
pub(super) fn in_common_words(config: &Value) -> Result<Option<Value>, String> {
    if config["model_type"] == "new" && config["rope_scaling"]["type"] == "ntk" {
        if !config["rope_scaling"]["mixed_b"].is_null() {
            return Err("\"mixed_b\" of \"rope_scaling\" is not supported".to_owned());
        }
        let mut config = config.clone();
        config["rope_scaling"]["type"] = "ntk_fixed".into();
        return Ok(Some(config));
    }
    of_nomic(config)
}

fn of_nomic(config: &Value) -> Result<Option<Value>, String> {
    const KEYS: &[(&str, &str)] = &[
        ("n_embd", "hidden_size"),
        ("n_head", "num_attention_heads"),
        ("n_inner", "intermediate_size"),
        ("n_layer", "num_hidden_layers"),
        ("max_trained_positions", "max_position_embeddings"),
        ("layer_norm_epsilon", "layer_norm_eps"),
        ("rotary_emb_base", "rope_theta"),
    ];
    if config["model_type"] != "nomic_bert" || config.get("n_embd").is_none() {
        return Ok(None);
    }
    let given = Config(config);
    for key in ["prenorm", "parallel_block", "use_rms_norm", "rotary_emb_interleaved", "qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"] {
        if given.flag(key)?.unwrap_or(false) {
            return Err(format!("\"{key}\": true is not supported for nomic_bert"));
        }
    }
    if given.number("rotary_emb_fraction")?.is_none_or(|share| share != 1.0) {
        return Err(format!("\"rotary_emb_fraction\": {} is not supported for nomic_bert (1.0 is)", config["rotary_emb_fraction"]));
    }
    if given.text("activation_function")? != Some("swiglu") || given.has("num_experts") {
        return Err("nomic_bert is served with \"activation_function\": \"swiglu\" and without experts".to_owned());
    }
    let mut config = config.clone();
    for (from, to) in KEYS {
        config[to] = config[from].take();
    }
    Ok(Some(config))
}
