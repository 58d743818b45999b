//! `map`: which file holds which part of the disk.
//!
//! * `human.rs` lists runs for people, `json.rs` for programs
//! * `picture.rs` puts the disk on a screen

mod human;
mod json;
mod picture;

use lacuna::block::{AllocationDepth, Layer};
use lacuna::chain::MapRun;
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;

use super::open::{self, FileChain, Request};
use super::{Example, Form, Task, Verb, advice, common, form, one_image};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::nodes::FileMap;
use crate::persona::Tool;
use crate::size::{self, SizeError};

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "map",
    task: Task::Look,
    summary: "Show where the parts of a disk lie",
    operands: "FILENAME",
    flags: &[
        common::FORMAT,
        common::IMAGE_OPTS,
        Flag::valued('s', "start-offset", "OFFSET", "begin here"),
        Flag::valued('l', "max-length", "LENGTH", "go on for at most so many bytes"),
        common::OUTPUT,
        common::FORCE_SHARE,
        common::OBJECT,
        common::PROBE_BACKING,
        Flag::switch('\0', "picture", "draw the disk, with a legend and totals").long_only().own(),
    ],
    examples: &[
        Example {
            shows: "what is data, zero or a hole, for programs",
            line: "--output=json disk.qcow2",
        },
        Example { shows: "where the first MiB lies", line: "-l 1M disk.qcow2" },
        Example { shows: "the disk on a screen", line: "--picture overlay.qcow2" },
    ],
    codes: &[],
    run,
};

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let form = form(parsed)?;
    if form == Form::Json && parsed.has("picture") {
        let error = CliError::usage("--picture is for people, --output=json for programs");
        return Err(
            error.with_hint("the same facts without --picture; `info --totals` adds them up")
        );
    }
    let start = offset(parsed, "start-offset", "start offset")?.unwrap_or(0);
    let len = offset(parsed, "max-length", "max length")?.unwrap_or(u64::MAX);
    let chain = open::open(tool, &Request::reading(one_image(parsed)?, parsed, "format")?)?;
    let end = chain.disk().size_bytes().min(start.saturating_add(len));
    let range = GuestRange::new(GuestOffset(start), end.saturating_sub(start));
    let map = block_on(asking_host(tool, &chain, chain.map(range)));
    match form {
        Form::Human if parsed.has("picture") => picture::show(&chain, map, range),
        Form::Human => human::list(tool, &chain, map),
        Form::Json => json::list(tool, map, range.start),
    }
}

/// Has the host asked below allocated clusters: always under our own name, since that is the truth;
/// under QEMU's only of images that look preallocated, as those programs do to save calls.
async fn asking_host<'a>(tool: &Tool, chain: &FileChain, mut map: FileMap<'a>) -> FileMap<'a> {
    for level in 0..chain.levels().len() {
        if tool.is_own() || looks_preallocated(chain, level).await {
            map = map.asking_host_of(level);
        }
    }
    map
}

/// Says whether clearly more clusters are in use than the host has allocated: one in ten, at least
/// two. Where that cannot be known they are not.
pub(super) async fn looks_preallocated(chain: &FileChain, level: usize) -> bool {
    let Some(image) = chain.level_image(level) else { return false };
    let Some(allocated) = image.storage().allocated_bytes() else { return false };
    let allocated = allocated / image.geometry().cluster_bytes();
    let more = (allocated * 10 / 9).max(allocated + 2);
    image.uses_clusters(more).await.unwrap_or(false)
}

fn offset(parsed: &Parsed, flag: &str, shown: &str) -> CliResult<Option<u64>> {
    let Some(text) = parsed.last(flag) else { return Ok(None) };
    match size::parse_offset(text) {
        Ok(value) => Ok(Some(value)),
        Err(SizeError::NotANumber) => {
            let text = format!("Invalid {shown} specified: '{text}'.");
            Err(CliError::new(text).with_hint(advice::SIZES))
        }
        Err(SizeError::OutOfRange) => Err(CliError::new(format!(
            "Invalid {shown} specified. Must be between 0 and {}.",
            i64::MAX
        ))),
    }
}

/// Shows a run as QEMU's programs do: what has no space and is not known to be zeros is not there.
/// Devices have such places where they were discarded, and exports what another context marks.
fn as_qemu(mut run: MapRun) -> MapRun {
    let status = &mut run.status;
    if status.is_hole && !status.reads_zero && !status.is_compressed {
        (status.depth, status.host) = (AllocationDepth::NOWHERE, None);
    }
    run
}

/// Says whether the run holds bytes that may be anything.
fn is_data(run: &MapRun) -> bool {
    run.is_present() && !run.status.reads_zero
}
