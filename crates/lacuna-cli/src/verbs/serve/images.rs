//! What each image becomes: its chain, a snapshot of it, an overlay on it, or a part of it.
//!
//! * Never changed: an image below a temporary overlay; it may be read-only, and in use by others
//!   who read.

use lacuna::qcow2::Access;

use super::asked::{self, Named};
use super::bitmaps::{Bitmaps, Wish};
use super::disk::ChainDisk;
use super::{open, snapshot};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::format::Format;
use crate::nodes::FileChain;
use crate::persona::Tool;
use crate::size;
use crate::verbs::overlay;
use crate::verbs::spec::tree::{DiskSpec, StorageSpec, Window};

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

/// Opens all images, in order.
pub(super) fn open_all(
    tool: &Tool,
    images: &[Named],
    parsed: &Parsed,
) -> CliResult<Vec<ChainDisk>> {
    check(parsed)?;
    let wish = Wish::of(parsed);
    let opened = |named: &Named| {
        let chain = chain(tool, named, parsed)?;
        let bitmaps = Bitmaps::of(&chain, &wish)?;
        Ok(ChainDisk::new(chain, bitmaps))
    };
    let disks = images.iter().map(opened).collect::<CliResult<Vec<_>>>()?;
    wish.check(disks.iter().map(ChainDisk::own_bitmaps))?;
    Ok(disks)
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

fn chain(tool: &Tool, named: &Named, parsed: &Parsed) -> CliResult<FileChain> {
    let mut request = asked::request(named, parsed)?;
    if let Some(part) = part(parsed)? {
        let format = request.image.format()?;
        request.image.disk = part_of(request.image.disk, format, part);
    }
    let choice = parsed.last("load-snapshot").map(|text| snapshot::choice(tool, text));
    if choice.is_some() {
        request.access = Access::ReadOnly;
    }
    let chain = match parsed.has("snapshot") {
        true => {
            let overlay = overlay::make(tool, &request)
                .map_err(|error| open::cannot_open(&request.image.shown, error))?;
            let mut above = overlay.request(request.access);
            let common = &mut above.image.disk.common;
            common.discard = request.image.disk.common.discard;
            common.detect_zeroes = request.image.disk.common.detect_zeroes;
            open::open_for_content(tool, &above)?
        }
        false => open::open_for_content(tool, &request)?,
    };
    match choice.transpose()? {
        Some(choice) => snapshot::at(tool, chain, &choice),
        None => {
            open::warn_of_guess(&request, &chain);
            Ok(chain)
        }
    }
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
