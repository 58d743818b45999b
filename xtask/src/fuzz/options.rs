//! What was asked of `cargo xtask fuzz`.

use crate::Outcome;

const SECONDS: &str = "60";

/// How the targets are built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Build {
    /// With the address sanitizer, and libFuzzer is told of every comparison.
    Checked,
    /// Without both: some times as many executions, with all assertions, for safe code.
    Fast,
}

impl Build {
    /// The options of cargo-fuzz. Each build has a folder of its own, so neither is made anew for
    /// the other.
    pub(super) const fn words(self) -> &'static [&'static str] {
        match self {
            Self::Checked => &[],
            Self::Fast => {
                &["--sanitizer", "none", "--no-trace-compares", "--target-dir", "fuzz/target/fast"]
            }
        }
    }
}

/// Which targets, for how long.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) seconds: String,
    pub(super) build: Build,
    /// Whether lines are to be counted instead.
    pub(super) coverage: bool,
    /// Targets; none stands for all.
    pub(super) named: Vec<String>,
}

impl Options {
    pub(super) fn parse(arguments: &[String]) -> Outcome<Self> {
        let mut options = Self {
            seconds: SECONDS.into(),
            build: Build::Checked,
            coverage: false,
            named: Vec::new(),
        };
        let mut words = arguments.iter();
        while let Some(word) = words.next() {
            match &word[..] {
                "--seconds" => options.seconds = number(words.next())?,
                "--fast" => options.build = Build::Fast,
                "--coverage" => options.coverage = true,
                word if word.starts_with('-') => return Err(format!("no option {word}")),
                target => options.named.push(target.into()),
            }
        }
        Ok(options)
    }
}

fn number(word: Option<&String>) -> Outcome<String> {
    let number = word.filter(|text| text.parse::<u32>().is_ok());
    number.cloned().ok_or_else(|| "--seconds needs a number".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &str) -> Outcome<Options> {
        let words: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
        Options::parse(&words)
    }

    #[test]
    fn options_come_before_and_after_targets() {
        let options = parsed("header --seconds 5 --fast operations").unwrap();
        assert_eq!((&options.seconds[..], options.build), ("5", Build::Fast));
        assert_eq!(options.named, ["header", "operations"]);
        let options = parsed("--coverage").unwrap();
        assert!(options.coverage && options.named.is_empty());
        assert_eq!((&options.seconds[..], options.build), (SECONDS, Build::Checked));
    }

    #[test]
    fn what_is_no_option_or_no_number_is_refused() {
        assert!(parsed("--seconds").is_err());
        assert!(parsed("--seconds soon").is_err());
        assert_eq!(parsed("--quick"), Err("no option --quick".into()));
    }
}
