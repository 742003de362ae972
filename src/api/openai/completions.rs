//! Text completions: prompts as they are, without a template.

use serde_json::Value;

use crate::api::Service;
use crate::api::fields::{Field, Fields, invalid, kind, missing, token_ids, wrong_type};
use crate::api::logprobs::{Echo, Form};
use crate::api::openai::{Prepared, Surface};
use crate::api::options::Options;
use crate::config::defaults;
use crate::error::Failure;
use crate::text::tokenizer::Special;

/// Most prompts in one request.
const MAX_PROMPTS: usize = 1024;

/// `POST /v1/completions`.
pub fn prepare(service: &Service, body: &Value) -> Result<Prepared, Failure> {
    let fields = Fields::new(body)?;
    service.check_model(&fields)?;
    let mut options = service.options(&fields, Form::Text)?;
    options.max_tokens = options.max_tokens.or(service.settings.default_max_tokens).or(Some(defaults::COMPLETION_MAX_TOKENS));
    let field = fields.get("prompt").or_else(|| fields.get("prompt_token_ids"));
    let field = field.ok_or_else(|| missing("prompt", "'prompt' is missing. It is a string, a list of strings, or token ids."))?;
    let prompts = read(&field, service.engine.limits().vocab_size)?;
    finish(service, prompts, options, |text, options| encode(service, text, options))
}

/// Encodes, fits and packs up. `render` turns a text into token ids.
pub fn finish(
    service: &Service,
    prompts: Vec<Prompt>,
    options: Options,
    render: impl Fn(&str, &Options) -> Result<Vec<u32>, Failure>,
) -> Result<Prepared, Failure> {
    // Before work is done for prompts that are too many.
    options.check_number(prompts.len(), true, service.engine.limits())?;
    let (mut fitted, mut echoes) = (Vec::with_capacity(prompts.len()), Vec::new());
    for prompt in prompts {
        let (given, ids) = match prompt {
            Prompt::Text(text) => {
                let read = service.fit_text(&text, &options, "prompt")?;
                let ids = render(read, &options)?;
                let whole = read.len() == text.len();
                (Some(text).filter(|_| whole), ids)
            }
            Prompt::Tokens(ids) => (None, ids),
        };
        let whole = ids.len();
        let ids = service.fit(ids, &options, "prompt")?;
        if options.echo {
            let given = given.as_deref().filter(|_| ids.len() == whole);
            echoes.push(Echo::of_prompt(&service.tokenizer, given, &ids, options.skip_special_tokens));
        }
        fitted.push(ids);
    }
    Prepared::new(service, Surface::Text, fitted, echoes, options)
}

/// One prompt as the caller gave it.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

/// A string, a list of strings, token ids, or lists of token ids.
pub fn read(field: &Field<'_>, vocab_size: usize) -> Result<Vec<Prompt>, Failure> {
    let list = match field.value {
        Value::String(text) => return Ok(vec![Prompt::Text(text.clone())]),
        Value::Array(list) => list,
        _ => return Err(wrong_type(field, "a string, a list of strings, or token ids")),
    };
    let prompts: Vec<Prompt> = match list.first() {
        None => return Err(invalid(field, format!("'{}' is an empty list.", field.name))),
        Some(Value::Number(_)) => vec![Prompt::Tokens(token_ids(field, vocab_size)?)],
        Some(first) => list.iter().enumerate().map(|(i, value)| element(field, first, i, value, vocab_size)).collect::<Result<_, _>>()?,
    };
    if prompts.len() > MAX_PROMPTS {
        return Err(invalid(field, format!("'{}' holds {} prompts, more than the maximum of {MAX_PROMPTS}.", field.name, prompts.len())));
    }
    Ok(prompts)
}

/// All prompts of a list are of the first one's kind.
fn element(field: &Field<'_>, first: &Value, i: usize, value: &Value, vocab_size: usize) -> Result<Prompt, Failure> {
    let entry = Field { name: format!("{}[{i}]", field.name), value };
    match (first, value) {
        (Value::String(_), Value::String(text)) => Ok(Prompt::Text(text.clone())),
        (Value::Array(_), Value::Array(_)) => Ok(Prompt::Tokens(token_ids(&entry, vocab_size)?)),
        (Value::String(_) | Value::Array(_), _) => Err(wrong_type(&entry, &format!("{} like the first one", kind(first)))),
        _ => Err(wrong_type(&entry, "a string or a list of token ids")),
    }
}

/// Token ids of a raw prompt.
pub fn encode(service: &Service, text: &str, options: &Options) -> Result<Vec<u32>, Failure> {
    let special = if service.settings.allow_special_tokens { Special::Control } else { Special::Text };
    let mut ids = service.tokenizer.encode(text, special)?;
    if options.add_special_tokens.unwrap_or(true) {
        add_around(service, &mut ids);
    }
    Ok(ids)
}

/// Adds what the tokenizer wants around a text: what its post-processor says, else the beginning-of-sequence token where its configuration
/// asks for it. Never twice.
fn add_around(service: &Service, ids: &mut Vec<u32>) {
    let (before, after) = service.tokenizer.added_around();
    let of_config = service.bos_token_id.filter(|_| service.model.add_bos_token && before.is_empty());
    let before = of_config.as_ref().map_or(before, std::slice::from_ref);
    if !ids.starts_with(before) {
        ids.splice(0..0, before.iter().copied());
    }
    if !ids.ends_with(after) {
        ids.extend(after);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(value: Value) -> Result<Vec<Prompt>, Failure> {
        read(&Field { name: "prompt".to_owned(), value: &value }, 10)
    }

    #[test]
    fn all_four_forms() {
        let text = |text: &str| Prompt::Text(text.to_owned());
        assert_eq!(parse(json!("a")).unwrap(), [text("a")]);
        assert_eq!(parse(json!(["a", "b"])).unwrap(), [text("a"), text("b")]);
        assert_eq!(parse(json!([1, 2])).unwrap(), [Prompt::Tokens(vec![1, 2])]);
        assert_eq!(parse(json!([[1], [2, 9]])).unwrap(), [Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 9])]);
    }

    #[test]
    fn each_mistake_names_its_place() {
        for (value, param) in [
            (json!(5), "prompt"),
            (json!({}), "prompt"),
            (json!([]), "prompt"),
            (json!(["a", 5]), "prompt[1]"),
            (json!([1, "a"]), "prompt[1]"),
            (json!([1, 10]), "prompt[1]"),
            (json!([1, -1]), "prompt[1]"),
            (json!([[1], [2, 10]]), "prompt[1][1]"),
            (json!([[1], "a"]), "prompt[1]"),
            (json!([null]), "prompt[0]"),
        ] {
            assert_eq!(parse(value.clone()).unwrap_err().param.as_deref(), Some(param), "{value}");
        }
    }
}
