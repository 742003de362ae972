//! What one request took, and its last line in the log.
//!
//! Whoever lets a request in makes a [`Tally`] and runs the request inside of [`Tally::around`]; the run that it leads to counts its tokens
//! there. So the line can tell them however the answer is written, and also of an answer that was broken off.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::error::Failure;

/// A log is no place for long texts.
const MOST_REASON_CHARS: usize = 300;

tokio::task_local! {
    static CURRENT: Arc<Tally>;
}

/// Tokens and time of one request.
#[derive(Debug)]
pub struct Tally {
    began: Instant,
    prompt_tokens: AtomicUsize,
    output_tokens: AtomicUsize,
    /// The name of the caller's key, where it has one.
    key: Option<String>,
}

/// How a request ended.
#[derive(Debug)]
pub enum End<'a> {
    Completed,
    /// The platform stopped it.
    Stopped,
    /// Its client went away before the answer was complete.
    Gone,
    Failed(&'a Failure),
    /// There was an answer, and it could not be handed over.
    Lost,
}

impl Tally {
    /// The clock starts.
    pub fn begin() -> Arc<Self> {
        Arc::new(Self::of(None))
    }

    /// The same for a caller whose key has this name.
    pub fn begin_for(key: &str) -> Arc<Self> {
        Arc::new(Self::of(Some(key.to_owned())))
    }

    fn of(key: Option<String>) -> Self {
        Self { began: Instant::now(), prompt_tokens: AtomicUsize::new(0), output_tokens: AtomicUsize::new(0), key }
    }

    /// When the request came.
    pub fn began(&self) -> Instant {
        self.began
    }

    pub fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }

    /// Of prompts and answers, so far.
    pub fn tokens(&self) -> usize {
        self.prompt_tokens.load(Ordering::Relaxed) + self.output_tokens.load(Ordering::Relaxed)
    }

    /// Runs `work`: what it starts in this task counts here.
    pub async fn around<F: Future>(self: &Arc<Self>, work: F) -> F::Output {
        CURRENT.scope(Arc::clone(self), work).await
    }

    /// That of the task at hand; one that nobody reads where nobody asked.
    pub(crate) fn current() -> Arc<Self> {
        CURRENT.try_with(Arc::clone).unwrap_or_else(|_| Self::begin())
    }

    pub(crate) fn add_prompt(&self, tokens: usize) {
        self.prompt_tokens.fetch_add(tokens, Ordering::Relaxed);
    }

    pub(crate) fn add_output(&self, tokens: usize) {
        self.output_tokens.fetch_add(tokens, Ordering::Relaxed);
    }

    /// Writes the request's last line: how it ended, its tokens, its milliseconds. What did not end well is a warning, with the reason.
    pub fn log(&self, end: &End<'_>) {
        let (prompt_tokens, output_tokens) = (self.prompt_tokens.load(Ordering::Relaxed), self.output_tokens.load(Ordering::Relaxed));
        let (ms, key) = (self.began.elapsed().as_millis(), self.key());
        match end {
            End::Completed => tracing::info!(status = "COMPLETED", prompt_tokens, output_tokens, ms, key, "Finished."),
            End::Stopped => tracing::info!(status = "CANCELLED", prompt_tokens, output_tokens, ms, key, "Job stopped."),
            End::Gone => tracing::info!(status = "CANCELLED", prompt_tokens, output_tokens, ms, key, "The client went away."),
            End::Failed(failure) => {
                let code = failure.code.unwrap_or(failure.kind.type_name());
                let http = failure.status();
                let reason = one_line(&failure.message);
                tracing::warn!(status = "FAILED", http, code, prompt_tokens, output_tokens, ms, key, "Failed: {reason}");
            }
            End::Lost => tracing::warn!(status = "LOST", prompt_tokens, output_tokens, ms, key, "The result could not be returned."),
        }
    }
}

/// The beginning of a message, without line breaks.
fn one_line(message: &str) -> String {
    message.chars().take(MOST_REASON_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_runs_inside_counts_there() {
        let tally = Tally::begin();
        tally.around(async { Tally::current().add_prompt(3) }).await;
        Tally::current().add_prompt(5);
        assert_eq!(tally.prompt_tokens.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn a_reason_is_one_short_line() {
        assert_eq!(one_line("a\nb"), "a b");
        assert_eq!(one_line(&"é".repeat(1000)).chars().count(), MOST_REASON_CHARS);
    }
}
