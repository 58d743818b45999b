//! `dd`: copies a part of a disk into a new image.
//!
//! * Always by the job that `convert` uses; what is left out is a view of the source ([`part`]).
//! * `count` blocks are counted from the start of the source, `skip` or not, as qemu-img does.
//! * Under the names of QEMU's programs every byte is written; else zeros take no space.

mod part;

use std::path::Path;

use lacuna::block::Layer;
use lacuna::chain::Sharing;
use lacuna::job::{self, ConvertOptions, Progress, TargetContent};
use lacuna::qcow2::Access;
use pollster::block_on;

use part::Part;

use super::open::{self, FileChain, Request};
use super::progress::Meter;
use super::spec::ImageSpec;
use super::spec::nbd::NbdSpec;
use super::{Example, Task, Verb, common, create};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::format::Format;
use crate::interrupt::whole_or_gone;
use crate::options::{Given, Values};
use crate::output;
use crate::persona::Tool;
use crate::size::within;

/// What a block is where no size is given.
const BLOCK_BYTES: u64 = 512;

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "dd",
    task: Task::Make,
    summary: "Copy part of a disk, block by block",
    operands: "if=SOURCE of=TARGET [bs=SIZE] [count=N] [skip=N]",
    flags: &[
        Flag::valued('f', "format", "FMT", "format of SOURCE; probed where not given"),
        Flag::switch('\0', "image-opts", "SOURCE is a list of options").long_only(),
        Flag::valued('O', "output-format", "FMT", "format of TARGET (raw)"),
        common::FORCE_SHARE,
        common::OBJECT,
        common::PROBE_BACKING,
    ],
    examples: &[
        Example {
            shows: "the first MiB of a disk, as a file",
            line: "if=disk.qcow2 of=start.raw bs=1M count=1",
        },
        Example {
            shows: "the rest, as an image",
            line: "-O qcow2 if=disk.qcow2 of=rest.qcow2 bs=1M skip=1",
        },
    ],
    codes: &[],
    run,
};

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let wish = Wish::new(&parsed.operands)?;
    if parsed.has("image-opts") && parsed.has("format") {
        return Err(CliError::new("--image-opts and --format are mutually exclusive"));
    }
    let request = Request::reading(&wish.source, parsed, "format")?;
    let source = open::open_for_content(tool, &request)?;
    let format = target_format(parsed)?;
    if open::is_part_of(Path::new(&wish.target), &source) {
        let text = "The target is the source, or a file the source lies in";
        return Err(CliError::new(text).under(&wish.target));
    }
    let range = wish.range(source.disk().size_bytes());
    create_target(tool, &wish.target, format, range.len)?;
    let fill = || {
        let target = open_target(tool, &wish.target, format, &request)?;
        if range.skips_all {
            output::complain(&format!(
                "{}: {}: cannot skip to specified offset\n",
                tool.name, request.image.shown
            ));
        }
        copy(tool, parsed, &source, target, range)
    };
    // As for `convert`: half a copy looks like a whole one.
    match tool.is_own() && !NbdSpec::is_name(&wish.target) {
        true => whole_or_gone(&wish.target, fill)?,
        false => fill()?,
    }
    Ok(0)
}

/// What the operands ask for.
struct Wish {
    source: String,
    target: String,
    block_bytes: u64,
    count: Option<u64>,
    skip: u64,
}

/// The bytes of the source that are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    start: u64,
    len: u64,
    /// Whether the source ends before it is to begin.
    skips_all: bool,
}

impl Wish {
    fn new(operands: &[String]) -> CliResult<Self> {
        let (mut source, mut target) = (None, None);
        let (mut block_bytes, mut count, mut skip) = (BLOCK_BYTES, None, 0);
        for operand in operands {
            let (name, value) = operand.split_once('=').unwrap_or((operand, ""));
            match name {
                "if" => source = Some(value.to_owned()),
                "of" => target = Some(value.to_owned()),
                "bs" => block_bytes = within("bs", value, 1, i32::MAX as u64)?,
                "count" => count = Some(blocks("count", value)?),
                "skip" => skip = blocks("skip", value)?,
                _ => return Err(CliError::new(format!("unrecognized operand {name}"))),
            }
        }
        match (source, target) {
            (Some(source), Some(target)) => Ok(Self { source, target, block_bytes, count, skip }),
            _ => Err(CliError::new("Must specify both input and output files")
                .with_hint("if=SOURCE of=TARGET")),
        }
    }

    fn range(&self, size_bytes: u64) -> Range {
        let end = match self.count.map(|count| count.checked_mul(self.block_bytes)) {
            Some(Some(end)) => end.min(size_bytes),
            // More than fits into a number is all.
            Some(None) | None => size_bytes,
        };
        match self.skip.checked_mul(self.block_bytes).filter(|start| *start <= end) {
            Some(start) => Range { start, len: end - start, skips_all: false },
            None => Range { start: end, len: 0, skips_all: true },
        }
    }
}

/// Blocks are counted without units; `1k` of them would be read as bytes.
fn blocks(name: &str, value: &str) -> CliResult<u64> {
    let is_plain = |byte: u8| byte.is_ascii_digit() || matches!(byte, b'-' | b' ');
    let is_number = value.starts_with("0x") || value.bytes().all(is_plain);
    match is_number {
        true => within(name, value, 0, i64::MAX as u64),
        false => Err(CliError::new(format!("Invalid {name} specified: '{value}'."))
            .with_hint("blocks of `bs` are counted: a number without a unit")),
    }
}

fn target_format(parsed: &Parsed) -> CliResult<Format> {
    let Some(name) = parsed.last("output-format") else { return Ok(Format::Raw) };
    Format::from_name(name)
        .ok_or_else(|| CliError::new("Unknown file format").with_hint("formats are qcow2 and raw"))
}

fn create_target(tool: &Tool, file: &str, format: Format, size_bytes: u64) -> CliResult<()> {
    let mut values = Values::new(format, &Given::default())?;
    values.set("size", size_bytes.to_string());
    let made = create::Plan::checked(tool, format, values, file).and_then(|plan| plan.make());
    made.map_err(|error| error.under(format!("{file}: error while creating output image")))
}

fn open_target(tool: &Tool, file: &str, format: Format, source: &Request) -> CliResult<FileChain> {
    let image = ImageSpec::from_name(file, Some(format.name()))?;
    // -U is about the source.
    let (access, sharing) = (Access::ReadWrite, Sharing::Format);
    open::open(tool, &Request { image, access, sharing, ..source.clone() })
}

fn copy(
    tool: &Tool,
    parsed: &Parsed,
    source: &FileChain,
    target: FileChain,
    range: Range,
) -> CliResult<()> {
    let content = match target.disk().storage().is_export() && target.disk().as_qcow2().is_none() {
        // A raw disk keeps what its export had.
        true => TargetContent::Unknown,
        false => TargetContent::Zero,
    };
    let mut options = ConvertOptions { content, ..ConvertOptions::default() };
    if !tool.is_own() {
        options.sparse_bytes = 0;
    }
    let mut meter = Meter::new(tool, parsed, "dd")?;
    let mut report = |progress: Progress| {
        meter.update("copy", progress.done_bytes, progress.total_bytes);
    };
    let part = Part::new(source.disk(), range.start, range.len);
    let copied = block_on(job::convert(&part, target.disk(), &options, &mut report));
    let closed = copied.and_then(|_| block_on(target.into_disk().close()));
    meter.finish(closed.is_ok());
    closed.map_err(CliError::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(line: &str) -> CliResult<Wish> {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        Wish::new(&words)
    }

    #[test]
    fn blocks_are_counted_from_the_start_of_the_source() {
        for (line, start, len) in [
            ("if=a of=b", 0, 10_000),
            ("if=a of=b bs=1000 count=3", 0, 3000),
            ("if=a of=b bs=1000 count=3 skip=1", 1000, 2000),
            ("if=a of=b bs=1000 skip=9", 9000, 1000),
            ("if=a of=b bs=1000 count=99999999999999999", 0, 10_000),
        ] {
            let expected = Range { start, len, skips_all: false };
            assert_eq!(wish(line).unwrap().range(10_000), expected, "{line}");
        }
        let past = Range { start: 10_000, len: 0, skips_all: true };
        assert_eq!(wish("if=a of=b skip=9223372036854775807").unwrap().range(10_000), past);
        assert_eq!(wish("if=a of=b skip=20").unwrap().range(10_000), past);
    }

    #[test]
    fn operands_are_known_by_name() {
        for (line, text) in [
            ("if=a", "Must specify both input and output files"),
            ("if=a of=b count=1k", "Invalid count specified: '1k'."),
            ("if=a of=b skip=1.0", "Invalid skip specified: '1.0'."),
            ("foo=x", "unrecognized operand foo"),
            ("bs=x", "Invalid bs specified: 'x'."),
            ("bs=0", "Invalid bs specified. Must be between 1 and 2147483647."),
            ("skip=-1", "Invalid skip specified. Must be between 0 and 9223372036854775807."),
        ] {
            match wish(line) {
                Err(error) => assert_eq!(error.text(), text),
                Ok(_) => panic!("{line}"),
            }
        }
    }
}
