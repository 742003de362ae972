//! Assembly: find files → load → start engine → worker or server → drain → stop.

use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::ExitCode;

use crate::config::{Args, Command, ConfigError, ConfigSources, Settings};
use crate::error::Failure;
use crate::telemetry;

mod bench;
mod check;
mod cold_start;
mod model;
mod oneshot;
mod open_files;
mod queue;
mod run_batch;
mod serve;
mod signals;

/// The job a container brings along to try itself out.
const TEST_INPUT_FILE: &str = "test_input.json";
/// What a command line that asks for nothing gets.
const EXIT_USAGE: u8 = 2;

/// What this process is to do.
enum Mode {
    Serve,
    Gateway,
    Http,
    Queue,
    /// One job, given as JSON text.
    OneShot(String),
    Pull(crate::config::PullArgs),
    Bench(crate::config::BenchArgs),
    RunBatch(crate::config::RunBatchArgs),
    /// With the flags that a server's process gets.
    ColdStart(crate::config::BenchArgs, Vec<String>),
    Check,
}

/// Reads the command line and the environment, and does what they say.
pub fn main() -> ExitCode {
    crate::api::reclaim::configure();
    let args = match Args::of_process() {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            if error.use_stderr() && !Args::names_work(std::env::args_os()) {
                refuse_line(&error.to_string());
            }
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(EXIT_USAGE));
        }
    };
    let sources = ConfigSources::of_process();
    let mut settings = match Settings::resolve(&args, &sources) {
        Ok(settings) => settings,
        Err(errors) => return refuse(&args, &sources, &errors),
    };
    let Some(mode) = choose(&args, &settings) else {
        let _ = Args::clap_command().print_help();
        complain(&format!(
            "\nNothing to do: give a command, a job (--test_input or {TEST_INPUT_FILE}), PORT, or the platform's RUNPOD_WEBHOOK_GET_JOB."
        ));
        return ExitCode::from(EXIT_USAGE);
    };
    // An endpoint with GPUs that computes on the CPU would bill its owner for them, and answer nobody in time.
    let as_queue_worker = matches!(mode, Mode::Queue) || (matches!(mode, Mode::Check) && settings.runpod.get_job.is_some());
    settings.engine.gpu_required = cfg!(feature = "cuda") && as_queue_worker;
    start_logging(&mode, &settings);
    // `check` has them in its report.
    for warning in settings.warnings.iter().filter(|_| !matches!(mode, Mode::Check)) {
        tracing::warn!("{warning}");
    }
    match run(mode, settings) {
        Ok(code) => code,
        Err(failure) => {
            tracing::error!("{failure}");
            ExitCode::FAILURE
        }
    }
}

/// The order is a contract: a command; the platform's queue; a test job; `http` where PORT is set.
fn choose(args: &Args, settings: &Settings) -> Option<Mode> {
    match &args.command {
        Some(Command::Serve(_)) => return Some(Mode::Serve),
        Some(Command::Gateway) => return Some(Mode::Gateway),
        Some(Command::Http(_)) => return Some(Mode::Http),
        Some(Command::Pull(pull)) => return Some(Mode::Pull(pull.clone())),
        Some(Command::Bench(bench)) if bench.cold_start => return Some(Mode::ColdStart(bench.clone(), cold_start::handed_on(args))),
        Some(Command::Bench(bench)) => return Some(Mode::Bench(bench.clone())),
        Some(Command::RunBatch(args)) => return Some(Mode::RunBatch(args.clone())),
        Some(Command::Check(_)) => return Some(Mode::Check),
        None => {}
    }
    if let Some(job) = &args.test_input {
        return Some(Mode::OneShot(job.clone()));
    }
    if settings.runpod.get_job.is_some() {
        return Some(Mode::Queue);
    }
    if Path::new(TEST_INPUT_FILE).is_file() {
        return Some(
            std::fs::read_to_string(TEST_INPUT_FILE)
                .map_or_else(|error| Mode::OneShot(format!("{TEST_INPUT_FILE}: {error}")), Mode::OneShot),
        );
    }
    settings.server.port.map(|_| Mode::Http)
}

/// The same for a command line that cannot be read. Who wrote it sees clap's message; a queue worker's owner, who does not, its first line.
fn refuse_line(message: &str) {
    let Ok(args) = Args::parse_argv(["worker-candle"]) else { return };
    let problem = message.lines().next().unwrap_or_default();
    let error = ConfigError { name: "command line".to_owned(), message: problem.trim_start_matches("error: ").to_owned() };
    let sources = ConfigSources::of_process();
    if Settings::salvage(&args, &sources).runpod.get_job.is_some() {
        refuse(&args, &sources, &[error]);
    }
}

/// Tells what is wrong with the settings: a queue worker's owner, who sees no stderr, by the platform's log and an unhealthy ping.
fn refuse(args: &Args, sources: &ConfigSources, errors: &[ConfigError]) -> ExitCode {
    let settings = Settings::salvage(args, sources);
    if !matches!(choose(args, &settings), Some(Mode::Queue)) {
        errors.iter().for_each(|error| complain(&error.to_string()));
        return ExitCode::FAILURE;
    }
    start_logging(&Mode::Queue, &settings);
    let problems = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    match runtime() {
        Ok(runtime) => runtime.block_on(queue::refused(&settings.runpod, &problems)),
        Err(failure) => {
            tracing::error!("the settings are refused: {problems}; {failure}");
            ExitCode::FAILURE
        }
    }
}

fn start_logging(mode: &Mode, settings: &Settings) {
    use crate::config::LogLevel;
    // The platform reads a queue worker's lines from stdout; everywhere else stdout is for results.
    let queue = matches!(mode, Mode::Queue);
    let level = match settings.log.level {
        LogLevel::Trace => "TRACE",
        LogLevel::Debug => "DEBUG",
        LogLevel::Info => "INFO",
        LogLevel::Warn => "WARN",
        LogLevel::Error => "ERROR",
        LogLevel::Off => "NOTSET",
    };
    telemetry::init(telemetry::LogOptions {
        verbosity: level.parse().unwrap_or_default(),
        format: if queue && settings.runpod.endpoint_id.is_some() { telemetry::Format::Json } else { telemetry::Format::Text },
        output: if queue { telemetry::Output::Stdout } else { telemetry::Output::Stderr },
    });
}

/// Two threads carry all input and output: the processors belong to the engine.
fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("io")
        .enable_all()
        .build()
        .map_err(|error| Failure::internal(format!("cannot start the runtime: {error}")))
}

fn run(mode: Mode, settings: Settings) -> Result<ExitCode, Failure> {
    let runtime = runtime()?;
    let code = runtime.block_on(async {
        match mode {
            Mode::Serve => serve::serve(settings).await,
            Mode::Gateway => serve::gateway(settings).await,
            Mode::Http => serve::http(settings).await,
            Mode::Queue => queue::run(settings).await,
            Mode::OneShot(job) => oneshot::run(settings, &job).await,
            Mode::Pull(pull) => pull_model(settings, pull).await,
            Mode::ColdStart(bench, flags) => cold_start::run(&settings, &bench, &flags).await,
            Mode::Bench(bench) => bench::run(settings, bench).await,
            Mode::RunBatch(args) => run_batch::run(settings, args).await,
            Mode::Check => check::run(&settings).await,
        }
    });
    // Requests that are still being written when everything else has ended do not hold up the exit.
    runtime.shutdown_timeout(std::time::Duration::from_millis(100));
    code
}

async fn pull_model(settings: Settings, pull: crate::config::PullArgs) -> Result<ExitCode, Failure> {
    let files = crate::checkpoint::hub::pull(&pull.target, &settings.hub, pull.to.as_deref()).await?;
    say(&files.origin);
    Ok(ExitCode::SUCCESS)
}

/// A line of results. Whoever read them may have seen enough (`check | head -1`): that is no fault, and what else there is to do goes on.
fn say(line: &str) {
    let mut stdout = std::io::stdout().lock();
    match writeln!(stdout, "{line}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => tracing::error!("stdout cannot be written: {error}"),
        _ => {}
    }
}

/// A line on stderr, if anybody reads it.
fn complain(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_without_a_command_does() {
        let args = Args::parse_argv(["worker-candle"]).unwrap();
        let mode = |variables: &[(&str, &str)]| choose(&args, &Settings::resolve(&args, &ConfigSources::of(variables)).unwrap());
        let queue = ("RUNPOD_WEBHOOK_GET_JOB", "http://h/job-take/$ID");
        assert!(matches!(mode(&[queue, ("PORT", "80")]), Some(Mode::Queue)), "as in the image, which sets PORT");
        // The crate's own folder has a test job, which comes before PORT.
        assert!(matches!(mode(&[("PORT", "80")]), Some(Mode::OneShot(_) | Mode::Http)));
    }

    #[test]
    fn a_refused_setting_leaves_what_the_platform_needs() {
        let args = Args::parse_argv(["worker-candle"]).unwrap();
        let variables = [("RUNPOD_WEBHOOK_GET_JOB", "http://h/job-take/$ID"), ("RUNPOD_POD_ID", "pod1"), ("MAX_NUM_SEQS", "many")];
        let sources = ConfigSources::of(&variables);
        assert!(Settings::resolve(&args, &sources).is_err());
        let salvaged = Settings::salvage(&args, &sources);
        assert_eq!(salvaged.runpod.worker_id.as_deref(), Some("pod1"));
        assert!(matches!(choose(&args, &salvaged), Some(Mode::Queue)));
    }
}
