//! The command line, by clap. Every setting is a flag; flags of other engines go through the policy table too.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Arg, ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};

use super::policy::{self, Verdict};
use super::setting::{Kind, Section, Setting};
use super::{parse, table};

/// A RunPod serverless worker that serves open language models (docs/models.md names the families), with an OpenAI-compatible API.
///
/// Without a command: a queue worker when the platform's RUNPOD_WEBHOOK_GET_JOB is set; else one test job (--test_input, or the file
/// test_input.json); else `http` when PORT is set.
#[derive(Clone, Parser)]
#[command(name = "worker-candle", version, subcommand_precedence_over_arg = true)]
pub struct Args {
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Run one job, `{"input": …}`, print its answer and exit. Written `--test_input` too.
    #[arg(long, value_name = "JSON", help_heading = "General")]
    pub test_input: Option<String>,
    /// Another way to say `serve`.
    #[arg(long, hide = true)]
    pub rp_serve_api: bool,
    #[command(flatten)]
    pub flags: Flags,
    /// Flags of other engines: name as a variable, and value.
    #[arg(skip)]
    pub foreign: Vec<(String, String)>,
}

/// Settings that came as flags: each row of the table is one. It holds secrets in the clear, hence no `Debug`.
#[derive(Clone, Default)]
pub struct Flags(Vec<(&'static str, String)>);

impl Flags {
    pub fn get(&self, setting: &Setting) -> Option<&str> {
        self.iter().find(|(name, _)| *name == setting.name).map(|(_, value)| value)
    }

    /// By the variable's name, in the table's order.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().map(|(name, value)| (*name, value.as_str()))
    }
}

impl clap::Args for Flags {
    fn augment_args(command: clap::Command) -> clap::Command {
        command.args(table::SETTINGS.iter().filter(|setting| setting.has_flag()).map(|setting| argument(setting)))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Flags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = |setting: &&Setting| Some((setting.name, matches.get_one::<String>(setting.name)?.clone()));
        Ok(Self(table::SETTINGS.iter().filter(|setting| setting.has_flag()).filter_map(given).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// A setting as clap knows it.
fn argument(setting: &'static Setting) -> Arg {
    let doc = setting.doc.trim();
    let argument = Arg::new(setting.name)
        .long(policy::flag(setting.name).trim_start_matches('-').to_owned())
        .help(doc.strip_suffix('.').unwrap_or(doc))
        .help_heading(setting.section.heading())
        .hide(setting.hidden || setting.section == Section::Platform)
        .allow_hyphen_values(setting.hyphen);
    match setting.is_switch() {
        true => argument.num_args(0..=1).require_equals(true).default_missing_value("true"),
        false => argument,
    }
}

#[derive(Debug, Clone, PartialEq, Subcommand)]
pub enum Command {
    /// The local endpoint, a worker on it, and the OpenAI routes: everything a laptop needs.
    Serve(ModelArgument),
    /// The local endpoint alone, for workers that attach to it.
    Gateway,
    /// The OpenAI routes alone, on PORT: load-balancing endpoints and Pods.
    Http(ModelArgument),
    /// Fetch a model into the cache or a folder.
    Pull(PullArgs),
    /// Measure speed.
    Bench(BenchArgs),
    /// Answer a file of requests, OpenAI's batch lines, into another file. The same command goes on where it was stopped.
    RunBatch(RunBatchArgs),
    /// Show the settings, the device, the memory plan and the model's files.
    Check(ModelArgument),
}

/// The model, or several, as plain arguments.
#[derive(Debug, Clone, Default, PartialEq, clap::Args)]
pub struct ModelArgument {
    /// The model, as `--model` takes it; several where a server serves them all.
    #[arg(id = "model_argument", value_name = "MODEL")]
    pub models: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, clap::Args)]
pub struct PullArgs {
    /// The model's hub id.
    #[arg(value_name = "MODEL")]
    pub target: String,
    /// Copy its files into this folder instead of the cache.
    #[arg(long, value_name = "DIR")]
    pub to: Option<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, clap::Args)]
pub struct BenchArgs {
    #[command(flatten)]
    pub model: ModelArgument,
    /// Tokens in each prompt.
    #[arg(long, default_value_t = 512, value_parser = positive)]
    pub prompt_tokens: usize,
    /// Tokens to generate for each prompt.
    #[arg(long, default_value_t = 64, value_parser = positive)]
    pub output_tokens: usize,
    /// Sequences at once; several by commas.
    #[arg(long, value_delimiter = ',', default_value = "1,4,16", value_parser = positive)]
    pub concurrency: Vec<usize>,
    /// One JSON object a line instead of a table.
    #[arg(long)]
    pub json: bool,
    /// Measure a running server through HTTP instead of the engine alone.
    #[arg(long)]
    pub url: Option<String>,
    /// Hold every answer to a JSON schema that never lets it end: what masks cost.
    #[arg(long)]
    pub structured: bool,
    /// Measure from the start of a process to the first token, by phase.
    #[arg(long)]
    pub cold_start: bool,
}

#[derive(Debug, Clone, PartialEq, clap::Args)]
pub struct RunBatchArgs {
    #[command(flatten)]
    pub model: ModelArgument,
    /// The requests, one JSON object a line: `{"custom_id", "method", "url", "body"}`.
    #[arg(short, long, value_name = "FILE")]
    pub input_file: PathBuf,
    /// Where the answers go, one a line, as they come. Requests that it answers already are left out.
    #[arg(short, long, value_name = "FILE")]
    pub output_file: PathBuf,
}

fn positive(value: &str) -> Result<usize, String> {
    value.parse().ok().filter(|&number: &usize| number > 0).ok_or_else(|| "must be a whole number, at least 1".to_owned())
}

impl Args {
    /// The program's own arguments. Asks for help, and mistakes in the form of flags, come back as clap's error, which knows its text,
    /// its stream and its exit code.
    pub fn of_process() -> Result<Self, clap::Error> {
        Self::parse_argv(std::env::args_os())
    }

    /// The same for any command line; the first word is the program's name.
    pub fn parse_argv(argv: impl IntoIterator<Item = impl Into<OsString>>) -> Result<Self, clap::Error> {
        let (own, foreign) = sort_out(argv.into_iter().map(Into::into))?;
        let mut args = Self::from_arg_matches(&Self::clap_command().try_get_matches_from(own)?)?;
        args.foreign = foreign;
        if args.rp_serve_api && args.command.is_none() {
            args.command = Some(Command::Serve(ModelArgument::default()));
        }
        args.take_model_argument()?;
        Ok(args)
    }

    /// The model as a plain argument means `--model`.
    fn take_model_argument(&mut self) -> Result<(), clap::Error> {
        let given = match &self.command {
            Some(Command::Serve(given) | Command::Http(given) | Command::Check(given)) => given,
            Some(Command::Bench(bench)) => &bench.model,
            Some(Command::RunBatch(batch)) => &batch.model,
            Some(Command::Gateway | Command::Pull(_)) | None => return Ok(()),
        };
        if given.models.is_empty() {
            return Ok(());
        }
        let model = joined(&table::MODEL, given.models.clone());
        if let Some(flag) = self.flags.get(&table::MODEL).filter(|flag| parse::models(flag) != parse::models(&model)) {
            let message = format!("the model is given twice, as {model} and as --model {flag}");
            return Err(Self::command().error(clap::error::ErrorKind::ArgumentConflict, message));
        }
        self.flags.0.retain(|(name, _)| *name != table::MODEL.name);
        self.flags.0.insert(0, (table::MODEL.name, model));
        Ok(())
    }

    /// Whether a command line that cannot be read names a command or a test job, so that it is not a queue worker's.
    pub fn names_work(argv: impl IntoIterator<Item = impl Into<OsString>>) -> bool {
        let names = |word: OsString| word.to_str().is_some_and(|word| is_command(word) || word.starts_with("--test"));
        argv.into_iter().skip(1).any(|word| names(word.into()))
    }

    /// The command as clap knows it, with every setting's flag allowed before and after the subcommand.
    pub fn clap_command() -> clap::Command {
        Self::command().mut_args(|argument| argument.global(true))
    }
}

fn is_command(word: &str) -> bool {
    Args::command().get_subcommands().any(|command| command.get_name() == word)
}

/// Values of a list as one. What cannot be read stays as it is, so that the setting is named as the mistake.
fn joined(setting: &Setting, mut values: Vec<String>) -> String {
    if values.len() == 1 {
        return values.remove(0);
    }
    let mut all = Vec::new();
    for value in values {
        match if setting.kind == Kind::Models { parse::models(&value) } else { parse::list(&value) } {
            Some(words) => all.extend(words),
            None => return value,
        }
    }
    serde_json::Value::from(all).to_string()
}

/// A flag as written: its variable's name, and the value after `=`.
fn flag_parts(word: &str) -> Option<(String, Option<&str>)> {
    let flag = word.strip_prefix("--").filter(|flag| !flag.is_empty())?;
    let (name, value) = flag.split_once('=').map_or((flag, None), |(name, value)| (name, Some(value)));
    Some((policy::variable(name), value))
}

/// Flags that take no value.
fn is_switch(name: &str) -> bool {
    match policy::find(name) {
        Some(Verdict::NoEffect { switch, .. } | Verdict::Refused { switch, .. }) => switch,
        Some(Verdict::Works(setting) | Verdict::Alias(setting)) => setting.is_switch(),
        None => false,
    }
}

/// `NO_ENABLE_LORA` → `ENABLE_LORA` when that is a switch.
fn negated(name: &str) -> Option<&str> {
    name.strip_prefix("NO_").filter(|name| is_switch(name))
}

type Foreign = Vec<(String, String)>;
type Words<I> = std::iter::Peekable<I>;

/// Splits a command line into clap's part and the flags that only the policy knows. Spellings are made one: `_` for `-`, other names of
/// a setting, `--no-…`.
fn sort_out(argv: impl Iterator<Item = OsString>) -> Result<(Vec<OsString>, Foreign), clap::Error> {
    let mut own: Vec<OsString> = Vec::new();
    let mut foreign = Vec::new();
    let mut lists: BTreeMap<&str, (&Setting, Vec<String>)> = BTreeMap::new();
    let mut words = argv.peekable();
    own.extend(words.next());
    while let Some(word) = words.next() {
        let Some((name, value)) = word.to_str().and_then(flag_parts) else {
            own.push(word);
            continue;
        };
        let (name, value) = match negated(&name) {
            Some(positive) if value.is_none() => (positive.to_owned(), Some("false")),
            _ => (name, value),
        };
        let name = match policy::find(&name) {
            Some(Verdict::Refused { .. } | Verdict::NoEffect { .. }) => {
                let value = foreign_value(&name, value, &mut words)?;
                foreign.push((name, value));
                continue;
            }
            Some(Verdict::Works(setting) | Verdict::Alias(setting)) if setting.is_list() => {
                let command_seen = own.iter().skip(1).any(|word| word.to_str().is_some_and(is_command));
                let (_, values) = lists.entry(setting.name).or_insert((setting, Vec::new()));
                values.extend(list_values(setting, value, command_seen, &mut words));
                if values.is_empty() {
                    return Err(missing_value(setting.name));
                }
                continue;
            }
            Some(Verdict::Alias(setting)) => setting.name.to_owned(),
            Some(Verdict::Works(_)) | None => name,
        };
        let value = value.map(|value| format!("={value}")).unwrap_or_default();
        own.push(format!("{}{value}", policy::flag(&name)).into());
    }
    own.extend(lists.into_iter().map(|(name, (setting, values))| format!("{}={}", policy::flag(name), joined(setting, values)).into()));
    Ok((own, foreign))
}

/// The value of a flag that clap does not know: behind `=`, or the next word unless the flag is a switch.
fn foreign_value(name: &str, value: Option<&str>, words: &mut Words<impl Iterator<Item = OsString>>) -> Result<String, clap::Error> {
    match value {
        Some(value) => Ok(value.to_owned()),
        None if is_switch(name) => Ok("true".to_owned()),
        None => match words.next_if(|next| !next.to_string_lossy().starts_with("--")) {
            Some(next) => Ok(next.to_string_lossy().into_owned()),
            None => Err(missing_value(name)),
        },
    }
}

/// One mention of a list's flag: the value behind `=`, or the next word. `SERVED_MODEL_NAME` takes all words that follow, as vLLM's does,
/// up to the command when that was not there yet.
fn list_values(
    setting: &Setting,
    value: Option<&str>,
    command_seen: bool,
    words: &mut Words<impl Iterator<Item = OsString>>,
) -> Vec<String> {
    let mut values: Vec<String> = value.map(str::to_owned).into_iter().collect();
    while values.is_empty() || setting.name == table::SERVED_MODEL_NAME.name {
        let first = values.is_empty();
        let more = |next: &OsString| {
            let next = next.to_string_lossy();
            !next.starts_with('-') && (first || command_seen || !is_command(&next))
        };
        match words.next_if(more) {
            Some(next) => values.push(next.to_string_lossy().into_owned()),
            None => break,
        }
    }
    values
}

fn missing_value(name: &str) -> clap::Error {
    Args::command().error(clap::error::ErrorKind::InvalidValue, format!("{} needs a value", policy::flag(name)))
}

/// Reads words of flags (`VLLM_EXTRA_ARGS`) as pairs of variable name and value. Several words after a flag are one value.
pub fn pairs(words: &[String]) -> Result<Vec<(String, String)>, String> {
    let mut pairs = Vec::new();
    let mut words = words.iter().enumerate().peekable();
    while let Some((index, word)) = words.next() {
        let Some((name, value)) = flag_parts(&long_form(word)).map(|(name, value)| (name, value.map(str::to_owned))) else {
            // Not shown: it may be a secret in the wrong place.
            return Err(format!("word {} belongs to no flag", index + 1));
        };
        let pair = match (negated(&name), value) {
            (Some(positive), None) => (positive.to_owned(), "false".to_owned()),
            (_, Some(value)) => (name, value),
            (_, None) if is_switch(&name) => (name, "true".to_owned()),
            (_, None) => {
                let mut values = Vec::new();
                while let Some((_, next)) = words.next_if(|(_, next)| !next.starts_with("--") && long_form(next) == **next) {
                    values.push(next.as_str());
                }
                if values.is_empty() {
                    return Err(format!("{word} needs a value"));
                }
                (name, values.join(" "))
            }
        };
        pairs.push(pair);
    }
    for list in table::SETTINGS.iter().filter(|setting| setting.is_list()) {
        let values: Vec<String> = pairs.iter().filter(|(name, _)| name == list.name).map(|(_, value)| value.clone()).collect();
        if values.len() > 1 {
            pairs.retain(|(name, _)| name != list.name);
            pairs.push((list.name.to_owned(), joined(list, values)));
        }
    }
    Ok(pairs)
}

/// vLLM's short flags.
fn long_form(word: &str) -> String {
    let long = match word {
        "-tp" => "--tensor-parallel-size",
        "-pp" => "--pipeline-parallel-size",
        "-dp" => "--data-parallel-size",
        "-q" => "--quantization",
        other => other,
    };
    long.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &[&str]) -> Args {
        Args::parse_argv(std::iter::once("worker-candle").chain(line.iter().copied())).unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn clap_is_content() {
        Args::clap_command().debug_assert();
    }

    #[test]
    fn settings_stand_before_and_after_the_command() {
        for line in [["--model", "demo", "serve"], ["serve", "--model", "demo"]] {
            let args = parse(&line);
            assert_eq!(args.command, Some(Command::Serve(ModelArgument::default())));
            assert_eq!(args.flags.get(&table::MODEL), Some("demo"));
        }
    }

    #[test]
    fn the_model_may_be_a_plain_argument() {
        for line in [
            &["serve", "demo"][..],
            &["--seed", "1", "http", "demo", "--port", "1"],
            &["check", "--swap-space", "4", "demo"],
            &["bench", "--json", "demo", "--concurrency", "1,2"],
            &["serve", "demo", "--model", "demo"],
        ] {
            assert_eq!(parse(line).flags.get(&table::MODEL), Some("demo"), "{line:?}");
        }
        for line in [&["serve", "a/b", "--model", "demo"][..], &["pull", "a/b", "c/d"], &["gateway", "demo"], &["demo"]] {
            assert!(Args::parse_argv(std::iter::once("x").chain(line.iter().copied())).is_err(), "{line:?}");
        }
    }

    #[test]
    fn several_models() {
        for line in [
            &["serve", "--model", "demo", "--model", "/my models/x"][..],
            &["--model=demo", "http", "--model_name=/my models/x"],
            &["serve", "demo", "/my models/x", "--port", "1"],
            &["check", "demo", "/my models/x", "--model", "demo,/my models/x,demo"],
            &["run-batch", "-i", "in", "-o", "out", "demo", "/my models/x"],
        ] {
            let models = parse(line).flags.get(&table::MODEL).map(str::to_owned);
            assert_eq!(parse::models(&models.unwrap()).unwrap(), ["demo", "/my models/x"], "{line:?}");
        }
        assert_eq!(parse(&["serve", "--model", "demo,b"]).flags.get(&table::MODEL), Some("demo,b"), "one value stays as it is");
        assert!(Args::parse_argv(["x", "serve", "a", "b", "--model", "b"]).is_err());
    }

    #[test]
    fn flags_of_lists_may_be_repeated() {
        let keys = |line: &[&str]| parse(line).flags.get(&table::API_KEY).map(str::to_owned);
        assert_eq!(keys(&["serve", "--api-key", "one", "--api-key=two,three"]).as_deref(), Some(r#"["one","two","three"]"#));
        assert_eq!(keys(&["serve", "--fd-api-key", "one,two"]).as_deref(), Some("one,two"), "one value stays as it is");
        assert_eq!(keys(&["--api-key", "k", "serve", "demo"]).as_deref(), Some("k"));
        let names = |line: &[&str]| parse(line).flags.get(&table::SERVED_MODEL_NAME).map(str::to_owned);
        assert_eq!(names(&["serve", "--served-model-name", "a", "b", "--seed", "1"]).as_deref(), Some(r#"["a","b"]"#));
        assert_eq!(names(&["serve", "demo", "--served-model-name=a", "b"]).as_deref(), Some(r#"["a","b"]"#));
        let before = parse(&["--served-model-name", "a", "b", "serve", "demo"]);
        assert_eq!((before.flags.get(&table::SERVED_MODEL_NAME), before.flags.get(&table::MODEL)), (Some(r#"["a","b"]"#), Some("demo")));
        for line in [["serve", "--api-key"], ["--served-model-name", "--json"]] {
            assert!(Args::parse_argv(std::iter::once("x").chain(line)).is_err(), "{line:?}");
        }
        let words = ["--api-key", "a", "--api-key", "b"].map(str::to_owned);
        assert_eq!(pairs(&words).unwrap(), [("API_KEY".to_owned(), r#"["a","b"]"#.to_owned())]);
    }

    #[test]
    fn a_command_line_that_cannot_be_read_may_still_say_what_it_is_for() {
        assert!(Args::names_work(["x", "--no-such-flag", "serve"]) && Args::names_work(["x", "--test_input={}"]));
        assert!(!Args::names_work(["serve", "--no-such-flag"]), "the first word is the program");
    }

    #[test]
    fn files_of_a_batch() {
        for line in [
            &["run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--model", "demo"][..],
            &["run-batch", "demo", "--input-file=in.jsonl", "--output_file", "out.jsonl"],
        ] {
            let args = parse(line);
            let Some(Command::RunBatch(batch)) = &args.command else { panic!("{line:?}") };
            assert_eq!((batch.input_file.to_str(), batch.output_file.to_str()), (Some("in.jsonl"), Some("out.jsonl")));
            assert_eq!(args.flags.get(&table::MODEL), Some("demo"));
        }
        assert!(Args::parse_argv(["x", "run-batch", "-i", "in.jsonl"]).is_err());
    }

    /// FastDeploy's command line, as its documents write it.
    #[test]
    fn the_flags_of_fastdeploy() {
        let line = "serve --model demo --port 8180 --metrics-port 8181 --engine-worker-queue-port 8182 --cache-queue-port 8183 \
                    --tensor-parallel-size 1 --max-model-len 4096 --max-num-seqs 32 --quantization wint4 --gpu-memory-utilization 0.9 \
                    --kv-cache-ratio 0.75 --enable-prefix-caching --swap-space 4 --enable-chunked-prefill --max-num-partial-prefills 1 \
                    --max-long-partial-prefills 1 --long-prefill-token-threshold 0 --static-decode-blocks 2 --enable-logprob \
                    --guided-decoding-backend off --load-choices default_v1 --use-warmup 0 --max-concurrency 8 --max-waiting-time -1 \
                    --workers 1 --block-size 64 --max-num-batched-tokens 2048 --config fd.yaml";
        let args = parse(&line.split_whitespace().collect::<Vec<_>>());
        assert_eq!(args.command, Some(Command::Serve(ModelArgument::default())));
        for (setting, value) in [
            (&table::MODEL, "demo"),
            (&table::PORT, "8180"),
            (&table::MAX_MODEL_LEN, "4096"),
            (&table::MAX_NUM_SEQS, "32"),
            (&table::TENSOR_PARALLEL_SIZE, "1"),
            (&table::QUANTIZATION, "wint4"),
            (&table::ENABLE_PREFIX_CACHING, "true"),
            (&table::VLLM_CONFIG_FILE, "fd.yaml"),
        ] {
            assert_eq!(args.flags.get(setting), Some(value), "{}", setting.name);
        }
    }

    #[test]
    fn switches_take_no_word() {
        assert_eq!(parse(&["--any-model-name", "serve"]).flags.get(&table::ANY_MODEL_NAME), Some("true"));
        assert_eq!(parse(&["--any_model_name=off", "serve"]).flags.get(&table::ANY_MODEL_NAME), Some("off"));
        assert_eq!(parse(&["--no-any-model-name", "serve"]).flags.get(&table::ANY_MODEL_NAME), Some("false"));
    }

    #[test]
    fn other_spellings() {
        let args = parse(&["--model_name", "a/b", "--max_model_len=4096"]);
        assert_eq!(args.flags.get(&table::MODEL), Some("a/b"));
        assert_eq!(args.flags.get(&table::MAX_MODEL_LEN), Some("4096"));
        assert_eq!(
            parse(&["pull", "a/b", "--to", "x"]).command,
            Some(Command::Pull(PullArgs { target: "a/b".into(), to: Some("x".into()) }))
        );
    }

    #[test]
    fn the_platform_sdk_s_flags() {
        let args = parse(&["--rp_serve_api", "--rp_api_port", "9000", "--rp_api_host=0.0.0.0", "--rp_log_level", "DEBUG"]);
        assert_eq!(args.command, Some(Command::Serve(ModelArgument::default())));
        assert_eq!(args.flags.get(&table::PORT), Some("9000"));
        assert_eq!(args.flags.get(&table::HOST), Some("0.0.0.0"));
        assert_eq!(args.flags.get(&table::LOG_LEVEL), Some("DEBUG"));
        assert_eq!(parse(&["--test_input", r#"{"input":{}}"#]).test_input.as_deref(), Some(r#"{"input":{}}"#));
    }

    #[test]
    fn flags_of_other_engines() {
        let args = parse(&["serve", "--enforce-eager", "--data-parallel-size", "2", "--no-enable-lora", "--swap-space=4"]);
        let foreign: Vec<_> = args.foreign.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(foreign, [("ENFORCE_EAGER", "true"), ("DATA_PARALLEL_SIZE", "2"), ("ENABLE_LORA", "false"), ("SWAP_SPACE", "4")]);
        assert_eq!(args.command, Some(Command::Serve(ModelArgument::default())));
    }

    #[test]
    fn unknown_flags_stop() {
        for line in [&["--no-such-flag"][..], &["serve", "--tensor-parallel-size"], &["frobnicate"], &["bench", "--concurrency", "0"]] {
            assert!(Args::parse_argv(std::iter::once("x").chain(line.iter().copied())).is_err(), "{line:?}");
        }
    }

    #[test]
    fn extra_arguments() {
        let words = ["--served-model-name", "a", "b", "-tp", "1", "--no-enable-prefix-caching", "--seed=7", "--enforce_eager"];
        let pairs = pairs(&words.map(str::to_owned)).unwrap();
        let expected = [
            ("SERVED_MODEL_NAME", "a b"),
            ("TENSOR_PARALLEL_SIZE", "1"),
            ("ENABLE_PREFIX_CACHING", "false"),
            ("SEED", "7"),
            ("ENFORCE_EAGER", "true"),
        ];
        assert_eq!(pairs, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
        assert!(super::pairs(&["stray".to_owned()]).is_err());
        assert!(super::pairs(&["--seed".to_owned()]).is_err());
    }
}
