//! What the documents say of files is true.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Names in a folder, without what the tests make there themselves.
fn names(folder: &str) -> Vec<String> {
    let made = [".venv", "node_modules", "__pycache__", ".pytest_cache", "README.md"];
    let names = fs::read_dir(root().join(folder)).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| !made.contains(&name.as_str())).collect()
}

#[test]
fn every_file_of_the_black_box_tests_is_named() {
    let readme = read("handler-tests/README.md");
    let folders = ["harness", "clients", "node", "workers", "fixtures"];
    let inside =
        folders.iter().flat_map(|folder| names(&format!("handler-tests/{folder}")).into_iter().map(move |name| format!("{folder}/{name}")));
    let top = names("handler-tests").into_iter().filter(|name| !folders.contains(&name.as_str()));
    let missing: Vec<String> = top.chain(inside).filter(|name| !readme.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "handler-tests/README.md does not name {missing:?}");
}

#[test]
fn the_readme_is_one_page_and_its_links_lead_somewhere() {
    assert!(read("README.md").len() <= 12 * 1024, "the README is longer than 12 KB: the rest belongs into docs/");
    let docs = fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    for document in docs.chain([root().join("README.md")]).filter(|path| path.extension().is_some_and(|end| end == "md")) {
        let text = fs::read_to_string(&document).unwrap();
        let targets = text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target);
        for target in targets.filter(|target| !target.contains("://") && !target.starts_with('#')) {
            let file: PathBuf = document.parent().unwrap().join(target.split('#').next().unwrap());
            assert!(file.exists(), "{} links to {target}, which is not there", document.display());
        }
    }
}
