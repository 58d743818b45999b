//! What a driver left, read by lacuna's own engine and check, and the header byte by byte.

use std::path::Path;

use lacuna::block::Layer;
use lacuna::buffer::Buffer;
use lacuna::chain::{self, Allow, ChainOptions, FileOpener, Format, Sharing};
use lacuna::qcow2::check::{CheckOptions, CheckReport, check};
use lacuna::qcow2::{Access, Image, SnapshotChoice};
use lacuna::storage::{FileOptions, FileStorage, Locking};
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;

use crate::model::{Difference, Model};

/// The most bytes that are read at once.
const PIECE_BYTES: u64 = 1 << 20;

/// An image that is read back.
pub(crate) struct ReadBack {
    disk: chain::Disk<FileStorage>,
}

impl ReadBack {
    pub(crate) fn open(path: &Path) -> Result<Self, String> {
        let options = ChainOptions {
            backing: Allow::Named,
            data_file: Allow::Named,
            sharing: Sharing::All,
            ..ChainOptions::new(Format::Qcow2, Access::ReadOnly)
        };
        let opened = block_on(chain::open(&FileOpener::default(), path, &options));
        Ok(Self { disk: opened.map_err(|error| error.to_string())?.into_disk() })
    }

    /// Compares the whole disk.
    pub(crate) fn compare(&self, model: &Model) -> Result<Option<Difference>, String> {
        let size = self.disk.size_bytes();
        if size != model.size() {
            return Err(format!("the disk has {size} bytes instead of {}", model.size()));
        }
        compare(&self.disk, model, 0..size)
    }

    /// Compares a part of the disk.
    pub(crate) fn compare_part(
        &self,
        model: &Model,
        at: u64,
        len: u64,
    ) -> Result<Option<Difference>, String> {
        compare(&self.disk, model, at..(at + len).min(model.size()))
    }

    /// Compares a snapshot.
    pub(crate) fn compare_snapshot(
        &self,
        name: &str,
        model: &Model,
    ) -> Result<Option<Difference>, String> {
        let choice = SnapshotChoice::Name(name.into());
        let snapshot = block_on(self.disk.snapshot(&choice)).map_err(|error| error.to_string())?;
        compare(&snapshot, model, 0..model.size())
    }

    /// Says whether a bitmap that is believed misses a change.
    pub(crate) fn bitmap_misses(&self, at: u64) -> Result<bool, String> {
        let image = self.image()?;
        block_on(async {
            let facts = image.bitmaps().await?;
            let Some(first) = facts.iter().find(|it| !it.is_in_use && it.problem.is_none()) else {
                return Ok(false);
            };
            let bitmap = image.bitmap(&first.name).await?;
            let found = bitmap.extents(GuestRange::new(GuestOffset(at), 512), 1).await?;
            Ok(found.iter().any(|extent| !extent.is_dirty))
        })
        .map_err(|error: lacuna::Error| error.to_string())
    }

    fn image(&self) -> Result<&Image<FileStorage>, String> {
        self.disk.as_qcow2().ok_or_else(|| "the image is none of qcow2".to_owned())
    }
}

fn compare(
    layer: &impl Layer,
    model: &Model,
    range: std::ops::Range<u64>,
) -> Result<Option<Difference>, String> {
    let mut at = range.start;
    while at < range.end {
        let len = PIECE_BYTES.min(range.end - at);
        let (result, bytes) = block_on(layer.read(GuestOffset(at), Buffer::new(len as usize)));
        result.map_err(|error| format!("reading at {at}: {error}"))?;
        if let Some(difference) = model.difference(at, &bytes) {
            return Ok(Some(difference));
        }
        at += len;
    }
    Ok(None)
}

/// Checks an image, changing nothing.
pub(crate) fn checked(path: &Path) -> Result<CheckReport, String> {
    let options = FileOptions { locking: Locking::Off, ..FileOptions::read_only() };
    let report = FileStorage::open(path, &options)
        .and_then(|file| block_on(check(&file, &CheckOptions::default(), &mut |_| {})));
    report.map_err(|error| error.to_string())
}

/// The header as it is in the file.
pub(crate) struct Header(Vec<u8>);

impl Header {
    pub(crate) fn read(path: &Path) -> std::io::Result<Self> {
        use std::io::Read;
        let mut bytes = Vec::new();
        std::fs::File::open(path)?.take(1 << 16).read_to_end(&mut bytes)?;
        Ok(Self(bytes))
    }

    fn number(&self, at: usize, len: usize) -> u64 {
        let bytes = self.0.get(at..at + len).unwrap_or_default();
        bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    fn word(&self, at: usize) -> u64 {
        if self.number(4, 4) >= 3 { self.number(at, 8) } else { 0 }
    }

    pub(crate) fn incompatible(&self) -> u64 {
        self.word(72)
    }

    pub(crate) fn compatible(&self) -> u64 {
        self.word(80)
    }

    pub(crate) fn autoclear(&self) -> u64 {
        self.word(88)
    }

    /// Returns the bytes of an extension.
    pub(crate) fn extension(&self, magic: u32) -> Option<&[u8]> {
        let mut at = if self.number(4, 4) >= 3 { self.number(100, 4) as usize } else { 72 };
        while at + 8 <= self.0.len() {
            let (found, len) = (self.number(at, 4), self.number(at + 4, 4) as usize);
            match found {
                0 => return None,
                _ if found == u64::from(magic) => return self.0.get(at + 8..at + 8 + len),
                _ => at += 8 + len.next_multiple_of(8),
            }
        }
        None
    }
}
