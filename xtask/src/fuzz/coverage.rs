//! Which lines the corpus and its mutations reach, as plain tests run them.
//!
//! The compiler counts, LLVM's tools of the same version say what of: Rust's own are no part of every
//! toolchain, distributions have them as well.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::Outcome;
use crate::run::{cargo, command, find, json, output, run, workspace};

const FOLDER: &str = "target/coverage";
const TESTS: [&str; 8] =
    ["-p", "testkit", "--test", "fuzz_corpus", "-p", "lacuna-cli", "--test", "hostile_text"];
/// What makes and judges the inputs is not what is fuzzed.
const NOT_FUZZED: [&str; 2] = ["testkit", "conform"];

/// Runs the tests of the corpus with counters, and prints lines reached of lines, by module; by file
/// they are in `target/coverage/files.md`.
pub(super) fn report() -> Outcome {
    let tools = Tools::find()?;
    let programs = executables(&output(tests(&["--no-run", "--message-format=json"]))?);
    // Counts of earlier runs, and of build scripts.
    fs::remove_dir_all(profiles()).ok();
    run(tests(&[]))?;
    let lines = lines_by_file(&json(&output(tools.export(&programs)?)?)?);
    let path = workspace().join(FOLDER).join("files.md");
    fs::write(&path, table("file", &lines))
        .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    print!("{}", table("module", &by_module(&lines)));
    Ok(())
}

fn profiles() -> PathBuf {
    workspace().join(FOLDER).join("profiles")
}

fn tests(more: &[&str]) -> Command {
    let mut tests = cargo(&[&["test", "--locked"][..], &TESTS, more].concat());
    tests.env("RUSTFLAGS", "-Cinstrument-coverage").env("CARGO_TARGET_DIR", FOLDER);
    tests.env("LLVM_PROFILE_FILE", profiles().join("%p-%m.profraw"));
    tests
}

/// The test programs that cargo says it built.
fn executables(messages: &str) -> Vec<PathBuf> {
    let messages = messages.lines().filter_map(|line| json(line).ok());
    let programs = messages.filter(|message| message["profile"]["test"] == true);
    programs.filter_map(|message| message["executable"].as_str().map(PathBuf::from)).collect()
}

/// LLVM's tools of the compiler's version.
struct Tools {
    profdata: PathBuf,
    cov: PathBuf,
}

impl Tools {
    fn find() -> Outcome<Self> {
        let said = output(command("rustc", &["-vV"]))?;
        let version = llvm_version(&said).ok_or("rustc does not say which LLVM it has")?;
        let tool = |name: &str| {
            let program = format!("{name}-{version}");
            let missing = || format!("needs {program}: apt-get install llvm-{version}");
            find(&program).ok_or_else(missing)
        };
        Ok(Self { profdata: tool("llvm-profdata")?, cov: tool("llvm-cov")? })
    }

    /// Merges the counts of all runs; returns the command that says what was counted.
    fn export(&self, programs: &[PathBuf]) -> Outcome<Command> {
        let merged = workspace().join(FOLDER).join("merged.profdata");
        let mut merge = Command::new(&self.profdata);
        merge.args(["merge", "--sparse", "-o"]).arg(&merged).arg(profiles());
        run(merge)?;
        let mut export = Command::new(&self.cov);
        export.args(["export", "--summary-only", "--instr-profile"]).arg(merged);
        for program in programs {
            export.arg("--object").arg(program);
        }
        Ok(export)
    }
}

fn llvm_version(said: &str) -> Option<&str> {
    let version = said.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    version.split('.').next()
}

/// Lines reached, of lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Lines {
    reached: u64,
    all: u64,
}

/// Files of ours of which any line was reached, from the report of `llvm-cov export`.
fn lines_by_file(report: &Value) -> BTreeMap<String, Lines> {
    let crates = workspace().join("crates");
    let files = report["data"][0]["files"].as_array().into_iter().flatten();
    let lines = files.filter_map(|file| {
        let path = Path::new(file["filename"].as_str()?).strip_prefix(&crates).ok()?;
        let lines = &file["summary"]["lines"];
        let lines = Lines { reached: lines["covered"].as_u64()?, all: lines["count"].as_u64()? };
        Some((path.to_string_lossy().replace("/src/", "/"), lines))
    });
    lines.filter(|(file, lines)| lines.reached > 0 && is_fuzzed(file)).collect()
}

fn is_fuzzed(file: &str) -> bool {
    !NOT_FUZZED.iter().any(|name| file.split('/').next() == Some(name)) && !file.contains("/tests/")
}

/// Adds up the files of each folder.
fn by_module(files: &BTreeMap<String, Lines>) -> BTreeMap<String, Lines> {
    let mut modules: BTreeMap<String, Lines> = BTreeMap::new();
    for (file, lines) in files {
        let module = file.rsplit_once('/').map_or(&file[..], |(folder, _)| folder);
        let sum = modules.entry(module.into()).or_default();
        sum.reached += lines.reached;
        sum.all += lines.all;
    }
    modules
}

fn table(what: &str, rows: &BTreeMap<String, Lines>) -> String {
    let mut table = format!("| {what} | lines reached | of | % |\n|---|---|---|---|\n");
    for (name, Lines { reached, all }) in rows {
        let percent = reached * 100 / all.max(&1);
        table += &format!("| `{name}` | {reached} | {all} | {percent} |\n");
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report_of(files: &[(&str, u64, u64)]) -> Value {
        let crates = workspace().join("crates");
        let files = files.iter().map(|(name, covered, count)| {
            let lines = serde_json::json!({ "covered": covered, "count": count });
            let name = crates.join(name);
            serde_json::json!({ "filename": name, "summary": { "lines": lines } })
        });
        serde_json::json!({ "data": [{ "files": files.collect::<Vec<_>>() }] })
    }

    #[test]
    fn files_of_a_folder_are_one_module() {
        let lines = lines_by_file(&report_of(&[
            ("lacuna/src/qcow2/format/l1.rs", 3, 4),
            ("lacuna/src/qcow2/format/l2.rs", 5, 16),
            ("lacuna/src/qcow2/dirty.rs", 0, 9),
            ("testkit/src/fuzz.rs", 7, 7),
        ]));
        assert_eq!(lines.len(), 2, "what nothing reaches, and the judge, are left out");
        let expected = "| module | lines reached | of | % |\n|---|---|---|---|\n\
                        | `lacuna/qcow2/format` | 8 | 20 | 40 |\n";
        assert_eq!(table("module", &by_module(&lines)), expected);
    }

    #[test]
    fn tools_are_those_of_the_compilers_version() {
        assert_eq!(llvm_version("release: 1.95.0\nLLVM version: 22.1.2\n"), Some("22"));
        assert_eq!(llvm_version("release: 1.95.0"), None);
    }

    #[test]
    fn only_tests_among_what_was_built_are_run() {
        let messages = "{\"profile\":{\"test\":true},\"executable\":\"/a\"}\nnoise\n\
                        {\"profile\":{\"test\":false},\"executable\":\"/b\"}\n\
                        {\"profile\":{\"test\":true},\"executable\":null}\n";
        assert_eq!(executables(messages), [PathBuf::from("/a")]);
    }
}
