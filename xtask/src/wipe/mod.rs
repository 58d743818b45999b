//! A benchmark of our own (004-17): a disk full of data is wiped with zeros past the page cache, as
//! wiping tools in guests do it, with zero detection off, on, and giving space back.
//!
//! * `disk.rs` makes the image and says what it was before and is after
//! * `ways.rs` is how a wipe reaches an image: through a shell, through a server
//! * `trace.rs` counts what reached the file
//!
//! Judged are the size on the host (never more than stock's), writes of metadata (at most a tenth of
//! one for each cluster) and CPU time (at most two thirds of stock's, medians of runs by turns). What
//! a wipe left is compared with an empty disk, and checked, by stock tools, after every run.

mod disk;
mod trace;
mod ways;

use std::path::Path;

use self::disk::Disk;
use self::trace::Calls;
use self::ways::{Spent, Way, Wiper};
use crate::scratch::Scratch;
use crate::{Outcome, setup};

/// Runs of each side.
const RUNS: usize = 3;
/// Values of `detect-zeroes`.
const DETECTION: [&str; 3] = ["off", "on", "unmap"];
/// Writes of metadata for each cluster that are too many.
const MOST_METADATA_WRITES: f64 = 0.1;
/// CPU time, of stock's, that is too much.
const MOST_CPU: f64 = 2.0 / 3.0;

const HEADER: &str = "\
| wipe through | metadata writes: stock, ours | syncs | punches | CPU: stock, ours | wall | \
MiB on the host: stock, ours | |
|---|---|---|---|---|---|---|---|";

/// Runs every way with every detection, and prints a row for each.
pub(crate) fn run(ours: &Path) -> Outcome {
    setup::tracer()?;
    let scratch = Scratch::new("wipe")?;
    let disk = Disk::make(&scratch)?;
    println!("{HEADER}");
    for way in Way::ALL {
        for detection in DETECTION {
            let stock = Wiper::stock(way, detection);
            let ours = Wiper::ours(way, detection, ours);
            let [stock, ours] = contest(&disk, &[stock, ours])?;
            println!("{}", row(way, detection, &stock, &ours, disk.clusters()));
        }
    }
    Ok(())
}

/// What one side did.
#[derive(Clone, Copy, Debug, Default)]
struct Side {
    calls: Calls,
    spent: Spent,
    host_bytes: u64,
}

/// Lets both sides wipe by turns.
fn contest(disk: &Disk, sides: &[Wiper; 2]) -> Outcome<[Side; 2]> {
    let mut runs = [Vec::new(), Vec::new()];
    for _ in 0..RUNS {
        for (wiper, runs) in sides.iter().zip(&mut runs) {
            let image = disk.fresh()?;
            let spent = wiper.wipe(&image)?;
            runs.push((spent, disk.judge(&image)?));
        }
    }
    let mut results = [Side::default(); 2];
    for ((wiper, runs), result) in sides.iter().zip(&runs).zip(&mut results) {
        let image = disk.fresh()?;
        let calls = wiper.traced(&image, disk)?;
        disk.judge(&image)?;
        *result = summary(calls, runs);
    }
    Ok(results)
}

/// The medians of the times, the largest file.
fn summary(calls: Calls, runs: &[(Spent, u64)]) -> Side {
    let median = |of: fn(&Spent) -> f64| {
        let mut values: Vec<f64> = runs.iter().map(|(spent, _)| of(spent)).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or_default()
    };
    let spent = Spent { cpu: median(|spent| spent.cpu), wall: median(|spent| spent.wall) };
    let host_bytes = runs.iter().map(|(_, bytes)| *bytes).max().unwrap_or_default();
    Side { calls, spent, host_bytes }
}

fn row(way: Way, detection: &str, stock: &Side, ours: &Side, clusters: u64) -> String {
    let pair = |of: &dyn Fn(&Side) -> String| [stock, ours].map(of).join(", ");
    let verdict = verdict(stock, ours, clusters);
    format!(
        "| {}, `detect-zeroes={detection}` | {} | {} | {} | {} | {} | {} | {verdict} |",
        way.words(),
        pair(&|side| side.calls.metadata_writes.to_string()),
        pair(&|side| side.calls.syncs.to_string()),
        pair(&|side| side.calls.punches.to_string()),
        pair(&|side| format!("{:.0} ms", side.spent.cpu * 1000.0)),
        pair(&|side| format!("{:.2} s", side.spent.wall)),
        pair(&|side| format!("{:.1}", side.host_bytes as f64 / f64::from(1 << 20))),
    )
}

fn verdict(stock: &Side, ours: &Side, clusters: u64) -> String {
    let for_each = ours.calls.metadata_writes as f64 / clusters as f64;
    let cpu = ours.spent.cpu / stock.spent.cpu;
    let missed: Vec<&str> = [
        (ours.host_bytes > stock.host_bytes, "size"),
        (for_each > MOST_METADATA_WRITES, "metadata writes"),
        (cpu > MOST_CPU, "CPU"),
    ]
    .into_iter()
    .filter_map(|(is_missed, what)| is_missed.then_some(what))
    .collect();
    let judged = match missed.is_empty() {
        true => "reached".to_owned(),
        false => format!("**missed**: {}", missed.join(", ")),
    };
    format!("{for_each:.4} writes a cluster, {cpu:.2} of stock's CPU: {judged}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(cpu: f64, metadata_writes: u64, host_bytes: u64) -> Side {
        let calls = Calls { metadata_writes, ..Calls::default() };
        Side { calls, spent: Spent { cpu, wall: 1.0 }, host_bytes }
    }

    #[test]
    fn every_goal_can_be_missed() {
        let stock = side(3.0, 7, 100);
        assert!(verdict(&stock, &side(2.0, 10, 100), 100).ends_with("reached"));
        for (ours, missed) in [
            (side(2.1, 10, 100), "**missed**: CPU"),
            (side(2.0, 11, 100), "**missed**: metadata writes"),
            (side(2.0, 10, 101), "**missed**: size"),
            (side(3.0, 11, 101), "**missed**: size, metadata writes, CPU"),
        ] {
            let text = verdict(&stock, &ours, 100);
            assert!(text.ends_with(missed), "{text}");
        }
    }

    #[test]
    fn medians_and_the_largest_file_are_reported() {
        let run = |cpu, bytes| (Spent { cpu, wall: 10.0 - cpu }, bytes);
        let found = summary(Calls::default(), &[run(3.0, 5), run(1.0, 9), run(2.0, 7)]);
        assert_eq!((found.spent.cpu, found.spent.wall, found.host_bytes), (2.0, 8.0, 9));
    }
}
