//! One sequence: its tokens, its blocks, how far it is computed.

use std::sync::Arc;

use super::constraint::{Constrained, MaskJob, Next};
use super::ngram::Acceptance;
use super::{Finish, Request};
use crate::error::Failure;
use crate::models::{Allowed, Logprobs, LogprobsSpec, SamplingMetadata, SamplingParams, Score, TokenCounts};

/// The engine's own number for a sequence.
pub type SequenceId = u64;

/// A prompt and what has been generated after it.
#[derive(Debug)]
pub struct Sequence {
    pub id: SequenceId,
    /// Prompt, then output.
    pub tokens: Vec<u32>,
    pub prompt_len: usize,
    /// Tokens whose keys and values are in the cache.
    pub computed: usize,
    /// The blocks that hold these, with room for the next ones.
    pub blocks: Arc<Vec<u32>>,
    /// This many blocks, from the first on, are full, computed, and known to the prefix cache.
    pub cached: usize,
    /// The slot of its state after the computed tokens, where the model keeps one.
    pub state: Option<u32>,
    /// The ends of blocks, counted in blocks, at which its state is to be kept for others.
    pub snapshots: Vec<usize>,
    /// The block of its answer that has the latest snapshot.
    pub answer_snapshot: Option<u32>,
    /// It has been admitted before.
    pub started: bool,
    pub acceptance: Acceptance,
    params: Arc<SamplingParams>,
    /// Kept only when a penalty needs it.
    counts: Arc<TokenCounts>,
    banned: Banned,
    /// The prompt's log probabilities as far as they are known. `None` when nobody asked for them, or once they are handed over.
    prompt_logprobs: Option<(LogprobsSpec, Vec<Logprobs>)>,
    max_len: usize,
    constraint: Option<Constrained>,
    /// This many of the last tokens were forced by the constraint, and not sampled.
    forced: usize,
}

impl Sequence {
    /// `max_model_len` bounds prompt and output together.
    pub fn new(id: SequenceId, request: &Request, max_model_len: usize) -> Self {
        let params = Arc::new(request.params.clone());
        let prompt_len = request.prompt.len();
        let mut counts = TokenCounts::default();
        if params.has_penalties() {
            counts.prompt = request.prompt.to_vec();
            counts.prompt.sort_unstable();
            counts.prompt.dedup();
        }
        let max_len = max_model_len.min(prompt_len.saturating_add(params.max_tokens));
        Self {
            id,
            tokens: request.prompt.to_vec(),
            prompt_len,
            computed: 0,
            blocks: Arc::default(),
            cached: 0,
            state: None,
            snapshots: Vec::new(),
            answer_snapshot: None,
            started: false,
            acceptance: Acceptance::default(),
            banned: Banned::new(&params),
            prompt_logprobs: request.prompt_logprobs.map(|spec| (spec, Vec::new())),
            constraint: request.constraint.clone().map(|constraint| Constrained::new(constraint, params.clone())),
            forced: 0,
            params,
            counts: Arc::new(counts),
            max_len,
        }
    }

    /// Tokens still to be run before the next one can be sampled, at least 1.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    pub fn output_len(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Most tokens that may still be sampled.
    pub fn remaining(&self) -> usize {
        self.max_len - self.tokens.len()
    }

    /// How the next token is sampled.
    pub fn sampling(&self) -> SamplingMetadata {
        SamplingMetadata {
            params: self.params.clone(),
            suppressed: self.banned.after(&self.tokens[self.prompt_len..], &self.params),
            counts: self.counts.clone(),
            index: self.output_len() as u64,
            masks: None,
        }
    }

    /// What finds out which tokens may be sampled in a row with these drafts; `None` when all may.
    pub fn mask_job(&self, drafts: &[u32]) -> Option<MaskJob> {
        self.constraint.as_ref()?.job(drafts)
    }

    /// Why the constraint's masks of the last step could not be made, if they could not.
    pub fn constraint_failure(&self) -> Option<Failure> {
        self.constraint.as_ref()?.take_failure()
    }

    /// The field of the request that forbids every token which the constraint allows now; none where some are left.
    pub fn exhausted_by(&self) -> Option<&'static str> {
        let Allowed::Only(allowed) = self.constraint.as_ref()?.allowed()? else { return None };
        let output = &self.tokens[self.prompt_len..];
        let is_left = |suppressed: &[u32]| {
            let mut left = allowed.clone();
            suppressed.iter().for_each(|id| left.forbid(*id));
            !left.is_empty()
        };
        if is_left(&self.banned.after(output, &self.params)) {
            return None;
        }
        // Before `min_tokens` the ends are forbidden, too.
        Some(if is_left(&self.banned.words(output, &self.params)) { "min_tokens" } else { "bad_words" })
    }

    /// A constraint has a say in what is sampled.
    pub fn is_constrained(&self) -> bool {
        self.constraint.is_some()
    }

    /// It generates: what is pending was sampled last, or forced after that.
    pub fn decodes(&self) -> bool {
        self.pending() <= 1 + self.forced
    }

    /// Tokens that the constraint forces to come next, and that may come without being sampled. What a request wants to know or to forbid of
    /// sampled tokens it shall not miss of forced ones: then they are sampled, one by one.
    pub fn take_forced(&mut self) -> Result<Vec<u32>, Failure> {
        self.forced = 0;
        if self.params.logprobs.is_some() || !self.params.bad_words.is_empty() {
            return Ok(Vec::new());
        }
        match &mut self.constraint {
            Some(constraint) => match constraint.next()? {
                Next::Forced(tokens) => Ok(tokens.clone()),
                _ => Ok(Vec::new()),
            },
            None => Ok(Vec::new()),
        }
    }

    /// Appends a token that was not sampled.
    pub fn push_forced(&mut self, token: u32) -> Result<Option<Finish>, Failure> {
        self.forced += 1;
        self.append(token)
    }

    /// False when the tokens sampled before decide which ones may be sampled next, or how: such a row must not run ahead on draft tokens.
    pub fn may_speculate(&self) -> bool {
        let p = &self.params;
        !p.has_penalties() && self.output_len() >= p.min_tokens && p.bad_words.iter().all(|word| word.len() == 1)
    }

    /// False when every prompt token must be run, because the log probabilities of the prompt are wanted.
    pub fn may_use_cache(&self) -> bool {
        self.prompt_logprobs.is_none()
    }

    /// Forgets all keys and values, so that everything is run anew.
    pub fn restart(&mut self) {
        self.computed = 0;
        self.cached = 0;
        self.snapshots.clear();
        self.answer_snapshot = None;
        if let Some((_, known)) = &mut self.prompt_logprobs {
            known.clear();
        }
    }

    /// What to score in a step that runs tokens `from..to`.
    pub fn score(&self, from: usize, to: usize) -> Option<Score> {
        let (spec, known) = self.prompt_logprobs.as_ref()?;
        debug_assert_eq!(known.len(), from.min(self.prompt_len - 1), "every prompt token is scored once");
        let targets = self.tokens.get(from + 1..self.prompt_len.min(to + 1)).unwrap_or_default().to_vec();
        (!targets.is_empty()).then_some(Score { targets, logprobs: *spec })
    }

    /// Takes the scores of tokens `from..to` from the front of `scores`.
    pub fn scored(&mut self, from: usize, to: usize, scores: &mut impl Iterator<Item = Logprobs>) {
        if let Some((_, known)) = &mut self.prompt_logprobs {
            known.extend(scores.take((self.prompt_len.min(to + 1)).saturating_sub(from + 1)));
        }
    }

    /// Hands over the prompt's log probabilities. To be called once all of them are known.
    pub fn take_prompt_logprobs(&mut self) -> Option<Vec<Logprobs>> {
        self.prompt_logprobs.take().map(|(_, known)| known)
    }

    /// Appends a sampled token, and tells whether it ended the sequence. Fails when the constraint has failed.
    pub fn push(&mut self, token: u32) -> Result<Option<Finish>, Failure> {
        let finish = self.append(token)?;
        self.or_complete(finish)
    }

    /// The token ends the sequence, whatever came before.
    pub fn is_end(&self, token: u32) -> bool {
        (!self.params.ignore_eos && self.params.eos_token_ids.contains(&token)) || self.params.stop_token_ids.contains(&token)
    }

    /// `finish`, unless the constraint has come to its end.
    pub fn or_complete(&mut self, finish: Option<Finish>) -> Result<Option<Finish>, Failure> {
        match &mut self.constraint {
            Some(constraint) if matches!(finish, None | Some(Finish::Length)) => Ok(match constraint.next()? {
                Next::End => Some(Finish::Stop),
                Next::Full => Some(Finish::Length),
                _ => finish,
            }),
            _ => Ok(finish),
        }
    }

    fn append(&mut self, token: u32) -> Result<Option<Finish>, Failure> {
        self.tokens.push(token);
        if self.params.has_penalties() {
            // The plan that shared the counts is cleared by now, so `make_mut` copies nothing.
            let output = &mut Arc::make_mut(&mut self.counts).output;
            match output.iter_mut().find(|(id, _)| *id == token) {
                Some((_, count)) => *count += 1,
                None => output.push((token, 1)),
            }
        }
        let p = &self.params;
        if !p.ignore_eos && p.eos_token_ids.contains(&token) {
            return Ok(Some(Finish::Stop));
        }
        if p.stop_token_ids.contains(&token) {
            return Ok(Some(Finish::StopToken(token)));
        }
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(token)?;
        }
        Ok((self.tokens.len() >= self.max_len).then_some(Finish::Length))
    }
}

/// Ids that must not be sampled. Both lists are made once; a new one is made only when the output has come to the last token of a bad word.
#[derive(Debug)]
struct Banned {
    /// The bad words of one token.
    always: Arc<Vec<u32>>,
    /// The same and the ids that end the sequence, for use before `min_tokens`.
    early: Arc<Vec<u32>>,
}

impl Banned {
    fn new(params: &SamplingParams) -> Self {
        let always: Vec<u32> = params.bad_words.iter().filter(|word| word.len() == 1).flatten().copied().collect();
        let eos = if params.ignore_eos { [].iter() } else { params.eos_token_ids.iter() };
        let early = if params.min_tokens == 0 {
            Vec::new()
        } else {
            always.iter().chain(eos).chain(params.stop_token_ids.iter()).copied().collect()
        };
        Self { always: Arc::new(always), early: Arc::new(early) }
    }

    /// The ids that must not come after `output`.
    fn after(&self, output: &[u32], params: &SamplingParams) -> Arc<Vec<u32>> {
        Self::with_words(if output.len() < params.min_tokens { &self.early } else { &self.always }, output, params)
    }

    /// Those of them that bad words forbid.
    fn words(&self, output: &[u32], params: &SamplingParams) -> Arc<Vec<u32>> {
        Self::with_words(&self.always, output, params)
    }

    /// `list`, and what would end a bad word of several tokens.
    fn with_words(list: &Arc<Vec<u32>>, output: &[u32], params: &SamplingParams) -> Arc<Vec<u32>> {
        let last = |word: &Vec<u32>| match word.split_last() {
            Some((last, rest)) if !rest.is_empty() && output.ends_with(rest) => Some(*last),
            _ => None,
        };
        let mut now = params.bad_words.iter().filter_map(last).peekable();
        if now.peek().is_none() { list.clone() } else { Arc::new(list.iter().copied().chain(now).collect()) }
    }
}
