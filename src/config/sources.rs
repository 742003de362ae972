//! Where settings come from, weakest first: a YAML file, the environment, the file baked into an image, `VLLM_EXTRA_ARGS`, flags.
//! All go through the policy, and what is left is read by the table of settings, as if it were an environment.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use yaml_rust2::{Yaml, YamlLoader};

use super::given::Given;
use super::policy::{self, Verdict};
use super::{Args, ConfigError, cli, defaults, parse, table};

/// Where settings come from beside the command line; tests bring their own.
#[derive(Clone)]
pub struct ConfigSources {
    pub variables: Vec<(String, String)>,
    /// Settings baked into an image: a JSON object.
    pub baked: PathBuf,
    /// YAML settings when `VLLM_CONFIG_FILE` names none.
    pub config_file: PathBuf,
}

impl ConfigSources {
    pub fn of_process() -> Self {
        // Variables that are not UTF-8 cannot be settings of ours: skipped, where `std::env::vars` would panic.
        let variables = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        Self { variables: variables.collect(), baked: "/local_model_args.json".into(), config_file: defaults::CONFIG_FILE.into() }
    }

    /// These variables and no files.
    pub fn of(variables: &[(&str, &str)]) -> Self {
        let variables = variables.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        Self { variables, baked: PathBuf::new(), config_file: PathBuf::new() }
    }

    fn variable(&self, name: &str) -> Option<&str> {
        let (_, value) = self.variables.iter().find(|(known, _)| known == name)?;
        Some(value.as_str()).filter(|value| !parse::unset(value))
    }
}

/// What said so.
#[derive(Debug, Clone, PartialEq)]
pub enum Origin {
    File(PathBuf),
    /// The variable as typed, which may be an alias.
    Environment(String),
    ExtraArgs,
    Flag,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::File(path) => write!(f, "file {}", path.display()),
            Origin::Environment(name) => write!(f, "env {name}"),
            Origin::ExtraArgs => f.write_str("VLLM_EXTRA_ARGS"),
            Origin::Flag => f.write_str("flag"),
        }
    }
}

/// One source: names as typed, with their values.
struct Layer {
    origin: Box<dyn Fn(&str) -> Origin>,
    pairs: Vec<(String, String)>,
    /// Names that are no setting are someone else's, not a mistake.
    open: bool,
}

/// All sources laid over each other.
#[derive(Default)]
pub struct Merged {
    /// By canonical name.
    values: BTreeMap<String, (String, Origin)>,
    no_effect: BTreeMap<&'static str, BTreeSet<String>>,
    pub warnings: Vec<String>,
    pub errors: Vec<ConfigError>,
}

impl Merged {
    pub fn read(args: &Args, sources: &ConfigSources) -> Self {
        let mut merged = Self::default();
        for layer in merged.layers(args, sources) {
            merged.lay(layer);
        }
        merged.no_effect_warnings();
        merged
    }

    /// The values of what was given.
    pub fn given(&mut self) -> Given {
        let variables = self.values.iter().map(|(name, (typed, _))| (name.clone(), typed.clone()));
        let given: Given = envy::from_iter(variables).unwrap_or_else(|error| {
            self.errors.push(ConfigError::new("environment", error.to_string()));
            Given::default()
        });
        for (name, wrong) in &given.wrong {
            self.refuse(name, wrong);
        }
        given
    }

    /// Adds an error under the name that the user knows.
    pub fn refuse(&mut self, name: &str, message: impl Into<String>) {
        self.errors.push(ConfigError::new(self.typed_name(name), message));
    }

    pub fn origins(&self) -> impl Iterator<Item = (&str, &str, &Origin)> {
        self.values.iter().map(|(name, (value, origin))| (name.as_str(), value.as_str(), origin))
    }

    /// How the user knows a setting: `--seed`, `RANDOM_SEED`, `SEED in /x.yaml`.
    pub fn typed_name(&self, name: &str) -> String {
        match self.values.get(name) {
            Some((_, Origin::Flag)) => policy::flag(name),
            Some((_, Origin::Environment(typed))) => typed.clone(),
            Some((_, Origin::ExtraArgs)) => format!("{} in VLLM_EXTRA_ARGS", policy::flag(name)),
            Some((_, Origin::File(path))) => format!("{name} in {}", path.display()),
            None => name.to_owned(),
        }
    }

    /// Whether a setting's value comes from the environment.
    pub fn is_variable(&self, name: &str) -> bool {
        matches!(self.values.get(name), Some((_, Origin::Environment(_))))
    }

    /// The sources, weakest first.
    fn layers(&mut self, args: &Args, sources: &ConfigSources) -> Vec<Layer> {
        let flags = flags(args);
        let find = |name: &str| {
            let flag = flags.iter().rev().find(|(known, value)| known == name && !parse::unset(value));
            flag.map(|(_, value)| value.clone()).or_else(|| sources.variable(name).map(str::to_owned))
        };
        let extra = find(table::VLLM_EXTRA_ARGS.name);
        let mut layers = Vec::new();
        if let Some((path, pairs)) = self.config_file(find(table::VLLM_CONFIG_FILE.name), sources) {
            layers.push(file_layer(path, pairs));
        }
        layers.push(Layer { origin: Box::new(|name| Origin::Environment(name.to_owned())), pairs: sources.variables.clone(), open: true });
        if let Some(mut pairs) = self.baked(&sources.baked) {
            // A baked image brings its model: looking on the network would only cost time.
            pairs.push((table::HF_HUB_OFFLINE.name.to_owned(), "true".to_owned()));
            layers.push(file_layer(sources.baked.clone(), pairs));
        }
        if let Some(extra) = extra {
            match shlex::split(&extra).ok_or_else(|| "a quote is not closed".to_owned()).and_then(|words| cli::pairs(&words)) {
                Ok(pairs) => layers.push(Layer { origin: Box::new(|_| Origin::ExtraArgs), pairs, open: false }),
                Err(why) => {
                    self.errors.push(ConfigError::new(table::VLLM_EXTRA_ARGS.name, format!("{why}; write flags as for `vllm serve`")))
                }
            }
        }
        layers.push(Layer { origin: Box::new(|_| Origin::Flag), pairs: flags, open: false });
        layers
    }

    fn config_file(&mut self, named: Option<String>, sources: &ConfigSources) -> Option<(PathBuf, Vec<(String, String)>)> {
        let path = match named {
            Some(path) => PathBuf::from(path),
            None if sources.config_file.is_file() => sources.config_file.clone(),
            None => return None,
        };
        match std::fs::read_to_string(&path).map_err(|error| error.to_string()).and_then(|text| yaml_pairs(&text)) {
            Ok(pairs) => Some((path, pairs)),
            Err(why) => {
                self.errors.push(ConfigError::new(table::VLLM_CONFIG_FILE.name, format!("{}: {why}", path.display())));
                None
            }
        }
    }

    fn baked(&mut self, path: &Path) -> Option<Vec<(String, String)>> {
        if !path.is_file() {
            return None;
        }
        let object = std::fs::read_to_string(path)
            .map_err(|error| error.to_string())
            .and_then(|text| serde_json::from_str::<serde_json::Map<String, Value>>(&text).map_err(|error| error.to_string()));
        match object {
            Ok(object) => {
                Some(object.into_iter().filter_map(|(name, value)| Some((policy::variable(&name), parse::spelled(value)?))).collect())
            }
            Err(why) => {
                self.errors.push(ConfigError::new(path.display().to_string(), format!("not a JSON object of settings: {why}")));
                None
            }
        }
    }

    /// Lays one source over what is there. Within a source the name itself comes before its other spellings, and those in the table's
    /// order.
    fn lay(&mut self, layer: Layer) {
        let mut given: BTreeMap<&'static str, (usize, String, String)> = BTreeMap::new();
        for (typed, value) in layer.pairs.into_iter().filter(|(_, value)| !parse::unset(value)) {
            let origin = (layer.origin)(&typed);
            let (name, rank) = match policy::find(&typed) {
                Some(Verdict::Works(setting)) => (setting.name, 0),
                // Too common a word to take it from the environment.
                Some(Verdict::Alias(_)) if typed == "CONFIG" && layer.open => continue,
                Some(Verdict::Alias(of)) => (of.name, 1 + of.aliases.iter().position(|alias| *alias == typed).unwrap_or_default()),
                Some(Verdict::Refused { unless, why, .. }) => {
                    if !policy::harmless(&value, unless) {
                        self.errors.push(ConfigError::new(as_written(&typed, &origin), why));
                    }
                    continue;
                }
                Some(Verdict::NoEffect { why, .. }) => {
                    self.no_effect.entry(why).or_default().insert(typed);
                    continue;
                }
                None if layer.open => continue,
                None => {
                    self.errors
                        .push(ConfigError::new(as_written(&typed, &origin), "not a setting of this worker; see `worker-candle --help`"));
                    continue;
                }
            };
            // Of two equal spellings the later counts: flags may be repeated.
            let stays = given.get(name).is_some_and(|(known, ..)| *known < rank);
            let loser = if stays { Some((rank, typed, value)) } else { given.insert(name, (rank, typed, value)) };
            if let (Some((_, loser, lost)), Some((_, winner, kept))) = (loser, given.get(name))
                && loser != *winner
                && lost != *kept
            {
                self.warnings.push(format!("{loser} is not used: {winner} says otherwise"));
            }
        }
        for (name, (_, typed, value)) in given {
            self.values.insert(name.to_owned(), (value, (layer.origin)(&typed)));
        }
    }

    fn no_effect_warnings(&mut self) {
        for (why, names) in &self.no_effect {
            self.warnings.push(format!("no effect here: {} ({why})", names.iter().cloned().collect::<Vec<_>>().join(", ")));
        }
    }
}

fn as_written(name: &str, origin: &Origin) -> String {
    match origin {
        Origin::Flag => policy::flag(name),
        Origin::Environment(_) => name.to_owned(),
        Origin::ExtraArgs => format!("{} in VLLM_EXTRA_ARGS", policy::flag(name)),
        Origin::File(path) => format!("{name} in {}", path.display()),
    }
}

fn file_layer(path: PathBuf, pairs: Vec<(String, String)>) -> Layer {
    Layer { origin: Box::new(move |_| Origin::File(path.clone())), pairs, open: false }
}

/// The settings that came as flags, by the variable's name.
pub fn flags(args: &Args) -> Vec<(String, String)> {
    args.flags.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).chain(args.foreign.iter().cloned()).collect()
}

/// The settings of a YAML file: a mapping of flag names to values. Lists and mappings become JSON.
fn yaml_pairs(text: &str) -> Result<Vec<(String, String)>, String> {
    let documents = YamlLoader::load_from_str(text).map_err(|error| format!("not valid YAML: {error}"))?;
    let mapping = match documents.first() {
        None | Some(Yaml::Null) => return Ok(Vec::new()),
        Some(Yaml::Hash(mapping)) if documents.len() == 1 => mapping,
        _ => return Err("must be one mapping of settings to values".to_owned()),
    };
    let mut pairs = Vec::new();
    for (key, value) in mapping {
        let Some(key) = key.as_str() else { return Err("keys must be names of settings".to_owned()) };
        if let Some(value) = parse::spelled(yaml_value(value).ok_or_else(|| format!("{key}: a value of this kind is not read"))?) {
            pairs.push((policy::variable(key), value));
        }
    }
    Ok(pairs)
}

fn yaml_value(value: &Yaml) -> Option<Value> {
    Some(match value {
        Yaml::Null => Value::Null,
        Yaml::Boolean(value) => Value::Bool(*value),
        Yaml::Integer(value) => Value::from(*value),
        // As typed: 0.9 stays 0.9.
        Yaml::Real(value) => serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.clone())),
        Yaml::String(value) => Value::String(value.clone()),
        Yaml::Array(values) => Value::Array(values.iter().map(yaml_value).collect::<Option<_>>()?),
        Yaml::Hash(mapping) => {
            Value::Object(mapping.iter().map(|(key, value)| Some((key.as_str()?.to_owned(), yaml_value(value)?))).collect::<Option<_>>()?)
        }
        Yaml::Alias(_) | Yaml::BadValue => return None,
    })
}
