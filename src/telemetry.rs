//! Logs in the platform's format, and [`metrics`].
//!
//! Inside an endpoint a line is a JSON object, elsewhere `LEVEL  | job id | message`. The job's id comes from a field `request_id` (or
//! `job`) of the event or of a span around it; other fields follow the message as `name=value`.

use std::fmt::{self, Write as _};
use std::io;
use std::str::FromStr;

use serde::Serialize;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

pub mod metrics;

/// Longer messages lose their middle: the platform throttles what logs too much.
const MAX_MESSAGE_CHARS: usize = 4096;

/// How and where to log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogOptions {
    pub verbosity: Verbosity,
    pub format: Format,
    pub output: Output,
}

/// The shape of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `{"requestId":…,"message":…,"level":…}`.
    Json,
    /// `LEVEL  | job id | message`.
    Text,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Where the platform reads a queue worker's lines.
    Stdout,
    /// Everywhere else: stdout is for results.
    Stderr,
}

/// The least level that is logged. Of other crates' messages, only warnings and errors are, whatever it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verbosity(LevelFilter);

impl Default for Verbosity {
    fn default() -> Self {
        Self(LevelFilter::INFO)
    }
}

impl FromStr for Verbosity {
    type Err = String;

    /// The platform's names, in any case: `NOTSET` (silent), `TRACE`, `DEBUG`, `INFO`, `WARN`, `ERROR`, `TIP` (above errors; nothing here is
    /// one). `WARNING`, `FATAL` and `CRITICAL` are understood too.
    fn from_str(name: &str) -> Result<Self, String> {
        let filter = match name.trim().to_ascii_uppercase().as_str() {
            "NOTSET" | "TIP" | "OFF" => LevelFilter::OFF,
            "TRACE" => LevelFilter::TRACE,
            "DEBUG" => LevelFilter::DEBUG,
            "INFO" => LevelFilter::INFO,
            "WARN" | "WARNING" => LevelFilter::WARN,
            "ERROR" | "FATAL" | "CRITICAL" => LevelFilter::ERROR,
            _ => return Err(format!("unknown log level {name:?}; known are NOTSET, TRACE, DEBUG, INFO, WARN and ERROR")),
        };
        Ok(Self(filter))
    }
}

impl LogOptions {
    /// Reads what the platform sets: `RUNPOD_LOG_LEVEL`, else `RUNPOD_DEBUG_LEVEL`; `RUNPOD_ENDPOINT_ID` for the format. Empty and `None`
    /// are unset. The error names the variable.
    pub fn from_lookup(variable: impl Fn(&str) -> Option<String>, output: Output) -> Result<Self, String> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty() && value != "None");
        let verbosity = match ["RUNPOD_LOG_LEVEL", "RUNPOD_DEBUG_LEVEL"].into_iter().find_map(|name| Some((name, variable(name)?))) {
            Some((name, value)) => value.parse().map_err(|error| format!("{name}: {error}"))?,
            None => Verbosity::default(),
        };
        let format = if variable("RUNPOD_ENDPOINT_ID").is_some() { Format::Json } else { Format::Text };
        Ok(Self { verbosity, format, output })
    }
}

/// Starts logging for the whole process. Does nothing when logging was started before.
pub fn init(options: LogOptions) {
    let writer = move |line: &str| {
        // Nobody is left to tell when the log itself cannot be written.
        let _written = match options.output {
            Output::Stdout => write_line(&mut io::stdout().lock(), line),
            Output::Stderr => write_line(&mut io::stderr().lock(), line),
        };
    };
    let _ = tracing::subscriber::set_global_default(subscriber(options.verbosity, options.format, writer));
}

fn subscriber(verbosity: Verbosity, format: Format, write: impl Fn(&str) + Send + Sync + 'static) -> impl Subscriber + Send + Sync {
    let others = verbosity.0.min(LevelFilter::WARN);
    let filter = Targets::new().with_default(others).with_target(env!("CARGO_CRATE_NAME"), verbosity.0);
    tracing_subscriber::registry().with(Lines { format, write }.with_filter(filter))
}

fn write_line(out: &mut impl io::Write, line: &str) -> io::Result<()> {
    out.write_all(line.as_bytes())?;
    out.flush()
}

/// Writes each event as one line.
struct Lines<W> {
    format: Format,
    write: W,
}

impl<S, W> Layer<S> for Lines<W>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: Fn(&str) + Send + Sync + 'static,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        // The innermost span that names a job counts.
        for span in context.event_scope(event).into_iter().flatten() {
            if let Some(outer) = span.extensions().get::<Fields>() {
                fields.request_id = fields.request_id.or_else(|| outer.request_id.clone());
                fields.batch_id = fields.batch_id.or_else(|| outer.batch_id.clone());
            }
        }
        (self.write)(&line(self.format, *event.metadata().level(), fields));
    }
}

/// The fields of an event or span.
#[derive(Default)]
struct Fields {
    request_id: Option<String>,
    batch_id: Option<String>,
    message: String,
    rest: String,
}

impl Fields {
    fn put(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        match field.name() {
            "request_id" | "job" => self.request_id = Some(value.to_string()),
            "batch_id" => self.batch_id = Some(value.to_string()),
            "message" => self.message = value.to_string(),
            name => {
                // Writing into a string cannot fail.
                let _ = write!(self.rest, " {name}={value}");
            }
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format_args!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, format_args!("{value}"));
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.put(field, format_args!("{value}"));
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct JsonLine<'a> {
    request_id: Option<&'a str>,
    message: &'a str,
    level: &'a str,
}

/// One line, with its end.
fn line(format: Format, level: Level, fields: Fields) -> String {
    let mut message = String::new();
    if let Some(batch_id) = &fields.batch_id {
        message = format!("[batchId={batch_id}] ");
    }
    message.push_str(&fields.message);
    message.push_str(if fields.message.is_empty() { fields.rest.trim_start() } else { &fields.rest });
    let message = truncated(message);
    let request_id = fields.request_id.as_deref();
    let level = level.as_str();
    match format {
        // Strings and an option of one always serialize.
        Format::Json => serde_json::to_string(&JsonLine { request_id, message: &message, level }).unwrap_or_default() + "\n",
        Format::Text => match request_id {
            Some(id) => format!("{level:<7}| {id} | {message}\n"),
            None => format!("{level:<7}| {message}\n"),
        },
    }
}

/// Cuts the middle out of a long message, and says how much.
fn truncated(message: String) -> String {
    let chars = message.chars().count();
    if chars <= MAX_MESSAGE_CHARS {
        return message;
    }
    let half = MAX_MESSAGE_CHARS / 2;
    let start: String = message.chars().take(half).collect();
    let end: String = message.chars().skip(chars - half).collect();
    format!("{start}...TRUNCATED {} CHARACTERS...{end}", chars - MAX_MESSAGE_CHARS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    /// The lines that `log` writes.
    fn lines(verbosity: &str, format: Format, log: impl FnOnce()) -> Vec<String> {
        let written = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&written);
        let subscriber = subscriber(verbosity.parse().unwrap(), format, move |line| sink.lock().unwrap().push(line.to_owned()));
        tracing::subscriber::with_default(subscriber, log);
        written.lock().unwrap().clone()
    }

    #[test]
    fn json_lines_carry_the_jobs_id() {
        let lines = lines("INFO", Format::Json, || {
            tracing::info!("no \"job\"");
            let span = tracing::info_span!("job", request_id = %"a-u1", batch_id = Some("b"));
            let _entered = span.enter();
            tracing::info_span!("inner", other = 1).in_scope(|| tracing::warn!(tokens = 3, "Started."));
            tracing::error!(request_id = "own", "x");
        });
        assert_eq!(
            lines,
            [
                "{\"requestId\":null,\"message\":\"no \\\"job\\\"\",\"level\":\"INFO\"}\n",
                "{\"requestId\":\"a-u1\",\"message\":\"[batchId=b] Started. tokens=3\",\"level\":\"WARN\"}\n",
                "{\"requestId\":\"own\",\"message\":\"[batchId=b] x\",\"level\":\"ERROR\"}\n",
            ]
        );
    }

    #[test]
    fn text_lines_pad_the_level() {
        let lines = lines("debug", Format::Text, || {
            tracing::debug!(job = "j", "hello");
            tracing::info!("bye {}", 1);
            tracing::trace!("unseen");
        });
        assert_eq!(lines, ["DEBUG  | j | hello\n", "INFO   | bye 1\n"]);
    }

    #[test]
    fn an_unset_batch_id_is_no_batch_id() {
        let lines = lines("INFO", Format::Text, || {
            tracing::info_span!("job", request_id = %"j", batch_id = None::<&str>).in_scope(|| tracing::info!("x"));
        });
        assert_eq!(lines, ["INFO   | j | x\n"]);
    }

    #[test]
    fn other_crates_are_heard_only_when_they_warn() {
        let count = |verbosity| {
            let log = || {
                tracing::info!(target: "hyper::client", "noise");
                tracing::warn!(target: "hyper::client", "trouble");
                tracing::error!("own");
            };
            lines(verbosity, Format::Text, log).len()
        };
        assert_eq!(["TRACE", "INFO", "ERROR", "NOTSET", "FATAL", "warning"].map(count), [2, 2, 1, 0, 1, 2]);
    }

    #[test]
    fn long_messages_lose_their_middle() {
        let message = format!("{}{}", "é".repeat(3000), "z".repeat(3000));
        let cut = truncated(message);
        assert_eq!(cut, format!("{}...TRUNCATED 1904 CHARACTERS...{}", "é".repeat(2048), "z".repeat(2048)));
        assert_eq!(truncated("x".repeat(4096)), "x".repeat(4096));
    }

    #[test]
    fn options_come_from_the_platforms_variables() {
        let read = |variables: &[(&str, &str)]| {
            let find = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
            LogOptions::from_lookup(find, Output::Stdout)
        };
        let default = read(&[("RUNPOD_LOG_LEVEL", "")]).unwrap();
        assert_eq!((default.verbosity, default.format), (Verbosity(LevelFilter::INFO), Format::Text));
        let set = read(&[("RUNPOD_DEBUG_LEVEL", "trace"), ("RUNPOD_ENDPOINT_ID", "ep")]).unwrap();
        assert_eq!((set.verbosity, set.format), (Verbosity(LevelFilter::TRACE), Format::Json));
        let first = read(&[("RUNPOD_DEBUG_LEVEL", "trace"), ("RUNPOD_LOG_LEVEL", "error")]).unwrap();
        assert_eq!(first.verbosity, Verbosity(LevelFilter::ERROR));
        assert!(read(&[("RUNPOD_LOG_LEVEL", "loud")]).unwrap_err().starts_with("RUNPOD_LOG_LEVEL: unknown log level \"loud\""));
    }
}
