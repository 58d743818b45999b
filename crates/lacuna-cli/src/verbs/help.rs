//! What the program says of itself, made from the tables of the verbs.

use super::Verb;
use crate::args::Flag;
use crate::error::CliResult;
use crate::output;
use crate::persona::{Persona, Tool};

/// Prints the version.
pub(crate) fn version(tool: &Tool) -> CliResult<u8> {
    let version = env!("CARGO_PKG_VERSION");
    let text = match tool.persona {
        Persona::Lacuna => format!("lacuna {version}\n"),
        _ => format!("{} version 10.0.2 (lacuna {version})\n", tool.name),
    };
    output::print(&text).map(|()| 0)
}

/// Prints what there is, on one screen.
pub(super) fn overview(tool: &Tool, verbs: &[&Verb]) -> CliResult<u8> {
    let name = &tool.name;
    let mut text = format!(
        "{name}: qcow2 images made, inspected, checked, repaired and converted\n\n\
         Usage: {name} VERB [OPTIONS] ...\n\nVerbs:\n"
    );
    for verb in verbs.iter().filter(|verb| super::offers(tool, verb)) {
        text += &format!("  {:<10}{}\n", verb.name, verb.summary);
    }
    text += &format!(
        "\n`{name} VERB --help` shows the options of a verb and an example.\n\
         Image formats: qcow2 raw\n"
    );
    output::print(&text).map(|()| 0)
}

/// Prints the options of a verb and an example.
pub(super) fn verb(tool: &Tool, verb: &Verb) -> CliResult<u8> {
    let call = tool.invocation(verb.name);
    let mut text =
        format!("{}\n\nUsage: {call} [OPTIONS] {}\n\nOptions:\n", verb.summary, verb.operands);
    for flag in [super::HELP].iter().chain(verb.flags) {
        text += &format!("  {:<34}{}\n", spelled(flag), flag.help);
    }
    text += &format!("\nExample: {} {}\n", tool.invocation(verb.name), verb.example);
    output::print(&text).map(|()| 0)
}

fn spelled(flag: &Flag) -> String {
    let short = flag.short.map_or_else(|| "    ".to_owned(), |short| format!("-{short}, "));
    let value = match (flag.value, flag.optional) {
        (Some(value), true) => format!("[={value}]"),
        (Some(value), false) => format!(" {value}"),
        (None, _) => String::new(),
    };
    format!("{short}--{}{value}", flag.long)
}
