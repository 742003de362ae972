//! What may follow the tokens of a sequence, where more than the model decides that: a grammar, a budget, a closing tag that must come first.
//!
//! The engine knows no grammar. It asks a [`Constraint`] of the sequence, in three ways:
//!
//! - **Masks.** [`Constraint::next`] says [`Next::Masked`]: [`MaskJob`] makes the mask on another thread while the forward pass runs, and the
//!   sampler waits for it. A row with draft tokens gets one mask for each sample; drafts that the constraint forbids are never accepted.
//! - **Forced tokens.** [`Next::Forced`]: they are appended without being sampled and run together in the next step, as a chunk.
//! - **The end.** [`Next::End`]: the sequence has finished; [`Next::Full`]: it has, because it may be no longer.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::Failure;
use crate::models::{Allowed, PendingMasks, SamplingParams, TokenMask};

/// Says what may follow the tokens of one sequence. The prompt is none of these tokens.
///
/// A failure ends the sequence's request with what it says.
pub trait Constraint: Send {
    /// What may follow now. Called on the engine's thread after each token: it must take microseconds.
    fn next(&mut self) -> Result<Next, Failure>;

    /// The tokens that may follow, when [`Constraint::next`] says [`Next::Masked`]. May take milliseconds: it is not called on the engine's thread.
    fn mask(&mut self) -> Result<TokenMask, Failure>;

    /// The sequence goes on with `token`.
    fn accept(&mut self, token: u32) -> Result<(), Failure>;

    /// Takes the last `count` accepted tokens back.
    fn rollback(&mut self, count: usize) -> Result<(), Failure>;

    /// A constraint in the same state that shares nothing with this one.
    fn fork(&self) -> Box<dyn Constraint>;
}

/// What may follow the tokens of a sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Any token. This costs nothing.
    Anything,
    /// The tokens of [`Constraint::mask`].
    Masked,
    /// These tokens in this order and no others, at least one.
    Forced(Vec<u32>),
    /// Nothing: the sequence is complete.
    End,
    /// Nothing: the sequence has as many tokens as it may have, complete or not.
    Full,
}

impl Clone for Box<dyn Constraint> {
    fn clone(&self) -> Self {
        self.fork()
    }
}

impl fmt::Debug for dyn Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Constraint")
    }
}

/// A sequence's constraint, which the thread that makes its masks borrows.
#[derive(Debug)]
pub struct Constrained {
    state: Arc<Mutex<State>>,
    /// What may follow now, once somebody has asked.
    next: Option<Next>,
    params: Arc<SamplingParams>,
}

#[derive(Debug)]
struct State {
    constraint: Box<dyn Constraint>,
    /// Why no mask could be made.
    failure: Option<Failure>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Constrained {
    pub fn new(constraint: Box<dyn Constraint>, params: Arc<SamplingParams>) -> Self {
        Self { state: Arc::new(Mutex::new(State { constraint, failure: None })), next: None, params }
    }

    pub fn accept(&mut self, token: u32) -> Result<(), Failure> {
        self.next = None;
        lock(&self.state).constraint.accept(token)
    }

    /// What may follow now.
    pub fn next(&mut self) -> Result<&Next, Failure> {
        let next = match self.next.take() {
            Some(next) => next,
            None => lock(&self.state).constraint.next()?,
        };
        Ok(self.next.insert(next))
    }

    /// What is to be done for the samples of a row with these drafts; `None` when they may be anything.
    pub fn job(&self, drafts: &[u32]) -> Option<MaskJob> {
        if drafts.is_empty() && self.next == Some(Next::Anything) {
            return None;
        }
        let masks = PendingMasks::default();
        Some(MaskJob { state: self.state.clone(), params: self.params.clone(), drafts: drafts.to_vec(), masks })
    }

    /// What may follow now, made at once: for when a step has come to nothing.
    pub fn allowed(&self) -> Option<Allowed> {
        let job = self.job(&[])?;
        let allowed = job.samples(&mut *lock(&self.state).constraint);
        allowed.ok()?.into_iter().next()
    }

    /// Why the last masks could not be made, if they could not.
    pub fn take_failure(&self) -> Option<Failure> {
        lock(&self.state).failure.take()
    }
}

/// Makes the masks of one row of a step. When it is dropped, done or not, nobody waits for them any more.
#[derive(Debug)]
pub struct MaskJob {
    state: Arc<Mutex<State>>,
    params: Arc<SamplingParams>,
    drafts: Vec<u32>,
    masks: PendingMasks,
}

impl Drop for MaskJob {
    fn drop(&mut self) {
        self.masks.set(Vec::new());
    }
}

impl MaskJob {
    /// Where the masks will be.
    pub fn masks(&self) -> PendingMasks {
        self.masks.clone()
    }

    pub fn run(self) {
        let mut state = lock(&self.state);
        let made = catch_unwind(AssertUnwindSafe(|| self.samples(&mut *state.constraint)));
        match made {
            Ok(Ok(samples)) => self.masks.set(samples),
            Ok(Err(failure)) => state.failure = Some(failure),
            Err(_) => state.failure = Some(Failure::internal("the constraint of this request's output failed")),
        }
    }

    /// Walks along the drafts as far as the constraint lets them, and back.
    fn samples(&self, constraint: &mut dyn Constraint) -> Result<Vec<Allowed>, Failure> {
        let mut samples = Vec::with_capacity(self.drafts.len() + 1);
        let mut drafts = self.drafts.iter().copied();
        let mut accepted = 0;
        loop {
            let allowed = match constraint.next()? {
                Next::Anything => Allowed::Anything,
                Next::Masked => Allowed::Only(self.without_end(constraint.mask()?)),
                Next::Forced(ids) => Allowed::Only(TokenMask::only(ids.get(..1).unwrap_or_default())),
                // After these drafts the sequence is complete, and nothing is sampled.
                Next::End | Next::Full if accepted > 0 => break,
                // A constraint that allows no token from the start on.
                Next::End | Next::Full => Allowed::Only(TokenMask::only(&self.params.eos_token_ids)),
            };
            let next = drafts.next().filter(|draft| match &allowed {
                _ if !self.params.ignore_eos && self.params.eos_token_ids.contains(draft) => false,
                Allowed::Anything => true,
                Allowed::Only(mask) => mask.allows(*draft),
            });
            samples.push(allowed);
            let Some(draft) = next else { break };
            constraint.accept(draft)?;
            accepted += 1;
        }
        constraint.rollback(accepted)?;
        Ok(samples)
    }

    /// With `ignore_eos` a sequence does not end as long as anything else may follow.
    fn without_end(&self, mask: TokenMask) -> TokenMask {
        if !self.params.ignore_eos {
            return mask;
        }
        let mut others = mask.clone();
        self.params.eos_token_ids.iter().for_each(|id| others.forbid(*id));
        if others.is_empty() { mask } else { others }
    }
}

/// The threads that make masks. They start with the first constrained sequence.
#[derive(Default)]
pub struct MaskThreads {
    pool: Option<rayon::ThreadPool>,
}

impl MaskThreads {
    /// At most so many, and at most half of the processors: the others compute.
    const MOST: usize = 8;

    /// Returns at once.
    pub fn start(&mut self, jobs: impl Iterator<Item = MaskJob>) {
        for job in jobs {
            if self.pool.is_none() {
                self.pool = Self::build();
            }
            match &self.pool {
                Some(pool) => pool.spawn(|| job.run()),
                // No thread is to be had.
                None => job.run(),
            }
        }
    }

    fn build() -> Option<rayon::ThreadPool> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (processors / 2).clamp(1, Self::MOST);
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("mask-{i}"))
            .build()
            .inspect_err(|error| tracing::warn!("cannot start {threads} threads for masks: {error}"))
            .ok()
    }
}

#[cfg(test)]
mod tests;
