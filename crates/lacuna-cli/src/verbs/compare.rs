//! `compare`: do two disks read the same?
//!
//! Exit codes: 0 the same, 1 not the same, 2 and more that could not be said.

use lacuna::block::Layer;
use lacuna::job::{self, CompareOptions, Comparison, Difference, Strictness};
use pollster::block_on;

use super::open::{self, Request};
use super::progress::Meter;
use super::{Example, ExitCode, Task, Verb, common};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult, errno_words};
use crate::output;
use crate::persona::Tool;

/// Exit code where an image cannot be opened.
const NOT_OPENED: u8 = 2;
/// Exit code where an image cannot be asked what it holds.
const NOT_ASKED: u8 = 3;
/// Exit code where an image cannot be read.
const NOT_READ: u8 = 4;

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "compare",
    task: Task::Check,
    summary: "Compare what two disks contain",
    operands: "FILENAME1 FILENAME2",
    flags: &[
        common::QUIET,
        common::PROGRESS,
        Flag::valued('f', "a-format", "FMT", "format of FILENAME1"),
        Flag::valued('F', "b-format", "FMT", "format of FILENAME2"),
        common::IMAGE_OPTS,
        Flag::switch('s', "strict", "sizes and allocation must be the same too"),
        common::CACHE,
        common::FORCE_SHARE,
        common::OBJECT,
        common::PROBE_BACKING,
    ],
    examples: &[
        Example { shows: "do two disks read the same?", line: "disk.qcow2 disk.raw" },
        Example {
            shows: "and are they of one size, allocated alike?",
            line: "-s -p old.qcow2 new.qcow2",
        },
    ],
    codes: &[
        ExitCode { code: 0, means: "the same" },
        ExitCode { code: 1, means: "not the same, or the command line makes no sense" },
        ExitCode { code: 2, means: "an image could not be opened" },
        ExitCode { code: 3, means: "an image could not be asked what it holds" },
        ExitCode { code: 4, means: "an image could not be read" },
    ],
    run,
};

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let [first, second] = &parsed.operands[..] else {
        return Err(CliError::usage("Expecting two image file names"));
    };
    let cache = open::source_cache(parsed, "cache").map_err(|error| error.with_code(NOT_OPENED))?;
    let opened = |name: &str, flag: &str| {
        let request = Request { cache, ..Request::reading(name, parsed, flag)? };
        match parsed.has("strict") {
            // What the host allocates is no difference between images.
            true => open::open(tool, &request),
            false => open::open_for_content(tool, &request),
        }
    };
    let opened =
        |name: &str, flag: &str| opened(name, flag).map_err(|error| error.with_code(NOT_OPENED));
    let (first, second) = (opened(first, "a-format")?, opened(second, "b-format")?);
    let strictness = match parsed.has("strict") {
        true => Strictness::Allocation,
        false => Strictness::Content,
    };
    let mut meter = Meter::new(tool, parsed, "compare")?;
    let found = block_on(job::compare(
        first.disk(),
        second.disk(),
        CompareOptions { strictness },
        &mut |done, total| meter.update("compare", done, total),
    ));
    meter.finish(found.is_ok());
    let common = first.disk().size_bytes().min(second.disk().size_bytes());
    let found = found.map_err(|error| {
        let code = if error.message().starts_with("Reading the ") { NOT_READ } else { NOT_ASKED };
        let words = qemu_words(&error, parsed, common).filter(|_| !tool.is_own());
        words.unwrap_or_else(|| CliError::from(error)).with_code(code)
    })?;
    if !parsed.has("quiet") {
        output::print(&verdict(&found, common))?;
    }
    Ok(u8::from(!found.is_identical()))
}

/// Says in QEMU's words what could not be read; `common` is the size of the smaller disk.
fn qemu_words(error: &lacuna::Error, parsed: &Parsed, common: u64) -> Option<CliError> {
    if let Some(rest) = error.message().strip_prefix("Asking the ") {
        let file = parsed.operands.get(usize::from(rest.starts_with("second")))?;
        return Some(CliError::new(format!("Sector allocation test failed for {file}")));
    }
    let rest = error.message().strip_prefix("Reading the ")?;
    let (which, rest) = rest.split_once(" disk at offset ")?;
    let offset: u64 = rest.split(':').next()?.parse().ok()?;
    let file = parsed.operands.get(usize::from(which == "second"))?;
    let text = format!("Error while reading offset {offset} of {file}: {}", errno_words(error));
    // Where only one disk goes on, the other one's end was noticed before.
    let warning = if offset < common || parsed.has("quiet") { "" } else { SIZES_DIFFER };
    Some(CliError::new(text).with_output(warning.to_owned()))
}

/// Said of disks that differ in size and are alike otherwise.
const SIZES_DIFFER: &str = "Warning: Image size mismatch!\n";

/// Says what was found; `common` is the size of the smaller disk.
fn verdict(found: &Comparison, common: u64) -> String {
    let sector = found.difference.and_then(Difference::sector).map(|offset| offset.0);
    let warning = match found.sizes_differ && sector.is_none_or(|offset| offset >= common) {
        true => SIZES_DIFFER,
        false => "",
    };
    let offset = sector.unwrap_or(0);
    match found.difference {
        None => format!("{warning}Images are identical.\n"),
        Some(Difference::Size) => "Strict mode: Image size mismatch!\n".to_owned(),
        Some(Difference::Content(_)) => {
            format!("{warning}Content mismatch at offset {offset}!\n")
        }
        Some(Difference::Allocation(_)) => {
            format!("Strict mode: Offset {offset} block status mismatch!\n")
        }
    }
}
