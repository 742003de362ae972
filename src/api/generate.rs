//! One request's sequences, from submission to text.
//!
//! One task per request turns engine events into pieces of text as they come, so the engine is never slowed; [`Run::next`] gives all that is
//! ready at once. Dropping the [`Run`] stops the task, which drops the generations, which frees their rows.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::api::Service;
use crate::api::logprobs::Reported;
use crate::api::openai::Prepared;
use crate::api::tally::Tally;
use crate::engine::{Event, Finish, Generation, Request, Token};
use crate::error::Failure;
use crate::models::Logprobs;
use crate::text::detokenize::Detokenizer;
use crate::text::tokenizer::Tokenizer;

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
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Piece {
    /// `prompt index * candidates + candidate`.
    pub index: usize,
    /// Prompt tokens found in the prefix cache, told once, before everything else.
    pub cached: Option<usize>,
    pub text: String,
    /// Sampled tokens, the one that ended the sequence included: they count in usage.
    pub tokens: Vec<u32>,
    /// What is known of the tokens whose text is out, when asked for.
    pub logprobs: Vec<Reported>,
    /// The prompt's scores, in the choice's first piece, when asked for.
    pub prompt: Option<Arc<Vec<Logprobs>>>,
    /// The model's own log probabilities of `tokens` added up, as far as they are known.
    pub sum: f64,
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
    /// Where the request's tokens are counted for the log.
    tally: Arc<Tally>,
    /// Choices of each prompt.
    candidates: usize,
    /// Prompt tokens found in the prefix cache, by prompt; the first of its choices to run says how many.
    cached: Vec<Option<usize>>,
}

impl Drop for Run {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Run {
    /// Submits all candidates of all prompts. Prompts are checked to fit the context already.
    pub fn start(service: &Service, id: &str, request: &Prepared) -> Result<Self, Failure> {
        let options = &request.options;
        let id: Arc<str> = id.into();
        let deadline = service.settings.request_timeout.and_then(|limit| Instant::now().checked_add(limit));
        let text = Arc::new(TextOptions {
            tokenizer: service.tokenizer.clone(),
            stops: options.stops.clone(),
            include_stop: options.include_stop,
            skip_special_tokens: options.skip_special_tokens,
            min_tokens: options.sampling.min_tokens,
            score_only: options.max_tokens == Some(0),
            report: options.logprobs.output.is_some(),
            report_hidden: options.return_token_ids,
        });
        let (sender, pieces) = mpsc::unbounded_channel();
        let mut choices = Vec::with_capacity(request.prompts.len() * options.candidates);
        for (place, prompt) in request.prompts.iter().enumerate() {
            let room = service.engine.limits().max_model_len.saturating_sub(prompt.len()).max(1);
            let (scored, scores) = watch::channel(None);
            let mut scored = Some(scored);
            // Without randomness all choices are the same: computed once.
            let copies = if options.sampling.is_greedy() { options.candidates } else { 1 };
            for candidate in (0..options.candidates).step_by(copies) {
                let mut params = options.sampling.clone();
                params.max_tokens = options.max_tokens.unwrap_or(room).clamp(1, room);
                params.choices = if candidate == 0 { options.n } else { 0 };
                params.seed = options.seed.map_or_else(|| service.pick_seed(), |seed| seed.wrapping_add(candidate as u64));
                // Of one prompt the first candidate has the scores, for all.
                let prompt_logprobs = options.prompt_logprobs.filter(|_| candidate == 0);
                let request_of = Request { id: id.clone(), prompt: prompt.clone(), params, prompt_logprobs, deadline };
                let generation = service.engine.submit(request_of)?;
                let opening = Opening {
                    echo: request.echoes.get(place).map(|echo| echo.text.clone()).unwrap_or_default(),
                    scored: scored.take(),
                    scores: options.prompt_logprobs.map(|_| scores.clone()),
                };
                let first = place * options.candidates + candidate;
                let follower = Follower::new(first..first + copies, text.clone(), opening);
                choices.push(follower.follow(generation, sender.clone()));
            }
        }
        let open = request.prompts.len() * options.candidates;
        let task = tokio::spawn(async move { choices.into_iter().collect::<FuturesUnordered<_>>().collect::<()>().await });
        let prompt_tokens = request.prompts.iter().map(|prompt| prompt.len()).sum();
        let cached = vec![None; request.prompts.len()];
        let tally = Tally::current();
        tally.add_prompt(prompt_tokens);
        Ok(Self { pieces, task, open, failure: None, prompt_tokens, completion_tokens: 0, tally, candidates: options.candidates, cached })
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
                let known = &mut self.cached[piece.index / self.candidates];
                *known = Some(known.map_or(cached, |known| known.min(cached)));
            }
            self.completion_tokens += piece.tokens.len();
            self.tally.add_output(piece.tokens.len());
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
                earlier.logprobs.extend(piece.logprobs);
                earlier.prompt = earlier.prompt.take().or(piece.prompt);
                earlier.sum += piece.sum;
                earlier.ending = piece.ending;
            }
            None => merged.push(piece),
        }
    }
    merged
}

/// Of each `candidates` the `n` most probable by the mean over their tokens, in that order, numbered anew.
pub fn best(mut pieces: Vec<Piece>, n: usize, candidates: usize) -> Vec<Piece> {
    if candidates == n {
        return pieces;
    }
    let mut best = Vec::with_capacity(pieces.len() / candidates * n);
    for of_prompt in pieces.chunks_mut(candidates) {
        let mean = |piece: &Piece| piece.sum / piece.tokens.len().max(1) as f64;
        // A stable sort: of equal ones the earlier comes first.
        of_prompt.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
        for piece in &mut of_prompt[..n] {
            best.push(Piece { index: best.len(), ..std::mem::take(piece) });
        }
    }
    best
}

struct TextOptions {
    tokenizer: Arc<Tokenizer>,
    stops: Vec<String>,
    include_stop: bool,
    skip_special_tokens: bool,
    min_tokens: usize,
    /// `max_tokens: 0`: the token that the engine draws all the same is dropped.
    score_only: bool,
    /// Log probabilities of the answer's tokens are asked for.
    report: bool,
    /// Of the end of sequence and the tokens of a stop string, too: token ids are asked for, and those hold them.
    report_hidden: bool,
}

/// What a choice begins with.
struct Opening {
    echo: String,
    /// Where the first choice of a prompt leaves the prompt's scores.
    scored: Option<watch::Sender<Option<Arc<Vec<Logprobs>>>>>,
    /// Where all of them find those, when asked for.
    scores: Option<watch::Receiver<Option<Arc<Vec<Logprobs>>>>>,
}

/// Follows one sequence to its end.
struct Follower {
    /// The choices that it is the answer of.
    indices: Range<usize>,
    options: Arc<TextOptions>,
    opening: Option<Opening>,
    detokenizer: Detokenizer,
    reports: Reports,
    produced: usize,
    cached: Option<usize>,
}

impl Follower {
    fn new(indices: Range<usize>, options: Arc<TextOptions>, opening: Opening) -> Self {
        let detokenizer = Detokenizer::new(&options.stops, options.include_stop);
        let reports = Reports { offset: opening.echo.chars().count(), keep_hidden: options.report_hidden, ..Reports::default() };
        Self { indices, options, opening: Some(opening), detokenizer, reports, produced: 0, cached: None }
    }

    /// A stop string ends the sequence here, before the engine knows.
    async fn follow(mut self, mut generation: Generation, pieces: mpsc::UnboundedSender<Result<Piece, Failure>>) {
        loop {
            let mut piece = Piece { index: self.indices.start, ..Piece::default() };
            let stop = match generation.next().await {
                Event::Prompt(scores) => {
                    if let Some(scored) = self.opening.as_ref().and_then(|opening| opening.scored.as_ref()) {
                        scored.send_replace(Some(Arc::new(scores)));
                    }
                    continue;
                }
                Event::Started { cached_tokens } => {
                    // Told with the first token: a piece without one would open a stream too early.
                    self.cached = Some(cached_tokens);
                    continue;
                }
                Event::Token(token) if !self.options.score_only => self.token(token, &mut piece),
                Event::Token(_) => {
                    piece.ending = Some(Ending { reason: "length", stop: StopReason::None });
                    None
                }
                Event::Finished(finish) => self.finish(finish, &mut piece),
                Event::Failed(failure) => {
                    // A receiver that is gone wants no failure either.
                    let _ = pieces.send(Err(failure));
                    return;
                }
            };
            if let Some(stop) = stop {
                piece.ending = Some(Ending { reason: "stop", stop: StopReason::Text(self.options.stops[stop].clone()) });
            }
            if let Some(opening) = self.opening.take() {
                piece.text.insert_str(0, &opening.echo);
                if let Some(mut scores) = opening.scores {
                    match scores.wait_for(Option::is_some).await {
                        Ok(scores) => piece.prompt = scores.clone(),
                        // The first choice has failed, and has said so.
                        Err(_) => return,
                    }
                }
            }
            piece.cached = self.cached.take();
            let ended = piece.ending.is_some();
            let copies: Vec<Piece> = self.indices.clone().skip(1).map(|index| Piece { index, ..piece.clone() }).collect();
            if std::iter::once(piece).chain(copies).any(|piece| pieces.send(Ok(piece)).is_err()) {
                return;
            }
            if ended {
                return generation.complete();
            }
        }
    }

    fn token(&mut self, token: Token, piece: &mut Piece) -> Option<usize> {
        self.produced += 1;
        piece.tokens.push(token.id);
        piece.sum = token.logprobs.as_ref().map_or(0.0, |logprobs| f64::from(logprobs.raw));
        let options = self.options.clone();
        let bytes = visible(&options, token.id, token.ends);
        let armed = self.produced > options.min_tokens;
        let stop = bytes.and_then(|bytes| self.detokenizer.push(bytes, armed, &mut piece.text));
        if let (true, Some(logprobs)) = (options.report && (bytes.is_some() || !token.ends || options.report_hidden), token.logprobs) {
            let text = if bytes.is_some() {
                self.detokenizer.completed().to_owned()
            } else {
                String::from_utf8_lossy(options.tokenizer.token_bytes(token.id).unwrap_or_default()).into_owned()
            };
            self.reports.push(Reported { id: token.id, text, offset: self.reports.offset, logprobs: *logprobs }, bytes.is_some());
        }
        self.reports.shown(piece.text.len(), self.detokenizer.is_whole());
        self.reports.release(stop.is_some(), &mut piece.logprobs);
        stop
    }

    fn finish(&mut self, finish: Finish, piece: &mut Piece) -> Option<usize> {
        let stop = self.detokenizer.finish(self.produced > self.options.min_tokens, &mut piece.text);
        piece.ending = Some(match finish {
            Finish::Stop => Ending { reason: "stop", stop: StopReason::None },
            Finish::StopToken(id) => Ending { reason: "stop", stop: StopReason::Token(id) },
            Finish::Length => Ending { reason: "length", stop: StopReason::None },
        });
        self.reports.complete(self.detokenizer.completed());
        self.reports.shown(piece.text.len(), true);
        self.reports.release(stop.is_some(), &mut piece.logprobs);
        stop
    }
}

/// Tokens whose text is not out yet: what is known of them waits with it.
#[derive(Default)]
struct Reports {
    waiting: VecDeque<Waiting>,
    /// Tokens whose text a stop string takes away are reported, too.
    keep_hidden: bool,
    /// Characters of the whole answer so far.
    offset: usize,
    /// Bytes of text that tokens have completed, and those that are out.
    completed: usize,
    out: usize,
}

struct Waiting {
    token: Reported,
    in_text: bool,
    /// Where its text begins and ends; no end while some of its bytes wait for the rest of their character.
    start: usize,
    end: Option<usize>,
}

impl Reports {
    /// `in_text`: the token's text is part of the answer's.
    fn push(&mut self, token: Reported, in_text: bool) {
        let start = self.completed;
        if in_text {
            self.completed += token.text.len();
            self.offset += token.text.chars().count();
        }
        self.waiting.push_back(Waiting { token, in_text, start, end: (!in_text).then_some(start) });
    }

    /// Text that the end of the sequence has completed belongs to the last token.
    fn complete(&mut self, text: &str) {
        if let Some(last) = self.waiting.iter_mut().rev().find(|waiting| waiting.in_text) {
            last.token.text.push_str(text);
            self.completed += text.len();
        }
    }

    fn shown(&mut self, bytes: usize, whole: bool) {
        self.out += bytes;
        if whole {
            self.waiting.iter_mut().filter(|waiting| waiting.end.is_none()).for_each(|waiting| waiting.end = Some(self.completed));
        }
    }

    /// Moves what is out to `reported`. At a stop string nothing more comes out: of a token that it has cut, only the part before counts.
    fn release(&mut self, stopped: bool, reported: &mut Vec<Reported>) {
        let out = self.out;
        let mut cut_at = None;
        let is_out = |waiting: &Waiting| waiting.end.is_some_and(|end| end <= out) || (stopped && waiting.start < out);
        while self.waiting.front().is_some_and(is_out) {
            if let Some(Waiting { mut token, in_text, start, .. }) = self.waiting.pop_front() {
                if stopped && in_text {
                    token.text.truncate(out.saturating_sub(start));
                    cut_at = Some(token.offset + token.text.chars().count());
                }
                reported.push(token);
            }
        }
        if stopped {
            let hidden = std::mem::take(&mut self.waiting).into_iter().map(|waiting| waiting.token).filter(|_| self.keep_hidden);
            for token in hidden {
                let offset = *cut_at.get_or_insert(token.offset);
                reported.push(Reported { offset, ..token });
            }
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
            ..Piece::default()
        };
        let pieces = merged([piece(1, "a", false), piece(0, "x", false), piece(1, "b", true), piece(0, "y", false)]);
        assert_eq!(pieces.len(), 2);
        assert_eq!((pieces[0].index, pieces[0].text.as_str(), pieces[0].tokens.len(), pieces[0].ending.is_some()), (1, "ab", 2, true));
        assert_eq!((pieces[1].index, pieces[1].text.as_str(), pieces[1].ending.is_some()), (0, "xy", false));
    }
}
