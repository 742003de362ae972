//! `/v1/rerank` and `/v1/score`. A reranker scores pairs of texts; an embedding model gives the cosine of their vectors.

use std::sync::Arc;

use serde_json::{Value, json};

use super::vectors::{cosine, score as score_of};
use super::{Input, PoolingCall, Texts, count, number, open, tokens, usage};
use crate::api::clock;
use crate::api::fields::rows::Rows;
use crate::api::fields::{Field, invalid, missing, wrong_type};
use crate::api::served::ServedModel;
use crate::engine::{PoolingSpec, PoolingTask};
use crate::error::Failure;

const TASKS: &[PoolingTask] = &[PoolingTask::Score, PoolingTask::Embed];
/// Most pairs in one request.
const MAX_PAIRS: usize = 2048;

/// A text with its name in the request.
type Named<'a> = (String, &'a str);

/// The sequences of a request's pairs, and how their results become one score a pair.
struct Pairs {
    inputs: Vec<Input>,
    /// Of each pair the places of its two vectors among the results; empty for rerankers, whose results are scores.
    vectors: Vec<(usize, usize)>,
    spec: Arc<PoolingSpec>,
    activation: Option<bool>,
}

impl Pairs {
    /// `first` holds one text for all of `second`, or as many.
    fn new(texts: &Texts<'_>, rows: &Rows<'_>, first: &[Named<'_>], second: &[Named<'_>], most: Option<usize>) -> Result<Self, Failure> {
        let raw = rows.bool("raw_scores")?.map(|raw| !raw);
        let activation = rows.bool("use_activation")?.or(raw);
        let spec = texts.spec.clone();
        let of = |place: usize| if first.len() == 1 { 0 } else { place };
        if spec.task == PoolingTask::Score {
            let pair = |(place, b): (usize, &Named<'_>)| {
                let a = &first[of(place)];
                texts.pair((&a.0, a.1), (&b.0, b.1), most)
            };
            let inputs = second.iter().enumerate().map(pair).collect::<Result<_, _>>()?;
            return Ok(Self { inputs, vectors: Vec::new(), spec, activation });
        }
        let inputs = first.iter().chain(second).map(|(name, text)| texts.input(name, text)).collect::<Result<_, _>>()?;
        let vectors = (0..second.len()).map(|place| (of(place), first.len() + place)).collect();
        Ok(Self { inputs, vectors, spec, activation })
    }

    /// One score a pair.
    fn scores(vectors: &[(usize, usize)], spec: &PoolingSpec, activation: Option<bool>, results: &[Vec<f32>]) -> Vec<f32> {
        match spec.task {
            PoolingTask::Score => results.iter().map(|result| score_of(result, spec, activation)).collect(),
            PoolingTask::Embed => vectors.iter().map(|(a, b)| cosine(&results[*a], &results[*b])).collect(),
        }
    }
}

/// `{query, documents, top_n}` → documents by their scores, the best first.
pub fn rerank(served: &ServedModel, id: &str, body: &Value) -> Result<PoolingCall, Failure> {
    let (rows, texts) = open(served, body, "Rerank", TASKS)?;
    let query = rows.string("query")?.ok_or_else(|| missing("query", "'query' is missing. It is a string."))?;
    let field = rows.get("documents").or(rows.get("docs"));
    let field = field.ok_or_else(|| missing("documents", "'documents' is missing. It is a list of strings."))?;
    let documents = named(&field)?;
    let pairs = Pairs::new(&texts, &rows, &[("query".to_owned(), query)], &documents, count(&rows, "max_tokens_per_doc", 1)?)?;
    let top = count(&rows, "top_n", 0)?.filter(|top| *top > 0).unwrap_or(usize::MAX);
    let returned = rows.bool("return_documents")?.or(rows.bool("return_docs")?).unwrap_or(true);
    let documents: Vec<String> = documents.into_iter().map(|(_, text)| text.to_owned()).collect();
    let Pairs { inputs, vectors, spec, activation } = pairs;
    let (id, model, used) = (format!("rerank-{id}"), served.name().to_owned(), tokens(&inputs));
    let write = move |results: Vec<Vec<f32>>| {
        let mut scores: Vec<(usize, f32)> = Pairs::scores(&vectors, &spec, activation, &results).into_iter().enumerate().collect();
        // A stable sort: of equal ones the earlier comes first.
        scores.sort_by(|a, b| b.1.total_cmp(&a.1));
        let one = |(index, score): (usize, f32)| {
            let mut result = json!({"index": index, "relevance_score": number(score)});
            if returned {
                result["document"] = json!({"text": documents[index]});
            }
            result
        };
        let ranked: Vec<Value> = scores.into_iter().take(top).map(one).collect();
        json!({"id": id, "model": model, "usage": usage(used), "results": ranked})
    };
    Ok(PoolingCall { inputs, write: Box::new(write) })
}

/// `{text_1, text_2}` (or `queries`, `documents`, or `data_1`, `data_2`) → a score of each pair: one text against several, or as many against
/// each other.
pub fn score(served: &ServedModel, id: &str, body: &Value) -> Result<PoolingCall, Failure> {
    let (rows, texts) = open(served, body, "Score", TASKS)?;
    let found = |names: [&str; 3]| {
        let field = names.into_iter().find_map(|name| rows.get(name));
        field.ok_or_else(|| missing(names[0], format!("'{}' is missing. It is a string or a list of strings.", names[0])))
    };
    let (first, second) = (found(["text_1", "queries", "data_1"])?, found(["text_2", "documents", "data_2"])?);
    let (a, b) = (named(&first)?, named(&second)?);
    if a.len() != 1 && a.len() != b.len() {
        let message = format!(
            "'{}' holds {} texts and '{}' {}: one text is scored against several, or each against the other of its place.",
            first.name,
            a.len(),
            second.name,
            b.len()
        );
        return Err(invalid(&first, message));
    }
    let Pairs { inputs, vectors, spec, activation } = Pairs::new(&texts, &rows, &a, &b, None)?;
    let (id, model, used) = (format!("score-{id}"), served.name().to_owned(), tokens(&inputs));
    let write = move |results: Vec<Vec<f32>>| {
        let scores = Pairs::scores(&vectors, &spec, activation, &results).into_iter().enumerate();
        let data: Vec<Value> = scores.map(|(index, score)| json!({"index": index, "object": "score", "score": number(score)})).collect();
        json!({"id": id, "object": "list", "created": clock::now(), "model": model, "data": data, "usage": usage(used)})
    };
    Ok(PoolingCall { inputs, write: Box::new(write) })
}

/// A text, or a list of texts, or of objects with a `text`.
fn named<'a>(field: &Field<'a>) -> Result<Vec<Named<'a>>, Failure> {
    let words = "a string, a list of strings, or of objects with a 'text'";
    let list = match field.value {
        Value::String(text) => return Ok(vec![(field.name.clone(), text)]),
        Value::Array(list) => list,
        _ => return Err(wrong_type(field, words)),
    };
    if list.is_empty() || list.len() > MAX_PAIRS {
        let message = format!("'{}' holds {} texts; it must hold 1 to {MAX_PAIRS}.", field.name, list.len());
        return Err(invalid(field, message));
    }
    let text = |(place, value): (usize, &'a Value)| {
        let entry = Field { name: format!("{}[{place}]", field.name), value };
        let text = value.as_str().or_else(|| value.get("text")?.as_str()).ok_or_else(|| wrong_type(&entry, "a string"))?;
        Ok((entry.name, text))
    };
    list.iter().enumerate().map(text).collect()
}
