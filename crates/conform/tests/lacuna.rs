//! lacuna passes every case, through a driver in this process.

use lacuna_conform::driver::Driver;
use lacuna_conform::engines::Lacuna;
use lacuna_conform::report::Report;
use lacuna_conform::run::{Options, Verdict, run};
use lacuna_conform::suite;

/// Runs all cases of a seed, and says what did not pass.
fn not_passed(seed: u64, is_wanted: impl Fn(&str) -> bool) -> String {
    let folder = tempfile::tempdir().unwrap();
    let driver = Driver::thread(|| Box::new(Lacuna));
    let options = Options::new(folder.path());
    let (mut text, mut count) = (String::new(), 0);
    for case in suite::all(seed).iter().filter(|case| is_wanted(&case.name)) {
        let done =
            run(&driver, case, &options).unwrap_or_else(|broken| panic!("{}: {broken}", case.name));
        count += 1;
        if done.verdict != Verdict::Passed {
            text += &Report::lines(case, &done.verdict);
        }
    }
    assert!(count > 0, "there are such cases");
    text
}

#[test]
fn lacuna_passes_every_case() {
    let text = not_passed(1, |_| true);
    assert!(text.is_empty(), "{text}");
}

#[test]
fn lacuna_passes_random_sequences_of_other_seeds() {
    for seed in 2..6 {
        let text = not_passed(seed, |name| name.starts_with("random/"));
        assert!(text.is_empty(), "seed {seed}: {text}");
    }
}
