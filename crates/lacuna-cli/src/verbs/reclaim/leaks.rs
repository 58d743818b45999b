//! The first step: what nothing refers to is freed, and an image that is not sound is refused.
//!
//! One that was not closed cleanly is repaired as by whoever opens it for writing: a compaction that
//! ended half-way may leave it so.

use std::time::Instant;

use lacuna::ErrorKind;
use lacuna::qcow2::check::{CheckOptions, CheckReport, Repair, check};
use lacuna::qcow2::format::IncompatibleFeatures;
use lacuna::qcow2::read_header;
use pollster::block_on;

use super::report::{LEAKS, Step};
use super::steps::Work;
use crate::error::{CliError, CliResult};
use crate::format::Format;
use crate::persona::Tool;
use crate::verbs::check::{claim, opened, phase};
use crate::verbs::open::{self, Request};

/// Checks the image, and frees its leaks unless the run is dry.
pub(super) fn step(tool: &Tool, request: &Request, work: &mut Work) -> CliResult<Step> {
    let storage = opened(tool, request)?;
    claim(tool, &storage, Format::Qcow2, request)
        .map_err(|error| open::cannot_open(&request.image.shown, error))?;
    let Ok(header) = block_on(read_header(&storage)) else {
        // Whatever is wrong with it is told when it is opened as an image.
        return Ok(Step::nothing(LEAKS));
    };
    let is_dirty = header.features.incompatible.contains(IncompatibleFeatures::DIRTY);
    let repair = match (work.is_dry, is_dirty) {
        (true, true) => {
            return Err(unsound("The image was not closed cleanly: its refcounts may be wrong"));
        }
        (true, false) => Repair::None,
        (false, true) => Repair::All,
        (false, false) => Repair::Leaks,
    };
    let start = Instant::now();
    let found = block_on(check(&storage, &CheckOptions { repair }, &mut |progress| {
        work.meter.update(phase(progress.phase), progress.done, progress.total);
    }))?;
    judge(&found)?;
    let leaks = if work.is_dry { found.leaks } else { found.leaks_fixed };
    Ok(Step {
        freed_bytes: leaks << header.geometry.cluster_bits(),
        seconds: start.elapsed().as_secs_f64(),
        ..Step::nothing(LEAKS)
    })
}

/// What is not sound is left alone: moving and freeing would trust wrong counts.
fn judge(found: &CheckReport) -> CliResult<()> {
    match found {
        CheckReport { check_errors: 1.., .. } => Err(unsound("Parts of the image cannot be read")),
        CheckReport { corruptions: 1.., .. } => Err(unsound("The image is damaged")),
        _ => Ok(()),
    }
}

fn unsound(text: &str) -> CliError {
    CliError::new(text)
        .with_class(ErrorKind::Corrupt)
        .with_hint("`lacuna check -r all` tells what is wrong and repairs what it can")
}
