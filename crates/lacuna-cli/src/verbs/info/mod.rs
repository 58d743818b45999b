//! `info`: what an image says of itself.
//!
//! * Reads the image file only: no data file is opened, and the backing file only with
//!   `--backing-chain`. Encrypted images are described without a key.

mod describe;
mod human;
mod luks;
mod totals;

use std::path::Path;

use lacuna::chain::{LevelInfo, Levels};
use lacuna::storage::LockConflict;
use pollster::block_on;
use serde_json::Value;

use super::busy;
use super::open::{self, Request};
use super::spec::tree::BelowSpec;
use super::{Example, Form, Task, Verb, common, form, one_image};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::nodes::AnyStorage;
use crate::output;
use crate::persona::Tool;

use self::totals::Effort;

pub(crate) use describe::{bitmaps, snapshot, specifics};
pub(crate) use human::{dump, snapshots, tamed};

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "info",
    task: Task::Look,
    summary: "Describe an image",
    operands: "FILENAME",
    flags: &[
        common::FORMAT,
        common::IMAGE_OPTS,
        Flag::switch('b', "backing-chain", "describe the backing files too"),
        common::FORCE_SHARE,
        common::OBJECT,
        common::PROBE_BACKING,
        common::OUTPUT,
        Flag::switch('\0', "totals", "count data, zeros and the rest, also in large images")
            .long_only()
            .own(),
    ],
    examples: &[
        Example { shows: "size, format, backing file, snapshots", line: "disk.qcow2" },
        Example {
            shows: "an image and all it stands on, for programs",
            line: "--backing-chain --output=json overlay.qcow2",
        },
        Example { shows: "what its tables add up to, however large", line: "--totals disk.qcow2" },
    ],
    codes: &[],
    run,
};

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let form = form(parsed)?;
    let request = Request::reading(one_image(parsed)?, parsed, "format")?;
    let levels = match parsed.has("backing-chain") {
        true => Levels::All,
        false => Levels::Top,
    };
    let effort = if parsed.has("totals") { Effort::Whole } else { Effort::Free };
    let nodes = described(tool, &request, levels, effort)?;
    let nodes: Vec<Value> = match form {
        Form::Human if tool.is_own() => nodes.into_iter().map(tamed).collect(),
        _ => nodes,
    };
    let text = match (form, levels) {
        (Form::Human, _) => nodes.iter().map(human::node).collect::<Vec<_>>().join("\n"),
        (Form::Json, Levels::All) => format!("{}\n", output::pretty(&Value::Array(nodes))),
        (Form::Json, _) => nodes.iter().map(|node| format!("{}\n", output::pretty(node))).collect(),
    };
    output::print(&text).map(|()| 0)
}

/// Describes the image and, if asked, those below it, in the shape of QEMU's JSON.
fn described(
    tool: &Tool,
    request: &Request,
    levels: Levels,
    effort: Effort,
) -> CliResult<Vec<Value>> {
    let spec = &request.image;
    let found = inspected(tool, request, levels)?;
    let described = found.iter().enumerate().map(|(level, info)| {
        // The top one as the user wrote it, not as it was resolved.
        let mut node = describe::node(info, (level == 0).then_some(&spec.disk))?;
        if let (true, Some(header)) = (tool.is_own(), &info.header) {
            describe::add_claims(&mut node, header);
            totals::add(&mut node, info, effort)?;
        }
        Ok(node)
    });
    described.collect()
}

fn inspected(
    tool: &Tool,
    request: &Request,
    levels: Levels,
) -> CliResult<Vec<LevelInfo<AnyStorage>>> {
    let shown = &request.image.shown;
    let in_image = |error| open::cannot_open(shown, error);
    if let BelowSpec::Changed(changed) = &request.image.disk.below {
        // Nothing is opened here that an option for it could change.
        let key = &changed.first_key;
        let text = format!("Block format 'qcow2' does not support the option '{key}'");
        return Err(in_image(CliError::new(text)));
    }
    let opening = open::opening(tool, request).map_err(in_image)?;
    block_on(opening.inspect(levels)).map_err(|error| match LockConflict::of(&error) {
        Some(conflict) => busy(tool, request, conflict),
        None => not_described(tool, request, open::reason(tool, &request.image, &error)),
    })
}

/// As [`busy`], where a file below is missing.
fn not_described(tool: &Tool, request: &Request, reason: CliError) -> CliError {
    let below = reason.text().strip_prefix("Could not open backing file: ");
    let file = below.and_then(|text| text.strip_prefix("Could not open '")?.split("': ").next());
    match (below, file) {
        (Some(below), Some(file)) if !tool.is_own() => {
            open::cannot_open(file, CliError::new(below))
        }
        _ => open::cannot_open(&request.image.shown, reason),
    }
}

/// Each image is described on its own: of one below the top it is said that it cannot be opened.
fn busy(tool: &Tool, request: &Request, conflict: &LockConflict) -> CliError {
    let refusal = busy::refusal(tool, conflict, request.access);
    match conflict.path() == Path::new(&request.image.file) {
        true => open::cannot_open(&request.image.shown, refusal),
        false => open::cannot_open(&conflict.path().display().to_string(), refusal),
    }
}
