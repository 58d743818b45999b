//! Coverage-guided fuzzing. `ci` replays the corpus without it.

use std::fs;

use crate::Outcome;
use crate::run::{cargo, find, run};

const FOLDER: &str = "fuzz/fuzz_targets";
const SECONDS: &str = "60";

/// Runs `--seconds N` (60) of each target, or of those named.
pub(crate) fn targets(arguments: &[String]) -> Outcome {
    let (seconds, named) = split(arguments)?;
    if find("cargo-fuzz").is_none() {
        return Err("needs cargo-fuzz: cargo install cargo-fuzz --locked".into());
    }
    let targets = if named.is_empty() { all_targets()? } else { named };
    for target in &targets {
        let limit = format!("-max_total_time={seconds}");
        let mut fuzz = cargo(&["fuzz", "run", target, "--", &limit]);
        // cargo-fuzz wants compiler flags that the stable compiler takes only with this.
        fuzz.env("RUSTC_BOOTSTRAP", "1");
        run(fuzz)?;
    }
    Ok(())
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
    fn time_is_taken_out_of_the_arguments() {
        let words = ["header", "--seconds", "5"].map(str::to_owned);
        assert_eq!(split(&words), Ok(("5".into(), vec!["header".into()])));
        assert!(split(&["--seconds".to_owned()]).is_err());
        assert!(split(&["--seconds".to_owned(), "soon".to_owned()]).is_err());
    }
}
