//! How large a regular expression becomes when its counted repetitions are written out. Nested ones multiply, and a few bytes of text would
//! keep a compiler busy for minutes.

/// An expression that comes to more is refused.
const MOST: u64 = 200_000;

/// Fails when the expression comes to too much. Only counts: whether it is valid is for others to say.
pub fn check(regex: &str) -> Result<(), String> {
    let size = size(regex);
    if size > MOST {
        return Err(format!("the repetitions of its expression come to {size} characters, more than the maximum of {MOST}"));
    }
    Ok(())
}

fn size(regex: &str) -> u64 {
    // The sizes of the open groups, and of the last element of each.
    let mut groups: Vec<(u64, u64)> = vec![(0, 0)];
    let mut chars = regex.chars();
    while let Some(c) = chars.next() {
        let top = groups.len() - 1;
        match c {
            '(' => groups.push((0, 0)),
            ')' if top > 0 => {
                let inner = groups[top].0;
                groups.pop();
                groups[top - 1].0 = groups[top - 1].0.saturating_add(inner);
                groups[top - 1].1 = inner;
            }
            '{' => {
                let rest = chars.as_str();
                let bounds = rest.split('}').next().unwrap_or_default();
                let count = bounds.split(',').filter_map(|bound| bound.trim().parse::<u64>().ok()).max().unwrap_or(1).max(1);
                let (sum, last) = groups[top];
                groups[top].0 = sum.saturating_add(last.saturating_mul(count - 1));
                groups[top].1 = last.saturating_mul(count);
                chars = rest.get(bounds.len() + 1..).unwrap_or_default().chars();
            }
            _ => {
                if c == '\\' {
                    chars.next();
                }
                if c == '[' {
                    skip_class(&mut chars);
                }
                groups[top].0 = groups[top].0.saturating_add(1);
                groups[top].1 = 1;
            }
        }
    }
    groups.iter().fold(0, |sum, (size, _)| sum.saturating_add(*size))
}

fn skip_class(chars: &mut std::str::Chars<'_>) {
    let mut first = true;
    while let Some(c) = chars.next() {
        match c {
            '\\' => {
                chars.next();
            }
            ']' if !first => return,
            '^' if first => continue,
            _ => {}
        }
        first = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetitions_multiply() {
        assert_eq!(size("abc"), 3);
        assert_eq!(size("a{3}b[x{9}]{2,4}"), 8);
        assert_eq!(size("((a{10}b){10}){10,}"), 1100);
        assert_eq!(size("\\{5}{"), 3);
        assert!(check("((a{1000}){1000}){1000}").is_err() && check("[a-z]{1,100000}").is_ok());
        assert!(check("(((((((((a{99999}){99999}){99999}){99999}){99999}").is_err());
    }
}
