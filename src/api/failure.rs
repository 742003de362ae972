//! What a [`Failure`] looks like on the wire, at every door.
//!
//! The default body is a superset that each family of clients can read: OpenAI's envelope, FastChat's numeric `code` and the flat
//! `message` of older servers.

use serde_json::{Value, json};

use crate::api::frames;
use crate::error::{Failure, Kind};

/// The body of a failed HTTP call: `{"error":{message,type,param,code},"object":"error","message","code":N}`.
pub fn body(failure: &Failure) -> Value {
    let mut body = envelope(failure);
    body["object"] = json!("error");
    body["message"] = json!(failure.message);
    body["code"] = json!(fastchat_code(failure));
    body
}

/// OpenAI's envelope alone: `{"error":{message,type,param,code}}`.
pub fn envelope(failure: &Failure) -> Value {
    json!({
        "error": {
            "message": failure.message,
            "type": failure.kind.type_name(),
            "param": failure.param,
            "code": code(failure),
        }
    })
}

/// The envelope with the HTTP status inside, for jobs, which have no other place for it. The last chunk of a native stream that failed.
pub fn chunk(failure: &Failure) -> Value {
    let mut envelope = envelope(failure);
    envelope["error"]["status"] = json!(failure.status());
    envelope
}

/// The `error` of a failed job: a string that holds the JSON of the envelope and its status.
pub fn job_error(failure: &Failure) -> String {
    chunk(failure).to_string()
}

/// A failure inside a stream whose status line is gone already: one frame, then the end mark.
pub fn sse(failure: &Failure) -> String {
    ErrorForm::OpenAi.sse(failure.status(), &body(failure), 0)
}

/// Whose clients read a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ErrorForm {
    /// OpenAI's envelope and, in a stream, a frame without a name and `[DONE]`.
    #[default]
    OpenAi,
    /// The same envelope; in a stream an `error` event, which ends it.
    Responses,
    /// Anthropic's object; in a stream an `error` event with it, which ends it.
    Anthropic,
}

impl ErrorForm {
    /// The body of a failed HTTP call, of the body that [`body`] gives.
    pub fn body(self, status: u16, body: Value, request_id: &str) -> Value {
        if self != Self::Anthropic {
            return body;
        }
        let mut body = anthropic(status, message_of(&body));
        body["request_id"] = json!(request_id);
        body
    }

    /// The end of a stream that fails, of the body that [`body`] gives. `events`: how many events were written before it.
    pub fn sse(self, status: u16, body: &Value, events: usize) -> String {
        match self {
            Self::OpenAi => format!("data: {body}\n\ndata: [DONE]\n\n"),
            Self::Responses => {
                let (error, mut event) = (&body["error"], json!({"type": "error"}));
                event["code"] = error["code"].clone();
                event["message"] = json!(message_of(body));
                event["param"] = error["param"].clone();
                event["sequence_number"] = json!(events);
                frames::event("error", &event)
            }
            Self::Anthropic => frames::event("error", &anthropic(status, message_of(body))),
        }
    }
}

/// The message of a body, which is in OpenAI's form, or in Anthropic's already.
fn message_of(body: &Value) -> &str {
    body["error"]["message"].as_str().unwrap_or_default()
}

/// Anthropic's error object.
fn anthropic(status: u16, message: &str) -> Value {
    let kind = match status {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 | 529 => "overloaded_error",
        504 => "timeout_error",
        400..=498 => "invalid_request_error",
        _ => "api_error",
    };
    json!({"type": "error", "error": {"type": kind, "message": message}})
}

/// Response headers that tell the SDKs whether and when to try again.
pub fn headers(failure: &Failure) -> Vec<(&'static str, String)> {
    let mut headers = Vec::new();
    let retry_after = failure.retry_after.or(match failure.kind {
        Kind::Overloaded => Some(1),
        Kind::Loading | Kind::Draining => Some(5),
        _ => None,
    });
    if let Some(seconds) = retry_after {
        headers.push(("retry-after", seconds.to_string()));
    }
    // The same request would run out of memory, or of time, again: SDKs would otherwise send it three times in all.
    if failure.kind == Kind::Timeout || code(failure) == Some("cuda_out_of_memory") {
        headers.push(("x-should-retry", "false".to_owned()));
    }
    if failure.kind == Kind::Unauthorized {
        headers.push(("www-authenticate", "Bearer".to_owned()));
    }
    headers
}

/// The machine-readable reason: the failure's own, else the one of its class.
fn code(failure: &Failure) -> Option<&'static str> {
    failure.code.or(match failure.kind {
        Kind::Unauthorized => Some("invalid_api_key"),
        Kind::TooLarge => Some("request_too_large"),
        Kind::UnsupportedMedia => Some("unsupported_media_type"),
        Kind::Overloaded => Some("engine_overloaded"),
        Kind::Loading => Some("model_loading"),
        Kind::Draining => Some("shutting_down"),
        Kind::Timeout => Some("request_timeout"),
        Kind::Internal => Some("internal_error"),
        Kind::Forbidden => Some("not_allowed"),
        Kind::BadRequest | Kind::NotFound | Kind::MethodNotAllowed | Kind::Cancelled => None,
    })
}

/// FastChat's number of a failure.
fn fastchat_code(failure: &Failure) -> u32 {
    match (failure.kind, code(failure)) {
        (Kind::BadRequest, Some("context_length_exceeded")) => 40303,
        (Kind::BadRequest, Some("invalid_value" | "unsupported_parameter" | "unsupported_value")) => 40302,
        (Kind::NotFound, Some("model_not_found")) | (Kind::Forbidden, Some("model_not_allowed")) => 40301,
        (Kind::BadRequest | Kind::Forbidden | Kind::NotFound | Kind::MethodNotAllowed | Kind::UnsupportedMedia, _) => 40001,
        (Kind::Unauthorized, _) => 40102,
        (Kind::TooLarge, _) => 40303,
        (Kind::Overloaded, Some("rate_limit_exceeded")) => 42901,
        (Kind::Overloaded, _) => 42903,
        (Kind::Loading | Kind::Draining, _) => 50005,
        (Kind::Timeout, _) => 50006,
        (Kind::Internal, Some("cuda_out_of_memory")) => 50002,
        (Kind::Internal | Kind::Cancelled, _) => 50001,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn body_is_readable_by_every_family_of_clients() {
        let failure = Failure::bad_request("temperature", "3 is greater than the maximum of 2 - 'temperature'").code("invalid_value");
        assert_eq!(
            body(&failure),
            json!({
                "error": {
                    "message": "3 is greater than the maximum of 2 - 'temperature'",
                    "type": "invalid_request_error",
                    "param": "temperature",
                    "code": "invalid_value",
                },
                "object": "error",
                "message": "3 is greater than the maximum of 2 - 'temperature'",
                "code": 40302,
            })
        );
    }

    #[test]
    fn every_row_of_the_error_table() {
        let rows = [
            (Failure::bad_request("n", "x"), 400, "invalid_request_error", Value::Null, 40001),
            (Failure::new(Kind::Unauthorized, "x"), 401, "invalid_request_error", json!("invalid_api_key"), 40102),
            (Failure::new(Kind::NotFound, "x").code("model_not_found"), 404, "invalid_request_error", json!("model_not_found"), 40301),
            (Failure::new(Kind::NotFound, "x"), 404, "invalid_request_error", Value::Null, 40001),
            (
                Failure::bad_request("n", "x").code("unsupported_parameter"),
                400,
                "invalid_request_error",
                json!("unsupported_parameter"),
                40302,
            ),
            (
                Failure::bad_request("prompt", "x").code("context_length_exceeded"),
                400,
                "invalid_request_error",
                json!("context_length_exceeded"),
                40303,
            ),
            (Failure::new(Kind::Forbidden, "x"), 403, "invalid_request_error", json!("not_allowed"), 40001),
            (Failure::new(Kind::Forbidden, "x").code("model_not_allowed"), 403, "invalid_request_error", json!("model_not_allowed"), 40301),
            (Failure::new(Kind::TooLarge, "x"), 413, "invalid_request_error", json!("request_too_large"), 40303),
            (Failure::new(Kind::UnsupportedMedia, "x"), 415, "invalid_request_error", json!("unsupported_media_type"), 40001),
            (Failure::new(Kind::Overloaded, "x"), 429, "rate_limit_error", json!("engine_overloaded"), 42903),
            (Failure::new(Kind::Loading, "x"), 503, "service_unavailable", json!("model_loading"), 50005),
            (Failure::new(Kind::Draining, "x"), 503, "service_unavailable", json!("shutting_down"), 50005),
            (Failure::new(Kind::Timeout, "x"), 504, "timeout_error", json!("request_timeout"), 50006),
            (Failure::new(Kind::Internal, "x").code("cuda_out_of_memory"), 500, "server_error", json!("cuda_out_of_memory"), 50002),
            (Failure::internal("x"), 500, "server_error", json!("internal_error"), 50001),
        ];
        for (failure, status, type_name, code, number) in rows {
            let body = body(&failure);
            assert_eq!(failure.status(), status);
            assert_eq!(body["error"]["type"], type_name);
            assert_eq!(body["error"]["code"], code, "{failure:?}");
            assert_eq!(body["code"], number, "{failure:?}");
        }
    }

    #[test]
    fn a_job_error_is_json_text_with_the_status_inside() {
        let text = job_error(&Failure::new(Kind::NotFound, "The model `x` does not exist.").param("model").code("model_not_found"));
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["error"]["status"], 404);
        assert_eq!(value["error"]["param"], "model");
        assert_eq!(value.as_object().unwrap().len(), 1, "nothing beside the envelope");
    }

    #[test]
    fn a_failure_in_a_stream_is_one_frame_and_the_end_mark() {
        let text = sse(&Failure::internal("line one\nline two"));
        let frames: Vec<&str> = text.split_terminator("\n\n").collect();
        assert_eq!(frames.len(), 2, "the newline of the message is escaped");
        let value: Value = serde_json::from_str(frames[0].strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(value["error"]["message"], "line one\nline two");
        assert_eq!(frames[1], "data: [DONE]");
    }

    #[test]
    fn anthropics_clients_read_their_own_object() {
        let rows = [
            (400, "invalid_request_error"),
            (401, "authentication_error"),
            (403, "permission_error"),
            (404, "not_found_error"),
            (405, "invalid_request_error"),
            (413, "request_too_large"),
            (415, "invalid_request_error"),
            (429, "rate_limit_error"),
            (499, "api_error"),
            (500, "api_error"),
            (503, "overloaded_error"),
            (504, "timeout_error"),
        ];
        let openai = body(&Failure::bad_request("max_tokens", "no"));
        for (status, kind) in rows {
            let expected = json!({"type": "error", "error": {"type": kind, "message": "no"}, "request_id": "r"});
            assert_eq!(ErrorForm::Anthropic.body(status, openai.clone(), "r"), expected);
        }
        let end = "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"api_error\",\"message\":\"no\"}}\n\n";
        assert_eq!(ErrorForm::Anthropic.sse(500, &openai, 7), end);
        let end =
            "event: error\ndata: {\"type\":\"error\",\"code\":null,\"message\":\"no\",\"param\":\"max_tokens\",\"sequence_number\":7}\n\n";
        assert_eq!(ErrorForm::Responses.sse(500, &openai, 7), end);
    }

    #[test]
    fn retry_headers() {
        assert_eq!(headers(&Failure::new(Kind::Overloaded, "x").retry_after(7)), [("retry-after", "7".to_owned())]);
        assert_eq!(headers(&Failure::new(Kind::Loading, "x")), [("retry-after", "5".to_owned())]);
        assert_eq!(headers(&Failure::new(Kind::Internal, "x").code("cuda_out_of_memory")), [("x-should-retry", "false".to_owned())]);
        assert_eq!(headers(&Failure::new(Kind::Timeout, "x")), [("x-should-retry", "false".to_owned())]);
        assert_eq!(headers(&Failure::bad_request("n", "x")), []);
    }
}
