//! Speculation by prompt lookup: what followed the last tokens where they stood before is guessed to follow again.
//!
//! Source: prompt-lookup decoding (vLLM's and FastDeploy's method `ngram`). A guess costs a row of the step it is checked in, so the depth
//! follows an exponential average of how many came true, and where few do, guessing pauses.

/// How to guess (`SPECULATIVE_CONFIG`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lookup {
    /// Most tokens guessed at once, at least 1.
    pub depth: usize,
    /// Longest and shortest run of last tokens that is looked up, `1 <= min <= max`.
    pub max: usize,
    pub min: usize,
    /// With more sequences than this decoding, none is guessed for: their rows fill the step already.
    pub max_rows: usize,
}

impl Default for Lookup {
    fn default() -> Self {
        Self { depth: 5, max: 5, min: 2, max_rows: 8 }
    }
}

/// Weight of the newest check in the average.
const NEWEST: f32 = 0.25;
/// Below this average guessing pauses for [`PAUSE`] tokens, and begins anew at [`RETRY`].
const LEAST: f32 = 0.2;
const PAUSE: u32 = 32;
const RETRY: f32 = 0.3;

impl Lookup {
    /// Appends to `guesses` at most `depth` tokens that may follow `tokens`: those after the longest earlier run that equals the end of `tokens`,
    /// of equally long ones after the latest.
    pub fn guess(&self, tokens: &[u32], depth: usize, guesses: &mut Vec<u32>) {
        let Some((last, before)) = tokens.split_last() else { return };
        let mut best: Option<(usize, usize)> = None;
        for end in (1..tokens.len()).rev().filter(|end| tokens[end - 1] == *last) {
            let run = tokens[..end - 1].iter().rev().zip(before.iter().rev()).take(self.max - 1).take_while(|(a, b)| a == b).count() + 1;
            if run >= self.min && best.is_none_or(|(longest, _)| run > longest) {
                best = Some((run, end));
                if run == self.max {
                    break;
                }
            }
        }
        let Some((_, from)) = best else { return };
        let first = guesses.len();
        // Past the end the guesses themselves go on: a loop is guessed in full.
        for at in from..from + depth {
            guesses.push(tokens.get(at).copied().unwrap_or_else(|| guesses[first + at - tokens.len()]));
        }
    }
}

/// How well guesses for one sequence have come true.
#[derive(Debug, Clone)]
pub struct Acceptance {
    average: f32,
    /// Tokens for which nothing is guessed.
    pause: u32,
}

impl Default for Acceptance {
    fn default() -> Self {
        Self { average: 0.5, pause: 0 }
    }
}

impl Acceptance {
    /// How many tokens to guess now, at most `depth`.
    pub fn depth(&mut self, depth: usize) -> usize {
        if self.pause > 0 {
            self.pause -= 1;
            return 0;
        }
        ((depth as f32 * self.average).ceil() as usize).clamp(1, depth)
    }

    /// `accepted` of `guessed` tokens came true.
    pub fn learn(&mut self, guessed: usize, accepted: usize) {
        if guessed == 0 {
            return;
        }
        self.average += NEWEST * (accepted as f32 / guessed as f32 - self.average);
        if self.average < LEAST {
            *self = Self { average: RETRY, pause: PAUSE };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn guess(tokens: &[u32], depth: usize) -> Vec<u32> {
        let mut guesses = vec![77];
        Lookup { max: 3, min: 2, ..Default::default() }.guess(tokens, depth, &mut guesses);
        guesses.split_off(1)
    }

    #[test]
    fn what_followed_the_longest_latest_run() {
        assert_eq!(guess(&[1, 2, 3, 4, 9, 2, 3], 2), [4, 9]);
        assert_eq!(guess(&[1, 2, 3, 8, 5, 2, 3, 9, 1, 2, 3], 1), [8], "the longer run is the earlier one");
        assert_eq!(guess(&[2, 3, 8, 2, 3, 9, 2, 3], 1), [9], "of equal ones the latest");
        assert_eq!(guess(&[5, 3, 8, 4, 3], 1), [0; 0], "one token is too short a run");
        assert_eq!(guess(&[1, 2, 1, 2, 1, 2], 5), [1, 2, 1, 2, 1], "a loop goes on");
        assert_eq!((guess(&[], 3), guess(&[1], 3), guess(&[1, 2, 1, 2], 0)), (vec![], vec![], vec![]));
    }

    #[test]
    fn depth_follows_acceptance() {
        let mut acceptance = Acceptance::default();
        assert_eq!(acceptance.depth(8), 4);
        (0..20).for_each(|_| acceptance.learn(4, 4));
        assert_eq!(acceptance.depth(8), 8);
        while acceptance.pause == 0 {
            acceptance.learn(8, 0);
        }
        assert_eq!((0..PAUSE).map(|_| acceptance.depth(8)).max(), Some(0));
        assert_eq!(acceptance.depth(8), 3, "tried again after a while");
        assert_eq!(acceptance.depth(1), 1);
    }

    proptest! {
        #[test]
        fn guesses_continue_an_earlier_run(tokens in prop::collection::vec(0u32..4, 0..40), depth in 0usize..8) {
            let guesses = guess(&tokens, depth);
            let whole = [tokens.clone(), guesses.clone()].concat();
            let n = tokens.len();
            let fits = |end: usize, run: usize| end >= run && tokens[end - run..end] == tokens[n - run..];
            let longest = (2..=3usize).rev().find(|run| *run < n && (*run..n).any(|end| fits(end, *run)));
            match longest {
                Some(run) => {
                    prop_assert_eq!(guesses.len(), depth);
                    let end = (run..n).rev().find(|end| fits(*end, run)).unwrap();
                    prop_assert!((0..depth).all(|i| whole[n + i] == whole[end + i]));
                }
                None => prop_assert!(guesses.is_empty()),
            }
        }
    }
}
