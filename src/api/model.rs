//! What the API must know of the model it serves, read from the model's own files.

use serde_json::{Map, Value};

use crate::api::clock;
use crate::api::prompt::infill_tokens;
use crate::api::prompt::template::ERNIE;
use crate::checkpoint::files::ModelFiles;
use crate::error::Failure;

/// The parts of a model's files that shape requests and answers.
#[derive(Debug, Clone, Default)]
pub struct ModelInfo {
    /// What the user asked for: a hub id, a path, or `demo`.
    pub name: String,
    /// When it was loaded, seconds since 1970.
    pub created: u64,
    /// `config.json`.
    pub config: Value,
    /// `generation_config.json`; null when the model has none.
    pub generation_config: Value,
    /// The template and where it came from.
    pub chat_template: Option<(String, String)>,
    /// `bos_token`, `eos_token`, `cls_token` …, as templates want them.
    pub special_tokens: Map<String, Value>,
    /// Tokens for filling in the middle, by [`infill_tokens::ROLES`], where the files name them.
    pub infill_tokens: Map<String, Value>,
    /// Raw prompts begin with `bos_token`.
    pub add_bos_token: bool,
    /// The quantization strategy (`wint8`, `wint4`); `None` = weights as stored.
    pub quantization: Option<&'static str>,
    /// What the weights are held as.
    pub weights: String,
}

const SPECIAL_TOKENS: [&str; 7] = ["bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token"];

impl ModelInfo {
    /// Reads the configuration files. Fails on a file that is there and cannot be read.
    pub fn from_files(files: &ModelFiles) -> Result<Self, Failure> {
        let config = files.model_config()?.unwrap_or_default();
        let tokenizer_config = files.read_json("tokenizer_config.json")?.unwrap_or_default();
        let special_tokens_map = files.read_json("special_tokens_map.json")?.unwrap_or_default();
        let mut special_tokens = Map::new();
        for name in SPECIAL_TOKENS {
            let token = token_text(tokenizer_config.get(name)).or_else(|| token_text(special_tokens_map.get(name)));
            if let Some(token) = token {
                special_tokens.insert(name.to_owned(), Value::String(token.to_owned()));
            }
        }
        let named = |role: &str| Some((role.to_owned(), Value::String(token_text(tokenizer_config.get(role))?.to_owned())));
        Ok(Self {
            infill_tokens: infill_tokens::ROLES.into_iter().filter_map(named).collect(),
            name: files.name.clone(),
            created: clock::now(),
            chat_template: chat_template(files, &config, &tokenizer_config)?,
            generation_config: files.read_json("generation_config.json")?.unwrap_or_default(),
            add_bos_token: tokenizer_config.get("add_bos_token") == Some(&Value::Bool(true)),
            quantization: None,
            weights: String::new(),
            config,
            special_tokens,
        })
    }

    /// The ids that end a sequence, by the configuration files alone.
    ///
    /// # Errors
    /// On what is no token id: without it an answer would not end.
    pub fn eos_token_ids(&self) -> Result<Vec<u32>, Failure> {
        let mut ids = Vec::new();
        for (file, config) in [("generation_config.json", &self.generation_config), ("config.json", &self.config)] {
            let list = match config.get("eos_token_id") {
                None | Some(Value::Null) => continue,
                Some(Value::Array(list)) => list.as_slice(),
                Some(value) => std::slice::from_ref(value),
            };
            for value in list {
                ids.push(id(value).ok_or_else(|| {
                    Failure::internal(format!(
                        "{file} of {}: \"eos_token_id\" must be a token id or a list of them, found {value}",
                        self.name
                    ))
                })?);
            }
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    /// ERNIE-4.5 text models, whose repositories do not always bring a template.
    pub fn is_ernie(&self) -> bool {
        is_ernie(&self.config)
    }

    /// The last part of the name: `ERNIE-4.5-0.3B-Paddle` of `baidu/ERNIE-4.5-0.3B-Paddle`.
    pub fn last_segment(&self) -> &str {
        self.name.trim_end_matches(['/', '\\']).rsplit(['/', '\\']).next().unwrap_or(&self.name)
    }

    /// The name that clients see unless one is configured: the hub id, and of a path only its last part.
    pub fn public_name(&self) -> &str {
        let is_path =
            self.name.starts_with(['/', '.', '~', '\\']) || self.name.matches(['/', '\\']).count() > 1 || self.name.ends_with('/');
        if is_path { self.last_segment() } else { &self.name }
    }
}

fn id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// A special token is written as a string or as an object with its `content`.
fn token_text(value: Option<&Value>) -> Option<&str> {
    let value = value?;
    value.as_str().or_else(|| value.get("content")?.as_str())
}

fn is_ernie(config: &Value) -> bool {
    let by_type = config.get("model_type").and_then(Value::as_str).is_some_and(|name| name.starts_with("ernie4_5"));
    let architectures = config.get("architectures").and_then(Value::as_array);
    by_type || architectures.is_some_and(|list| list.iter().filter_map(Value::as_str).any(|name| name.starts_with("Ernie4_5")))
}

/// The template, by the order of preference of the libraries, with the file it came from.
fn chat_template(files: &ModelFiles, config: &Value, tokenizer_config: &Value) -> Result<Option<(String, String)>, Failure> {
    if let Some(bytes) = files.read("chat_template.jinja")? {
        let text = String::from_utf8(bytes.into_owned())
            .map_err(|_| Failure::internal(format!("chat_template.jinja of {} is not valid UTF-8", files.name)))?;
        return Ok(Some((text, "chat_template.jinja".to_owned())));
    }
    if let Some(text) = template_text(tokenizer_config) {
        return Ok(Some((text.to_owned(), "tokenizer_config.json".to_owned())));
    }
    if let Some(text) = files.read_json("chat_template.json")?.as_ref().and_then(template_text) {
        return Ok(Some((text.to_owned(), "chat_template.json".to_owned())));
    }
    Ok(is_ernie(config).then(|| (ERNIE.to_owned(), "the template built in for ERNIE-4.5".to_owned())))
}

/// `chat_template`: a string, or a list of `{name, template}` of which `default` counts, else the first.
fn template_text(config: &Value) -> Option<&str> {
    match config.get("chat_template")? {
        Value::String(text) => Some(text),
        Value::Array(named) => {
            let default = named.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"));
            default.or(named.first())?.get("template")?.as_str()
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::files::Source;

    fn info(name: &str, files: &[(&str, &'static str)]) -> ModelInfo {
        let files = files.iter().map(|(name, text)| ((*name).to_owned(), Source::Embedded(text.as_bytes()))).collect();
        ModelInfo::from_files(&ModelFiles::new(name, "test", files)).unwrap()
    }

    #[test]
    fn template_sources_in_order() {
        let jinja = ("chat_template.jinja", "J");
        let string = ("tokenizer_config.json", r#"{"chat_template":"S"}"#);
        let list = ("tokenizer_config.json", r#"{"chat_template":[{"name":"tool_use","template":"T"},{"name":"default","template":"D"}]}"#);
        let json = ("chat_template.json", r#"{"chat_template":"O"}"#);
        let ernie = ("config.json", r#"{"model_type":"ernie4_5"}"#);
        let paddle = ("config.json", r#"{"architectures":["Ernie4_5_ForCausalLM"]}"#);
        let text = |files: &[(&str, &'static str)]| info("m", files).chat_template.map(|(text, _)| text);
        assert_eq!(text(&[jinja, string, json, ernie]).as_deref(), Some("J"));
        assert_eq!(text(&[string, json, ernie]).as_deref(), Some("S"));
        assert_eq!(text(&[list]).as_deref(), Some("D"));
        assert_eq!(text(&[json, ernie]).as_deref(), Some("O"));
        assert_eq!(text(&[ernie]).as_deref(), Some(ERNIE));
        assert_eq!(text(&[paddle]).as_deref(), Some(ERNIE));
        assert_eq!(text(&[("config.json", r#"{"model_type":"llama"}"#)]), None);
    }

    #[test]
    fn eos_ids_are_the_union_and_tokens_come_in_both_forms() {
        let info = info(
            "m",
            &[
                ("config.json", r#"{"eos_token_id":2}"#),
                ("generation_config.json", r#"{"eos_token_id":[7,2]}"#),
                ("tokenizer_config.json", r#"{"bos_token":{"content":"<s>"},"cls_token":"<c>","pad_token":null,"add_bos_token":true}"#),
                ("special_tokens_map.json", r#"{"pad_token":"<p>"}"#),
            ],
        );
        assert_eq!(info.eos_token_ids().unwrap(), [2, 7]);
        assert_eq!(Value::Object(info.special_tokens), serde_json::json!({"bos_token": "<s>", "pad_token": "<p>", "cls_token": "<c>"}));
        assert!(info.add_bos_token);
    }

    #[test]
    fn an_end_that_is_no_id_is_an_error() {
        for text in [r#"{"eos_token_id":"2"}"#, r#"{"eos_token_id":[2,-1]}"#, r#"{"eos_token_id":{"id":2}}"#] {
            let failure = info("m", &[("config.json", text)]).eos_token_ids().unwrap_err();
            assert!(failure.message.contains("config.json of m: \"eos_token_id\""), "{failure}");
        }
        assert_eq!(info("m", &[("config.json", r#"{"eos_token_id":null}"#)]).eos_token_ids().unwrap(), [0; 0]);
    }

    #[test]
    fn names() {
        for (name, last, public) in [
            ("baidu/ERNIE-4.5-0.3B-Paddle", "ERNIE-4.5-0.3B-Paddle", "baidu/ERNIE-4.5-0.3B-Paddle"),
            ("demo", "demo", "demo"),
            ("/models/llama/", "llama", "llama"),
            ("./x", "x", "x"),
            ("a/b/c", "c", "c"),
        ] {
            let info = info(name, &[]);
            assert_eq!((info.last_segment(), info.public_name()), (last, public));
        }
    }
}
