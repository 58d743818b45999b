//! What is said of an engine: for people, and for programs.

use serde_json::{Value, json};

use crate::case::Case;
use crate::run::Verdict;

/// What became of all cases.
///
/// ```
/// let report = lacuna_conform::report::Report::new(1);
/// assert!(report.has_passed());
/// ```
#[derive(Debug)]
pub struct Report {
    seed: u64,
    engine: String,
    rows: Vec<(String, String, &'static str, Verdict)>,
}

impl Report {
    /// Starts a report of cases that follow from `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { seed, engine: String::new(), rows: Vec::new() }
    }

    /// Adds a case.
    pub fn add(&mut self, case: &Case, done: crate::run::Done) {
        self.engine = done.engine;
        self.rows.push((case.name.clone(), case.proves.clone(), case.section, done.verdict));
    }

    /// Says whether nothing failed.
    #[must_use]
    pub fn has_passed(&self) -> bool {
        self.count("fail") == 0
    }

    /// Returns the names of cases that failed.
    #[must_use]
    pub fn failed(&self) -> Vec<&str> {
        let failed = self.rows.iter().filter(|row| word(&row.3) == "fail");
        failed.map(|row| row.0.as_str()).collect()
    }

    fn count(&self, what: &str) -> usize {
        self.rows.iter().filter(|row| word(&row.3) == what).count()
    }

    /// Says what a case came to, in lines.
    #[must_use]
    pub fn lines(case: &Case, verdict: &Verdict) -> String {
        let mut text = format!("{:<12}{}", word(verdict), case.name);
        match verdict {
            Verdict::Passed => text += "\n",
            Verdict::Unsupported(what) => text += &format!(": {}\n", tamed(what)),
            Verdict::Failed(faults) => {
                text += &format!("\n    {}\n", case.proves);
                for fault in faults {
                    text += &format!("    - {}\n", tamed(fault));
                }
            }
        }
        text
    }

    /// Says what all came to, in a line.
    #[must_use]
    pub fn summary(&self) -> String {
        format!(
            "{}: {} cases, {} passed, {} failed, {} not supported (seed {})\n",
            tamed(&self.engine),
            self.rows.len(),
            self.count("pass"),
            self.count("fail"),
            self.count("unsupported"),
            self.seed,
        )
    }

    /// Says it for programs.
    #[must_use]
    pub fn json(&self) -> Value {
        let row = |(name, proves, section, verdict): &(String, String, &str, Verdict)| {
            let mut value = json!({
                "name": name, "proves": proves, "section": section, "verdict": word(verdict),
            });
            match verdict {
                Verdict::Passed => {}
                Verdict::Unsupported(what) => value["reason"] = what.as_str().into(),
                Verdict::Failed(faults) => value["faults"] = faults.clone().into(),
            }
            value
        };
        json!({
            "engine": self.engine,
            "seed": self.seed,
            "passed": self.count("pass"),
            "failed": self.count("fail"),
            "unsupported": self.count("unsupported"),
            "cases": self.rows.iter().map(row).collect::<Vec<_>>(),
        })
    }
}

/// Describes cases for programs: what they prove, need and ask.
#[must_use]
pub fn described(cases: &[Case]) -> Value {
    let row = |case: &Case| {
        let needs: Vec<&str> = case.needs.iter().map(|need| need.word()).collect();
        let steps: Vec<String> = case.steps.iter().map(ToString::to_string).collect();
        json!({
            "name": case.name, "proves": case.proves, "section": case.section,
            "needs": needs, "steps": steps,
        })
    };
    cases.iter().map(row).collect()
}

const fn word(verdict: &Verdict) -> &'static str {
    match verdict {
        Verdict::Passed => "pass",
        Verdict::Unsupported(_) => "unsupported",
        Verdict::Failed(_) => "fail",
    }
}

/// What others said, without what would move a cursor.
fn tamed(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}
