//! What a copy needs of the disk it writes to, beyond what every layer does.

use crate::Error;
use crate::block::{DetectZeroes, Layer, WriteFlags};
use crate::buffer::Buffer;
use crate::chain::{Disk, RawDisk};
use crate::qcow2::{Encoder, Image, Stream};
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
    /// Returns what compresses for this disk, or nothing where that is not possible.
    fn encoder(&self) -> Option<Encoder>;

    /// Stores one aligned unit (or the shorter rest of the disk): as `stream` where there is one,
    /// else as it is.
    fn write_encoded(
        &self,
        offset: GuestOffset,
        buffer: Buffer,
        stream: Option<Stream>,
    ) -> impl Future<Output = Transfer> + Send;

    /// Returns how many bytes are compressed as one, or nothing where that is not possible.
    fn compressed_unit_bytes(&self) -> Option<u64> {
        self.encoder().map(|encoder| encoder.unit_bytes())
    }

    /// Stores one aligned unit (or the shorter rest of the disk) compressed, or as it is where
    /// compression does not make it smaller.
    fn write_compressed(
        &self,
        offset: GuestOffset,
        buffer: Buffer,
    ) -> impl Future<Output = Transfer> + Send {
        async move {
            match self.encoder().map(|encoder| encoder.encode(&buffer)).transpose() {
                Ok(stream) => self.write_encoded(offset, buffer, stream.flatten()).await,
                Err(error) => (Err(error), buffer),
            }
        }
    }
}

impl<S: Storage> Target for Raw<S> {
    fn encoder(&self) -> Option<Encoder> {
        None
    }

    async fn write_encoded(&self, _: GuestOffset, buffer: Buffer, _: Option<Stream>) -> Transfer {
        (Err(Error::unsupported("A raw disk cannot store compressed data")), buffer)
    }
}

impl<S: Storage> Target for RawDisk<S> {
    fn encoder(&self) -> Option<Encoder> {
        None
    }

    async fn write_encoded(
        &self,
        offset: GuestOffset,
        buffer: Buffer,
        stream: Option<Stream>,
    ) -> Transfer {
        self.raw().write_encoded(offset, buffer, stream).await
    }
}

impl<S: Storage> Target for Image<S> {
    fn encoder(&self) -> Option<Encoder> {
        // The image's own method, which a trait method of the same name does not shadow.
        (!self.header().has_external_data_file()).then(|| Self::encoder(self))
    }

    async fn write_encoded(
        &self,
        offset: GuestOffset,
        buffer: Buffer,
        stream: Option<Stream>,
    ) -> Transfer {
        Self::write_encoded(self, offset, buffer, stream).await
    }
}

/// A compressed write of zeros is a write of zeros, wherever zeros are looked for.
impl<T: Target> Target for DetectZeroes<T> {
    fn encoder(&self) -> Option<Encoder> {
        self.below().encoder()
    }

    async fn write_encoded(
        &self,
        offset: GuestOffset,
        buffer: Buffer,
        stream: Option<Stream>,
    ) -> Transfer {
        match self.finds_zeros(&buffer) {
            true => self.write(offset, buffer, WriteFlags::empty()).await,
            false => self.below().write_encoded(offset, buffer, stream).await,
        }
    }
}

impl<S: Storage> Target for Disk<S> {
    fn encoder(&self) -> Option<Encoder> {
        match self {
            Self::Qcow2(image) => Target::encoder(image),
            Self::Raw(disk) => disk.encoder(),
            Self::Snapshot(_) => None,
        }
    }

    async fn write_encoded(
        &self,
        offset: GuestOffset,
        buffer: Buffer,
        stream: Option<Stream>,
    ) -> Transfer {
        match self {
            Self::Qcow2(image) => image.write_encoded(offset, buffer, stream).await,
            Self::Raw(disk) => disk.write_encoded(offset, buffer, stream).await,
            Self::Snapshot(layer) => layer.write(offset, buffer, WriteFlags::empty()).await,
        }
    }
}
