//! Drives benchmarks and QEMU's own tests, which live in folders outside of this repository.
//!
//! Both expect programs with QEMU's names in one folder. Ours is one binary that looks at the
//! name it is called by, so that folder holds links to it.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::{fs, io};

use crate::run::{built, command, run};
use crate::{Outcome, dedup, figures, reclaim, wipe, wire, zeros};

/// Names under which our binary is called.
const OURS: [&str; 3] = ["qemu-img", "qemu-io", "qemu-nbd"];

/// Runs `bench --ours LINKS ARGUMENTS`; without arguments a quick round. With `--table` the cells
/// that have a target, and prints how they did; with `--from FILE` that of a run from before.
/// `--zeros`, `--wipe`, `--tls`, `--client`, `--reclaim` and `--dedup` run cells of our own, which need
/// no harness.
pub(crate) fn bench(arguments: &[String]) -> Outcome {
    if let [flag, file] = arguments
        && flag == "--from"
    {
        return figures::print(Path::new(file));
    }
    if arguments == ["--zeros"] {
        return zeros::run(&release_build()?);
    }
    if arguments == ["--wipe"] {
        return wipe::run(&release_build()?);
    }
    if arguments == ["--tls"] {
        return wire::servers(&release_build()?);
    }
    if arguments == ["--client"] {
        return wire::clients(&release_build()?);
    }
    match arguments.split_first() {
        Some((flag, rest)) if flag == "--reclaim" => return reclaim::run(&release_build()?, rest),
        Some((flag, rest)) if flag == "--dedup" => return dedup::run(&release_build()?, rest),
        _ => {}
    }
    let (program, mut rest) = locate("bench", arguments)?;
    if let Some(at) = rest.iter().position(|word| word == "--table") {
        rest.remove(at);
        return bench_table(&program, rest);
    }
    if rest.is_empty() {
        rest.push("--quick".into());
    }
    run_bench(&program, &rest)
}

fn bench_table(program: &Path, mut rest: Vec<String>) -> Outcome {
    let results = std::env::temp_dir().join(format!("lacuna-bench-{}.json", std::process::id()));
    if !rest.iter().any(|word| word == "--cells") {
        rest.extend(["--cells".into(), figures::cells()]);
    }
    rest.extend(["--json".into(), results.to_string_lossy().into_owned()]);
    let ran = run_bench(program, &rest);
    // Cells that failed are rows as well.
    let printed = figures::print(&results);
    match fs::remove_file(&results) {
        Ok(()) => ran.and(printed),
        Err(_) => ran,
    }
}

fn run_bench(program: &Path, rest: &[String]) -> Outcome {
    let links = Links::to_release_build()?;
    let mut bench = command(&program.to_string_lossy(), &["--ours"]);
    bench.arg(&links.folder).args(rest);
    run(bench)
}

/// Runs `run-iotests OPTIONS LINKS TESTS`; options are what starts with a dash, `--config` and
/// the like written with `=`.
pub(crate) fn iotests(arguments: &[String]) -> Outcome {
    let (program, rest) = locate("run-iotests", arguments)?;
    let links = Links::to_release_build()?;
    let (options, tests): (Vec<_>, Vec<_>) = rest.iter().partition(|word| word.starts_with('-'));
    let mut suite = command(&program.to_string_lossy(), &[]);
    suite.args(options).arg(&links.folder).args(tests);
    run(suite)
}

/// Finds the program in the harness folder, or in the one of its folders that is named after the
/// suite; returns it with the arguments that are not ours.
fn locate(name: &str, arguments: &[String]) -> Outcome<(PathBuf, Vec<String>)> {
    locate_in(name.trim_start_matches("run-"), name, arguments)
}

/// As [`locate`], with the name of the suite's folder.
pub(crate) fn locate_in(
    suite: &str,
    name: &str,
    arguments: &[String],
) -> Outcome<(PathBuf, Vec<String>)> {
    let (folder, rest) = split(arguments, std::env::var("LACUNA_HARNESS").ok())?;
    let places = [folder.join(name), folder.join(suite).join(name)];
    match places.into_iter().find(|place| place.is_file()) {
        Some(program) => Ok((program, rest)),
        None => Err(format!("no program `{name}` in {} nor in its {suite}/", folder.display())),
    }
}

fn split(arguments: &[String], environment: Option<String>) -> Outcome<(PathBuf, Vec<String>)> {
    let mut rest = arguments.to_vec();
    let folder = match rest.iter().position(|word| word == "--harness") {
        Some(at) if at + 1 < rest.len() => rest.drain(at..at + 2).nth(1),
        Some(_) => return Err("--harness needs a folder".into()),
        None => environment,
    };
    match folder {
        Some(folder) => Ok((PathBuf::from(folder), rest)),
        None => Err("where is the harness? Give --harness DIR or set LACUNA_HARNESS".into()),
    }
}

/// Builds our binary as users have it; returns where it is.
fn release_build() -> Outcome<PathBuf> {
    built("release")
}

/// A scratch folder of links, removed at the end.
struct Links {
    folder: PathBuf,
}

impl Links {
    fn to_release_build() -> Outcome<Self> {
        Self::new(&release_build()?).map_err(|error| format!("cannot link the tools: {error}"))
    }

    fn new(binary: &Path) -> io::Result<Self> {
        let folder = std::env::temp_dir().join(format!("lacuna-tools-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let links = Self { folder };
        for name in OURS {
            symlink(binary, links.folder.join(name))?;
        }
        Ok(links)
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            eprintln!("{} stays behind: {error}", self.folder.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn harness_comes_from_the_flag_then_from_the_environment() {
        let (folder, rest) =
            split(&words("--quick --harness there x"), Some("else".into())).unwrap();
        assert_eq!((folder, rest), (PathBuf::from("there"), words("--quick x")));
        let (folder, _) = split(&[], Some("else".into())).unwrap();
        assert_eq!(folder, PathBuf::from("else"));
    }

    #[test]
    fn missing_harness_says_how_to_name_it() {
        assert!(split(&[], None).unwrap_err().contains("LACUNA_HARNESS"));
        assert!(split(&words("--harness"), None).is_err());
    }
}
