//! Reading a segment that nobody vouches for.

use lacuna::buffer::Buffer;
use lacuna::job::compute;
use lacuna::storage::Storage;
use lacuna::units::{GuestRange, HostOffset};
use lacuna::{Error, Result};

use super::format::{Entry, Footer, HEADER_BYTES, Header, Index, Kind, TAIL_BYTES};
use crate::checksum::Checksum;

/// A segment whose index was read and checked.
pub(crate) struct Segment<S> {
    storage: S,
    pub(crate) header: Header,
    pub(crate) index: Index,
    pub(crate) file_bytes: u64,
    pub(crate) stored_bytes: u64,
}

impl<S: Storage> Segment<S> {
    /// Reads header, index and footer, at most 1 MiB.
    pub(crate) async fn open(storage: S) -> Result<Self> {
        let file_bytes = storage.len().await?;
        let short = || Error::corrupt(format!("A segment of {file_bytes} bytes is cut off"));
        let tail_at = file_bytes.checked_sub(TAIL_BYTES as u64).ok_or_else(short)?;
        let header = array::<HEADER_BYTES, _>(&storage, HostOffset(0)).await?;
        let tail = array::<TAIL_BYTES, _>(&storage, HostOffset(tail_at)).await?;
        let index_bytes = Footer::decode(&tail)?.index_bytes();
        let index_at = tail_at.checked_sub(index_bytes as u64).ok_or_else(short)?;
        let (read, bytes) = storage.read_at(HostOffset(index_at), Buffer::new(index_bytes)).await;
        read?;
        let index = Index::decode(&header, &bytes, &tail, HostOffset(index_at))?;
        let header = Header::decode(&header)?;
        let stored_bytes = index_at - HEADER_BYTES as u64;
        Ok(Self { storage, header, index, file_bytes, stored_bytes })
    }

    /// Returns the bytes of an entry's range, checked. Decompresses on the library's threads.
    pub(crate) async fn content(&self, entry: &Entry) -> Result<Buffer> {
        let (entry, len) = (*entry, entry.range.len as usize);
        if entry.kind == Kind::Zero {
            return Err(Error::invalid("Zeros are not stored"));
        }
        let stored = Buffer::new(entry.stored.len as usize);
        let (read, stored) = self.storage.read_at(entry.stored.start, stored).await;
        read?;
        compute(move || {
            if Checksum::of(&stored) != entry.checksum {
                return Err(
                    damaged(entry.range, "does not fit its checksum").at(entry.stored.start)
                );
            }
            match entry.kind {
                Kind::Zstd => restored(&stored, len, entry.range),
                Kind::Plain | Kind::Zero => Ok(stored),
            }
        })
        .await
    }
}

fn restored(stream: &[u8], len: usize, range: GuestRange) -> Result<Buffer> {
    let mut bytes = Buffer::new(len);
    let mut decompressor = zstd::bulk::Decompressor::new()
        .map_err(|error| Error::io(error, "Preparing to decompress"))?;
    match decompressor.decompress_to_buffer(stream, &mut bytes[..]) {
        Ok(found) if found == len => Ok(bytes),
        Ok(_) => Err(damaged(range, "is shorter than its entry says")),
        Err(error) => Err(damaged(range, &format!("cannot be decompressed: {error}"))),
    }
}

fn damaged(range: GuestRange, what: &str) -> Error {
    Error::corrupt(format!("What is stored of {} bytes at {} {what}", range.len, range.start))
}

/// Reads a few bytes; what lies past the end is zeros.
async fn array<const N: usize, S: Storage>(storage: &S, at: HostOffset) -> Result<[u8; N]> {
    let (read, buffer) = storage.read_at(at, Buffer::new(N)).await;
    read?;
    let mut bytes = [0; N];
    bytes.copy_from_slice(&buffer);
    Ok(bytes)
}
