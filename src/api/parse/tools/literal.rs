//! Calls that are written as Python writes them, or in Gemma's notation: read as a whole, and turned into JSON.

use serde_json::{Map, Number, Value, json};

use super::head::{Call, Head, Then};

/// Why reading stopped.
#[derive(Debug, PartialEq)]
enum Stop {
    /// The text ends too early.
    Wait,
    Fail,
}

type Result<T> = std::result::Result<T, Stop>;

/// A place in a text.
struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

/// `f(a=1, b="x")`.
pub fn python_call(text: &str) -> Head {
    as_head(Cursor { text, at: 0 }, |cursor| {
        let name = cursor.name()?;
        cursor.expect('(')?;
        let mut arguments = Map::new();
        while !cursor.eat(')')? {
            let key = cursor.name()?;
            cursor.expect('=')?;
            let value = cursor.python()?;
            arguments.insert(key, value);
            if !cursor.eat(',')? && cursor.peek()? != ')' {
                return Err(Stop::Fail);
            }
        }
        Ok((name, arguments))
    })
}

/// `call:f{a:1,b:QxQ}`, where Q is `quote`.
pub fn gemma_call(text: &str, quote: &str) -> Head {
    as_head(Cursor { text, at: 0 }, |cursor| {
        cursor.peek()?;
        if !cursor.eat_text("call:")? {
            return Err(Stop::Fail);
        }
        let name = cursor.name()?;
        cursor.expect('{')?;
        Ok((name, cursor.gemma_members(quote)?))
    })
}

/// A Python literal that is all of `text`, as JSON.
pub fn python_value(text: &str) -> Option<Value> {
    let mut cursor = Cursor { text, at: 0 };
    let value = cursor.python().ok()?;
    text[cursor.at..].trim().is_empty().then_some(value)
}

fn as_head(mut cursor: Cursor<'_>, read: impl FnOnce(&mut Cursor<'_>) -> Result<(String, Map<String, Value>)>) -> Head {
    match read(&mut cursor) {
        Ok((name, arguments)) => {
            let arguments = super::json::spaced(&Value::Object(arguments));
            Head::Call(Call { name, id: None, used: cursor.at, then: Then::Ready { arguments, in_object: false } })
        }
        Err(Stop::Wait) => Head::Wait,
        Err(Stop::Fail) => Head::Fail,
    }
}

impl Cursor<'_> {
    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    /// The next character that is not blank.
    fn peek(&mut self) -> Result<char> {
        self.at += self.rest().len() - self.rest().trim_start().len();
        self.rest().chars().next().ok_or(Stop::Wait)
    }

    fn eat(&mut self, c: char) -> Result<bool> {
        let there = self.peek()? == c;
        self.at += if there { c.len_utf8() } else { 0 };
        Ok(there)
    }

    fn expect(&mut self, c: char) -> Result<()> {
        if self.eat(c)? { Ok(()) } else { Err(Stop::Fail) }
    }

    fn eat_text(&mut self, text: &str) -> Result<bool> {
        if self.rest().starts_with(text) {
            self.at += text.len();
            return Ok(true);
        }
        if text.starts_with(self.rest()) { Err(Stop::Wait) } else { Ok(false) }
    }

    /// Characters while `belongs`, of which there must be one behind them.
    fn word(&mut self, belongs: impl Fn(char) -> bool) -> Result<String> {
        let end = self.rest().find(|c| !belongs(c)).ok_or(Stop::Wait)?;
        let word = self.rest()[..end].to_owned();
        self.at += end;
        Ok(word)
    }

    fn name(&mut self) -> Result<String> {
        let first = self.peek()?;
        if !(first.is_alphabetic() || first == '_') {
            return Err(Stop::Fail);
        }
        self.word(|c| c.is_alphanumeric() || "_.-".contains(c))
    }

    fn python(&mut self) -> Result<Value> {
        match self.peek()? {
            '"' | '\'' => self.python_string().map(Value::String),
            '[' => self.python_list(']'),
            '(' => self.python_list(')'),
            '{' => {
                self.expect('{')?;
                let mut object = Map::new();
                while !self.eat('}')? {
                    let key = match self.python()? {
                        Value::String(key) => key,
                        other => other.to_string(),
                    };
                    self.expect(':')?;
                    let value = self.python()?;
                    object.insert(key, value);
                    if !self.eat(',')? && self.peek()? != '}' {
                        return Err(Stop::Fail);
                    }
                }
                Ok(Value::Object(object))
            }
            _ => {
                let word = self.word(|c| c.is_alphanumeric() || "_.+-".contains(c))?;
                scalar(&word).ok_or(Stop::Fail)
            }
        }
    }

    fn python_list(&mut self, close: char) -> Result<Value> {
        self.at += 1;
        let mut list = Vec::new();
        while !self.eat(close)? {
            list.push(self.python()?);
            if !self.eat(',')? && self.peek()? != close {
                return Err(Stop::Fail);
            }
        }
        Ok(Value::Array(list))
    }

    /// A string in single, double or threefold quotes.
    fn python_string(&mut self) -> Result<String> {
        let quote = self.rest().chars().next().ok_or(Stop::Wait)?;
        let threefold: String = [quote; 3].iter().collect();
        let end = if self.eat_text(&threefold)? { threefold } else { quote.to_string() };
        if end.len() == 1 {
            self.at += 1;
        }
        let mut string = String::new();
        loop {
            if self.rest().starts_with(end.as_str()) {
                self.at += end.len();
                return Ok(string);
            }
            let c = self.rest().chars().next().ok_or(Stop::Wait)?;
            self.at += c.len_utf8();
            if c == '\\' { self.escape(&mut string)? } else { string.push(c) }
        }
    }

    fn escape(&mut self, string: &mut String) -> Result<()> {
        let c = self.rest().chars().next().ok_or(Stop::Wait)?;
        self.at += c.len_utf8();
        let digits = match c {
            'x' => 2,
            'u' => 4,
            'U' => 8,
            _ => 0,
        };
        if digits > 0 {
            let code = self.rest().get(..digits).ok_or(Stop::Wait)?;
            let code = u32::from_str_radix(code, 16).map_err(|_| Stop::Fail)?;
            self.at += digits;
            string.push(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
            return Ok(());
        }
        match c {
            'n' => string.push('\n'),
            't' => string.push('\t'),
            'r' => string.push('\r'),
            '0' => string.push('\0'),
            'b' => string.push('\u{8}'),
            'f' => string.push('\u{c}'),
            'a' => string.push('\u{7}'),
            'v' => string.push('\u{b}'),
            '\n' => {}
            '\\' | '\'' | '"' => string.push(c),
            c => string.extend(['\\', c]),
        }
        Ok(())
    }

    fn gemma_members(&mut self, quote: &str) -> Result<Map<String, Value>> {
        let mut object = Map::new();
        while !self.eat('}')? {
            let key = if self.eat_text(quote)? { self.until(quote)? } else { self.word(|c| !":{}[],".contains(c))? };
            self.expect(':')?;
            let value = self.gemma(quote)?;
            object.insert(key.trim().trim_matches('"').to_owned(), value);
            if !self.eat(',')? && self.peek()? != '}' {
                return Err(Stop::Fail);
            }
        }
        Ok(object)
    }

    fn gemma(&mut self, quote: &str) -> Result<Value> {
        let first = self.peek()?;
        if self.eat_text(quote)? {
            return self.until(quote).map(Value::String);
        }
        match first {
            '"' => self.python_string().map(Value::String),
            '{' => {
                self.at += 1;
                self.gemma_members(quote).map(Value::Object)
            }
            '[' => {
                self.at += 1;
                let mut list = Vec::new();
                while !self.eat(']')? {
                    list.push(self.gemma(quote)?);
                    if !self.eat(',')? && self.peek()? != ']' {
                        return Err(Stop::Fail);
                    }
                }
                Ok(Value::Array(list))
            }
            _ => {
                let word = self.word(|c| !",{}[]".contains(c))?;
                let word = word.trim();
                Ok(scalar(word).unwrap_or_else(|| json!(word)))
            }
        }
    }

    fn until(&mut self, end: &str) -> Result<String> {
        let length = self.rest().find(end).ok_or(Stop::Wait)?;
        let text = self.rest()[..length].to_owned();
        self.at += length + end.len();
        Ok(text)
    }
}

/// A number, or one of the words for true, false and nothing.
fn scalar(word: &str) -> Option<Value> {
    match word {
        "True" | "true" => return Some(json!(true)),
        "False" | "false" => return Some(json!(false)),
        "None" | "null" => return Some(Value::Null),
        _ => {}
    }
    if !word.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c)) {
        return None;
    }
    let plain = word.trim_start_matches('+').replace('_', "");
    let number = serde_json::from_str::<Number>(&plain).ok();
    number.or_else(|| plain.parse::<f64>().ok().and_then(Number::from_f64)).map(Value::Number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(head: Head) -> (String, String) {
        match head {
            Head::Call(Call { name, then: Then::Ready { arguments, .. }, .. }) => (name, arguments),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn python_becomes_json() {
        let text = "f.g(a=1, b='it\\'s', c=[1.5, -2, (True, None)], d={'k': \"v\"}, e='''x\n''',)";
        let expected = r#"{"a": 1, "b": "it's", "c": [1.5, -2, [true, null]], "d": {"k": "v"}, "e": "x\n"}"#;
        assert_eq!(arguments(python_call(text)), ("f.g".to_owned(), expected.to_owned()));
        assert_eq!(arguments(python_call("f()")).1, "{}");
        for end in 1..text.len() {
            assert_eq!(python_call(&text[..end]), Head::Wait, "{}", &text[..end]);
        }
        for text in ["f(1)", "(a=1)", "f(a=b)", "f[a]", "1f()"] {
            assert_eq!(python_call(text), Head::Fail, "{text}");
        }
    }

    #[test]
    fn gemma_becomes_json() {
        let text = "call:f{a:<q>x, {y}<q>,b:2,c:[true,<q>z<q>],d:{k:null},e:bare word}";
        let expected = r#"{"a": "x, {y}", "b": 2, "c": [true, "z"], "d": {"k": null}, "e": "bare word"}"#;
        assert_eq!(arguments(gemma_call(text, "<q>")), ("f".to_owned(), expected.to_owned()));
        for end in 1..text.len() {
            assert_eq!(gemma_call(&text[..end], "<q>"), Head::Wait, "{}", &text[..end]);
        }
        assert_eq!(gemma_call("run:f{}", "<q>"), Head::Fail);
    }

    #[test]
    fn a_literal_alone() {
        assert_eq!(python_value("{'a': True}"), Some(json!({"a": true})));
        assert_eq!(python_value("[1, 2"), None);
    }
}
