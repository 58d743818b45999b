//! The figures of a benchmark run against their targets, as a table for the README.
//!
//! A ratio says how many times less CPU time ours takes than the peer. Judged is the ratio of the best
//! runs: noise only ever adds time. The median of the pairs stands beside it.
//!
//! `served.rs` has the cells of servers, whose figures are for each operation, with two more peers.

mod served;

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::Outcome;

/// What a group of cells is to reach.
struct Target {
    /// Names of cells; a star at the end stands for anything.
    cells: &'static [&'static str],
    /// Against QEMU as it is called without options.
    stock: f64,
    /// Against QEMU with metadata caches that hold everything.
    tuned: Option<f64>,
}

const TARGETS: &[Target] = &[
    against(&["c-check-1t", "c-check-4t"], 60.0, Some(3.0)),
    against(&["c-check-snap50", "c-check-snap1000"], 40.0, Some(20.0)),
    against(&["c-map-*"], 8.0, Some(5.0)),
    against(&["c-measure-*"], 15.0, Some(8.0)),
    against(&["c-info-*"], 2.0, None),
    against(&["c-nbdmap-1t"], 8.0, Some(5.0)),
    against(&["a-raw-qcow2", "a-raw-qcow2-W"], 1.0, None),
    against(&["a-qcow2-raw", "a-qcow2-raw-W", "a-qcow2-qcow2", "a-qcow2-qcow2-W"], 1.5, None),
    against(&["a-zlib*"], 1.5, None),
    against(&["a-zstd*"], 1.3, None),
    against(&["a-unzlib", "a-unzstd"], 1.2, None),
    against(&["b-meta-*", "b-zerocl-*"], 8.0, None),
    against(&["b-falloc-*"], 20.0, None),
];

const fn against(cells: &'static [&'static str], stock: f64, tuned: Option<f64>) -> Target {
    Target { cells, stock, tuned }
}

/// Returns the cells that have a target, as the benchmark's `--cells` wants them.
pub(crate) fn cells() -> String {
    let cells = TARGETS.iter().flat_map(|target| target.cells).copied();
    cells.chain(served::cells()).collect::<Vec<_>>().join(",")
}

/// Prints the table of the runs in a file of the benchmark's `--json`; of two runs of a cell the later.
pub(crate) fn print(results: &Path) -> Outcome {
    let text = std::fs::read_to_string(results)
        .map_err(|error| format!("cannot read {}: {error}", results.display()))?;
    println!("{}", table(&text)?);
    Ok(())
}

fn table(text: &str) -> Outcome<String> {
    let mut cells: BTreeMap<String, Value> = BTreeMap::new();
    for line in text.lines() {
        let cell: Value = serde_json::from_str(line)
            .map_err(|error| format!("no result of the benchmark: {error}: {line}"))?;
        cells.insert(cell["cell"].as_str().unwrap_or_default().to_owned(), cell);
    }
    let mut lines = rows(&cells);
    lines.extend(served::rows(&cells));
    let loads = cells.values().filter_map(|cell| cell["load"].as_f64());
    let (least, most) = loads.fold((f64::MAX, 0.0_f64), |(a, b), load| (a.min(load), b.max(load)));
    lines.push(format!("\n{}; load {least:.1} to {most:.1}.", machine()));
    Ok(lines.join("\n"))
}

const HEADER: &str = "\
| cell | CPU, ours | stock ÷ ours: best (median) | target | tuned ÷ ours: best (median) | target | \
peak memory: ours, stock, tuned | |
|---|---|---|---|---|---|---|---|";

/// Returns the table of what the tools took; nothing where no such cell ran.
fn rows(cells: &BTreeMap<String, Value>) -> Vec<String> {
    let of = |target: &'static Target| {
        let ours = cells.iter().filter(|(name, _)| is_one_of(target.cells, name));
        ours.map(|(name, cell)| target.row(name, cell))
    };
    under(HEADER, TARGETS.iter().flat_map(of).collect())
}

/// Puts a header over rows, if there are any.
fn under(header: &str, rows: Vec<String>) -> Vec<String> {
    match rows.is_empty() {
        true => rows,
        false => std::iter::once(header.to_owned()).chain(rows).collect(),
    }
}

/// Says whether a cell's name is among names that may end in a star.
fn is_one_of(patterns: &[&str], cell: &str) -> bool {
    patterns.iter().any(|pattern| match pattern.strip_suffix('*') {
        Some(start) => cell.starts_with(start),
        None => *pattern == cell,
    })
}

/// Says why a cell of ours did not run.
fn not_run(cell: &Value) -> String {
    let why = cell["failed"].as_object().and_then(|failed| failed.values().next());
    why.and_then(Value::as_str).unwrap_or("no run").replace('|', "/")
}

impl Target {
    fn row(&self, name: &str, cell: &Value) -> String {
        let memory = if name.contains("nbd") { "server rss MiB" } else { "rss MiB" };
        let runs = |side| Runs::of(cell, side, "cpu s", memory);
        let (ours, stock, tuned) = (runs("ours"), runs("peer"), runs("tuned"));
        if ours.cpu.is_empty() {
            return format!("| {name} | not run: {} ||||||| ", not_run(cell));
        }
        let memory = [&ours, &stock, &tuned].map(|runs| shown(runs.memory, 0));
        let memory = memory.iter().filter(|text| *text != "–").cloned().collect::<Vec<_>>();
        let is_reached = ours.reaches(&stock, Some(self.stock))
            && (tuned.cpu.is_empty() || ours.reaches(&tuned, self.tuned));
        format!(
            "| {name} | {} ms | {} | {} | {} | {} | {} MiB | {} |",
            shown(least(&ours.cpu).map(|cpu| cpu * 1e3), 1),
            ours.beats(&stock),
            self.stock,
            ours.beats(&tuned),
            self.tuned.map_or_else(|| "–".to_owned(), |target| target.to_string()),
            memory.join(", "),
            if is_reached { "reached" } else { "**missed**" },
        )
    }
}

/// What one side took.
struct Runs {
    cpu: Vec<f64>,
    memory: Option<f64>,
}

impl Runs {
    fn of(cell: &Value, side: &str, cpu: &str, memory: &str) -> Self {
        let runs = cell["runs"][side].as_array().cloned().unwrap_or_default();
        let of = |metric: &str| -> Vec<f64> {
            runs.iter().filter_map(|run| run[metric][0].as_f64()).collect()
        };
        let mut memory = of(memory);
        Self { cpu: of(cpu), memory: median(&mut memory) }
    }

    fn best(&self, peer: &Self) -> Option<f64> {
        Some(least(&peer.cpu)? / least(&self.cpu)?)
    }

    fn reaches(&self, peer: &Self, target: Option<f64>) -> bool {
        let Some(target) = target else { return true };
        self.best(peer).is_some_and(|ratio| ratio >= target)
    }

    fn beats(&self, peer: &Self) -> String {
        let mut pairs: Vec<f64> =
            self.cpu.iter().zip(&peer.cpu).map(|(ours, theirs)| theirs / ours).collect();
        match (self.best(peer), median(&mut pairs)) {
            (Some(best), Some(median)) => {
                format!("{} ({})", shown(Some(best), 2), shown(Some(median), 2))
            }
            _ => "–".to_owned(),
        }
    }
}

fn least(values: &[f64]) -> Option<f64> {
    values.iter().copied().min_by(f64::total_cmp)
}

fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        len if len % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// Small numbers with some places behind the point, large ones without.
fn shown(value: Option<f64>, places: usize) -> String {
    match value {
        None => "–".to_owned(),
        Some(value) if value >= 100.0 => format!("{value:.0}"),
        Some(value) if value >= 10.0 => format!("{value:.*}", places.min(1)),
        Some(value) => format!("{value:.places$}"),
    }
}

fn machine() -> String {
    let facts = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |line: &str| line.split_once(": ").map(|(_, value)| value.trim().to_owned());
    let model = facts.lines().find(|line| line.starts_with("model name")).and_then(field);
    let cores = facts.lines().filter(|line| line.starts_with("processor")).count();
    format!("{cores} cores ({})", model.unwrap_or_else(|| "unknown".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: &str = r#"{"cell": "c-map-1t", "load": 2.5, "failed": {}, "runs": {
        "ours": [{"cpu s": [0.2, "low"], "rss MiB": [5.4, "low"]}, {"cpu s": [0.3, "low"], "rss MiB": [5.4, "low"]}],
        "peer": [{"cpu s": [2.0, "low"], "rss MiB": [39.9, "low"]}, {"cpu s": [2.4, "low"], "rss MiB": [39.9, "low"]}],
        "tuned": [{"cpu s": [0.9, "low"], "rss MiB": [136, "low"]}, {"cpu s": [1.2, "low"], "rss MiB": [136, "low"]}]}}"#;

    #[test]
    fn a_cell_reaches_its_targets_by_the_best_runs() {
        let line = RUN.replace('\n', " ");
        let text = table(&line).unwrap();
        let row = "| c-map-1t | 200 ms | 10.0 (9.00) | 8 | 4.50 (4.25) | 5 | 5, 40, 136 MiB | **missed** |";
        assert!(text.contains(row), "{text}");
        let text = table(&format!("{line}\n{}", line.replace("[0.9,", "[1.0,"))).unwrap();
        assert!(text.contains("reached") && !text.contains("missed"), "{text}");
        assert!(text.ends_with("load 2.5 to 2.5."), "{text}");
    }

    #[test]
    fn what_did_not_run_says_why() {
        let text = table(
            r#"{"cell": "c-measure-1t", "load": 1, "runs": {}, "failed": {"ours": "exit status 1"}}"#,
        );
        assert!(text.unwrap().contains("| c-measure-1t | not run: exit status 1 |"));
        assert!(table("hello").is_err());
    }
}
