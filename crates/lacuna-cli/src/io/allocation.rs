//! Commands that tell which parts of the top image are allocated.

use lacuna::block::{AllocationDepth, Extent, Layer};
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;

use super::commands::{Command, Done, Failure};
use super::image::report_error;
use super::session::Session;
use super::transfer::number;
use crate::output::io_size;

/// What `alloc` asks about where no count is given.
const SECTOR_BYTES: u64 = 512;

pub(super) fn alloc(session: &mut Session<'_>, _: &Command, words: &[String]) -> Done {
    let [start, rest @ ..] = words else { return Err(Failure::Usage) };
    let start = number(session, start)?;
    let count = match rest {
        [text, ..] => number(session, text)?,
        [] => SECTOR_BYTES,
    };
    let len = count.min(session.size_bytes()?.saturating_sub(start));
    let extents = extents(session, GuestRange::new(GuestOffset(start), len))?;
    let allocated: u64 =
        extents.iter().filter(|run| is_allocated(run)).map(|run| run.range.len).sum();
    session.say(&format!("{allocated}/{len} bytes allocated at offset {}\n", io_size(start as f64)))
}

pub(super) fn map(session: &mut Session<'_>, _: &Command, _: &[String]) -> Done {
    let whole = GuestRange::new(GuestOffset(0), session.size_bytes()?);
    let mut runs: Vec<(GuestRange, bool)> = Vec::new();
    for run in extents(session, whole)? {
        match runs.last_mut() {
            Some((range, allocated)) if *allocated == is_allocated(&run) => {
                range.len += run.range.len;
            }
            _ => runs.push((run.range, is_allocated(&run))),
        }
    }
    let lines: String = runs.iter().map(|(range, allocated)| line(range, *allocated)).collect();
    session.say(&lines)
}

fn line(range: &GuestRange, allocated: bool) -> String {
    format!(
        "{} ({:#x}) bytes {} allocated at offset {} ({:#x})\n",
        io_size(range.len as f64),
        range.len,
        if allocated { "   " } else { "not" },
        io_size(range.start.0 as f64),
        range.start.0,
    )
}

/// Backing layers do not count.
fn is_allocated(run: &Extent) -> bool {
    run.status.depth == AllocationDepth::TOP
}

fn extents(session: &Session<'_>, range: GuestRange) -> Result<Vec<Extent>, Failure> {
    let disk = session.disk()?;
    let mut runs = Vec::new();
    let mut rest = range;
    while !rest.is_empty() {
        match block_on(disk.extents(rest)) {
            Ok(more) => {
                let end = more.last().map_or_else(|| rest.end(), |last| last.range.end());
                runs.extend(more);
                rest = GuestRange::new(end, rest.end().0.saturating_sub(end.0));
            }
            Err(error) => {
                report_error(session, &error)?;
            }
        }
    }
    Ok(runs)
}
