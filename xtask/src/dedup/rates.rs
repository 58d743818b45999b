//! How fast an image in the page cache is gone through by one core, beside what memory, the page cache and
//! the hash allow; and how much memory its fingerprints take.

use std::fs::{self, File};
use std::hint::black_box;
use std::io::Read;
use std::path::Path;

use twox_hash::XxHash3_64;

use super::random;
use crate::Outcome;
use crate::cells::verdict;
use crate::run::{command, output};
use crate::scratch::Scratch;
use crate::watched::{Cost, median, summary, watch};

/// The data that is looked at.
const MIB: u64 = 2048;
/// A part of it, for what a program takes anyway.
const SMALL_MIB: u64 = 512;
const RUNS: usize = 3;
/// Bytes a second of one core, in 10^9, that are to be gone through.
const GOAL: f64 = 2.0;
/// Bytes of memory for each cluster that are too many.
const MOST_INDEX_BYTES: f64 = 12.0;
/// A cluster of images with many.
const SMALL_CLUSTER: u64 = 4096;
/// What is read at a time: it stays in the cache of a core.
const PIECE: usize = 64 << 10;
/// Memory that is gone through at a time, larger than any cache.
const STRETCH: usize = 256 << 20;

pub(super) fn run(ours: &Path, scratch: &Scratch) -> Outcome<String> {
    scratch.require((MIB * 4) << 20)?;
    let raw = random(scratch, "raw", MIB)?;
    let image = converted(scratch, &raw, "image", "65536")?;
    let bytes = (MIB << 20) as f64;
    let rate = |words: &[&str]| {
        let cost = runs(ours, scratch, &[words, &[&image]].concat())?;
        Ok::<f64, String>(bytes / cost.cpu / 1e9)
    };
    let bounds = bounds(&raw)?;
    let dry = rate(&["dedup", "-q", "--dry-run"])?;
    let dedup = rate(&["dedup", "-q"])?;
    let report = rate(&["dedup", "--report"])?;
    let index = index_bytes(ours, scratch, &raw)?;
    let [memory, cache, hash] = bounds;
    Ok(format!(
        "| 2 GiB of data without anything alike, in the page cache | GB a second of one core | |\n\
         |---|---|---|\n\
         | memory copied to memory | {memory:.1} | |\n\
         | page cache read in pieces of 64 KiB | {cache:.1} | |\n\
         | XXH3 of memory in clusters of 64 KiB, in this unoptimised program | {hash:.1} | |\n\
         | `dedup --dry-run`, clusters of 64 KiB | {dry:.1} | {} |\n\
         | `dedup`, nothing to share | {dedup:.1} | {} |\n\
         | `dedup --report`, five cluster sizes at once | {report:.1} | |\n\n\
         Memory of `dedup` for each cluster of 4 KiB, besides tables: {index:.1} bytes \
         (at most {MOST_INDEX_BYTES}: {})",
        verdict(dry >= GOAL),
        verdict(dedup >= GOAL),
        verdict(index <= MOST_INDEX_BYTES),
    ))
}

fn converted(scratch: &Scratch, raw: &str, name: &str, cluster: &str) -> Outcome<String> {
    let image = scratch.file(name);
    let options = format!("cluster_size={cluster}");
    let words = ["convert", "-f", "raw", "-O", "qcow2", "-o", &options, raw, &image];
    output(command("qemu-img", &words))?;
    Ok(image)
}

fn runs(ours: &Path, scratch: &Scratch, words: &[&str]) -> Outcome<Cost> {
    let once = |_| {
        let mut program = command(&ours.to_string_lossy(), words);
        watch(&mut program, scratch.path()).map(|(cost, _)| cost)
    };
    // The first fills the page cache.
    once(0)?;
    let costs: Vec<Cost> = (0..RUNS).map(once).collect::<Outcome<_>>()?;
    Ok(summary(&costs))
}

/// Returns what memory of a large image has beyond that of a small one, for each of its clusters. Tables are
/// hardly kept in either, so that fingerprints are what is left.
fn index_bytes(ours: &Path, scratch: &Scratch, raw: &str) -> Outcome<f64> {
    let small = random(scratch, "small.raw", SMALL_MIB)?;
    let cluster = SMALL_CLUSTER.to_string();
    let memory = |raw: &str, name: &str| {
        let image = converted(scratch, raw, name, &cluster)?;
        let caches = "l2-cache-size=256k,refcount-cache-size=64k";
        let options = format!("driver=qcow2,{caches},file.driver=file,file.filename={image}");
        let words = ["dedup", "-q", "--image-opts", &options];
        runs(ours, scratch, &words).map(|cost| cost.memory_bytes as f64)
    };
    let more = memory(raw, "many")? - memory(&small, "few")?;
    Ok(more / (((MIB - SMALL_MIB) << 20) / SMALL_CLUSTER) as f64)
}

/// Returns rates in 10^9 bytes a second of this thread: memory, page cache, hash.
fn bounds(raw: &str) -> Outcome<[f64; 3]> {
    let source = stretch(raw)?;
    let mut target = vec![1; STRETCH];
    let memory = rate(|| {
        target.copy_from_slice(black_box(&source));
        Ok(black_box(target.len()))
    })?;
    let cache = rate(|| {
        let mut file = File::open(raw).map_err(|error| format!("no {raw}: {error}"))?;
        let mut piece = vec![0; PIECE];
        let mut total = 0;
        loop {
            match file.read(&mut piece) {
                Ok(0) => return Ok(total),
                Ok(len) => total += len,
                Err(error) => return Err(format!("cannot read {raw}: {error}")),
            }
        }
    })?;
    let hash = rate(|| {
        for cluster in source.chunks(PIECE) {
            black_box(XxHash3_64::oneshot_with_seed(7, black_box(cluster)));
        }
        Ok(source.len())
    })?;
    Ok([memory, cache, hash])
}

/// Reads the start of a file.
fn stretch(raw: &str) -> Outcome<Vec<u8>> {
    let mut bytes = vec![0; STRETCH];
    let read = File::open(raw).and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(|error| format!("cannot read {raw}: {error}"))?;
    Ok(bytes)
}

/// Measures the CPU time of what goes through so many bytes.
fn rate(mut pass: impl FnMut() -> Outcome<usize>) -> Outcome<f64> {
    let mut rates = Vec::new();
    for _ in 0..RUNS {
        let start = thread_nanoseconds()?;
        let bytes = pass()?;
        rates.push(bytes as f64 / (thread_nanoseconds()? - start) as f64);
    }
    Ok(median(rates))
}

/// Returns how long this thread has been on a core.
fn thread_nanoseconds() -> Outcome<u64> {
    let path = "/proc/thread-self/schedstat";
    let text = fs::read_to_string(path).map_err(|error| format!("cannot read {path}: {error}"))?;
    let first = text.split_whitespace().next().and_then(|word| word.parse().ok());
    first.ok_or_else(|| format!("{path} says what nobody knows: {text}"))
}
