//! One request's sequences, from submission to text.
//!
//! One task per request turns engine events into pieces of text as they come, so the engine is never slowed; [`Run::next`] gives all that is
//! ready at once. Dropping the [`Run`] stops the task, which drops the generations, which frees their rows.

use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::api::Service;
use crate::api::options::Options;
use crate::engine::detokenize::Detokenizer;
use crate::engine::{Event, Finish, Generation, Request};
use crate::error::Failure;
use crate::models::tokenizer::Tokenizer;

/// Why a choice ended, in the words of the API.
#[derive(Debug, Clone, PartialEq)]
pub struct Ending {
    /// `stop` or `length`.
    pub reason: &'static str,
    /// What stopped it, besides the end of the sequence.
    pub stop: StopReason,
}

#[derive(Debug, Clone, PartialEq)]
pub enum StopReason {
    None,
    Text(String),
    Token(u32),
}

/// Something new of one choice.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    /// `prompt index * n + choice`.
    pub index: usize,
    /// Prompt tokens found in the prefix cache, told once, before everything else.
    pub cached: Option<usize>,
    pub text: String,
    /// Sampled tokens, the one that ended the sequence included: they count in usage.
    pub tokens: Vec<u32>,
    pub ending: Option<Ending>,
}

/// A running request.
pub struct Run {
    pieces: mpsc::UnboundedReceiver<Result<Piece, Failure>>,
    task: JoinHandle<()>,
    /// Choices that have not ended.
    open: usize,
    failure: Option<Failure>,
    /// All prompts, each once.
    pub prompt_tokens: usize,
    /// So far, of the pieces given out.
    pub completion_tokens: usize,
    /// Choices of each prompt.
    n: usize,
    /// Prompt tokens found in the prefix cache, by prompt; the first of its choices to run says how many.
    cached: Vec<Option<usize>>,
}

impl Drop for Run {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Run {
    /// Submits all choices of all prompts. Prompts are checked to fit the context already.
    pub fn start(service: &Service, id: &str, prompts: &[Arc<Vec<u32>>], options: &Options) -> Result<Self, Failure> {
        let id: Arc<str> = id.into();
        let deadline = service.settings.request_timeout.and_then(|limit| Instant::now().checked_add(limit));
        let text = Arc::new(TextOptions {
            tokenizer: service.tokenizer.clone(),
            stops: options.stops.clone(),
            include_stop: options.include_stop,
            skip_special_tokens: options.skip_special_tokens,
            min_tokens: options.sampling.min_tokens,
        });
        let (sender, pieces) = mpsc::unbounded_channel();
        let mut choices = Vec::with_capacity(prompts.len() * options.n);
        for prompt in prompts {
            let room = service.engine.limits().max_model_len.saturating_sub(prompt.len()).max(1);
            for choice in 0..options.n {
                let mut params = options.sampling.clone();
                params.max_tokens = options.max_tokens.unwrap_or(room).min(room);
                params.min_tokens = params.min_tokens.min(params.max_tokens);
                params.seed = params.seed.wrapping_add(choice as u64);
                let generation =
                    service.engine.submit(Request { id: id.clone(), prompt: prompt.clone(), params, prompt_logprobs: None, deadline })?;
                choices.push(follow(choices.len(), generation, text.clone(), sender.clone()));
            }
        }
        let open = choices.len();
        let task = tokio::spawn(async move { choices.into_iter().collect::<FuturesUnordered<_>>().collect::<()>().await });
        let prompt_tokens = prompts.iter().map(|prompt| prompt.len()).sum();
        let cached = vec![None; prompts.len()];
        Ok(Self { pieces, task, open, failure: None, prompt_tokens, completion_tokens: 0, n: options.n, cached })
    }

    /// Prompt tokens that were found in the prefix cache: what the first choice of each prompt found, not what it left for the others.
    pub fn cached_tokens(&self) -> usize {
        self.cached.iter().flatten().sum()
    }

    /// Everything that is ready, at least one piece; `None` when all choices have ended or one has failed.
    pub async fn next(&mut self) -> Option<Result<Vec<Piece>, Failure>> {
        if let Some(failure) = self.failure.take() {
            return Some(Err(self.fail(failure)));
        }
        if self.open == 0 {
            return None;
        }
        let first = match self.pieces.recv().await {
            Some(Ok(piece)) => piece,
            Some(Err(failure)) => return Some(Err(self.fail(failure))),
            None => return Some(Err(self.fail(Failure::internal("this request's task has ended without a result")))),
        };
        let mut ready = vec![first];
        loop {
            match self.pieces.try_recv() {
                Ok(Ok(piece)) => ready.push(piece),
                Ok(Err(failure)) => {
                    self.failure = Some(failure);
                    break;
                }
                Err(_) => break,
            }
        }
        for piece in &ready {
            if let Some(cached) = piece.cached {
                let known = &mut self.cached[piece.index / self.n];
                *known = Some(known.map_or(cached, |known| known.min(cached)));
            }
            self.completion_tokens += piece.tokens.len();
            self.open -= usize::from(piece.ending.is_some());
        }
        Some(Ok(ready))
    }

    /// All choices have ended.
    pub fn is_done(&self) -> bool {
        self.open == 0 && self.failure.is_none()
    }

    /// Everything, in order of choices.
    pub async fn collect(&mut self, choices: usize) -> Result<Vec<Piece>, Failure> {
        let mut pieces = Vec::new();
        while let Some(ready) = self.next().await {
            pieces = merged(pieces.into_iter().chain(ready?));
        }
        pieces.sort_by_key(|piece| piece.index);
        if pieces.len() != choices || pieces.iter().any(|piece| piece.ending.is_none()) {
            return Err(Failure::internal("a choice has ended without a result"));
        }
        Ok(pieces)
    }

    fn fail(&mut self, failure: Failure) -> Failure {
        self.open = 0;
        self.task.abort();
        failure
    }
}

/// One piece per choice, in order of first appearance.
pub fn merged(pieces: impl IntoIterator<Item = Piece>) -> Vec<Piece> {
    let mut merged: Vec<Piece> = Vec::new();
    for piece in pieces {
        match merged.iter_mut().find(|earlier| earlier.index == piece.index) {
            Some(earlier) => {
                earlier.text.push_str(&piece.text);
                earlier.tokens.extend(piece.tokens);
                earlier.cached = earlier.cached.or(piece.cached);
                earlier.ending = piece.ending;
            }
            None => merged.push(piece),
        }
    }
    merged
}

struct TextOptions {
    tokenizer: Arc<Tokenizer>,
    stops: Vec<String>,
    include_stop: bool,
    skip_special_tokens: bool,
    min_tokens: usize,
}

/// Follows one sequence to its end. A stop string ends it here: returning drops the generation, which cancels its row.
async fn follow(
    index: usize,
    mut generation: Generation,
    options: Arc<TextOptions>,
    pieces: mpsc::UnboundedSender<Result<Piece, Failure>>,
) {
    let mut detokenizer = Detokenizer::new(&options.stops, options.include_stop);
    let mut produced = 0;
    let mut started = None;
    loop {
        let mut piece = Piece { index, cached: None, text: String::new(), tokens: Vec::new(), ending: None };
        let mut stop = None;
        match generation.next().await {
            Event::Prompt(_) => continue,
            Event::Started { cached_tokens } => {
                // Told with the first token: a piece without one would open a stream too early.
                started = Some(cached_tokens);
                continue;
            }
            Event::Token(token) => {
                produced += 1;
                piece.tokens.push(token.id);
                if let Some(bytes) = visible(&options, token.id, token.ends) {
                    stop = detokenizer.push(bytes, produced > options.min_tokens, &mut piece.text);
                }
            }
            Event::Finished(finish) => {
                stop = detokenizer.finish(produced > options.min_tokens, &mut piece.text);
                piece.ending = Some(match finish {
                    Finish::Stop => Ending { reason: "stop", stop: StopReason::None },
                    Finish::StopToken(id) => Ending { reason: "stop", stop: StopReason::Token(id) },
                    Finish::Length => Ending { reason: "length", stop: StopReason::None },
                });
            }
            Event::Failed(failure) => {
                // A receiver that is gone wants no failure either.
                let _ = pieces.send(Err(failure));
                return;
            }
        }
        if let Some(stop) = stop {
            piece.ending = Some(Ending { reason: "stop", stop: StopReason::Text(options.stops[stop].clone()) });
        }
        piece.cached = started.take();
        let ended = piece.ending.is_some();
        if pieces.send(Ok(piece)).is_err() || ended {
            return;
        }
    }
}

/// The bytes of a token that belong to the text. The token that ended the sequence does only if the stop is to be included.
fn visible(options: &TextOptions, id: u32, ends: bool) -> Option<&[u8]> {
    let hidden = (ends && !options.include_stop) || (options.skip_special_tokens && options.tokenizer.is_special(id));
    if hidden { None } else { options.tokenizer.token_bytes(id) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_keeps_order_and_endings() {
        let piece = |index, text: &str, ending: bool| Piece {
            index,
            cached: None,
            text: text.to_owned(),
            tokens: vec![1],
            ending: ending.then_some(Ending { reason: "stop", stop: StopReason::None }),
        };
        let pieces = merged([piece(1, "a", false), piece(0, "x", false), piece(1, "b", true), piece(0, "y", false)]);
        assert_eq!(pieces.len(), 2);
        assert_eq!((pieces[0].index, pieces[0].text.as_str(), pieces[0].tokens.len(), pieces[0].ending.is_some()), (1, "ab", 2, true));
        assert_eq!((pieces[1].index, pieces[1].text.as_str(), pieces[1].ending.is_some()), (0, "xy", false));
    }
}
