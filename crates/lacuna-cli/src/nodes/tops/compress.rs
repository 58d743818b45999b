//! Every write is stored compressed.
//!
//! * A write that does not fill its units is filled up with what is there.
//! * One writer: two writes to one unit at once may lose one of them.

use lacuna::block::{DiscardMode, Extent, KnownZeroes, Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::job::Target;
use lacuna::qcow2::{Encoder, Stream};
use lacuna::storage::Transfer;
use lacuna::units::{GuestOffset, GuestRange};
use lacuna::{Error, ErrorKind, Result};

use crate::nodes::below::Below;

pub(in crate::nodes) struct Compress(pub(in crate::nodes) Below);

impl Compress {
    async fn write_units(&self, offset: GuestOffset, bytes: &[u8]) -> Result<()> {
        let unit_bytes = self.0.compressed_unit_bytes().unwrap_or(u64::MAX);
        let end = offset.0.checked_add(bytes.len() as u64);
        let end = end.filter(|end| *end <= self.size_bytes()).ok_or_else(|| {
            Error::new(ErrorKind::OutOfBounds, format!("A write at {offset} passes the end"))
        })?;
        let mut at = offset.0 / unit_bytes * unit_bytes;
        while at < end {
            let len = unit_bytes.min(self.size_bytes() - at);
            let (from, to) = (at.max(offset.0), (at + len).min(end));
            let part = &bytes[(from - offset.0) as usize..(to - offset.0) as usize];
            let mut unit = Buffer::new(len as usize);
            if (part.len() as u64) < len {
                let (result, old) = self.0.read(GuestOffset(at), unit).await;
                result?;
                unit = old;
            }
            unit[(from - at) as usize..(to - at) as usize].copy_from_slice(part);
            self.0.write_compressed(GuestOffset(at), unit).await.0?;
            at += len;
        }
        Ok(())
    }
}

impl Layer for Compress {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    fn is_read_only(&self) -> bool {
        self.0.is_read_only()
    }

    fn zero_unit_bytes(&self) -> u64 {
        self.0.zero_unit_bytes()
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        self.0.known_zeroes().await
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        self.0.read(offset, buffer).await
    }

    async fn write(&self, offset: GuestOffset, buffer: Buffer, flags: WriteFlags) -> Transfer {
        let mut result = self.write_units(offset, &buffer).await;
        if result.is_ok() && flags.contains(WriteFlags::FUA) {
            result = self.0.flush().await;
        }
        (result, buffer)
    }

    async fn write_zeroes(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        self.0.write_zeroes(range, flags).await
    }

    async fn discard(&self, range: GuestRange, mode: DiscardMode) -> Result<()> {
        self.0.discard(range, mode).await
    }

    async fn flush(&self) -> Result<()> {
        self.0.flush().await
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        self.0.extents(range).await
    }
}

impl Target for Compress {
    fn encoder(&self) -> Option<Encoder> {
        self.0.encoder()
    }

    async fn write_encoded(
        &self,
        offset: GuestOffset,
        buffer: Buffer,
        stream: Option<Stream>,
    ) -> Transfer {
        self.0.write_encoded(offset, buffer, stream).await
    }
}
