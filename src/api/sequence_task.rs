//! One sequence of a request: tokens from the engine → text → typed deltas.

use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{mpsc, watch};

use crate::api::delta::{Delta, DeltaKind, EndReason};
use crate::api::logprobs::TokenLogprobs;
use crate::api::parse::Parser;
use crate::engine::{Event, Finish, Generation, Token};
use crate::error::Failure;
use crate::models::Logprobs;
use crate::text::detokenize::Detokenizer;
use crate::text::tokenizer::Tokenizer;

/// How the text of a request's sequences is made.
pub struct TextOptions {
    pub tokenizer: Arc<Tokenizer>,
    pub stops: Vec<String>,
    pub include_stop: bool,
    pub skip_special_tokens: bool,
    /// Special tokens that are text all the same: the parser looks for them.
    pub marks: Arc<HashSet<u32>>,
    pub min_tokens: usize,
    /// `max_tokens: 0`: the token that the engine samples all the same is dropped.
    pub score_only: bool,
    /// Log probabilities of the answer's tokens are asked for.
    pub report: bool,
    /// Of the end of sequence and the tokens of a stop string, too: token ids are asked for, and those hold them.
    pub report_hidden: bool,
}

/// What a choice begins with.
pub struct Opening {
    pub echo: String,
    /// Where the first choice of a prompt leaves the prompt's scores.
    pub scored: Option<watch::Sender<Option<Arc<Vec<Logprobs>>>>>,
    /// Where all of them find those, when asked for.
    pub scores: Option<watch::Receiver<Option<Arc<Vec<Logprobs>>>>>,
}

/// What one event of the engine brought.
pub struct Progress {
    /// The choices that the sequence is the answer of.
    pub choices: Range<usize>,
    /// Prompt tokens found in the prefix cache, told once, with the first token.
    pub cached_tokens: Option<usize>,
    /// When the sequence left the queue, told with the first token.
    pub started: Option<Instant>,
    /// The model's own log probability of the token, where it is known.
    pub logprob: f64,
    /// Tokens of thoughts, of all `choices` together.
    pub reasoning_tokens: usize,
    /// Of every choice in `choices`.
    pub deltas: Vec<Delta>,
}

/// Where the tasks of a request leave what they have.
pub type ProgressSender = mpsc::UnboundedSender<Result<Progress, Failure>>;

/// Follows one sequence to its end.
pub struct SequenceTask {
    choices: Range<usize>,
    options: Arc<TextOptions>,
    parser: Box<dyn Parser>,
    opening: Option<Opening>,
    detokenizer: Detokenizer,
    reports: Reports,
    produced: usize,
    cached_tokens: Option<usize>,
    started: Option<Instant>,
}

/// What one event comes to, before the parser has seen its text.
#[derive(Default)]
struct Step {
    text: String,
    token: Option<u32>,
    logprob: f64,
    logprobs: Vec<TokenLogprobs>,
    end: Option<EndReason>,
}

impl SequenceTask {
    pub fn new(choices: Range<usize>, options: Arc<TextOptions>, parser: Box<dyn Parser>, opening: Opening) -> Self {
        let detokenizer = Detokenizer::new(&options.stops, options.include_stop);
        let reports = Reports { offset: opening.echo.chars().count(), keep_hidden: options.report_hidden, ..Reports::default() };
        let opening = Some(opening);
        Self { choices, options, parser, opening, detokenizer, reports, produced: 0, cached_tokens: None, started: None }
    }

    /// A stop string ends the sequence here, before the engine knows; and so does `aborted`, when it becomes true.
    pub async fn follow(mut self, mut generation: Generation, mut aborted: watch::Receiver<bool>, sender: ProgressSender) {
        loop {
            let event = tokio::select! {
                event = generation.next() => Some(event),
                true = is_true(&mut aborted) => None,
            };
            let stopped_here = event.is_some();
            let step = match event.unwrap_or(Event::Started { cached_tokens: 0 }) {
                _ if !stopped_here => self.abort(),
                Event::Prompt(scores) => {
                    if let Some(scored) = self.opening.as_ref().and_then(|opening| opening.scored.as_ref()) {
                        scored.send_replace(Some(Arc::new(scores)));
                    }
                    continue;
                }
                Event::Started { cached_tokens } => {
                    // Told with the first token: without one it would open a stream too early.
                    (self.cached_tokens, self.started) = (Some(cached_tokens), Some(Instant::now()));
                    continue;
                }
                Event::Token(token) if !self.options.score_only => self.token(token),
                Event::Pooled(_) => continue,
                Event::Token(_) => Step { end: Some(EndReason::Length), ..Step::default() },
                Event::Finished(finish) => self.finish(end_of(finish)),
                Event::Failed(failure) => {
                    // A receiver that is gone wants no failure either.
                    let _ = sender.send(Err(failure));
                    return;
                }
            };
            let (ended, logprob, tokens) = (step.end.is_some(), step.logprob, usize::from(step.token.is_some()) * self.choices.len());
            let thought = self.parser.in_reasoning();
            // The first sequence of the prompt has failed, and has said so.
            let Some(kinds) = self.deltas(step).await else { return };
            let of_choice = |choice| kinds.iter().cloned().map(move |kind| Delta { choice, kind });
            let deltas = self.choices.clone().flat_map(of_choice).collect();
            // The tokens that open and close a thought are part of it.
            let reasoning_tokens = if thought || self.parser.in_reasoning() { tokens } else { 0 };
            let cached_tokens = self.cached_tokens.take();
            let started = self.started.take();
            let progress = Progress { choices: self.choices.clone(), cached_tokens, started, logprob, reasoning_tokens, deltas };
            if sender.send(Ok(progress)).is_err() {
                return;
            }
            if ended {
                // Dropped without this, it counts as aborted.
                if stopped_here {
                    generation.complete();
                }
                return;
            }
        }
    }

    /// The deltas of one choice; `None` when the prompt's scores will never come.
    async fn deltas(&mut self, step: Step) -> Option<Vec<DeltaKind>> {
        let mut deltas = Vec::new();
        let mut echo = String::new();
        if let Some(opening) = self.opening.take() {
            echo = opening.echo;
            if let Some(mut scores) = opening.scores {
                deltas.extend(scores.wait_for(Option::is_some).await.ok()?.clone().map(DeltaKind::PromptLogprobs));
            }
        }
        let before = deltas.len();
        self.parser.push(step.text, &mut deltas);
        if step.end.is_some() {
            self.parser.finish(&mut deltas);
        }
        // The prompt is nothing to be parsed.
        match deltas.get_mut(before) {
            _ if echo.is_empty() => {}
            Some(DeltaKind::Text(text)) => text.insert_str(0, &echo),
            _ => deltas.insert(before, DeltaKind::Text(echo)),
        }
        if step.token.is_some() || !step.logprobs.is_empty() {
            deltas.push(DeltaKind::Tokens { ids: Vec::from_iter(step.token), logprobs: step.logprobs });
        }
        deltas.extend(step.end.map(DeltaKind::End));
        Some(deltas)
    }

    fn token(&mut self, token: Token) -> Step {
        self.produced += 1;
        let logprob = token.logprobs.as_ref().map_or(0.0, |logprobs| f64::from(logprobs.raw));
        let mut step = Step { token: Some(token.id), logprob, ..Step::default() };
        let options = self.options.clone();
        let bytes = visible(&options, token.id, token.ends);
        let armed = self.produced > options.min_tokens;
        let stop = bytes.and_then(|bytes| self.detokenizer.push(bytes, armed, &mut step.text));
        if let (true, Some(logprobs)) = (options.report && (bytes.is_some() || !token.ends || options.report_hidden), token.logprobs) {
            let text = if bytes.is_some() {
                self.detokenizer.completed().to_owned()
            } else {
                String::from_utf8_lossy(options.tokenizer.token_bytes(token.id).unwrap_or_default()).into_owned()
            };
            let report = TokenLogprobs { id: token.id, text, offset: self.reports.offset, logprobs: *logprobs };
            self.reports.push(report, bytes.is_some());
        }
        self.reports.shown(step.text.len(), self.detokenizer.is_whole());
        self.release(stop, step)
    }

    /// The request is aborted: what is held back comes out.
    fn abort(&mut self) -> Step {
        // The scores of a prompt that was not run to its end never come.
        if let Some(opening) = &mut self.opening {
            opening.scores = None;
        }
        self.finish(EndReason::Abort)
    }

    fn finish(&mut self, end: EndReason) -> Step {
        let mut step = Step { end: Some(end), ..Step::default() };
        let stop = self.detokenizer.finish(self.produced > self.options.min_tokens, &mut step.text);
        self.reports.complete(self.detokenizer.completed());
        self.reports.shown(step.text.len(), true);
        self.release(stop, step)
    }

    /// Adds the reports whose text is out. `stop`: the stop string that has come, by its number.
    fn release(&mut self, stop: Option<usize>, mut step: Step) -> Step {
        self.reports.release(stop.is_some(), &mut step.logprobs);
        if let Some(stop) = stop {
            step.end = Some(EndReason::StopText(self.options.stops[stop].clone()));
        }
        step
    }
}

/// Waits until it is; false when it never will be.
async fn is_true(flag: &mut watch::Receiver<bool>) -> bool {
    flag.wait_for(|flag| *flag).await.is_ok()
}

fn end_of(finish: Finish) -> EndReason {
    match finish {
        Finish::Stop => EndReason::Stop,
        Finish::StopToken(id) => EndReason::StopToken(id),
        Finish::Length => EndReason::Length,
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
    token: TokenLogprobs,
    in_text: bool,
    /// Where its text begins and ends; no end while some of its bytes wait for the rest of their character.
    start: usize,
    end: Option<usize>,
}

impl Reports {
    /// `in_text`: the token's text is part of the answer's.
    fn push(&mut self, token: TokenLogprobs, in_text: bool) {
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
    fn release(&mut self, stopped: bool, reported: &mut Vec<TokenLogprobs>) {
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
                reported.push(TokenLogprobs { offset, ..token });
            }
        }
    }
}

/// The bytes of a token that belong to the text. The token that ended the sequence does only if the stop is to be included.
fn visible(options: &TextOptions, id: u32, ends: bool) -> Option<&[u8]> {
    let skipped = options.skip_special_tokens && options.tokenizer.is_special(id) && !options.marks.contains(&id);
    let hidden = (ends && !options.include_stop) || skipped;
    if hidden { None } else { options.tokenizer.token_bytes(id) }
}
