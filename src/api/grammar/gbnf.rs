//! GBNF, llama.cpp's notation for grammars, which xgrammar calls EBNF, translated to Lark.
//!
//! A literal and a class of characters become one terminal each. Lark's terminals take the longest text they can, so a class is never
//! repeated inside of a terminal: `[a-z]+ "z"` stays what it was.

use std::collections::BTreeSet;
use std::fmt::Write;

use crate::api::grammar::lark::lark_string;

/// Parentheses may nest so deep; Lark's own parser takes 30 levels.
const MOST_NESTED: usize = 24;

/// The grammar in Lark; the error says in which line what is wrong.
pub fn to_lark(text: &str) -> Result<String, String> {
    let mut parser = Parser { text, at: 0, used: BTreeSet::new() };
    let mut defined = BTreeSet::new();
    let mut lark = String::new();
    parser.space(true);
    while parser.at < text.len() {
        let rule = parser.name().ok_or_else(|| parser.error("expected a rule's name"))?.to_owned();
        parser.space(true);
        if !parser.take("::=") {
            return Err(parser.error(&format!("expected `::=` after `{rule}`")));
        }
        parser.space(true);
        let body = parser.alternatives(0)?;
        let _ = writeln!(lark, "{}: {body}", lark_name(&rule));
        if !defined.insert(rule.clone()) {
            return Err(parser.error(&format!("the rule `{rule}` is defined twice")));
        }
        if parser.at < text.len() && parser.peek() == Some(')') {
            return Err(parser.error("a `)` without its `(`"));
        }
    }
    if !defined.contains("root") {
        return Err("the rule `root` is missing, with which the text begins".to_owned());
    }
    match parser.used.difference(&defined).next() {
        Some(unknown) => Err(format!("the rule `{unknown}` is used and not defined")),
        None => Ok(format!("start: {}\n{lark}", lark_name("root"))),
    }
}

/// Lark's rules are in lower case, which two names may share: every other character is spelled out.
fn lark_name(name: &str) -> String {
    let mut spelled = String::from("r_");
    for c in name.chars() {
        match c {
            'a'..='z' | '0'..='9' => spelled.push(c),
            '-' => spelled.push_str("__"),
            _ => {
                let _ = write!(spelled, "_{:x}_", u32::from(c));
            }
        }
    }
    spelled
}

struct Parser<'a> {
    text: &'a str,
    /// The next byte to read.
    at: usize,
    /// The rules that others name.
    used: BTreeSet<String>,
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn take(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn error(&self, what: &str) -> String {
        let line = self.text[..self.at].matches('\n').count() + 1;
        let near: String = self.rest().chars().take(20).take_while(|c| *c != '\n').collect();
        if near.is_empty() { format!("line {line}: {what}") } else { format!("line {line}: {what}, at `{near}`") }
    }

    /// Passes over spaces and comments, and over line breaks where those mean nothing.
    fn space(&mut self, lines: bool) {
        loop {
            let rest = self.rest();
            let blank = |c: char| c == ' ' || c == '\t' || (lines && (c == '\n' || c == '\r'));
            let spaces = rest.len() - rest.trim_start_matches(blank).len();
            self.at += spaces;
            let comment = self.rest().starts_with('#');
            if comment {
                self.at += self.rest().find('\n').unwrap_or(self.rest().len());
            }
            if spaces == 0 && !comment {
                return;
            }
        }
    }

    fn name(&mut self) -> Option<&'a str> {
        let rest = self.rest();
        let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '-')).unwrap_or(rest.len());
        self.at += end;
        (end > 0).then(|| &rest[..end])
    }

    /// Whether a new rule begins here.
    fn at_rule(&mut self) -> bool {
        let before = self.at;
        let found = self.name().is_some() && {
            self.space(true);
            self.rest().starts_with("::=")
        };
        self.at = before;
        found
    }

    /// `a b | c`, up to the rule's end or the closing parenthesis.
    fn alternatives(&mut self, depth: usize) -> Result<String, String> {
        if depth > MOST_NESTED {
            return Err(self.error(&format!("parentheses nest deeper than {MOST_NESTED} levels")));
        }
        let mut parts = vec![self.sequence(depth)?];
        while self.take("|") {
            parts.push(self.sequence(depth)?);
        }
        Ok(parts.join(" | "))
    }

    fn sequence(&mut self, depth: usize) -> Result<String, String> {
        let mut items = Vec::new();
        loop {
            // Line breaks go on with a rule until another one begins.
            self.space(true);
            match self.peek() {
                None | Some('|' | ')') => break,
                Some(_) if self.at_rule() => break,
                Some(_) => items.extend(self.item(depth)?),
            }
        }
        Ok(if items.is_empty() { "\"\"".to_owned() } else { items.join(" ") })
    }

    /// One element with its repetition; `None` when it comes no time.
    fn item(&mut self, depth: usize) -> Result<Option<String>, String> {
        let atom = self.atom(depth)?;
        for operator in ["*", "+", "?"] {
            if self.take(operator) {
                return Ok(Some(format!("({atom}){operator}")));
            }
        }
        if !self.take("{") {
            return Ok(Some(atom));
        }
        let Some(end) = self.rest().find('}') else { return Err(self.error("a `{` without its `}`")) };
        let bounds = self.rest()[..end].replace(' ', "");
        let number = |text: &str| text.parse::<u32>().ok().filter(|number| *number <= 100_000);
        let parsed = match bounds.split_once(',') {
            None => number(&bounds).map(|count| (count, Some(count))),
            Some(("", most)) => number(most).map(|most| (0, Some(most))),
            Some((least, "")) => number(least).map(|least| (least, None)),
            Some((least, most)) => number(least).zip(number(most)).map(|(least, most)| (least, Some(most))),
        };
        let Some((least, most)) = parsed.filter(|(least, most)| most.is_none_or(|most| most >= *least)) else {
            return Err(self.error("a repetition is {m}, {m,} or {m,n}, with n at least m and no more than 100,000"));
        };
        self.at += end + 1;
        Ok(match (least, most) {
            (_, Some(0)) => None,
            (0, None) => Some(format!("({atom})*")),
            (least, None) => Some(format!("({atom}){{{least},}}")),
            (least, Some(most)) => Some(format!("({atom}){{{least},{most}}}")),
        })
    }

    fn atom(&mut self, depth: usize) -> Result<String, String> {
        if self.take("\"") {
            return Ok(lark_string(&self.literal()?));
        }
        if self.take("[") {
            return self.class();
        }
        if self.take("(") {
            if self.rest().starts_with('=') {
                return Err(self.error("lookahead is not supported"));
            }
            let inner = self.alternatives(depth + 1)?;
            return if self.take(")") { Ok(format!("({inner})")) } else { Err(self.error("a `(` without its `)`")) };
        }
        if self.take(".") {
            return Ok("/(?s:.)/".to_owned());
        }
        match self.name() {
            Some(name) if self.rest().starts_with('(') => Err(self.error(&format!("the macro `{name}` is not supported"))),
            Some(name) => {
                self.used.insert(name.to_owned());
                Ok(lark_name(name))
            }
            None => Err(self.error("expected a literal, a class of characters, a rule's name or `(`")),
        }
    }

    fn literal(&mut self) -> Result<String, String> {
        let mut literal = String::new();
        loop {
            match self.character()? {
                (false, '"') => return Ok(literal),
                (false, '\n') => return Err(self.error("a literal without its closing quotation mark")),
                (_, c) => literal.push(c),
            }
        }
    }

    /// What follows `[`, as a regular expression of one character.
    fn class(&mut self) -> Result<String, String> {
        let mut regex = String::from(if self.take("^") { "/[^" } else { "/[" });
        let mut empty = true;
        let mut last: Option<char> = None;
        loop {
            let (escaped, c) = self.character()?;
            match c {
                ']' if !escaped => break,
                '-' if !escaped && last.is_some() && !self.rest().starts_with(']') => {
                    let (_, to) = self.character()?;
                    if last.is_some_and(|from| from > to) {
                        return Err(self.error("a range that ends before it begins"));
                    }
                    let _ = write!(regex, "-\\u{{{:x}}}", u32::from(to));
                    last = None;
                }
                _ => {
                    let _ = write!(regex, "\\u{{{:x}}}", u32::from(c));
                    last = Some(c);
                }
            }
            empty = false;
        }
        if empty {
            return Err(self.error("an empty class of characters"));
        }
        Ok(regex + "]/")
    }

    /// The next character of a literal or class, and whether it was escaped.
    fn character(&mut self) -> Result<(bool, char), String> {
        let Some(c) = self.peek() else { return Err(self.error("the grammar ends inside of a literal or a class")) };
        self.at += c.len_utf8();
        if c != '\\' {
            return Ok((false, c));
        }
        let Some(escape) = self.peek() else { return Err(self.error("the grammar ends after a backslash")) };
        self.at += escape.len_utf8();
        let digits = match escape {
            'n' => return Ok((true, '\n')),
            'r' => return Ok((true, '\r')),
            't' => return Ok((true, '\t')),
            'x' => 2,
            'u' => 4,
            'U' => 8,
            '\\' | '"' | '\'' | '[' | ']' | '-' | '^' | '/' | '.' | '?' | '*' | '+' | '(' | ')' | '{' | '}' | '|' | '$' => {
                return Ok((true, escape));
            }
            _ => return Err(self.error(&format!("the escape `\\{escape}` is not known"))),
        };
        let code = self.rest().get(..digits).and_then(|hex| u32::from_str_radix(hex, 16).ok()).and_then(char::from_u32);
        let Some(c) = code else { return Err(self.error(&format!("`\\{escape}` needs {digits} hexadecimal digits of a character"))) };
        self.at += digits;
        Ok((true, c))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_become_rules() {
        let lark = to_lark("# numbers\nroot ::= Item (\",\" ws item-2)* # list\nItem ::= [0-9a\\]]{1,3} | \"\\\"\\n/\"\nitem-2 ::= Item?\nws ::= | \" \"\n").unwrap();
        assert_eq!(
            lark,
            "start: r_root\nr_root: r__49_tem (\",\" r_ws (r_item__2))*\nr__49_tem: (/[\\u{30}-\\u{39}\\u{61}\\u{5d}]/){1,3} | \"\\\"\\n/\"\n\
             r_item__2: (r__49_tem)?\nr_ws: \"\" | \" \"\n"
                .replace("(r_item__2)", "r_item__2")
                .replace("(\",\" r_ws r_item__2)*", "((\",\" r_ws r_item__2))*")
        );
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        for (text, expected) in [
            ("", "the rule `root` is missing"),
            ("start ::= \"a\"", "the rule `root` is missing"),
            ("root ::= a\n", "the rule `a` is used and not defined"),
            ("root ::= \"a\nb ::= \"c\"", "line 2: a literal without"),
            ("root ::= \"a\"\nroot ::= \"b\"", "defined twice"),
            ("root = \"a\"", "expected `::=` after `root`"),
            ("root ::= (\"a\"", "a `(` without its `)`"),
            ("root ::= \"a\")", "a `)` without its `(`"),
            ("root ::= [z-a]", "a range that ends before it begins"),
            ("root ::= []", "an empty class"),
            ("root ::= \"a\"{3,1}", "a repetition is"),
            ("root ::= \"\\q\"", "the escape `\\q` is not known"),
            ("root ::= (= \"a\")", "lookahead"),
            ("root ::= TagDispatch(\"a\")", "the macro `TagDispatch` is not supported"),
        ] {
            let error = to_lark(text).unwrap_err();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
        assert!(to_lark(&format!("root ::= {}\"a\"{}", "(".repeat(30), ")".repeat(30))).unwrap_err().contains("nest deeper"));
    }
}
