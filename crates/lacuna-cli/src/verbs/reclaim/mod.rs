//! `reclaim`: gives space back in place, step by step: leaks, zeros stored as data, equal clusters
//! on request, and the tail of the file.
//!
//! * Always: each step leaves a valid image, whenever it is interrupted; another run goes on.
//! * Never: a file is made beside the image. What grows is bounded by the steps themselves.

mod guest;
mod leaks;
mod report;
mod steps;

use lacuna::ErrorKind;
use lacuna::qcow2::{Access, CompactOrder, KeptMapping};

use self::report::Report;
use self::steps::Work;
use super::open::{self, FileChain, Request};
use super::pace::{self, Pace};
use super::progress::Meter;
use super::{Example, ExitCode, Form, Task, Verb, common, dedup, form_by, one_image};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::interrupt::{INTERRUPTED, Interrupted};
use crate::output;
use crate::persona::Tool;

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "reclaim",
    task: Task::Change,
    summary: "Give back the space that an image does not need, in place",
    operands: "FILENAME",
    flags: &[
        common::QUIET,
        common::PROGRESS,
        common::FORMAT,
        common::IMAGE_OPTS,
        Flag::switch('n', "dry-run", "tell what would be saved, and change nothing"),
        Flag::valued('\0', "report", "human|json", "form of the report").long_only(),
        Flag::switch('\0', "dedup", "have equal clusters share a place, too").long_only(),
        Flag::switch('\0', "defragment", "put data in the order of the disk, too").long_only(),
        Flag::switch('\0', "move-kept", "also where the image is to keep places").long_only(),
        pace::BANDWIDTH,
        Flag::valued('\0', "memory", "SIZE", "most memory for one step (256M)").long_only(),
        common::CACHE,
        common::PROBE_BACKING,
        common::OBJECT,
    ],
    examples: &[
        Example { shows: "what could be saved, and at what cost", line: "--dry-run disk.qcow2" },
        Example { shows: "make the file as short as its content allows", line: "-p disk.qcow2" },
        Example {
            shows: "beside other work, for a program",
            line: "--bandwidth=50M --report=json disk.qcow2",
        },
        Example { shows: "make sequential reads sequential", line: "--defragment disk.qcow2" },
    ],
    codes: &[
        ExitCode { code: 0, means: "done" },
        ExitCode {
            code: 1,
            means: "the image could not be opened, read or changed, or is damaged",
        },
        ExitCode {
            code: INTERRUPTED,
            means: "interrupted; the image is valid, another run goes on",
        },
    ],
    run,
};

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let form = form_by(parsed, "report")?;
    let is_dry = parsed.has("dry-run");
    let request = request(parsed, is_dry)?;
    let mut work = Work {
        pace: Pace::read(parsed)?,
        meter: Meter::new(tool, parsed, "reclaim")?,
        interrupted: Interrupted::watch(),
        memory_bytes: dedup::memory_bytes(parsed)?,
        dedups: parsed.has("dedup"),
        kept_mapping: keep_or_move(parsed.has("move-kept")),
        order: order(parsed.has("defragment")),
        is_dry,
    };
    let mut report = Report::begin(&request, is_dry);
    report.steps.push(leaks::step(tool, &request, &mut work)?);
    let done = on_image(tool, &request, &mut work, &mut report);
    work.meter.finish(done.is_ok());
    done?;
    report.end(&request);
    match form {
        _ if parsed.has("quiet") => {}
        Form::Json => output::print(&format!("{}\n", output::pretty(&report.json())))?,
        Form::Human => output::print(&report.text())?,
    }
    Ok(0)
}

/// Takes the image through what needs it open, then through what needs it for itself.
fn on_image(tool: &Tool, request: &Request, work: &mut Work, report: &mut Report) -> CliResult<()> {
    let chain = open::open_for_content(tool, request)?;
    check_kind(&chain)?;
    open::warn_of_guess(request, &chain);
    steps::opened(chain, work, report)?;
    let chain = open::open(tool, request)?;
    steps::compacting(&chain, work, report)
}

const fn order(is_asked: bool) -> CompactOrder {
    if is_asked { CompactOrder::Guest } else { CompactOrder::Any }
}

const fn keep_or_move(moves: bool) -> KeptMapping {
    if moves { KeptMapping::Move } else { KeptMapping::Refuse }
}

fn request(parsed: &Parsed, is_dry: bool) -> CliResult<Request> {
    let mut request = Request::reading(one_image(parsed)?, parsed, "format")?;
    request.cache = open::source_cache(parsed, "cache")?;
    if !is_dry {
        request.access = Access::ReadWrite;
        // Whoever runs this wants the space to go back to the host.
        let discard = &mut request.image.disk.common.discard;
        *discard = discard.or(Some(true));
    }
    Ok(request)
}

/// Refuses what has no space of its own to give back.
fn check_kind(chain: &FileChain) -> CliResult<()> {
    let refuse = |text: &str, hint: &str| {
        Err(CliError::new(text).with_class(ErrorKind::Unsupported).with_hint(hint))
    };
    match chain.disk().as_qcow2().map(|image| image.header()) {
        None => refuse(
            "Only qcow2 images can give space back in place",
            "fallocate --dig-holes does it for a raw file",
        ),
        Some(header) if header.has_external_data_file() => refuse(
            "Space cannot be given back in an image with an external data file",
            "bytes lie there where the guest has them: fstrim in the guest punches holes",
        ),
        Some(_) => Ok(()),
    }
}
