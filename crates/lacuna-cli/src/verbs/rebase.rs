//! `rebase`: puts an image onto another backing file, or on none.

use lacuna::block::{AllocationDepth, DynLayer};
use lacuna::chain::{Levels, Sharing};
use lacuna::job::{self, Encoding, OldZeros, Onto, RebaseOptions};
use lacuna::qcow2::{Access, BackingName, Image};
use lacuna::{Error, ErrorKind};
use pollster::block_on;

use super::open::{self, FileChain, Request};
use super::progress::Meter;
use super::spec::ImageSpec;
use super::spec::tree::BelowSpec;
use super::{Example, Task, Verb, common, create, one_image};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult, errno_words, sentence};
use crate::format::is_known;
use crate::nodes::AnyStorage;
use crate::output;
use crate::persona::Tool;

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "rebase",
    task: Task::Change,
    summary: "Stand on another backing file; commit, stream: move content",
    operands: "FILENAME",
    flags: &[
        common::QUIET,
        common::PROGRESS,
        common::FORMAT,
        common::IMAGE_OPTS,
        Flag::valued('t', "cache", "MODE", "cache mode of FILENAME (writeback)"),
        Flag::valued('b', "backing", "FILE", "the new backing file; none if empty"),
        Flag::valued('F', "backing-format", "FMT", "format of the new backing file"),
        Flag::valued('T', "backing-cache", "MODE", "cache mode of the new backing file"),
        Flag::switch('u', "backing-unsafe", "only change the name: what a guest reads may change"),
        Flag::switch('c', "compress", "compress what is copied into the image"),
        Flag::switch('U', "force-share", "open the backing file even if somebody writes to it"),
        common::PROBE_BACKING,
        common::OBJECT,
    ],
    examples: &[
        Example {
            shows: "copy what the backing file has, and stand alone",
            line: "-b '' overlay.qcow2",
        },
        Example {
            shows: "stand on another file; what differs is copied",
            line: "-p -b old.qcow2 -F qcow2 overlay.qcow2",
        },
        Example {
            shows: "the backing file was moved: only change its name",
            line: "-u -b moved.qcow2 -F qcow2 overlay.qcow2",
        },
    ],
    codes: &[],
    run,
};

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let wish = Wish::new(parsed)?;
    let meter = Meter::new(tool, parsed, "rebase")?;
    let chain = match wish.is_unsafe {
        true => open::open(tool, &wish.request)?,
        false => open::open_for_content(tool, &wish.request)?,
    };
    open::warn_of_guess(&wish.request, &chain);
    let done = wish.carry_out(tool, &chain, meter);
    let closed = block_on(chain.into_disk().close());
    done?;
    closed?;
    Ok(0)
}

/// What the command line asks for.
struct Wish<'a> {
    request: Request,
    parsed: &'a Parsed,
    /// Nothing where the image is to stand alone.
    backing: Option<&'a str>,
    format: Option<&'a str>,
    is_unsafe: bool,
}

impl<'a> Wish<'a> {
    fn new(parsed: &'a Parsed) -> CliResult<Self> {
        let is_unsafe = parsed.has("backing-unsafe");
        let name = one_image(parsed)?;
        if !is_unsafe && !parsed.has("backing") {
            return Err(CliError::usage("Must specify backing file (-b) or use unsafe mode (-u)"));
        }
        let mut request = Request::reading(name, parsed, "format")?;
        request.cache = open::target_cache(parsed, "cache")?.unwrap_or(request.cache);
        open::source_cache(parsed, "backing-cache")?;
        // What may be shared is the backing file.
        request.sharing = Sharing::Format;
        request.access = Access::ReadWrite;
        if is_unsafe {
            request.image.disk.below = BelowSpec::Nothing;
        }
        let backing = parsed.last("backing").filter(|name| !name.is_empty());
        let format = parsed.last("backing-format");
        Ok(Self { request, parsed, backing, format, is_unsafe })
    }

    fn carry_out(&self, tool: &Tool, chain: &FileChain, meter: Meter) -> CliResult<()> {
        let compresses = self.parsed.has("compress");
        let image = chain.disk().as_qcow2();
        if compresses && image.is_none() {
            let text = "Compression not supported for this file format";
            return Err(CliError::new(text).with_class(ErrorKind::Unsupported));
        }
        if let Some(format) = self.format.filter(|format| !is_known(format)) {
            return Err(CliError::new(format!("Invalid format name: '{format}'"))
                .with_hint("mostly it is qcow2 or raw"));
        }
        let new = match (self.is_unsafe, self.backing) {
            (false, Some(name)) => Some(self.open_new(tool, name)?),
            _ => None,
        };
        let Some(image) = image else { return Err(self.not_supported()) };
        let name = self.name()?;
        match self.is_unsafe {
            true => {
                self.warn_of_change(tool, image);
                let closed = block_on(image.clone().close_onto(name));
                meter_over(meter, closed).map_err(|error| self.words(tool, &error))
            }
            false => self.copy(tool, chain, image, new.as_ref(), name, meter),
        }
    }

    fn copy(
        &self,
        tool: &Tool,
        chain: &FileChain,
        image: &Image<AnyStorage>,
        new: Option<&FileChain>,
        name: Option<BackingName>,
        mut meter: Meter,
    ) -> CliResult<()> {
        let onto = new.zip(name).map(|(new, name)| Onto {
            layer: new.disk() as &dyn DynLayer,
            name,
            shared_from: shared_from(chain, new),
        });
        let encoding = match self.parsed.has("compress") {
            true => Encoding::Compressed,
            false => Encoding::Plain,
        };
        let zeros = match tool.is_own() {
            true => OldZeros::Zeroed,
            false => OldZeros::Written,
        };
        let options = RebaseOptions { encoding, zeros };
        let mut report = |done, total| meter.update("copy", done, total);
        let done = block_on(job::rebase(image.clone(), onto, &options, &mut report));
        meter_over(meter, done.map(drop)).map_err(|error| self.words(tool, &error))
    }

    /// Returns the name to be stored; its format is not guessed, as a guest could have chosen it.
    fn name(&self) -> CliResult<Option<BackingName>> {
        let Some(name) = self.backing else { return Ok(None) };
        match self.format {
            Some(format) => {
                Ok(Some(BackingName { name: name.to_owned(), format: Some(format.to_owned()) }))
            }
            None => Err(self
                .cannot_change("backing format must be specified")
                .with_hint("-F names the format of the backing file")),
        }
    }

    fn new_request(&self, name: &str) -> CliResult<Request> {
        let path = create::beside(&self.request.image.path(), name);
        let image = ImageSpec::from_name(&path.to_string_lossy(), self.format)?;
        let cache = open::source_cache(self.parsed, "backing-cache")?;
        let (access, sharing) = (Access::ReadOnly, open::sharing(self.parsed));
        Ok(Request { image, access, cache, sharing, unnamed: open::unnamed(self.parsed) })
    }

    fn open_new(&self, tool: &Tool, name: &str) -> CliResult<FileChain> {
        let opened =
            self.new_request(name).and_then(|request| open::open_bare_for_content(tool, &request));
        opened.map_err(|error| {
            error
                .under(format!("Could not open new backing file '{name}'"))
                .with_hint("-u changes the name without a look at the file")
        })
    }

    fn not_supported(&self) -> CliError {
        self.cannot_change("Operation not supported")
            .with_class(ErrorKind::Unsupported)
            .with_hint("only qcow2 images name a backing file")
    }

    fn cannot_change(&self, why: &str) -> CliError {
        let name = self.parsed.last("backing").unwrap_or("(null)");
        CliError::new(format!("Could not change the backing file to '{name}': {why}"))
    }

    /// Says in QEMU's words what kept the backing file from being changed.
    fn words(&self, tool: &Tool, error: &Error) -> CliError {
        let own = CliError::from(error.clone());
        if tool.is_own() {
            return own;
        }
        let is_of_header = error.kind() == ErrorKind::NoSpace && error.raw_os_error().is_none();
        match is_of_header {
            true => self.cannot_change("No space left in the file header"),
            false => self.cannot_change(&errno_words(error)),
        }
    }

    /// Says how much of the disk would show what the new file has (001-8). A file that cannot be
    /// looked at is no reason not to be named.
    fn warn_of_change(&self, tool: &Tool, image: &Image<AnyStorage>) {
        let Some(name) = self.backing.filter(|_| tool.is_own() && !self.parsed.has("quiet")) else {
            return;
        };
        let Some(from) = self.old_size(tool, image) else { return };
        let quiet = |request: Request| Request { sharing: Sharing::All, ..request };
        let new = self.new_request(name).map(quiet);
        let new = new.and_then(|request| open::open_bare(tool, &request)).ok();
        let layer = new.as_ref().map(|new| new.disk() as &dyn DynLayer);
        match block_on(job::uncovered_bytes(image, from, layer)) {
            Ok(0) => {}
            Ok(bytes) => output::warn(&format!(
                "{}: warning: {bytes} bytes that read as zeros now will show what {} has there; \
                 without -u they stay zeros",
                tool.name,
                output::tame(name)
            )),
            Err(error) => output::warn(&format!(
                "{}: warning: it is not known what the change shows: {}",
                tool.name,
                sentence(&error)
            )),
        }
    }

    /// Returns the size of what the image stands on now, as far as that can be had.
    fn old_size(&self, tool: &Tool, image: &Image<AnyStorage>) -> Option<u64> {
        if image.header().backing_name.is_none() {
            return Some(0);
        }
        let mut request = self.request.clone();
        (request.access, request.sharing) = (Access::ReadOnly, Sharing::All);
        request.image.disk.below = BelowSpec::Named;
        let levels = block_on(open::opening(tool, &request).ok()?.inspect(Levels::All)).ok()?;
        levels.get(1).map(|level| level.size_bytes)
    }
}

fn meter_over(meter: Meter, done: lacuna::Result<()>) -> lacuna::Result<()> {
    meter.finish(done.is_ok());
    done
}

/// Returns the depth from which on both chains are the same files.
fn shared_from(chain: &FileChain, new: &FileChain) -> Option<AllocationDepth> {
    let new = &new.levels().first()?.path;
    let level = chain.levels().iter().position(|level| open::same_file(&level.path, new))?;
    u32::try_from(level + 1).ok().map(AllocationDepth)
}
