//! What can be asked of a running server, a file for each.

mod add;
mod cancel;
mod compact;
mod connections;
mod dedup;
mod flush;
mod jobs;
mod list;
mod point;
mod remove;
mod resize;
mod snapshot;
mod statistics;
mod stop;

use lacuna::ErrorKind;
use serde_json::{Map, Value};

use super::Control;
use super::arguments::Arguments;
use crate::args::{Flag, Parsed, nearest};
use crate::error::{CliError, CliResult};

pub(crate) use add::FLAGS as OF_EXPORTS;
pub(crate) use compact::{BACKGROUND, NOW};
pub(crate) use dedup::MEMORY;
pub(super) use jobs::NAME as JOBS;
pub(crate) use point::{DIRECTORY, FLAGS as OF_POINTS, SPACE, WHEN_FULL, absolute};
pub(crate) use remove::{HARD, TIMEOUT};
pub(crate) use resize::SHRINK;
pub(crate) use snapshot::FLAGS as OF_SNAPSHOTS;
pub(super) use stop::NAME as STOP;

/// What a request carries.
pub(crate) type Members = Map<String, Value>;

/// A command, from both ends of the socket.
pub(crate) struct Command {
    pub(crate) name: &'static str,
    /// What follows it on the command line of `ctl`.
    pub(crate) operands: &'static str,
    /// One line: what it does.
    pub(crate) summary: &'static str,
    /// The options of `ctl` that belong to it.
    pub(crate) flags: &'static [Flag],
    /// Turns a command line, without the command's name, into arguments.
    pub(crate) ask: fn(&Parsed, &[String]) -> CliResult<Members>,
    /// Does it, in the server.
    pub(super) run: fn(&Control, &Arguments) -> CliResult<Value>,
    /// Tells people what came of it.
    pub(crate) tell: fn(&Value) -> String,
}

/// All commands, in the order of the help.
pub(crate) const ALL: [&Command; 14] = [
    &add::COMMAND,
    &cancel::COMMAND,
    &compact::COMMAND,
    &connections::COMMAND,
    &dedup::COMMAND,
    &flush::COMMAND,
    &jobs::COMMAND,
    &list::COMMAND,
    &point::COMMAND,
    &remove::COMMAND,
    &resize::COMMAND,
    &snapshot::COMMAND,
    &statistics::COMMAND,
    &stop::COMMAND,
];

/// Finds a command by its name.
pub(crate) fn find(name: &str) -> CliResult<&'static Command> {
    ALL.into_iter().find(|command| command.name == name).ok_or_else(|| {
        let names: Vec<&str> = ALL.iter().map(|command| command.name).collect();
        let hint = match nearest(name, names.iter().copied()) {
            Some(near) => format!("{near} is the nearest"),
            None => format!("there are: {}", names.join(", ")),
        };
        CliError::new(format!("There is no command '{name}'"))
            .with_class(ErrorKind::InvalidRequest)
            .with_hint(hint)
    })
}

/// Lists all commands for people.
pub(crate) fn listed() -> String {
    let row = |command: &&Command| {
        let call = format!("  {} {}", command.name, command.operands);
        vec![call.trim_end().to_owned(), command.summary.to_owned()]
    };
    table(&ALL.iter().map(row).collect::<Vec<_>>())
}

/// For commands without arguments.
fn nothing(_: &Parsed, operands: &[String]) -> CliResult<Members> {
    match operands {
        [] => Ok(Map::new()),
        [other, ..] => Err(CliError::usage(format!("Unexpected argument: {other}"))),
    }
}

/// For commands about one export, which may be left out where there is only one.
fn one_export(_: &Parsed, operands: &[String]) -> CliResult<Members> {
    match operands {
        [] => Ok(Map::new()),
        [name] => Ok(Map::from_iter([("export".to_owned(), name.clone().into())])),
        _ => Err(CliError::usage("Expecting at most one export")),
    }
}

/// Says that something is done.
fn done(_: &Value) -> String {
    String::new()
}

/// Returns a text that came from the server, as a terminal may have it.
fn shown(value: &Value) -> String {
    crate::output::tame(value.as_str().unwrap_or("-"))
}

/// Returns the rows of a table as lines, each column as wide as it must be.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max()
    };
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}
