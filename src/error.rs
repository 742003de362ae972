//! The shared vocabulary of failures. What a failure looks like on the wire is decided in `api::failure`.

use std::fmt;

/// Everything that can go wrong with one request, as its caller is told.
///
/// `message` says what happened, which setting or field, and what to do. It is shown to the caller: no internals in it.
#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    pub kind: Kind,
    pub message: String,
    /// The request field at fault, as the caller wrote it (`messages[1].content`).
    pub param: Option<String>,
    /// A machine-readable reason (`context_length_exceeded`); `None` becomes JSON null.
    pub code: Option<&'static str>,
    /// Seconds after which another try makes sense; becomes `retry-after`.
    pub retry_after: Option<u64>,
}

/// The class of a failure, which fixes its HTTP status and OpenAI error type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    BadRequest,
    Unauthorized,
    /// The key is known and may not do this.
    Forbidden,
    NotFound,
    MethodNotAllowed,
    TooLarge,
    /// The body is not JSON, or is compressed in a way that is not read here.
    UnsupportedMedia,
    /// The waiting queue is full.
    Overloaded,
    /// The model is still loading.
    Loading,
    /// The worker is stopping and takes nothing new.
    Draining,
    /// The request's deadline passed.
    Timeout,
    /// The caller went away or cancelled. Nobody reads this one.
    Cancelled,
    Internal,
}

impl Kind {
    /// HTTP status of this class.
    pub fn status(self) -> u16 {
        match self {
            Kind::BadRequest => 400,
            Kind::Unauthorized => 401,
            Kind::Forbidden => 403,
            Kind::NotFound => 404,
            Kind::MethodNotAllowed => 405,
            Kind::TooLarge => 413,
            Kind::UnsupportedMedia => 415,
            Kind::Overloaded => 429,
            Kind::Loading | Kind::Draining => 503,
            Kind::Timeout => 504,
            Kind::Cancelled => 499,
            Kind::Internal => 500,
        }
    }

    /// The OpenAI `error.type` of this class.
    pub fn type_name(self) -> &'static str {
        match self {
            Kind::BadRequest
            | Kind::Unauthorized
            | Kind::Forbidden
            | Kind::NotFound
            | Kind::MethodNotAllowed
            | Kind::TooLarge
            | Kind::UnsupportedMedia => "invalid_request_error",
            Kind::Overloaded => "rate_limit_error",
            Kind::Loading | Kind::Draining => "service_unavailable",
            Kind::Timeout => "timeout_error",
            Kind::Cancelled | Kind::Internal => "server_error",
        }
    }
}

impl Failure {
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: cut(message.into()), param: None, code: None, retry_after: None }
    }

    /// A client mistake in field `param`.
    pub fn bad_request(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Kind::BadRequest, message).param(param)
    }

    /// A fault of ours. Log the details beside it: `message` goes to the caller.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Kind::Internal, message).code("internal_error")
    }

    pub fn param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(cut(param.into()));
        self
    }

    pub fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    pub fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    pub fn status(&self) -> u16 {
        self.kind.status()
    }
}

/// Most bytes of a message. Messages quote what they refuse, and that may be as long as a request.
const LONGEST: usize = 4096;

fn cut(mut text: String) -> String {
    if text.len() > LONGEST {
        let end = (0..=LONGEST).rfind(|&at| text.is_char_boundary(at)).unwrap_or(0);
        text.truncate(end);
        text.shrink_to_fit();
        text.push('…');
    }
    text
}

impl Failure {
    /// The failure of one model of several.
    pub fn of(self, model: &str) -> Self {
        Self { message: format!("{model}: {}", self.message), ..self }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_message_quotes_is_cut() {
        let failure = Failure::bad_request("é".repeat(LONGEST), format!("no model {}", "é".repeat(1 << 20)));
        assert!(failure.message.starts_with("no model éé") && failure.message.ends_with("é…"));
        assert!(failure.message.len() <= LONGEST + 3 && failure.param.unwrap().len() <= LONGEST + 3);
    }
}
