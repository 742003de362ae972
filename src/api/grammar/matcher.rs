//! llguidance's parser as the engine's [`Constraint`].

use llguidance::Matcher;

use crate::engine::{Constraint, Next, TokenMask};
use crate::error::{Failure, Kind};

/// The parser of one sequence.
pub struct GrammarConstraint {
    matcher: Matcher,
}

impl GrammarConstraint {
    pub fn new(matcher: Matcher) -> Self {
        Self { matcher }
    }

    /// Fails when no output at all meets the grammar.
    pub fn check_start(&mut self) -> Result<(), Failure> {
        match self.next()? {
            Next::Masked => self.mask().map(|_| ()),
            _ => Ok(()),
        }
    }

    /// One in the same state that shares nothing with this one.
    pub fn copy(&self) -> Self {
        Self { matcher: self.matcher.deep_clone() }
    }

    /// Goes on with these tokens, if the grammar allows all of them.
    pub fn goes_on(&mut self, ids: &[u32]) -> bool {
        self.matcher.validate_tokens(ids).is_ok_and(|valid| valid == ids.len()) && self.matcher.consume_tokens(ids).is_ok()
    }

    fn failure(&self, error: impl std::fmt::Display) -> Failure {
        let text = format!("the answer cannot go on under its grammar: {}", message(&error.to_string()));
        Failure::new(Kind::BadRequest, text).code("grammar_failed")
    }

    fn checked(&self) -> Result<(), Failure> {
        match self.matcher.get_error() {
            Some(error) => Err(self.failure(error)),
            None => Ok(()),
        }
    }
}

impl Constraint for GrammarConstraint {
    fn next(&mut self) -> Result<Next, Failure> {
        self.checked()?;
        if self.matcher.is_stopped() {
            let reason = self.matcher.stop_reason();
            return if reason.is_ok() { Ok(Next::End) } else { Err(self.failure(reason)) };
        }
        let forced = self.matcher.compute_ff_tokens();
        self.checked()?;
        Ok(if forced.is_empty() { Next::Masked } else { Next::Forced(forced) })
    }

    fn mask(&mut self) -> Result<TokenMask, Failure> {
        let mask = self.matcher.compute_mask().map_err(|error| self.failure(error))?;
        Ok(TokenMask::from_words(mask.as_slice().to_vec()))
    }

    fn accept(&mut self, token: u32) -> Result<(), Failure> {
        self.matcher.consume_token(token).map_err(|error| self.failure(error))
    }

    fn rollback(&mut self, count: usize) -> Result<(), Failure> {
        self.matcher.rollback(count).map_err(|error| self.failure(error))
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(self.copy())
    }
}

/// What llguidance says, without the states and traces that it appends for its own developers.
pub fn message(error: &str) -> String {
    const LONGEST: usize = 600;
    let text = ["\n<state>", "\n<non-verbose/>", "\n<backtrace>"].iter().fold(error, |text, mark| text.split(mark).next().unwrap_or(text));
    let text = text.trim();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
