//! The same disks without a runtime: each call blocks its thread until the work is done.
//!
//! * Adds no thread and no lock: many threads may use one disk at once.
//! * Never call it from inside an async runtime's worker: that worker would stand still.

use crate::Result;
use crate::block::{DiscardMode, Extent, Layer, WriteFlags, ZeroFlags};
use crate::buffer::Buffer;
use crate::units::{GuestOffset, GuestRange};

/// Requests are passed on in parts of this size, which bounds the memory of a call.
const PART_BYTES: usize = 2 << 20;

/// A disk whose calls block.
///
/// ```
/// use lacuna::blocking::Disk;
/// use lacuna::{raw::Raw, storage::MemoryStorage, units::GuestOffset};
///
/// let disk = Disk::new(pollster::block_on(Raw::create(MemoryStorage::new(), 1 << 20))?);
/// disk.write_at(GuestOffset(512), b"lacuna")?;
/// disk.flush()?;
///
/// let mut bytes = [0; 8];
/// disk.read_at(GuestOffset(512), &mut bytes)?;
/// assert_eq!(&bytes, b"lacuna\0\0");
/// # Ok::<_, lacuna::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Disk<L>(L);

impl<L: Layer> Disk<L> {
    /// Makes the calls of `layer` block.
    pub const fn new(layer: L) -> Self {
        Self(layer)
    }

    /// Returns the disk below.
    pub const fn layer(&self) -> &L {
        &self.0
    }

    /// Gives the disk below back.
    pub fn into_layer(self) -> L {
        self.0
    }

    /// Returns the size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    /// Fills `bytes` from `offset` on.
    ///
    /// # Errors
    /// `OutOfBounds` past the end of the disk, else what reading gives; parts of `bytes` may be
    /// filled then.
    pub fn read_at(&self, offset: GuestOffset, bytes: &mut [u8]) -> Result<()> {
        let mut at = offset;
        for part in bytes.chunks_mut(PART_BYTES) {
            let (result, buffer) = pollster::block_on(self.0.read(at, Buffer::new(part.len())));
            result?;
            part.copy_from_slice(&buffer);
            at = at + part.len() as u64;
        }
        Ok(())
    }

    /// Writes `bytes` at `offset`; durable after the next [`flush`](Self::flush).
    ///
    /// # Errors
    /// `OutOfBounds`, `ReadOnly`, else what writing gives; a part may have been written then.
    pub fn write_at(&self, offset: GuestOffset, bytes: &[u8]) -> Result<()> {
        let mut at = offset;
        for part in bytes.chunks(PART_BYTES) {
            let write = self.0.write(at, Buffer::from(part), WriteFlags::empty());
            pollster::block_on(write).0?;
            at = at + part.len() as u64;
        }
        Ok(())
    }

    /// Makes `range` read as zeros.
    ///
    /// # Errors
    /// As [`Layer::write_zeroes`].
    ///
    /// ```
    /// # use lacuna::{blocking::Disk, raw::Raw, storage::MemoryStorage};
    /// use lacuna::{block::ZeroFlags, units::{GuestOffset, GuestRange}};
    /// # let disk = Disk::new(pollster::block_on(Raw::create(MemoryStorage::new(), 1 << 20))?);
    /// disk.write_zeroes(GuestRange::new(GuestOffset(0), 4096), ZeroFlags::MAY_UNMAP)?;
    /// # Ok::<_, lacuna::Error>(())
    /// ```
    pub fn write_zeroes(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        pollster::block_on(self.0.write_zeroes(range, flags))
    }

    /// Takes note that the content of `range` is no longer needed.
    ///
    /// # Errors
    /// As [`Layer::discard`].
    pub fn discard(&self, range: GuestRange) -> Result<()> {
        pollster::block_on(self.0.discard(range, DiscardMode::Guest))
    }

    /// Makes everything durable that was written before.
    ///
    /// # Errors
    /// As [`Layer::flush`].
    pub fn flush(&self) -> Result<()> {
        pollster::block_on(self.0.flush())
    }

    /// Goes through the extents of `range` in guest order, asking for more as it goes. Ends after
    /// the first error.
    ///
    /// ```
    /// # use lacuna::{blocking::Disk, block::Layer, raw::Raw, storage::MemoryStorage};
    /// # let disk = Disk::new(pollster::block_on(Raw::create(MemoryStorage::new(), 1 << 20))?);
    /// for extent in disk.extents(disk.layer().whole()) {
    ///     assert!(extent?.status.reads_zero);
    /// }
    /// # Ok::<_, lacuna::Error>(())
    /// ```
    pub fn extents(&self, range: GuestRange) -> impl Iterator<Item = Result<Extent>> + '_ {
        let mut rest = Some(range).filter(|range| !range.is_empty());
        let mut known = Vec::new().into_iter();
        std::iter::from_fn(move || {
            loop {
                if let Some(extent) = known.next() {
                    return Some(Ok(extent));
                }
                match pollster::block_on(self.0.extents(rest?)) {
                    Ok(extents) => {
                        rest = behind(rest?, &extents);
                        known = extents.into_iter();
                    }
                    Err(error) => {
                        rest = None;
                        return Some(Err(error));
                    }
                }
            }
        })
    }
}

/// What of `range` lies behind the extents; nothing where they reach its end or there are none.
fn behind(range: GuestRange, extents: &[Extent]) -> Option<GuestRange> {
    let start = extents.last()?.range.end();
    let left = range.end().0.checked_sub(start.0)?;
    Some(GuestRange::new(start, left)).filter(|rest| !rest.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raw::Raw;
    use crate::storage::MemoryStorage;

    #[test]
    fn requests_larger_than_a_part_arrive_whole() {
        let size = 3 * PART_BYTES + 1000;
        let raw = pollster::block_on(Raw::create(MemoryStorage::new(), 8 << 20)).unwrap();
        let disk = Disk::new(raw);
        let bytes: Vec<u8> = (0..size).map(|index| (index / 1000) as u8).collect();
        disk.write_at(GuestOffset(77), &bytes).unwrap();
        let mut read = vec![0; size];
        disk.read_at(GuestOffset(77), &mut read).unwrap();
        assert!(read == bytes);
    }

    #[test]
    fn extents_cover_the_range_across_answers() {
        let raw = pollster::block_on(Raw::create(MemoryStorage::new(), 1 << 30)).unwrap();
        let disk = Disk::new(raw);
        for index in 0..3000 {
            disk.write_at(GuestOffset(index * 8192), &[1]).unwrap();
        }
        let mut end = GuestOffset(0);
        for extent in disk.extents(disk.layer().whole()) {
            let extent = extent.unwrap();
            assert_eq!(extent.range.start, end);
            end = extent.range.end();
        }
        assert_eq!(end.0, 1 << 30);
    }
}
