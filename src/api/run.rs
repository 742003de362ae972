//! One request's sequences, from submission to typed deltas.
//!
//! One task per request turns engine events into deltas as they come, so the engine is never slowed; [`RequestStream::next`] gives all that
//! are ready at once. Dropping the [`RequestStream`] stops the task, which drops the generations, which frees their rows.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::api::delta::{self, ChoiceUpdate, Delta, DeltaKind, Usage};
use crate::api::request::GenerationRequest;
use crate::api::running::{Registered, Running};
use crate::api::sequence_task::{Opening, Progress, SequenceTask, TextOptions};
use crate::api::tally::Tally;
use crate::api::times::Times;
use crate::engine::{Handle, Request};
use crate::error::Failure;
use crate::text::tokenizer::Tokenizer;

/// What requests are run with.
pub struct Runs {
    pub engine: Handle,
    pub tokenizer: Arc<Tokenizer>,
    /// After so long a request fails.
    pub timeout: Option<Duration>,
    pub seeds: Seeds,
    pub running: Arc<Running>,
}

/// Seeds of the sequences whose request names none.
pub struct Seeds {
    /// The seed of the settings, which fixes all of them.
    base: Option<u64>,
    picked: AtomicU64,
}

impl Seeds {
    pub fn new(base: Option<u64>) -> Self {
        Self { base, picked: AtomicU64::new(0) }
    }

    /// A seed for one sequence: random, or the next in the order that the settings' seed fixes.
    fn pick(&self) -> u64 {
        match self.base {
            None => uuid::Uuid::new_v4().as_u64_pair().0,
            Some(base) => splitmix(base.wrapping_add(self.picked.fetch_add(1, Ordering::Relaxed))),
        }
    }
}

/// Spreads consecutive numbers over all of 64 bits (SplitMix64's finalizer).
fn splitmix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// How the text of a request's sequences is made.
fn text_options(runs: &Runs, request: &GenerationRequest) -> TextOptions {
    let options = &request.options;
    TextOptions {
        tokenizer: runs.tokenizer.clone(),
        stops: options.stops.clone(),
        include_stop: options.include_stop,
        skip_special_tokens: options.skip_special_tokens,
        marks: request.parsing.marks.clone(),
        min_tokens: options.sampling.min_tokens,
        score_only: options.max_tokens == Some(0),
        report: options.logprobs.output.is_some(),
        report_hidden: options.return_token_ids,
    }
}

/// A running request.
pub struct RequestStream {
    progress: mpsc::UnboundedReceiver<Result<Progress, Failure>>,
    task: JoinHandle<()>,
    /// Sequences that have not ended.
    open: usize,
    failure: Option<Failure>,
    prompt_tokens: usize,
    /// So far, of the deltas given out.
    completion_tokens: usize,
    /// Those of thoughts among them; none where thoughts are not told apart.
    reasoning_tokens: Option<usize>,
    /// Where the request's tokens are counted for the log.
    tally: Arc<Tally>,
    /// Until this is dropped, others can abort the request.
    registered: Registered,
    /// Tokens of one choice that are given together, at least.
    group: usize,
    /// Choices of each prompt, and the sequences that they are chosen from.
    n: usize,
    candidates: usize,
    /// Prompt tokens found in the prefix cache, by prompt; the first of its choices to run says how many.
    cached: Vec<Option<usize>>,
    times: Times,
    /// The answer tells them.
    tells_times: bool,
    /// The model's own log probabilities of each sequence's tokens added up, as far as they are known.
    logprob_sums: Vec<f64>,
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl RequestStream {
    /// Submits all candidates of all prompts.
    pub fn start(runs: &Runs, id: &str, request: &GenerationRequest) -> Result<Self, Failure> {
        let options = &request.options;
        let id: Arc<str> = id.into();
        let deadline = runs.timeout.and_then(|limit| Instant::now().checked_add(limit));
        let text = Arc::new(text_options(runs, request));
        let registered = runs.running.register(&id);
        let (sender, progress) = mpsc::unbounded_channel();
        let open = request.prompts.len() * options.candidates;
        let mut tasks = Vec::with_capacity(open);
        for (place, prompt) in request.prompts.iter().enumerate() {
            let (scored, scores) = watch::channel(None);
            let mut scored = Some(scored);
            // Without randomness all choices are the same: computed once.
            let copies = if options.sampling.is_greedy() { options.candidates } else { 1 };
            for candidate in (0..options.candidates).step_by(copies) {
                let mut params = options.sampling.clone();
                params.max_tokens = prompt.max_tokens;
                params.choices = if candidate == 0 { options.n } else { 0 };
                params.seed = options.seed.map_or_else(|| runs.seeds.pick(), |seed| seed.wrapping_add(candidate as u64));
                // Of one prompt the first candidate has the scores, for all.
                let prompt_logprobs = options.prompt_logprobs.filter(|_| candidate == 0);
                let constraint = request.constraint()?;
                let sequence =
                    Request { id: id.clone(), prompt: prompt.ids.clone(), params, prompt_logprobs, deadline, pooling: None, constraint };
                let generation = runs.engine.submit(sequence)?;
                let opening = Opening {
                    echo: prompt.echo.as_ref().map(|echo| echo.text.clone()).unwrap_or_default(),
                    scored: scored.take(),
                    scores: options.prompt_logprobs.map(|_| scores.clone()),
                };
                let first = place * options.candidates + candidate;
                let task = SequenceTask::new(first..first + copies, text.clone(), request.parsing.parser(), opening);
                tasks.push(task.follow(generation, registered.aborted.clone(), sender.clone()));
            }
        }
        let task = tokio::spawn(async move { tasks.into_iter().collect::<FuturesUnordered<_>>().collect::<()>().await });
        let prompt_tokens = request.prompts.iter().map(|prompt| prompt.ids.len()).sum();
        let tally = Tally::current();
        tally.add_prompt(prompt_tokens);
        let times = Times { arrived: tally.began(), submitted: Instant::now(), started: None, first_token: None, last_token: None };
        Ok(Self {
            progress,
            task,
            open,
            failure: None,
            prompt_tokens,
            completion_tokens: 0,
            reasoning_tokens: request.parsing.told_apart().map(|_| 0),
            tally,
            registered,
            group: if options.stream { options.stream_group } else { 1 },
            n: options.n,
            candidates: options.candidates,
            cached: vec![None; request.prompts.len()],
            times,
            tells_times: options.collect_metrics,
            logprob_sums: vec![0.0; open],
        })
    }

    /// Tokens so far, of the deltas given out. Of cached ones counts what the first choice of each prompt found, not what it left for the
    /// others.
    pub fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            reasoning_tokens: self.reasoning_tokens,
            cached_tokens: self.cached.iter().flatten().sum(),
            times: self.tells_times.then_some(self.times),
        }
    }

    /// Everything that is ready, at least one delta, and where the request wants its tokens in groups at least one of those; `None` when all choices have ended or one has failed.
    pub async fn next(&mut self) -> Option<Result<Vec<Delta>, Failure>> {
        if let Some(failure) = self.failure.take() {
            return Some(Err(self.fail(failure)));
        }
        if self.open == 0 {
            return None;
        }
        let mut deltas = match self.progress.recv().await {
            Some(Ok(progress)) => self.count(progress),
            Some(Err(failure)) => return Some(Err(self.fail(failure))),
            None => return Some(Err(self.fail(Failure::internal("this request's task has ended without a result")))),
        };
        loop {
            match self.progress.try_recv() {
                Ok(Ok(progress)) => deltas.extend(self.count(progress)),
                Ok(Err(failure)) => {
                    self.failure = Some(failure);
                    break;
                }
                Err(_) if self.open == 0 || has_tokens(&deltas, self.group) => break,
                Err(_) => match self.progress.recv().await {
                    Some(Ok(progress)) => deltas.extend(self.count(progress)),
                    Some(Err(failure)) => {
                        self.failure = Some(failure);
                        break;
                    }
                    None => break,
                },
            }
        }
        Some(Ok(deltas))
    }

    /// Adds what one event brought to the figures, and gives its deltas.
    fn count(&mut self, progress: Progress) -> Vec<Delta> {
        if let Some(cached) = progress.cached_tokens {
            let known = &mut self.cached[progress.choices.start / self.candidates];
            *known = Some(known.map_or(cached, |known| known.min(cached)));
        }
        self.times.started = self.times.started.or(progress.started);
        if let Some(tokens) = &mut self.reasoning_tokens {
            *tokens += progress.reasoning_tokens;
        }
        self.logprob_sums[progress.choices].iter_mut().for_each(|sum| *sum += progress.logprob);
        for delta in &progress.deltas {
            match &delta.kind {
                DeltaKind::Tokens { ids, .. } => {
                    self.times.token();
                    self.completion_tokens += ids.len();
                    self.tally.add_output(ids.len());
                    self.registered.output_tokens.fetch_add(ids.len(), Ordering::Relaxed);
                }
                DeltaKind::End(_) => self.open -= 1,
                _ => {}
            }
        }
        progress.deltas
    }

    /// All choices have ended.
    pub fn is_done(&self) -> bool {
        self.open == 0 && self.failure.is_none()
    }

    /// Waits for the end and gives all choices, in order: where there are more candidates than choices, the best of them.
    pub async fn collect(&mut self) -> Result<Vec<ChoiceUpdate>, Failure> {
        let mut choices = Vec::new();
        while let Some(ready) = self.next().await {
            delta::add_to(&mut choices, ready?);
        }
        choices.sort_by_key(|choice| choice.choice);
        if choices.len() != self.logprob_sums.len() || choices.iter().any(|choice| choice.end.is_none()) {
            return Err(Failure::internal("a choice has ended without a result"));
        }
        Ok(self.best(choices))
    }

    /// Of each prompt's candidates the `n` most probable by the mean over their tokens, in that order, numbered anew.
    fn best(&self, mut choices: Vec<ChoiceUpdate>) -> Vec<ChoiceUpdate> {
        if self.candidates == self.n {
            return choices;
        }
        let mut best = Vec::with_capacity(choices.len() / self.candidates * self.n);
        for of_prompt in choices.chunks_mut(self.candidates) {
            let mean = |choice: &ChoiceUpdate| self.logprob_sums[choice.choice] / choice.token_ids.len().max(1) as f64;
            // A stable sort: of equal ones the earlier comes first.
            of_prompt.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
            for choice in &mut of_prompt[..self.n] {
                best.push(ChoiceUpdate { choice: best.len(), ..std::mem::take(choice) });
            }
        }
        best
    }

    fn fail(&mut self, failure: Failure) -> Failure {
        self.open = 0;
        self.task.abort();
        failure
    }
}

/// Whether some choice has at least so many tokens.
fn has_tokens(deltas: &[Delta], least: usize) -> bool {
    let tokens = |delta: &Delta| if let DeltaKind::Tokens { ids, .. } = &delta.kind { ids.len() } else { 0 };
    least <= 1 || deltas.iter().any(|first| deltas.iter().filter(|delta| delta.choice == first.choice).map(tokens).sum::<usize>() >= least)
}
