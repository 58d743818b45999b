//! The guest bytes of a disk as a storage: what a format that stands on a format sees.

use lacuna::block::{Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::{Buffer, Hold};
use lacuna::chain::Disk;
use lacuna::qcow2::Shrink;
use lacuna::storage::{
    Capabilities, Capability, HostExtent, HostStatus, Storage, Transfer, ZeroMode,
};
use lacuna::units::{GuestOffset, GuestRange, HostOffset, HostRange};
use lacuna::{Error, ErrorKind, Result};

use super::any::AnyStorage;

/// A disk below a format. One of qcow2 grows with what is written to it.
pub(super) struct Nested(pub(super) Disk<AnyStorage>);

impl Nested {
    fn within(&self, range: HostRange) -> GuestRange {
        let start = range.start.0.min(self.0.size_bytes());
        let len = range.len.min(self.0.size_bytes() - start);
        GuestRange::new(GuestOffset(start), len)
    }

    /// A range that is changed must lie within; a disk of qcow2 grows for that.
    async fn changed(&self, range: HostRange) -> Result<GuestRange> {
        if self.within(range).len < range.len {
            self.grow(range).await?;
        }
        Ok(GuestRange::new(GuestOffset(range.start.0), range.len))
    }

    async fn grow(&self, range: HostRange) -> Result<()> {
        let end =
            range.start.0.checked_add(range.len).and_then(|end| end.checked_next_multiple_of(512));
        match (self.0.as_qcow2(), end) {
            (Some(image), Some(end)) => image.resize(end, Shrink::Refuse).await,
            _ => Err(Error::new(
                ErrorKind::NoSpace,
                format!("{} bytes at {} pass the end of the disk below", range.len, range.start),
            )),
        }
    }
}

impl Storage for Nested {
    async fn read_at(&self, offset: HostOffset, mut buffer: Buffer) -> Transfer {
        let range = self.within(HostRange::new(offset, buffer.len() as u64));
        let mut beyond = buffer.split_off(range.len as usize);
        beyond.fill(0);
        let (result, mut buffer) = match range.len {
            0 => (Ok(()), buffer),
            _ => self.0.read(range.start, buffer).await,
        };
        buffer.unsplit(beyond);
        (result, buffer)
    }

    async fn write_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        match self.changed(HostRange::new(offset, buffer.len() as u64)).await {
            Ok(range) => self.0.write(range.start, buffer, WriteFlags::empty()).await,
            Err(error) => (Err(error), buffer),
        }
    }

    async fn write_zeroes_at(&self, range: HostRange, mode: ZeroMode, hold: Hold) -> Result<()> {
        let flags = match mode {
            ZeroMode::Allocate => ZeroFlags::empty(),
            ZeroMode::MayUnmap => ZeroFlags::MAY_UNMAP,
        };
        let result = self.0.write_zeroes(self.changed(range).await?, flags).await;
        drop(hold);
        result
    }

    async fn punch_hole_at(&self, range: HostRange, hold: Hold) -> Result<()> {
        let flags = ZeroFlags::MAY_UNMAP;
        let result = self.0.write_zeroes(self.changed(range).await?, flags).await;
        drop(hold);
        result
    }

    async fn allocate_at(&self, range: HostRange) -> Result<()> {
        self.changed(range).await?;
        Err(Error::unsupported("Space cannot be reserved in a disk below a format"))
    }

    async fn flush(&self) -> Result<()> {
        self.0.flush().await
    }

    async fn len(&self) -> Result<u64> {
        Ok(self.0.size_bytes())
    }

    async fn set_len(&self, len: u64, hold: Hold) -> Result<()> {
        let result = match (len == self.0.size_bytes(), self.0.as_qcow2()) {
            (true, _) => Ok(()),
            (false, Some(image)) => image.resize(len.next_multiple_of(512), Shrink::Allow).await,
            (false, None) => Err(Error::unsupported("A disk below a format keeps its length")),
        };
        drop(hold);
        result
    }

    async fn status_at(&self, range: HostRange) -> Result<HostExtent> {
        let within = self.within(range);
        if within.is_empty() {
            return Ok(HostExtent { len: range.len, status: HostStatus::Hole });
        }
        let extents = self.0.extents(within).await?;
        let first = extents.first().ok_or_else(|| Error::corrupt("A disk without extents"))?;
        let status = match (first.status.reads_zero, first.status.is_hole) {
            (false, false) => HostStatus::Data,
            (false, true) => HostStatus::Vacant,
            (true, true) => HostStatus::Hole,
            (true, false) => HostStatus::Unwritten,
        };
        Ok(HostExtent { len: first.range.len, status })
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            write_zeroes: Capability::Native,
            punch_hole: Capability::Native,
            set_len: match self.0.as_qcow2() {
                Some(_) => Capability::Emulated,
                None => Capability::Unsupported,
            },
            writable: !self.0.is_read_only(),
            preferred_alignment_bytes: 1,
        }
    }
}
