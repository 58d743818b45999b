//! `ctl`: asks a running server, or changes it.
//!
//! The commands are those of [`crate::control::commands`], which say what they ask, do and tell.

use std::path::Path;

use super::{Example, Form, Task, Verb, common, form};
use crate::args::{Flag, Parsed};
use crate::control::commands::{self, Command};
use crate::control::{self, commands::OF_EXPORTS};
use crate::error::{CliError, CliResult};
use crate::output;
use crate::persona::Tool;

const CONTROL: Flag =
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

/// What `ctl` takes itself, then what commands take.
const fn flags() -> [Flag; 5 + OF_EXPORTS.len()] {
    let own = [CONTROL, common::OUTPUT, commands::HARD, commands::TIMEOUT, commands::SHRINK];
    let mut all = [CONTROL; 5 + OF_EXPORTS.len()];
    let mut at = 0;
    while at < all.len() {
        all[at] = if at < own.len() { own[at] } else { OF_EXPORTS[at - own.len()] };
        at += 1;
    }
    all
}

fn run(_: &Tool, parsed: &Parsed) -> CliResult<u8> {
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
    let result = control::ask(Path::new(path), command.name, arguments)?;
    output::print(&match form {
        Form::Human => (command.tell)(&result),
        Form::Json => output::pretty(&result) + "\n",
    })
    .map(|()| 0)
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
