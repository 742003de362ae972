//! A job as it is taken, and the exact bodies with which it is answered.

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::api::body::{self, BodyLimits, Unread};
use crate::api::failure::job_error;
use crate::error::{Failure, Kind};

/// One unit of work from the queue.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    pub id: String,
    /// Whatever the client sent as `input`.
    pub input: Value,
    /// The batch job that this one belongs to. For logs.
    pub batch_id: Option<String>,
}

/// One element of a take's answer, validated.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Entry {
    Job(Job),
    /// It cannot be run. It is answered with this error, because somebody waits for it.
    Faulty {
        id: String,
        failure: Failure,
    },
    /// Without an id it cannot even be answered.
    NoId,
}

/// Splits the body of a take's answer, an object or a list of them, into elements. Each is then read separately, so that one which our JSON
/// parser refuses does not fail the others. `None` when the body is neither.
pub(crate) fn elements(body: &[u8]) -> Option<Vec<&[u8]>> {
    let body = body.trim_ascii();
    if body.starts_with(b"{") {
        return Some(vec![body]);
    }
    let mut rest = body.strip_prefix(b"[")?.trim_ascii_start();
    let mut elements = Vec::new();
    while rest != b"]" {
        let mut values = serde_json::Deserializer::from_slice(rest).into_iter::<IgnoredAny>();
        values.next()?.ok()?;
        let (element, after) = rest.split_at(values.byte_offset());
        elements.push(element);
        let after = after.trim_ascii_start();
        rest = match after.strip_prefix(b",") {
            Some(after) => after.trim_ascii_start(),
            None if after == b"]" => after,
            None => return None,
        };
    }
    Some(elements)
}

impl Entry {
    /// Reads one element. Fields beyond `id`, `input` and `batchId` say nothing to a worker: even an `error` is not a failure here.
    pub fn read(element: &[u8], limits: &BodyLimits) -> Self {
        if element.len() > limits.bytes {
            let message = format!("The job has {} bytes, more than the limit of {}.", element.len(), limits.bytes);
            return Self::unreadable(element, Failure::new(Kind::TooLarge, message));
        }
        let value = match body::read(element, limits) {
            Ok(value) => value,
            Err(Unread::TooLarge(failure) | Unread::TooDeep(failure)) => return Self::unreadable(element, failure),
            Err(Unread::Invalid(error)) => {
                return Self::unreadable(element, Failure::bad_request("input", format!("The job's JSON cannot be read: {error}")));
            }
        };
        let Value::Object(mut fields) = value else { return Self::NoId };
        let Some(id) = fields.get("id").and_then(id_text) else { return Self::NoId };
        match fields.swap_remove("input") {
            Some(input) => Self::Job(Job { id, input, batch_id: fields.get("batchId").and_then(id_text) }),
            None => Self::Faulty { id, failure: Failure::bad_request("input", "The job has no `input`.") },
        }
    }

    /// An element that was refused. Some of what the parser refuses is well-formed JSON (half of a surrogate pair, deep nesting, too much of it),
    /// and then its id can still be read.
    fn unreadable(element: &[u8], failure: Failure) -> Self {
        #[derive(Deserialize)]
        struct Named {
            id: Value,
        }
        let named = serde_json::from_slice::<Named>(element).ok();
        match named.and_then(|named| id_text(&named.id)) {
            Some(id) => Self::Faulty { id, failure },
            None => Self::NoId,
        }
    }
}

/// An id as text. Some servers number their jobs.
pub(crate) fn id_text(value: &Value) -> Option<String> {
    match value {
        Value::String(id) if !id.is_empty() => Some(id.clone()),
        Value::Number(id) => Some(id.to_string()),
        _ => None,
    }
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Outcome {
    Output(Value),
    /// A stream that ended well: its pieces, as they were posted.
    Pieces(Vec<Value>),
    Failed {
        failure: Failure,
        streamed: bool,
    },
}

impl Outcome {
    /// The `isStream` parameter of the final post: true when the answer was a stream, whether or not any piece of it was posted.
    pub fn is_stream(&self) -> bool {
        matches!(self, Self::Pieces(_) | Self::Failed { streamed: true, .. })
    }

    /// The body of the final post. `stop_pod` asks the platform to replace this worker.
    pub fn body(&self, stop_pod: bool) -> String {
        let body = match self {
            Self::Output(value) => Body { output: Some(Output::One(value)), error: None, stop_pod },
            Self::Pieces(pieces) => Body { output: Some(Output::Many(pieces)), error: None, stop_pod },
            Self::Failed { failure, .. } => Body { output: None, error: Some(job_error(failure)), stop_pod },
        };
        to_json(&body)
    }
}

/// `error` is always a string: an object there makes the job count as completed without output.
#[derive(Serialize)]
struct Body<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    output: Option<Output<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(rename = "stopPod", skip_serializing_if = "std::ops::Not::not")]
    stop_pod: bool,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Output<'a> {
    One(&'a Value),
    Many(&'a [Value]),
}

/// The body of one stream post.
pub(crate) fn piece_body(piece: &Value) -> String {
    to_json(&Body { output: Some(Output::One(piece)), error: None, stop_pod: false })
}

/// JSON text of our own types. It cannot fail: their keys are strings, and nothing in them fails to serialize.
fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn entries_are_validated() {
        let read = |value: Value| Entry::read(value.to_string().as_bytes(), &BodyLimits::default());
        let job = |id: &str, input| Entry::Job(Job { id: id.into(), input, batch_id: None });
        assert_eq!(read(json!({"id": "a", "input": {"x": 1}, "error": "", "retries": 0})), job("a", json!({"x": 1})));
        assert_eq!(read(json!({"id": 17, "input": null})), job("17", Value::Null));
        assert!(matches!(read(json!({"id": "a"})), Entry::Faulty { id, .. } if id == "a"));
        for bad in [json!({"input": {}}), json!({"id": "", "input": 1}), json!({"id": null, "input": 1}), json!("a"), json!(null)] {
            assert_eq!(read(bad), Entry::NoId);
        }
        let with_batch = Job { id: "a".into(), input: json!(1), batch_id: Some("b".into()) };
        assert_eq!(read(json!({"id": "a", "input": 1, "batchId": "b"})), Entry::Job(with_batch));
    }

    #[test]
    fn an_entry_that_cannot_be_read_still_has_an_id() {
        let deep = format!(r#"{{"input": {}1{}, "id": "a"}}"#, "[".repeat(500), "]".repeat(500));
        for text in [deep.as_str(), r#"{"id": "a", "input": "half \ud83d"}"#] {
            let Entry::Faulty { id, failure } = Entry::read(text.as_bytes(), &BodyLimits::default()) else { unreachable!("{text}") };
            assert_eq!((id.as_str(), failure.status()), ("a", 400));
        }
        assert_eq!(Entry::read(b"{", &BodyLimits::default()), Entry::NoId);
    }

    #[test]
    fn an_entry_that_is_too_large_is_answered_and_not_read() {
        let limits = BodyLimits { bytes: 1000, tree: 10_000, depth: 100 };
        for input in [json!("x".repeat(1000)), json!(vec![1; 400])] {
            let Entry::Faulty { id, failure } = Entry::read(json!({"id": "a", "input": input}).to_string().as_bytes(), &limits) else {
                unreachable!("{input}")
            };
            assert_eq!((id.as_str(), failure.status()), ("a", 413));
        }
    }

    #[test]
    fn bodies_are_split_into_elements() {
        let split = |text: &'static str| {
            elements(text.as_bytes()).map(|list| list.iter().map(|&e| std::str::from_utf8(e).unwrap()).collect::<Vec<_>>())
        };
        assert_eq!(split(r#" {"a":1} "#), Some(vec![r#"{"a":1}"#]));
        assert_eq!(split(r#"[{"a":"],"} , 7,"x" ]"#), Some(vec![r#"{"a":"],"}"#, "7", r#""x""#]));
        assert_eq!(split(r#"["\ud83d",[[]]]"#), Some(vec![r#""\ud83d""#, "[[]]"]));
        assert_eq!(split("[ ]"), Some(vec![]));
        for bad in ["", "null", "7", "[", "[1", "[1 2]", "[1,", "[,]", "[1]]"] {
            assert_eq!(split(bad), None, "{bad}");
        }
    }

    #[test]
    fn bodies_are_the_platforms() {
        assert_eq!(Outcome::Output(json!({"a": "é"})).body(false), r#"{"output":{"a":"é"}}"#);
        assert_eq!(Outcome::Output(Value::Null).body(false), r#"{"output":null}"#);
        assert_eq!(Outcome::Pieces(vec![json!("x"), json!({"y": 1})]).body(false), r#"{"output":["x",{"y":1}]}"#);
        assert_eq!(Outcome::Pieces(vec![]).body(false), r#"{"output":[]}"#);
        assert_eq!(piece_body(&json!("x")), r#"{"output":"x"}"#);
    }

    #[test]
    fn an_error_is_a_string_that_holds_the_envelope() {
        let failed = Outcome::Failed { failure: Failure::bad_request("messages", "empty"), streamed: true };
        let body: Value = serde_json::from_str(&failed.body(true)).unwrap();
        assert_eq!(body["stopPod"], json!(true));
        assert_eq!(body.get("output"), None);
        let envelope: Value = serde_json::from_str(body["error"].as_str().unwrap()).unwrap();
        let expected = json!({"message": "empty", "type": "invalid_request_error", "param": "messages", "code": null, "status": 400});
        assert_eq!(envelope, json!({"error": expected}));
        assert!(failed.is_stream());
        assert!(!Outcome::Failed { failure: Failure::internal("x"), streamed: false }.is_stream());
    }
}
