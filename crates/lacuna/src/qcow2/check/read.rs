//! Reads of tables.

use crate::buffer::Buffer;
use crate::storage::Storage;
use crate::units::HostOffset;
use crate::{Error, Result};

/// Largest single read, in bytes.
const AT_ONCE: u64 = 1 << 20;

/// Reads `len` bytes; what lies past the end of the file is zeros.
pub(crate) async fn read_bytes<S: Storage>(
    storage: &S,
    at: HostOffset,
    len: usize,
) -> Result<Buffer> {
    if at.0 > i64::MAX as u64 - len as u64 {
        return Err(Error::corrupt(format!("No file has {len} bytes at {at}")));
    }
    let (result, buffer) = storage.read_at(at, Buffer::new(len)).await;
    result.map(|()| buffer)
}

/// Reads `count` big-endian words. The caller has bounded `count`.
pub(crate) async fn read_words<S: Storage>(
    storage: &S,
    at: HostOffset,
    count: u64,
) -> Result<Vec<u64>> {
    let mut words = Vec::new();
    let mut done = 0;
    while done < count {
        let part = (count - done).min(AT_ONCE / 8);
        let bytes =
            read_bytes(storage, HostOffset(at.0.saturating_add(done * 8)), part as usize * 8)
                .await?;
        words.extend(bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word)));
        done += part;
    }
    Ok(words)
}

/// Reads `len` bytes into ordinary memory, in parts. The caller has bounded `len`.
pub(crate) async fn read_vec<S: Storage>(storage: &S, at: HostOffset, len: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < len {
        let part = (len - bytes.len() as u64).min(AT_ONCE) as usize;
        bytes.extend_from_slice(
            &read_bytes(storage, HostOffset(at.0.saturating_add(bytes.len() as u64)), part).await?,
        );
    }
    Ok(bytes)
}
