//! `flush`: what was written through an export, or all of them, is durable.

use lacuna::block::Layer;
use pollster::block_on;
use serde_json::{Value, json};

use super::super::arguments::Arguments;
use super::{Command, Control, done, one_export};
use crate::error::CliResult;

pub(super) const COMMAND: Command = Command {
    name: "flush",
    operands: "[EXPORT]",
    summary: "make durable what was written, through one export or all",
    flags: &[],
    ask: one_export,
    run,
    tell: done,
};

fn run(control: &Control, arguments: &Arguments) -> CliResult<Value> {
    arguments.only(&["export"])?;
    let _disks_stay_open = control.begin()?;
    let exports = match arguments.optional_text("export")? {
        Some(name) => vec![control.export(Some(name))?],
        None => control.server.exports().all(),
    };
    for export in &exports {
        block_on(export.disk().flush())?;
    }
    Ok(json!({ "flushed": exports.len() }))
}
