//! Speculation by prompt lookup: when the last tokens stood somewhere earlier in the sequence, the tokens that followed them there are proposed
//! as draft tokens.
//!
//! Source: prompt-lookup decoding (vLLM's and FastDeploy's method `ngram`). Every draft token costs a row of the step that checks it. So the
//! number of drafts follows an exponential average of how many were accepted, and proposing pauses while few are.

/// How to propose draft tokens (`SPECULATIVE_CONFIG`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NgramProposer {
    /// Most draft tokens of a sequence in one step, at least 1.
    pub draft_len: usize,
    /// The longest run of last tokens that is looked up.
    pub max: usize,
    /// The shortest run of last tokens that is looked up, `1 <= min <= max`.
    pub min: usize,
    /// While more sequences than this decode, nothing is proposed: their rows fill the step already.
    pub max_rows: usize,
}

impl Default for NgramProposer {
    fn default() -> Self {
        Self { draft_len: 5, max: 5, min: 2, max_rows: 8 }
    }
}

/// The weight of the newest check in the average.
const NEWEST: f32 = 0.25;
/// When the average falls below this, proposing pauses.
const LEAST: f32 = 0.2;
/// The length of a pause, in tokens.
const PAUSE: u32 = 32;
/// The average after a pause.
const RETRY: f32 = 0.3;

impl NgramProposer {
    /// Appends at most `draft_len` tokens to `drafts` that may follow `tokens`: those after the longest earlier run that equals the end of
    /// `tokens`. Of runs of the same length the latest counts.
    pub fn propose(&self, tokens: &[u32], draft_len: usize, drafts: &mut Vec<u32>) {
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
        let first = drafts.len();
        // Past the end of `tokens` the drafts themselves are continued, so that a loop is proposed in full.
        for at in from..from + draft_len {
            drafts.push(tokens.get(at).copied().unwrap_or_else(|| drafts[first + at - tokens.len()]));
        }
    }
}

/// How many of a sequence's draft tokens were accepted lately.
#[derive(Debug, Clone)]
pub struct Acceptance {
    /// The share of accepted ones, averaged.
    average: f32,
    /// For this many more tokens nothing is proposed.
    pause: u32,
}

impl Default for Acceptance {
    fn default() -> Self {
        Self { average: 0.5, pause: 0 }
    }
}

impl Acceptance {
    /// How many tokens to propose now, at most `most`.
    pub fn draft_len(&mut self, most: usize) -> usize {
        if self.pause > 0 {
            self.pause -= 1;
            return 0;
        }
        ((most as f32 * self.average).ceil() as usize).clamp(1, most)
    }

    /// `accepted` of `drafted` tokens were accepted.
    pub fn learn(&mut self, drafted: usize, accepted: usize) {
        if drafted == 0 {
            return;
        }
        self.average += NEWEST * (accepted as f32 / drafted as f32 - self.average);
        if self.average < LEAST {
            *self = Self { average: RETRY, pause: PAUSE };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn propose(tokens: &[u32], draft_len: usize) -> Vec<u32> {
        let mut drafts = vec![77];
        NgramProposer { max: 3, min: 2, ..Default::default() }.propose(tokens, draft_len, &mut drafts);
        drafts.split_off(1)
    }

    #[test]
    fn what_followed_the_longest_latest_run() {
        assert_eq!(propose(&[1, 2, 3, 4, 9, 2, 3], 2), [4, 9]);
        assert_eq!(propose(&[1, 2, 3, 8, 5, 2, 3, 9, 1, 2, 3], 1), [8], "the longer run is the earlier one");
        assert_eq!(propose(&[2, 3, 8, 2, 3, 9, 2, 3], 1), [9], "of equal ones the latest");
        assert_eq!(propose(&[5, 3, 8, 4, 3], 1), [0; 0], "one token is too short a run");
        assert_eq!(propose(&[1, 2, 1, 2, 1, 2], 5), [1, 2, 1, 2, 1], "a loop goes on");
        assert_eq!((propose(&[], 3), propose(&[1], 3), propose(&[1, 2, 1, 2], 0)), (vec![], vec![], vec![]));
    }

    #[test]
    fn draft_len_follows_acceptance() {
        let mut acceptance = Acceptance::default();
        assert_eq!(acceptance.draft_len(8), 4);
        (0..20).for_each(|_| acceptance.learn(4, 4));
        assert_eq!(acceptance.draft_len(8), 8);
        while acceptance.pause == 0 {
            acceptance.learn(8, 0);
        }
        assert_eq!((0..PAUSE).map(|_| acceptance.draft_len(8)).max(), Some(0));
        assert_eq!(acceptance.draft_len(8), 3, "tried again after a while");
        assert_eq!(acceptance.draft_len(1), 1);
    }

    proptest! {
        #[test]
        fn drafts_continue_an_earlier_run(tokens in prop::collection::vec(0u32..4, 0..40), draft_len in 0usize..8) {
            let drafts = propose(&tokens, draft_len);
            let whole = [tokens.clone(), drafts.clone()].concat();
            let n = tokens.len();
            let fits = |end: usize, run: usize| end >= run && tokens[end - run..end] == tokens[n - run..];
            let longest = (2..=3usize).rev().find(|run| *run < n && (*run..n).any(|end| fits(end, *run)));
            match longest {
                Some(run) => {
                    prop_assert_eq!(drafts.len(), draft_len);
                    let end = (run..n).rev().find(|end| fits(*end, run)).unwrap();
                    prop_assert!((0..draft_len).all(|i| whole[n + i] == whole[end + i]));
                }
                None => prop_assert!(drafts.is_empty()),
            }
        }
    }
}
