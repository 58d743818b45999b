//! `dedup`: clusters with equal content share a place; what that would save is told before.

mod across;
pub(super) mod in_place;
mod pins;
mod report;

use lacuna::job::{
    DedupWritesOptions, DuplicateOptions, DuplicateSource, Duplicates, Sharing, estimate_duplicates,
};
use lacuna::qcow2::{Shared, Worth};
use pollster::block_on;

use self::pins::Pins;
use super::open::{self, FileChain, Request};
use super::pace;
use super::progress::Meter;
use super::{Example, ExitCode, Form, Task, Verb, common, form};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::interrupt::INTERRUPTED;
use crate::output::{self, short_size};
use crate::persona::Tool;
use crate::size;

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "dedup",
    task: Task::Change,
    summary: "Store equal clusters once; --report: what would that save",
    operands: "IMAGE...",
    flags: &[
        Flag::switch('\0', "report", "look only: what would be saved, at several cluster sizes")
            .long_only(),
        Flag::switch('\0', "dry-run", "tell how much would be freed, and change nothing")
            .long_only(),
        Flag::switch('\0', "across", "move what images have at the same places to --base")
            .long_only(),
        Flag::valued('\0', "base", "FILE", "with --across: the new backing file of all images")
            .long_only(),
        Flag::switch('\0', "repin", "pin shared clusters whose pins somebody dropped").long_only(),
        Flag::switch('\0', "unpin", "take the pins of shared clusters off").long_only(),
        pace::BANDWIDTH,
        Flag::valued('\0', "memory", "SIZE", "most memory for fingerprints (256M)").long_only(),
        common::QUIET,
        common::PROGRESS,
        common::FORMAT,
        common::IMAGE_OPTS,
        common::OUTPUT,
        common::FORCE_SHARE,
        common::PROBE_BACKING,
        common::OBJECT,
    ],
    examples: &[
        Example { shows: "store equal clusters once", line: "disk.qcow2" },
        Example { shows: "the same, in the background", line: "--bandwidth 20M -q disk.qcow2" },
        Example {
            shows: "two images become overlays of what they have in common",
            line: "--across old.qcow2 new.qcow2 --base common.qcow2",
        },
        Example { shows: "pins that `qemu-img check -r all` dropped", line: "--repin disk.qcow2" },
        Example { shows: "what is stored more than once", line: "--report disk.qcow2" },
        Example {
            shows: "in several images and across them, for programs",
            line: "--report --output=json disk.qcow2 new.qcow2",
        },
    ],
    codes: &[
        ExitCode { code: 0, means: "done" },
        ExitCode { code: 1, means: "an image could not be opened, read or changed" },
        ExitCode {
            code: INTERRUPTED,
            means: "interrupted; the image is valid, and another run goes on",
        },
    ],
    run,
};

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    if let Some(pins) = Pins::read(parsed)? {
        return pins.run(tool, parsed);
    }
    match (parsed.has("across"), parsed.has("report")) {
        (true, _) => across::run(tool, parsed),
        (false, _) if parsed.has("base") => Err(CliError::usage("--base goes with --across")),
        (false, true) => report(tool, parsed),
        (false, false) => in_place::run(tool, parsed),
    }
}

fn report(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let form = form(parsed)?;
    if parsed.operands.is_empty() {
        return Err(CliError::usage("Expecting one image file name or more"));
    }
    if let Some(flag) = ["dry-run", "bandwidth"].into_iter().find(|flag| parsed.has(flag)) {
        return Err(CliError::usage(format!("--{flag} and --report are mutually exclusive")));
    }
    let memory_bytes = memory_bytes(parsed)?;
    let options = DuplicateOptions { memory_bytes, ..DuplicateOptions::default() };
    let mut chains = Vec::new();
    for name in &parsed.operands {
        chains.push(open::open_for_content(tool, &Request::reading(name, parsed, "format")?)?);
    }
    let mut meter = Meter::new(tool, parsed, "dedup")?;
    let found = count(&chains, options, &mut meter);
    meter.finish(found.is_ok());
    let found = found?;
    let report = report::Report::new(&chains, &parsed.operands, &found)?;
    output::print(&report.text(form)).map(|()| 0)
}

/// Reads `--memory`.
pub(super) fn memory_bytes(parsed: &Parsed) -> CliResult<u64> {
    match parsed.last("memory") {
        None => Ok(DuplicateOptions::default().memory_bytes),
        Some(text) => size::within("memory bound", text, 1 << 20, 1 << 62),
    }
}

/// Reads the options of deduplication on the way of writes.
pub(crate) fn writes(parsed: &Parsed) -> CliResult<DedupWritesOptions> {
    let sharing = Sharing::WhereItPays;
    let mut options = DedupWritesOptions { sharing, ..DedupWritesOptions::default() };
    if let Some(text) = parsed.last("dedup-memory") {
        options.memory_bytes = size::within("memory bound", text, 1 << 20, 1 << 40)?;
    }
    Ok(options)
}

/// Says what writes had shared.
pub(crate) fn told(shared: &Shared, worth: &Worth) -> String {
    match shared.shared {
        0 => format!("No clusters share a place\n{}", declined(worth)),
        count => format!("{count} clusters share a place with others\n{HAZARD}"),
    }
}

/// Says what was not shared, if anything.
pub(super) fn declined(worth: &Worth) -> String {
    match *worth {
        Worth { saved_bytes: 0, .. } => String::new(),
        Worth { saved_bytes, pin_bytes } => format!(
            "Sharing would save {}, but the tables of its pins take {}: nothing more was shared\n",
            short_size(saved_bytes),
            short_size(pin_bytes)
        ),
    }
}

/// Who must not write to such an image.
pub(super) const HAZARD: &str = "\
Whoever writes to it must heed the COPIED flag, as with internal snapshots. QEMU does;
cloud-hypervisor, crosvm and qcow2-rs did not when looked at, and corrupt such images.
";

/// The size of an image's clusters, where it has any.
fn cluster_bytes(chain: &FileChain) -> Option<u64> {
    chain.disk().as_qcow2().map(|image| image.geometry().cluster_bytes())
}

/// Counts at the sizes of `options` and at those of the images.
fn count(
    chains: &[FileChain],
    mut options: DuplicateOptions,
    meter: &mut Meter,
) -> CliResult<Duplicates> {
    options.cluster_sizes.extend(chains.iter().filter_map(cluster_bytes));
    options.cluster_sizes.sort_unstable();
    options.cluster_sizes.dedup();
    let source = |chain| DuplicateSource {
        layer: FileChain::disk(chain),
        cluster_bytes: cluster_bytes(chain),
    };
    let sources: Vec<_> = chains.iter().map(source).collect();
    let mut update = |done, total| meter.update("count", done, total);
    Ok(block_on(estimate_duplicates(&sources, &options, &mut update))?)
}

/// Tells how many bytes sharing in place would free in one image, if it pays.
pub(super) fn would_free(
    chain: &FileChain,
    memory_bytes: u64,
    meter: &mut Meter,
) -> CliResult<u64> {
    let options = DuplicateOptions { memory_bytes, cluster_sizes: Vec::new() };
    let chains = std::slice::from_ref(chain);
    let found = count(chains, options, meter)?;
    Ok(report::Report::new(chains, &[], &found)?.freed_bytes())
}
