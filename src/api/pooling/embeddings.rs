//! `/v1/embeddings`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::vectors::finished;
use super::{PoolingCall, Texts, count, number, open, tokens, usage};
use crate::api::clock;
use crate::api::fields::rows::Rows;
use crate::api::fields::{invalid, missing, wrong_type};
use crate::api::prompt::text::{self, GivenPrompt};
use crate::api::served::ServedModel;
use crate::engine::{Dimensions, PoolingTask};
use crate::error::Failure;

/// Most inputs in one request, as OpenAI has it.
const MAX_INPUTS: usize = 2048;

pub fn read(served: &ServedModel, id: &str, body: &Value) -> Result<PoolingCall, Failure> {
    let (rows, texts) = open(served, body, "Embeddings", &[PoolingTask::Embed])?;
    let names = ["input", "prompt", "text"];
    let field = names.into_iter().find_map(|name| rows.get(name));
    let field = field.ok_or_else(|| missing("input", "'input' is missing. It is a string, a list of strings, or token ids."))?;
    let given = text::read_up_to(&field, served.embedding_rows.min(served.limits.vocab_size), MAX_INPUTS).map_err(of_other_ids)?;
    let several =
        given.len() > 1 || matches!(field.value.as_array().and_then(|list| list.first()), Some(Value::String(_) | Value::Array(_)));
    let inputs = given.into_iter().enumerate().map(|(place, given)| {
        let name = if several { format!("{}[{place}]", field.name) } else { field.name.clone() };
        match given {
            GivenPrompt::Text(text) => texts.input(&name, &text),
            GivenPrompt::Tokens(ids) => texts.tokens(&name, ids),
        }
    });
    let inputs = inputs.collect::<Result<Vec<_>, _>>()?;
    let dimensions = dimensions(&rows, &texts)?;
    let normalize = rows.bool("normalize")?.or(rows.bool("use_activation")?).unwrap_or(texts.spec.normalize);
    let as_base64 = is_base64(&rows)?;
    let (id, model, used) = (format!("embd-{id}"), served.name().to_owned(), tokens(&inputs));
    let write = move |results: Vec<Vec<f32>>| {
        let one = |(index, result): (usize, Vec<f32>)| {
            let vector = finished(result, dimensions, normalize);
            let embedding = if as_base64 { encoded(&vector) } else { vector.into_iter().map(number).collect() };
            json!({"object": "embedding", "index": index, "embedding": embedding})
        };
        let data: Vec<Value> = results.into_iter().enumerate().map(one).collect();
        json!({"id": id, "object": "list", "created": clock::now(), "model": model, "data": data, "usage": usage(used)})
    };
    Ok(PoolingCall { inputs, write: Box::new(write) })
}

/// A refusal of token ids, with the switch of the client that most often sends ids of another model.
fn of_other_ids(failure: Failure) -> Failure {
    if !failure.message.contains("is not a token id") {
        return failure;
    }
    let message = format!(
        "{}. Token ids must be this model's own. LangChain's OpenAIEmbeddings sends OpenAI's unless it is given check_embedding_ctx_length=False.",
        failure.message
    );
    Failure { message, ..failure }
}

/// Little-endian f32.
fn encoded(vector: &[f32]) -> Value {
    let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
    Value::String(STANDARD.encode(bytes))
}

fn is_base64(rows: &Rows<'_>) -> Result<bool, Failure> {
    let Some(field) = rows.get("encoding_format") else { return Ok(false) };
    match field.value.as_str() {
        Some("float") => Ok(false),
        Some("base64") => Ok(true),
        Some(other) => Err(invalid(&field, format!("'{}' is \"{other}\"; it must be \"float\" or \"base64\".", field.name))),
        None => Err(wrong_type(&field, "a string")),
    }
}

/// The length that vectors are to be cut to, if the model was made for that.
fn dimensions(rows: &Rows<'_>, texts: &Texts<'_>) -> Result<Option<usize>, Failure> {
    let Some(wanted) = count(rows, "dimensions", 1)? else { return Ok(None) };
    let width = texts.spec.width;
    let refuse = |what: String| {
        let message = format!("The model `{}` {what}; 'dimensions' is {wanted}.", texts.served.name());
        Err(Failure::bad_request("dimensions", message).code("unsupported_value"))
    };
    match &texts.spec.dimensions {
        _ if wanted == width => Ok(None),
        Dimensions::Whole => refuse(format!(
            "has vectors of {width} numbers, and its files do not say that they may be cut (is_matryoshka, which POOLER_CONFIG can set)"
        )),
        Dimensions::Any if wanted > width => refuse(format!("has vectors of {width} numbers")),
        Dimensions::Of(listed) if !listed.contains(&wanted) => refuse(format!("can cut its vectors to the lengths {listed:?}")),
        _ => Ok(Some(wanted)),
    }
}
