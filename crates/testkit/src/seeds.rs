//! Which seeds a test runs.

/// Returns the seeds a test is to run: those in the environment variable, or `count` from 1 on.
///
/// `LACUNA_SEED=17` replays one run, `LACUNA_SEEDS=5000` runs that many.
///
/// # Panics
/// If a variable does not hold a number.
#[must_use]
pub fn seeds(count: u64) -> std::ops::Range<u64> {
    let number = |name: &str| {
        let text = std::env::var(name).ok()?;
        Some(text.parse().unwrap_or_else(|_| panic!("{name} is {text:?}, not a number")))
    };
    match (number("LACUNA_SEED"), number("LACUNA_SEEDS")) {
        (Some(seed), _) => seed..seed + 1,
        (None, Some(many)) => 1..many + 1,
        (None, None) => 1..count + 1,
    }
}
