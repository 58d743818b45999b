//! What each image becomes: its chain, a snapshot of it, an overlay on it, or a part of it.
//!
//! * Never changed: an image below a temporary overlay; it may be read-only, and in use by others
//!   who read.

use lacuna::job::DedupWritesOptions;
use lacuna::qcow2::Access;

use super::asked::{self, Named};
use super::bitmaps::{Bitmaps, Wish};
use super::disk::ChainDisk;
use super::open::{self, Request};
use super::snapshot;
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::format::Format;
use crate::nodes::FileChain;
use crate::persona::Tool;
use crate::size;
use crate::verbs::spec::tree::{DiskSpec, StorageSpec, Window};
use crate::verbs::{dedup, overlay};

/// Options that say which disk an image becomes, named as qemu-nbd names them.
pub(super) const LOAD_SNAPSHOT: Flag = Flag::valued(
    'l',
    "load-snapshot",
    "SNAPSHOT",
    "serve an internal snapshot: an ID or a name, or snapshot.id=ID,snapshot.name=NAME",
);
pub(super) const SNAPSHOT: Flag =
    Flag::switch('s', "snapshot", "put what is written into a temporary overlay");
pub(super) const OFFSET: Flag =
    Flag::valued('o', "offset", "BYTES", "serve what lies behind this offset of the disk");
pub(super) const SIZE: Flag =
    Flag::valued('\0', "size", "BYTES", "serve this much and no more").long_only();

/// With so much waiting, a write of a client shares it first, which takes as long as two flushes.
const ONLINE_BATCH_BYTES: u64 = 16 << 20;

/// Which disk an image becomes.
pub(crate) struct Becomes {
    /// A part of it.
    pub(crate) part: Option<Window>,
    /// A temporary overlay on it.
    pub(crate) is_overlay: bool,
    /// An internal snapshot of it, in the words of the command line.
    pub(crate) snapshot: Option<String>,
}

/// Opens all images, in order.
pub(super) fn open_all(
    tool: &Tool,
    images: &[Named],
    parsed: &Parsed,
) -> CliResult<Vec<ChainDisk>> {
    check(parsed)?;
    let (becomes, wish) = (Becomes::of(parsed)?, Wish::of(parsed));
    let sharing = sharing(parsed)?;
    let opened = |named: &Named| {
        let request = asked::request(named, parsed)?;
        let shown = request.image.shown.clone();
        let disk = disk(tool, request, &becomes, &wish, |error| open::cannot_open(&shown, error))?;
        match sharing {
            None => Ok(disk),
            Some(options) => disk.with_sharing(options).map_err(|error| error.under(&shown)),
        }
    };
    let disks = images.iter().map(opened).collect::<CliResult<Vec<_>>>()?;
    wish.check(disks.iter().map(ChainDisk::own_bitmaps))?;
    Ok(disks)
}

/// Opens what an image becomes; `cannot` says of an error which image could not be opened.
pub(crate) fn disk(
    tool: &Tool,
    request: Request,
    becomes: &Becomes,
    wish: &Wish,
    cannot: impl Fn(CliError) -> CliError,
) -> CliResult<ChainDisk> {
    let chain = chain(tool, request, becomes, cannot)?;
    let bitmaps = Bitmaps::of(&chain, wish)?;
    Ok(ChainDisk::new(chain, bitmaps))
}

impl Becomes {
    fn of(parsed: &Parsed) -> CliResult<Self> {
        Ok(Self {
            part: part(parsed)?,
            is_overlay: parsed.has("snapshot"),
            snapshot: parsed.last("load-snapshot").map(str::to_owned),
        })
    }
}

/// Reads how writes are deduplicated, if they are.
fn sharing(parsed: &Parsed) -> CliResult<Option<DedupWritesOptions>> {
    let options = dedup::writes(parsed)?;
    match parsed.last("dedup") {
        Some("online") => {
            let batch_bytes = ONLINE_BATCH_BYTES;
            Ok(Some(DedupWritesOptions { batch_bytes, ..options }))
        }
        None | Some("off") if parsed.has("dedup-memory") => {
            Err(CliError::usage("Use of --dedup-memory requires --dedup=online"))
        }
        None | Some("off") => Ok(None),
        Some(other) => {
            Err(CliError::usage(format!("--dedup expects 'off' or 'online' not '{other}'")))
        }
    }
}

fn check(parsed: &Parsed) -> CliResult<()> {
    let parts = ["snapshot", "offset", "size", "bitmap", "layers-bitmap"];
    match parts.into_iter().find(|flag| parsed.has(flag)) {
        Some(flag) if parsed.has("load-snapshot") => {
            let text = format!("--load-snapshot and --{flag} are mutually exclusive");
            Err(CliError::new(text)
                .with_hint("lacuna convert -l SNAPSHOT makes a disk of its own from a snapshot"))
        }
        _ => Ok(()),
    }
}

fn chain(
    tool: &Tool,
    mut request: Request,
    becomes: &Becomes,
    cannot: impl Fn(CliError) -> CliError,
) -> CliResult<FileChain> {
    if let Some(part) = becomes.part {
        let format = request.image.format()?;
        request.image.disk = part_of(request.image.disk, format, part);
    }
    let choice =
        becomes.snapshot.as_deref().map(|text| snapshot::choice(tool, text)).transpose()?;
    if choice.is_some() {
        request.access = Access::ReadOnly;
    }
    let chain = match becomes.is_overlay {
        true => above(tool, &request),
        false => open::open_bare_for_content(tool, &request),
    };
    let chain = chain.map_err(cannot)?;
    match choice {
        Some(choice) => snapshot::at(tool, chain, &choice),
        None => {
            open::warn_of_guess(&request, &chain);
            Ok(chain)
        }
    }
}

/// Opens a temporary overlay on the image.
fn above(tool: &Tool, request: &Request) -> CliResult<FileChain> {
    let overlay = overlay::make(tool, request)?;
    let mut above = overlay.request(request.access);
    let common = &mut above.image.disk.common;
    common.discard = request.image.disk.common.discard;
    common.detect_zeroes = request.image.disk.common.detect_zeroes;
    open::open_bare_for_content(tool, &above)
}

/// Reads which part of the disk is meant, if not all of it.
fn part(parsed: &Parsed) -> CliResult<Option<Window>> {
    let bytes = |flag: &str| {
        let read = |text| {
            size::parse_offset(text).map_err(|_| {
                CliError::new(format!("Invalid {flag} '{text}'"))
                    .with_hint("it is a number of bytes, as 512, 64k or 1M")
            })
        };
        parsed.last(flag).map(read).transpose()
    };
    let (offset, size) = (bytes("offset")?, bytes("size")?);
    let is_part = offset.is_some() || size.is_some();
    Ok(is_part.then_some(Window { offset: offset.unwrap_or(0), size }))
}

/// Makes a disk of a part of another.
fn part_of(disk: DiskSpec, format: Option<Format>, part: Window) -> DiskSpec {
    if format == Some(Format::Raw) && disk.window == Window::default() {
        return DiskSpec { window: part, ..disk };
    }
    let common = disk.common.clone();
    let below = StorageSpec::Disk(Box::new(disk));
    DiskSpec { format: Some(Format::Raw), window: part, common, ..DiskSpec::on(below) }
}
