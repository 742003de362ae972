//! A grammar that is ready to run.

use std::sync::{Mutex, PoisonError};

use crate::api::grammar::matcher::GrammarConstraint;
use crate::engine::Constraint;

/// A grammar that is ready to run.
pub struct CompiledGrammar {
    /// In the state before the first token.
    start: Mutex<GrammarConstraint>,
}

impl CompiledGrammar {
    pub fn new(start: GrammarConstraint) -> Self {
        Self { start: Mutex::new(start) }
    }

    /// What one sequence is sampled under.
    pub fn constraint(&self) -> Box<dyn Constraint> {
        self.start.lock().unwrap_or_else(PoisonError::into_inner).fork()
    }

    /// The same behind these tokens; `None` when no output begins with them.
    pub fn constraint_after(&self, ids: &[u32]) -> Option<Box<dyn Constraint>> {
        let mut constraint = self.start.lock().unwrap_or_else(PoisonError::into_inner).copy();
        constraint.goes_on(ids).then(|| -> Box<dyn Constraint> { Box::new(constraint) })
    }
}

impl std::fmt::Debug for CompiledGrammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CompiledGrammar")
    }
}
