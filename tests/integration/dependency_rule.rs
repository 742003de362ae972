//! The dependency rule: `main → app → {runpod, server} → api → {engine, text} → models → {checkpoint, kernels}`, rightward only. `config`,
//! `error` and `telemetry` may be used by all and use none; `runpod` and `server` never see each other. `kernels` is a crate of its own: the
//! compiler keeps it from using anything here. Test code may use what it likes.

use std::path::{Path, PathBuf};

/// What each room may use.
const RULES: &[(&str, &[&str])] = &[
    ("app", &["runpod", "server", "api", "engine", "text", "models", "checkpoint", "kernels"]),
    ("runpod", &["api", "engine", "text", "models", "checkpoint", "kernels"]),
    ("server", &["api", "engine", "text", "models", "checkpoint", "kernels"]),
    ("api", &["engine", "text", "models", "checkpoint", "kernels"]),
    ("engine", &["models", "checkpoint", "kernels"]),
    ("text", &["models", "checkpoint"]),
    ("models", &["checkpoint", "kernels"]),
    ("checkpoint", &[]),
    ("config", &[]),
    ("error", &[]),
    ("telemetry", &[]),
];
const SHARED: &[&str] = &["config", "error", "telemetry"];
/// These use nothing of ours at all.
const ALONE: &[&str] = &["config", "error", "telemetry"];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// A file that holds tests alone.
fn is_test(file: &Path) -> bool {
    let name = |part: std::path::Component<'_>| part.as_os_str().to_string_lossy().into_owned();
    file.components().map(name).any(|part| part == "tests" || part.ends_with("tests.rs") || part.starts_with("golden"))
}

/// The rooms named after `crate::` anywhere in the code (`use crate::{a, b::c}` included), comments left out.
fn used_rooms(source: &str) -> Vec<String> {
    let code: String = source.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let word = |text: &str| text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut rooms = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        if code[..at].ends_with('$') || code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_') {
            continue; // `$crate::` in a macro, or another crate's name
        }
        let rest = &code[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            None => rooms.push(word(rest)),
            Some(list) => {
                let (mut depth, mut item) = (0, String::new());
                for c in list.chars() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => rooms.push(word(&std::mem::take(&mut item))),
                        _ if depth == 0 => item.push(c),
                        _ => {}
                    }
                }
                rooms.push(word(&item));
            }
        }
    }
    rooms
}

#[test]
fn rooms_use_only_what_stands_to_their_right() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    let mut breaches = Vec::new();
    let mut seen = 0;
    for file in files {
        let relative = file.strip_prefix(&root).unwrap();
        let first = relative.components().next().unwrap().as_os_str().to_string_lossy();
        let room = first.trim_end_matches(".rs").to_string();
        if room == "main" || room == "lib" || room == "kernels" || is_test(relative) {
            continue;
        }
        let Some((_, allowed)) = RULES.iter().find(|(name, _)| *name == room) else {
            breaches.push(format!("{}: the room {room} is not in the rule", relative.display()));
            continue;
        };
        let source = std::fs::read_to_string(&file).unwrap();
        for used in used_rooms(source.split("#[cfg(test)]\nmod tests {").next().unwrap()) {
            let is_room = used == "kernels" || RULES.iter().any(|(name, _)| *name == used);
            let fine =
                used == room || allowed.contains(&used.as_str()) || (SHARED.contains(&used.as_str()) && !ALONE.contains(&room.as_str()));
            if is_room {
                seen += 1;
            }
            if is_room && !fine {
                breaches.push(format!("{}: {room} uses {used}", relative.display()));
            }
        }
    }
    assert!(seen > 20, "the test read {seen} uses: it does not see the code");
    assert!(breaches.is_empty(), "{}", breaches.join("\n"));
}

#[test]
fn the_reader_sees_every_form() {
    let code =
        "use crate::api::{self, x};\nuse crate::{engine::{a, b}, models, error::Failure};\n// crate::server\nlet x = crate::config::y();";
    assert_eq!(used_rooms(code), ["api", "engine", "models", "error", "config"]);
}
