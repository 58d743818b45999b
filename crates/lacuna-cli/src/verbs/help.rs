//! What the program says of itself, made from the tables of the verbs.

use super::{Example, ExitCode, Task, Verb};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::output;
use crate::persona::{Persona, Tool};

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "help",
    task: Task::About,
    summary: "Explain a verb, or list them all",
    operands: "[VERB]",
    flags: &[],
    examples: &[Example {
        shows: "the options of convert, its exit codes, examples",
        line: "convert",
    }],
    codes: &[],
    run,
};

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    match &parsed.operands[..] {
        [] => overview(tool),
        [name] => verb(tool, super::find(tool, name)?),
        _ => Err(CliError::usage("Expecting one verb")),
    }
}

/// Prints the version.
pub(crate) fn version(tool: &Tool) -> CliResult<u8> {
    let version = env!("CARGO_PKG_VERSION");
    let text = match tool.persona {
        Persona::Lacuna => format!("lacuna {version}\n"),
        Persona::QemuNbd => format!("{} 10.0.2 (lacuna {version})\n", tool.invocation("")),
        _ => format!("{} version 10.0.2 (lacuna {version})\n", tool.name),
    };
    output::print(&text).map(|()| 0)
}

/// Columns of a terminal that nobody has made wider.
const COLUMNS: usize = 80;

/// The exit codes of verbs that have no others.
pub(super) const USUAL: [ExitCode; 2] = [
    ExitCode { code: 0, means: "done" },
    ExitCode { code: 1, means: "not done; standard error says why" },
];

/// The groups of the overview and what leads them.
const TASKS: [(Task, &str); 6] = [
    (Task::Make, "make"),
    (Task::Look, "look"),
    (Task::Check, "check"),
    (Task::Change, "change"),
    (Task::Serve, "serve"),
    (Task::Try, "try"),
];

/// Prints what there is, on one screen.
pub(super) fn overview(tool: &Tool) -> CliResult<u8> {
    let name = &tool.name;
    let mut text = format!(
        "{name}: disk images made, described, checked, repaired and copied\n\
         Usage: {name} VERB [OPTIONS] ...\n\n"
    );
    for (task, title) in TASKS {
        let also = (!tool.is_own() && task == Task::Change).then_some(Task::Beside);
        let is_here = |verb: &&&Verb| verb.task == task || Some(verb.task) == also;
        let group = super::VERBS.iter().filter(is_here);
        let group = group.filter(|verb| super::offers(tool, verb));
        for (index, verb) in group.enumerate() {
            let title = if index == 0 { title } else { "" };
            text += &format!("  {title:<8}{:<10}{}\n", verb.name, verb.summary);
        }
    }
    text += "\n";
    if tool.is_own() {
        text += &format!(
            "`{name} help VERB` explains one; completions, man; for programs: --output=json\n"
        );
    }
    if !tool.is_own() {
        // Scripts look for this line under the name qemu-img.
        text += "Supported image formats: qcow2 raw\n";
    }
    output::print(&text).map(|()| 0)
}

/// Prints the options of a program that is no verb.
pub(crate) fn options_help(usage: &str, summary: &str, flags: &[Flag]) -> CliResult<u8> {
    output::print(&format!("{usage}\n{summary}\n\nOptions:\n{}", options(flags))).map(|()| 0)
}

/// Prints the options of a verb, its exit codes and examples.
pub(super) fn verb(tool: &Tool, verb: &Verb) -> CliResult<u8> {
    let call = tool.invocation(verb.name);
    let usage = format!("Usage: {call} [OPTIONS] {}", verb.operands);
    let mut text = format!("{}\n\n{}\n\nOptions:\n", verb.summary, usage.trim_end());
    text += &options(&super::offered(tool, &[&super::EVERYWHERE, verb.flags]));
    text += "\nExit codes:\n";
    for code in codes(verb) {
        text += &format!("  {:<4}{}\n", code.code, code.means);
    }
    text += "\nExamples:\n";
    for example in verb.examples {
        let line = format!("{call} {}", example.line);
        text += &format!("  # {}\n  {}\n", example.shows, line.trim_end());
    }
    output::print(&text).map(|()| 0)
}

/// Lists options in two columns.
fn options(flags: &[Flag]) -> String {
    let width = flags.iter().map(|flag| spelled(flag).len()).max().unwrap_or(0) + 2;
    let line = |flag: &Flag| {
        let lines = wrapped(flag.help, COLUMNS.saturating_sub(width + 2));
        let indent = format!("\n{:width$}", "", width = width + 2);
        format!("  {:<width$}{}\n", spelled(flag), lines.join(&indent))
    };
    flags.iter().map(line).collect()
}

/// Breaks `text` between words so that no line is longer than `width`, unless one word is.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let fits = lines.last().is_some_and(|line| line.len() + word.len() < width);
        match lines.last_mut() {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) if fits => *line += &format!(" {word}"),
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// Returns the exit codes of a verb in order.
pub(super) fn codes(verb: &Verb) -> &'static [ExitCode] {
    if verb.codes.is_empty() { &USUAL } else { verb.codes }
}

/// Returns how an option is written: `-f, --format FMT`.
pub(super) fn spelled(flag: &Flag) -> String {
    let short = flag.short.map_or_else(|| "    ".to_owned(), |short| format!("-{short}, "));
    let value = match (flag.value, flag.optional) {
        (Some(value), true) => format!("[={value}]"),
        (Some(value), false) => format!(" {value}"),
        (None, _) => String::new(),
    };
    format!("{short}--{}{value}", flag.long)
}
