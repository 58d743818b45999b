//! Coverage-guided fuzzing, one target after the other. `ci` replays the corpus without it.
//!
//! What each run came to is printed as a row of the table in `docs/fuzzing.md`.

use std::fs;
use std::fs::File;

use crate::Outcome;
use crate::run::{cargo, find};

const FOLDER: &str = "fuzz/fuzz_targets";
const LOGS: &str = "fuzz/target/logs";
const SECONDS: &str = "60";
/// What one input may take, in MiB and in seconds: above that it is a finding.
const LIMITS: [&str; 3] = ["-rss_limit_mb=1024", "-timeout=20", "-print_final_stats=1"];

/// Runs `--seconds N` (60) of each target, or of those named.
pub(crate) fn targets(arguments: &[String]) -> Outcome {
    let (seconds, named) = split(arguments)?;
    if find("cargo-fuzz").is_none() {
        return Err("needs cargo-fuzz: cargo install cargo-fuzz --locked".into());
    }
    let targets = if named.is_empty() { all_targets()? } else { named };
    println!("| target | seconds | executions | cov |\n|---|---|---|---|");
    for target in &targets {
        println!("| `{target}` | {seconds} | {} |", fuzz(target, &seconds)?);
    }
    Ok(())
}

/// Runs one target; returns how often it was executed, and how many edges it covers.
fn fuzz(target: &str, seconds: &str) -> Outcome<String> {
    let path = format!("{LOGS}/{target}");
    let log = fs::create_dir_all(LOGS).and_then(|()| File::create(&path));
    let log = log.map_err(|error| format!("cannot write {path}: {error}"))?;
    let limit = format!("-max_total_time={seconds}");
    let mut fuzz = cargo(&["fuzz", "run", target, "--", &limit]);
    // cargo-fuzz wants compiler flags that the stable compiler takes only with this.
    fuzz.args(LIMITS).env("RUSTC_BOOTSTRAP", "1").stderr(log);
    let status = fuzz.status().map_err(|error| format!("cannot start cargo fuzz: {error}"))?;
    let said = fs::read_to_string(&path).unwrap_or_default();
    match figures(&said) {
        Some(figures) if status.success() => Ok(figures),
        _ => Err(format!("{target} ended with {status}: {path} says why")),
    }
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

fn split(arguments: &[String]) -> Outcome<(String, Vec<String>)> {
    let mut rest = arguments.to_vec();
    let seconds = match rest.iter().position(|word| word == "--seconds") {
        Some(at) if at + 1 < rest.len() => rest.drain(at..at + 2).nth(1),
        Some(_) => return Err("--seconds needs a number".into()),
        None => Some(SECONDS.into()),
    };
    let number = seconds.filter(|text| text.parse::<u32>().is_ok());
    Ok((number.ok_or("--seconds needs a number")?, rest))
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

    #[test]
    fn time_is_taken_out_of_the_arguments() {
        let words = ["header", "--seconds", "5"].map(str::to_owned);
        assert_eq!(split(&words), Ok(("5".into(), vec!["header".into()])));
        assert!(split(&["--seconds".to_owned()]).is_err());
        assert!(split(&["--seconds".to_owned(), "soon".to_owned()]).is_err());
    }
}
