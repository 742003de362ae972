//! A job as it is taken, and the exact bodies with which it is answered.

use serde::Serialize;
use serde_json::Value;

use crate::api::failure::job_error;
use crate::error::Failure;

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
    /// Somebody waits for an answer to it, so it gets an error.
    NoInput {
        id: String,
    },
    /// Cannot be answered.
    NoId,
}

impl Entry {
    /// Reads one element. Fields beyond `id`, `input` and `batchId` say nothing to a worker: even an `error` is not a failure here.
    pub fn read(value: Value) -> Self {
        let Value::Object(mut fields) = value else { return Self::NoId };
        let Some(id) = fields.get("id").and_then(id_text) else { return Self::NoId };
        match fields.swap_remove("input") {
            Some(input) => Self::Job(Job { id, input, batch_id: fields.get("batchId").and_then(id_text) }),
            None => Self::NoInput { id },
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
        let job = |id: &str, input| Entry::Job(Job { id: id.into(), input, batch_id: None });
        assert_eq!(Entry::read(json!({"id": "a", "input": {"x": 1}, "error": "", "retries": 0})), job("a", json!({"x": 1})));
        assert_eq!(Entry::read(json!({"id": 17, "input": null})), job("17", Value::Null));
        assert_eq!(Entry::read(json!({"id": "a"})), Entry::NoInput { id: "a".into() });
        for bad in [json!({"input": {}}), json!({"id": "", "input": 1}), json!({"id": null, "input": 1}), json!("a"), json!(null)] {
            assert_eq!(Entry::read(bad), Entry::NoId);
        }
        let Entry::Job(job) = Entry::read(json!({"id": "a", "input": 1, "batchId": "b"})) else { panic!() };
        assert_eq!(job.batch_id.as_deref(), Some("b"));
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
