//! `dedup`: has equal clusters of an image share a place, beside the clients.

use lacuna::job::DedupOptions;
use serde_json::Value;

use super::super::arguments::{Arguments, invalid};
use super::super::jobs::Kind;
use super::compact::{BACKGROUND, NOW, ask_for_job, start};
use super::jobs::summary;
use super::{Command, Control, Members};
use crate::args::{Flag, Parsed};
use crate::error::CliResult;
use crate::size;
use crate::verbs::common::PROGRESS;
use crate::verbs::pace::BANDWIDTH;

/// Memory for fingerprints.
pub(crate) const MEMORY: Flag =
    Flag::valued('\0', "memory", "SIZE", "dedup: memory for fingerprints (256M)").long_only();

const LEAST_MEMORY_BYTES: u64 = 1 << 20;

pub(super) const COMMAND: Command = Command {
    name: "dedup",
    operands: "[EXPORT]",
    summary: "store equal clusters of an image once, a little at a time, when clients are quiet",
    flags: &[NOW, BACKGROUND, BANDWIDTH, MEMORY, PROGRESS],
    ask,
    run,
    tell: summary,
};

fn ask(parsed: &Parsed, operands: &[String]) -> CliResult<Members> {
    let mut arguments = ask_for_job(parsed, operands)?;
    if let Some(text) = parsed.last(MEMORY.long) {
        let bytes = size::within("memory bound", text, LEAST_MEMORY_BYTES, 1 << 62)?;
        arguments.insert("memory".to_owned(), bytes.into());
    }
    Ok(arguments)
}

fn run(control: &Control, arguments: &Arguments) -> CliResult<Value> {
    arguments.only(&["export", "now", "bandwidth", "memory"])?;
    let usual = DedupOptions::default().memory_bytes;
    let memory_bytes = arguments.optional_number("memory")?.unwrap_or(usual);
    if memory_bytes < LEAST_MEMORY_BYTES {
        return Err(invalid("Deduplication takes at least 1 MiB of memory".to_owned()));
    }
    start(control, arguments, Kind::Dedup { memory_bytes })
}
