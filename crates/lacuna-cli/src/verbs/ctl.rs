//! `ctl`: asks a running server, or changes it.
//!
//! The commands are those of [`crate::control::commands`], which say what they ask, do and tell.

use std::path::Path;
use std::thread;
use std::time::Duration;

use lacuna::ErrorKind;
use serde_json::Value;

use super::pace::BANDWIDTH;
use super::progress::Meter;
use super::{Example, Form, Task, Verb, common, form};
use crate::args::{Flag, Parsed};
use crate::control::Conversation;
use crate::control::commands::{self, Command};
use crate::control::commands::{OF_EXPORTS, OF_POINTS, OF_SNAPSHOTS};
use crate::error::{CliError, CliResult};
use crate::output;
use crate::persona::Tool;

pub(super) const CONTROL: Flag =
    Flag::valued('\0', "control", "PATH", "the socket file of `lacuna serve --control`")
        .long_only();

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "ctl",
    task: Task::About,
    summary: "Ask a running server, or change it; without COMMAND, list them",
    operands: "COMMAND [ARGUMENTS]",
    flags: &flags(),
    examples: &[Example {
        shows: "what a server has that was started with --control ctl.sock",
        line: "--control ctl.sock list",
    }],
    codes: &[],
    run,
};

/// Options that are not those of `serve`.
const OWN: usize = 10;
/// How often one who waits for a job looks at it.
const LOOK: Duration = Duration::from_millis(200);

/// What `ctl` takes itself, then what commands take.
const fn flags() -> [Flag; OWN + OF_POINTS.len() + OF_SNAPSHOTS.len() + OF_EXPORTS.len()] {
    let own: [Flag; OWN] = [
        CONTROL,
        common::OUTPUT,
        commands::HARD,
        commands::TIMEOUT,
        commands::SHRINK,
        commands::NOW,
        commands::BACKGROUND,
        BANDWIDTH,
        commands::MEMORY,
        common::PROGRESS,
    ];
    let parts: [&[Flag]; 4] = [&own, &OF_POINTS, &OF_SNAPSHOTS, &OF_EXPORTS];
    let mut all = [CONTROL; OWN + OF_POINTS.len() + OF_SNAPSHOTS.len() + OF_EXPORTS.len()];
    let (mut at, mut part, mut within) = (0, 0, 0);
    while at < all.len() {
        if within == parts[part].len() {
            (part, within) = (part + 1, 0);
            continue;
        }
        all[at] = parts[part][within];
        (at, within) = (at + 1, within + 1);
    }
    all
}

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let form = form(parsed)?;
    let Some((name, operands)) = parsed.operands.split_first() else {
        let text = format!("Expecting a command:\n{}", commands::listed().trim_end());
        return Err(CliError::usage(text));
    };
    let command = commands::find(name)?;
    check(command, parsed)?;
    let path = parsed.last(CONTROL.long).ok_or_else(|| {
        CliError::usage("--control says which server is meant: its socket file is missing")
    })?;
    let arguments = (command.ask)(parsed, operands)?;
    let mut conversation = Conversation::begin(Path::new(path))?;
    let mut result = conversation.ask(command.name, arguments)?;
    let starts_job = command.flags.iter().any(|flag| flag.long == commands::BACKGROUND.long);
    if starts_job && !parsed.has(commands::BACKGROUND.long) {
        let meter = Meter::new(tool, parsed, command.name)?;
        result = wait(&mut conversation, &result, meter)?;
    }
    output::print(&match form {
        Form::Human => (command.tell)(&result),
        Form::Json => output::pretty(&result) + "\n",
    })
    .map(|()| 0)
}

/// Waits for the end of a job that was started, and shows how far it is. Whoever interrupts it ends the
/// waiting, not the job.
fn wait(conversation: &mut Conversation<'_>, job: &Value, mut meter: Meter) -> CliResult<Value> {
    let number = job["job"].as_u64().unwrap_or(0);
    loop {
        let job = conversation.job(number).map_err(|error| {
            let text = format!("The server has gone, and job {number} with it");
            CliError::new(format!("{text}; what is done stays done ({})", error.text()))
        })?;
        let count = |name: &str| job[name].as_u64().unwrap_or(0);
        meter.update(phase(&job), count("done"), count("total"));
        match job["state"].as_str() {
            Some("running" | "waiting") => thread::sleep(LOOK),
            Some("done") => {
                meter.finish(true);
                return Ok(job);
            }
            Some("cancelled") => {
                let text = format!("Job {number} was cancelled; what is done stays done");
                return Err(CliError::new(text).with_class(ErrorKind::Busy));
            }
            _ => return Err(CliError::from_value(&job["error"])),
        }
    }
}

fn phase(job: &Value) -> &'static str {
    let known = ["count", "move", "cut", "find", "share"];
    let is_waiting = job["state"] == "waiting";
    let found = known.into_iter().find(|phase| job["phase"] == **phase);
    if is_waiting { "waiting" } else { found.unwrap_or("start") }
}

/// Refuses options that belong to other commands.
fn check(command: &Command, parsed: &Parsed) -> CliResult<()> {
    let own = [CONTROL.long, common::OUTPUT.long, super::ERROR_FORMAT.long];
    let is_known = |name: &str| command.flags.iter().any(|flag| flag.long == name);
    match parsed.in_order().find(|(name, _)| !own.contains(name) && !is_known(name)) {
        None => Ok(()),
        Some((other, _)) => {
            let call = format!("{} {}", command.name, command.operands);
            Err(CliError::usage(format!("--{other} is no option of `ctl {}`", call.trim_end())))
        }
    }
}
