//! Byte-pair encoding by scores: of all neighbours whose union is a piece, those of the greatest score are joined first.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use aho_corasick::{AhoCorasick, StartKind};

use super::pieces::{Pieces, fixed_matcher};

/// Cuts text into pieces.
pub struct Bpe {
    /// User-defined pieces: found first, and never merged.
    fixed: AhoCorasick,
}

impl Bpe {
    pub fn new(fixed: &[&str]) -> Result<Self, String> {
        Ok(Self { fixed: fixed_matcher(fixed, StartKind::Unanchored)? })
    }

    /// Calls `emit` with each piece of `text` in its order; `None`: a character that has none. Time is n log n in the text's length.
    pub fn cut(&self, pieces: &Pieces, text: &str, mut emit: impl FnMut(&str, Option<u32>)) {
        if text.is_empty() {
            return;
        }
        let (mut symbols, mut unused) = (self.symbols(text), HashMap::new());
        let mut queue = Vec::with_capacity(symbols.len());
        for right in 1..symbols.len() {
            queue.extend(candidate(pieces, text, &symbols, right - 1, right, &mut unused));
        }
        let mut queue = BinaryHeap::from(queue);
        while let Some(best) = queue.pop() {
            let (left, right) = (best.left as usize, best.right as usize);
            // Stale when either side has been merged away or has grown since.
            if symbols[left].len == 0 || symbols[right].len == 0 || symbols[left].len + symbols[right].len != best.len {
                continue;
            }
            symbols[left].len = best.len;
            symbols[right].len = 0;
            symbols[left].next = symbols[right].next;
            if let Some(next) = symbols[left].next {
                symbols[next as usize].prev = Some(best.left);
                queue.extend(candidate(pieces, text, &symbols, left, next as usize, &mut unused));
            }
            if let Some(prev) = symbols[left].prev {
                queue.extend(candidate(pieces, text, &symbols, prev as usize, left, &mut unused));
            }
        }
        let mut at = Some(0);
        while let Some(place) = at {
            let symbol = symbols[place as usize];
            emit_symbol(pieces, &text[symbol.start as usize..][..symbol.len as usize], &unused, &mut emit);
            at = symbol.next;
        }
    }

    /// One symbol for each user-defined piece, else for each character.
    fn symbols(&self, text: &str) -> Vec<Symbol> {
        let mut symbols = Vec::with_capacity(text.len() / 2);
        let mut push = |start: usize, len: usize, frozen| {
            let place = symbols.len() as u32;
            symbols.push(Symbol { start: start as u32, len: len as u32, prev: place.checked_sub(1), next: Some(place + 1), frozen });
        };
        let mut done = 0;
        let found = self.fixed.find_iter(text).map(|found| found.range()).chain(std::iter::once(text.len()..text.len()));
        for fixed in found {
            for (offset, character) in text[done..fixed.start].char_indices() {
                push(done + offset, character.len_utf8(), false);
            }
            if !fixed.is_empty() {
                push(fixed.start, fixed.len(), true);
            }
            done = fixed.end;
        }
        if let Some(last) = symbols.last_mut() {
            last.next = None;
        }
        symbols
    }
}

/// The merge of two neighbours, if their union is a piece.
fn candidate(
    pieces: &Pieces,
    text: &str,
    symbols: &[Symbol],
    left: usize,
    right: usize,
    unused: &mut HashMap<u32, usize>,
) -> Option<Candidate> {
    let (a, b) = (symbols[left], symbols[right]);
    let len = a.len + b.len;
    if a.frozen || b.frozen || len as usize > pieces.longest {
        return None;
    }
    let id = pieces.find(&text[a.start as usize..][..len as usize])?;
    if pieces.is_unused(id) {
        unused.insert(id, a.len as usize);
    }
    Some(Candidate { score: pieces.score(id), left: left as u32, right: right as u32, len })
}

/// The ids of one symbol. Unused pieces only serve as steps to greater ones: what is left of them is taken apart again.
fn emit_symbol(pieces: &Pieces, symbol: &str, unused: &HashMap<u32, usize>, emit: &mut impl FnMut(&str, Option<u32>)) {
    let id = pieces.find(symbol);
    match id.and_then(|id| unused.get(&id)) {
        Some(&cut) if cut < symbol.len() => {
            emit_symbol(pieces, &symbol[..cut], unused, emit);
            emit_symbol(pieces, &symbol[cut..], unused, emit);
        }
        _ => emit(symbol, id),
    }
}

#[derive(Clone, Copy)]
struct Symbol {
    start: u32,
    /// 0 once it has been merged into its left neighbour.
    len: u32,
    prev: Option<u32>,
    next: Option<u32>,
    frozen: bool,
}

struct Candidate {
    score: f32,
    left: u32,
    right: u32,
    /// Bytes of the union.
    len: u32,
}

impl Ord for Candidate {
    /// Greatest score first, then the leftmost.
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then_with(|| other.left.cmp(&self.left))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}
