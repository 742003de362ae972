//! One sequence: its tokens, its blocks, how far it is computed.

use std::sync::Arc;

use super::sampling::SamplingParams;
use super::{Finish, Request};
use crate::models::{Draw, Seen};

/// Names a sequence for as long as the engine knows it.
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
    /// Blocks that hold them, and room for the next.
    pub blocks: Arc<Vec<u32>>,
    params: SamplingParams,
    /// Kept only when a penalty needs it.
    seen: Arc<Seen>,
    /// Ids not drawn before `min_tokens`.
    ends: Arc<Vec<u32>>,
    max_len: usize,
}

impl Sequence {
    /// `max_model_len` bounds prompt and output together.
    pub fn new(id: SequenceId, request: &Request, max_model_len: usize) -> Self {
        let params = request.params.clone();
        let prompt_len = request.prompt.len();
        let mut seen = Seen::default();
        if params.has_penalties() {
            seen.prompt = request.prompt.to_vec();
            seen.prompt.sort_unstable();
            seen.prompt.dedup();
        }
        let eos = if params.ignore_eos { [].iter() } else { params.eos_token_ids.iter() };
        let ends = eos.chain(params.stop_token_ids.iter()).copied().collect();
        let max_len = max_model_len.min(prompt_len.saturating_add(params.max_tokens));
        Self {
            id,
            tokens: request.prompt.to_vec(),
            prompt_len,
            computed: 0,
            blocks: Arc::default(),
            params,
            seen: Arc::new(seen),
            ends: Arc::new(ends),
            max_len,
        }
    }

    /// Tokens still to be run before the next one can be drawn, at least 1.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    pub fn output_len(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Most tokens that may still be drawn.
    pub fn remaining(&self) -> usize {
        self.max_len - self.tokens.len()
    }

    /// How the next token is drawn.
    pub fn draw(&self) -> Draw {
        let p = &self.params;
        Draw {
            temperature: p.temperature,
            top_p: p.top_p,
            top_k: p.top_k,
            min_p: p.min_p,
            presence_penalty: p.presence_penalty,
            frequency_penalty: p.frequency_penalty,
            repetition_penalty: p.repetition_penalty,
            bias: p.logit_bias.clone(),
            suppressed: if self.output_len() < p.min_tokens { self.ends.clone() } else { Arc::default() },
            seen: self.seen.clone(),
            seed: p.seed,
            index: self.output_len() as u64,
            logprobs: None,
        }
    }

    /// Appends a drawn token; tells whether it ended the sequence.
    pub fn push(&mut self, token: u32) -> Option<Finish> {
        self.tokens.push(token);
        if self.params.has_penalties() {
            // The plan that held the other reference is gone by now, so nothing is copied.
            let output = &mut Arc::make_mut(&mut self.seen).output;
            match output.iter_mut().find(|(id, _)| *id == token) {
                Some((_, count)) => *count += 1,
                None => output.push((token, 1)),
            }
        }
        let p = &self.params;
        if !p.ignore_eos && p.eos_token_ids.contains(&token) {
            return Some(Finish::Stop);
        }
        if p.stop_token_ids.contains(&token) {
            return Some(Finish::StopToken(token));
        }
        (self.tokens.len() >= self.max_len).then_some(Finish::Length)
    }
}

impl SamplingParams {
    fn has_penalties(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0 || self.repetition_penalty != 1.0
    }
}
