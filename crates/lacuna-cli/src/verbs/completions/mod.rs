//! `completions`: scripts that let a shell complete verbs, options and their values.
//!
//! Made from the tables of the verbs, so that they know what the program knows. A module a shell.

mod bash;
mod fish;
mod zsh;

use super::{Example, Task, Verb, about};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::output;
use crate::persona::Tool;

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "completions",
    task: Task::About,
    summary: "Print what makes a shell complete our command lines",
    operands: "bash|zsh|fish",
    flags: &[about::ALL],
    examples: &[
        Example { shows: "bash: source this, or put it where bash-completion looks", line: "bash" },
        Example {
            shows: "the scripts for all shells, as files in a folder",
            line: "--all scripts",
        },
    ],
    codes: &[],
    run,
};

/// A shell: its name, the name of the file it looks for, and what makes the script.
type Shell = (&'static str, &'static str, fn(&[&Verb]) -> String);

const SHELLS: [Shell; 3] = [
    ("bash", "lacuna.bash", bash::script),
    ("zsh", "_lacuna", zsh::script),
    ("fish", "lacuna.fish", fish::script),
];

fn run(_: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let script = |shell: &Shell| (shell.1.to_owned(), shell.2(&super::VERBS));
    if parsed.has("all") {
        return about::write_all(parsed, SHELLS.iter().map(script));
    }
    let [name] = &parsed.operands[..] else {
        return Err(CliError::usage("Expecting the name of a shell: bash, zsh or fish"));
    };
    let shell = SHELLS.iter().find(|(known, ..)| known == name).ok_or_else(|| {
        CliError::usage(format!("No completions for '{name}'; there are some for bash, zsh, fish"))
    })?;
    output::print(&script(shell).1).map(|()| 0)
}

/// What an option or operand can be.
#[derive(Debug, PartialEq, Eq)]
enum Values {
    /// One of these words.
    Words(Vec<&'static str>),
    /// A file, which shells know how to complete.
    Files,
    /// Something that only the user knows.
    Unknown,
}

/// Tells from the word for a value in the help what it can be.
fn values(word: &'static str) -> Values {
    match word {
        "FMT" => Values::Words(vec!["qcow2", "raw"]),
        "VERB" | "[VERB]" => Values::Words(super::VERBS.iter().map(|verb| verb.name).collect()),
        _ if word.contains('|') => Values::Words(word.split('|').collect()),
        _ if ["FILE", "DIR", "SOURCE", "TARGET"].iter().any(|file| word.contains(file)) => {
            Values::Files
        }
        _ => Values::Unknown,
    }
}

/// The options of a verb under our own name.
fn flags(verb: &Verb) -> impl Iterator<Item = &'static Flag> {
    super::EVERYWHERE.iter().chain(verb.flags)
}

/// Puts text between single quotes: `'` ends them, comes on its own, and begins them again.
fn quoted(text: &str, single: &str) -> String {
    format!("'{}'", text.replace('\'', single))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_told_by_the_word_for_them() {
        assert_eq!(values("human|json"), Values::Words(vec!["human", "json"]));
        assert_eq!(values("FILENAME [SIZE]"), Values::Files);
        assert_eq!(values("SOURCE... TARGET"), Values::Files);
        assert_eq!(values("OFFSET"), Values::Unknown);
        assert!(matches!(values("[VERB]"), Values::Words(names) if names.contains(&"create")));
    }

    #[test]
    fn every_script_has_every_verb_and_every_option() {
        for (shell, _, script) in SHELLS {
            let text = script(&super::super::VERBS);
            for verb in super::super::VERBS {
                assert!(text.contains(verb.name), "{shell}: {}", verb.name);
                for flag in flags(verb) {
                    let long = if shell == "fish" { "-l " } else { "--" };
                    assert!(
                        text.contains(&format!("{long}{}", flag.long)),
                        "{shell}: {}",
                        flag.long
                    );
                }
            }
        }
    }
}
