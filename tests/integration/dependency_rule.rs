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

/// The paths in the `use` declarations of a file, lists taken apart: `a::{b, c::{d}}` is `a::b` and `a::c::d`.
fn used_paths(source: &str) -> Vec<String> {
    fn expand(prefix: &str, tree: &str, paths: &mut Vec<String>) {
        let Some((head, list)) = tree.trim().split_once('{') else { return paths.push(format!("{prefix}{}", tree.trim())) };
        let prefix = format!("{prefix}{}", head.trim());
        let (mut depth, mut item) = (0, String::new());
        for c in list.chars() {
            match c {
                '}' if depth == 0 => break,
                ',' if depth == 0 => expand(&prefix, &std::mem::take(&mut item), paths),
                _ => {
                    depth += i32::from(c == '{') - i32::from(c == '}');
                    item.push(c);
                }
            }
        }
        expand(&prefix, &item, paths);
    }
    let mut paths = Vec::new();
    for statement in source.split("\nuse ").skip(1) {
        expand("", statement.split(';').next().unwrap(), &mut paths);
    }
    paths
}

/// Files of the API by the path of their module, and the files that each uses.
#[test]
fn files_of_the_api_do_not_use_each_other_in_circles() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root.join("api"), &mut files);
    let module = |file: &Path| {
        let name = file.strip_prefix(&root).unwrap().with_extension("").to_string_lossy().replace('/', "::");
        format!("crate::{}", name.strip_suffix("::mod").unwrap_or(&name))
    };
    let files: Vec<(String, String)> = files
        .iter()
        .filter(|file| !is_test(file.strip_prefix(&root).unwrap()))
        .map(|file| (module(file), std::fs::read_to_string(file).unwrap()))
        .collect();
    // The longest module's name that the path begins with is the file that it leads to.
    let file_of = |path: &str| {
        let leads = |name: &str| path.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"));
        (0..files.len()).filter(|&i| leads(&files[i].0)).max_by_key(|&i| files[i].0.len())
    };
    let code = |source: &str| format!("\n{}", source.split("#[cfg(test)]\nmod tests {").next().unwrap());
    let mut uses: Vec<Vec<usize>> =
        files.iter().map(|(_, source)| used_paths(&code(source)).iter().filter_map(|path| file_of(path)).collect()).collect();
    assert!(uses.iter().map(Vec::len).sum::<usize>() > 50, "the test does not see the code");
    // Files that use none of those left are taken away, until none is left or every one that is uses another.
    let mut left: Vec<usize> = (0..files.len()).collect();
    loop {
        let before = left.len();
        uses.iter_mut().enumerate().for_each(|(file, used)| used.retain(|other| *other != file && left.contains(other)));
        left.retain(|&file| !uses[file].is_empty());
        if left.len() == before {
            break;
        }
    }
    let names: Vec<&str> = left.iter().map(|&file| files[file].0.as_str()).collect();
    assert!(left.is_empty(), "these use each other in a circle, or one that does: {names:?}");
}

#[test]
fn the_reader_sees_every_form() {
    assert_eq!(used_paths("\nuse a::{b, c::{d, e}, f};\nuse g;"), ["a::b", "a::c::d", "a::c::e", "a::f", "g"]);
    let code =
        "use crate::api::{self, x};\nuse crate::{engine::{a, b}, models, error::Failure};\n// crate::server\nlet x = crate::config::y();";
    assert_eq!(used_rooms(code), ["api", "engine", "models", "error", "config"]);
}
