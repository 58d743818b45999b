//! What an export of ours is: a chain, or a point in time of one.

use lacuna::Result;
use lacuna::block::{DiscardMode, Extent, KnownZeroes, Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::storage::Transfer;
use lacuna::units::{GuestOffset, GuestRange};
use lacuna_export::{DirtyRun, ServedDisk};

use super::disk::ChainDisk;
use super::point::PointDisk;

/// A disk that is served.
pub(crate) enum Served {
    Chain(Box<ChainDisk>),
    Point(PointDisk),
}

impl Served {
    /// Returns the chain, where it is one.
    pub(crate) fn as_chain(&self) -> Option<&ChainDisk> {
        match self {
            Self::Chain(disk) => Some(disk),
            Self::Point(_) => None,
        }
    }

    /// Returns the point in time, where it is one.
    pub(crate) const fn as_point(&self) -> Option<&PointDisk> {
        match self {
            Self::Chain(_) => None,
            Self::Point(disk) => Some(disk),
        }
    }

    /// Leaves the disk as it should be left; a point has nothing that would be.
    pub(crate) async fn close(&self) -> Result<()> {
        match self {
            Self::Chain(disk) => disk.close().await,
            Self::Point(disk) => {
                disk.end();
                Ok(())
            }
        }
    }
}

impl From<ChainDisk> for Served {
    fn from(disk: ChainDisk) -> Self {
        Self::Chain(Box::new(disk))
    }
}

impl Layer for Served {
    fn size_bytes(&self) -> u64 {
        match self {
            Self::Chain(disk) => disk.size_bytes(),
            Self::Point(disk) => disk.size_bytes(),
        }
    }

    fn is_read_only(&self) -> bool {
        match self {
            Self::Chain(disk) => disk.is_read_only(),
            Self::Point(disk) => disk.is_read_only(),
        }
    }

    fn zero_unit_bytes(&self) -> u64 {
        match self {
            Self::Chain(disk) => disk.zero_unit_bytes(),
            Self::Point(disk) => disk.zero_unit_bytes(),
        }
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        match self {
            Self::Chain(disk) => disk.known_zeroes().await,
            Self::Point(disk) => disk.known_zeroes().await,
        }
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        match self {
            Self::Chain(disk) => disk.read(offset, buffer).await,
            Self::Point(disk) => disk.read(offset, buffer).await,
        }
    }

    async fn write(&self, offset: GuestOffset, buffer: Buffer, flags: WriteFlags) -> Transfer {
        match self {
            Self::Chain(disk) => disk.write(offset, buffer, flags).await,
            Self::Point(disk) => disk.write(offset, buffer, flags).await,
        }
    }

    async fn write_zeroes(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        match self {
            Self::Chain(disk) => disk.write_zeroes(range, flags).await,
            Self::Point(disk) => disk.write_zeroes(range, flags).await,
        }
    }

    async fn discard(&self, range: GuestRange, mode: DiscardMode) -> Result<()> {
        match self {
            Self::Chain(disk) => disk.discard(range, mode).await,
            Self::Point(disk) => disk.discard(range, mode).await,
        }
    }

    async fn flush(&self) -> Result<()> {
        match self {
            Self::Chain(disk) => disk.flush().await,
            Self::Point(disk) => disk.flush().await,
        }
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        match self {
            Self::Chain(disk) => disk.extents(range).await,
            Self::Point(disk) => disk.extents(range).await,
        }
    }
}

impl ServedDisk for Served {
    fn bitmaps(&self) -> Vec<String> {
        match self {
            Self::Chain(disk) => disk.bitmaps(),
            Self::Point(disk) => disk.bitmaps(),
        }
    }

    async fn dirty(&self, bitmap: &str, range: GuestRange) -> Result<Vec<DirtyRun>> {
        match self {
            Self::Chain(disk) => disk.dirty(bitmap, range).await,
            Self::Point(disk) => disk.dirty(bitmap, range).await,
        }
    }

    fn level_sizes(&self) -> Vec<u64> {
        match self {
            Self::Chain(disk) => disk.level_sizes(),
            Self::Point(disk) => disk.level_sizes(),
        }
    }

    async fn level_extents(&self, level: usize, range: GuestRange) -> Result<Vec<Extent>> {
        match self {
            Self::Chain(disk) => disk.level_extents(level, range).await,
            Self::Point(disk) => disk.level_extents(level, range).await,
        }
    }

    fn level_bitmaps(&self, level: usize) -> Vec<String> {
        match self {
            Self::Chain(disk) => disk.level_bitmaps(level),
            Self::Point(disk) => disk.level_bitmaps(level),
        }
    }

    async fn level_dirty(
        &self,
        level: usize,
        bitmap: &str,
        range: GuestRange,
    ) -> Result<Vec<DirtyRun>> {
        match self {
            Self::Chain(disk) => disk.level_dirty(level, bitmap, range).await,
            Self::Point(disk) => disk.level_dirty(level, bitmap, range).await,
        }
    }

    async fn resize(&self, size_bytes: u64) -> Result<()> {
        match self {
            Self::Chain(disk) => disk.resize(size_bytes).await,
            Self::Point(disk) => disk.resize(size_bytes).await,
        }
    }

    fn is_rotational(&self) -> bool {
        match self {
            Self::Chain(disk) => disk.is_rotational(),
            Self::Point(disk) => disk.is_rotational(),
        }
    }
}
