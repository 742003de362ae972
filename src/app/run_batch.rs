//! `run-batch`: a file of OpenAI's batch lines in, a file of answers out. What the output file answers already is not done again.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, IsTerminal, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use futures::StreamExt;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use super::model;
use super::say;
use super::signals::Shutdown;
use crate::api::Service;
use crate::api::batch::{self, Line, Unread};
use crate::config::{RunBatchArgs, Settings};
use crate::error::Failure;

/// Between two lines in the log about how far it is.
const TOLD_AGAIN: Duration = Duration::from_secs(5);

/// Runs the lines of a file; exit 1 when one has failed, or when it was stopped before the end.
pub async fn run(settings: Settings, args: RunBatchArgs) -> Result<ExitCode, Failure> {
    let shutdown = Shutdown::listen()?;
    let (input, output) = (args.input_file.as_path(), args.output_file.as_path());
    if same_file(input, output) {
        return Err(Failure::internal(format!("{} is the input and the output: name another output file", input.display())));
    }
    let total = count(input)?;
    let (mut file, done) = open_output(output)?;
    let service = tokio::select! {
        loaded = model::load(&settings) => loaded?,
        () = shutdown.clone().asked() => return Ok(ExitCode::FAILURE),
    };
    let at_once = settings.runpod.max_concurrency.unwrap_or(service.lines_at_once());
    let (service, health) = (&service, service.health());
    let mut progress = Progress::new(total);
    let (mut answered, mut failures, mut stopped) = (0, 0, false);
    let calls = Calls { lines: lines(input)?, service, seen: HashSet::new(), done: &done };
    let mut answers = std::pin::pin!(
        futures::stream::iter(calls)
            .map(|call: Result<Call, Failure>| async move {
                Ok::<_, Failure>(match call? {
                    Call::Done => None,
                    Call::Run(line) => Some(service.line(line).await),
                })
            })
            .buffer_unordered(at_once.max(1))
    );
    let mut asked = std::pin::pin!(shutdown.asked());
    loop {
        let answer = tokio::select! {
            answer = answers.next() => match answer {
                Some(answer) => answer,
                None => break,
            },
            () = &mut asked => {
                stopped = true;
                break;
            }
        };
        if let Some(answer) = answer? {
            // What a broken engine says of a line is no answer to it.
            if let Some(failure) = health.failure() {
                return Err(failure);
            }
            write(&mut file, output, &answer)?;
            answered += 1;
            failures += usize::from(batch::is_failure(&answer));
        }
        progress.step();
    }
    progress.end();
    say(&format!("{total} lines: {answered} answered now, {failures} of them failed; {} before, {} failed", done.answers, done.failed));
    if stopped {
        say("stopped before the end; the same command goes on from here");
    }
    Ok(if stopped || failures + done.failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn same_file(one: &Path, other: &Path) -> bool {
    matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}

fn failed(what: &str, path: &Path, error: &std::io::Error) -> Failure {
    Failure::internal(format!("{what} {}: {error}", path.display()))
}

/// A line as it is in a file, with its number from 1.
type RawLine = Result<(usize, Vec<u8>), Failure>;

/// The lines of a file that are not empty. The last one need not end.
fn lines(path: &Path) -> Result<impl Iterator<Item = RawLine> + use<>, Failure> {
    let file = File::open(path).map_err(|error| failed("cannot read", path, &error))?;
    let (mut reader, path) = (BufReader::new(file), path.to_owned());
    let mut number = 0;
    let next = move || {
        let mut line = Vec::new();
        number += 1;
        match reader.read_until(b'\n', &mut line) {
            Ok(0) => None,
            Ok(_) => Some(Ok((number, line))),
            Err(error) => Some(Err(failed("cannot read", &path, &error))),
        }
    };
    let is_empty = |line: &RawLine| line.as_ref().is_ok_and(|(_, text)| text.iter().all(u8::is_ascii_whitespace));
    Ok(std::iter::from_fn(next).filter(move |line| !is_empty(line)))
}

fn count(path: &Path) -> Result<u64, Failure> {
    lines(path)?.try_fold(0, |count, line| line.map(|_| count + 1))
}

/// What an output file answers already.
#[derive(Debug, Default, PartialEq)]
struct Done {
    custom_ids: HashSet<String>,
    /// Numbers of lines that were no calls.
    lines: HashSet<u64>,
    answers: usize,
    failed: usize,
}

/// Opens the output for more lines, and reads what is there. A last line without an end was being written when a run was killed: it goes.
fn open_output(path: &Path) -> Result<(File, Done), Failure> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(|error| failed("cannot write", path, &error))?;
    let (mut done, mut whole) = (Done::default(), 0);
    for line in lines(path)? {
        let (number, text) = line?;
        if text.last() != Some(&b'\n') {
            break;
        }
        let answer = serde_json::from_slice::<Value>(&text).ok().filter(|answer| answer.get("custom_id").is_some());
        let answer = answer.ok_or_else(|| {
            Failure::internal(format!("{}, line {number}, is no answer of a batch: name another output file", path.display()))
        })?;
        done.add(&answer);
    }
    let mut reader = BufReader::new(&file);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = reader.read_until(b'\n', &mut line).map_err(|error| failed("cannot read", path, &error))?;
        if line.last() != Some(&b'\n') {
            break;
        }
        whole += read as u64;
    }
    file.set_len(whole).map_err(|error| failed("cannot write", path, &error))?;
    file.seek(SeekFrom::Start(whole)).map_err(|error| failed("cannot write", path, &error))?;
    Ok((file, done))
}

impl Done {
    fn add(&mut self, answer: &Value) {
        self.answers += 1;
        self.failed += usize::from(batch::is_failure(answer));
        match answer["error"]["line"].as_u64() {
            Some(line) => drop(self.lines.insert(line)),
            None => self.custom_ids.extend(answer["custom_id"].as_str().map(str::to_owned)),
        }
    }
}

/// The lines of the input, in order, read when there is room for them.
struct Calls<'a, I> {
    lines: I,
    service: &'a Service,
    seen: HashSet<String>,
    done: &'a Done,
}

enum Call {
    /// The output has the answer.
    Done,
    Run(Result<Line, Unread>),
}

impl<I: Iterator<Item = RawLine>> Iterator for Calls<'_, I> {
    type Item = Result<Call, Failure>;

    fn next(&mut self) -> Option<Self::Item> {
        let (number, text) = match self.lines.next()? {
            Ok(line) => line,
            Err(failure) => return Some(Err(failure)),
        };
        let read = batch::read_text(&text, number, &self.service.body_limits());
        Some(Ok(once(read, number, &mut self.seen, self.done)))
    }
}

/// A line that is there for the first time, a mistake where another one has its id, or nothing to do.
fn once(read: Result<Line, Unread>, number: usize, seen: &mut HashSet<String>, done: &Done) -> Call {
    let read = read.and_then(|line| {
        if seen.insert(line.custom_id.clone()) {
            return Ok(line);
        }
        let message = format!("An earlier line has the custom_id '{}' already.", line.custom_id);
        let failure = Failure::bad_request("custom_id", message).code("duplicate_custom_id");
        Err(Unread { custom_id: Some(line.custom_id), line: number, failure })
    });
    let is_done = match &read {
        Ok(line) => done.custom_ids.contains(&line.custom_id),
        Err(unread) => done.lines.contains(&(unread.line as u64)),
    };
    if is_done { Call::Done } else { Call::Run(read) }
}

/// One line with its end, handed to the system at once.
fn write(file: &mut File, path: &Path, answer: &Value) -> Result<(), Failure> {
    let mut line = answer.to_string();
    line.push('\n');
    file.write_all(line.as_bytes()).map_err(|error| failed("cannot write", path, &error))
}

/// A bar on a terminal; elsewhere a line in the log every few seconds.
struct Progress {
    bar: Option<ProgressBar>,
    total: u64,
    done: u64,
    told: Instant,
}

impl Progress {
    fn new(total: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:40} {pos}/{len} lines, {per_sec}, {eta} left");
            ProgressBar::new(total).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self { bar, total, done: 0, told: Instant::now() }
    }

    fn step(&mut self) {
        self.done += 1;
        match &self.bar {
            Some(bar) => bar.inc(1),
            None if self.told.elapsed() >= TOLD_AGAIN => {
                self.told = Instant::now();
                tracing::info!("{} of {} lines", self.done, self.total);
            }
            None => {}
        }
    }

    fn end(&self) {
        match &self.bar {
            Some(bar) => bar.abandon(),
            None => tracing::info!("{} of {} lines", self.done, self.total),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn line(id: &str) -> Result<Line, Unread> {
        batch::read(json!({"custom_id": id, "url": "/v1/completions", "body": {}}), 1)
    }

    #[test]
    fn the_output_is_taken_up_where_it_ends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.jsonl");
        let answered = line("a").unwrap().answer("1", &Ok(json!({}))).to_string();
        let refused = line("b").unwrap().answer("2", &Err(Failure::internal("x"))).to_string();
        let unread = batch::read(json!(5), 7).unwrap_err().answer("3").to_string();
        let whole = format!("{answered}\n{refused}\n{unread}\n");
        std::fs::write(&path, format!("{whole}{{\"id\": \"ba")).unwrap();
        let (mut file, done) = open_output(&path).unwrap();
        let ids = ["a", "b"].map(str::to_owned).into_iter().collect();
        assert_eq!(done, Done { custom_ids: ids, lines: HashSet::from([7]), answers: 3, failed: 2 });
        write(&mut file, &path, &json!({"custom_id": "c"})).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{whole}{{\"custom_id\":\"c\"}}\n"));
        std::fs::write(&path, "something else\n").unwrap();
        assert!(open_output(&path).unwrap_err().message.contains("line 1, is no answer of a batch"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "something else\n", "left as it was");
    }

    #[test]
    fn each_line_is_run_once() {
        let mut done = Done::default();
        done.add(&line("a").unwrap().answer("1", &Ok(json!({}))));
        done.add(&batch::read(json!(5), 3).unwrap_err().answer("2"));
        let mut seen = HashSet::new();
        let mut next = |read, number| once(read, number, &mut seen, &done);
        assert!(matches!(next(line("a"), 1), Call::Done));
        assert!(matches!(next(line("b"), 2), Call::Run(Ok(_))));
        assert!(matches!(next(batch::read(json!(5), 3), 3), Call::Done));
        assert!(matches!(next(batch::read(json!(5), 4), 4), Call::Run(Err(_))));
        let Call::Run(Err(unread)) = next(line("b"), 5) else { panic!("a duplicate") };
        assert_eq!((unread.failure.code, unread.line), (Some("duplicate_custom_id"), 5));
    }
}
