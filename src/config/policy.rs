//! What becomes of every setting that the reference workers and engines know.
//!
//! A name *works* (a row of [`table`]), is another spelling of one that works, is *refused* unless its value asks for what happens
//! anyway, or has *no effect here*, which is said once at start. The last two are data: `policy.yaml`.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use yaml_rust2::{Yaml, YamlLoader};

use super::setting::Setting;
use super::{parse, table};

/// What becomes of a name. A switch takes no value as a flag.
#[derive(Debug, Clone, Copy)]
pub enum Verdict {
    Works(&'static Setting),
    /// Another spelling of a name that works.
    Alias(&'static Setting),
    /// Stops the start, except with one of the values `unless` (booleans in any spelling; case does not matter).
    Refused {
        unless: &'static [String],
        why: &'static str,
        switch: bool,
    },
    /// Accepted and without effect.
    NoEffect {
        why: &'static str,
        switch: bool,
    },
}

/// Names that are refused or have no effect, by reason.
#[derive(Debug, Default)]
pub struct Names {
    pub refused: Vec<Reason>,
    pub no_effect: Vec<Reason>,
}

/// Names that share a reason.
#[derive(Debug)]
pub struct Reason {
    pub why: String,
    pub names: Vec<Name>,
}

#[derive(Debug)]
pub struct Name {
    pub name: String,
    /// Values that are no reason to refuse it.
    pub unless: Vec<String>,
    /// As a flag it takes no value.
    pub switch: bool,
}

/// The names of `policy.yaml`. That the file can be read is a test's business; a build without it would know fewer names.
pub static NAMES: LazyLock<Names> = LazyLock::new(|| read(FILE).unwrap_or_default());

const FILE: &str = include_str!("policy.yaml");

/// Names that work and their other spellings.
static OWN: LazyLock<BTreeMap<&'static str, Verdict>> = LazyLock::new(|| own().collect());

static VERDICTS: LazyLock<BTreeMap<&'static str, Verdict>> = LazyLock::new(|| entries().collect());

fn read(text: &str) -> Option<Names> {
    let documents = YamlLoader::load_from_str(text).ok()?;
    let reasons = |key: &str| documents.first()?[key].as_vec()?.iter().map(reason).collect::<Option<_>>();
    Some(Names { refused: reasons("refused")?, no_effect: reasons("no_effect")? })
}

fn reason(entry: &Yaml) -> Option<Reason> {
    let names: Option<_> = match &entry["names"] {
        Yaml::Hash(names) => names.iter().map(|(name, unless)| refused_name(name, unless)).collect(),
        Yaml::Array(names) => names.iter().map(idle_name).collect(),
        _ => None,
    };
    Some(Reason { why: entry["why"].as_str()?.to_owned(), names: names? })
}

fn refused_name(name: &Yaml, unless: &Yaml) -> Option<Name> {
    let unless: Vec<String> = unless.as_vec()?.iter().map(|value| Some(value.as_str()?.to_owned())).collect::<Option<_>>()?;
    let switch = unless.first().is_some_and(|first| matches!(first.as_str(), "true" | "false"));
    Some(Name { name: name.as_str()?.to_owned(), unless, switch })
}

fn idle_name(name: &Yaml) -> Option<Name> {
    let name = name.as_str()?;
    Some(Name { name: name.trim_end_matches('!').to_owned(), unless: Vec::new(), switch: name.ends_with('!') })
}

/// What becomes of `name`, an environment variable's spelling; `None` when it is not a setting at all.
pub fn find(name: &str) -> Option<Verdict> {
    // Most variables of a process are nobody's settings: the file is parsed, which costs a start a millisecond, once it names one.
    OWN.get(name).or_else(|| if is_in_file(name) { VERDICTS.get(name) } else { None }).copied()
}

/// The file holds this name as a whole word.
fn is_in_file(name: &str) -> bool {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    !name.is_empty()
        && FILE.match_indices(name).any(|(at, _)| !FILE[..at].ends_with(is_word) && !FILE[at + name.len()..].starts_with(is_word))
}

fn own() -> impl Iterator<Item = (&'static str, Verdict)> {
    let settings = || table::SETTINGS.iter().copied();
    let works = settings().map(|setting| (setting.name, Verdict::Works(setting)));
    works.chain(settings().flat_map(|setting| setting.aliases.iter().map(move |alias| (*alias, Verdict::Alias(setting)))))
}

/// Every name with its verdict.
pub fn entries() -> impl Iterator<Item = (&'static str, Verdict)> {
    let named = |reasons: &'static [Reason]| reasons.iter().flat_map(|reason| reason.names.iter().map(move |name| (reason, name)));
    let refused = named(&NAMES.refused)
        .map(|(reason, Name { name, unless, switch })| (name.as_str(), Verdict::Refused { unless, why: &reason.why, switch: *switch }));
    let no_effect = named(&NAMES.no_effect)
        .map(|(reason, Name { name, switch, .. })| (name.as_str(), Verdict::NoEffect { why: &reason.why, switch: *switch }));
    own().chain(refused).chain(no_effect)
}

/// True when a value asks for nothing else than what happens anyway.
pub fn harmless(value: &str, unless: &[String]) -> bool {
    let boolean = parse::boolean(value);
    unless.iter().any(|known| known.eq_ignore_ascii_case(value.trim()) || (boolean.is_some() && parse::boolean(known) == boolean))
}

/// The flag of a setting: `MAX_MODEL_LEN` → `--max-model-len`.
pub fn flag(name: &str) -> String {
    format!("--{}", name.to_ascii_lowercase().replace('_', "-"))
}

/// The variable of a flag: `--max_model_len`, `max-model-len` → `MAX_MODEL_LEN`.
pub fn variable(flag: &str) -> String {
    flag.trim_start_matches('-').to_ascii_uppercase().replace('-', "_")
}
