//! `resize`: gives a disk another size.

use lacuna::block::{Layer, Preallocation};
use lacuna::qcow2::format::{BitmapFlags, MAX_L1_BYTES, Version};
use lacuna::qcow2::{Access, Image, Shrink};
use lacuna::raw;
use lacuna::{Error, ErrorKind};
use pollster::block_on;

use super::open::{self, FileChain, Request};
use super::{Example, Task, Verb, common, create, info};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::nodes::AnyStorage;
use crate::output;
use crate::persona::Tool;
use crate::size::{self, SizeError};

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "resize",
    task: Task::Change,
    summary: "Change the size of a disk",
    operands: "FILENAME [+-]SIZE",
    flags: &[
        common::QUIET,
        common::FORMAT,
        common::IMAGE_OPTS,
        Flag::switch('\0', "shrink", "allow to cut off what lies behind the new end").long_only(),
        Flag::valued(
            '\0',
            "preallocation",
            "MODE",
            "what is added is allocated at once: off, metadata, falloc, full",
        )
        .long_only(),
        common::PROBE_BACKING,
        common::OBJECT,
    ],
    examples: &[
        Example { shows: "make a disk larger by 10 GiB", line: "disk.qcow2 +10G" },
        Example {
            shows: "and reserve the space for it",
            line: "--preallocation=falloc disk.qcow2 +64M",
        },
        Example { shows: "cut off what lies behind 1 GiB", line: "--shrink disk.qcow2 1G" },
    ],
    codes: &[],
    run,
};

/// Takes a size that begins with a minus for what it is, and for no option.
pub(super) fn size_last(arguments: &[String]) -> Vec<String> {
    let mut arguments = arguments.to_vec();
    let is_less = |text: &String| {
        text.strip_prefix('-').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    let has_end = arguments.iter().any(|argument| argument == "--");
    if !has_end && arguments.last().is_some_and(is_less) {
        arguments.insert(arguments.len() - 1, "--".to_owned());
    }
    arguments
}

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let mode = create::preallocation(parsed.last("preallocation").unwrap_or("off"))
        .map_err(|name| CliError::new(format!("Invalid preallocation mode '{name}'")))?;
    let (name, wish) = match &parsed.operands[..] {
        [name, size] => (name, Wish::parse(size)?),
        [_, _, ..] => return Err(CliError::usage("Extra argument(s) in command line")),
        _ => return Err(CliError::usage("Expecting image file name and size")),
    };
    let request =
        Request { access: Access::ReadWrite, ..Request::reading(name, parsed, "format")? };
    let chain = open::open(tool, &request)?;
    open::hold_length(tool, chain.disk().storage())
        .map_err(|error| open::cannot_open(&request.image.shown, error))?;
    open::warn_of_guess(&request, &chain);
    let change = Change { old: chain.disk().size_bytes(), new: 0, mode };
    let change = Change { new: wish.applied_to(change.old)?, ..change };
    change.check(tool, parsed.has("shrink"))?;
    let done = change.make(&chain);
    // The image is closed in any case; the first error is the one to tell.
    let closed = block_on(chain.into_disk().close());
    done?;
    closed?;
    if !parsed.has("quiet") {
        output::print("Image resized.\n")?;
    }
    Ok(0)
}

/// The size operand.
#[derive(Clone, Copy, Debug)]
enum Wish {
    Exactly(u64),
    Less(u64),
    More(u64),
}

impl Wish {
    fn parse(text: &str) -> CliResult<Self> {
        let (kind, digits): (fn(u64) -> Self, _) = match text.as_bytes() {
            [b'+', ..] => (Self::More, &text[1..]),
            [b'-', ..] => (Self::Less, &text[1..]),
            _ => (Self::Exactly, text),
        };
        size::parse(digits).map(kind).map_err(|error| match error {
            SizeError::NotANumber => CliError::new(crate::options::no_size("size")),
            SizeError::OutOfRange => {
                CliError::new(format!("Value '{digits}' is out of range for parameter 'size'"))
            }
        })
    }

    fn applied_to(self, old: u64) -> CliResult<u64> {
        let new = match self {
            Self::Exactly(size) => Some(size),
            Self::Less(bytes) => old.checked_sub(bytes),
            Self::More(bytes) => old.checked_add(bytes),
        };
        new.filter(|size| *size > 0 && i64::try_from(*size).is_ok())
            .ok_or_else(|| CliError::new("New image size must be positive"))
    }
}

/// A change of size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    pub(crate) old: u64,
    pub(crate) new: u64,
    pub(crate) mode: Preallocation,
}

impl Change {
    fn check(self, tool: &Tool, may_shrink: bool) -> CliResult<()> {
        if self.new <= self.old && self.mode != Preallocation::Off {
            return Err(CliError::new("Preallocation can only be used for growing images"));
        }
        if self.new < self.old && !may_shrink {
            return Err(CliError::new(format!(
                "Use the --shrink option to perform a shrink operation.\n{}: warning: Shrinking an \
                 image will delete all data beyond the shrunken image's end. Before performing \
                 such an operation, make sure there is no important data there.",
                tool.name
            )));
        }
        Ok(())
    }

    /// Makes it. A raw disk learns of it when it is opened anew.
    pub(crate) fn make(self, chain: &FileChain) -> CliResult<()> {
        match chain.disk().as_qcow2() {
            Some(image) => self.resize_image(image),
            None if self.mode == Preallocation::Metadata => {
                Err(CliError::new("Unsupported preallocation mode: metadata"))
            }
            None if self.is_of_server(chain) => self.resize_export(chain),
            None => block_on(raw::resize(chain.disk().storage(), self.new, self.mode))
                .map_err(|error| create::no_room(&error, self.mode)),
        }
    }

    /// Says whether another size is asked for than the one that a server gives.
    fn is_of_server(self, chain: &FileChain) -> bool {
        chain.disk().storage().is_export() && self.new != chain.disk().size_bytes()
    }

    /// Asks the server; few of them have a word for that.
    fn resize_export(self, chain: &FileChain) -> CliResult<()> {
        if self.mode != Preallocation::Off {
            return Err(CliError::new("Cannot resize NBD nodes").in_our_words(
                "Space cannot be reserved in an export: --preallocation is for files",
            ));
        }
        let storage = chain.disk().storage();
        block_on(raw::resize(storage, self.new, self.mode)).map_err(|error| match error.kind() {
            ErrorKind::Unsupported => CliError::new("Cannot resize NBD nodes")
                .in_our_words("The size of this export is its server's to change"),
            _ => error.into(),
        })
    }

    fn resize_image(self, image: &Image<AnyStorage>) -> CliResult<()> {
        self.check_image(image)?;
        let result = match self.mode {
            Preallocation::Off => block_on(image.resize(self.new, Shrink::Allow)),
            mode => block_on(image.grow(self.new, mode)),
        };
        result.map_err(|error| self.words(image, error))
    }

    /// Says in QEMU's words what the format forbids.
    fn check_image(self, image: &Image<AnyStorage>) -> CliResult<()> {
        let header = image.header();
        if !self.new.is_multiple_of(512) {
            return Err(CliError::new("The new size must be a multiple of 512"));
        }
        if header.geometry.version() == Version::V2 && header.snapshots.count > 0 {
            return Err(CliError::new("Can't resize a v2 image which has snapshots"));
        }
        self.check_bitmaps(image)?;
        if header.geometry.l1_entries_for(self.new) * 8 > MAX_L1_BYTES && self.new > self.old {
            return Err(CliError::new("Failed to grow the L1 table: File too large")
                .with_hint("convert to an image with larger clusters"));
        }
        Ok(())
    }

    fn check_bitmaps(self, image: &Image<AnyStorage>) -> CliResult<()> {
        let bitmaps = info::bitmaps(&image.header(), image.storage())?;
        match bitmaps.iter().find(|bitmap| bitmap.flags.contains(BitmapFlags::IN_USE)) {
            None => Ok(()),
            Some(bitmap) => Err(CliError::new(format!(
                "Bitmap '{}' is inconsistent and cannot be used\nTry block-dirty-bitmap-remove to \
                 delete this bitmap from disk",
                bitmap.name
            ))),
        }
    }

    fn words(self, image: &Image<AnyStorage>, error: Error) -> CliError {
        let reserves = self.mode >= Preallocation::Falloc;
        if !reserves || error.kind() != ErrorKind::NoSpace {
            return error.into();
        }
        let words = create::no_room(&error, self.mode);
        match image.header().has_external_data_file() {
            true => words,
            false => words.under("Failed to resize underlying file"),
        }
    }
}
