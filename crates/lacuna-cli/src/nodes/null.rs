//! A storage without content: it reads as zeros, and what is written to it is forgotten.

use lacuna::buffer::{Buffer, Hold};
use lacuna::storage::{
    Capabilities, Capability, HostExtent, HostStatus, Storage, Transfer, ZeroMode,
};
use lacuna::units::{HostOffset, HostRange};
use lacuna::{Error, Result};

/// So many bytes of nothing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Null {
    pub(super) len: u64,
}

impl Storage for Null {
    async fn read_at(&self, _: HostOffset, mut buffer: Buffer) -> Transfer {
        buffer.fill(0);
        (Ok(()), buffer)
    }

    async fn write_at(&self, _: HostOffset, buffer: Buffer) -> Transfer {
        (Ok(()), buffer)
    }

    async fn write_zeroes_at(&self, _: HostRange, _: ZeroMode, _: Hold) -> Result<()> {
        Ok(())
    }

    async fn punch_hole_at(&self, _: HostRange, _: Hold) -> Result<()> {
        Ok(())
    }

    async fn allocate_at(&self, _: HostRange) -> Result<()> {
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn len(&self) -> Result<u64> {
        Ok(self.len)
    }

    async fn set_len(&self, _: u64, _: Hold) -> Result<()> {
        Err(Error::unsupported("Image format driver does not support resize"))
    }

    async fn status_at(&self, range: HostRange) -> Result<HostExtent> {
        Ok(HostExtent { len: range.len, status: HostStatus::Hole })
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            write_zeroes: Capability::Native,
            punch_hole: Capability::Native,
            set_len: Capability::Unsupported,
            writable: true,
            preferred_alignment_bytes: 1,
        }
    }
}
