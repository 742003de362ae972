//! Requests of models that embed texts or score pairs of them: `/v1/embeddings`, `/v1/rerank`, `/v1/score`.
//!
//! A request becomes sequences ([`Input`]), each of which the engine pools to a result; the request's own writer makes the answer of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use serde_json::{Map, Value};

use crate::api::fields::dialect_tables::POOLING;
use crate::api::fields::rows::Rows;
use crate::api::fields::{Field, Fields, below, invalid, whole, wrong_type};
use crate::api::model::Prompts;
use crate::api::prompt::text;
use crate::api::run::Runs;
use crate::api::served::ServedModel;
use crate::api::tally::Tally;
use crate::engine::{Event, PoolingRequest, PoolingSpec, PoolingTask, Request, SamplingParams};
use crate::error::{Failure, Kind};

pub mod embeddings;
pub mod rerank;
mod vectors;

/// A sequence to be pooled.
#[derive(Debug, Clone, PartialEq)]
pub struct Input {
    ids: Arc<Vec<u32>>,
    /// See [`PoolingRequest::second_text`].
    second_text: Option<usize>,
}

/// A request that is ready to run. `write` makes the answer of the results, in the order of the inputs.
pub struct PoolingCall {
    pub inputs: Vec<Input>,
    pub write: Box<dyn FnOnce(Vec<Vec<f32>>) -> Value + Send>,
}

/// Reads a request with this id and body.
pub type Read = fn(&ServedModel, &str, &Value) -> Result<PoolingCall, Failure>;

/// What a job's own input asks for, by its fields.
pub fn of_job(input: &Value) -> Read {
    let has = |name: &str| input.get(name).is_some_and(|value| !value.is_null());
    if has("query") {
        rerank::rerank
    } else if ["text_1", "queries", "data_1"].into_iter().any(has) {
        rerank::score
    } else {
        embeddings::read
    }
}

/// The results of all inputs, in their order. Some run or wait at a time: as long as the engine has no room for another one, that waits here.
///
/// # Errors
/// Of the first input that fails; the others are cancelled then.
pub async fn run(runs: &Runs, id: &str, inputs: Vec<Input>) -> Result<Vec<Vec<f32>>, Failure> {
    const AGAIN: Duration = Duration::from_millis(5);
    Tally::current().add_prompt(tokens(&inputs));
    let id: Arc<str> = id.into();
    let deadline = runs.timeout.map(|timeout| Instant::now() + timeout);
    let at_once = runs.engine.limits().max_num_seqs.saturating_mul(2).max(1);
    let results = inputs.into_iter().enumerate().map(|(place, input)| {
        let request = Request {
            id: id.clone(),
            prompt: input.ids,
            params: SamplingParams { max_tokens: 0, ..SamplingParams::default() },
            prompt_logprobs: None,
            deadline,
            pooling: Some(PoolingRequest { second_text: input.second_text }),
            constraint: None,
        };
        async move {
            let mut generation = loop {
                match runs.engine.submit(request.clone()) {
                    Err(failure) if failure.kind == Kind::Overloaded && place > 0 => tokio::time::sleep(AGAIN).await,
                    submitted => break submitted?,
                }
            };
            let mut pooled = Vec::new();
            loop {
                match generation.next().await {
                    Event::Pooled(result) => pooled = result,
                    Event::Finished(_) => return Ok(pooled),
                    Event::Failed(failure) => return Err(failure),
                    Event::Started { .. } | Event::Prompt(_) | Event::Token(_) => {}
                }
            }
        }
    });
    futures::stream::iter(results).buffered(at_once).try_collect().await
}

fn tokens(inputs: &[Input]) -> usize {
    inputs.iter().map(|input| input.ids.len()).sum()
}

/// What all of these routes share: the model that does it, and how texts become sequences.
struct Texts<'a> {
    served: &'a ServedModel,
    spec: Arc<PoolingSpec>,
    add_special_tokens: bool,
    /// A longer sequence is cut to its first tokens, so many.
    keep: Option<usize>,
    /// Stands before each text.
    prompt: String,
}

/// The body's rows, and what turns its texts into sequences. Refuses a model that cannot do `what`, an API's name.
fn open<'a>(served: &'a ServedModel, body: &'a Value, what: &str, tasks: &[PoolingTask]) -> Result<(Rows<'a>, Texts<'a>), Failure> {
    served.check_model(&Fields::new(body)?)?;
    let Some(spec) = served.limits.pooling.clone().filter(|spec| tasks.contains(&spec.task)) else {
        let does = match &served.limits.pooling {
            None => "generates text",
            Some(spec) if spec.task == PoolingTask::Score => "scores pairs of texts",
            Some(_) => "embeds texts",
        };
        let message = format!("The model `{}` {does} and does not support the {what} API.", served.name());
        return Err(Failure::bad_request("model", message).code("unsupported_value"));
    };
    let rows = Rows::new(POOLING, body)?;
    let texts = Texts {
        served,
        spec,
        add_special_tokens: rows.bool("add_special_tokens")?.unwrap_or(true),
        keep: keep(&rows, served.limits.max_model_len)?,
        prompt: prompt(&rows, &served.model.prompts)?,
    };
    Ok((rows, texts))
}

/// Tokens of a sequence that the request wants kept, when it wants it cut.
fn keep(rows: &Rows<'_>, context: usize) -> Result<Option<usize>, Failure> {
    if let Some(field) = rows.get("truncate_prompt_tokens") {
        return match integer(&field, -1)? {
            -1 => Ok(Some(context)),
            0 => Err(invalid(&field, format!("'{}' is 0, and nothing is left of a text that is cut to no tokens.", field.name))),
            tokens => Ok(Some(usize::try_from(tokens).unwrap_or(usize::MAX).min(context))),
        };
    }
    let Some(field) = rows.get("truncate") else { return Ok(None) };
    match field.value {
        Value::Bool(false) => Ok(None),
        Value::Bool(true) => Ok(Some(context)),
        Value::String(word) if word.eq_ignore_ascii_case("none") => Ok(None),
        Value::String(word) if word.eq_ignore_ascii_case("end") => Ok(Some(context)),
        _ => Err(wrong_type(&field, "true, false, \"NONE\" or \"END\"")),
    }
}

/// The prompt that the request names, or that the model's files put before every text.
fn prompt(rows: &Rows<'_>, prompts: &Prompts) -> Result<String, Failure> {
    let Some(field) = rows.get("prompt_name") else { return Ok(prompts.default().to_owned()) };
    let name = field.value.as_str().ok_or_else(|| wrong_type(&field, "a string"))?;
    prompts.get(name).map(str::to_owned).ok_or_else(|| {
        let known = prompts.names().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ");
        let known = if known.is_empty() { "it has none".to_owned() } else { format!("it has {known}") };
        invalid(&field, format!("The model has no prompt \"{name}\": {known} (config_sentence_transformers.json)."))
    })
}

impl Texts<'_> {
    /// The sequence of one text; `field` is its name in the request.
    fn input(&self, field: &str, text: &str) -> Result<Input, Failure> {
        let whole = format!("{}{text}", self.prompt);
        let mut ids = self.encode(field, &whole)?;
        if self.add_special_tokens {
            let (before, after) = text::around(self.served);
            ids.truncate(self.keep.map_or(usize::MAX, |keep| keep.saturating_sub(before.len() + after.len())));
            ids.splice(0..0, before.iter().copied());
            ids.extend(after);
        }
        self.checked(field, ids, None)
    }

    /// The sequence of token ids.
    fn tokens(&self, field: &str, ids: Vec<u32>) -> Result<Input, Failure> {
        self.checked(field, ids, None)
    }

    /// The sequence of two texts; of one that is too long and may be cut, the longer text loses its end. `most`: tokens of the second.
    fn pair(&self, (first, a): (&str, &str), (second, b): (&str, &str), most: Option<usize>) -> Result<Input, Failure> {
        let (mut a, mut b) = (self.encode(first, a)?, self.encode(second, b)?);
        b.truncate(most.unwrap_or(usize::MAX));
        let template = self.served.tokenizer.around_pair();
        if let Some(keep) = self.keep {
            let room = keep.saturating_sub(template.before.len() + template.between.len() + template.after.len());
            let (of_a, of_b) = shares(a.len(), b.len(), room);
            a.truncate(of_a);
            b.truncate(of_b);
        }
        let start = template.before.len() + a.len() + template.between.len();
        let ids = [&template.before[..], &a, &template.between, &b, &template.after].concat();
        self.checked(second, ids, template.has_types.then_some(start))
    }

    fn encode(&self, field: &str, text: &str) -> Result<Vec<u32>, Failure> {
        // To tokenize megabytes takes seconds; that they are too long is told from their bytes.
        if self.keep.is_none() && text.len() > self.served.limits.max_model_len {
            let least = self.served.tokenizer.least_tokens(text);
            if least > self.served.limits.max_model_len {
                return Err(self.too_long(field, &format!("at least {least} tokens")));
            }
        }
        text::ids(self.served, text, text::special(self.served), false)
    }

    fn checked(&self, field: &str, mut ids: Vec<u32>, second_text: Option<usize>) -> Result<Input, Failure> {
        let (limits, rows) = (&self.served.limits, self.served.embedding_rows);
        ids.truncate(self.keep.unwrap_or(usize::MAX));
        if ids.is_empty() {
            return Err(Failure::bad_request(field, format!("'{field}' came to no tokens at all. There must be at least one."))
                .code("invalid_value"));
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= rows) {
            let message = format!("'{field}' came to the token id {id}, which the model cannot read: its embedding has {rows} rows.");
            return Err(Failure::bad_request(field, message).code("invalid_value"));
        }
        if ids.len() > limits.max_model_len {
            return Err(self.too_long(field, &format!("{} tokens", ids.len())));
        }
        Ok(Input { ids: Arc::new(ids), second_text })
    }

    fn too_long(&self, field: &str, length: &str) -> Failure {
        let (most, hint) = (self.served.limits.max_model_len, self.served.limits.memory_hint());
        let message = format!(
            "This model's maximum context length is {most} tokens. However, '{field}' resulted in {length}. Please reduce its length, or set \
             truncate_prompt_tokens to -1 to have it cut.{hint}"
        );
        Failure::bad_request(field, message).code("context_length_exceeded")
    }
}

/// How much of two texts is kept where there is room for so many tokens: the longer one is cut, and both to half where both are longer.
fn shares(a: usize, b: usize, room: usize) -> (usize, usize) {
    let half = room / 2;
    match (a + b <= room, a <= half, b <= half) {
        (true, ..) => (a, b),
        (false, true, _) => (a, room - a),
        (false, false, true) => (room - b, b),
        (false, false, false) => (room - half, half),
    }
}

/// A whole number of at least `min`.
fn integer(field: &Field<'_>, min: i64) -> Result<i64, Failure> {
    let number = whole(field.value).ok_or_else(|| wrong_type(field, "an integer"))?;
    if number < min { Err(below(field, min as f64)) } else { Ok(number) }
}

/// The same as a count, of a field that may be absent.
fn count(rows: &Rows<'_>, name: &str, min: i64) -> Result<Option<usize>, Failure> {
    let read = |field: Field<'_>| integer(&field, min).map(|number| usize::try_from(number).unwrap_or(usize::MAX));
    rows.get(name).map(read).transpose()
}

/// An f32 in JSON, in the fewest digits that give it back.
fn number(value: f32) -> Value {
    Value::from(value.to_string().parse::<f64>().unwrap_or(f64::from(value)))
}

/// `prompt_tokens` and `total_tokens`.
fn usage(tokens: usize) -> Value {
    let mut usage = Map::new();
    usage.insert("prompt_tokens".to_owned(), tokens.into());
    usage.insert("total_tokens".to_owned(), tokens.into());
    Value::Object(usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longer_text_is_cut() {
        for (a, b, room, kept) in
            [(3, 4, 7, (3, 4)), (3, 9, 7, (3, 4)), (9, 2, 7, (5, 2)), (9, 9, 7, (4, 3)), (4, 9, 7, (4, 3)), (1, 1, 0, (0, 0))]
        {
            assert_eq!(shares(a, b, room), kept, "{a} {b} {room}");
            assert!(kept.0 + kept.1 <= room);
        }
    }

    #[test]
    fn numbers_come_back_bit_for_bit() {
        for value in [0.1f32, -1.0 / 3.0, 1e-30, f32::MIN_POSITIVE, 3.0, -0.0, 16_777_217.0] {
            let text = number(value).to_string();
            assert_eq!(text.parse::<f64>().map(|number| (number as f32).to_bits()), Ok(value.to_bits()), "{text}");
        }
        assert_eq!(number(0.1).to_string(), "0.1");
    }
}
