//! `stream`: brings into an image what part of its chain holds, so that it no longer needs that part.

use lacuna::block::{AllocationDepth, DynLayer};
use lacuna::chain::Sharing;
use lacuna::job::{self, Onto, RebaseOptions};
use lacuna::qcow2::{Access, BackingName, Image};
use pollster::block_on;

use super::level::Levels;
use super::open::{self, FileChain, Request};
use super::progress::Meter;
use super::spec::ImageSpec;
use super::{Example, ExitCode, Task, Verb, common, one_image};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::interrupt::{INTERRUPTED, Interrupted, interrupted_in_place};
use crate::nodes::AnyStorage;
use crate::persona::Tool;

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "stream",
    task: Task::Beside,
    summary: "Bring into an image what the images below it hold",
    operands: "FILENAME",
    flags: &[
        common::QUIET,
        common::PROGRESS,
        common::FORMAT,
        common::IMAGE_OPTS,
        Flag::valued('b', "base", "FILE", "the image of the chain to stand on; none if left out"),
        common::PROBE_BACKING,
        common::OBJECT,
    ],
    examples: &[
        Example { shows: "copy all that is below, and stand alone", line: "overlay.qcow2" },
        Example {
            shows: "copy what is between overlay.qcow2 and base.qcow2",
            line: "-p --base base.qcow2 overlay.qcow2",
        },
    ],
    codes: &[
        ExitCode { code: 0, means: "done" },
        ExitCode { code: 1, means: "not done; standard error says why" },
        ExitCode { code: INTERRUPTED, means: "interrupted; the image is valid, run it again" },
    ],
    run,
};

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let mut request = Request::reading(one_image(parsed)?, parsed, "format")?;
    request.sharing = Sharing::Format;
    let meter = Meter::new(tool, parsed, "stream")?;
    let level = match parsed.last("base") {
        Some(name) => Some(Levels::look(tool, &request)?.find(tool, name, &request.image.shown)?),
        None => None,
    };
    request.access = Access::ReadWrite;
    let chain = open::open_for_content(tool, &request)?;
    let done = stream(tool, &request, &chain, level, meter);
    let closed = block_on(chain.into_disk().close());
    done?;
    closed?;
    Ok(0)
}

fn stream(
    tool: &Tool,
    request: &Request,
    chain: &FileChain,
    level: Option<usize>,
    mut meter: Meter,
) -> CliResult<()> {
    let Some(image) = chain.disk().as_qcow2() else {
        return Err(CliError::new("Image does not have a backing file")
            .with_hint("only qcow2 images stand on others"));
    };
    let base = level.map(|level| open_base(tool, request, chain, level)).transpose()?;
    let onto = match (&base, level) {
        (Some(base), Some(level)) => Some(Onto {
            layer: base.disk() as &dyn DynLayer,
            name: name(chain, level)?,
            shared_from: u32::try_from(level + 1).ok().map(AllocationDepth),
        }),
        _ => None,
    };
    let interrupted = Interrupted::watch();
    let mut report = |done, total| meter.update("copy", done, total);
    let options = RebaseOptions::default();
    let work = job::rebase(image.clone(), onto, &options, &mut report);
    let done = block_on(interrupted.or(work));
    meter.finish(matches!(done, Some(Ok(_))));
    done.ok_or_else(interrupted_in_place)?.map(drop).map_err(CliError::from)
}

/// Opens the base with what is below it.
fn open_base(
    tool: &Tool,
    request: &Request,
    chain: &FileChain,
    level: usize,
) -> CliResult<FileChain> {
    let level = &chain.levels()[level];
    let format = level.format.name();
    let image = ImageSpec::from_name(&level.path.to_string_lossy(), Some(format))?;
    let request = Request { image, access: Access::ReadOnly, ..request.clone() };
    open::open_for_content(tool, &request)
}

/// Returns what the image is to call its base: what the one in between calls it, if that is seen from
/// the same folder; else where it is.
fn name(chain: &FileChain, level: usize) -> CliResult<BackingName> {
    let (top, base) = (&chain.levels()[0], &chain.levels()[level]);
    let above = &chain.levels()[level - 1];
    let stored = chain.level_image(level - 1).and_then(stored_name);
    let name = match stored.filter(|_| above.path.parent() == top.path.parent()) {
        Some(name) => name,
        None => {
            let path = std::fs::canonicalize(&base.path).unwrap_or_else(|_| base.path.clone());
            let text = path.to_str().map(str::to_owned);
            text.ok_or_else(|| {
                CliError::new(format!("The name {} is not UTF-8 text", path.display()))
            })?
        }
    };
    Ok(BackingName { name, format: Some(base.format.name().to_owned()) })
}

fn stored_name(image: &Image<AnyStorage>) -> Option<String> {
    image.header().backing_name.map(|name| name.to_string())
}
