//! `map`: which file holds which part of the disk.

use lacuna::block::Layer;
use lacuna::chain::MapRun;
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;

use super::open::{self, FileChain, Request};
use super::{Example, Form, Task, Verb, common, form, one_image};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::output;
use crate::persona::Tool;
use crate::size::{self, SizeError};

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "map",
    task: Task::Look,
    summary: "Show where the parts of a disk lie",
    operands: "FILENAME",
    flags: &[
        common::FORMAT,
        common::IMAGE_OPTS,
        Flag::valued('s', "start-offset", "OFFSET", "begin here"),
        Flag::valued('l', "max-length", "LENGTH", "go on for at most so many bytes"),
        common::OUTPUT,
        common::FORCE_SHARE,
        common::OBJECT,
        common::PROBE_BACKING,
    ],
    examples: &[
        Example {
            shows: "what is data, zero or a hole, for programs",
            line: "--output=json disk.qcow2",
        },
        Example { shows: "where the first MiB lies", line: "-l 1M disk.qcow2" },
    ],
    codes: &[],
    run,
};

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let form = form(parsed)?;
    let start = offset(parsed, "start-offset", "start offset")?.unwrap_or(0);
    let len = offset(parsed, "max-length", "max length")?.unwrap_or(u64::MAX);
    let chain = open::open(tool, &Request::reading(one_image(parsed)?, parsed, "format")?)?;
    let end = chain.disk().size_bytes().min(start.saturating_add(len));
    let range = GuestRange::new(GuestOffset(start), end.saturating_sub(start));
    match form {
        Form::Human => human(&chain, range),
        Form::Json => json(&chain, range),
    }
}

fn offset(parsed: &Parsed, flag: &str, shown: &str) -> CliResult<Option<u64>> {
    let Some(text) = parsed.last(flag) else { return Ok(None) };
    match size::parse_offset(text) {
        Ok(value) => Ok(Some(value)),
        Err(SizeError::NotANumber) => {
            Err(CliError::new(format!("Invalid {shown} specified: '{text}'.")))
        }
        Err(SizeError::OutOfRange) => Err(CliError::new(format!(
            "Invalid {shown} specified. Must be between 0 and {}.",
            i64::MAX
        ))),
    }
}

/// Lists what lies in files as it is; stops where something does not.
fn human(chain: &FileChain, range: GuestRange) -> CliResult<u8> {
    let mut lines = format!("{:<16}{:<16}{:<16}File\n", "Offset", "Length", "Mapped to");
    let mut map = chain.map(range);
    while let Some(run) = block_on(map.next())? {
        if !is_data(&run) {
            continue;
        }
        let Some(host) = run.status.host else {
            let text = "File contains external, encrypted or compressed clusters.";
            let error = CliError::new(text).with_hint("--output=json lists those as well");
            return Err(error.with_output(lines));
        };
        lines += &format!(
            "{:<16}{:<16}{:<16}{}\n",
            number(run.range.start.0),
            number(run.range.len),
            number(host.0),
            chain.levels()[run.level].content_path().display()
        );
        if lines.len() > 1 << 12 {
            output::print(&std::mem::take(&mut lines))?;
        }
    }
    output::print(&lines).map(|()| 0)
}

/// Zero has no prefix, as in C's `%#x`.
fn number(value: u64) -> String {
    if value == 0 { "0".to_owned() } else { format!("{value:#x}") }
}

fn is_data(run: &MapRun) -> bool {
    run.is_present() && !run.status.reads_zero
}

fn json(chain: &FileChain, range: GuestRange) -> CliResult<u8> {
    let mut map = chain.map(range);
    let mut lines = "[".to_owned();
    let mut is_first = true;
    while let Some(run) = block_on(map.next())? {
        lines += if is_first { "" } else { ",\n" };
        lines += &json_line(&run);
        is_first = false;
        if lines.len() > 1 << 16 {
            output::print(&std::mem::take(&mut lines))?;
        }
    }
    if is_first {
        lines += &past_the_end(range.start);
    }
    output::print(&format!("{lines}]\n"))?;
    Ok(0)
}

fn json_line(run: &MapRun) -> String {
    let host = run.status.host.map_or_else(String::new, |host| format!(", \"offset\": {}", host.0));
    format!(
        "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \
         \"data\": {}, \"compressed\": {}{host}}}",
        run.range.start.0,
        run.range.len,
        run.level,
        run.is_present(),
        run.status.reads_zero,
        is_data(run),
        run.status.is_compressed,
    )
}

/// A list without entries would be `[]`; scripts know one entry without length.
fn past_the_end(start: GuestOffset) -> String {
    format!(
        "{{ \"start\": {}, \"length\": 0, \"depth\": 0, \"present\": false, \"zero\": false, \
         \"data\": false, \"compressed\": false}}",
        start.0
    )
}
