//! Which tokens may be sampled next, where something outside of the model decides that (structured output).

use std::sync::{Arc, OnceLock};

/// A set of token ids, one bit each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenMask {
    /// Bit `id % 32` of word `id / 32` allows `id`. Ids past the end are not allowed.
    words: Vec<u32>,
}

impl TokenMask {
    pub fn from_words(words: Vec<u32>) -> Self {
        Self { words }
    }

    /// These ids alone.
    pub fn only(ids: &[u32]) -> Self {
        let last = ids.iter().max().map_or(0, |id| *id as usize / 32 + 1);
        let mut words = vec![0; last];
        ids.iter().for_each(|id| words[*id as usize / 32] |= 1 << (id % 32));
        Self { words }
    }

    pub fn allows(&self, id: u32) -> bool {
        self.words.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1)
    }

    /// Allows what `other` allows, too.
    pub fn add(&mut self, other: &Self) {
        self.words.resize(self.words.len().max(other.words.len()), 0);
        self.words.iter_mut().zip(&other.words).for_each(|(word, other)| *word |= other);
    }

    pub fn forbid(&mut self, id: u32) {
        if let Some(word) = self.words.get_mut(id as usize / 32) {
            *word &= !(1 << (id % 32));
        }
    }

    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Suppresses all other ids. The NaN of an id without a token stays.
    pub fn apply(&self, logits: &mut [f32]) {
        let suppress = |logit: &mut f32| *logit = if logit.is_nan() { f32::NAN } else { f32::NEG_INFINITY };
        for (at, chunk) in logits.chunks_mut(32).enumerate() {
            match self.words.get(at).copied().unwrap_or(0) {
                u32::MAX => {}
                0 => chunk.iter_mut().for_each(suppress),
                word => chunk.iter_mut().enumerate().filter(|(bit, _)| word >> bit & 1 == 0).for_each(|(_, logit)| suppress(logit)),
            }
        }
    }
}

/// What one sample may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Allowed {
    Anything,
    Only(TokenMask),
}

/// What the samples of one row may be. Another thread finds that out while the forward pass runs, and it is needed only when the logits are
/// there.
#[derive(Debug, Clone, Default)]
pub struct PendingMasks(Arc<OnceLock<Vec<Allowed>>>);

impl PendingMasks {
    /// One entry for each sample of the row, in order. The list may end early: nothing can be sampled from there on. Only the first call counts.
    pub fn set(&self, samples: Vec<Allowed>) {
        let _ = self.0.set(samples);
    }

    /// What the nth sample may be; `None` when it can be nothing. Waits until that is known.
    pub fn wait(&self, nth: usize) -> Option<&Allowed> {
        self.0.wait().get(nth)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_allowed_is_suppressed() {
        let mut mask = TokenMask::only(&[3, 40, 70]);
        mask.forbid(40);
        mask.forbid(1000);
        assert!(mask.allows(3) && !mask.allows(40) && mask.allows(70) && !mask.allows(1000) && !mask.is_empty());
        let mut logits = vec![1.0; 100];
        logits[5] = f32::NAN;
        mask.apply(&mut logits);
        let finite: Vec<usize> = (0..100).filter(|at| logits[*at].is_finite()).collect();
        assert_eq!(finite, [3, 70]);
        assert!(logits[5].is_nan() && logits[99] == f32::NEG_INFINITY);
        assert!(TokenMask::only(&[]).is_empty());
        let mut all = vec![1.0; 40];
        TokenMask::from_words(vec![u32::MAX; 2]).apply(&mut all);
        assert_eq!(all, [1.0; 40]);
    }

    #[test]
    fn masks_are_waited_for() {
        let masks = PendingMasks::default();
        let later = masks.clone();
        let thread = std::thread::spawn(move || later.set(vec![Allowed::Anything]));
        assert_eq!(masks.wait(0), Some(&Allowed::Anything));
        assert_eq!(masks.wait(1), None, "past the end nothing can be sampled");
        thread.join().unwrap();
    }
}
