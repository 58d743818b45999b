//! `io`: a shell over one disk, with the commands of qemu-io.
//!
//! * Commands come from `-c` or, line by line, from standard input.
//! * A failed command does not end the shell; the exit code is 1 then.

mod access;
mod allocation;
mod breaks;
mod commands;
mod corruption;
mod image;
mod reopen;
mod report;
mod session;
mod transfer;

use std::io::BufRead;

use lacuna::qcow2::Access;

use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::objects::Objects;
use crate::output;
use crate::persona::{Persona, Tool};
use crate::verbs::open::check_force_share;
use crate::verbs::spec::ImageSpec;
use crate::verbs::{Example, ExitCode, Task, Verb, common};
use image::OpenFlags;
use session::Session;

/// The verb.
pub(crate) const VERB: Verb = Verb {
    name: "io",
    task: Task::About,
    summary: "Read and write a disk by hand, with qemu-io's commands",
    operands: "[FILENAME]",
    flags: &[
        common::OBJECT,
        common::PROBE_BACKING,
        common::IMAGE_OPTS,
        Flag::valued('c', "cmd", "COMMAND", "a command to execute; may be repeated"),
        Flag::valued('f', "format", "FMT", "format of the image; probed where not given"),
        Flag::switch('r', "read-only", "change nothing"),
        Flag::switch('s', "snapshot", "write to a file of its own, gone at the end"),
        Flag::switch('n', "nocache", "go past the page cache, short for -t none"),
        Flag::switch('C', "copy-on-read", "keep what is read from the backing file"),
        Flag::switch('m', "misalign", "accepted and ignored"),
        Flag::switch('k', "native-aio", "accepted and ignored"),
        Flag::valued('i', "aio", "MODE", "threads, native or io_uring: accepted and ignored"),
        Flag::valued('t', "cache", "MODE", "cache mode"),
        Flag::valued('d', "discard", "MODE", "ignore or unmap (unmap)"),
        Flag::valued('T', "trace", "TRACE", "accepted and ignored"),
        common::FORCE_SHARE,
        Flag::switch('V', "version", "show the version"),
    ],
    examples: &[
        Example {
            shows: "write a pattern and read it back",
            line: "-c 'write -P 7 0 64k' -c 'read -P 7 0 64k' disk.qcow2",
        },
        Example { shows: "the commands that there are", line: "-c help" },
    ],
    codes: &[
        ExitCode { code: 0, means: "every command succeeded" },
        ExitCode { code: 1, means: "one did not; what it printed says why" },
    ],
    run,
};

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    if parsed.has("version") {
        return crate::verbs::version(tool);
    }
    let mut session = Session::new(tool, Objects::read(parsed.all("object"))?);
    let flags = OpenFlags::of_program(parsed)?;
    match &parsed.operands[..] {
        [] => {}
        [file] => open(&mut session, parsed, file, &flags)?,
        _ => return Err(CliError::usage("Expecting one image file name")),
    }
    let mut failed = false;
    if parsed.has("cmd") {
        for command in parsed.all("cmd") {
            failed |= !session.execute(command)?;
            if session.is_over() {
                break;
            }
        }
    } else {
        failed |= !from_stdin(tool, &mut session)?;
    }
    failed |= !session.finish()?;
    Ok(u8::from(failed))
}

fn open(
    session: &mut Session<'_>,
    parsed: &Parsed,
    file: &str,
    flags: &OpenFlags,
) -> CliResult<()> {
    let (image, shown) = match parsed.has("image-opts") {
        true if parsed.has("format") => {
            return Err(CliError::new("--image-opts and -f are mutually exclusive"));
        }
        true => (ImageSpec::from_options(file), String::new()),
        false => (ImageSpec::from_name(file, parsed.last("format")), format!(" device {file}")),
    };
    if let Ok(image) = &image {
        check_force_share(parsed, image, "-U")?;
    }
    let opened = image.and_then(|image| session.open(image, flags));
    opened.map_err(|error| error.under(format!("can't open{shown}")))
}

/// Executes line by line; false if a command did not succeed.
fn from_stdin(tool: &Tool, session: &mut Session<'_>) -> CliResult<bool> {
    let prompt = match tool.persona {
        Persona::QemuIo => "qemu-io> ",
        _ => "lacuna> ",
    };
    let mut succeeded = true;
    let mut line = Vec::new();
    let mut stdin = std::io::stdin().lock();
    while !session.is_over() {
        output::print(prompt)?;
        line.clear();
        let len = stdin
            .read_until(b'\n', &mut line)
            .map_err(|error| CliError::new(format!("Reading standard input: {error}")))?;
        if len == 0 {
            break;
        }
        succeeded &= session.execute(String::from_utf8_lossy(&line).trim_end_matches('\n'))?;
    }
    Ok(succeeded)
}

/// What `-r` asks for.
const fn access(read_only: bool) -> Access {
    if read_only { Access::ReadOnly } else { Access::ReadWrite }
}
