//! `resize`: another size for a disk that is served.

use lacuna::ErrorKind;
use lacuna::block::Layer;
use lacuna_export::ServedDisk;
use pollster::block_on;
use serde_json::{Map, Value, json};

use super::super::arguments::{Arguments, invalid};
use super::{Command, Control, Members};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::size;

/// Allows to cut something off.
pub(crate) const SHRINK: Flag =
    Flag::switch('\0', "shrink", "resize: what lies behind the new end is lost").long_only();

pub(super) const COMMAND: Command = Command {
    name: "resize",
    operands: "[EXPORT] SIZE",
    summary: "give a disk another size",
    flags: &[SHRINK],
    ask,
    run,
    tell,
};

fn ask(parsed: &Parsed, operands: &[String]) -> CliResult<Members> {
    let (export, text) = match operands {
        [size] => (None, size),
        [export, size] => (Some(export), size),
        _ => return Err(CliError::usage("Expecting an export and a size")),
    };
    let size = size::parse_offset(text).map_err(|_| {
        CliError::new(format!("Invalid size '{text}'")).with_hint("it is a number, as 64k or 10G")
    })?;
    let mut arguments = Map::from_iter([("size".to_owned(), Value::from(size))]);
    if let Some(export) = export {
        arguments.insert("export".to_owned(), export.clone().into());
    }
    if parsed.has(SHRINK.long) {
        arguments.insert("shrink".to_owned(), true.into());
    }
    Ok(arguments)
}

fn run(control: &Control, arguments: &Arguments) -> CliResult<Value> {
    arguments.only(&["export", "size", "shrink"])?;
    let size = arguments.optional_number("size")?;
    let size = size.ok_or_else(|| invalid("The member 'size' is missing".to_owned()))?;
    let _disks_stay_open = control.begin()?;
    let export = control.export(arguments.optional_text("export")?)?;
    if export.is_read_only() {
        let text = format!("Export {} is read-only", export.name());
        return Err(CliError::new(text).with_class(ErrorKind::ReadOnly));
    }
    let before = export.disk().size_bytes();
    if size < before && !arguments.switch("shrink")? {
        return Err(CliError::new(format!(
            "The disk has {before} bytes; what lies behind {size} would be lost"
        ))
        .with_class(ErrorKind::InvalidRequest)
        .with_hint("--shrink (\"shrink\": true) allows that"));
    }
    block_on(export.disk().resize(size))?;
    Ok(json!({ "export": export.name().as_str(), "size": size, "size_before": before }))
}

fn tell(result: &Value) -> String {
    format!("{} bytes, before {}\n", result["size"], result["size_before"])
}
