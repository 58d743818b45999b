//! A source that is read as far as it can be.
//!
//! * What cannot be read is told, sector by sector, and reads as zeros.
//! * Never: an error of the caller or of a lock taken for a lost sector.

use parking_lot::Mutex;

use crate::block::{AllocationDepth, Extent, ExtentStatus, KnownZeroes, Layer};
use crate::buffer::Buffer;
use crate::storage::Transfer;
use crate::units::{GuestOffset, GuestRange};
use crate::{Error, ErrorKind, Result};

/// The least that is lost at once.
const SECTOR_BYTES: u64 = 512;
/// What is read as data where the map cannot be read.
const UNKNOWN_BYTES: u64 = 64 << 10;

/// A disk whose unreadable sectors read as zeros.
///
/// ```
/// use lacuna::block::Layer;
/// use lacuna::job::{Lost, Salvage};
/// use lacuna::{raw::Raw, storage::MemoryStorage};
///
/// let disk = pollster::block_on(Raw::create(MemoryStorage::new(), 4096)).unwrap();
/// let mut lost = Vec::new();
/// let source = Salvage::new(&disk, |sector: Lost<'_>| lost.push(sector.range));
/// assert_eq!(source.size_bytes(), 4096);
/// ```
pub struct Salvage<'a, L, F> {
    below: &'a L,
    report: Mutex<F>,
}

/// Something that could not be read.
///
/// See [`Salvage`] for an example.
#[derive(Clone, Copy, Debug)]
pub struct Lost<'a> {
    /// What is not known.
    pub what: LostPart,
    /// Where.
    pub range: GuestRange,
    /// Why.
    pub error: &'a Error,
}

/// What of a range could not be read.
///
/// ```
/// assert_ne!(lacuna::job::LostPart::Content, lacuna::job::LostPart::Status);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LostPart {
    /// Its bytes: they read as zeros.
    Content,
    /// What the map says of it: it counts as data.
    Status,
}

impl<'a, L: Layer, F: FnMut(Lost<'_>) + Send> Salvage<'a, L, F> {
    /// Reads `below` as far as that goes; `report` is told what is lost, in the order of reading.
    pub const fn new(below: &'a L, report: F) -> Self {
        Self { below, report: Mutex::new(report) }
    }

    fn tell(&self, what: LostPart, range: GuestRange, error: &Error) {
        (self.report.lock())(Lost { what, range, error });
    }

    /// Fills the buffer in steps that get smaller where reading fails and larger where it does not.
    async fn read_in_steps(&self, offset: GuestOffset, buffer: &mut Buffer) -> Result<()> {
        let whole = buffer.len() as u64;
        let (mut done, mut step) = (0, whole.next_power_of_two());
        while done < whole {
            let range = GuestRange::new(offset + done, step.min(whole - done));
            let (result, part) =
                self.below.read(range.start, Buffer::new(range.len as usize)).await;
            let bytes = &mut buffer[done as usize..(done + range.len) as usize];
            match result {
                Ok(()) => bytes.copy_from_slice(&part),
                Err(error) if !is_loss(&error) => return Err(error),
                Err(_) if range.len > SECTOR_BYTES => {
                    step = (range.len.next_power_of_two() / 2).max(SECTOR_BYTES);
                    continue;
                }
                Err(error) => {
                    bytes.fill(0);
                    self.tell(LostPart::Content, range, &error);
                }
            }
            done += range.len;
            // Only where the next larger step starts, so that they stay aligned.
            step = if done.is_multiple_of(step * 2) { step * 2 } else { step };
        }
        Ok(())
    }
}

/// Says whether the bytes are lost, rather than the request wrong.
fn is_loss(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Io | ErrorKind::Corrupt | ErrorKind::Unsupported)
}

impl<L: Layer, F: FnMut(Lost<'_>) + Send> Layer for Salvage<'_, L, F> {
    fn size_bytes(&self) -> u64 {
        self.below.size_bytes()
    }

    fn zero_unit_bytes(&self) -> u64 {
        self.below.zero_unit_bytes()
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        self.below.known_zeroes().await
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        let (result, mut buffer) = self.below.read(offset, buffer).await;
        match result {
            Err(error) if is_loss(&error) => {
                (self.read_in_steps(offset, &mut buffer).await, buffer)
            }
            result => (result, buffer),
        }
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        match self.below.extents(range).await {
            Err(error) if is_loss(&error) => {
                let end = (range.start.0 / UNKNOWN_BYTES + 1) * UNKNOWN_BYTES;
                let len = range.len.min(end - range.start.0);
                let range = GuestRange::new(range.start, len);
                self.tell(LostPart::Status, range, &error);
                let (depth, reads_zero) = (AllocationDepth::TOP, false);
                let status =
                    ExtentStatus { depth, reads_zero, is_hole: false, ..ExtentStatus::UNALLOCATED };
                Ok(vec![Extent { range, status }])
            }
            answer => answer,
        }
    }
}

#[cfg(test)]
mod tests {
    use pollster::block_on;

    use super::*;
    use crate::block::WriteFlags;
    use crate::raw::Raw;
    use crate::storage::MemoryStorage;

    /// A disk of which some sectors cannot be read, nor the status of some.
    struct Broken {
        disk: Raw<MemoryStorage>,
        sectors: Vec<u64>,
        unknown: Option<u64>,
    }

    fn broken(error: ErrorKind) -> Error {
        Error::new(error, "As told")
    }

    impl Layer for Broken {
        fn size_bytes(&self) -> u64 {
            self.disk.size_bytes()
        }

        fn zero_unit_bytes(&self) -> u64 {
            self.disk.zero_unit_bytes()
        }

        async fn known_zeroes(&self) -> Result<KnownZeroes> {
            self.disk.known_zeroes().await
        }

        async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
            let range = GuestRange::new(offset, buffer.len() as u64);
            let hits =
                |sector: &u64| GuestRange::new(GuestOffset(sector * 512), 512).overlaps(&range);
            match self.sectors.iter().any(hits) {
                true => (Err(broken(ErrorKind::Io)), buffer),
                false => self.disk.read(offset, buffer).await,
            }
        }

        async fn flush(&self) -> Result<()> {
            Ok(())
        }

        async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
            match self.unknown {
                Some(at) if range.contains(GuestOffset(at)) && range.start.0 == at => {
                    Err(broken(ErrorKind::Corrupt))
                }
                Some(at) if range.contains(GuestOffset(at)) => {
                    self.disk.extents(GuestRange::new(range.start, at - range.start.0)).await
                }
                _ => self.disk.extents(range).await,
            }
        }
    }

    #[test]
    fn every_sector_that_can_be_read_is() {
        let size = 1 << 20;
        let disk = block_on(Raw::create(MemoryStorage::new(), size)).unwrap();
        let bytes: Vec<u8> = (0..size).map(|index| (index / 512 % 255) as u8 + 1).collect();
        let written = disk.write(GuestOffset(0), Buffer::from(&bytes[..]), WriteFlags::empty());
        block_on(written).0.unwrap();
        let sectors = vec![0, 7, 8, 9, 300, 301, 1000, 2047];
        let broken = Broken { disk, sectors: sectors.clone(), unknown: Some(128 << 10) };
        let mut lost = Vec::new();
        let source = Salvage::new(&broken, |it: Lost<'_>| lost.push((it.what, it.range.start.0)));
        for (start, len) in [(0, size), (512, size - 1024), (3584, 5 * 512)] {
            let read = source.read(GuestOffset(start), Buffer::new(len as usize));
            let (result, found) = block_on(read);
            result.unwrap();
            for (index, sector) in found.chunks(512).enumerate() {
                let number = start / 512 + index as u64;
                let expected = match sectors.contains(&number) {
                    true => 0,
                    false => (number % 255) as u8 + 1,
                };
                assert!(sector.iter().all(|byte| *byte == expected), "{number}");
            }
        }
        let mut at = GuestOffset(0);
        while at.0 < size {
            let rest = GuestRange::new(at, size - at.0);
            at = block_on(source.extents(rest)).unwrap().last().unwrap().range.end();
        }
        let content: Vec<u64> =
            lost.iter().filter(|it| it.0 == LostPart::Content).map(|it| it.1 / 512).collect();
        assert_eq!(content[..8], sectors);
        assert_eq!(content.len(), 8 + 6 + 3);
        let status: Vec<_> = lost.iter().filter(|it| it.0 == LostPart::Status).collect();
        assert_eq!(status, [&(LostPart::Status, 128 << 10)]);
    }
}
