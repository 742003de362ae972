//! What chat templates use of Python and Jinja2 where minijinja has it differently, or not at all: tests, filters, functions, methods of
//! strings and lists, and the text of numbers. `reference.json` beside this file holds what Jinja2 makes of each.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Object, ObjectRepr, Rest, Tuple, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value, escape_formatter, filters};
use minijinja_contrib::pycompat;

/// The filter that `'…' % value` becomes: minijinja has no such operator for strings.
pub const PERCENT: &str = "python_percent_format";

/// Puts everything of this file into `environment`.
pub fn install(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(method);
    environment.set_formatter(write);
    environment.add_function("cycler", |items: Rest<Value>| cycler(items.0));
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Undefined)
    });
    environment.add_test("callable", |value: &Value| value.is_undefined() || matches!(value.kind(), ValueKind::Plain));
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter(
        "items",
        |value: &Value| if value.is_undefined() { Ok(Value::from(Vec::<Value>::new())) } else { filters::items(value) },
    );
    environment.add_filter("first", |value: &Value| if value.is_undefined() { Ok(Value::UNDEFINED) } else { filters::first(value) });
    environment.add_filter("last", |value: Value| if value.is_undefined() { Ok(Value::UNDEFINED) } else { filters::last(value) });
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("string", string);
    environment.add_filter("replace", replace);
    environment.add_filter(PERCENT, percent);
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

fn list<T: Into<Value>>(items: impl IntoIterator<Item = T>) -> Value {
    Value::from(items.into_iter().map(Into::into).collect::<Vec<Value>>())
}

/// The text of a float, as Python's `repr` has it: the shortest digits that mean this number, with an exponent where it is below -4 or from 16 on.
pub fn float_text(number: f64) -> String {
    if !number.is_finite() {
        return if number.is_nan() {
            "nan"
        } else if number > 0.0 {
            "inf"
        } else {
            "-inf"
        }
        .to_owned();
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if (-4..16).contains(&exponent) {
        let plain = number.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// A float that is not held as an integer.
fn as_float(value: &Value) -> Option<f64> {
    if value.kind() == ValueKind::Number && !value.is_integer() { f64::try_from(value.clone()).ok() } else { None }
}

/// Writes what `{{ … }}` holds.
fn write(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    match as_float(value) {
        Some(number) => out.write_str(&float_text(number)).map_err(Error::from),
        None => escape_formatter(out, state, value),
    }
}

fn length(value: &Value) -> Result<usize, Error> {
    if value.is_undefined() { Ok(0) } else { filters::length(value) }
}

/// `default(value, default_value='', boolean=false)`.
fn default(value: &Value, given: Rest<Value>, options: Kwargs) -> Result<Value, Error> {
    // NOTE: an argument that is none is one.
    let argument = |place: usize, name: &str| match given.get(place) {
        Some(value) => Ok(Some(value.clone())),
        None if options.has(name) => options.get::<Value>(name).map(Some),
        None => Ok(None),
    };
    let (other, boolean) = (argument(0, "default_value")?, argument(1, "boolean")?);
    options.assert_all_used()?;
    if given.len() > 2 {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let absent = value.is_undefined() || boolean.is_some_and(|boolean| boolean.is_true()) && !value.is_true();
    Ok(if absent { other.unwrap_or_else(|| Value::from("")) } else { value.clone() })
}

/// `int(value, default=0, base=10)`: what is no number is the default.
fn int(state: &State<'_, '_>, value: &Value, default: Option<Value>, base: Option<u32>, options: Kwargs) -> Result<Value, Error> {
    let default = default.map_or_else(|| options.get::<Option<Value>>("default"), |default| Ok(Some(default)))?.unwrap_or(Value::from(0));
    let base = base.map_or_else(|| options.get::<Option<u32>>("base"), |base| Ok(Some(base)))?;
    options.assert_all_used()?;
    let text = value.as_str().map(number_text);
    let is_finite = |text: &String| text.parse::<f64>().is_ok_and(f64::is_finite);
    if text.as_ref().is_some_and(|text| text.parse::<f64>().is_ok() && !is_finite(text)) {
        return Ok(default);
    }
    let value = text.map_or_else(|| value.clone(), Value::from);
    filters::int(state, &value, Some(default), base, no_options())
}

/// `float(value, default=0.0)`.
fn float(state: &State<'_, '_>, value: &Value, default: Option<Value>, options: Kwargs) -> Result<Value, Error> {
    let default = default.map_or_else(|| options.get::<Option<Value>>("default"), |default| Ok(Some(default)))?;
    options.assert_all_used()?;
    let value = value.as_str().map_or_else(|| value.clone(), |text| Value::from(number_text(text)));
    filters::float(state, &value, Some(default.unwrap_or(Value::from(0.0))), no_options())
}

fn no_options() -> Kwargs {
    std::iter::empty::<(&str, Value)>().collect()
}

/// A number's text as Rust reads it: Python allows spaces around it and single underscores between digits.
fn number_text(text: &str) -> String {
    let text = text.trim();
    let plain = text.split('_').all(|part| part.starts_with(|c: char| c.is_ascii_hexdigit()) && !part.is_empty());
    if plain { text.replace('_', "") } else { text.to_owned() }
}

fn string(state: &State<'_, '_>, value: &Value) -> Result<Value, Error> {
    as_float(value).map_or_else(|| filters::string(state, value), |number| Ok(Value::from(float_text(number))))
}

/// `replace(value, old, new, count)`.
fn replace(value: &Value, old: &str, new: &str, count: Option<i64>, options: Kwargs) -> Result<Value, Error> {
    let count = count.map_or_else(|| options.get::<Option<i64>>("count"), |count| Ok(Some(count)))?;
    options.assert_all_used()?;
    let text = value.to_string();
    Ok(Value::from(match count.and_then(|count| usize::try_from(count).ok()) {
        Some(count) => text.replacen(old, new, count),
        None => text.replace(old, new),
    }))
}

/// `text % values`.
fn percent(text: &Value, values: Value) -> Result<String, Error> {
    let text = text.as_str().ok_or_else(|| invalid("the left side of % is not a string"))?;
    let values = match values.downcast_object_ref::<Tuple>() {
        Some(_) => values.try_iter()?.collect(),
        None => vec![values],
    };
    format(FormatStyle::Printf, text, &values)
}

/// `cycler('odd', 'even')`: `next()` gives one after the other.
#[derive(Debug)]
struct Cycler {
    items: Vec<Value>,
    place: AtomicUsize,
}

fn cycler(items: Vec<Value>) -> Result<Value, Error> {
    if items.is_empty() {
        return Err(invalid("cycler needs at least one value"));
    }
    Ok(Value::from_object(Cycler { items, place: AtomicUsize::new(0) }))
}

impl Cycler {
    fn current(&self) -> usize {
        self.place.load(Ordering::Relaxed) % self.items.len()
    }
}

impl Object for Cycler {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        (key.as_str() == Some("current")).then(|| self.items[self.current()].clone())
    }

    fn call_method(self: &Arc<Self>, _state: &mut State<'_, '_>, method: &str, args: &[Value]) -> Result<Value, Error> {
        let () = from_args(args)?;
        match method {
            "next" => {
                let item = self.items[self.current()].clone();
                self.place.fetch_add(1, Ordering::Relaxed);
                Ok(item)
            }
            "reset" => {
                self.place.store(0, Ordering::Relaxed);
                Ok(Value::from(()))
            }
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        }
    }
}

/// Methods of strings, lists and dicts: those that are missing or incomplete in minijinja's own collection, and then that.
fn method(state: &mut State<'_, '_>, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::String => match value.as_str() {
            Some(text) => string_method(state, value, text, method, args),
            None => Err(Error::from(ErrorKind::UnknownMethod)),
        },
        ValueKind::Seq => match method {
            "index" => {
                let (wanted,): (&Value,) = from_args(args)?;
                let place = value.try_iter()?.position(|item| item == *wanted);
                place.map(Value::from).ok_or_else(|| invalid(format!("{wanted} is not in list")))
            }
            "copy" => no_arguments(args).map(|()| value.clone()),
            _ => pycompat::unknown_method_callback(state, value, method, args),
        },
        ValueKind::Map if method == "copy" => no_arguments(args).map(|()| value.clone()),
        _ => pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// `split` and `rsplit`.
fn split(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let (separator, most, options): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = separator.map_or_else(|| options.get::<Option<Value>>("sep"), |separator| Ok(Some(separator)))?;
    let most = most.map_or_else(|| options.get::<Option<i64>>("maxsplit"), |most| Ok(Some(most)))?;
    options.assert_all_used()?;
    let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
    let separator = separator.filter(|separator| !separator.is_none());
    let parts = match &separator {
        None => split_at_spaces(text, most, method == "rsplit"),
        Some(separator) => match separator.as_str() {
            None => return Err(invalid(format!("{method} takes a string, not {}", separator.kind()))),
            Some("") => return Err(invalid("empty separator")),
            Some(separator) if method == "split" => text.splitn(most.saturating_add(1), separator).collect(),
            Some(separator) => reversed(text.rsplitn(most.saturating_add(1), separator).collect()),
        },
    };
    Ok(list(parts))
}

/// `partition` and `rpartition`.
fn partition(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let (separator,): (&str,) = from_args(args)?;
    let parts = match if method == "partition" { text.split_once(separator) } else { text.rsplit_once(separator) } {
        Some((before, after)) => [before, separator, after],
        None if method == "partition" => [text, "", ""],
        None => ["", "", text],
    };
    Ok(Value::from(Tuple::new(parts.map(Value::from).to_vec())))
}

/// `ljust`, `rjust` and `center`.
fn justify(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let (width, fill): (usize, Option<char>) = from_args(args)?;
    let fill = padding(text, width, fill.unwrap_or(' '))?;
    let count = fill.chars().count();
    // Of an odd width Python's `center` puts the larger part on the left only if the width asked for is odd.
    let left = match method {
        "ljust" => 0,
        "rjust" => count,
        _ => count / 2 + (count & width & 1),
    };
    let left: String = fill.chars().take(left).collect();
    Ok(Value::from(format!("{left}{text}{}", &fill[left.len()..])))
}

fn no_arguments(args: &[Value]) -> Result<(), Error> {
    let () = from_args(args)?;
    Ok(())
}

fn string_method(state: &mut State<'_, '_>, value: &Value, text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let one = |map: &dyn Fn(&str) -> Value| no_arguments(args).map(|()| map(text));
    match method {
        "split" | "rsplit" => split(text, method, args),
        "splitlines" => {
            let (keep, options): (Option<bool>, Kwargs) = from_args(args)?;
            let keep = keep.map_or_else(|| options.get::<Option<bool>>("keepends"), |keep| Ok(Some(keep)))?;
            options.assert_all_used()?;
            pycompat::unknown_method_callback(state, value, method, &[Value::from(keep == Some(true))])
        }
        "partition" | "rpartition" => partition(text, method, args),
        "removeprefix" => from_args(args).map(|(prefix,): (&str,)| Value::from(text.strip_prefix(prefix).unwrap_or(text))),
        "removesuffix" => from_args(args).map(|(suffix,): (&str,)| Value::from(text.strip_suffix(suffix).unwrap_or(text))),
        "find" | "rfind" | "index" | "rindex" => find(text, method, args),
        "startswith" | "endswith" if args.len() > 1 => {
            let (wanted, start, end): (&Value, Option<i64>, Option<i64>) = from_args(args)?;
            let part = Value::from(slice(text, start, end).1);
            pycompat::unknown_method_callback(state, &part, method, std::slice::from_ref(wanted))
        }
        "swapcase" => one(&|text| Value::from(text.chars().map(swapped).collect::<String>())),
        "casefold" => one(&|text| Value::from(text.to_lowercase())),
        "title" => one(&|text| Value::from(title(text))),
        "isdecimal" => one(&|text| Value::from(!text.is_empty() && text.chars().all(|c| c.is_ascii_digit()))),
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['-', '+'])));
            Ok(Value::from(format!("{sign}{}{digits}", padding(text, width, '0')?)))
        }
        "ljust" | "rjust" | "center" => justify(text, method, args),
        _ => pycompat::unknown_method_callback(state, value, method, args),
    }
}

fn reversed(mut parts: Vec<&str>) -> Vec<&str> {
    parts.reverse();
    parts
}

/// `split()` and `rsplit()` without a separator: at runs of white space, `most` times at most.
fn split_at_spaces(text: &str, most: usize, from_right: bool) -> Vec<&str> {
    let (mut parts, mut rest) = (Vec::new(), text);
    loop {
        rest = if from_right { rest.trim_end() } else { rest.trim_start() };
        if rest.is_empty() {
            break;
        }
        let cut = if from_right { rest.rfind(char::is_whitespace) } else { rest.find(char::is_whitespace) };
        match cut.filter(|_| parts.len() < most) {
            Some(cut) if from_right => {
                let after = cut + rest[cut..].chars().next().map_or(1, char::len_utf8);
                parts.push(&rest[after..]);
                rest = &rest[..cut];
            }
            Some(cut) => {
                parts.push(&rest[..cut]);
                rest = &rest[cut..];
            }
            None => {
                parts.push(rest);
                break;
            }
        }
    }
    if from_right { reversed(parts) } else { parts }
}

/// `find(wanted, start, end)` and its kin. Places are counted in characters.
fn find(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let (wanted, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
    let (before, part) = slice(text, start, end);
    let found = if method.starts_with('r') { part.rfind(wanted) } else { part.find(wanted) };
    match found {
        Some(found) => Ok(Value::from(before + part[..found].chars().count())),
        None if method.ends_with("index") => Err(invalid("substring not found")),
        None => Ok(Value::from(-1)),
    }
}

/// `text[start:end]` in characters, and how many lie before it.
fn slice(text: &str, start: Option<i64>, end: Option<i64>) -> (usize, &str) {
    let count = text.chars().count();
    let place = |at: i64| if at < 0 { count.saturating_sub(at.unsigned_abs() as usize) } else { count.min(at as usize) };
    let byte = |at: usize| text.char_indices().nth(at).map_or(text.len(), |(byte, _)| byte);
    let start = start.map_or(0, place);
    let end = end.map_or(count, place).max(start);
    (start, &text[byte(start)..byte(end)])
}

fn swapped(c: char) -> String {
    if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
}

/// Every run of letters begins with a capital one.
fn title(text: &str) -> String {
    let mut inside = false;
    let mut titled = String::with_capacity(text.len());
    for c in text.chars() {
        if inside {
            titled.extend(c.to_lowercase())
        } else {
            titled.extend(c.to_uppercase())
        }
        inside = c.is_alphabetic();
    }
    titled
}

/// What is missing of `width` characters.
fn padding(text: &str, width: usize, fill: char) -> Result<String, Error> {
    const MOST: usize = 100_000;
    if width > MOST {
        return Err(invalid(format!("a text of {width} characters is more than a template may make")));
    }
    Ok(fill.to_string().repeat(width.saturating_sub(text.chars().count())))
}
