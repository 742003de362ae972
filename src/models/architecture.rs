//! A table: `config.json` → the shape of one decoder and the names of its weights.
//!
//! All supported models are the same decoder with other numbers; a new one is a row here, not a file.

use serde_json::Value;

use crate::error::Failure;
use crate::kernels::{Rope, Sizes};
use crate::models::files::ModelFiles;

/// The shape of one decoder-only transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    /// `model_type` of config.json.
    pub model_type: String,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f32,
    pub rope_theta: f64,
    pub rope: Rope,
    pub max_position_embeddings: usize,
    /// The LM head is the embedding.
    pub tie_word_embeddings: bool,
    /// Biases on every projection.
    pub bias: bool,
    /// The method that `quantization_config` names. Weights that are packed so cannot be read; plain ones are used as they are.
    pub quantized: Option<String>,
}

/// What the table knows of one family: `model_type`, how it rotates, and its defaults for keys that config.json may leave out.
struct Family {
    model_type: &'static str,
    rope: Rope,
    rms_norm_eps: f64,
    rope_theta: f64,
    tie_word_embeddings: bool,
    max_position_embeddings: u64,
    bias_key: &'static str,
}

const FAMILIES: &[Family] = &[Family {
    model_type: "ernie4_5",
    rope: Rope::Interleaved,
    rms_norm_eps: 1e-5,
    rope_theta: 500_000.0,
    tie_word_embeddings: true,
    max_position_embeddings: 131_072,
    bias_key: "use_bias",
}];

impl Architecture {
    /// Reads config.json. An unsupported model is refused by name; a key that would change the numbers and that we do not know is refused too.
    pub fn from_files(files: &ModelFiles) -> Result<Self, Failure> {
        let Some(config) = files.read_json("config.json")? else {
            return Err(Failure::internal(format!(
                "{} ({}) has no config.json: is it a model folder in Hugging Face or Paddle form?",
                files.name, files.origin
            )));
        };
        Self::from_config(&config).map_err(|problem| Failure::internal(format!("config.json of {}: {problem}", files.name)))
    }

    pub fn from_config(config: &Value) -> Result<Self, String> {
        let model_type = text(config, "model_type")?.unwrap_or_default();
        let family = FAMILIES.iter().find(|family| family.model_type == model_type).ok_or_else(|| {
            let known: Vec<_> = FAMILIES.iter().map(|family| family.model_type).collect();
            format!("model_type \"{model_type}\" is not supported; this version serves {}", known.join(", "))
        })?;
        refuse_unknown_variants(config)?;
        let heads = size(config, "num_attention_heads", None)?;
        let hidden_size = size(config, "hidden_size", None)?;
        let head_dim = size(config, "head_dim", Some((hidden_size / heads.max(1)) as u64))?;
        let kv_heads = size(config, "num_key_value_heads", Some(heads as u64))?;
        if heads % kv_heads != 0 || head_dim % 2 != 0 {
            return Err(format!(
                "{heads} heads, {kv_heads} key/value heads, head_dim {head_dim}: heads must be a multiple of key/value heads, and head_dim even"
            ));
        }
        // transformers 5 writes rope_parameters {rope_theta}, and lets it win; everybody else writes the plain key.
        let theta =
            number(rope_parameters(config)?, "rope_theta")?.map_or_else(|| number(config, "rope_theta"), |theta| Ok(Some(theta)))?;
        Ok(Self {
            model_type: model_type.to_string(),
            vocab_size: size(config, "vocab_size", None)?,
            hidden_size,
            intermediate_size: size(config, "intermediate_size", None)?,
            layers: size(config, "num_hidden_layers", None)?,
            heads,
            kv_heads,
            head_dim,
            rms_norm_eps: number(config, "rms_norm_eps")?.unwrap_or(family.rms_norm_eps) as f32,
            rope_theta: theta.unwrap_or(family.rope_theta),
            rope: family.rope,
            max_position_embeddings: size(config, "max_position_embeddings", Some(family.max_position_embeddings))?,
            tie_word_embeddings: flag(config, "tie_word_embeddings")?.unwrap_or(family.tie_word_embeddings),
            bias: flag(config, family.bias_key)?.unwrap_or(false),
            quantized: quantized(config)?,
        })
    }

    /// Width of queries of one token.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of keys, or of values, of one token.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Number of weights, the LM head counted only when it is not the embedding.
    pub fn parameters(&self) -> usize {
        let layer = self.hidden_size * (2 * self.q_width() + 2 * self.kv_width() + 3 * self.intermediate_size + 2);
        let embedding = self.vocab_size * self.hidden_size;
        layer * self.layers + self.hidden_size + embedding * if self.tie_word_embeddings { 1 } else { 2 }
    }

    /// How large the values of a step can be.
    pub fn sizes(&self, max_tokens: usize, max_logits: usize, block_size: usize) -> Sizes {
        Sizes {
            max_tokens,
            max_logits,
            hidden: self.hidden_size,
            heads: self.heads,
            kv: self.kv_heads,
            d: self.head_dim,
            intermediate: self.intermediate_size,
            vocab: self.vocab_size,
            block_size,
        }
    }

    /// Bytes of keys and values of one token over all layers, `element` bytes each.
    pub fn kv_bytes_per_token(&self, element: usize) -> usize {
        2 * self.layers * self.kv_width() * element
    }
}

/// A positive number; `None` where the key is absent or null. A value of another type is an error and never a default: the model would
/// load and give wrong answers.
fn number(config: &Value, key: &str) -> Result<Option<f64>, String> {
    match &config[key] {
        Value::Null => Ok(None),
        value => match value.as_f64().filter(|number| *number > 0.0) {
            Some(number) => Ok(Some(number)),
            None => Err(format!("\"{key}\" must be a positive number, found {value}")),
        },
    }
}

fn flag(config: &Value, key: &str) -> Result<Option<bool>, String> {
    match &config[key] {
        Value::Null => Ok(None),
        Value::Bool(flag) => Ok(Some(*flag)),
        value => Err(format!("\"{key}\" must be true or false, found {value}")),
    }
}

fn text<'a>(config: &'a Value, key: &str) -> Result<Option<&'a str>, String> {
    match &config[key] {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(text)),
        value => Err(format!("\"{key}\" must be a string, found {value}")),
    }
}

/// An object that may be absent; `Value::Null` then.
fn object<'a>(config: &'a Value, key: &str) -> Result<&'a Value, String> {
    match &config[key] {
        value @ (Value::Null | Value::Object(_)) => Ok(value),
        value => Err(format!("\"{key}\" must be an object, found {value}")),
    }
}

fn size(config: &Value, key: &str, default: Option<u64>) -> Result<usize, String> {
    match config[key].as_u64().filter(|n| *n > 0).or(if config[key].is_null() { default } else { None }) {
        Some(n) => Ok(n as usize),
        None if config[key].is_null() => Err(format!("\"{key}\" is missing")),
        None => Err(format!("\"{key}\" must be a positive integer, found {}", config[key])),
    }
}

/// What says how positions are rotated: `rope_scaling`, which older versions wrote, wins over `rope_parameters` as in transformers 5.
/// Either may hold one such object for each type of layer; all layers of the models here are of the type `full_attention`.
fn rope_parameters(config: &Value) -> Result<&Value, String> {
    let scaling = object(config, "rope_scaling")?;
    let parameters = if scaling.as_object().is_some_and(|map| !map.is_empty()) { scaling } else { object(config, "rope_parameters")? };
    let Some(map) = parameters.as_object().filter(|map| !map.is_empty() && map.values().all(Value::is_object)) else {
        return Ok(parameters);
    };
    match map.get("full_attention").or(map.values().next().filter(|_| map.len() == 1)) {
        Some(parameters) => Ok(parameters),
        None => {
            let types = map.keys().cloned().collect::<Vec<_>>().join(", ");
            Err(format!("\"rope_parameters\" has entries for layers of the types {types}, and none for full_attention"))
        }
    }
}

/// The method of `quantization_config`, in the words of whoever wrote it.
fn quantized(config: &Value) -> Result<Option<String>, String> {
    let quantization = object(config, "quantization_config")?;
    let named = ["quant_method", "quantization", "quant_algo"].iter().find_map(|key| quantization[*key].as_str());
    Ok(quantization.as_object().filter(|map| !map.is_empty()).map(|_| named.unwrap_or("of an unnamed method").to_owned()))
}

fn refuse_unknown_variants(config: &Value) -> Result<(), String> {
    if let Some(act) = text(config, "hidden_act")?.filter(|act| *act != "silu") {
        return Err(format!("hidden_act \"{act}\" is not supported (silu is)"));
    }
    for rope in [rope_parameters(config)?, &config["rope_parameters"]] {
        let kind = text(rope, "rope_type")?.map_or_else(|| text(rope, "type"), |kind| Ok(Some(kind)))?;
        if let Some(kind) = kind.filter(|kind| *kind != "default") {
            return Err(format!("rope scaling of type \"{kind}\" is not supported"));
        }
        if let Some(part) = number(rope, "partial_rotary_factor")?.filter(|part| *part != 1.0) {
            return Err(format!("partial_rotary_factor {part} is not supported (1 is)"));
        }
    }
    match &config["moe_num_experts"] {
        Value::Null => Ok(()),
        experts if experts.as_u64() == Some(0) => Ok(()),
        Value::Number(_) | Value::Array(_) => Err("mixture-of-experts models are not supported in this version".into()),
        value => Err(format!("\"moe_num_experts\" must be an integer, found {value}")),
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

    #[test]
    fn the_default_model_by_numbers() {
        let a = Architecture::from_config(&ernie()).unwrap();
        assert_eq!((a.q_width(), a.kv_width()), (2048, 256));
        assert_eq!(a.parameters(), 360_748_032);
        assert_eq!(a.kv_bytes_per_token(2), 18_432);
        assert_eq!(a.rope, Rope::Interleaved);
    }

    #[test]
    fn both_spellings_of_theta_and_absent_keys() {
        let mut config = ernie();
        let map = config.as_object_mut().unwrap();
        for key in ["rope_theta", "rms_norm_eps", "head_dim", "tie_word_embeddings"] {
            map.shift_remove(key);
        }
        map.insert("rope_parameters".into(), json!({"rope_theta": 10000.0, "rope_type": "default"}));
        let a = Architecture::from_config(&config).unwrap();
        assert_eq!((a.rope_theta, a.head_dim, a.tie_word_embeddings), (10000.0, 64, true));
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
                assert_eq!(Architecture::from_config(&config).unwrap().rope_theta, theta, "{key} {parameters}");
            }
        }
    }

    #[test]
    fn a_quantization_is_known_by_its_method() {
        let method = |quantization: Value| {
            let mut config = ernie();
            config["quantization_config"] = quantization;
            Architecture::from_config(&config).unwrap().quantized
        };
        assert_eq!(method(json!({"quant_method": "gptq", "bits": 4})).as_deref(), Some("gptq"));
        assert_eq!(method(json!({"quantization": "wint4"})).as_deref(), Some("wint4"));
        assert_eq!(method(json!({"bits": 4})).as_deref(), Some("of an unnamed method"));
        assert_eq!((method(json!(null)), method(json!({}))), (None, None));
    }

    #[test]
    fn what_we_cannot_serve_is_refused_by_name() {
        for (key, value, word) in [
            ("model_type", json!("mamba"), "mamba"),
            ("hidden_act", json!("gelu"), "gelu"),
            ("rope_scaling", json!({"rope_type": "yarn"}), "yarn"),
            ("moe_num_experts", json!(64), "mixture"),
            ("num_key_value_heads", json!(3), "multiple"),
            ("vocab_size", json!("many"), "vocab_size"),
            ("rope_parameters", json!({"full_attention": {"rope_type": "yarn"}}), "yarn"),
            ("rope_parameters", json!({"a": {"rope_theta": 1}, "b": {"rope_theta": 2}}), "full_attention"),
            ("rope_parameters", json!({"rope_theta": 1, "partial_rotary_factor": 0.5}), "partial_rotary_factor 0.5"),
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
            let error = Architecture::from_config(&config).unwrap_err();
            assert!(error.contains(word), "{key}: {error}");
        }
    }
}
