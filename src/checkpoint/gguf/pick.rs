//! Which of several GGUF files is meant: by a file's name, by its quantization, or because there is no other.

/// A part of a set (`model-00001-of-00003.gguf`): what stands before, the number and how many there are.
fn part_of(name: &str) -> Option<(&str, &str, &str)> {
    let (rest, total) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (prefix, number) = rest.rsplit_once('-')?;
    let is_number = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    (is_number(number) && is_number(total)).then_some((prefix, number, total))
}

/// Without the number of a part and the ending.
fn stem(name: &str) -> &str {
    part_of(name).map_or_else(|| name.strip_suffix(".gguf").unwrap_or(name), |(prefix, ..)| prefix)
}

/// A file of a language model, by its path in a folder or repository: projectors of images and importance matrices lie beside some.
pub fn is_model_part(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path).to_ascii_lowercase();
    let is_safe = path.split('/').all(|part| !part.is_empty() && !part.starts_with('.')) && !path.contains('\\');
    is_safe && path.ends_with(".gguf") && !name.starts_with("mmproj") && !name.contains("imatrix") && name != super::TOKENIZER
}

/// The files that `wanted` names among `paths`, all parts of a set in order.
///
/// # Errors
/// In words that can follow "lacks" or stand alone: none, several that fit, or a part that is missing.
pub fn pick(paths: &[&str], wanted: Option<&str>) -> Result<Vec<String>, String> {
    let mut models: Vec<&str> = paths.iter().filter(|path| is_model_part(path)).map(|path| stem(path)).collect();
    models.sort_unstable();
    models.dedup();
    let fitting: Vec<&str> = match wanted {
        None => models.clone(),
        Some(wanted) => models.iter().copied().filter(|model| fits(model, wanted)).collect(),
    };
    let list = |models: &[&str]| models.iter().map(|model| format!("{model}.gguf")).collect::<Vec<_>>().join(", ");
    match (fitting.as_slice(), wanted) {
        ([one], _) => whole(paths, one),
        ([], Some(wanted)) if !models.is_empty() => Err(format!("a GGUF file {wanted:?} (there are {})", list(&models))),
        ([], _) => Err("a GGUF file".to_owned()),
        (several, _) => Err(format!(
            "a choice between its GGUF files ({}): name the file, or behind a colon its name or quantization, as in owner/repository:Q4_K_M",
            list(several)
        )),
    }
}

/// By the file's name, with or without its folder and ending, or by the quantization at the name's end.
fn fits(model: &str, wanted: &str) -> bool {
    let (model, wanted) = (model.to_ascii_lowercase(), stem(wanted).to_ascii_lowercase());
    let name = model.rsplit('/').next().unwrap_or(&model);
    let ends = |text: &str| text.strip_suffix(wanted.as_str()).is_some_and(|before| before.ends_with(['-', '.', '_']));
    model == wanted || name == wanted || ends(name)
}

fn whole(paths: &[&str], model: &str) -> Result<Vec<String>, String> {
    let mut files: Vec<&str> = paths.iter().copied().filter(|path| is_model_part(path) && stem(path) == model).collect();
    files.sort_unstable();
    let Some((prefix, _, total)) = files.first().and_then(|file| part_of(file)) else {
        return Ok(files.into_iter().take(1).map(str::to_owned).collect());
    };
    let total: usize = total.parse().unwrap_or(0);
    let all: Vec<String> = (1..=total).map(|number| format!("{prefix}-{number:05}-of-{total:05}.gguf")).collect();
    match all.iter().find(|file| !files.contains(&file.as_str())) {
        Some(lost) => Err(lost.clone()),
        None => Ok(all),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_several() {
        let paths = [
            "README.md",
            "m-Q4_K_M.gguf",
            "m-Q8_0.gguf",
            "mmproj-m-f16.gguf",
            "big/m-BF16-00001-of-00002.gguf",
            "big/m-BF16-00002-of-00002.gguf",
        ];
        let get = |wanted| pick(&paths, wanted);
        for wanted in ["Q4_K_M", "q4_k_m", "m-Q4_K_M.gguf", "m-q4_k_m"] {
            assert_eq!(get(Some(wanted)).unwrap(), ["m-Q4_K_M.gguf"], "{wanted}");
        }
        for wanted in ["BF16", "big/m-BF16-00001-of-00002.gguf", "m-BF16-00002-of-00002.gguf"] {
            assert_eq!(get(Some(wanted)).unwrap(), paths[4..], "{wanted}");
        }
        let message = get(None).unwrap_err();
        assert!(message.contains("big/m-BF16.gguf, m-Q4_K_M.gguf, m-Q8_0.gguf") && message.contains(":Q4_K_M"), "{message}");
        let message = get(Some("Q5_K_M")).unwrap_err();
        assert!(message.starts_with("a GGUF file \"Q5_K_M\" (there are big/"), "{message}");
        assert!(get(Some("K_M")).is_ok(), "what is unambiguous will do");
        assert_eq!(pick(&paths[..2], None).unwrap(), ["m-Q4_K_M.gguf"]);
        assert_eq!(pick(&paths[..5], Some("BF16")).unwrap_err(), "big/m-BF16-00002-of-00002.gguf");
        assert_eq!(pick(&["a.safetensors", "mmproj-x.gguf"], None).unwrap_err(), "a GGUF file");
    }

    #[test]
    fn paths_that_climb_are_no_models() {
        for path in ["../m.gguf", "/m.gguf", "a//m.gguf", ".hidden/m.gguf", "a\\m.gguf", "tokenizer.gguf"] {
            assert!(!is_model_part(path), "{path}");
        }
    }
}
