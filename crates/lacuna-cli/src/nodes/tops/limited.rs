//! Requests are cut into pieces no larger than the limits of a test driver, and fail by its rules.
//!
//! * Pieces go down one after the other; the first that fails ends the request.

use std::sync::Arc;

use lacuna::Result;
use lacuna::block::{DiscardMode, Extent, KnownZeroes, Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::job::Target;
use lacuna::qcow2::{Encoder, Stream};
use lacuna::storage::Transfer;
use lacuna::units::{GuestOffset, GuestRange};

use crate::nodes::below::Below;
use crate::nodes::debug::Rules;
use crate::verbs::spec::debug::Limits;

pub(in crate::nodes) struct Limited {
    pub(in crate::nodes) below: Below,
    pub(in crate::nodes) limits: Limits,
    pub(in crate::nodes) rules: Arc<Rules>,
}

/// The most zeros that are written at once.
const ZERO_BYTES: u64 = 1 << 20;

impl Limited {
    async fn write_zero_bytes(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        let mut write = WriteFlags::empty();
        write.set(WriteFlags::FUA, flags.contains(ZeroFlags::FUA));
        let mut at = range.start;
        while at < range.end() {
            let len = (range.end() - at).min(ZERO_BYTES);
            self.below.write(at, Buffer::zeroed(len as usize), write).await.0?;
            at = at + len;
        }
        Ok(())
    }
}

/// Joins a part that is done with the part behind it.
fn join(done: Option<Buffer>, next: Buffer) -> Buffer {
    match done {
        Some(mut done) => {
            done.unsplit(next);
            done
        }
        None => next,
    }
}

impl Layer for Limited {
    fn size_bytes(&self) -> u64 {
        self.below.size_bytes()
    }

    fn is_read_only(&self) -> bool {
        self.below.is_read_only()
    }

    fn zero_unit_bytes(&self) -> u64 {
        self.below.zero_unit_bytes()
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        self.below.known_zeroes().await
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        let (mut done, mut rest, mut result) = (None, buffer, Ok(()));
        for (start, len) in self.limits.transfers(offset.0, rest.len() as u64) {
            let behind = rest.split_off(len as usize);
            result = result.and_then(|()| self.rules.check("read", start, len));
            let part = if result.is_ok() {
                let (read, part) = self.below.read(GuestOffset(start), rest).await;
                result = read;
                part
            } else {
                rest
            };
            done = Some(join(done, part));
            rest = behind;
        }
        (result, join(done, rest))
    }

    async fn write(&self, offset: GuestOffset, buffer: Buffer, flags: WriteFlags) -> Transfer {
        let (mut done, mut rest, mut result) = (None, buffer, Ok(()));
        for (start, len) in self.limits.transfers(offset.0, rest.len() as u64) {
            let behind = rest.split_off(len as usize);
            result = result.and_then(|()| self.rules.check("write", start, len));
            let part = if result.is_ok() {
                let (written, part) = self.below.write(GuestOffset(start), rest, flags).await;
                result = written;
                part
            } else {
                rest
            };
            done = Some(join(done, part));
            rest = behind;
        }
        (result, join(done, rest))
    }

    async fn write_zeroes(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        for (start, len, is_large) in self.limits.zeroes(range.start.0, range.len) {
            self.rules.check("write-zeroes", start, len)?;
            let piece = GuestRange::new(GuestOffset(start), len);
            match is_large || flags.contains(ZeroFlags::FAST) {
                true => self.below.write_zeroes(piece, flags).await?,
                false => self.write_zero_bytes(piece, flags).await?,
            }
        }
        Ok(())
    }

    async fn discard(&self, range: GuestRange, mode: DiscardMode) -> Result<()> {
        for (start, len) in self.limits.discards(range.start.0, range.len) {
            self.rules.check("discard", start, len)?;
            self.below.discard(GuestRange::new(GuestOffset(start), len), mode).await?;
        }
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.rules.check("flush", 0, 0)?;
        self.below.flush().await
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        self.rules.check("block-status", range.start.0, range.len)?;
        self.below.extents(range).await
    }
}

impl Target for Limited {
    fn encoder(&self) -> Option<Encoder> {
        self.below.encoder()
    }

    async fn write_encoded(
        &self,
        offset: GuestOffset,
        buffer: Buffer,
        stream: Option<Stream>,
    ) -> Transfer {
        self.below.write_encoded(offset, buffer, stream).await
    }
}
