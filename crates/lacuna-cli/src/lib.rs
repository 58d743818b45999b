//! The `lacuna` command as a library, so that tests and the fuzzer reach its parsers.
//!
//! A command line goes through `persona` (by which name?), `verbs` (which verb?), `args`
//! (which options?) and ends in one module of `verbs` or `io`. All of it talks to the engine
//! through its public API only.
//!
//! * Always: what goes wrong becomes one `CliError`, printed in one place.
//! * Never: a panic for anything on the command line or in an image.

mod args;
mod control;
mod demo;
mod descriptors;
mod error;
mod format;
mod interrupt;
mod io;
mod nodes;
mod objects;
mod options;
mod output;
mod persona;
mod picture;
mod qemu_nbd;
mod size;
mod verbs;

use std::ffi::OsString;

use persona::Tool;

/// Runs a command line, its program name first, and returns the exit code.
///
/// Prints to standard output and standard error; reads standard input for `io` without commands.
///
/// ```
/// assert_eq!(lacuna_cli::run(vec!["lacuna".into(), "--version".into()]), 0);
/// ```
#[must_use]
pub fn run(mut words: Vec<String>) -> u8 {
    let arguments = words.split_off(words.len().min(1));
    let tool = Tool::from_argv0(words.first().map_or("", |name| name));
    verbs::run(&tool, &arguments)
}

/// As [`run`], for words as the host gives them.
///
/// Words that are not UTF-8 text are refused: what is not text cannot be stored in an image as a
/// name, and one that is changed to fit would be the name of another file.
///
/// ```
/// assert_eq!(lacuna_cli::run_os(vec!["lacuna".into(), "--version".into()]), 0);
/// ```
#[must_use]
pub fn run_os(words: Vec<OsString>) -> u8 {
    let program = words.first().map_or_else(String::new, |word| word.display().to_string());
    let tool = Tool::from_argv0(&program);
    descriptors::allow_enough();
    descriptors::survive_long_files();
    match words.into_iter().map(OsString::into_string).collect::<Result<Vec<_>, _>>() {
        Ok(words) => run(words),
        Err(word) => verbs::refuse_word(&tool, &word),
    }
}

/// Parses `text` as everything that text on a command line can be: sizes, option lists, image
/// options, commands of `io` without an image.
///
/// For the fuzzer. Panics where a parser contradicts itself.
///
/// ```
/// lacuna_cli::parse_hostile("size=1.5k,,x,help");
/// ```
pub fn parse_hostile(text: &str) {
    if let (Ok(bytes), Ok(offset)) = (size::parse(text), size::parse_offset(text)) {
        assert_eq!(bytes, offset, "{text}");
    }
    verbs::spec::parse_hostile(text);
    options::parse_hostile(text);
}

/// Reads `line` as a request to a control socket, without doing what it asks.
///
/// For the fuzzer. Panics where the answer is not one line, or not for this request.
///
/// ```
/// lacuna_cli::parse_hostile_request(br#"{"id": 1, "command": "jobs"}"#);
/// ```
pub fn parse_hostile_request(line: &[u8]) {
    control::parse_hostile(line);
}

/// Reads `text` as the rules of a test driver, as they are in a file.
///
/// For the fuzzer. Panics where a rule is lost.
///
/// ```
/// lacuna_cli::parse_hostile_rules("[inject-error]\nevent = \"read_aio\"\n");
/// ```
pub fn parse_hostile_rules(text: &str) {
    verbs::spec::debug::parse_hostile(text);
}
