//! The verbs: a table each, and the way from the command line to one of them.
//!
//! A new verb is a module with a [`Verb`] and a line in [`VERBS`].

mod about;
mod advice;
mod amend;
mod backup;
mod bench;
mod bitmap;
pub(crate) mod busy;
mod check;
mod commit;
mod compare;
mod completions;
mod conform;
mod convert;
pub(crate) mod create;
mod create_export;
mod ctl;
mod dd;
pub(crate) mod dedup;
mod help;
pub(crate) mod info;
mod level;
mod man;
mod map;
mod measure;
pub(crate) mod open;
pub(crate) mod overlay;
pub(crate) mod pace;
mod progress;
mod qemu_words;
mod rebase;
mod reclaim;
pub(crate) mod resize;
mod restore;
pub(crate) mod serve;
pub(crate) mod snapshot;
pub(crate) mod spec;
mod stream;
pub(crate) mod unnamed;
mod verify;

pub(crate) use help::{options_help, version};
pub(crate) use info::{dump, specifics};
pub(crate) use progress::Meter;

use crate::args::{self, Flag, Parsed};
use crate::demo;
use crate::error::{CliError, CliResult};
use crate::io;
use crate::objects::Objects;
use crate::output;
use crate::persona::{Persona, Tool};
use crate::qemu_nbd;

/// A verb of the program. Help, completions and man pages are made from this.
pub(crate) struct Verb {
    pub(crate) name: &'static str,
    /// What people are about when they look for it.
    pub(crate) task: Task,
    /// One line: what it does.
    pub(crate) summary: &'static str,
    /// What follows the options.
    pub(crate) operands: &'static str,
    pub(crate) flags: &'static [Flag],
    /// At least one; a test runs them all.
    pub(crate) examples: &'static [Example],
    /// Exit codes other than the [usual](help::USUAL) ones.
    pub(crate) codes: &'static [ExitCode],
    /// Does it; gives the exit code.
    pub(crate) run: fn(&Tool, &Parsed) -> CliResult<u8>,
}

/// The groups of the overview, in its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    Make,
    Look,
    Check,
    Change,
    Serve,
    Try,
    /// Named in the line of another verb, so that the overview fits on a screen; under QEMU's names in
    /// a line of its own.
    Beside,
    /// About the program itself: found by the help, so that the overview has room for work.
    About,
}

/// A command line that works.
pub(crate) struct Example {
    /// What it shows.
    pub(crate) shows: &'static str,
    /// What follows the verb. Files are those of the cast in `tests/help.rs`.
    pub(crate) line: &'static str,
}

/// What an exit code means.
pub(crate) struct ExitCode {
    pub(crate) code: u8,
    pub(crate) means: &'static str,
}

/// All verbs, in the order of the help.
const VERBS: [&Verb; 29] = [
    &amend::VERB,
    &backup::VERB,
    &bench::VERB,
    &bitmap::VERB,
    &check::VERB,
    &commit::VERB,
    &compare::VERB,
    &completions::VERB,
    &conform::VERB,
    &convert::VERB,
    &create::VERB,
    &ctl::VERB,
    &dd::VERB,
    &dedup::VERB,
    &demo::VERB,
    &help::VERB,
    &info::VERB,
    &io::VERB,
    &man::VERB,
    &map::VERB,
    &measure::VERB,
    &rebase::VERB,
    &reclaim::VERB,
    &resize::VERB,
    &restore::VERB,
    &serve::VERB,
    &snapshot::VERB,
    &stream::VERB,
    &verify::VERB,
];

/// What may stand before the verb.
const LEADING: [Flag; 4] = [
    HELP,
    Flag::switch('V', "version", "show the version"),
    Flag::valued('T', "trace", "TRACE", "accepted and ignored"),
    ERROR_FORMAT,
];

/// What every verb takes.
const EVERYWHERE: [Flag; 2] = [HELP, ERROR_FORMAT];

const HELP: Flag = Flag::switch('h', "help", "show this help");
const ERROR_FORMAT: Flag =
    Flag::valued('\0', "error-format", "human|json", "form of an error on stderr")
        .long_only()
        .own();

/// Verbs that only we have.
const OWN: [&str; 14] = [
    backup::VERB.name,
    completions::VERB.name,
    conform::VERB.name,
    ctl::VERB.name,
    dedup::VERB.name,
    demo::VERB.name,
    help::VERB.name,
    io::VERB.name,
    man::VERB.name,
    reclaim::VERB.name,
    restore::VERB.name,
    serve::VERB.name,
    stream::VERB.name,
    verify::VERB.name,
];

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
        Flag::valued('\0', "object", "OBJDEF", "certificates for TLS").long_only();
    pub(crate) const OUTPUT: Flag =
        Flag::valued('\0', "output", "human|json", "form of the output").long_only();
    pub(crate) const PROBE_BACKING: Flag =
        Flag::switch('\0', "probe-backing", "guess a backing format that is not named")
            .long_only()
            .own();
    pub(crate) const DEDUP_MEMORY: Flag =
        Flag::valued('\0', "dedup-memory", "SIZE", "memory for fingerprints of --dedup (64M)")
            .long_only()
            .own();
    pub(crate) const CACHE: Flag = Flag::valued('T', "cache", "MODE", "cache mode of the host");
    pub(crate) const PROGRESS: Flag =
        Flag::valued('p', "progress", "json|none", "show progress, for people or for programs")
            .optional();
}

/// Runs what the command line asks for and returns the exit code.
pub(crate) fn run(tool: &Tool, arguments: &[String]) -> u8 {
    // Errors in options come before options are known, so this one is looked for on its own.
    let wish = args::peek(arguments, ERROR_FORMAT.long).filter(|_| tool.is_own());
    output::set_error_form(if wish == Some("json") { Form::Json } else { Form::Human });
    let (verb, result) = match tool.persona {
        Persona::QemuIo => ("", run_verb(tool, &io::VERB, arguments)),
        Persona::QemuNbd => ("", qemu_nbd::run(tool, arguments)),
        _ => run_leading(tool, arguments),
    };
    let (code, output) = match result {
        Ok(code) => (code, String::new()),
        Err(error) => {
            complain(tool, verb, &error);
            (error.code(), error.output().to_owned())
        }
    };
    match output::print(&output).and_then(|()| output::print_the_end()) {
        Ok(()) => code,
        Err(error) if code == 0 => {
            complain(tool, verb, &error);
            error.code()
        }
        Err(_) => 1,
    }
}

fn complain(tool: &Tool, verb: &str, error: &CliError) {
    output::complain(&match output::error_form() {
        Form::Human => error.render(tool, verb),
        Form::Json => error.json(tool, verb),
    });
}

/// Says that a word of the command line is not text, and returns the exit code.
pub(crate) fn refuse_word(tool: &Tool, word: &std::ffi::OsStr) -> u8 {
    let text = format!("The argument '{}' is not UTF-8 text", word.display());
    let error = CliError::new(text).with_class(lacuna::ErrorKind::InvalidRequest).with_hint(
        "such a file can be had by another name (`ln -s`), or as /dev/fd/3 with 3<FILE at the end",
    );
    complain(tool, "", &error);
    error.code()
}

/// Goes through what stands before the verb.
fn run_leading(tool: &Tool, arguments: &[String]) -> (&'static str, CliResult<u8>) {
    let parsed = match args::parse_leading(&offered(tool, &[&LEADING]), arguments) {
        Ok(parsed) => parsed,
        Err(error) => return ("", Err(error)),
    };
    if let Err(error) = check_error_format(&parsed) {
        return ("", Err(error));
    }
    if parsed.has("help") {
        return ("", help::overview(tool));
    }
    if parsed.has("version") {
        return ("", version(tool));
    }
    match parsed.operands.split_first() {
        None if tool.is_own() => ("", help::overview(tool)),
        None => ("", Err(CliError::usage("Not enough arguments"))),
        Some((name, rest)) => named(tool, name, rest),
    }
}

fn named(tool: &Tool, name: &str, rest: &[String]) -> (&'static str, CliResult<u8>) {
    match find(tool, name) {
        Ok(verb) => (verb.name, run_verb(tool, verb, rest)),
        Err(error) => ("", Err(error)),
    }
}

/// Finds a verb by its name.
fn find(tool: &Tool, name: &str) -> CliResult<&'static Verb> {
    let offered = || VERBS.into_iter().filter(|verb| offers(tool, verb));
    offered().find(|verb| verb.name == name).ok_or_else(|| {
        let error = CliError::usage(format!("Command not found: {name}"));
        let near = args::nearest(name, offered().map(|verb| verb.name));
        match near {
            Some(near) => error.with_hint(format!("{near} is the nearest")),
            None => error,
        }
    })
}

/// `qemu-img` has fewer verbs.
fn offers(tool: &Tool, verb: &Verb) -> bool {
    tool.is_own() || !OWN.contains(&verb.name)
}

/// Returns those of some options that the name of the program comes with.
fn offered(tool: &Tool, tables: &[&[Flag]]) -> Vec<Flag> {
    tables.concat().into_iter().filter(|flag| tool.is_own() || !flag.own).collect()
}

fn run_verb(tool: &Tool, verb: &Verb, arguments: &[String]) -> CliResult<u8> {
    let arguments = match verb.name == resize::VERB.name {
        true => &resize::size_last(arguments)[..],
        false => arguments,
    };
    let parsed = args::parse(&offered(tool, &[&EVERYWHERE, verb.flags]), arguments)?;
    check_error_format(&parsed)?;
    if parsed.has("help") {
        return help::verb(tool, verb);
    }
    // What nobody uses is refused all the same where it makes no sense.
    Objects::read(parsed.all("object"))?;
    (verb.run)(tool, &parsed)
}

fn check_error_format(parsed: &Parsed) -> CliResult<()> {
    match parsed.last(ERROR_FORMAT.long) {
        None | Some("human" | "json") => Ok(()),
        Some(other) => {
            let text = format!("--error-format expects 'human' or 'json' not '{other}'");
            Err(CliError::usage(text))
        }
    }
}

/// How a verb prints its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Human,
    Json,
}

/// Reads `--output`.
pub(crate) fn form(parsed: &Parsed) -> CliResult<Form> {
    form_by(parsed, "output")
}

/// Reads an option that says how to print.
fn form_by(parsed: &Parsed, flag: &str) -> CliResult<Form> {
    match parsed.last(flag) {
        None | Some("human") => Ok(Form::Human),
        Some("json") => Ok(Form::Json),
        Some(other) => {
            let text = format!("--{flag} expects 'human' or 'json' not '{other}'");
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
