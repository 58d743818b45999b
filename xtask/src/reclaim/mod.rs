//! A benchmark of our own: an image with 30 % in use, made short in place, beside what else there is.
//!
//! * `fixture.rs` makes the image: data in a few runs, or evenly spread
//! * `ways.rs` is who makes it short: ours, `qemu-img convert`, `virt-sparsify`
//!
//! Judged are what is written (at most 1.05 of the data that lay beyond the new end, and the tables),
//! the space that it takes meanwhile (at most 1 % of the disk), and the length of the file (within
//! 1 % of convert's). What a run left is compared with the image before, and checked, by stock tools.

mod fixture;
mod ways;

use std::path::Path;

use self::fixture::{Fixture, Shape};
use self::ways::Way;
use crate::cells::{mib, on_one_line};
use crate::looks::length;
use crate::run::{command, output};
use crate::scratch::Scratch;
use crate::watched::{Cost, summary};
use crate::{Outcome, looks};

/// The size of the disk that is judged.
const SIZE_BYTES: u64 = 10 << 30;
/// Runs of each side.
const RUNS: usize = 3;
/// Writes, of the data that has to move, that are too many.
const MOST_WRITTEN: f64 = 1.05;
/// Of the disk, space that is too much.
const MOST_EXTRA: f64 = 0.01;
/// So much space is taken for any disk: what moves at a time has at least 64 MiB, besides tables.
const LEAST_EXTRA_BYTES: u64 = 65 << 20;
/// Of the length of convert's file, a difference that is too much.
const MOST_LONGER: f64 = 0.01;

const HEADER: &str = "\
| 30 % in use | by | written | at most | space beside it | CPU | wall | file | |
|---|---|---|---|---|---|---|---|---|";

/// Runs both shapes and prints a row for each way. `--size 2G` takes a smaller disk.
pub(crate) fn run(ours: &Path, arguments: &[String]) -> Outcome {
    let size_bytes = size(arguments)?;
    let scratch = Scratch::new("reclaim")?;
    // The image, a copy of it, what is made of that, and room to breathe.
    scratch.require(size_bytes + (1 << 30))?;
    let ways = Way::all(ours);
    println!("A disk of {} GiB\n\n{HEADER}", size_bytes >> 30);
    for shape in Shape::ALL {
        let fixture = Fixture::make(&scratch, shape, size_bytes)?;
        let results = contest(&scratch, &fixture, &ways)?;
        for row in rows(shape, &fixture, &ways, &results, size_bytes) {
            println!("{row}");
        }
        std::fs::remove_file(&fixture.path).map_err(|error| format!("an image stays: {error}"))?;
    }
    Ok(())
}

fn size(arguments: &[String]) -> Outcome<u64> {
    match arguments {
        [] => Ok(SIZE_BYTES),
        [flag, text] if flag == "--size" => {
            let gib = text.strip_suffix('G').and_then(|digits| digits.parse::<u64>().ok());
            match gib {
                Some(gib @ 1..=64) => Ok(gib << 30),
                _ => Err(format!("--size {text}: a size is 1G to 64G")),
            }
        }
        _ => Err("--reclaim takes --size SIZE, and nothing else".into()),
    }
}

/// What came of a way: its figures, or why it has none.
type Judged = Outcome<(Cost, u64)>;

/// Lets all ways run by turns. One that cannot run here says why; ours has to.
fn contest(scratch: &Scratch, fixture: &Fixture, ways: &[Way]) -> Outcome<Vec<Judged>> {
    let mut runs: Vec<Outcome<Vec<(Cost, u64)>>> = ways.iter().map(|_| Ok(Vec::new())).collect();
    for _ in 0..RUNS {
        for (way, runs) in ways.iter().zip(&mut runs) {
            let Ok(so_far) = runs else { continue };
            match once(scratch, fixture, way) {
                Ok(run) => so_far.push(run),
                Err(reason) if way.may_be_missing() => *runs = Err(reason),
                Err(reason) => return Err(reason),
            }
        }
    }
    let judged = |runs: Vec<(Cost, u64)>| {
        let costs: Vec<Cost> = runs.iter().map(|(cost, _)| *cost).collect();
        (summary(&costs), runs.iter().map(|(_, length)| *length).max().unwrap_or_default())
    };
    Ok(runs.into_iter().map(|runs| runs.map(judged)).collect())
}

/// One run on a fresh copy; returns what it took and how long the file is.
fn once(scratch: &Scratch, fixture: &Fixture, way: &Way) -> Outcome<(Cost, u64)> {
    let copy = scratch.file("image");
    output(command("cp", &["--sparse=always", &fixture.path, &copy]))?;
    output(command("sync", &[&copy]))?;
    let (cost, result) = way.run(scratch, &copy)?;
    looks::clean(&result)?;
    looks::same("qcow2", &fixture.path, &result)?;
    let length = length(&result)?;
    for file in [&copy, &scratch.file("target")] {
        match std::fs::remove_file(file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(format!("{file} stays behind: {error}"));
            }
            _ => {}
        }
    }
    Ok((cost, length))
}

fn rows(
    shape: Shape,
    fixture: &Fixture,
    ways: &[Way],
    results: &[Judged],
    size_bytes: u64,
) -> Vec<String> {
    let converted = results.iter().zip(ways).find(|(_, way)| matches!(way, Way::Convert));
    let converted = converted.and_then(|(result, _)| result.as_ref().ok()).map(|result| result.1);
    let row = |(way, result): (&Way, &Judged)| {
        let start = format!("| {} | {} |", shape.words(), way.words());
        match result {
            Err(reason) => format!("{start} cannot run here: {} |||||||", on_one_line(reason)),
            Ok((cost, length)) => {
                let goals = matches!(way, Way::Ours(_)).then(|| {
                    Goals::of(fixture, *length, converted.unwrap_or_default(), size_bytes)
                });
                format!("{start} {}", figures(cost, *length, goals.as_ref()))
            }
        }
    };
    ways.iter().zip(results).map(row).collect()
}

fn figures(cost: &Cost, length_bytes: u64, goals: Option<&Goals>) -> String {
    format!(
        "{} | {} | {} | {:.2} s | {:.1} s | {} | {} |",
        mib(cost.written_bytes),
        goals.map_or_else(String::new, |goals| mib(goals.written_bytes)),
        mib(cost.extra_bytes),
        cost.cpu,
        cost.wall,
        mib(length_bytes),
        goals.map_or_else(String::new, |goals| goals.verdict(cost, length_bytes)),
    )
}

/// What ours is to reach.
#[derive(Debug)]
struct Goals {
    written_bytes: u64,
    extra_bytes: u64,
    length_bytes: u64,
}

impl Goals {
    fn of(fixture: &Fixture, length_bytes: u64, converted_bytes: u64, size_bytes: u64) -> Self {
        let moved = fixture.live_beyond(length_bytes) as f64 * MOST_WRITTEN;
        // All that the file has besides data is tables.
        let tables = length_bytes.saturating_sub(fixture.live_bytes());
        Self {
            written_bytes: moved as u64 + tables,
            extra_bytes: LEAST_EXTRA_BYTES.max((size_bytes as f64 * MOST_EXTRA) as u64),
            length_bytes: (converted_bytes as f64 * (1.0 + MOST_LONGER)) as u64,
        }
    }

    fn verdict(&self, cost: &Cost, length_bytes: u64) -> String {
        let missed: Vec<&str> = [
            (cost.written_bytes > self.written_bytes, "bytes written"),
            (cost.extra_bytes > self.extra_bytes, "space"),
            (length_bytes > self.length_bytes, "length"),
        ]
        .into_iter()
        .filter_map(|(is_missed, what)| is_missed.then_some(what))
        .collect();
        match missed.is_empty() {
            true => "reached".to_owned(),
            false => format!("**missed**: {}", missed.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_goal_can_be_missed() {
        let goals = Goals { written_bytes: 100, extra_bytes: 10, length_bytes: 50 };
        let cost =
            |written_bytes, extra_bytes| Cost { written_bytes, extra_bytes, ..Cost::default() };
        assert_eq!(goals.verdict(&cost(100, 10), 50), "reached");
        assert_eq!(goals.verdict(&cost(101, 10), 50), "**missed**: bytes written");
        assert_eq!(goals.verdict(&cost(100, 11), 51), "**missed**: space, length");
    }

    #[test]
    fn sizes_are_read_or_refused() {
        let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(size(&[]), Ok(10 << 30));
        assert_eq!(size(&words("--size 2G")), Ok(2 << 30));
        for wrong in ["--size", "--size 2", "--size 0G", "--size 99999999999999999999G", "x"] {
            assert!(size(&words(wrong)).is_err(), "{wrong}");
        }
    }

    #[test]
    fn who_cannot_run_says_why_in_one_row() {
        let fixture = Fixture::default();
        let ways = [Way::Convert, Way::Sparsify];
        let results = [Ok((Cost::default(), 7 << 20)), Err("no kernel\n| here".to_owned())];
        let rows = rows(Shape::Spread, &fixture, &ways, &results, 1 << 30);
        assert!(rows[0].contains("7.0 MiB"), "{rows:?}");
        assert!(rows[1].contains("cannot run here: no kernel / here"), "{rows:?}");
    }
}
