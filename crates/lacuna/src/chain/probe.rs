//! Tells the format from the content, where the caller allows that (D.1-40).

use super::policy::Format;
use crate::Result;
use crate::buffer::Buffer;
use crate::storage::Storage;
use crate::units::HostOffset;

/// What a qcow2 image starts with.
pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Returns what the content looks like: qcow2 by its magic, else raw.
///
/// Whoever wrote the content chooses the answer, so never probe what a guest can write to.
///
/// # Errors
/// What reading gives.
///
/// ```
/// use lacuna::chain::{Format, probe};
/// use lacuna::storage::MemoryStorage;
/// let storage = MemoryStorage::from(&b"QFI\xfb\0\0\0\x03"[..]);
/// assert_eq!(pollster::block_on(probe(&storage))?, Format::Qcow2);
/// # Ok::<_, lacuna::Error>(())
/// ```
pub async fn probe<S: Storage>(storage: &S) -> Result<Format> {
    // A whole sector, so that O_DIRECT needs no copy.
    let (result, start) = storage.read_at(HostOffset(0), Buffer::new(512)).await;
    result?;
    Ok(if start.starts_with(&MAGIC) { Format::Qcow2 } else { Format::Raw })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    #[test]
    fn only_the_magic_at_the_start_makes_qcow2() {
        let table: [(&[u8], Format); 5] = [
            (b"", Format::Raw),
            (b"QFI", Format::Raw),
            (b"QFI\xfb", Format::Qcow2),
            (b"\0QFI\xfb", Format::Raw),
            (b"KDMV", Format::Raw),
        ];
        for (bytes, format) in table {
            let storage = MemoryStorage::from(bytes);
            assert_eq!(pollster::block_on(probe(&storage)).unwrap(), format, "{bytes:?}");
        }
    }
}
