//! What sampling goes by: the parameters of a sequence, and the state that grows with its output. Plain data.

use std::sync::Arc;

use crate::models::LogprobsSpec;
use crate::models::mask::PendingMasks;

/// Temperatures and top_p below this are greedy (FastDeploy's and FastChat's limit).
const GREEDY_BELOW: f32 = 1e-5;

/// How the tokens of one sequence are sampled and when it ends. `api` has checked every value.
#[derive(Debug, Clone)]
pub struct SamplingParams {
    /// Below 1e-5: greedy.
    pub temperature: f32,
    /// In `(0, 1]`; 1 = off.
    pub top_p: f32,
    /// 0 = off.
    pub top_k: u32,
    /// In `[0, 1]`; 0 = off.
    pub min_p: f32,
    /// 0 = off.
    pub presence_penalty: f32,
    /// 0 = off.
    pub frequency_penalty: f32,
    /// Over prompt and output tokens; 1 = off.
    pub repetition_penalty: f32,
    /// Added to the logits, by id.
    pub logit_bias: Arc<Vec<(u32, f32)>>,
    /// Token sequences that the output must not contain, none of them empty. The last token of one is suppressed while the output ends with
    /// all the others of it.
    pub bad_words: Arc<Vec<Vec<u32>>>,
    /// Report how probable each sampled token was.
    pub logprobs: Option<LogprobsSpec>,
    /// Fixes every random number of this sequence. `api` picks a seed when the caller gives none, and adds the choice's index to it.
    pub seed: u64,
    /// At least 1.
    pub max_tokens: usize,
    /// The ids that end the sequence are suppressed until the output has so many tokens.
    pub min_tokens: usize,
    /// The model's own end-of-sequence ids.
    pub eos_token_ids: Arc<Vec<u32>>,
    /// The request's further stop ids.
    pub stop_token_ids: Arc<Vec<u32>>,
    /// Go on past the end of sequence (which is then an ordinary token).
    pub ignore_eos: bool,
    /// For the figures only: how many choices the prompt was asked for, on the first of them; 0 on the others.
    pub choices: usize,
}

impl SamplingParams {
    /// No randomness: the most probable token, whatever the seed.
    pub fn is_greedy(&self) -> bool {
        self.temperature < GREEDY_BELOW || self.top_p < GREEDY_BELOW || self.top_k == 1
    }

    /// Some penalty counts the tokens so far.
    pub fn has_penalties(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0 || self.repetition_penalty != 1.0
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

/// How one row samples its next token in one step: the request's parameters, and what changes from token to token.
///
/// Order of operations (FastDeploy's): masks → suppressed ids → logit bias → repetition, frequency and presence penalties → temperature
/// → min_p → top_k → top_p → sample.
#[derive(Debug, Clone, Default)]
pub struct SamplingMetadata {
    pub params: Arc<SamplingParams>,
    /// Ids that must not be sampled in this step: bad words, and before `min_tokens` the ids that end the sequence.
    pub suppressed: Arc<Vec<u32>>,
    /// The tokens so far; empty unless a penalty asks for them.
    pub counts: Arc<TokenCounts>,
    /// The index of the token in its sequence's output. Together with the seed it fixes the random number, whatever else is in the step.
    pub index: u64,
    /// What each sample of the row may be, where a constraint decides that.
    pub masks: Option<PendingMasks>,
}

impl SamplingMetadata {
    /// Greedy and without any change to the logits: an argmax on the device answers it.
    pub fn is_plain_greedy(&self) -> bool {
        self.params.is_greedy() && !self.changes_logits()
    }

    /// Something changes the logits before the temperature does.
    pub(super) fn changes_logits(&self) -> bool {
        self.params.has_penalties() || !self.params.logit_bias.is_empty() || !self.suppressed.is_empty() || self.masks.is_some()
    }
}

/// The first token by these parameters, with nothing suppressed.
impl From<SamplingParams> for SamplingMetadata {
    fn from(params: SamplingParams) -> Self {
        Self { params: Arc::new(params), ..Self::default() }
    }
}

/// Which tokens a sequence has had so far, for the penalties.
#[derive(Debug, Clone, Default)]
pub struct TokenCounts {
    /// Distinct ids of the prompt, ascending.
    pub prompt: Vec<u32>,
    /// Output ids, each with how often it came.
    pub output: Vec<(u32, u32)>,
}
