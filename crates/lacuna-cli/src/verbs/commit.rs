//! `commit`: brings what an image holds into the one that it stands on.

use lacuna::block::Layer;
use lacuna::job::{self, Progress};
use lacuna::qcow2::Access;
use pollster::block_on;

use super::level::Levels;
use super::open::{self, FileChainParts, Request};
use super::pace::{self, Pace};
use super::progress::Meter;
use super::{Example, ExitCode, Task, Verb, common, one_image};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult, errno_words};
use crate::interrupt::{INTERRUPTED, Interrupted, interrupted_in_place};
use crate::output;
use crate::persona::Tool;

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "commit",
    task: Task::Beside,
    summary: "Bring what an image holds into its backing file, and empty it",
    operands: "FILENAME",
    flags: &[
        common::QUIET,
        common::PROGRESS,
        common::FORMAT,
        common::IMAGE_OPTS,
        Flag::valued('t', "cache", "MODE", "cache mode of the images that are written (writeback)"),
        Flag::valued('b', "base", "FILE", "the image of the chain to bring it into; implies -d"),
        Flag::switch('d', "drop", "leave FILENAME as it is instead of emptying it"),
        Flag::valued('r', "rate", "RATE", "bytes to write per second at most"),
        common::PROBE_BACKING,
        common::OBJECT,
    ],
    examples: &[
        Example { shows: "merge an overlay into its backing file", line: "overlay.qcow2" },
        Example {
            shows: "the same, as the overlay is to be removed afterwards",
            line: "-d overlay.qcow2",
        },
        Example {
            shows: "all layers above base.qcow2 go into it, at 50 MiB a second at most",
            line: "-b base.qcow2 -r 50M overlay.qcow2",
        },
    ],
    codes: &[
        ExitCode { code: 0, means: "done" },
        ExitCode { code: 1, means: "not done; standard error says why" },
        ExitCode { code: INTERRUPTED, means: "interrupted; all images are valid, run it again" },
    ],
    run,
};

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let rate = pace::rate(parsed)?;
    let request = request(parsed)?;
    let meter = Meter::new(tool, parsed, "commit")?;
    let level = level(tool, parsed, &request)?;
    let parts = open::open_split(tool, &request, level)?;
    let work = Work { tool, parsed, parts: &parts, request: &request };
    let done = work.carry_out(rate, meter);
    let closed = block_on(parts.close());
    done?;
    closed?;
    if !parsed.has("quiet") {
        output::print("Image committed.\n")?;
    }
    Ok(0)
}

fn request(parsed: &Parsed) -> CliResult<Request> {
    let mut request = Request::reading(one_image(parsed)?, parsed, "format")?;
    request.cache = open::target_cache(parsed, "cache")?.unwrap_or(request.cache);
    request.access = Access::ReadWrite;
    Ok(request)
}

/// Returns which level of the chain is the base.
fn level(tool: &Tool, parsed: &Parsed, request: &Request) -> CliResult<usize> {
    let levels = Levels::look(tool, request)?;
    match parsed.last("base") {
        Some(name) => levels.find(tool, name, &request.image.shown),
        None if levels.is_alone() => Err(CliError::new("Image does not have a backing file")
            .with_hint("there is nothing that its content could go into")),
        None => Ok(1),
    }
}

struct Work<'a> {
    tool: &'a Tool,
    parsed: &'a Parsed,
    parts: &'a FileChainParts,
    request: &'a Request,
}

impl Work<'_> {
    fn carry_out(&self, rate: Option<u64>, meter: Meter) -> CliResult<()> {
        self.hold_length()?;
        let interrupted = Interrupted::watch();
        self.copy(rate, &interrupted, meter)?;
        let drops = self.parsed.has("drop") || self.parsed.has("base");
        if drops {
            return Ok(());
        }
        let emptied = block_on(interrupted.or(job::empty_top(self.parts.chain())));
        let words = |error: lacuna::Error| match self.tool.is_own() {
            true => CliError::from(error),
            false => {
                let text = format!("Failed to empty {}", self.request.image.shown);
                CliError::new(format!("{text}: {}", errno_words(&error)))
            }
        };
        emptied.ok_or_else(interrupted_in_place)?.map_err(words)
    }

    /// Claims the length of a base that is to grow.
    fn hold_length(&self) -> CliResult<()> {
        let (above, base) = (&self.parts.chain().above, &self.parts.chain().base);
        match base.disk().size_bytes() < above.disk().size_bytes() {
            true => open::hold_length(self.tool, base.disk().storage()),
            false => Ok(()),
        }
    }

    fn copy(
        &self,
        rate: Option<u64>,
        interrupted: &Interrupted,
        mut meter: Meter,
    ) -> CliResult<()> {
        let mut pace = Pace::at(rate);
        let mut report = |progress: Progress| {
            meter.show_copy(&progress);
            pace.keep_up_to(progress.written_bytes, interrupted);
        };
        let copied = block_on(interrupted.or(job::commit(self.parts.chain(), &mut report)));
        meter.finish(matches!(copied, Some(Ok(_))));
        let words = |error: lacuna::Error| match self.tool.is_own() {
            true => CliError::from(error),
            false => CliError::new(format!("Block job failed: {}", errno_words(&error))),
        };
        copied.ok_or_else(interrupted_in_place)?.map(drop).map_err(words)
    }
}
