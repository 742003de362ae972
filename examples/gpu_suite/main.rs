//! The checks and measurements that need a GPU, as one program that runs without cargo. `scripts/gpu-suite` starts it, and says how.
//!
//! An example and not a second binary: `cargo build` makes the product alone, while `cargo test` still compiles this, so that it keeps up with
//! the library. Every part runs in a process of its own with a time limit: a device fault, which spoils a CUDA context for good, or a
//! hang ends one part and not the run.

// NOTE: `unsafe` is in `measure` only, at calls into the CUDA driver.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use worker_candle::config::DeviceChoice;
use worker_candle::models::device::open_device;

mod kernels;
#[cfg(feature = "cuda")]
mod measure;
mod model;
mod report;

use report::{Part, Report};

pub type Fail = Box<dyn std::error::Error>;

/// Checks worker-candle on a device and measures the device.
#[derive(Debug, Clone, Parser)]
pub struct Options {
    /// `cuda`, `cuda:N` or `cpu`. On the CPU the measurements of CUDA itself are left out.
    #[arg(long, default_value = "cuda", value_parser = device)]
    device: DeviceChoice,
    /// What computes the models: `auto`, or `candle` for its operations.
    #[arg(long, default_value = "auto", value_parser = ["auto", "candle"])]
    kernels: String,
    /// The folder that holds `demo-model` and `ernie-tiny`.
    #[arg(long, default_value = "handler-tests/fixtures")]
    fixtures: PathBuf,
    /// A larger model's folder, such as `scripts/make_checkpoint.py --preset ernie-0.3b` writes.
    #[arg(long)]
    checkpoint: Option<PathBuf>,
    /// The worker-candle binary, for `bench`.
    #[arg(long)]
    worker: Option<PathBuf>,
    /// Where report.md and report.json go.
    #[arg(long, default_value = "gpu-report")]
    out: PathBuf,
    /// Parts to run, by name; all by default.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Seconds for the whole run.
    #[arg(long, default_value_t = 460)]
    limit: u64,
    /// Runs one part in this process and prints its record.
    #[arg(long, hide = true)]
    part: Option<String>,
}

fn device(text: &str) -> Result<DeviceChoice, String> {
    match text.split_once(':').unwrap_or((text, "0")) {
        ("cpu", _) => Ok(DeviceChoice::Cpu),
        ("cuda", index) => {
            index.parse().map(DeviceChoice::Cuda).map_err(|_| format!("\"{text}\": the number after cuda: is a device's index"))
        }
        _ => Err(format!("\"{text}\" is not cuda, cuda:N or cpu")),
    }
}

/// Parts in order, with the most seconds each may take.
const PARTS: &[(&str, u64)] = &[
    ("machine", 40),
    ("self-check", 40),
    ("twins", 90),
    ("kernels", 90),
    ("logits", 90),
    ("questions", 90),
    ("steps", 90),
    ("bench", 120),
    ("host-cost", 40),
    ("matmul", 60),
    ("graph", 90),
    ("transfer", 60),
];

fn main() -> ExitCode {
    let options = Options::parse();
    if let Some(name) = &options.part {
        let part = run_part(name, &options);
        return match serde_json::to_string(&part) {
            Ok(record) => {
                println!("{record}");
                ExitCode::SUCCESS
            }
            Err(_) => ExitCode::FAILURE,
        };
    }
    match run_all(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("gpu_suite: {error}");
            ExitCode::from(2)
        }
    }
}

fn run_all(options: &Options) -> Result<bool, Fail> {
    if let Some(unknown) = options.only.iter().find(|name| !PARTS.iter().any(|(part, _)| part == name)) {
        return Err(format!(
            "there is no part \"{unknown}\"; parts are {}",
            PARTS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
        )
        .into());
    }
    std::fs::create_dir_all(&options.out)?;
    let started = Instant::now();
    let mut report = Report { passed: true, device: format!("{:?}", options.device), seconds: 0.0, parts: Vec::new() };
    for (name, limit) in PARTS.iter().filter(|(name, _)| options.only.is_empty() || options.only.iter().any(|only| only == name)) {
        let left = Duration::from_secs(options.limit).saturating_sub(started.elapsed());
        let part = if left < Duration::from_secs(2) {
            let mut part = Part { name: (*name).into(), ..Part::default() };
            part.check("ran", false, format!("the {} s for the whole run were used up", options.limit));
            part
        } else {
            in_a_process(name, Duration::from_secs(*limit).min(left))
        };
        eprintln!("{:<10} {:>6.1} s  {}", part.name, part.seconds, if part.passed() { "" } else { "FAIL" });
        report.passed &= part.passed();
        report.parts.push(part);
        report.seconds = started.elapsed().as_secs_f64();
        // Written after every part: what is known survives whatever comes.
        std::fs::write(options.out.join("report.md"), report.markdown())?;
        std::fs::write(options.out.join("report.json"), serde_json::to_vec_pretty(&report)?)?;
    }
    println!("{}", report.markdown());
    Ok(report.passed)
}

/// Runs one part by this same program. Whatever happens to it becomes a record.
fn in_a_process(name: &str, limit: Duration) -> Part {
    let started = Instant::now();
    let mut part = match spawn(name, limit) {
        Ok(part) => part,
        Err(problem) => {
            let mut part = Part { name: name.into(), ..Part::default() };
            part.check("ran to its end", false, problem.to_string());
            part
        }
    };
    part.seconds = started.elapsed().as_secs_f64();
    part
}

fn spawn(name: &str, limit: Duration) -> Result<Part, Fail> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .args(["--part", name])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let output = reader(child.stdout.take());
    let log = reader(child.stderr.take());
    let end = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if Instant::now() > end {
            child.kill()?;
            child.wait()?;
            break None;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let (output, log) = (output.join().unwrap_or_default(), log.join().unwrap_or_default());
    eprint!("{log}");
    let tail = log.lines().rev().take(4).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n");
    let Some(status) = status else { return Err(format!("stopped after its {} s; log ends: {tail}", limit.as_secs()).into()) };
    let record = output.lines().last().unwrap_or_default();
    serde_json::from_str(record).map_err(|_| format!("ended with {status} and no record; log ends: {tail}").into())
}

fn reader(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// One part, in this process.
fn run_part(name: &str, options: &Options) -> Part {
    let mut part = Part { name: name.into(), ..Part::default() };
    let result = match name {
        "machine" => machine(&mut part, options),
        "kernels" => open_device(options.device).map_err(Fail::from).and_then(|device| kernels::run(&mut part, &device)),
        "logits" => model::logits(&mut part, options),
        "questions" => model::questions(&mut part, options),
        "steps" => model::steps(&mut part, options),
        "bench" => bench(&mut part, options),
        _ if options.device == DeviceChoice::Cpu => {
            part.skipped = Some("It measures CUDA; this run is on the CPU.".into());
            Ok(())
        }
        _ => cuda_part(name, &mut part, options),
    };
    if let Err(error) = result {
        part.check("ran to its end", false, error.to_string());
    }
    part
}

#[cfg(feature = "cuda")]
fn cuda_part(name: &str, part: &mut Part, options: &Options) -> Result<(), Fail> {
    match name {
        "self-check" => measure::self_check(part, options),
        "twins" => measure::twins(part, options),
        "host-cost" => measure::host_cost(part, options),
        "matmul" => measure::matmul(part, options),
        "graph" => measure::graph(part, options),
        "transfer" => measure::transfer(part, options),
        _ => Err(format!("there is no part \"{name}\"").into()),
    }
}

#[cfg(not(feature = "cuda"))]
fn cuda_part(_name: &str, _part: &mut Part, _options: &Options) -> Result<(), Fail> {
    Err("this program was built without CUDA (--features cuda)".into())
}

/// What this runs on. The check is that the device opens.
fn machine(part: &mut Part, options: &Options) -> Result<(), Fail> {
    part.note(format!("worker-candle {}, {}-{}", env!("CARGO_PKG_VERSION"), std::env::consts::OS, std::env::consts::ARCH));
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map_or("unknown", |(_, name)| name);
    part.note(format!("CPU: {model}, {} processors for this process", std::thread::available_parallelism().map_or(0, usize::from)));
    if let Ok(driver) = std::fs::read_to_string("/proc/driver/nvidia/version") {
        part.note(driver.lines().next().unwrap_or_default().to_owned());
    }
    let query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current";
    if let Ok(smi) = Command::new("nvidia-smi").args([query, "--format=csv,noheader"]).output() {
        part.note(format!("nvidia-smi: {}", String::from_utf8_lossy(&smi.stdout).trim()));
    }
    let device = open_device(options.device)?;
    #[cfg(feature = "cuda")]
    measure::machine(part, &device)?;
    let sum = candle_core::Tensor::ones(1000, candle_core::DType::F32, &device)?.sum_all()?.to_scalar::<f32>()?;
    part.check("the device opens and adds", sum == 1000.0, format!("1000 ones make {sum}"));
    Ok(())
}

/// The product's own benchmark, as a user runs it.
fn bench(part: &mut Part, options: &Options) -> Result<(), Fail> {
    let Some(worker) = &options.worker else {
        part.skipped = Some("No worker-candle binary was given (--worker).".into());
        return Ok(());
    };
    let models = std::iter::once("demo".into()).chain(options.checkpoint.clone().map(PathBuf::into_os_string));
    for model in models {
        let device = match options.device {
            DeviceChoice::Cuda(index) => format!("cuda:{index}"),
            _ => "cpu".into(),
        };
        let lengths = ["--prompt-tokens", "128", "--output-tokens", "64", "--concurrency", "1,16", "--json"];
        let output = Command::new(worker)
            .arg("bench")
            .arg("--model")
            .arg(&model)
            .args(lengths)
            .env("DEVICE", &device)
            .env("KERNELS", &options.kernels)
            .output()?;
        let (text, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let rows: Vec<serde_json::Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let name = std::path::Path::new(&model).file_name().unwrap_or_default().to_string_lossy().into_owned();
        for row in &rows {
            for key in ["prefill_tok_s", "decode_tok_s", "limit_share"] {
                if let Some(value) = row[key].as_f64() {
                    part.measure(
                        format!("{name}, {} at once: {key}", row["concurrency"]),
                        value,
                        if key == "limit_share" { "" } else { "tok/s" },
                    );
                }
            }
            part.note(format!("`{row}`"));
        }
        let end = log.lines().last().unwrap_or_default();
        part.check(
            format!("bench {name}"),
            output.status.success() && rows.len() == 2,
            format!("{}, {} rows {end}", output.status, rows.len()),
        );
    }
    Ok(())
}
