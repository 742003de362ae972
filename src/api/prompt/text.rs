//! Prompts as they are given: texts and token ids, without a template unless one is asked for.

use serde_json::Value;

use crate::api::fields::{Field, invalid, kind, token_ids, wrong_type};
use crate::api::logprobs::Echo;
use crate::api::options::GenerationOptions;
use crate::api::prompt::fit::Fit;
use crate::api::request::{GenerationRequest, Prompt};
use crate::api::served::ServedModel;
use crate::error::Failure;
use crate::text::tokenizer::Special;

/// Most prompts in one request.
const MAX_PROMPTS: usize = 1024;

/// The request of these prompts, each of which `read` makes token ids of.
pub fn request(
    served: &ServedModel,
    given: Vec<GivenPrompt>,
    options: GenerationOptions,
    read: impl Fn(GivenPrompt, &Fit<'_>) -> Result<Prompt, Failure>,
) -> Result<GenerationRequest, Failure> {
    // Before work is done for prompts that are too many.
    options.check_number(given.len(), true, &served.limits)?;
    if given.len() > 1 && !options.completion_token_ids.is_empty() {
        let message = "'completion_token_ids' go on from one prompt, and this request has several.";
        return Err(Failure::bad_request("completion_token_ids", message).code("invalid_value"));
    }
    let fit = Fit { served, options: &options, noun: "prompt" };
    let prompts = given.into_iter().map(|prompt| read(prompt, &fit)).collect::<Result<_, _>>()?;
    GenerationRequest::new(prompts, options, true, &served.limits)
}

/// A prompt by itself. `encode` turns a text into token ids.
pub fn prompt(given: GivenPrompt, fit: &Fit<'_>, encode: impl Fn(&str) -> Result<Vec<u32>, Failure>) -> Result<Prompt, Failure> {
    let (text, ids) = match given {
        GivenPrompt::Text(text) => {
            let read = fit.text(&text)?;
            let ids = encode(read)?;
            let whole = read.len() == text.len();
            (Some(text).filter(|_| whole), ids)
        }
        GivenPrompt::Tokens(ids) => (None, ids),
    };
    let whole = ids.len();
    let ids = fit.ids(ids)?;
    let text = text.as_deref().filter(|_| ids.len() == whole);
    let echo = fit.options.echo.then(|| Echo::of_prompt(&fit.served.tokenizer, text, &ids, fit.options.skip_special_tokens));
    Ok(Prompt::new(ids, echo))
}

/// One prompt as the caller gave it.
#[derive(Debug, Clone, PartialEq)]
pub enum GivenPrompt {
    Text(String),
    Tokens(Vec<u32>),
}

/// A string, a list of strings, token ids, or lists of token ids.
pub fn read(field: &Field<'_>, vocab_size: usize) -> Result<Vec<GivenPrompt>, Failure> {
    let list = match field.value {
        Value::String(text) => return Ok(vec![GivenPrompt::Text(text.clone())]),
        Value::Array(list) => list,
        _ => return Err(wrong_type(field, "a string, a list of strings, or token ids")),
    };
    let prompts: Vec<GivenPrompt> = match list.first() {
        None => return Err(invalid(field, format!("'{}' is an empty list.", field.name))),
        Some(Value::Number(_)) => vec![GivenPrompt::Tokens(token_ids(field, vocab_size)?)],
        Some(first) => list.iter().enumerate().map(|(i, value)| element(field, first, i, value, vocab_size)).collect::<Result<_, _>>()?,
    };
    if prompts.len() > MAX_PROMPTS {
        return Err(invalid(field, format!("'{}' holds {} prompts, more than the maximum of {MAX_PROMPTS}.", field.name, prompts.len())));
    }
    Ok(prompts)
}

/// All prompts of a list are of the first one's kind.
fn element(field: &Field<'_>, first: &Value, i: usize, value: &Value, vocab_size: usize) -> Result<GivenPrompt, Failure> {
    let entry = Field { name: format!("{}[{i}]", field.name), value };
    match (first, value) {
        (Value::String(_), Value::String(text)) => Ok(GivenPrompt::Text(text.clone())),
        (Value::Array(_), Value::Array(_)) => Ok(GivenPrompt::Tokens(token_ids(&entry, vocab_size)?)),
        (Value::String(_) | Value::Array(_), _) => Err(wrong_type(&entry, &format!("{} like the first one", kind(first)))),
        _ => Err(wrong_type(&entry, "a string or a list of token ids")),
    }
}

/// Token ids of a raw prompt.
pub fn encode(served: &ServedModel, text: &str, options: &GenerationOptions) -> Result<Vec<u32>, Failure> {
    ids(served, text, special(served), options.add_special_tokens.unwrap_or(true))
}

/// How the names of special tokens in a prompt are read.
pub fn special(served: &ServedModel) -> Special {
    if served.settings.allow_special_tokens { Special::Control } else { Special::Text }
}

/// Token ids of a text. `around`: with what the tokenizer wants around it.
pub fn ids(served: &ServedModel, text: &str, special: Special, around: bool) -> Result<Vec<u32>, Failure> {
    let mut ids = served.tokenizer.encode(text, special)?;
    if around {
        add_around(served, &mut ids);
    }
    Ok(ids)
}

/// Adds what the tokenizer wants around a text: what its post-processor says, else the beginning-of-sequence token where its configuration
/// asks for it. Never twice.
fn add_around(served: &ServedModel, ids: &mut Vec<u32>) {
    let (before, (_, after)) = (added_before(served), served.tokenizer.added_around());
    if !ids.starts_with(before) {
        ids.splice(0..0, before.iter().copied());
    }
    if !ids.ends_with(after) {
        ids.extend(after);
    }
}

/// What the tokenizer wants before a text.
pub fn added_before(served: &ServedModel) -> &[u32] {
    let (before, _) = served.tokenizer.added_around();
    let of_config = served.bos_token_id.as_ref().filter(|_| served.model.add_bos_token && before.is_empty());
    of_config.map_or(before, std::slice::from_ref)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(value: Value) -> Result<Vec<GivenPrompt>, Failure> {
        read(&Field { name: "prompt".to_owned(), value: &value }, 10)
    }

    #[test]
    fn all_four_forms() {
        let text = |text: &str| GivenPrompt::Text(text.to_owned());
        assert_eq!(parse(json!("a")).unwrap(), [text("a")]);
        assert_eq!(parse(json!(["a", "b"])).unwrap(), [text("a"), text("b")]);
        assert_eq!(parse(json!([1, 2])).unwrap(), [GivenPrompt::Tokens(vec![1, 2])]);
        assert_eq!(parse(json!([[1], [2, 9]])).unwrap(), [GivenPrompt::Tokens(vec![1]), GivenPrompt::Tokens(vec![2, 9])]);
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
