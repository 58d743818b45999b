//! Compressing clusters apart from the image they go to, so that any thread can do it.

use super::codec;
use super::format::CompressionType;
use crate::buffer::Buffer;
use crate::{Error, Result};

/// Compresses clusters as one image stores them.
///
/// ```
/// use lacuna::block::Layer;
/// use lacuna::buffer::Buffer;
/// use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
/// use lacuna::storage::MemoryStorage;
/// use lacuna::units::GuestOffset;
///
/// pollster::block_on(async {
///     let storage = MemoryStorage::new();
///     create(&storage, &CreateOptions { size_bytes: 1 << 20, ..Default::default() }).await?;
///     let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadWrite)).await?;
///     let (encoder, bytes) = (image.encoder(), Buffer::from(&[7; 65536][..]));
///     let (stream, bytes) = std::thread::spawn(move || (encoder.encode(&bytes), bytes)).join().unwrap();
///     image.write_encoded(GuestOffset(0), bytes, stream?).await.0?;
///     assert!(image.extents(image.whole()).await?[0].status.is_compressed);
///     image.close().await
/// }).unwrap();
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encoder {
    kind: CompressionType,
    cluster_bytes: u64,
}

/// A compressed cluster that is not stored yet.
///
/// See [`Encoder`] for an example.
#[derive(Debug)]
pub struct Stream {
    bytes: Buffer,
    made_by: Encoder,
}

impl Encoder {
    pub(super) const fn new(kind: CompressionType, cluster_bytes: u64) -> Self {
        Self { kind, cluster_bytes }
    }

    /// Returns how many bytes are compressed as one: a cluster.
    #[must_use]
    pub const fn unit_bytes(&self) -> u64 {
        self.cluster_bytes
    }

    /// Compresses one cluster, or the shorter last part of a disk; nothing where that would not
    /// make it smaller.
    ///
    /// The same bytes give the same stream on every thread.
    ///
    /// # Errors
    /// `InvalidRequest` for more than a cluster; `Io` where no compression context can be made.
    pub fn encode(&self, bytes: &[u8]) -> Result<Option<Stream>> {
        let cluster_bytes = self.cluster_bytes as usize;
        if bytes.len() > cluster_bytes {
            return Err(Error::invalid(format!(
                "A compressed cluster holds {cluster_bytes} bytes, not {}",
                bytes.len()
            )));
        }
        let mut stream = Buffer::new(cluster_bytes);
        let len = if bytes.len() == cluster_bytes {
            codec::compress(self.kind, bytes, &mut stream)?
        } else {
            let mut padded = Buffer::zeroed(cluster_bytes);
            padded[..bytes.len()].copy_from_slice(bytes);
            codec::compress(self.kind, &padded, &mut stream)?
        };
        Ok(len.map(|len| {
            stream.truncate(len);
            Stream { bytes: stream, made_by: *self }
        }))
    }
}

impl Stream {
    /// Returns the bytes, if `encoder` makes such streams.
    pub(super) fn for_encoder(self, encoder: &Encoder) -> Result<Buffer> {
        match self.made_by == *encoder {
            true => Ok(self.bytes),
            false => Err(Error::invalid(format!(
                "The stream was made by {:?}; the image has {encoder:?}",
                self.made_by
            ))),
        }
    }
}
