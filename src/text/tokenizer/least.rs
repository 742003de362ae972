//! How few tokens a text can be: told from its bytes, without cutting it.

use super::token_bytes::TokenBytes;

/// How the bytes of a text lie in its tokens, as far as an encoder promises something about that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spelling {
    /// A normalizer makes a text at most so many times shorter, in bytes.
    pub shrinks: usize,
    /// A token's space stands for a space or for `▁`, which has three bytes.
    pub blocks: bool,
    /// Some added tokens swallow the white space around them.
    pub swallows_space: bool,
}

/// Kinds of bytes, of which each token has its most.
const KINDS: usize = 4;
/// ASCII letters and digits.
const WORD: usize = 0;
/// ASCII white space.
const SPACE: usize = 1;
/// Bytes beyond ASCII.
const BEYOND: usize = 2;
/// The rest: punctuation and control characters.
const OTHER: usize = 3;

/// The most that one token stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coverage {
    /// Bytes of text as the normalizer leaves it; `None` = no bound.
    longest: Option<usize>,
    /// Bytes of each kind.
    kinds: [Option<usize>; KINDS],
    /// See [`Spelling::shrinks`].
    shrinks: usize,
}

impl Coverage {
    /// `spelling`: `None` where the encoder may drop text, or make one token of any amount of it.
    pub fn new(bytes: &TokenBytes, spelling: Option<Spelling>) -> Self {
        let Some(spelling) = spelling else { return Self { longest: None, kinds: [None; KINDS], shrinks: 1 } };
        let (mut longest, mut most) = (1, [1; KINDS]);
        for token in (0..bytes.len()).filter_map(|id| bytes.get(id as u32)) {
            let mut counts = count(token);
            let mut len = token.len();
            if spelling.blocks {
                let spaces = token.iter().filter(|byte| **byte == b' ').count();
                counts[BEYOND] += 3 * spaces;
                len += 2 * spaces;
            }
            longest = longest.max(len);
            most.iter_mut().zip(counts).for_each(|(most, count)| *most = (*most).max(count));
        }
        let mut kinds = most.map(Some);
        if spelling.swallows_space {
            // Unicode has white space of its own.
            (kinds[SPACE], kinds[BEYOND]) = (None, None);
        }
        if spelling.shrinks > 1 {
            // A few characters beyond ASCII stand for ASCII ones (the Kelvin sign).
            kinds[BEYOND] = None;
        }
        Self { longest: (!spelling.swallows_space).then_some(longest), kinds, shrinks: spelling.shrinks }
    }

    /// Bytes of text as it is given; `None` = no bound.
    pub fn longest(&self) -> Option<usize> {
        self.longest.map(|longest| longest.saturating_mul(self.shrinks))
    }

    /// No encoding of `text` has fewer tokens than this.
    pub fn least_tokens(&self, text: &str) -> usize {
        if self.kinds == [None; KINDS] {
            return 0;
        }
        let counts = self.normalized(count(text.as_bytes()));
        let by_length = self.longest.map_or(0, |longest| counts.iter().sum::<usize>().div_ceil(longest));
        let by_kind = counts.into_iter().zip(self.kinds).map(|(count, most)| most.map_or(0, |most| count.div_ceil(most)));
        by_kind.max().unwrap_or(0).max(by_length)
    }

    /// The fewest bytes of each kind that the normalizer leaves. One that shrinks text composes characters (NFC): it takes away an ASCII
    /// character only together with a mark beyond ASCII, which has at least two bytes, and white space never.
    fn normalized(&self, counts: [usize; KINDS]) -> [usize; KINDS] {
        if self.shrinks == 1 {
            return counts;
        }
        let marks = counts[BEYOND] / 2;
        let mut least = counts;
        least[BEYOND] = counts[BEYOND] / self.shrinks;
        [WORD, OTHER].into_iter().for_each(|kind| least[kind] = counts[kind].saturating_sub(marks));
        least
    }
}

/// The bytes of each kind. One pass of comparisons that the compiler makes of wide registers: a table of kinds would be five times as slow.
fn count(bytes: &[u8]) -> [usize; KINDS] {
    let (mut word, mut space, mut beyond) = (0, 0, 0);
    for chunk in bytes.chunks(255) {
        // At most 255 of a kind: sums of bytes.
        let sums = chunk.iter().fold((0_u8, 0_u8, 0_u8), |(word, space, beyond), byte| {
            let is_word = (byte | 0x20).wrapping_sub(b'a') < 26 || byte.wrapping_sub(b'0') < 10;
            let is_space = matches!(byte, b' ' | b'\t' | b'\n' | b'\r');
            (word + u8::from(is_word), space + u8::from(is_space), beyond + u8::from(*byte >= 0x80))
        });
        (word, space, beyond) = (word + usize::from(sums.0), space + usize::from(sums.1), beyond + usize::from(sums.2));
    }
    [word, space, beyond, bytes.len() - word - space - beyond]
}
