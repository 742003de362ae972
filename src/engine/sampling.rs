//! Sampling parameters of one sequence, and the state that grows with its output. The arithmetic is in `models::sample`.

use std::sync::Arc;

use crate::models::{Draw, LogprobsSpec};

/// How one sequence is drawn and when it ends. Every value is checked by `api` before it comes here.
#[derive(Debug, Clone)]
pub struct SamplingParams {
    /// Below 1e-5: greedy.
    pub temperature: f32,
    /// In `(0, 1]`.
    pub top_p: f32,
    /// 0 = off.
    pub top_k: u32,
    pub min_p: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub repetition_penalty: f32,
    pub logit_bias: Arc<Vec<(u32, f32)>>,
    /// Token sequences that the output must not contain, none of them empty. Their last token is not drawn where the output ends with the others.
    pub bad_words: Arc<Vec<Vec<u32>>>,
    /// Report how probable each drawn token was.
    pub logprobs: Option<LogprobsSpec>,
    /// Fixes every draw of this sequence. `api` picks one at random when the caller gives none, and adds the choice index.
    pub seed: u64,
    /// At least 1.
    pub max_tokens: usize,
    /// End of sequence and stop ids are not drawn before so many tokens.
    pub min_tokens: usize,
    /// The model's own end-of-sequence ids.
    pub eos_token_ids: Arc<Vec<u32>>,
    /// The request's further stop ids.
    pub stop_token_ids: Arc<Vec<u32>>,
    /// Go on past the end of sequence (which is then an ordinary token).
    pub ignore_eos: bool,
    /// Choices that the prompt was asked for, told of the first of them; 0 of the others. Figures only.
    pub choices: usize,
}

impl SamplingParams {
    /// No randomness: whatever the seed, the same answer.
    pub fn is_greedy(&self) -> bool {
        Draw { temperature: self.temperature, top_p: self.top_p, top_k: self.top_k, ..Draw::default() }.is_greedy()
    }
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Arc::default(),
            bad_words: Arc::default(),
            logprobs: None,
            seed: 0,
            max_tokens: 16,
            min_tokens: 0,
            eos_token_ids: Arc::default(),
            stop_token_ids: Arc::default(),
            ignore_eos: false,
            choices: 1,
        }
    }
}
