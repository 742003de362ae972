//! Server-sent events: whole frames, passed through as they come.

use std::pin::Pin;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt};

use super::wire::Refusal;
use crate::error::Failure;

/// Text of whole frames. An `Err` before the first `Ok` becomes an HTTP status; one after it has been written as a frame already, and
/// only ends the stream.
pub type Frames = Pin<Box<dyn Stream<Item = Result<String, Refusal>> + Send>>;

/// When a silent stream speaks.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// How long the first frame may keep the status line waiting. After it the answer is 200 whatever happens.
    pub patience: Duration,
    /// The longest silence; then a comment goes out.
    pub keep_alive: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { patience: Duration::from_secs(5), keep_alive: Duration::from_secs(10) }
    }
}

const COMMENT: &str = ": keep-alive\n\n";

/// Looks at the first frame, then answers: with a status when it is a failure, else with the stream.
///
/// Dropping the response (the client went away) drops the frames, which cancels what makes them.
pub async fn respond(mut frames: Frames, pace: Pace) -> Response {
    let first = match tokio::time::timeout(pace.patience, frames.next()).await {
        Ok(Some(Ok(text))) => Some(text),
        Ok(Some(Err(refusal))) => return refusal.into_response(),
        Ok(None) => return Refusal::from(Failure::internal("The stream ended before it began.")).into_response(),
        Err(_) => None,
    };
    let mut response = Body::from_stream(body(first, frames, pace.keep_alive)).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

fn body(first: Option<String>, mut frames: Frames, keep_alive: Duration) -> impl Stream<Item = Result<String, std::convert::Infallible>> {
    async_stream::stream! {
        let mut begun = first.is_some();
        yield Ok(first.unwrap_or_else(|| COMMENT.to_owned()));
        loop {
            match tokio::time::timeout(keep_alive, frames.next()).await {
                Ok(Some(Ok(text))) => {
                    begun = true;
                    yield Ok(text);
                }
                Ok(Some(Err(refusal))) => {
                    if !begun {
                        yield Ok(refusal.sse(0));
                    }
                    break;
                }
                Ok(None) => break,
                Err(_) => yield Ok(COMMENT.to_owned()),
            }
        }
    }
}
