//! `remove`: no client gets an export any more, and its disk is closed when none has it.

use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use lacuna::ErrorKind;
use serde_json::{Value, json};

use super::super::arguments::Arguments;
use super::super::{Exported, close};
use super::{Command, Control, Members, done, one_export};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::output;
use crate::size::within;

/// Makes clients leave.
pub(crate) const HARD: Flag =
    Flag::switch('\0', "hard", "remove: end the clients' connections").long_only();
/// How long to wait for clients.
pub(crate) const TIMEOUT: Flag =
    Flag::valued('\0', "timeout", "SECONDS", "remove: how long to wait for clients (60)")
        .long_only();

pub(super) const COMMAND: Command = Command {
    name: "remove",
    operands: "[EXPORT]",
    summary: "remove an export when its clients have left, or at once",
    flags: &[HARD, TIMEOUT],
    ask,
    run,
    tell: done,
};

/// How long the command waits unless told otherwise.
const USUAL_SECONDS: u64 = 60;
const MOST_SECONDS: u64 = 24 * 60 * 60;
/// How often clients are told again: one may have come in between.
const AGAIN: Duration = Duration::from_millis(200);

fn ask(parsed: &Parsed, operands: &[String]) -> CliResult<Members> {
    let mut arguments = one_export(parsed, operands)?;
    if parsed.has(HARD.long) {
        arguments.insert("hard".to_owned(), true.into());
    }
    if let Some(text) = parsed.last(TIMEOUT.long) {
        let seconds = within("timeout", text, 0, MOST_SECONDS)?;
        arguments.insert("timeout".to_owned(), seconds.into());
    }
    Ok(arguments)
}

fn run(control: &Control, arguments: &Arguments) -> CliResult<Value> {
    arguments.only(&["export", "hard", "timeout"])?;
    let is_hard = arguments.switch("hard")?;
    let seconds = arguments.optional_number("timeout")?.unwrap_or(USUAL_SECONDS);
    let (export, closed) = begin(control, arguments.optional_text("export")?, is_hard)?;
    match closed.recv_timeout(Duration::from_secs(seconds.min(MOST_SECONDS))) {
        Ok(closed) => closed.map(|()| json!({ "removed": export.name().as_str() })),
        Err(_) => Err(CliError::new(format!(
            "Export {} has {} clients still; it is closed when they have left",
            export.name(),
            export.clients().now
        ))
        .with_class(ErrorKind::Busy)
        .with_hint("--hard (\"hard\": true) would have ended their connections")),
    }
}

type Closed = mpsc::Receiver<CliResult<()>>;

/// Takes the export off the list; a thread sees to the rest.
fn begin(control: &Control, name: Option<&str>, is_hard: bool) -> CliResult<(Exported, Closed)> {
    let _disks_stay_open = control.begin()?;
    let export = control.export(name)?;
    control.points.refuse_removal(&export)?;
    let server = Arc::clone(&control.server);
    let removed = server.exports().remove(export.name().as_str());
    let export = removed.ok_or_else(|| super::super::no_export(export.name().as_str()))?;
    export.retire();
    if let Some(job) = control.jobs.of(&export) {
        job.cancel();
    }
    control.removed().leaving.push(Arc::clone(&export));
    let (tell, closed) = mpsc::channel();
    let (leaving, own) = (Arc::clone(&export), control.own.upgrade());
    thread::spawn(move || {
        let Some(control) = own else { return };
        wait_until_left(&control, &leaving, is_hard);
        if let Err(mpsc::SendError(Err(error))) = tell.send(finish(&control, &leaving)) {
            // The command has given up; somebody should know.
            output::warn(&format!("Closing export {}: {}", leaving.name(), error.text()));
        }
    });
    Ok((export, closed))
}

fn wait_until_left(control: &Control, export: &Exported, is_hard: bool) {
    loop {
        if is_hard {
            control.server.disconnect(export);
        }
        if export.wait_until_left(AGAIN) {
            return;
        }
    }
}

/// Closes the disk, unless the end of the server did. Nobody else closes anything meanwhile.
fn finish(control: &Control, export: &Exported) -> CliResult<()> {
    if let Some(job) = control.jobs.of(export) {
        job.cancel();
        job.wait();
    }
    let mut removed = control.removed();
    let Some(at) = removed.leaving.iter().position(|other| Arc::ptr_eq(other, export)) else {
        return Ok(());
    };
    removed.leaving.swap_remove(at);
    removed.statistics.push(export.statistics());
    close(export)
}
