//! Documents that hold each behaviour to its tests name tests that are there.
//!
//! In their tables the third column lists tests, each in backticks; where there is none, it begins
//! with a dash and says why.

use std::collections::BTreeSet;

use super::Finding;

/// The documents whose tables are held to this.
const DOCUMENTS: [&str; 2] = ["docs/hostile.md", "docs/zero-truth.md"];

/// The names of all tests of the workspace.
#[derive(Debug, Default)]
pub(super) struct Tests(BTreeSet<String>);

impl Tests {
    /// Takes note of the tests in Rust text.
    pub(super) fn learn(&mut self, text: &str) {
        let mut is_test = false;
        for line in text.lines().map(str::trim) {
            if line == "#[test]" {
                is_test = true;
            } else if let (true, Some(name)) = (is_test, function(line)) {
                self.0.insert(name.to_owned());
                is_test = false;
            }
        }
    }
}

fn function(line: &str) -> Option<&str> {
    line.strip_prefix("fn ")?.split('(').next()
}

pub(super) fn applies_to(name: &str) -> bool {
    DOCUMENTS.contains(&name)
}

pub(super) fn check(name: &str, text: &str, tests: &Tests, findings: &mut Vec<Finding>) {
    for (index, line) in text.lines().enumerate() {
        let Some(cell) = line.strip_prefix("| ").and_then(|row| row.split(" | ").nth(2)) else {
            continue;
        };
        if cell == "tests" {
            continue;
        }
        let named: Vec<&str> = cell.split('`').skip(1).step_by(2).collect();
        let mut report = |text| {
            findings.push(Finding { path: name.to_owned(), line: index + 1, text });
        };
        if named.is_empty() && !cell.starts_with('–') {
            report("names no test, and does not say why".to_owned());
        }
        for missing in named.into_iter().filter(|test| !tests.0.contains(*test)) {
            report(format!("names the test `{missing}`, which is not there"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(row: &str) -> usize {
        let mut tests = Tests::default();
        tests.learn("#[test]\n#[ignore = \"slow\"]\nfn there() {}\nfn no_test() {}\n");
        let mut findings = Vec::new();
        check(DOCUMENTS[0], row, &tests, &mut findings);
        findings.len()
    }

    #[test]
    fn a_row_names_tests_that_are_there_or_says_why_not() {
        assert_eq!(found("| 1 | it works | `there` | |"), 0);
        assert_eq!(found("| 1 | it works | – not built: no use | |"), 0);
        assert_eq!(found("| 1 | it works | `there`, `gone` | |"), 1);
        assert_eq!(found("| 1 | it works | `no_test` | |"), 1);
        assert_eq!(found("| 1 | it works | | |"), 1);
    }
}
