//! A template's source before it is compiled: brought into the form that minijinja reads, and searched for what the template looks for.

use super::python::PERCENT;

/// The source as minijinja reads it: line ends are `\n`, as Jinja2 makes them, and what minijinja has no syntax for is written differently.
pub fn prepared(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let (mut text, mut raw) = (String::with_capacity(source.len()), false);
    for piece in pieces(&source) {
        match tag_name(piece) {
            Some("raw") => raw = true,
            Some("endraw") => raw = false,
            // `{% generation %}` marks the assistant's part for training, and is nothing to us: `{% if true %}` keeps the tag's whitespace
            // control as it is.
            Some("generation") if !raw => {
                text.push_str(&piece.replacen("generation", "if true", 1));
                continue;
            }
            Some("endgeneration") if !raw => {
                text.push_str(&piece.replacen("endgeneration", "endif", 1));
                continue;
            }
            _ => {}
        }
        match (raw, is_code(piece)) {
            (false, true) => text.push_str(&with_percent_filters(piece)),
            _ => text.push_str(piece),
        }
    }
    text
}

/// The strings that the template looks for in other strings (`'</think>' in content`, `content.split('</think>')`), without the white
/// space around them.
pub fn searched(source: &str) -> Vec<String> {
    const METHODS: [&str; 14] = [
        "split",
        "rsplit",
        "partition",
        "rpartition",
        "startswith",
        "endswith",
        "find",
        "rfind",
        "index",
        "rindex",
        "count",
        "replace",
        "removeprefix",
        "removesuffix",
    ];
    let mut searched = Vec::new();
    let code: Vec<&str> = pieces(source).into_iter().filter(|piece| is_code(piece)).collect();
    let is_searched = |piece: &str, start: usize, end: usize| {
        let after = piece[end..].trim_start();
        let mut before = piece[..start].trim_end();
        let is_in = |text: &str| text.strip_prefix("in").is_some_and(|rest| !rest.starts_with(is_word));
        let in_follows = is_in(after) || after.strip_prefix("not").is_some_and(|rest| is_in(rest.trim_start()));
        // Any string among the arguments: `startswith(('a', 'b'))`.
        while let Some(rest) = before.strip_suffix(['(', '[']) {
            before = rest.trim_end();
        }
        in_follows || before.len() < piece[..start].trim_end().len() && METHODS.contains(&last_word(before))
    };
    let mut names: Vec<(&str, String)> = Vec::new();
    for piece in &code {
        for (start, end) in literals(piece) {
            let string = unescaped(&piece[start + 1..end - 1]);
            if is_searched(piece, start, end) {
                searched.push(string.trim().to_owned());
            } else if let Some(before) = piece[..start].trim_end().strip_suffix('=') {
                names.push((last_word(before.trim_end()), string.trim().to_owned()));
            }
        }
    }
    // `{% set end = '</think>' %}`, and then `content.split(end)`.
    for (name, string) in names.into_iter().filter(|(name, _)| !name.is_empty()) {
        let is_name = |piece: &&str| {
            piece.match_indices(name).any(|(at, _)| {
                let end = at + name.len();
                let whole = !piece[..at].ends_with(is_word) && !piece[end..].starts_with(is_word);
                whole && is_searched(piece, at, end)
            })
        };
        if code.iter().any(is_name) {
            searched.push(string);
        }
    }
    searched.retain(|string| !string.is_empty());
    searched.sort();
    searched.dedup();
    searched
}

/// Text, `{{ … }}`, `{% … %}` and `{# … #}`, one after another.
fn pieces(source: &str) -> Vec<&str> {
    let (mut pieces, mut rest, mut raw) = (Vec::new(), source, false);
    while !rest.is_empty() {
        let length = match rest.as_bytes() {
            [b'{', b'#', ..] if !raw => rest.find("#}").map_or(rest.len(), |at| at + 2),
            [b'{', b'%', ..] if !raw || tag_name(rest) == Some("endraw") => tag_length(rest, "%}"),
            [b'{', b'{', ..] if !raw => tag_length(rest, "}}"),
            // Text up to what may be the next tag.
            _ => {
                let first = rest.chars().next().map_or(1, char::len_utf8);
                rest[first..].find('{').map_or(rest.len(), |at| first + at)
            }
        };
        let (piece, after) = rest.split_at(length);
        match tag_name(piece) {
            Some("raw") => raw = true,
            Some("endraw") => raw = false,
            _ => {}
        }
        pieces.push(piece);
        rest = after;
    }
    pieces
}

fn is_code(piece: &str) -> bool {
    piece.starts_with("{{") || piece.starts_with("{%")
}

/// `set` of `{%- set x = 1 %}`.
fn tag_name(piece: &str) -> Option<&str> {
    let inside = piece.strip_prefix("{%")?.trim_start_matches(['-', '+']).trim_start();
    let end = inside.find(|c: char| !is_word(c)).unwrap_or(inside.len());
    Some(&inside[..end])
}

/// How long the tag is that `text` begins with: its end mark inside a string is none.
fn tag_length(text: &str, end: &str) -> usize {
    let (mut at, mut depth) = (2, 0_usize);
    while at < text.len() {
        match text.as_bytes()[at] {
            b'\'' | b'"' => {
                at = string_end(text, at);
                continue;
            }
            _ if depth == 0 && text[at..].starts_with(end) => return at + end.len(),
            b'{' => depth += 1,
            b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += text[at..].chars().next().map_or(1, char::len_utf8);
    }
    text.len()
}

/// The place after the string that begins at `start`.
fn string_end(text: &str, start: usize) -> usize {
    let bytes = text.as_bytes();
    let mut at = start + 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            byte if byte == bytes[start] => return at + 1,
            _ => at += 1,
        }
    }
    text.len()
}

/// Starts and ends of the strings in a tag.
fn literals(piece: &str) -> Vec<(usize, usize)> {
    let (mut literals, mut at) = (Vec::new(), 2);
    while at < piece.len() {
        if matches!(piece.as_bytes()[at], b'\'' | b'"') {
            let end = string_end(piece, at);
            // A string without an end is none.
            if end - at >= 2 && piece.as_bytes()[end - 1] == piece.as_bytes()[at] {
                literals.push((at, end));
            }
            at = end;
        } else {
            at += 1;
        }
    }
    literals
}

fn unescaped(text: &str) -> String {
    text.replace("\\n", "\n").replace("\\t", "\t").replace("\\'", "'").replace("\\\"", "\"")
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn last_word(text: &str) -> &str {
    let start = text.char_indices().rev().take_while(|(_, c)| is_word(*c)).last().map_or(text.len(), |(at, _)| at);
    &text[start..]
}

/// `'…' % value` as `'…'|python_percent_format(value)`, wherever a string stands before the operator.
fn with_percent_filters(piece: &str) -> String {
    let mut text = String::with_capacity(piece.len());
    let mut done = 0;
    for (_, end) in literals(piece) {
        // A string inside an operand that was dealt with already.
        if end <= done {
            continue;
        }
        let mut operator = end;
        while let Some(operand) = operand_of_percent(piece, operator) {
            text.push_str(&piece[done.min(operator)..operator]);
            text.push_str(&format!("|{PERCENT}("));
            text.push_str(&with_percent_filters_inside(&piece[operand.clone()]));
            text.push(')');
            (done, operator) = (operand.end, operand.end);
        }
    }
    text + &piece[done..]
}

/// The same for an operand, in which strings lie at any place.
fn with_percent_filters_inside(operand: &str) -> String {
    // `literals` leaves out a tag's two opening characters.
    with_percent_filters(&format!("  {operand}"))[2..].to_owned()
}

/// Where the right operand of a `%` lies that follows at `at`.
fn operand_of_percent(piece: &str, at: usize) -> Option<std::ops::Range<usize>> {
    let skip = |at: usize| at + (piece[at..].len() - piece[at..].trim_start().len());
    let operator = skip(at);
    let rest = piece[operator..].strip_prefix('%')?;
    if rest.starts_with('}') {
        return None;
    }
    let start = skip(operator + 1);
    let mut end = start;
    while piece[end..].starts_with(['-', '+']) {
        end = skip(end + 1);
    }
    end = primary_end(piece, end)?;
    loop {
        let next = skip(end);
        let bytes = piece.as_bytes();
        end = match bytes.get(next)? {
            b'.' => word_end(piece, skip(next + 1)),
            b'(' | b'[' => bracket_end(piece, next),
            b'|' => word_end(piece, skip(next + 1)),
            _ => return Some(start..end),
        };
    }
}

fn primary_end(piece: &str, at: usize) -> Option<usize> {
    match piece.as_bytes().get(at)? {
        b'\'' | b'"' => Some(string_end(piece, at)),
        b'(' | b'[' | b'{' => Some(bracket_end(piece, at)),
        _ => Some(word_end(piece, at)).filter(|end| *end > at),
    }
}

/// After a name or a number; a number may have a fraction.
fn word_end(piece: &str, at: usize) -> usize {
    let is_number = piece[at..].starts_with(|c: char| c.is_ascii_digit());
    let inside = |c: char| is_word(c) || is_number && c == '.';
    piece[at..].find(|c| !inside(c)).map_or(piece.len(), |length| at + length)
}

fn bracket_end(piece: &str, start: usize) -> usize {
    let (mut at, mut depth) = (start, 0_usize);
    while at < piece.len() {
        match piece.as_bytes()[at] {
            b'\'' | b'"' => {
                at = string_end(piece, at);
                continue;
            }
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => {
                depth -= 1;
                if depth == 0 {
                    return at + 1;
                }
            }
            _ => {}
        }
        at += piece[at..].chars().next().map_or(1, char::len_utf8);
    }
    piece.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_a_template_looks_for() {
        let source = r#"
            {%- set end_of_thought = "</thought>" %}{% set unused = '<|unused|>' %}
            {{- '<|im_start|>' + message.role }}
            {%- if '</think>' in message.content and '<|no|>' != x and "<|a|>"not in y %}
                {%- set content = content.split('<think>\n')[-1].replace( "[THINK]", '') %}
                {%- set content = content.rsplit(end_of_thought, 1)[0] %}
                {%- if content.startswith(('<answer>', 'x')) %}{{ '<|out|>' }}{% endif %}
            {%- endif %}
            '<|text|>' in text {# '<|note|>' in x #}{% raw %}{{ '<|raw|>' in x }}{% endraw %}
        "#;
        assert_eq!(searched(source), ["</think>", "</thought>", "<answer>", "<think>", "<|a|>", "[THINK]"]);
    }

    #[test]
    fn percent_signs_that_are_no_operators_stay() {
        for source in [
            "100% {{ 'a' }}%",
            "{% set x = 'a' %}b",
            "{%- if 'a'-%}",
            "{{ 'a % b' }}",
            "{{ x % 3 }}",
            "{# '%s' % x #}",
            "{{ 'open",
            "{% raw %}{{ '%s' % x }}",
        ] {
            assert_eq!(prepared(source), source);
        }
        assert_eq!(prepared("{{ '%s' % a.b[0]|f(1) ~ c }}"), "{{ '%s'|python_percent_format(a.b[0]|f(1)) ~ c }}");
        assert_eq!(prepared("{{ '%s' % ('%d' % 1) }}"), "{{ '%s'|python_percent_format(('%d'|python_percent_format(1))) }}");
    }

    proptest! {
        /// No source makes the scanner fail or lose text.
        #[test]
        fn any_source_comes_out_whole(source in "[{}%# '\"\\\\a(\\[)\\]|.é-]{0,40}") {
            prop_assert_eq!(pieces(&source).concat(), source.clone());
            prop_assert!(prepared(&source).len() >= source.len());
            searched(&source);
        }
    }
}
