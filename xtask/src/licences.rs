//! Whether every dependency's licence allows shipping it under ours (MIT OR Apache-2.0).

use crate::Outcome;
use crate::run::{cargo, output};

/// Licences that ask for no more than naming the authors.
const ALLOWED: [&str; 11] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Fails with the list of dependencies that may not be shipped.
pub(crate) fn check() -> Outcome {
    let tree = output(cargo(&[
        "tree",
        "--workspace",
        "--locked",
        "--edges",
        "normal,build",
        "--prefix",
        "none",
        "--format",
        "{p}|{l}",
    ]))?;
    let mut refused: Vec<&str> = tree.lines().filter(|line| !line_is_fine(line)).collect();
    refused.sort_unstable();
    refused.dedup();
    if refused.is_empty() {
        Ok(())
    } else {
        Err(format!("licences that nobody allowed:\n  {}", refused.join("\n  ")))
    }
}

/// A line is `name version (where)|EXPRESSION`, with ` (*)` behind it when seen before.
fn line_is_fine(line: &str) -> bool {
    let Some((_, expression)) = line.split_once('|') else { return line.trim().is_empty() };
    is_allowed(expression.trim_end_matches("(*)").trim())
}

/// Evaluates an SPDX expression: one side of each OR is enough, both of each AND are needed.
fn is_allowed(expression: &str) -> bool {
    // Old manifests write `/` for OR.
    let expression = expression.replace('/', " OR ");
    if let Some(sides) = split_outside(&expression, " OR ") {
        return sides.iter().any(|side| is_allowed(side));
    }
    if let Some(sides) = split_outside(&expression, " AND ") {
        return sides.iter().all(|side| is_allowed(side));
    }
    let plain = expression.trim();
    match plain.strip_prefix('(').and_then(|inner| inner.strip_suffix(')')) {
        Some(inner) => is_allowed(inner),
        None => ALLOWED.contains(&plain.split_whitespace().collect::<Vec<_>>().join(" ").as_str()),
    }
}

/// Splits at `word` where no parenthesis is open; nothing where it does not occur there.
fn split_outside(expression: &str, word: &str) -> Option<Vec<String>> {
    let mut parts = vec![String::new()];
    let mut depth = 0_i32;
    for (at, character) in expression.char_indices() {
        depth += i32::from(character == '(') - i32::from(character == ')');
        let last = parts.last_mut()?;
        last.push(character);
        if depth == 0 && expression[..at + character.len_utf8()].ends_with(word) {
            last.truncate(last.len() - word.len());
            parts.push(String::new());
        }
    }
    (parts.len() > 1).then_some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_evaluated() {
        assert!(is_allowed("MIT OR Apache-2.0"));
        assert!(is_allowed("MIT/Apache-2.0"));
        assert!(is_allowed("(MIT OR GPL-3.0) AND Unicode-3.0"));
        assert!(is_allowed("Apache-2.0 WITH LLVM-exception OR Apache-2.0"));
        assert!(!is_allowed("GPL-2.0"));
        assert!(!is_allowed("MIT AND GPL-2.0"));
        assert!(!is_allowed(""));
    }

    #[test]
    fn lines_without_a_licence_are_refused() {
        assert!(line_is_fine("clap v4.6.7|MIT OR Apache-2.0 (*)"));
        assert!(line_is_fine(""));
        assert!(!line_is_fine("mystery v1.0.0|"));
    }
}
