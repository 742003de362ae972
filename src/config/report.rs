//! The settings, for `check`: one a line, with where each came from.

use std::fmt::Write;

use super::setting::DefaultValue;
use super::{Origin, Settings, table};

/// Every setting on a line: name, value, origin. Secrets are `***`.
pub fn report(settings: &Settings) -> String {
    let mut text = String::new();
    for setting in table::SETTINGS {
        let (name, default) = (setting.name, setting.default);
        match settings.given.iter().find(|(given, ..)| given == name) {
            // Read for defaults of other settings only; not worth a line.
            _ if matches!(name, "HOME" | "XDG_CACHE_HOME" | "HOSTNAME") => {}
            Some((_, value, origin)) => drop(writeln!(text, "{name} = {value}  [{origin}]")),
            None if matches!(default, DefaultValue::Nothing) => {}
            None => drop(writeln!(text, "{name} = {default}  [default]")),
        }
    }
    for warning in &settings.warnings {
        let _ = writeln!(text, "warning: {warning}");
    }
    text
}

/// What was given, with secrets blanked and long values cut.
pub(super) fn given<'a>(origins: impl Iterator<Item = (&'a str, &'a str, &'a Origin)>) -> Vec<(String, String, Origin)> {
    origins.map(|(name, value, origin)| (name.to_owned(), shown(name, value), origin.clone())).collect()
}

fn shown(name: &str, value: &str) -> String {
    if table::find(name).is_some_and(|setting| setting.secret) {
        return "***".to_owned();
    }
    // A flag inside may be a secret (`--hf-token …`, `--api-key …`): show names only.
    if name == table::VLLM_EXTRA_ARGS.name {
        return value
            .split_whitespace()
            .filter_map(|word| word.strip_prefix("--")?.split('=').next())
            .map(|flag| format!("--{flag} "))
            .collect();
    }
    let line = without_credentials(&value.split_whitespace().collect::<Vec<_>>().join(" "));
    match line.char_indices().nth(200) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// A URL without the password in it.
fn without_credentials(value: &str) -> String {
    let Some((scheme, rest)) = value.split_once("://") else { return value.to_owned() };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    match authority.rfind('@') {
        Some(at) => format!("{scheme}://***{}", &rest[at..]),
        None => value.to_owned(),
    }
}
