//! Several disks, one behind the other, as one to read from.

use lacuna::block::{Extent, KnownZeroes, Layer};
use lacuna::buffer::Buffer;
use lacuna::storage::Transfer;
use lacuna::units::{GuestOffset, GuestRange};
use lacuna::{Error, ErrorKind, Result};

use crate::nodes::ToolDisk;

/// Disks in a row.
pub(super) struct Concat {
    /// Where each begins, and the disk.
    parts: Vec<(u64, ToolDisk)>,
    size_bytes: u64,
}

impl Concat {
    /// Puts the disks behind each other; nothing where the sum is no size any more.
    pub(super) fn new(disks: impl Iterator<Item = ToolDisk>) -> Option<Self> {
        let mut parts = Vec::new();
        let mut size_bytes = 0u64;
        for disk in disks {
            let start = size_bytes;
            size_bytes = size_bytes.checked_add(disk.size_bytes())?;
            parts.push((start, disk));
        }
        Some(Self { parts, size_bytes })
    }

    /// Finds the disk that holds `offset`, where it begins and how many bytes it has from there.
    fn part(&self, offset: u64) -> Result<(u64, &ToolDisk, u64)> {
        let found = self.parts.iter().rev().find(|(start, _)| *start <= offset);
        match found {
            Some((start, disk)) if offset - start < disk.size_bytes() => {
                Ok((*start, disk, disk.size_bytes() - (offset - start)))
            }
            _ => Err(Error::new(
                ErrorKind::OutOfBounds,
                format!("Offset {offset} lies past the {} bytes of the sources", self.size_bytes),
            )),
        }
    }
}

impl Layer for Concat {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn zero_unit_bytes(&self) -> u64 {
        512
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        Ok(KnownZeroes::NOTHING)
    }

    async fn read(&self, offset: GuestOffset, mut buffer: Buffer) -> Transfer {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset.0 + done as u64;
            let (start, disk, room) = match self.part(at) {
                Ok(part) => part,
                Err(error) => return (Err(error), buffer),
            };
            let mut middle = buffer.split_off(done);
            let tail =
                middle.split_off(middle.len().min(usize::try_from(room).unwrap_or(usize::MAX)));
            let len = middle.len();
            let (result, middle) = disk.read(GuestOffset(at - start), middle).await;
            buffer.unsplit(middle);
            buffer.unsplit(tail);
            if result.is_err() {
                return (result, buffer);
            }
            done += len;
        }
        (Ok(()), buffer)
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        let (start, disk, room) = self.part(range.start.0)?;
        let inner = GuestRange::new(GuestOffset(range.start.0 - start), range.len.min(room));
        let mut extents = disk.extents(inner).await?;
        for extent in &mut extents {
            extent.range.start = extent.range.start + start;
        }
        Ok(extents)
    }
}
