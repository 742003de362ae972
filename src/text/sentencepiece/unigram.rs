//! The unigram model: of all ways to cut a text the one whose pieces have the greatest sum of scores.

use aho_corasick::{AhoCorasick, MatchKind};

use super::pieces::is_text;
use super::{Kind, Piece};

/// A character without a piece counts as so much less than the least likely piece.
const UNKNOWN_PENALTY: f32 = 10.0;

/// Finds all pieces in a text, each with what it adds to a sum.
pub struct Unigram {
    matcher: AhoCorasick,
    /// Ids and scores by the matcher's patterns.
    pieces: Vec<(u32, f32)>,
    unknown: f32,
}

/// The best way to cut the text up to a place.
#[derive(Clone, Copy)]
struct Best {
    score: f32,
    start: usize,
    id: Option<u32>,
}

impl Unigram {
    /// `hidden` pieces are never made from text.
    pub fn new(all: &[Piece<'_>], hidden: impl Fn(&Piece<'_>) -> bool) -> Result<Self, String> {
        let normal = || all.iter().filter(|piece| piece.kind == Kind::Normal).map(|piece| piece.score);
        let least = normal().fold(f32::MAX, f32::min);
        let most = normal().fold(f32::MIN_POSITIVE, f32::max);
        // The library's bonus, which lets a user-defined piece win always.
        let score = |piece: &Piece<'_>| match piece.kind {
            Kind::UserDefined => (f64::from(piece.text.len() as f32 * most) - 0.1) as f32,
            _ => piece.score,
        };
        let usable = |piece: &Piece<'_>| is_text(piece) && piece.kind != Kind::Unused && !hidden(piece);
        let chosen: Vec<(u32, &Piece<'_>)> = (0u32..).zip(all).filter(|(_, piece)| usable(piece)).collect();
        let pieces = chosen.iter().map(|(id, piece)| (*id, score(piece))).collect();
        let builder = AhoCorasick::builder().match_kind(MatchKind::Standard).build(chosen.iter().map(|(_, piece)| piece.text));
        let matcher = builder.map_err(|error| format!("its pieces cannot be searched for: {error}"))?;
        Ok(Self { matcher, pieces, unknown: least - UNKNOWN_PENALTY })
    }

    /// Calls `emit` with each piece of `text` in its order; `None`: a character that has none.
    pub fn cut<'t>(&self, text: &'t str, mut emit: impl FnMut(&'t str, Option<u32>)) {
        let mut best: Vec<Option<Best>> = vec![None; text.len() + 1];
        best[0] = Some(Best { score: 0.0, start: 0, id: None });
        // Matches come by their ends, and of those that end together the longest first: just as if each start were tried in its order.
        let mut found = self.matcher.find_overlapping_iter(text).peekable();
        for (at, character) in text.char_indices() {
            let end = at + character.len_utf8();
            let mut alone = false;
            while let Some(piece) = found.next_if(|found| found.end() <= end) {
                let (id, score) = self.pieces[piece.pattern().as_usize()];
                alone |= piece.start() == at;
                offer(&mut best, piece.start(), end, score, Some(id));
            }
            if !alone {
                offer(&mut best, at, end, self.unknown, None);
            }
        }
        let (mut end, mut way) = (text.len(), Vec::new());
        while let Some(last) = best[end].filter(|_| end > 0) {
            way.push((last.start..end, last.id));
            end = last.start;
        }
        way.into_iter().rev().for_each(|(range, id)| emit(&text[range], id));
    }
}

/// A way to `end` whose last piece begins at `start`: taken if it is the first or better. Sums are kept in 32 bits, as the library keeps
/// them: rounding decides between ways that are as good.
fn offer(best: &mut [Option<Best>], start: usize, end: usize, score: f32, id: Option<u32>) {
    let Some(before) = best[start] else { return };
    let sum = before.score + score;
    if best[end].is_none_or(|best| sum > best.score) {
        best[end] = Some(Best { score: sum, start, id });
    }
}
