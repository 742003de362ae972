//! Batches in OpenAI's form: lines that are calls, and the lines that answer them.
//!
//! | Line | |
//! |---|---|
//! | in | `{"custom_id", "method", "url", "body"}` |
//! | out | `{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}` |
//!
//! A call that fails has its status and OpenAI's envelope as `response`. Only a line that is no call has an `error` instead.

use std::time::Duration;

use serde_json::{Value, json};

use crate::api::body::{self, BodyLimits};
use crate::api::failure;
use crate::api::fields::{Field, kind, wrong_type};
use crate::error::Failure;

/// After so long a line for which the engine had no room is tried again.
pub const AGAIN: Duration = Duration::from_millis(200);

/// A call.
#[derive(Debug)]
pub struct Line {
    pub custom_id: String,
    pub method: String,
    pub url: String,
    pub body: Value,
}

/// A line that is no call.
#[derive(Debug)]
pub struct Unread {
    pub custom_id: Option<String>,
    /// Its number, from 1: what it is known by where it has no id.
    pub line: usize,
    pub failure: Failure,
}

/// A line that is not read yet: its parsed text may take far more memory, so it is read when it is its turn.
#[derive(Debug)]
pub enum Given {
    Value(Value),
    Text(String),
}

impl Given {
    pub fn read(self, line: usize, limits: &BodyLimits) -> Result<Line, Unread> {
        match self {
            Self::Value(value) => read(value, line),
            Self::Text(text) => read_text(text.as_bytes(), line, limits),
        }
    }
}

/// Reads the text of a line.
pub fn read_text(text: &[u8], line: usize, limits: &BodyLimits) -> Result<Line, Unread> {
    let unread = |failure| Unread { custom_id: None, line, failure };
    if text.len() > limits.bytes {
        let message = format!("The line has {} bytes, more than the limit of {}.", text.len(), limits.bytes);
        return Err(unread(Failure::bad_request("line", message).code("line_too_large")));
    }
    let value = body::read(text, limits).map_err(|unread_body| match unread_body {
        body::Unread::TooLarge(failure) | body::Unread::TooDeep(failure) => unread(failure.code("line_too_large")),
        body::Unread::Invalid(error) => {
            unread(Failure::bad_request("line", format!("The line is not valid JSON: {error}.")).code("invalid_json_line"))
        }
    })?;
    read(value, line)
}

/// Reads a line.
pub fn read(mut value: Value, line: usize) -> Result<Line, Unread> {
    let custom_id = value.get("custom_id").and_then(Value::as_str).map(str::to_owned);
    let read = match &mut value {
        Value::Object(_) => call(&mut value),
        other => Err(Failure::bad_request("line", format!("The line must be an object, but it is {}.", kind(other)))),
    };
    match read {
        Ok(line) => Ok(line),
        Err(failure) => Err(Unread { custom_id, line, failure: Failure { code: failure.code.or(Some("invalid_line")), ..failure } }),
    }
}

fn call(value: &mut Value) -> Result<Line, Failure> {
    let text = |name: &str, default: Option<&str>| match (value.get(name), default) {
        (Some(Value::String(text)), _) if !text.is_empty() => Ok(text.clone()),
        (None | Some(Value::Null), Some(default)) => Ok(default.to_owned()),
        (other, _) => Err(wrong_type(&Field { name: name.to_owned(), value: other.unwrap_or(&Value::Null) }, "a string that is not empty")),
    };
    let (custom_id, method, url) = (text("custom_id", None)?, text("method", Some("POST"))?.to_uppercase(), text("url", None)?);
    let body = value.get_mut("body").map(Value::take).unwrap_or_default();
    if method == "POST" && !body.is_object() {
        return Err(wrong_type(&Field { name: "body".to_owned(), value: &body }, "an object"));
    }
    if body.get("stream") == Some(&Value::Bool(true)) {
        return Err(no_stream());
    }
    Ok(Line { custom_id, method, url, body })
}

/// The refusal of a stream.
pub fn no_stream() -> Failure {
    let message = "'stream' makes no sense in a batch, where each line has one answer. Remove it.";
    Failure::bad_request("body.stream", message).code("unsupported_value")
}

/// The lines of a text, each with its number. Empty ones count and are left out.
pub fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(place, line)| (place + 1, line)).filter(|(_, line)| !line.trim().is_empty())
}

impl Line {
    /// The line that answers it. `id`: the request's.
    pub fn answer(&self, id: &str, answer: &Result<Value, Failure>) -> Value {
        let (status, body) = match answer {
            Ok(body) => (200, body.clone()),
            Err(failure) => (failure.status(), failure::envelope(failure)),
        };
        let response = json!({"status_code": status, "request_id": id, "body": body});
        json!({"id": line_id(id), "custom_id": self.custom_id, "response": response, "error": null})
    }
}

impl Unread {
    /// The line that answers it.
    pub fn answer(&self, id: &str) -> Value {
        let error = json!({
            "code": self.failure.code,
            "message": self.failure.message,
            "param": self.failure.param,
            "line": self.line,
        });
        json!({"id": line_id(id), "custom_id": self.custom_id, "response": null, "error": error})
    }
}

fn line_id(id: &str) -> String {
    format!("batch_req_{}", id.strip_prefix("req-").unwrap_or(id))
}

/// Whether an answer tells of a failure.
pub fn is_failure(answer: &Value) -> bool {
    !answer["error"].is_null() || answer["response"]["status_code"].as_u64() != Some(200)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_call() {
        let text = br#"{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x"}}"#;
        let line = read_text(text, 1, &BodyLimits::default()).unwrap();
        assert_eq!((line.custom_id.as_str(), line.method.as_str(), &line.body), ("a", "POST", &json!({"prompt": "x"})));
        let answer = line.answer("req-7", &Ok(json!({"x": 1})));
        let response = json!({"status_code": 200, "request_id": "req-7", "body": {"x": 1}});
        assert_eq!(answer, json!({"id": "batch_req_7", "custom_id": "a", "response": response, "error": null}));
        assert!(!is_failure(&answer));
        let answer = line.answer("r", &Err(Failure::bad_request("prompt", "no")));
        assert_eq!((&answer["response"]["status_code"], &answer["response"]["body"]["error"]["param"]), (&json!(400), &json!("prompt")));
        assert!(answer["error"].is_null() && is_failure(&answer));
    }

    #[test]
    fn a_broken_line_says_what_is_wrong_with_it() {
        for (text, id, param) in [
            ("{broken", Value::Null, "line"),
            ("[]", Value::Null, "line"),
            ("{}", Value::Null, "custom_id"),
            (r#"{"custom_id": 5, "url": "/v1/completions", "body": {}}"#, Value::Null, "custom_id"),
            (r#"{"custom_id": "a", "body": {}}"#, json!("a"), "url"),
            (r#"{"custom_id": "a", "url": "/v1/completions"}"#, json!("a"), "body"),
            (r#"{"custom_id": "a", "url": "/v1/completions", "body": {"stream": true}}"#, json!("a"), "body.stream"),
        ] {
            let unread = read_text(text.as_bytes(), 3, &BodyLimits::default()).unwrap_err();
            let answer = unread.answer("req-1");
            assert_eq!(
                (&answer["custom_id"], &answer["error"]["param"], &answer["error"]["line"]),
                (&id, &json!(param), &json!(3)),
                "{text}"
            );
            assert!(answer["error"]["code"].is_string() && answer["response"].is_null() && is_failure(&answer), "{answer}");
        }
        let limits = BodyLimits { bytes: 4, tree: 1000, depth: 100 };
        assert_eq!(read_text(b"{\"a\":1}", 1, &limits).unwrap_err().failure.code, Some("line_too_large"));
    }

    #[test]
    fn empty_lines_count_and_are_left_out() {
        assert_eq!(lines("a\n\n \r\nb").collect::<Vec<_>>(), [(1, "a"), (4, "b")]);
    }
}
