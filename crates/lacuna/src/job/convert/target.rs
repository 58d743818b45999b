//! What a copy needs of the disk it writes to, beyond what every layer does.

use crate::block::Layer;
use crate::buffer::Buffer;
use crate::raw::Raw;
use crate::storage::{Storage, Transfer};
use crate::units::GuestOffset;
use crate::{Error, Result};

/// A disk that may be able to store data compressed.
///
/// ```
/// use lacuna::job::Target;
/// use lacuna::{raw::Raw, storage::MemoryStorage};
/// let disk = pollster::block_on(Raw::create(MemoryStorage::new(), 4096)).unwrap();
/// assert_eq!(disk.compressed_unit_bytes(), None);
/// ```
pub trait Target: Layer {
    /// Returns how many bytes are compressed as one, or nothing where that is not possible.
    fn compressed_unit_bytes(&self) -> Option<u64>;

    /// Stores one aligned unit (or the shorter rest of the disk) compressed, or as it is where
    /// compression does not make it smaller.
    fn write_compressed(
        &self,
        offset: GuestOffset,
        buffer: Buffer,
    ) -> impl Future<Output = Transfer> + Send;

    /// Brings the storage into the shape that QEMU leaves after the last compressed write.
    fn end_compressed(&self) -> impl Future<Output = Result<()>> + Send {
        async { Ok(()) }
    }
}

impl<S: Storage> Target for Raw<S> {
    fn compressed_unit_bytes(&self) -> Option<u64> {
        None
    }

    async fn write_compressed(&self, _: GuestOffset, buffer: Buffer) -> Transfer {
        (Err(Error::unsupported("A raw disk cannot store compressed data")), buffer)
    }
}
