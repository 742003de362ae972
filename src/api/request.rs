//! A request as it is run, whatever dialect it came in.

use std::sync::Arc;

use crate::api::enforce::Rules;
use crate::api::length;
use crate::api::logprobs::Echo;
use crate::api::options::GenerationOptions;
use crate::api::parse::answer::Parsing;
use crate::engine::{Constraint, Limits};
use crate::error::Failure;

/// A request that is checked and tokenized: nothing about it can be refused any more but for want of room in the queue.
pub struct GenerationRequest {
    pub prompts: Vec<Prompt>,
    pub options: GenerationOptions,
    /// What is told apart in the answers' text.
    pub parsing: Parsing,
    /// What the answers are held to; none where they are free, or where a grammar alone says what they are.
    pub rules: Option<Arc<Rules>>,
}

/// One prompt, which fits the context.
pub struct Prompt {
    pub ids: Arc<Vec<u32>>,
    /// What its answers begin with, when the request wants it repeated.
    pub echo: Option<Echo>,
    /// Most tokens of each of its answers.
    pub max_tokens: usize,
}

impl Prompt {
    /// `max_tokens` is set by [`GenerationRequest::new`].
    pub fn new(ids: Arc<Vec<u32>>, echo: Option<Echo>) -> Self {
        Self { ids, echo, max_tokens: 0 }
    }
}

impl GenerationRequest {
    /// Fails when the request holds more sequences than could ever be admitted together, or `min_tokens` that a prompt leaves no room for.
    /// `listed`: the prompts may be a list.
    pub fn new(mut prompts: Vec<Prompt>, options: GenerationOptions, listed: bool, limits: &Limits) -> Result<Self, Failure> {
        options.check_number(prompts.len(), listed, limits)?;
        for prompt in &mut prompts {
            prompt.max_tokens = length::of_prompt(options.max_tokens, options.sampling.min_tokens, prompt.ids.len(), limits)?;
        }
        Ok(Self { prompts, options, parsing: Parsing::default(), rules: None })
    }
    /// What one answer is sampled under.
    pub fn constraint(&self) -> Result<Option<Box<dyn Constraint>>, Failure> {
        match &self.rules {
            Some(rules) => rules.constraint().map(Some),
            None => Ok(self.options.grammar.as_ref().map(|grammar| grammar.constraint())),
        }
    }
}
