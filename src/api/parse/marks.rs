//! Finding marks in text that comes in pieces.

/// Where the first mark is, as far as the text tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found<'m> {
    /// A whole mark: what is before it is certain.
    Mark {
        at: usize,
        mark: &'m str,
    },
    /// The text from here on may become a mark.
    Begins(usize),
    None,
}

/// The first mark in `text`; of several at one place the longest. What it finds does not depend on how much of the text is there yet, but
/// for [`Found::Begins`] and [`Found::None`], which more text may change into a mark. `ended`: no more text comes.
pub fn find<'m>(text: &str, marks: impl Iterator<Item = &'m str> + Clone, ended: bool) -> Found<'m> {
    for (at, _) in text.char_indices() {
        let rest = &text[at..];
        let whole = marks.clone().filter(|mark| rest.starts_with(mark)).max_by_key(|mark| mark.len());
        if !ended && marks.clone().any(|mark| mark.len() > rest.len() && mark.starts_with(rest)) {
            return Found::Begins(at);
        }
        if let Some(mark) = whole {
            return Found::Mark { at, mark };
        }
    }
    Found::None
}

/// Whether `text` begins with one of the marks, or may come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begins<'m> {
    With(&'m str),
    Perhaps,
    No,
}

pub fn begins<'m>(text: &str, marks: impl Iterator<Item = &'m str> + Clone, ended: bool) -> Begins<'m> {
    if !ended && marks.clone().any(|mark| mark.len() > text.len() && mark.starts_with(text)) {
        return Begins::Perhaps;
    }
    marks.filter(|mark| text.starts_with(mark)).max_by_key(|mark| mark.len()).map_or(Begins::No, Begins::With)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_and_longest_mark_counts_and_beginnings_wait() {
        let marks = ["<a>", "<a>b", "]"];
        let found = |text, ended| find(text, marks.into_iter(), ended);
        assert_eq!(found("x<a>c]", false), Found::Mark { at: 1, mark: "<a>" });
        assert_eq!(found("x<a>bc", false), Found::Mark { at: 1, mark: "<a>b" });
        assert_eq!(found("x<a>", false), Found::Begins(1), "a longer one may come");
        assert_eq!(found("x<a>", true), Found::Mark { at: 1, mark: "<a>" });
        assert_eq!(found("x<", false), Found::Begins(1));
        assert_eq!(found("é<", true), Found::None);
        assert_eq!(begins("<", marks.into_iter(), false), Begins::Perhaps);
        assert_eq!(begins("<x", marks.into_iter(), false), Begins::No);
        assert_eq!(begins("]x", marks.into_iter(), false), Begins::With("]"));
    }
}
