//! `map`: which file holds which part of the disk.

use lacuna::block::Layer;
use lacuna::chain::{LevelFacts, MapRun};
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;

use super::open::{self, FileChain, Request};
use super::{Example, Form, Task, Verb, advice, common, form, one_image};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::nodes::FileMap;
use crate::output::{self, Lines};
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
    ],
    examples: &[
        Example {
            shows: "what is data, zero or a hole, for programs",
            line: "--output=json disk.qcow2",
        },
        Example { shows: "where the first MiB lies", line: "-l 1M disk.qcow2" },
    ],
    codes: &[],
    run,
};

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let form = form(parsed)?;
    let start = offset(parsed, "start-offset", "start offset")?.unwrap_or(0);
    let len = offset(parsed, "max-length", "max length")?.unwrap_or(u64::MAX);
    let chain = open::open(tool, &Request::reading(one_image(parsed)?, parsed, "format")?)?;
    let end = chain.disk().size_bytes().min(start.saturating_add(len));
    let range = GuestRange::new(GuestOffset(start), end.saturating_sub(start));
    let map = block_on(asking_host(tool, &chain, chain.map(range)));
    match form {
        Form::Human => human(tool, &chain, map),
        Form::Json => json(tool, map, range.start),
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

/// Lists what lies in files as it is; stops where something does not.
fn human(tool: &Tool, chain: &FileChain, mut map: FileMap<'_>) -> CliResult<u8> {
    let name = |level: &LevelFacts| match level.content_path().display().to_string() {
        name if tool.is_own() => output::tame(&name),
        name => name,
    };
    let files: Vec<String> = chain.levels().iter().map(name).collect();
    let mut lines =
        Lines::starting(&format!("{:<16}{:<16}{:<16}File\n", "Offset", "Length", "Mapped to"));
    block_on(async {
        while let Some(run) = map.next().await? {
            if !is_data(&run) {
                continue;
            }
            let Some(host) = run.status.host else {
                let text = "File contains external, encrypted or compressed clusters.";
                let error = CliError::new(text).with_hint("--output=json lists those as well");
                return Err(error.with_output(lines.into_text()));
            };
            for value in [run.range.start.0, run.range.len, host.0] {
                lines.hexadecimal(value);
            }
            lines.text(&files[run.level]);
            lines.text("\n");
            lines.print_when_full()?;
        }
        lines.print().map(|()| 0)
    })
}

fn is_data(run: &MapRun) -> bool {
    run.is_present() && !run.status.reads_zero
}

fn json(tool: &Tool, mut map: FileMap<'_>, start: GuestOffset) -> CliResult<u8> {
    let mut lines = Lines::starting("[");
    let walked: CliResult<bool> = block_on(async {
        let mut is_empty = true;
        while let Some(run) = map.next().await? {
            lines.text(if is_empty { "" } else { ",\n" });
            json_line(tool, &mut lines, &run);
            lines.print_when_full()?;
            is_empty = false;
        }
        Ok(is_empty)
    });
    if walked? {
        lines.text(&past_the_end(tool, start));
    }
    lines.text("]\n");
    lines.print().map(|()| 0)
}

/// One of a million lines: put together by hand, the formatting machinery costs several times the
/// walk itself.
fn json_line(tool: &Tool, lines: &mut Lines, run: &MapRun) {
    let truth = |value: bool| if value { "true" } else { "false" };
    lines.text("{ \"start\": ");
    lines.decimal(run.range.start.0);
    lines.text(", \"length\": ");
    lines.decimal(run.range.len);
    lines.text(", \"depth\": ");
    lines.decimal(run.level as u64);
    lines.text(", \"present\": ");
    lines.text(truth(run.is_present()));
    lines.text(", \"zero\": ");
    lines.text(truth(run.status.reads_zero));
    lines.text(", \"data\": ");
    lines.text(truth(is_data(run) || run.never_written));
    lines.text(", \"compressed\": ");
    lines.text(truth(run.status.is_compressed));
    // QEMU's members do not tell reserved space from none where the content is zeros.
    if tool.is_own() {
        lines.text(", \"hole\": ");
        lines.text(truth(run.status.is_hole));
    }
    if let Some(host) = run.status.host {
        lines.text(", \"offset\": ");
        lines.decimal(host.0);
    }
    lines.text("}");
}

/// A list without entries would be `[]`; scripts know one entry without length.
fn past_the_end(tool: &Tool, start: GuestOffset) -> String {
    let hole = if tool.is_own() { ", \"hole\": true" } else { "" };
    format!(
        "{{ \"start\": {}, \"length\": 0, \"depth\": 0, \"present\": false, \"zero\": false, \
         \"data\": false, \"compressed\": false{hole}}}",
        start.0
    )
}
