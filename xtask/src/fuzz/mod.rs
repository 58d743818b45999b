//! Coverage-guided fuzzing, one target after the other. `ci` replays the corpus without it.
//!
//! * What each run came to is printed as a row of the table in `docs/fuzzing.md`.
//! * `options.rs` — which targets, for how long, and how they are built
//! * `coverage.rs` — which lines the plain tests of the corpus reach

mod coverage;
mod options;

use std::fs;
use std::fs::File;

use self::options::{Build, Options};
use crate::Outcome;
use crate::run::{cargo, find};

const FOLDER: &str = "fuzz/fuzz_targets";
const LOGS: &str = "fuzz/target/logs";
/// What one input may take, in MiB and in seconds: above that it is a finding. Names of functions that
/// are reached for the first time are not looked up: that costs a process each time.
const LIMITS: [&str; 4] =
    ["-rss_limit_mb=1024", "-timeout=20", "-print_final_stats=1", "-print_funcs=0"];
/// Keeps no statistics of how rare what an input reaches is: an image reaches thousands of edges, and
/// the statistics cost more than the image.
const WITHOUT_STATISTICS: &str = "-entropic=0";
/// What each input of these makes is an image: they reach thousands of edges each time.
const IMAGES: [&str; 7] = [
    "damaged_history",
    "damaged_image",
    "damaged_jobs",
    "damaged_operations",
    "header_and_tables",
    "history",
    "operations",
];

/// Runs `--seconds N` (60) of each target, or of those named; or says what their tests cover.
pub(crate) fn targets(arguments: &[String]) -> Outcome {
    let options = Options::parse(arguments)?;
    if options.coverage {
        return coverage::report();
    }
    if find("cargo-fuzz").is_none() {
        return Err("needs cargo-fuzz: cargo install cargo-fuzz --locked".into());
    }
    let targets = if options.named.is_empty() { all_targets()? } else { options.named.clone() };
    println!("| target | seconds | executions | cov |\n|---|---|---|---|");
    for target in &targets {
        println!("| `{target}` | {} | {} |", options.seconds, fuzz(target, &options)?);
    }
    Ok(())
}

/// Runs one target; returns how often it was executed, and how many edges it covers.
fn fuzz(target: &str, options: &Options) -> Outcome<String> {
    let path = format!("{LOGS}/{target}");
    let log = fs::create_dir_all(LOGS).and_then(|()| File::create(&path));
    let log = log.map_err(|error| format!("cannot write {path}: {error}"))?;
    let limit = format!("-max_total_time={}", options.seconds);
    let mut fuzz = cargo(&["fuzz", "run"]);
    fuzz.args(build_options(target, options.build)?).arg(target);
    fuzz.args(["--", &limit]).args(LIMITS).args(search_options(target));
    // cargo-fuzz wants compiler flags that the stable compiler takes only with this.
    let status = fuzz.env("RUSTC_BOOTSTRAP", "1").stderr(log).status();
    let status = status.map_err(|error| format!("cannot start cargo fuzz: {error}"))?;
    let said = fs::read_to_string(&path).unwrap_or_default();
    match figures(&said) {
        Some(figures) if status.success() => Ok(figures),
        _ => Err(format!("{target} ended with {status}: {path} says why")),
    }
}

/// Targets of the command's parsers need the command, and the others are built sooner without it.
fn build_options(target: &str, build: Build) -> Outcome<Vec<&'static str>> {
    let path = format!("{FOLDER}/{target}.rs");
    let source = fs::read_to_string(&path)
        .map_err(|error| format!("no target {target}: {path}: {error}"))?;
    let mut words = build.words().to_vec();
    if source.contains("lacuna_cli::") {
        words.extend(["--features", "command"]);
    }
    Ok(words)
}

fn search_options(target: &str) -> Option<&'static str> {
    IMAGES.contains(&target).then_some(WITHOUT_STATISTICS)
}

/// Finds executions and coverage in what libFuzzer said.
fn figures(said: &str) -> Option<String> {
    let after = |mark: &str| {
        let rest = said.rsplit_once(mark)?.1;
        rest.split_whitespace().next()?.parse::<u64>().ok()
    };
    let (executions, covered) = (after("stat::number_of_executed_units:")?, after(" cov: ")?);
    Some(format!("{executions} | {covered}"))
}

fn all_targets() -> Outcome<Vec<String>> {
    let entries =
        fs::read_dir(FOLDER).map_err(|error| format!("no targets in {FOLDER}: {error}"))?;
    let names = entries.flatten().map(|entry| entry.path()).filter_map(|path| {
        let is_rust = path.extension().is_some_and(|extension| extension == "rs");
        is_rust.then(|| path.file_stem().map(|stem| stem.to_string_lossy().into_owned()))?
    });
    let mut names: Vec<String> = names.collect();
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_figures_of_a_run_count() {
        let said = "#2 INITED cov: 11 ft: 12\n#9 NEW    cov: 955 ft: 27 corp: 8/3Kb\n\
                    Done 938924 runs\nstat::number_of_executed_units: 938924\nstat::x: 1\n";
        assert_eq!(figures(said), Some("938924 | 955".to_owned()));
        assert_eq!(figures("#2 INITED cov: 11"), None);
    }
}
