//! `compact`: moves what lies at the end of an image into holes and cuts its file, beside the clients.

use serde_json::{Map, Value, json};

use super::super::arguments::{Arguments, invalid};
use super::super::jobs::{Asked, Kind, When};
use super::jobs::summary;
use super::{Command, Control, Members, one_export};
use crate::args::{Flag, Parsed};
use crate::error::CliResult;
use crate::size;
use crate::verbs::common::PROGRESS;
use crate::verbs::pace::BANDWIDTH;

/// Goes on whatever clients do.
pub(crate) const NOW: Flag =
    Flag::switch('\0', "now", "compact, dedup: do not wait for the export to be idle").long_only();
/// Does not wait for the end.
pub(crate) const BACKGROUND: Flag =
    Flag::switch('\0', "background", "compact, dedup: return at once; `jobs` tells of it")
        .long_only();

pub(super) const COMMAND: Command = Command {
    name: "compact",
    operands: "[EXPORT]",
    summary: "make an image's file shorter, a little at a time, when clients are quiet",
    flags: &[NOW, BACKGROUND, BANDWIDTH, PROGRESS],
    ask: ask_for_job,
    run,
    tell: summary,
};

/// Reads what all commands have that start a job.
pub(super) fn ask_for_job(parsed: &Parsed, operands: &[String]) -> CliResult<Members> {
    let mut arguments = one_export(parsed, operands)?;
    if parsed.has(NOW.long) {
        arguments.insert("now".to_owned(), true.into());
    }
    if let Some(text) = parsed.last(BANDWIDTH.long) {
        let bound = size::within(BANDWIDTH.long, text, 1, 1 << 62)?;
        arguments.insert("bandwidth".to_owned(), bound.into());
    }
    Ok(arguments)
}

fn run(control: &Control, arguments: &Arguments) -> CliResult<Value> {
    arguments.only(&["export", "now", "bandwidth"])?;
    start(control, arguments, Kind::Compact)
}

/// Starts a job and tells its number.
pub(super) fn start(control: &Control, arguments: &Arguments, kind: Kind) -> CliResult<Value> {
    let when = if arguments.switch("now")? { When::Now } else { When::Idle };
    let bytes_per_second = arguments.optional_number("bandwidth")?;
    if bytes_per_second == Some(0) {
        return Err(invalid("A bandwidth is at least one byte a second".to_owned()));
    }
    let _disks_stay_open = control.begin()?;
    let export = control.export(arguments.optional_text("export")?)?;
    let asked = Asked { kind, when, bytes_per_second };
    let job = control.jobs.start(&control.server, &export, &asked)?;
    let result = Map::from_iter([
        ("job".to_owned(), json!(job.number)),
        ("export".to_owned(), json!(export.name().as_str())),
    ]);
    Ok(Value::Object(result))
}
