//! The copy itself, and what is said of it.

use std::time::{Duration, Instant};

use lacuna::Error;
use lacuna::block::Layer;
use lacuna::job::{
    self, AtFlush, ConvertOptions, CopyFailure, CopyStep, DedupWrites, DedupWritesOptions, Keepers,
    Lost, LostPart, Progress, Salvage, Target,
};
use lacuna::units::GuestRange;
use pollster::block_on;

use super::super::dedup;
use super::super::open::FileChain;
use super::super::pace;
use super::super::progress::Meter;
use super::bitmaps;
use super::concat::Concat;
use crate::args::Parsed;
use crate::error::{CliError, CliResult, errno_words, sentence};
use crate::nodes::{AnyStorage, ToolDisk};
use crate::output;
use crate::persona::Tool;

/// Copies the sources, one behind the other, and closes the target.
pub(super) fn copy(
    tool: &Tool,
    parsed: &Parsed,
    sources: &[FileChain],
    target: FileChain,
    options: &ConvertOptions,
    meter: Meter,
) -> CliResult<()> {
    if parsed.has("bitmaps") {
        bitmaps::takes_bitmaps(&target)?;
    }
    match sources {
        [source] => {
            let bitmaps = |target: &FileChain| bitmaps::copy(tool, parsed, source, target);
            copy_layer(tool, parsed, source.disk(), target, options, meter, bitmaps)
        }
        sources => {
            let row = Concat::new(sources.iter().map(|source| source.disk().clone()))
                .ok_or_else(|| CliError::new("The sources together are too large for a disk"))?;
            copy_layer(tool, parsed, &row, target, options, meter, |_| Ok(()))
        }
    }
}

fn copy_layer<L: Layer>(
    tool: &Tool,
    parsed: &Parsed,
    source: &L,
    target: FileChain,
    options: &ConvertOptions,
    mut meter: Meter,
    afterwards: impl FnOnce(&FileChain) -> CliResult<()>,
) -> CliResult<()> {
    let limit = pace::rate(parsed)?.map(Limit::new);
    let mut report = |progress: Progress| {
        meter.show_copy(&progress);
        if let Some(limit) = &limit {
            limit.wait(progress.written_bytes);
        }
    };
    let sharing = sharing(parsed, target.disk())?;
    let copied = match &sharing {
        None => copy_to(tool, parsed, source, target.disk(), options, &mut report),
        Some(sharing) => copy_to(tool, parsed, source, sharing, options, &mut report),
    };
    let copied = copied.map_err(|error| failure(tool, error)).and_then(|()| afterwards(&target));
    let closed = copied
        .and_then(|()| block_on(target.into_disk().close()).map_err(|error| failure(tool, error)));
    meter.finish(closed.is_ok());
    closed?;
    match sharing {
        Some(sharing) if !parsed.has("quiet") => {
            output::print(&dedup::told(&sharing.shared(), &sharing.declined()))
        }
        _ => Ok(()),
    }
}

/// The target as one that stores equal clusters once, if that is asked for.
fn sharing(parsed: &Parsed, target: &ToolDisk) -> CliResult<Option<DedupWrites<AnyStorage>>> {
    if !parsed.has("dedup") {
        return Ok(None);
    }
    let image = target.bare_image().ok_or_else(|| {
        CliError::new("--dedup writes to qcow2 images, with no layer on top of them")
    })?;
    // One that was there before may have something to lose.
    let keepers = if parsed.has("no-create") { Keepers::Fresh } else { Keepers::InPlace };
    let options =
        DedupWritesOptions { at_flush: AtFlush::Share, keepers, ..dedup::writes(parsed)? };
    Ok(Some(DedupWrites::new(image.clone(), options)?))
}

fn copy_to<L: Layer, T: Target>(
    tool: &Tool,
    parsed: &Parsed,
    source: &L,
    target: &T,
    options: &ConvertOptions,
    report: &mut (dyn FnMut(Progress) + Send),
) -> lacuna::Result<()> {
    match parsed.has("salvage") {
        true => salvage(tool, parsed, source, target, options, report),
        false => block_on(job::convert(source, target, options, report)).map(drop),
    }
}

fn salvage<L: Layer, T: Target>(
    tool: &Tool,
    parsed: &Parsed,
    source: &L,
    target: &T,
    options: &ConvertOptions,
    report: &mut (dyn FnMut(Progress) + Send),
) -> lacuna::Result<()> {
    let mut losses = Losses { tool, quiet: parsed.has("quiet"), last: None };
    let copied = {
        let source = Salvage::new(source, |lost: Lost<'_>| losses.add(lost));
        block_on(job::convert(&source, target, options, report))
    };
    losses.end();
    copied.map(drop)
}

/// What could not be read: a line for each sector under QEMU's names, one for each run under ours.
struct Losses<'a> {
    tool: &'a Tool,
    quiet: bool,
    last: Option<(GuestRange, String)>,
}

impl Losses<'_> {
    fn add(&mut self, lost: Lost<'_>) {
        if self.quiet {
            return;
        }
        let (start, words) = (lost.range.start.0, errno_words(lost.error));
        match lost.what {
            LostPart::Status => {
                let what = "error while reading block status at offset";
                self.warn(&format!("{what} {start}: {words}"));
            }
            LostPart::Content if !self.tool.is_own() => {
                self.warn(&format!("error while reading offset {start}: {words}"));
            }
            LostPart::Content => match &mut self.last {
                Some((range, _)) if range.end() == lost.range.start => range.len += lost.range.len,
                _ => {
                    self.end();
                    self.last = Some((lost.range, sentence(lost.error)));
                }
            },
        }
    }

    /// Says the last run.
    fn end(&mut self) {
        if let Some((range, why)) = self.last.take() {
            let (len, start) = (range.len, range.start.0);
            self.warn(&format!("{len} bytes at {start} are lost and read as zeros: {why}"));
        }
    }

    fn warn(&self, text: &str) {
        output::warn(&format!("{}: warning: {text}", self.tool.name));
    }
}

/// Bytes per second at most. Waiting happens between requests, on the thread that copies.
struct Limit {
    bytes_per_second: u64,
    start: Instant,
}

impl Limit {
    fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, start: Instant::now() }
    }

    fn wait(&self, written_bytes: u64) {
        std::thread::sleep(self.due(written_bytes).saturating_sub(self.start.elapsed()));
    }

    /// Returns how long after the start so many bytes may be written.
    fn due(&self, written_bytes: u64) -> Duration {
        pace::due(written_bytes, self.bytes_per_second)
    }
}

/// Says where the copy failed, in QEMU's words under its names.
fn failure(tool: &Tool, error: Error) -> CliError {
    let Some(place) = CopyFailure::of(&error).copied() else { return error.into() };
    let (offset, words) = (place.offset.0, errno_words(&error));
    let class = error.kind();
    let found = match place.step {
        _ if tool.is_own() => CliError::from(error),
        CopyStep::Map => {
            CliError::new(format!("error while reading block status at offset {offset}: {words}"))
        }
        CopyStep::Read => CliError::new(format!("error while reading at byte {offset}: {words}")),
        CopyStep::Write => CliError::new(format!("error while writing at byte {offset}: {words}")),
    };
    found.with_class(class).with_fact("offset", offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_bytes_by_seconds_without_overflow() {
        let limit = |rate| Limit::new(rate);
        assert_eq!(limit(1000).due(2500), Duration::from_millis(2500));
        assert_eq!(limit(u64::MAX).due(u64::MAX), Duration::from_secs(1));
        assert_eq!(limit(1).due(u64::MAX), Duration::from_nanos(u64::MAX));
        assert_eq!(limit(5).due(0), Duration::ZERO);
    }
}
