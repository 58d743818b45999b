//! The verbs: a table each, and the way from the command line to one of them.
//!
//! A new verb is a module with a [`Verb`] and a line in [`VERBS`].

mod check;
mod compare;
mod convert;
mod create;
mod help;
mod info;
mod map;
pub(crate) mod open;
mod progress;
pub(crate) mod spec;

pub(crate) use help::version;
pub(crate) use info::{dump, specifics};

use crate::args::{self, Flag, Parsed};
use crate::demo;
use crate::error::{CliError, CliResult};
use crate::io;
use crate::output;
use crate::persona::{Persona, Tool};

/// A verb of the program.
pub(crate) struct Verb {
    pub(crate) name: &'static str,
    /// One line: what it does.
    pub(crate) summary: &'static str,
    /// What follows the options.
    pub(crate) operands: &'static str,
    pub(crate) flags: &'static [Flag],
    /// A command line that shows its use, without the program's name.
    pub(crate) example: &'static str,
    /// Does it; gives the exit code.
    pub(crate) run: fn(&Tool, &Parsed) -> CliResult<u8>,
}

/// All verbs, in the order of the help.
const VERBS: [&Verb; 8] = [
    &check::VERB,
    &compare::VERB,
    &convert::VERB,
    &create::VERB,
    &demo::VERB,
    &info::VERB,
    &io::VERB,
    &map::VERB,
];

/// What may stand before the verb.
const LEADING: [Flag; 3] = [
    HELP,
    Flag::switch('V', "version", "show the version"),
    Flag::valued('T', "trace", "TRACE", "accepted and ignored"),
];

const HELP: Flag = Flag::switch('h', "help", "show this help");

/// Options that several verbs share.
pub(crate) mod common {
    use crate::args::Flag;

    pub(crate) const QUIET: Flag = Flag::switch('q', "quiet", "print errors only");
    pub(crate) const FORMAT: Flag =
        Flag::valued('f', "format", "FMT", "format of the image; probed where not given");
    pub(crate) const IMAGE_OPTS: Flag =
        Flag::switch('\0', "image-opts", "FILENAME is a list of options").long_only();
    pub(crate) const FORCE_SHARE: Flag =
        Flag::switch('U', "force-share", "open even if somebody else writes to it");
    pub(crate) const OBJECT: Flag =
        Flag::valued('\0', "object", "OBJDEF", "not supported").long_only();
    pub(crate) const OUTPUT: Flag =
        Flag::valued('\0', "output", "human|json", "form of the output").long_only();
    pub(crate) const PROBE_BACKING: Flag =
        Flag::switch('\0', "probe-backing", "guess a backing format that is not named").long_only();
    pub(crate) const CACHE: Flag = Flag::valued('T', "cache", "MODE", "cache mode of the host");
    pub(crate) const PROGRESS: Flag =
        Flag::valued('p', "progress", "json", "show progress; =json as JSON lines on stderr")
            .optional();
}

/// Runs what the command line asks for and returns the exit code.
pub(crate) fn run(tool: &Tool, arguments: &[String]) -> u8 {
    let (verb, result) = match tool.persona {
        Persona::QemuIo => ("", run_verb(tool, &io::VERB, arguments)),
        _ => run_leading(tool, arguments),
    };
    result.unwrap_or_else(|error| {
        output::complain(&error.render(tool, verb));
        match output::print(error.output()) {
            Ok(()) => error.code(),
            Err(_) => 1,
        }
    })
}

/// Goes through what stands before the verb.
fn run_leading(tool: &Tool, arguments: &[String]) -> (&'static str, CliResult<u8>) {
    let parsed = match args::parse_leading(&LEADING, arguments) {
        Ok(parsed) => parsed,
        Err(error) => return ("", Err(error)),
    };
    if parsed.has("help") {
        return ("", help::overview(tool, &VERBS));
    }
    if parsed.has("version") {
        return ("", version(tool));
    }
    match parsed.operands.split_first() {
        None if tool.is_own() => ("", help::overview(tool, &VERBS)),
        None => ("", Err(CliError::usage("Not enough arguments"))),
        Some((name, rest)) => named(tool, name, rest),
    }
}

fn named(tool: &Tool, name: &str, rest: &[String]) -> (&'static str, CliResult<u8>) {
    match VERBS.iter().find(|verb| verb.name == name && offers(tool, verb)) {
        Some(verb) => (verb.name, run_verb(tool, verb, rest)),
        None if name == "help" && tool.is_own() => {
            let verb = rest.first().and_then(|name| VERBS.iter().find(|verb| verb.name == name));
            let shown = verb.map_or_else(|| help::overview(tool, &VERBS), |v| help::verb(tool, v));
            ("", shown)
        }
        None => ("", Err(CliError::usage(format!("Command not found: {name}")))),
    }
}

/// `qemu-img` has no verbs `io` and `demo`.
fn offers(tool: &Tool, verb: &Verb) -> bool {
    tool.is_own() || ![io::VERB.name, demo::VERB.name].contains(&verb.name)
}

fn run_verb(tool: &Tool, verb: &Verb, arguments: &[String]) -> CliResult<u8> {
    // Options of ours must not make shortened names of theirs ambiguous.
    let is_offered = |flag: &&Flag| tool.is_own() || flag.long != common::PROBE_BACKING.long;
    let table: Vec<Flag> = [HELP].iter().chain(verb.flags).filter(is_offered).copied().collect();
    let parsed = args::parse(&table, arguments)?;
    if parsed.has("help") {
        return help::verb(tool, verb);
    }
    if parsed.has("object") {
        return Err(CliError::new("--object is not supported: no verb needs a secret yet"));
    }
    (verb.run)(tool, &parsed)
}

/// How a verb prints its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Human,
    Json,
}

/// Reads `--output`.
pub(crate) fn form(parsed: &Parsed) -> CliResult<Form> {
    match parsed.last("output") {
        None | Some("human") => Ok(Form::Human),
        Some("json") => Ok(Form::Json),
        Some(other) => {
            let text = format!("--output expects 'human' or 'json' not '{other}'");
            Err(CliError::usage(text))
        }
    }
}

/// Returns the one operand of verbs that take an image.
pub(crate) fn one_image(parsed: &Parsed) -> CliResult<&str> {
    match &parsed.operands[..] {
        [file] => Ok(file),
        _ => Err(CliError::usage("Expecting one image file name")),
    }
}
