//! `stop`: what is in flight is finished, everything written, and the server ends.

use serde_json::{Value, json};

use super::super::arguments::Arguments;
use super::{Command, Control, done, nothing};
use crate::error::CliResult;

pub(in super::super) const NAME: &str = "stop";

pub(super) const COMMAND: Command = Command {
    name: NAME,
    operands: "",
    summary: "end the server, with everything written",
    flags: &[],
    ask: nothing,
    run,
    tell: done,
};

fn run(control: &Control, arguments: &Arguments) -> CliResult<Value> {
    arguments.only(&[])?;
    control.ask_to_stop()?;
    Ok(json!({}))
}
