//! The images that space is given back in: 30 % of the disk in use, in a file as long as all of it.

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::Outcome;
use crate::looks::clean;
use crate::run::{command, output};
use crate::scratch::Scratch;

/// What both make unasked.
pub(super) const CLUSTER_BYTES: u64 = 64 << 10;
/// Of ten clusters, so many are in use.
const LIVE_OF_TEN: u64 = 3;
/// One command of qemu-io writes no more, since it holds all of it in memory.
const MOST_CLUSTERS: u64 = 1024;

/// How the clusters in use lie in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// In three runs: near the start of the file, in its middle, and at the end.
    Clustered,
    /// Three together, then seven of holes, and so on.
    Spread,
}

impl Shape {
    pub(super) const ALL: [Self; 2] = [Self::Clustered, Self::Spread];

    pub(super) const fn words(self) -> &'static str {
        match self {
            Self::Clustered => "clustered",
            Self::Spread => "evenly spread",
        }
    }

    /// Returns the ranges of a disk that are in use, as first cluster and count.
    fn live(self, clusters: u64) -> Vec<(u64, u64)> {
        match self {
            Self::Clustered => [1, 5, 9].map(|tenth| (clusters * tenth / 10, clusters / 10)).into(),
            Self::Spread => (0..clusters / 10).map(|ten| (ten * 10, LIVE_OF_TEN)).collect(),
        }
    }
}

/// An image of stock tools, as it was before.
#[derive(Debug, Default)]
pub(super) struct Fixture {
    pub(super) path: String,
    /// Where its data lies in the file: start and end.
    data: Vec<(u64, u64)>,
}

impl Fixture {
    /// Makes a disk whose clusters lie in the file as they follow each other, writes what is in use
    /// and discards the rest: what a disk that was full has become after an `fstrim`.
    pub(super) fn make(scratch: &Scratch, shape: Shape, size_bytes: u64) -> Outcome<Self> {
        let path = scratch.file("before");
        let size = size_bytes.to_string();
        let create = ["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"];
        output(command("qemu-img", &[&create[..], &[&path, &size]].concat()))?;
        let clusters = size_bytes / CLUSTER_BYTES;
        shell(&path, &commands(&shape.live(clusters), clusters))?;
        clean(&path)?;
        let map = ["map", "-f", "qcow2", "--output=json", &path];
        let data = data(&output(command("qemu-img", &map))?)?;
        Ok(Self { path, data })
    }

    /// Returns how much data there is.
    pub(super) fn live_bytes(&self) -> u64 {
        self.data.iter().map(|(start, end)| end - start).sum()
    }

    /// Returns how much data lies beyond a length of the file.
    pub(super) fn live_beyond(&self, length_bytes: u64) -> u64 {
        let beyond = |&(start, end): &(u64, u64)| end.saturating_sub(start.max(length_bytes));
        self.data.iter().map(beyond).sum()
    }
}

/// Commands of qemu-io.
fn commands(live: &[(u64, u64)], clusters: u64) -> String {
    let mut text = String::new();
    let mut at = 0;
    for (number, &(first, count)) in live.iter().chain([&(clusters, 0)]).enumerate() {
        text += &pieces("discard -q", at, first - at);
        text += &pieces(&format!("write -q -P {}", 1 + number % 250), first, count);
        at = first + count;
    }
    text + "flush\n"
}

/// A command for each piece that one may have.
fn pieces(command: &str, first: u64, count: u64) -> String {
    let kib = |clusters: u64| (clusters * CLUSTER_BYTES) >> 10;
    let starts = (first..first + count).step_by(MOST_CLUSTERS as usize);
    let line = |start: u64| {
        let count = MOST_CLUSTERS.min(first + count - start);
        format!("{command} {}k {}k\n", kib(start), kib(count))
    };
    starts.map(line).collect()
}

/// Lets qemu-io take commands from its standard input: there are too many for a command line.
fn shell(path: &str, commands: &str) -> Outcome {
    let mut shell = Command::new("qemu-io");
    shell.args(["-f", "qcow2", "-d", "unmap", "-t", "writeback", path]);
    let lost = |error| format!("lost qemu-io: {error}");
    let mut child = shell
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .map_err(|error| format!("cannot start qemu-io: {error}"))?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(commands.as_bytes()).map_err(lost)?;
    }
    match child.wait().map_err(lost)?.success() {
        true => Ok(()),
        false => Err("qemu-io could not make the image".into()),
    }
}

/// Reads what `qemu-img map` says of data, in host ranges.
fn data(map: &str) -> Outcome<Vec<(u64, u64)>> {
    let map: Value = serde_json::from_str(map).map_err(|error| format!("no map: {error}"))?;
    let entries = map.as_array().into_iter().flatten().filter(|entry| entry["data"] == true);
    let place = |entry: &Value| {
        let start = entry["offset"].as_u64()?;
        Some((start, start + entry["length"].as_u64()?))
    };
    entries
        .map(|entry| place(entry).ok_or_else(|| format!("data without a place: {entry}")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_tenths_of_a_disk_are_in_use_in_either_shape() {
        for shape in Shape::ALL {
            let live = shape.live(1000);
            assert_eq!(live.iter().map(|(_, count)| count).sum::<u64>(), 300, "{shape:?}");
        }
    }

    #[test]
    fn what_is_not_in_use_is_discarded() {
        let text = commands(&[(1, 2), (5, 1)], 8);
        let expected = "discard -q 0k 64k\nwrite -q -P 1 64k 128k\ndiscard -q 192k 128k\n\
                        write -q -P 2 320k 64k\ndiscard -q 384k 128k\nflush\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn data_beyond_a_length_is_counted_in_part() {
        let map = r#"[{"start": 0, "length": 10, "data": true, "offset": 90},
            {"start": 10, "length": 5, "data": false}, {"start": 15, "length": 4, "data": true, "offset": 200}]"#;
        let fixture = Fixture { path: String::new(), data: data(map).unwrap() };
        assert_eq!((fixture.live_bytes(), fixture.live_beyond(95)), (14, 9));
        assert!(data(r#"[{"data": true}]"#).is_err());
    }
}
