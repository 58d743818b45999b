//! The rules of the house that a program can check. Each rule has a test that shows it failing.
//!
//! * `source.rs` — Rust text without comments and strings, as tokens
//! * `arrows.rs` — which module may name which
//! * `words.rs` — names that the glossary rules out
//! * `places.rs` — what belongs in one place only: unsafe, printing, opening files
//! * `limits.rs` — sizes, ignored tests, unfinished code
//! * `manifest.rs` — a reason for every dependency
//! * `links.rs` — documents that point to files that are there
//! * `named_tests.rs` — documents that name tests that are there

mod arrows;
mod limits;
mod links;
mod manifest;
mod named_tests;
mod places;
mod source;
mod words;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use self::source::Source;
use crate::Outcome;

/// A rule broken at a place.
#[derive(Debug)]
struct Finding {
    path: String,
    line: usize,
    text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line, self.text)
    }
}

/// Checks the current folder as the workspace; findings are printed.
pub(crate) fn workspace() -> Outcome {
    let findings = findings(Path::new(".")).map_err(|error| format!("cannot read: {error}"))?;
    for finding in &findings {
        eprintln!("{finding}");
    }
    if findings.is_empty() { Ok(()) } else { Err(format!("{} findings", findings.len())) }
}

fn findings(root: &Path) -> std::io::Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let (mut tests, mut claims) = (named_tests::Tests::default(), Vec::new());
    for path in files(root)? {
        let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().replace('\\', "/");
        let read = || fs::read_to_string(&path);
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("rs") => {
                let text = read()?;
                tests.learn(&text);
                of_source(&Source::new(&name, &text), &mut findings);
            }
            Some("md") => {
                let text = read()?;
                links::check(root, &name, &text, &mut findings);
                claims.extend(named_tests::applies_to(&name).then_some((name, text)));
            }
            _ if name.ends_with("Cargo.toml") => manifest::check(&name, &read()?, &mut findings),
            _ => {}
        }
    }
    for (name, text) in claims {
        named_tests::check(&name, &text, &tests, &mut findings);
    }
    Ok(findings)
}

fn of_source(source: &Source, findings: &mut Vec<Finding>) {
    for rule in [arrows::check, words::check, places::check, limits::check] {
        rule(source, findings);
    }
}

/// Lists the files of the workspace in a stable order, without what tools put there.
fn files(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut entries: Vec<_> = fs::read_dir(folder)?.collect::<std::io::Result<_>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = entry.file_name();
        let is_foreign = matches!(name.to_str(), Some("target" | ".git" | "corpus" | "artifacts"));
        if entry.file_type()?.is_dir() && !is_foreign {
            found.extend(files(&entry.path())?);
        } else if entry.file_type()?.is_file() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Runs one rule on a text, for the tests of the rules.
#[cfg(test)]
fn found(rule: fn(&Source, &mut Vec<Finding>), path: &str, text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    rule(&Source::new(path, text), &mut findings);
    findings.into_iter().map(|finding| format!("{}: {}", finding.line, finding.text)).collect()
}
