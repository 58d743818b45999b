//! What a copy needs of the disk it writes to, beyond what every layer does.

use crate::Error;
use crate::block::Layer;
use crate::buffer::Buffer;
use crate::chain::{Disk, RawDisk};
use crate::qcow2::Image;
use crate::raw::Raw;
use crate::storage::{Storage, Transfer};
use crate::units::GuestOffset;

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
}

impl<S: Storage> Target for Raw<S> {
    fn compressed_unit_bytes(&self) -> Option<u64> {
        None
    }

    async fn write_compressed(&self, _: GuestOffset, buffer: Buffer) -> Transfer {
        (Err(Error::unsupported("A raw disk cannot store compressed data")), buffer)
    }
}

impl<S: Storage> Target for RawDisk<S> {
    fn compressed_unit_bytes(&self) -> Option<u64> {
        None
    }

    async fn write_compressed(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        self.raw().write_compressed(offset, buffer).await
    }
}

impl<S: Storage> Target for Image<S> {
    fn compressed_unit_bytes(&self) -> Option<u64> {
        let has_data_file = self.header().has_external_data_file();
        (!has_data_file).then(|| self.geometry().cluster_bytes())
    }

    async fn write_compressed(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        // The image's own method, which a trait method of the same name does not shadow.
        Self::write_compressed(self, offset, buffer).await
    }
}

impl<S: Storage> Target for Disk<S> {
    fn compressed_unit_bytes(&self) -> Option<u64> {
        match self {
            Self::Qcow2(image) => image.compressed_unit_bytes(),
            Self::Raw(disk) => disk.compressed_unit_bytes(),
        }
    }

    async fn write_compressed(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        match self {
            Self::Qcow2(image) => image.write_compressed(offset, buffer).await,
            Self::Raw(disk) => disk.write_compressed(offset, buffer).await,
        }
    }
}
