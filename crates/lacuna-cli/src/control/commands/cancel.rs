//! `cancel`: ends a job after the step that is under way.

use lacuna::ErrorKind;
use serde_json::{Value, json};

use super::super::arguments::Arguments;
use super::{Command, Control, done, one_export};
use crate::error::{CliError, CliResult};

pub(super) const COMMAND: Command = Command {
    name: "cancel",
    operands: "[EXPORT]",
    summary: "end compact or dedup of an export; what is done stays done",
    flags: &[],
    ask: one_export,
    run,
    tell: done,
};

fn run(control: &Control, arguments: &Arguments) -> CliResult<Value> {
    arguments.only(&["export"])?;
    let job = match arguments.optional_text("export")? {
        Some(name) => control.jobs.of(&control.export(Some(name))?),
        None => match &control.jobs.at_work()[..] {
            [_, _, ..] => {
                let text = "There are several jobs; the command needs the name of an export";
                return Err(CliError::new(text).with_class(ErrorKind::InvalidRequest));
            }
            at_work => at_work.first().cloned(),
        },
    };
    let Some(job) = job else {
        return Err(CliError::new("There is no job to end").with_class(ErrorKind::NotFound));
    };
    job.cancel();
    job.wait();
    Ok(json!({ "job": job.number }))
}
