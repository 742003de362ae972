//! Token bytes to text, as they come: whole characters only, and never a piece of a stop string.
//!
//! Two filters in a row: [`Characters`] holds back bytes that may still become a character, [`Stops`] holds back text that may still
//! become a stop string. What comes out does not depend on how the bytes were cut into tokens or the tokens into steps.

/// The text of one sequence.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    characters: Characters,
    stops: Stops,
    /// What the last push completed.
    whole: String,
}

impl Detokenizer {
    /// `stops`: none of them empty. With `include_stop` the text ends with the stop string instead of before it.
    pub fn new(stops: &[String], include_stop: bool) -> Self {
        Self { characters: Characters::default(), stops: Stops::new(stops, include_stop), whole: String::new() }
    }

    /// Takes the bytes of one token and appends to `text` what is certain by now. Returns the index of the stop string that ended the
    /// sequence, after which nothing more may be pushed. While `armed` is false (before `min_tokens`) a stop string is ordinary text.
    pub fn push(&mut self, bytes: &[u8], armed: bool, text: &mut String) -> Option<usize> {
        self.whole.clear();
        self.characters.push(bytes, &mut self.whole);
        self.stops.push(&self.whole, armed, text)
    }

    /// The characters that the last push (or `finish`) completed, whether stop strings hold them back or not.
    pub fn completed(&self) -> &str {
        &self.whole
    }

    /// No byte waits for the rest of its character.
    pub fn is_whole(&self) -> bool {
        self.characters.pending.is_empty()
    }

    /// The sequence ended without a stop string: appends everything that was held back.
    pub fn finish(&mut self, armed: bool, text: &mut String) -> Option<usize> {
        self.whole.clear();
        self.characters.finish(&mut self.whole);
        let stop = self.stops.push(&self.whole, armed, text);
        if stop.is_none() {
            self.stops.finish(text);
        }
        stop
    }
}

/// Bytes to whole characters. Invalid bytes become U+FFFD exactly as `String::from_utf8_lossy` of all bytes would have it, as soon as
/// they are known to be invalid; a cut-off character at the end becomes one U+FFFD in [`Characters::finish`].
#[derive(Debug, Clone, Default)]
struct Characters {
    /// The valid beginning of a character: at most 3 bytes.
    pending: Vec<u8>,
}

impl Characters {
    fn push(&mut self, bytes: &[u8], text: &mut String) {
        self.pending.extend_from_slice(bytes);
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = after;
                    let Some(invalid) = error.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[invalid..];
                }
            }
        }
        let kept = rest.len();
        self.pending.drain(..self.pending.len() - kept);
    }

    fn finish(&mut self, text: &mut String) {
        if !self.pending.is_empty() {
            self.pending.clear();
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

/// Finds the stop string that is complete first; of several that end at the same character, the longest.
///
/// Each string has a Knuth-Morris-Pratt automaton, so the cost is a few steps per byte whatever the text. The longest state of all is
/// the number of bytes to hold back: a suffix of the text that is a prefix of a stop string. NOTE: it always begins at a character
/// border, since a stop string does and no UTF-8 sequence begins inside another.
#[derive(Debug, Clone)]
struct Stops {
    automata: Vec<Automaton>,
    include: bool,
    held: String,
}

#[derive(Debug, Clone)]
struct Automaton {
    pattern: Vec<u8>,
    /// `fallback[k]`: the longest proper prefix of `pattern[..=k]` that is also its suffix.
    fallback: Vec<usize>,
    /// Bytes of the pattern that the text ends with.
    state: usize,
}

impl Automaton {
    fn new(pattern: &str) -> Self {
        let pattern = pattern.as_bytes().to_vec();
        let mut fallback = vec![0; pattern.len()];
        let mut length = 0;
        for k in 1..pattern.len() {
            while length > 0 && pattern[k] != pattern[length] {
                length = fallback[length - 1];
            }
            if pattern[k] == pattern[length] {
                length += 1;
            }
            fallback[k] = length;
        }
        Self { pattern, fallback, state: 0 }
    }

    /// True when the text now ends with the whole pattern.
    fn step(&mut self, byte: u8) -> bool {
        if self.state == self.pattern.len() {
            self.forget();
        }
        while self.state > 0 && self.pattern[self.state] != byte {
            self.state = self.fallback[self.state - 1];
        }
        if self.pattern[self.state] == byte {
            self.state += 1;
        }
        self.state == self.pattern.len()
    }

    /// A whole match counts as ordinary text: only what may begin the next one stays.
    fn forget(&mut self) {
        if self.state == self.pattern.len() {
            self.state = self.fallback[self.state - 1];
        }
    }
}

impl Stops {
    fn new(stops: &[String], include: bool) -> Self {
        let automata = stops.iter().filter(|stop| !stop.is_empty()).map(|stop| Automaton::new(stop)).collect();
        Self { automata, include, held: String::new() }
    }

    fn push(&mut self, new: &str, armed: bool, text: &mut String) -> Option<usize> {
        if self.automata.is_empty() {
            text.push_str(new);
            return None;
        }
        let before = self.held.len();
        self.held.push_str(new);
        for (offset, &byte) in new.as_bytes().iter().enumerate() {
            let mut found: Option<(usize, usize)> = None;
            for (index, automaton) in self.automata.iter_mut().enumerate() {
                let length = automaton.pattern.len();
                if automaton.step(byte) && found.is_none_or(|(_, longest)| length > longest) {
                    found = Some((index, length));
                }
            }
            if let (Some((index, length)), true) = (found, armed) {
                let end = before + offset + 1;
                let cut = if self.include { end } else { end - length };
                text.push_str(&self.held[..cut]);
                self.held.clear();
                return Some(index);
            }
            if found.is_some() {
                self.automata.iter_mut().for_each(Automaton::forget);
            }
        }
        let kept = self.automata.iter().map(|automaton| automaton.state).max().unwrap_or(0);
        let certain = self.held.len() - kept;
        text.push_str(&self.held[..certain]);
        self.held.drain(..certain);
        None
    }

    fn finish(&mut self, text: &mut String) {
        text.push_str(&self.held);
        self.held.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Pushes `bytes` cut at `cuts`; checks after each push that what is out is a prefix of the final text.
    fn run(bytes: &[u8], cuts: &[usize], stops: &[String], include: bool) -> (String, Option<usize>) {
        let mut detokenizer = Detokenizer::new(stops, include);
        let mut text = String::new();
        let mut start = 0;
        let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
        ends.push(bytes.len());
        ends.sort_unstable();
        for end in ends {
            if let Some(stop) = detokenizer.push(&bytes[start..end], true, &mut text) {
                return (text, Some(stop));
            }
            start = end;
        }
        let stop = detokenizer.finish(true, &mut text);
        (text, stop)
    }

    /// The same by its definition, on the whole text at once.
    fn reference(bytes: &[u8], stops: &[String], include: bool) -> (String, Option<usize>) {
        let text = String::from_utf8_lossy(bytes).into_owned();
        for end in (0..=text.len()).filter(|end| text.is_char_boundary(*end)) {
            let mut best: Option<usize> = None;
            for (index, stop) in stops.iter().enumerate() {
                if text[..end].ends_with(stop.as_str()) && best.is_none_or(|best| stop.len() > stops[best].len()) {
                    best = Some(index);
                }
            }
            if let Some(index) = best {
                let cut = if include { end } else { end - stops[index].len() };
                return (text[..cut].to_owned(), Some(index));
            }
        }
        (text, None)
    }

    fn strings(stops: &[&str]) -> Vec<String> {
        stops.iter().map(|stop| (*stop).to_owned()).collect()
    }

    #[test]
    fn an_emoji_over_three_tokens_comes_whole() {
        let mut detokenizer = Detokenizer::new(&[], false);
        let bytes = "é🤗".as_bytes();
        let mut seen = Vec::new();
        for part in [&bytes[..1], &bytes[1..3], &bytes[3..5], &bytes[5..]] {
            let mut text = String::new();
            assert_eq!(detokenizer.push(part, true, &mut text), None);
            seen.push(text);
        }
        assert_eq!(seen, ["", "é", "", "🤗"]);
    }

    #[test]
    fn invalid_bytes_are_replaced_as_soon_as_they_are_known() {
        let mut detokenizer = Detokenizer::new(&[], false);
        let mut text = String::new();
        detokenizer.push(b"a\xF0\x9F", true, &mut text);
        assert_eq!(text, "a", "may still become an emoji");
        detokenizer.push(b"b\xFF", true, &mut text);
        assert_eq!(text, "a\u{FFFD}b\u{FFFD}");
        detokenizer.push(b"\xE4\xBD", true, &mut text);
        assert_eq!(text, "a\u{FFFD}b\u{FFFD}");
        detokenizer.finish(true, &mut text);
        assert_eq!(text, "a\u{FFFD}b\u{FFFD}\u{FFFD}");
    }

    #[test]
    fn a_stop_string_across_tokens_never_leaks() {
        let mut detokenizer = Detokenizer::new(&strings(&["\nUser:"]), false);
        let mut text = String::new();
        assert_eq!(detokenizer.push(b"Hello\nUs", true, &mut text), None);
        assert_eq!(text, "Hello");
        assert_eq!(detokenizer.push(b"ers\nUse", true, &mut text), None);
        assert_eq!(text, "Hello\nUsers");
        assert_eq!(detokenizer.push(b"r: more", true, &mut text), Some(0));
        assert_eq!(text, "Hello\nUsers");
    }

    #[test]
    fn what_was_held_back_comes_at_the_end() {
        assert_eq!(run(b"abc STO", &[5], &strings(&["STOP"]), false), ("abc STO".to_owned(), None));
    }

    #[test]
    fn overlapping_stops() {
        assert_eq!(run(b"xabcy", &[], &strings(&["abcd", "bc"]), false), ("xa".to_owned(), Some(1)), "complete first");
        assert_eq!(run(b"xabcy", &[], &strings(&["bc", "abc"]), false), ("x".to_owned(), Some(1)), "longest");
        assert_eq!(run(b"aaab", &[1, 2, 3], &strings(&["aab"]), false), ("a".to_owned(), Some(0)), "falls back");
    }

    #[test]
    fn a_stop_equal_to_the_whole_output_and_with_the_stop_included() {
        assert_eq!(run(b"STOP", &[2], &strings(&["STOP"]), false), (String::new(), Some(0)));
        assert_eq!(run(b"a STOP b", &[4], &strings(&["STOP"]), true), ("a STOP".to_owned(), Some(0)));
    }

    #[test]
    fn stops_before_min_tokens_are_text() {
        let mut detokenizer = Detokenizer::new(&strings(&["aba"]), false);
        let mut text = String::new();
        assert_eq!(detokenizer.push(b"aba", false, &mut text), None);
        assert_eq!(text, "ab", "the last letter may begin another");
        assert_eq!(detokenizer.push(b"ba", true, &mut text), Some(0));
        assert_eq!(text, "ab");
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_text(
            pieces in prop::collection::vec(prop::sample::select(vec![&b"a"[..], b"b", "é".as_bytes(), "🤗".as_bytes(), b"\xF0\x9F", b"\xE4", b"\xFF", b"\x97"]), 0..24),
            cuts in prop::collection::vec(0_usize..64, 0..12),
            stops in prop::collection::vec("[abé🤗]{1,4}", 0..4),
            include in any::<bool>(),
        ) {
            let bytes = pieces.concat();
            prop_assert_eq!(run(&bytes, &cuts, &stops, include), reference(&bytes, &stops, include));
        }

        #[test]
        fn text_is_emitted_once_it_is_certain(text in "[ab]{0,16}", stops in prop::collection::vec("[ab]{1,4}", 1..4)) {
            // After each character: everything is out but the longest suffix that may begin a stop string.
            let mut detokenizer = Detokenizer::new(&stops, false);
            let mut out = String::new();
            for (at, c) in text.char_indices() {
                let seen = &text[..=at];
                if detokenizer.push(c.to_string().as_bytes(), true, &mut out).is_some() {
                    break;
                }
                let held = (0..=seen.len()).find(|&start| stops.iter().any(|stop| stop.len() > seen.len() - start && stop.starts_with(&seen[start..])));
                prop_assert_eq!(&out, &seen[..held.unwrap_or(seen.len())]);
            }
        }
    }
}
