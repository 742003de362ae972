//! Files that are made from the table: `docs/settings.md`, and the form in `.runpod/hub.json`.
//! To renew them: `UPDATE_DOCS=1 cargo test --lib config::docs`.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::policy::{self, Reason};
use super::setting::{Form, Input, Kind, Section, Setting};
use super::table;

fn path(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(file)
}

fn code(text: impl std::fmt::Display) -> String {
    format!("`{text}`")
}

/// The page of all settings and of the names that are none.
fn page() -> String {
    let mut text = String::from(
        "# Settings\n\n\
         <!-- Made from src/config/table.rs and src/config/policy.yaml: UPDATE_DOCS=1 cargo test --lib config::docs -->\n\n\
         Each setting is an environment variable and a flag. Flags beat `VLLM_EXTRA_ARGS`, which beats the file that an image brings\n\
         (`/local_model_args.json`), which beats the environment, which beats the YAML file of `VLLM_CONFIG_FILE`. Empty or `None` means\n\
         not given. A value that cannot be read stops the start and names the variable; all such errors are told at once.\n\
         `worker-candle check` shows what was resolved, and from where.\n",
    );
    let mut section = None;
    for setting in table::SETTINGS.iter().filter(|setting| setting.section != Section::System) {
        if section.replace(setting.section) != Some(setting.section) {
            let _ = writeln!(text, "\n## {}\n", setting.section.heading());
            text.push_str("| Variable (flag) | Value | Default | Meaning | Also read as |\n|---|---|---|---|---|\n");
        }
        text.push_str(&row(setting));
    }
    text.push_str("\n## Refused\n\nThese stop the start, unless unset or at one of the values in brackets.\n\n");
    text.push_str("| Variables | Why, and what to do |\n|---|---|\n");
    for reason in &policy::NAMES.refused {
        names(&mut text, reason);
    }
    text.push_str("\n## No effect here\n\nAccepted, and said once in the log.\n\n| Variables | Why |\n|---|---|\n");
    for reason in &policy::NAMES.no_effect {
        names(&mut text, reason);
    }
    text
}

fn row(setting: &Setting) -> String {
    let default = if setting.default.is_value() { code(setting.default) } else { setting.default.to_string() };
    let aliases = setting.aliases.iter().map(code).collect::<Vec<_>>().join(" ");
    let doc = setting.doc.trim().trim_end_matches('.').replace('|', "\\|");
    format!("| `{}` (`{}`) | {} | {default} | {doc} | {aliases} |\n", setting.name, policy::flag(setting.name), setting.kind)
}

fn names(text: &mut String, reason: &Reason) {
    let named = reason.names.iter().map(|name| match name.unless.as_slice() {
        [] => code(&name.name),
        unless => format!("{} ({})", code(&name.name), unless.iter().map(code).collect::<Vec<_>>().join(", ")),
    });
    let _ = writeln!(text, "| {} | {} |", named.collect::<Vec<_>>().join(", "), reason.why);
}

/// One field of the Hub's form.
fn field(setting: &Setting, form: &Form) -> Value {
    let filled = form.filled.map_or_else(|| shown_default(setting), str::to_owned);
    let (kind, default) = match form.input {
        Input::Text | Input::Options(_) => ("string", json!(filled)),
        Input::Model => ("huggingface", json!(filled)),
        Input::Switch => ("boolean", json!(filled == "true")),
        Input::Number { .. } => ("number", number(filled.parse().expect("a number"))),
    };
    let mut input = json!({ "name": form.label, "type": kind, "description": form.help, "default": default });
    match form.input {
        Input::Number { least, most } => {
            input["min"] = number(least);
            most.into_iter().for_each(|most| input["max"] = number(most));
        }
        Input::Switch => {
            input["trueValue"] = json!("true");
            input["falseValue"] = json!("false");
        }
        Input::Options(options) => {
            input["options"] = options.iter().map(|(label, value)| json!({ "label": label, "value": value })).collect();
        }
        Input::Text | Input::Model => {}
    }
    input["required"] = json!(form.required);
    if form.advanced {
        input["advanced"] = json!(true);
    }
    json!({ "key": setting.name, "input": input })
}

/// What stands in a field that nothing else is said of: the default, or the word for "decide yourself", or nothing.
fn shown_default(setting: &Setting) -> String {
    match setting.kind {
        _ if setting.default.is_value() => setting.default.to_string(),
        Kind::Count { auto: [word, ..], .. } if setting.default.to_string().starts_with(word) => (*word).to_owned(),
        _ => String::new(),
    }
}

fn number(value: f64) -> Value {
    if value.fract() == 0.0 { json!(value as i64) } else { json!(value) }
}

fn form() -> Vec<Value> {
    table::SETTINGS.iter().filter_map(|setting| Some(field(setting, setting.form.as_ref()?))).collect()
}

/// `hub.json` with this form, a field on each line.
fn with_form(hub: &str, form: &[Value]) -> String {
    let (before, rest) = hub.split_once("\"env\": [\n").expect("the form begins");
    let (_, after) = rest.split_once("\n    ]").expect("the form ends");
    let lines: Vec<String> = form.iter().map(|field| format!("      {field}")).collect();
    format!("{before}\"env\": [\n{}\n    ]{after}", lines.join(",\n"))
}

fn keep(file: &str, wanted: &str, same: impl Fn(&str) -> bool) {
    let path = path(file);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        std::fs::write(path, wanted).expect(file);
    } else {
        let there = std::fs::read_to_string(path).unwrap_or_default();
        assert!(same(&there), "{file} differs from the table of settings: UPDATE_DOCS=1 cargo test --lib config::docs");
    }
}

#[test]
fn the_page_is_in_step() {
    let page = page();
    keep("docs/settings.md", &page, |there| there == page);
}

#[test]
fn the_form_is_in_step() {
    let hub = std::fs::read_to_string(path(".runpod/hub.json")).expect("hub.json");
    let form = form();
    let fields = |hub: &str| serde_json::from_str::<Value>(hub).map(|hub| hub["config"]["env"].clone()).ok();
    keep(".runpod/hub.json", &with_form(&hub, &form), |there| fields(there) == Some(Value::Array(form.clone())));
}

/// What `check`, the page and the form show as the default is what holds: typing it changes nothing.
#[test]
fn defaults_are_what_they_say() {
    for setting in table::SETTINGS.iter().filter(|setting| setting.default.is_value()) {
        let typed = setting.default.to_string();
        let read = setting.kind.read(&typed).unwrap_or_else(|wrong| panic!("{}: {wrong}", setting.name));
        assert!(read.is_some() || typed == "auto", "{}", setting.name);
    }
}
