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
    NotFound,
    MethodNotAllowed,
    TooLarge,
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
            Kind::NotFound => 404,
            Kind::MethodNotAllowed => 405,
            Kind::TooLarge => 413,
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
            Kind::BadRequest | Kind::Unauthorized | Kind::NotFound | Kind::MethodNotAllowed | Kind::TooLarge => "invalid_request_error",
            Kind::Overloaded => "rate_limit_error",
            Kind::Loading | Kind::Draining => "service_unavailable",
            Kind::Timeout => "timeout_error",
            Kind::Cancelled | Kind::Internal => "server_error",
        }
    }
}

impl Failure {
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), param: None, code: None, retry_after: None }
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
        self.param = Some(param.into());
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

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}
