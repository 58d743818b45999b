//! A part of a storage as a storage of its own: raw's `offset` and `size`.
//!
//! * Never shows or changes a byte outside of the part.

use lacuna::buffer::{Buffer, Hold};
use lacuna::storage::{
    Capabilities, Capability, Event, HostExtent, HostStatus, Storage, Transfer, ZeroMode,
};
use lacuna::units::{HostOffset, HostRange};
use lacuna::{Error, ErrorKind, Result};

use super::any::AnyStorage;
use crate::verbs::spec::tree::Window as Asked;

/// The part.
pub(super) struct Window {
    below: AnyStorage,
    offset: u64,
    /// All that follows, also what is added later, without.
    size: Option<u64>,
}

impl Window {
    /// Refuses a part that is not all there.
    pub(super) async fn open(below: AnyStorage, asked: Asked) -> Result<Self> {
        let whole = below.len().await?;
        let Asked { offset, size } = asked;
        if offset > whole {
            return Err(Error::invalid(format!(
                "Offset ({offset}) cannot be greater than size of the containing file ({whole})"
            )));
        }
        match size {
            Some(size) if size > whole - offset => Err(Error::invalid(format!(
                "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  \
                 actual size of the containing file ({whole})"
            ))),
            Some(size) if size % 512 != 0 => {
                Err(Error::invalid("Specified size is not multiple of 512"))
            }
            size => Ok(Self { below, offset, size }),
        }
    }

    /// How many of `len` bytes from `start` on lie within.
    fn within(&self, start: HostOffset, len: u64) -> u64 {
        self.size.map_or(len, |size| len.min(size.saturating_sub(start.0)))
    }

    fn shifted(&self, start: HostOffset) -> Result<HostOffset> {
        let at = start.0.checked_add(self.offset).map(HostOffset);
        at.ok_or_else(|| Error::new(ErrorKind::OutOfBounds, format!("{start} is past all ends")))
    }

    /// A range that is changed must lie within.
    fn changed(&self, range: HostRange) -> Result<HostRange> {
        match self.within(range.start, range.len) == range.len {
            true => Ok(HostRange::new(self.shifted(range.start)?, range.len)),
            false => Err(Error::new(
                ErrorKind::NoSpace,
                format!("{} bytes at {} pass the end of the part", range.len, range.start),
            )),
        }
    }
}

impl Storage for Window {
    async fn read_at(&self, offset: HostOffset, mut buffer: Buffer) -> Transfer {
        let there = self.within(offset, buffer.len() as u64);
        let mut beyond = buffer.split_off(there as usize);
        beyond.fill(0);
        let (result, mut buffer) = match (there, self.shifted(offset)) {
            (0, _) => (Ok(()), buffer),
            (_, Ok(at)) => self.below.read_at(at, buffer).await,
            (_, Err(error)) => (Err(error), buffer),
        };
        buffer.unsplit(beyond);
        (result, buffer)
    }

    async fn write_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        match self.changed(HostRange::new(offset, buffer.len() as u64)) {
            Ok(range) => self.below.write_at(range.start, buffer).await,
            Err(error) => (Err(error), buffer),
        }
    }

    async fn write_durably_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        match self.changed(HostRange::new(offset, buffer.len() as u64)) {
            Ok(range) => self.below.write_durably_at(range.start, buffer).await,
            Err(error) => (Err(error), buffer),
        }
    }

    async fn write_zeroes_at(&self, range: HostRange, mode: ZeroMode, hold: Hold) -> Result<()> {
        self.below.write_zeroes_at(self.changed(range)?, mode, hold).await
    }

    async fn write_zeroes_durably_at(
        &self,
        range: HostRange,
        mode: ZeroMode,
        hold: Hold,
    ) -> Result<()> {
        self.below.write_zeroes_durably_at(self.changed(range)?, mode, hold).await
    }

    async fn punch_hole_at(&self, range: HostRange, hold: Hold) -> Result<()> {
        self.below.punch_hole_at(self.changed(range)?, hold).await
    }

    async fn discard_at(&self, range: HostRange, hold: Hold) -> Result<()> {
        self.below.discard_at(self.changed(range)?, hold).await
    }

    async fn extents_at(&self, range: HostRange) -> Result<Vec<HostExtent>> {
        match self.within(range.start, range.len) {
            0 => Ok(vec![HostExtent { len: range.len, status: HostStatus::Hole }]),
            len => self.below.extents_at(HostRange::new(self.shifted(range.start)?, len)).await,
        }
    }

    async fn allocate_at(&self, range: HostRange) -> Result<()> {
        self.below.allocate_at(self.changed(range)?).await
    }

    async fn flush(&self) -> Result<()> {
        self.below.flush().await
    }

    async fn len(&self) -> Result<u64> {
        match self.size {
            Some(size) => Ok(size),
            None => Ok(self.below.len().await?.saturating_sub(self.offset)),
        }
    }

    async fn set_len(&self, len: u64, hold: Hold) -> Result<()> {
        match self.size {
            Some(_) => Err(Error::unsupported("Cannot resize fixed-size raw disks")),
            None => self.below.set_len(self.shifted(HostOffset(len))?.0, hold).await,
        }
    }

    async fn status_at(&self, range: HostRange) -> Result<HostExtent> {
        match self.within(range.start, range.len) {
            0 => Ok(HostExtent { len: range.len, status: HostStatus::Hole }),
            len => self.below.status_at(HostRange::new(self.shifted(range.start)?, len)).await,
        }
    }

    async fn event(&self, event: Event) {
        self.below.event(event).await;
    }

    fn capabilities(&self) -> Capabilities {
        let below = self.below.capabilities();
        match self.size {
            Some(_) => Capabilities { set_len: Capability::Unsupported, ..below },
            None => below,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna::storage::MemoryStorage;
    use pollster::block_on;

    fn window(size: Option<u64>) -> Result<Window> {
        let below = AnyStorage::other(MemoryStorage::from(&[7; 2048][..]));
        block_on(Window::open(below, Asked { offset: 512, size }))
    }

    #[test]
    fn bytes_behind_the_part_read_as_zeros_and_are_not_written() {
        let window = window(Some(1024)).unwrap();
        let (result, bytes) = block_on(window.read_at(HostOffset(512), Buffer::new(1024)));
        assert!(result.is_ok() && bytes[..512] == [7; 512] && bytes[512..] == [0; 512]);
        let (result, _) = block_on(window.write_at(HostOffset(512), Buffer::zeroed(513)));
        assert_eq!(result.unwrap_err().kind(), ErrorKind::NoSpace);
        assert!(block_on(window.set_len(0, Hold::none())).is_err());
    }

    #[test]
    fn a_part_without_size_goes_to_the_end() {
        let window = window(None).unwrap();
        assert_eq!(block_on(window.len()).unwrap(), 1536);
        block_on(window.set_len(512, Hold::none())).unwrap();
        assert_eq!(block_on(window.len()).unwrap(), 512);
    }

    #[test]
    fn a_part_that_is_not_all_there_is_refused() {
        assert!(window(Some(2048)).is_err());
        assert!(window(Some(1000)).is_err());
        assert!(window(Some(1536)).is_ok());
    }
}
