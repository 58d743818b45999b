//! `check`: is an image consistent, and can it be made so?
//!
//! Exit codes: 0 nothing wrong (any more), 1 the check did not succeed, 2 corruptions, 3 leaks
//! only, 63 the format has nothing to check.

use lacuna::ErrorKind;
use lacuna::chain::{Levels, probe};
use lacuna::qcow2::Access;
use lacuna::qcow2::check::{
    self as engine, CheckOptions, CheckReport, Finding, FindingKind, Repair,
};
use lacuna::storage::LockConflict;
use pollster::block_on;
use serde_json::{Map, Value};

use super::busy;
use super::open::{self, Request};
use super::progress::Meter;
use super::{Example, ExitCode, Form, Task, Verb, common, form, one_image};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult, errno_words};
use crate::format::Format;
use crate::nodes::AnyStorage;
use crate::output;
use crate::persona::Tool;

/// Exit code where a format has nothing to check.
const NOT_CHECKABLE: u8 = 63;

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "check",
    task: Task::Check,
    summary: "Check an image, and repair it on request",
    operands: "FILENAME",
    flags: &[
        common::QUIET,
        common::PROGRESS.own(),
        common::FORMAT,
        common::IMAGE_OPTS,
        common::CACHE,
        common::FORCE_SHARE,
        common::OUTPUT,
        Flag::valued('r', "repair", "leaks|all", "repair leaked clusters only, or all"),
        common::OBJECT,
    ],
    examples: &[
        Example { shows: "look for damage and for wasted space", line: "disk.qcow2" },
        Example { shows: "give back clusters that nothing uses", line: "-r leaks disk.qcow2" },
        Example {
            shows: "repair all that can be, as a program",
            line: "-r all --output=json disk.qcow2",
        },
    ],
    codes: &[
        ExitCode { code: 0, means: "nothing is wrong, or not any more" },
        ExitCode { code: 1, means: "the check could not be done" },
        ExitCode { code: 2, means: "the image is corrupt" },
        ExitCode { code: 3, means: "space is wasted, the data is fine" },
        ExitCode { code: 63, means: "the format has nothing to check" },
    ],
    run,
};

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let form = form(parsed)?;
    let repair = repair(parsed)?;
    let name = one_image(parsed)?;
    let cache = open::source_cache(parsed, "cache")?;
    let request = Request { cache, ..Request::reading(name, parsed, "format")? };
    let request = Request { access: access(repair), ..request };
    if !tool.is_own() {
        check_backing(tool, &request)?;
    }
    let storage = opened(tool, &request)?;
    let format = match request.image.format().map_err(|error| open::cannot_open(name, error))? {
        Some(format) => format,
        None => open::of_chain(block_on(probe(&storage))?),
    };
    claim(tool, &storage, format, &request).map_err(|error| open::cannot_open(name, error))?;
    if format == Format::Raw {
        let text = "This image format does not support checks";
        let failure =
            CliError::new(text).with_code(NOT_CHECKABLE).with_class(ErrorKind::Unsupported);
        return Err(failure.with_hint("only qcow2 images have something to check"));
    }
    let meter = Meter::new(tool, parsed, "check")?.counting("tables");
    let report =
        checked(&storage, repair, meter).map_err(|error| failed(tool, &request, &error))?;
    show(tool, &report, parsed.has("quiet"), form, &request)?;
    Ok(exit_code(&report))
}

fn repair(parsed: &Parsed) -> CliResult<Repair> {
    match parsed.last("repair") {
        None => Ok(Repair::None),
        Some("leaks") => Ok(Repair::Leaks),
        Some("all") => Ok(Repair::All),
        Some(other) => {
            let text = format!("--repair (-r) expects 'leaks' or 'all' not '{other}'");
            Err(CliError::usage(text))
        }
    }
}

/// QEMU's program opens backing files for nothing, and ends where it cannot.
fn check_backing(tool: &Tool, request: &Request) -> CliResult<()> {
    let found = open::opening(tool, request).and_then(|opening| {
        let found = block_on(opening.inspect(Levels::All));
        found.map_err(|error| open::reason(tool, &request.image, &error))
    });
    match found {
        Err(error) if error.text().starts_with("Could not open backing file") => {
            Err(open::cannot_open(&request.image.shown, error))
        }
        _ => Ok(()),
    }
}

/// Opens the image file alone: backing and data files are nobody's business here.
pub(super) fn opened(tool: &Tool, request: &Request) -> CliResult<AnyStorage> {
    let opened = open::opening(tool, request).and_then(|opening| {
        let opened = block_on(opening.storage());
        opened.map_err(|error| open::reason(tool, &request.image, &error))
    });
    opened.map_err(|error| open::cannot_open(&request.image.shown, error))
}

/// Keeps others out as the format needs it.
pub(super) fn claim(
    tool: &Tool,
    storage: &AnyStorage,
    format: Format,
    request: &Request,
) -> CliResult<()> {
    let claim = request.sharing().image_claim(open::of_library(format), request.access);
    storage.claim(claim).map_err(|error| match LockConflict::of(&error) {
        Some(conflict) => busy::refusal(tool, conflict, request.access),
        None => CliError::from(error),
    })
}

fn access(repair: Repair) -> Access {
    match repair {
        Repair::None => Access::ReadOnly,
        _ => Access::ReadWrite,
    }
}

fn checked(storage: &AnyStorage, repair: Repair, mut meter: Meter) -> lacuna::Result<CheckReport> {
    let options = CheckOptions { repair };
    let report = block_on(engine::check(storage, &options, &mut |progress| {
        meter.update(phase(progress.phase), progress.done, progress.total);
    }));
    meter.finish(report.is_ok());
    report
}

pub(super) const fn phase(phase: engine::Phase) -> &'static str {
    match phase {
        engine::Phase::Walk => "references",
        engine::Phase::Compare => "refcounts",
        engine::Phase::Copied => "copied flags",
        engine::Phase::Repair => "repair",
    }
}

/// What keeps the check from beginning is a matter of opening; later it is the check that failed.
fn failed(tool: &Tool, request: &Request, error: &lacuna::Error) -> CliError {
    match error.kind() {
        ErrorKind::Corrupt | ErrorKind::Unsupported => {
            let reason = open::reason(tool, &request.image, error);
            // Without the hint to check it.
            open::cannot_open(&request.image.shown, CliError::new(reason.text()))
        }
        _ if !tool.is_own() => CliError::new(format!("Check failed: {}", errno_words(error))),
        _ => CliError::from(error.clone()).under("Check failed"),
    }
}

const fn exit_code(report: &CheckReport) -> u8 {
    if report.check_errors > 0 {
        1
    } else if report.corruptions > 0 {
        2
    } else if report.leaks > 0 {
        3
    } else {
        0
    }
}

fn show(
    tool: &Tool,
    report: &CheckReport,
    quiet: bool,
    form: Form,
    request: &Request,
) -> CliResult<()> {
    output::complain(&findings(tool, report));
    match form {
        _ if quiet => Ok(()),
        Form::Json => output::print(&format!("{}\n", output::pretty(&json(report, request)))),
        Form::Human => {
            output::print(&repaired(report))?;
            output::print(&summary(report))
        }
    }
}

/// One line for each finding: first all as they were found, then what was repaired.
fn findings(tool: &Tool, report: &CheckReport) -> String {
    let line = |finding: &Finding| match tool.is_own() {
        true => format!("{} ({})\n", output::tame(&finding.qemu_text()), harm(finding)),
        false => format!("{}\n", finding.qemu_text()),
    };
    let mut text = String::new();
    let was_repaired = |finding: &&Finding| finding.repaired;
    // Refcounts are repaired after all has been looked at, the rest on the way.
    let is_refcount =
        |finding: &&Finding| matches!(finding.kind, FindingKind::RefcountMismatch { .. });
    for finding in report.findings.iter().filter(was_repaired).filter(is_refcount) {
        text += &line(&Finding { repaired: false, ..finding.clone() });
    }
    for finding in report.findings.iter().filter(was_repaired) {
        text += &format!("{}\n", finding.qemu_text());
    }
    for finding in report.findings.iter().filter(|finding| !finding.repaired) {
        text += &line(finding);
    }
    if report.findings_omitted > 0 {
        text += &format!("and {} more like these\n", report.findings_omitted);
    }
    text
}

fn harm(finding: &Finding) -> &'static str {
    match finding.harm() {
        engine::Harm::Harmless => "harmless",
        engine::Harm::Harmful => "harmful",
    }
}

fn repaired(report: &CheckReport) -> String {
    if report.leaks_fixed == 0 && report.corruptions_fixed == 0 {
        return String::new();
    }
    format!(
        "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    \
         {} corruptions\n\nDouble checking the fixed image now...\n",
        report.leaks_fixed, report.corruptions_fixed
    )
}

fn summary(report: &CheckReport) -> String {
    let mut text = String::new();
    if report.is_clean() {
        text += "No errors were found on the image.\n";
    }
    if report.corruptions > 0 {
        text += &format!(
            "\n{} errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.\n",
            report.corruptions
        );
    }
    if report.leaks > 0 {
        text += &format!(
            "\n{} leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data.\n",
            report.leaks
        );
    }
    if report.check_errors > 0 {
        text +=
            &format!("\n{} internal errors have occurred during the check.\n", report.check_errors);
    }
    text + &usage(report)
}

fn usage(report: &CheckReport) -> String {
    let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
    let (allocated, total) = (report.allocated_clusters, report.total_clusters);
    let mut text = String::new();
    if total > 0 && allocated > 0 {
        text += &format!(
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            percent(allocated, total),
            percent(report.fragmented_clusters, allocated),
            percent(report.compressed_clusters, allocated),
        );
    }
    if report.image_end_offset.0 > 0 {
        text += &format!("Image end offset: {}\n", report.image_end_offset.0);
    }
    text
}

/// Numbers that are zero are left out, but for those scripts rely on.
fn json(report: &CheckReport, request: &Request) -> Value {
    let mut members = Map::new();
    let mut put = |key: &str, value: u64, always: bool| {
        if value > 0 || always {
            members.insert(key.to_owned(), value.into());
        }
    };
    put("image-end-offset", report.image_end_offset.0, true);
    put("compressed-clusters", report.compressed_clusters, false);
    put("total-clusters", report.total_clusters, false);
    put("corruptions-fixed", report.corruptions_fixed, false);
    put("corruptions", report.corruptions, false);
    put("check-errors", report.check_errors, true);
    put("leaks", report.leaks, false);
    put("leaks-fixed", report.leaks_fixed, false);
    put("allocated-clusters", report.allocated_clusters, false);
    members.insert("filename".to_owned(), request.image.shown.clone().into());
    members.insert("format".to_owned(), "qcow2".into());
    if report.fragmented_clusters > 0 {
        members.insert("fragmented-clusters".to_owned(), report.fragmented_clusters.into());
    }
    Value::Object(members)
}
