//! Sizes, ignored tests and unfinished code.

use super::Finding;
use super::source::{Source, starts_with};

/// Past this a file is two modules.
const MAX_LINES: usize = 600;

/// Code that says of itself that it is not done.
const UNFINISHED: [&str; 2] = ["todo", "unimplemented"];

pub(super) fn check(source: &Source, findings: &mut Vec<Finding>) {
    let mut report = |line, text: String| {
        findings.push(Finding { path: source.path.clone(), line, text });
    };
    if source.lines > MAX_LINES {
        let text = format!("{} lines: past {MAX_LINES} a file is two modules", source.lines);
        report(source.lines, text);
    }
    for (at, token) in source.tokens.iter().enumerate() {
        let rest = &source.tokens[at..];
        if starts_with(rest, &["#", "[", "ignore", "]"]) {
            report(token.line, "an ignored test says why: #[ignore = \"reason\"]".into());
        }
        let is_macro = rest.get(1).is_some_and(|next| next.text == "!");
        if is_macro && UNFINISHED.contains(&token.text.as_str()) {
            report(token.line, format!("`{}!` is not code: leave it out", token.text));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<String> {
        super::super::found(check, "crates/lacuna/src/raw.rs", text)
    }

    #[test]
    fn long_files_are_found() {
        assert_eq!(found(&"\n".repeat(MAX_LINES)).len(), 0);
        assert_eq!(found(&"\n".repeat(MAX_LINES + 1)).len(), 1);
    }

    #[test]
    fn ignored_tests_need_a_reason() {
        assert_eq!(found("#[ignore] fn f() {}").len(), 1);
        assert_eq!(found("#[ignore = \"takes an hour\"] fn f() {}").len(), 0);
    }

    #[test]
    fn unfinished_code_is_found() {
        assert_eq!(found("fn f() { todo!() }").len(), 1);
        assert_eq!(found("fn f() { unimplemented!(\"x\") } // todo!()").len(), 1);
    }
}
