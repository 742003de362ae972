//! `bench --cold-start`: from the start of a `serve` process to its first streamed token, by phase.

use std::io::{Read, Seek, SeekFrom};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use futures::StreamExt;
use serde_json::json;

use super::model::start_engine;
use super::say;
use crate::checkpoint::files::ModelFiles;
use crate::checkpoint::hub;
use crate::config::{self, Args, BenchArgs, ExposeSecret, PreparedWriting, Settings};
use crate::error::Failure;
use crate::models::Vocabulary;
use crate::models::prepared::{self, weight_paths};

/// Starts are noisy: this many, and the middle one is reported beside the best and the worst.
const STARTS: usize = 5;
const GIVE_UP: Duration = Duration::from_secs(300);

/// Milliseconds from the start of the process.
struct Phases {
    listening: f64,
    ready: f64,
    first_token: f64,
}

/// Ends the child however this ends.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the child is told by this program itself.
const OWN: &[&str] = &["HOST", "PORT", "LOG_LEVEL"];

/// The flags that the child gets: all settings that were given as flags. (The environment it inherits.)
pub fn handed_on(args: &Args) -> Vec<String> {
    let flags = config::flags(args).into_iter().filter(|(name, _)| !OWN.contains(&name.as_str()));
    flags.map(|(name, value)| format!("{}={value}", config::policy::flag(&name))).collect()
}

/// Prints one line per phase, or one JSON object. The servers are started with `flags`: first each with the weights converted anew, then with
/// a prepared copy, unless `PREPARED_CACHE` or the model's size says that there is none.
pub async fn run(settings: &Settings, bench: &BenchArgs, flags: &[String]) -> Result<ExitCode, Failure> {
    settings.only_model("bench --cold-start").map_err(|error| Failure::internal(error.to_string()))?;
    if settings.server.tls.is_some() {
        return Err(Failure::internal("SSL_CERTFILE: a cold start is measured over plain HTTP; unset it"));
    }
    let own = |flag: &&String| !flag.starts_with("--prepared-cache=");
    let without: Vec<String> = flags.iter().filter(own).cloned().chain(["--prepared-cache=off".to_owned()]).collect();
    let first = rows(settings, &without).await?;
    let files = hub::fetch(&settings.model, &settings.hub).await?;
    let weights: Vec<PathBuf> = weight_paths(&files).unwrap_or_default();
    let mut kinds = vec![Kind { name: "first start", key: "cold_start", rows: first, read: read(&weights) }];
    if let Some(copy) = prepare(settings, &files).await? {
        let rows = rows(settings, flags).await?;
        kinds.push(Kind { name: "with a prepared copy", key: "prepared", rows, read: read(&[copy]) });
    }
    if bench.json {
        let mut object = json!({"model": settings.model, "starts": STARTS});
        for kind in &kinds {
            let phases = kind
                .rows
                .iter()
                .map(|(name, Spread { best, median, worst })| (format!("{name}_ms"), json!({"min": best, "median": median, "max": worst})));
            let phases: serde_json::Map<_, _> = phases.chain([("reading_ms".to_owned(), json!(kind.read))]).collect();
            object[kind.key] = phases.into();
        }
        say(&object.to_string());
    } else {
        say(&format!("{}: milliseconds from process start, {STARTS} starts each", settings.model));
        for kind in &kinds {
            say(&format!("{}:", kind.name));
            let line = |(name, Spread { best, median, worst }): &(&str, Spread)| {
                say(&format!("{name:>12}: median {median}, best {best}, worst {worst}"));
            };
            kind.rows.iter().for_each(line);
            say(&format!("     reading: {} for the same bytes in large pieces, as the files lie now (page cache or disk)", kind.read));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// One kind of start: what it took, and what the machine needs to read its weights.
struct Kind {
    name: &'static str,
    key: &'static str,
    rows: [(&'static str, Spread); 3],
    read: f64,
}

struct Spread {
    best: f64,
    median: f64,
    worst: f64,
}

async fn rows(settings: &Settings, flags: &[String]) -> Result<[(&'static str, Spread); 3], Failure> {
    let mut starts = Vec::with_capacity(STARTS);
    for _ in 0..STARTS {
        starts.push(start_once(settings, flags).await?);
    }
    let spread = |pick: fn(&Phases) -> f64| {
        let mut values: Vec<f64> = starts.iter().map(pick).collect();
        values.sort_by(f64::total_cmp);
        Spread { best: round(values[0]), median: round(values[values.len() / 2]), worst: round(values[values.len() - 1]) }
    };
    Ok([("listening", spread(|p| p.listening)), ("ready", spread(|p| p.ready)), ("first_token", spread(|p| p.first_token))])
}

fn round(ms: f64) -> f64 {
    (ms * 10.0).round() / 10.0
}

/// Writes the prepared copy where it is missing, as a start would, and says where it is.
async fn prepare(settings: &Settings, files: &ModelFiles) -> Result<Option<PathBuf>, Failure> {
    let mut settings = settings.clone();
    settings.engine.prepared_writing = PreparedWriting::Now;
    let (engine, _) = start_engine(&settings, files, None, || Ok(Vocabulary::from(usize::MAX))).await?;
    drop(engine);
    Ok(prepared::existing(files, &settings.engine))
}

/// Milliseconds in which these files are read, on as many threads as the processor has.
fn read(files: &[PathBuf]) -> f64 {
    const PIECE: u64 = 8 << 20;
    let begin = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let pieces = |path: &PathBuf, thread: u64| -> std::io::Result<()> {
        let (mut file, mut buffer) = (std::fs::File::open(path)?, vec![0; PIECE as usize]);
        let len = file.metadata()?.len();
        for start in (thread * PIECE..len).step_by((threads * PIECE) as usize) {
            file.seek(SeekFrom::Start(start))?;
            file.read_exact(&mut buffer[..PIECE.min(len - start) as usize])?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        for thread in 0..threads {
            // A file that cannot be read has stopped the servers before.
            scope.spawn(move || files.iter().try_for_each(|path| pieces(path, thread)).is_ok());
        }
    });
    round(begin.elapsed().as_secs_f64() * 1e3)
}

async fn start_once(settings: &Settings, flags: &[String]) -> Result<Phases, Failure> {
    let failed = |what: &str, error: &dyn std::fmt::Display| Failure::internal(format!("cold start: {what}: {error}"));
    let port = free_port().map_err(|error| failed("no free port", &error))?;
    let program = std::env::current_exe().map_err(|error| failed("own path", &error))?;
    let client = reqwest::Client::builder().no_proxy().build().map_err(|error| failed("HTTP client", &error))?;
    let base = format!("http://127.0.0.1:{port}");
    let mut command = Command::new(program);
    command.args(["serve", "--host", "127.0.0.1", "--port", &port.to_string(), "--log-level", "ERROR"]).args(flags);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
    let begin = Instant::now();
    let mut server = Server(command.spawn().map_err(|error| failed("cannot start", &error))?);
    let ms = || begin.elapsed().as_secs_f64() * 1e3;
    let (mut listening, mut ready) = (None, None);
    while ready.is_none() {
        if let Ok(Some(status)) = server.0.try_wait() {
            return Err(failed("the server ended", &status));
        }
        if begin.elapsed() > GIVE_UP {
            return Err(failed("not ready", &"gave up after 300 s"));
        }
        if let Ok(response) = client.get(format!("{base}/health")).send().await {
            listening.get_or_insert_with(ms);
            if response.status().is_success() {
                ready = Some(ms());
                break;
            }
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let body = json!({"messages": [{"role": "user", "content": "What is the capital of France?"}], "stream": true, "temperature": 0, "max_tokens": 4});
    let mut request = client.post(format!("{base}/v1/chat/completions")).json(&body);
    if let Some(key) = settings.server.api_keys.first() {
        request = request.bearer_auth(key.expose_secret());
    }
    let response = request.send().await.map_err(|error| failed("first request", &error))?;
    let (mut frames, mut text) = (response.bytes_stream(), String::new());
    while let Some(bytes) = frames.next().await {
        text.push_str(&String::from_utf8_lossy(&bytes.map_err(|error| failed("first request", &error))?));
        // The role chunk comes before the model has said anything.
        let content = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line.strip_prefix("data: ")?).ok());
        if content.into_iter().any(|chunk| chunk["choices"][0]["delta"]["content"].as_str().is_some_and(|text| !text.is_empty())) {
            return Ok(Phases { listening: listening.unwrap_or_default(), ready: ready.unwrap_or_default(), first_token: ms() });
        }
    }
    Err(failed("no token came", &text))
}

fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flag_is_handed_on() {
        let line = "x bench demo --cold-start --json --quantization wint4 --port 9 --log-level debug --no-enable-prefix-caching --swap-space 4 --api-key a --api-key b";
        let args = Args::parse_argv(line.split(' ')).unwrap();
        let mut flags = handed_on(&args);
        flags.sort();
        let expected =
            [r#"--api-key=["a","b"]"#, "--enable-prefix-caching=false", "--model=demo", "--quantization=wint4", "--swap-space=4"];
        assert_eq!(flags, expected);
        // And the child can read them.
        Args::parse_argv(["x", "serve"].map(str::to_owned).into_iter().chain(flags)).unwrap();
    }
}
