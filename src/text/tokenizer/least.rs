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

/// The kind of each byte: ASCII letters and digits, ASCII white space, bytes beyond ASCII, and the rest.
const KIND: [u8; 256] = {
    let mut kinds = [3; 256];
    let mut byte = 0;
    while byte < 256 {
        kinds[byte] = match byte as u8 {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => 0,
            b' ' | b'\t' | b'\n' | b'\r' => 1,
            0x80.. => 2,
            _ => 3,
        };
        byte += 1;
    }
    kinds
};

/// The most that one token stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coverage {
    /// Bytes of text; `None` = no bound.
    pub longest: Option<usize>,
    /// Bytes of each kind.
    kinds: [Option<usize>; KINDS],
}

impl Coverage {
    /// `spelling`: `None` where the encoder may drop text, or make one token of any amount of it.
    pub fn new(bytes: &TokenBytes, spelling: Option<Spelling>) -> Self {
        let Some(spelling) = spelling else { return Self { longest: None, kinds: [None; KINDS] } };
        let (mut longest, mut most) = (1, [1; KINDS]);
        for token in (0..bytes.len()).filter_map(|id| bytes.get(id as u32)) {
            let mut counts = count(token);
            let mut len = token.len();
            if spelling.blocks {
                let spaces = token.iter().filter(|byte| **byte == b' ').count();
                counts[2] += 3 * spaces;
                len += 2 * spaces;
            }
            longest = longest.max(len);
            most.iter_mut().zip(counts).for_each(|(most, count)| *most = (*most).max(count));
        }
        let mut kinds = most.map(Some);
        if spelling.swallows_space {
            // Unicode has white space of its own.
            (kinds[1], kinds[2]) = (None, None);
        }
        if spelling.shrinks > 1 {
            // It may turn bytes of one kind into another.
            kinds = [None; KINDS];
        }
        let longest = (!spelling.swallows_space).then(|| longest.saturating_mul(spelling.shrinks));
        Self { longest, kinds }
    }

    /// No encoding of `text` has fewer tokens than this.
    pub fn least_tokens(&self, text: &str) -> usize {
        let by_length = self.longest.map_or(0, |longest| text.len().div_ceil(longest));
        if self.kinds == [None; KINDS] {
            return by_length;
        }
        let by_kind = count(text.as_bytes()).into_iter().zip(self.kinds).map(|(count, most)| most.map_or(0, |most| count.div_ceil(most)));
        by_kind.max().unwrap_or(0).max(by_length)
    }
}

fn count(bytes: &[u8]) -> [usize; KINDS] {
    let mut counts = [0; KINDS];
    for byte in bytes {
        counts[usize::from(KIND[usize::from(*byte)])] += 1;
    }
    counts
}
