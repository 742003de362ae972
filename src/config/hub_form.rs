//! The Hub's files against the platform's rules, and against the policy: the form offers nothing that does not work.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::policy::{self, Verdict};
use super::{Args, ConfigSources, Settings};

const POOLS: &[&str] = &["AMPERE_16", "AMPERE_24", "ADA_24", "AMPERE_48", "ADA_48_PRO", "AMPERE_80", "ADA_80_PRO", "HOPPER_141"];

fn read(file: &str) -> Value {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{file}: {error}"));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{file}: {error}"))
}

fn only(object: &Map<String, Value>, known: &[&str], place: &str) {
    for key in object.keys() {
        assert!(known.contains(&key.as_str()), "{place} has the unknown key {key}");
    }
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().filter(|text| !text.is_empty()).unwrap_or_else(|| panic!("{key} must be a text in {value}"))
}

/// A value as it reaches the container.
fn spelled(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn works(name: &str) -> bool {
    matches!(policy::find(name), Some(Verdict::Works(_)))
}

/// Settings of these variables, which must be without mistakes and warnings.
fn settings(variables: &[(String, String)]) -> Settings {
    let variables: Vec<_> = variables.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let args = Args::parse_argv(["worker-candle"]).unwrap_or_else(|error| panic!("{error}"));
    let settings = Settings::resolve(&args, &ConfigSources::of(&variables)).unwrap_or_else(|mistakes| panic!("{mistakes:?}"));
    assert!(settings.warnings.is_empty(), "{:?}", settings.warnings);
    settings
}

fn check_input(key: &str, input: &Value) {
    let object = input.as_object().unwrap_or_else(|| panic!("{key}: input must be an object"));
    let common = ["name", "type", "description", "default", "required", "advanced"];
    let kind = text(input, "type");
    let extra: &[&str] = match kind {
        "string" => &["options"],
        "number" => &["min", "max"],
        "boolean" => &["trueValue", "falseValue"],
        "huggingface" => &[],
        other => panic!("{key}: type {other}"),
    };
    only(object, &[&common[..], extra].concat(), key);
    text(input, "name");
    text(input, "description");
    let default = &input["default"];
    let fits = match kind {
        "number" => default.is_number(),
        "boolean" => default.is_boolean(),
        _ => default.is_string(),
    };
    assert!(fits, "{key}: the default {default} is no {kind}");
    if let Some(options) = input["options"].as_array() {
        assert!(options.iter().any(|option| option["value"] == *default), "{key}: the default is none of the options");
        for option in options {
            text(option, "label");
            settings(&[(key.to_owned(), text(option, "value").to_owned())]);
        }
    }
    for bound in ["min", "max"].iter().filter_map(|bound| object.get(*bound)) {
        settings(&[(key.to_owned(), spelled(bound))]);
    }
}

#[test]
fn the_form() {
    let hub = read(".runpod/hub.json");
    only(hub.as_object().expect("an object"), &["title", "description", "type", "category", "iconUrl", "config"], "hub.json");
    text(&hub, "title");
    text(&hub, "description");
    assert_eq!(hub["type"], "serverless");
    assert!(["audio", "embedding", "language", "video", "image"].contains(&text(&hub, "category")));
    let config = &hub["config"];
    let known = ["runsOn", "endpointType", "containerDiskInGb", "cpuFlavor", "gpuCount", "gpuIds", "allowedCudaVersions", "env", "presets"];
    only(config.as_object().expect("an object"), &known, "config");
    assert_eq!(config["runsOn"], "GPU");
    assert!(config["containerDiskInGb"].as_u64().is_some_and(|size| size >= 10));
    assert!(config["gpuCount"].as_u64().is_some_and(|count| count == 1));
    for pool in text(config, "gpuIds").split(',').filter(|pool| !pool.starts_with('-')) {
        assert!(POOLS.contains(&pool), "{pool} is not a pool");
    }
    assert!(config["allowedCudaVersions"].as_array().is_some_and(|versions| versions.iter().all(Value::is_string)));

    let mut keys = BTreeSet::new();
    let mut defaults = Vec::new();
    for entry in config["env"].as_array().expect("a list") {
        let key = text(entry, "key");
        assert!(works(key), "{key} is in the form, and does not work");
        assert!(keys.insert(key), "{key} is in the form twice");
        only(entry.as_object().expect("an object"), &["key", "value", "input"], key);
        match (entry.get("value"), entry.get("input")) {
            (Some(value), None) => defaults.push((key.to_owned(), spelled(value))),
            (None, Some(input)) => {
                check_input(key, input);
                defaults.push((key.to_owned(), spelled(&input["default"])));
            }
            _ => panic!("{key} needs either a value or an input"),
        }
    }
    // The form as it stands is a good start, and so is each preset on it.
    assert_eq!(settings(&defaults).model, super::defaults::MODEL);
    for preset in config["presets"].as_array().expect("a list") {
        only(preset.as_object().expect("an object"), &["name", "defaults"], "preset");
        text(preset, "name");
        for (key, value) in preset["defaults"].as_object().expect("an object") {
            assert!(keys.contains(key.as_str()), "preset key {key} is not in the form");
            settings(&[(key.clone(), spelled(value))]);
        }
    }
}

#[test]
fn the_hub_s_tests() {
    let tests = read(".runpod/tests.json");
    only(tests.as_object().expect("an object"), &["tests", "config"], "tests.json");
    let mut names = BTreeSet::new();
    for test in tests["tests"].as_array().expect("a list") {
        only(test.as_object().expect("an object"), &["name", "input", "timeout"], "test");
        assert!(names.insert(text(test, "name")), "a name stands twice");
        assert!(test["input"].is_object());
        // A cold start is part of the time.
        assert!(test["timeout"].as_u64().is_some_and(|milliseconds| milliseconds >= 300_000), "{test}");
    }
    assert!(!names.is_empty());
    let config = &tests["config"];
    only(config.as_object().expect("an object"), &["gpuTypeId", "gpuCount", "cpuFlavor", "env", "allowedCudaVersions"], "config");
    assert!(text(config, "gpuTypeId").starts_with("NVIDIA "), "a GPU's full name");
    assert_eq!(config["allowedCudaVersions"], read(".runpod/hub.json")["config"]["allowedCudaVersions"]);
    let env = config["env"].as_array().expect("a list");
    let variables: Vec<_> = env.iter().map(|entry| (text(entry, "key").to_owned(), text(entry, "value").to_owned())).collect();
    assert!(variables.iter().all(|(name, _)| works(name)));
    settings(&variables);
}

#[test]
fn the_job_to_try() {
    let job = read("test_input.json");
    assert!(job["input"].is_object());
    only(job.as_object().expect("an object"), &["input", "id"], "test_input.json");
}

/// The root's copy is the same file.
#[test]
fn one_form() {
    assert_eq!(read("hub.json"), read(".runpod/hub.json"));
}

/// `ENV` of each image that the Dockerfile makes, by the image's name.
fn image_variables() -> Vec<(String, Vec<(String, String)>)> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("Dockerfile");
    let text = std::fs::read_to_string(path).expect("Dockerfile").replace("\\\n", " ");
    let mut stages = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["FROM", _, "AS", name] => stages.push((name.to_owned(), Vec::new())),
            ["ENV", ref pairs @ ..] => {
                let pairs = pairs.iter().filter_map(|pair| pair.split_once('=')).map(|(name, value)| (name.to_owned(), value.to_owned()));
                stages.last_mut().expect("a stage").1.extend(pairs);
            }
            _ => {}
        }
    }
    stages.retain(|(name, _)| matches!(name.as_str(), "cpu" | "cuda"));
    stages
}

/// With neither a queue nor a PORT of the platform's, the image serves HTTP where load balancing looks.
#[test]
fn the_images_serve_http() {
    let images = image_variables();
    assert_eq!(images.len(), 2);
    for (name, variables) in images {
        assert_eq!(settings(&variables).server.port, Some(80), "{name}");
    }
}

#[test]
fn caches_of_image_builds_are_told_apart_and_locked() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("Dockerfile");
    let text = std::fs::read_to_string(path).expect("Dockerfile");
    let mounts: Vec<&str> = text.split_whitespace().filter(|word| word.starts_with("--mount=type=cache")).collect();
    assert_eq!(mounts.len(), 4);
    for mount in &mounts {
        assert!(mount.contains("sharing=locked") && mount.contains("id=") && mount.contains("${TARGETARCH}${TARGETVARIANT}"), "{mount}");
    }
    let of_targets: BTreeSet<&str> = mounts.iter().copied().filter(|mount| mount.contains("target=/src/target")).collect();
    assert_eq!(of_targets.len(), 2, "each image builds in a folder of its own");
}
