//! `conform`: runs the conformance kit against an engine, ours or another.

use std::io::{BufReader, stdin, stdout};
use std::path::{Path, PathBuf};
use std::time::Duration;

use lacuna_conform::Case;
use lacuna_conform::driver::Driver;
use lacuna_conform::engines::{Lacuna, QemuIo};
use lacuna_conform::report::{Report, described};
use lacuna_conform::run::{Broken, Options, Verdict, run as run_case};
use lacuna_conform::serve::serve;
use lacuna_conform::suite;

use super::{Example, ExitCode, Form, Task, Verb, common, form};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::output;
use crate::persona::Tool;

/// Cases failed.
const FAILED: u8 = 1;
/// Nothing is known, since the driver is none.
const BROKEN: u8 = 2;
/// The seed of random cases where none is given.
const SEED: u64 = 1;

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "conform",
    task: Task::About,
    summary: "Try an engine of qcow2 with images and requests, and judge what it leaves",
    operands: "",
    flags: &[
        Flag::valued('\0', "driver", "CMD", "what speaks for the engine: a line of shell, or lacuna, or qemu-io, or qemu-io=PROGRAM").long_only(),
        Flag::valued('\0', "filter", "GLOB", "only cases of this name; * stands for anything").long_only(),
        Flag::switch('\0', "list", "list the cases instead").long_only(),
        common::OUTPUT,
        common::QUIET,
        Flag::valued('\0', "keep", "DIR", "leave the files of each case, before and after, in this new folder").long_only(),
        Flag::valued('\0', "seed", "N", "the random cases of this seed (1)").long_only(),
        Flag::valued('\0', "time-limit", "SECONDS", "how long the engine may take for an answer (20)").long_only(),
        Flag::switch('\0', "qemu-check", "have `qemu-img check` look at what is left, too").long_only(),
        Flag::valued('\0', "serve", "ENGINE", "be the driver of lacuna, qemu-io or qemu-io=PROGRAM").long_only(),
    ],
    examples: &[
        Example { shows: "the engine of this program", line: "--driver lacuna --filter 'sharing/*'" },
        Example { shows: "what there is", line: "--list" },
        Example {
            shows: "another one, and its faults in detail",
            line: "--driver qemu-io --filter 'read/v3*' --keep dir",
        },
    ],
    codes: &[
        ExitCode { code: 0, means: "no case failed" },
        ExitCode { code: FAILED, means: "cases failed, standard output says which; or not done" },
        ExitCode { code: BROKEN, means: "the driver does not start, or not keep to the protocol" },
    ],
    run,
};

fn run(_: &Tool, parsed: &Parsed) -> CliResult<u8> {
    if let Some(operand) = parsed.operands.first() {
        return Err(CliError::usage(format!("Unexpected argument: {operand}")));
    }
    let form = form(parsed)?;
    if let Some(name) = parsed.last("serve") {
        return be_the_driver(name);
    }
    let seed = number(parsed, "seed")?.unwrap_or(SEED);
    let cases = chosen(parsed, suite::all(seed))?;
    if parsed.has("list") {
        return list(&cases, form);
    }
    let driver = driver(parsed)?;
    let scratch = Scratch::new(parsed)?;
    let options = options(parsed, &scratch)?;
    judge(parsed, form, &driver, &cases, &options, seed)
}

/// Runs all cases; each that did not pass is told at once.
fn judge(
    parsed: &Parsed,
    form: Form,
    driver: &Driver,
    cases: &[Case],
    options: &Options,
    seed: u64,
) -> CliResult<u8> {
    let mut report = Report::new(seed);
    for case in cases {
        let done = run_case(driver, case, options).map_err(|broken| no_verdict(case, &broken))?;
        let is_told = !parsed.has("quiet") || matches!(done.verdict, Verdict::Failed(_));
        if form == Form::Human && is_told {
            output::print(&Report::lines(case, &done.verdict))?;
        }
        report.add(case, done);
    }
    output::print(&match form {
        Form::Human => report.summary(),
        Form::Json => output::pretty(&report.json()) + "\n",
    })?;
    Ok(if report.has_passed() { 0 } else { FAILED })
}

fn no_verdict(case: &Case, broken: &Broken) -> CliError {
    let error =
        CliError::new(output::tame(&broken.to_string())).under(format!("Case {}", case.name));
    match broken {
        Broken::Driver(_) => error.with_code(BROKEN).with_hint(
            "docs/conformance.md describes the protocol; --keep leaves the conversation",
        ),
        Broken::Host(_) => error.with_class(lacuna::ErrorKind::Io),
    }
}

fn list(cases: &[Case], form: Form) -> CliResult<u8> {
    let line = |case: &Case| format!("{:<36} {}\n", case.name, case.proves);
    output::print(&match form {
        Form::Json => output::pretty(&described(cases)) + "\n",
        Form::Human => cases.iter().map(line).collect(),
    })?;
    Ok(0)
}

/// Speaks the protocol on standard input and output.
fn be_the_driver(name: &str) -> CliResult<u8> {
    let failed = |error| CliError::from(lacuna::Error::io(error, "Answering requests"));
    let (input, output) = (BufReader::new(stdin()), stdout().lock());
    match BuiltIn::named(name) {
        Some(BuiltIn::Lacuna) => serve(&mut Lacuna, input, output).map_err(failed)?,
        Some(BuiltIn::QemuIo(program)) => {
            serve(&mut QemuIo::new(program), input, output).map_err(failed)?;
        }
        None => {
            let text = format!("--serve expects lacuna, qemu-io or qemu-io=PROGRAM, not '{name}'");
            return Err(CliError::usage(text));
        }
    }
    Ok(0)
}

/// Drivers that are in this program.
enum BuiltIn {
    Lacuna,
    QemuIo(PathBuf),
}

impl BuiltIn {
    fn named(name: &str) -> Option<Self> {
        match name.split_once('=') {
            None if name == "lacuna" => Some(Self::Lacuna),
            None if name == "qemu-io" => Some(Self::QemuIo("qemu-io".into())),
            Some(("qemu-io", program)) => Some(Self::QemuIo(program.into())),
            _ => None,
        }
    }
}

/// Drivers are processes of their own, those in this program too: a case may have to end one.
fn driver(parsed: &Parsed) -> CliResult<Driver> {
    let missing = || CliError::usage("Expecting --driver CMD, or --list");
    let name = parsed.last("driver").filter(|name| !name.is_empty()).ok_or_else(missing)?;
    if BuiltIn::named(name).is_none() {
        return Ok(Driver::Shell(name.to_owned()));
    }
    let program = std::env::current_exe()
        .map_err(|error| CliError::from(lacuna::Error::io(error, "Looking for this program")))?;
    Ok(Driver::Program(program, ["conform", "--serve", name].map(str::to_owned).into()))
}

fn options(parsed: &Parsed, scratch: &Scratch) -> CliResult<Options> {
    let mut options = Options::new(scratch.path());
    options.keep = parsed.has("keep");
    if let Some(seconds) = number(parsed, "time-limit")? {
        options.time_limit = Duration::from_secs(seconds);
    }
    options.qemu_check = parsed.has("qemu-check").then(|| "qemu-img".into());
    Ok(options)
}

fn number(parsed: &Parsed, flag: &str) -> CliResult<Option<u64>> {
    let Some(text) = parsed.last(flag) else { return Ok(None) };
    let number = text.parse();
    number
        .map(Some)
        .map_err(|_| CliError::usage(format!("--{flag} expects a number, not '{text}'")))
}

/// Leaves those whose names fit.
fn chosen(parsed: &Parsed, mut cases: Vec<Case>) -> CliResult<Vec<Case>> {
    let Some(glob) = parsed.last("filter") else { return Ok(cases) };
    cases.retain(|case| fits(glob, &case.name));
    match cases.is_empty() {
        true => Err(CliError::new(format!("No case has a name like '{glob}'"))
            .with_class(lacuna::ErrorKind::NotFound)
            .with_hint("--list shows all of them")),
        false => Ok(cases),
    }
}

/// Says whether a name fits a pattern, in which `*` stands for anything.
fn fits(glob: &str, name: &str) -> bool {
    let Some((head, mut rest)) = glob.split_once('*') else { return glob == name };
    let Some(mut name) = name.strip_prefix(head) else { return false };
    while let Some((middle, tail)) = rest.split_once('*') {
        let Some(at) = name.find(middle) else { return false };
        (name, rest) = (&name[at + middle.len()..], tail);
    }
    name.ends_with(rest)
}

/// Where the files of cases lie: a folder that goes, or one that is to stay.
enum Scratch {
    Gone(tempfile::TempDir),
    Kept(PathBuf),
}

impl Scratch {
    fn new(parsed: &Parsed) -> CliResult<Self> {
        let Some(name) = parsed.last("keep") else {
            let made = tempfile::tempdir();
            return made
                .map(Self::Gone)
                .map_err(|error| Self::failed(&std::env::temp_dir(), error));
        };
        let path = PathBuf::from(name);
        std::fs::create_dir(&path).map_err(|error| Self::failed(&path, error))?;
        Ok(Self::Kept(path))
    }

    fn failed(path: &Path, error: std::io::Error) -> CliError {
        let error = lacuna::Error::io(error, format!("Making the folder {}", path.display()));
        CliError::from(error).with_fact("file", path.display().to_string())
    }

    fn path(&self) -> &Path {
        match self {
            Self::Gone(folder) => folder.path(),
            Self::Kept(path) => path,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::fits;

    #[test]
    fn a_star_stands_for_anything() {
        for glob in ["*", "read/*", "read/v3", "*v3", "re*v*3", "**", "read/v3*", "*/*"] {
            assert!(fits(glob, "read/v3"), "{glob}");
        }
        for glob in ["", "read", "read/v", "*v2", "v3*", "r*x*3", "read/v3*3"] {
            assert!(!fits(glob, "read/v3"), "{glob}");
        }
    }
}
