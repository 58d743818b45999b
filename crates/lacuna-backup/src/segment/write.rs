//! Writing a segment, frame by frame.

use lacuna::block::is_zero;
use lacuna::buffer::Buffer;
use lacuna::storage::Storage;
use lacuna::units::{GuestOffset, GuestRange, HostOffset, HostRange};
use lacuna::{Error, Result};

use super::format::{Entry, HEADER_BYTES, Header, Index, Kind};
use super::{MAX_ENTRIES, MAX_FRAME_BYTES};
use crate::checksum::Checksum;
use crate::point::SegmentFacts;

/// A range of the disk in the form in which it is stored.
pub(crate) struct Frame {
    range: GuestRange,
    kind: Kind,
    stored: Buffer,
    checksum: Checksum,
}

impl Frame {
    /// Compresses and checks what lies at `start`, at most [`MAX_FRAME_BYTES`].
    pub(crate) fn pack(start: GuestOffset, bytes: Buffer, level: i32) -> Result<Self> {
        let range = GuestRange::new(start, bytes.len() as u64);
        assert!((1..=MAX_FRAME_BYTES).contains(&range.len), "a frame has bytes, and not many");
        if is_zero(&bytes) {
            return Ok(Self::zeros(range));
        }
        let (kind, stored) = match compressed(&bytes, level)? {
            Some(stream) => (Kind::Zstd, stream),
            None => (Kind::Plain, bytes),
        };
        let checksum = Checksum::of(&stored);
        Ok(Self { range, kind, stored, checksum })
    }

    /// Describes zeros.
    pub(crate) fn zeros(range: GuestRange) -> Self {
        let (stored, checksum) = (Buffer::new(0), Checksum::NONE);
        Self { range, kind: Kind::Zero, stored, checksum }
    }

    /// Says whether it is nothing but zeros.
    pub(crate) fn is_zero(&self) -> bool {
        self.kind == Kind::Zero
    }

    /// Returns which part of the disk it holds.
    pub(crate) const fn range(&self) -> GuestRange {
        self.range
    }
}

/// Returns the bytes as a zstd frame with a checksum of its own, where that is shorter.
fn compressed(bytes: &[u8], level: i32) -> Result<Option<Buffer>> {
    let failed = |error| Error::io(error, "Compressing with zstd");
    let mut compressor = zstd::bulk::Compressor::new(level).map_err(failed)?;
    compressor.include_checksum(true).map_err(failed)?;
    let mut stream = Buffer::new(bytes.len() - 1);
    // What does not fit is no shorter.
    Ok(compressor.compress_to_buffer(bytes, &mut stream[..]).ok().map(|len| {
        stream.truncate(len);
        stream
    }))
}

/// A segment that is being written.
pub(crate) struct SegmentWriter<S> {
    storage: S,
    header: [u8; HEADER_BYTES],
    from: GuestOffset,
    end: HostOffset,
    entries: Vec<Entry>,
}

impl<S: Storage> SegmentWriter<S> {
    /// Begins a segment that tells of the disk from `from` on, in an empty storage.
    pub(crate) async fn begin(storage: S, begun: Checksum, from: GuestOffset) -> Result<Self> {
        let header = Header { begun }.encode();
        storage.write_at(HostOffset(0), Buffer::from(&header[..])).await.0?;
        let end = HostOffset(HEADER_BYTES as u64);
        Ok(Self { storage, header, from, end, entries: Vec::new() })
    }

    /// Adds what lies behind all that is there.
    pub(crate) async fn add(&mut self, frame: Frame) -> Result<()> {
        if let (true, Some(last)) = (frame.is_zero(), self.entries.last_mut())
            && last.kind == Kind::Zero
            && last.range.end() == frame.range.start
        {
            last.range.len += frame.range.len;
            return Ok(());
        }
        let Frame { range, kind, stored, checksum } = frame;
        let place = HostRange::new(self.end, stored.len() as u64);
        if !stored.is_empty() {
            self.storage.write_at(self.end, stored).await.0?;
        }
        self.entries.push(match kind {
            Kind::Zero => Entry::zeros(range, self.end),
            _ => Entry { range, kind, stored: place, checksum },
        });
        self.end = place.end();
        Ok(())
    }

    /// Says whether it is time for the next one, as this holds `most_bytes`.
    pub(crate) fn is_full(&self, most_bytes: u64) -> bool {
        self.entries.len() >= MAX_ENTRIES || self.end.0 >= most_bytes
    }

    /// Ends the segment, which tells of the disk up to `to`, and makes it durable.
    pub(crate) async fn finish(self, to: GuestOffset) -> Result<SegmentFacts> {
        let covers = GuestRange::new(self.from, to - self.from);
        let (tail, checksum) = Index::encode(covers, &self.entries, &self.header);
        self.storage.write_at(self.end, Buffer::from(&tail[..])).await.0?;
        self.storage.flush().await?;
        let bytes = self.end.0 + tail.len() as u64;
        Ok(SegmentFacts { start: self.from.0, end: to.0, bytes, checksum })
    }
}
