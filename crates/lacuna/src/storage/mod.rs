//! Where bytes live: one growing host object behind one trait.
//!
//! * Always: a read past the end of the object gives zeros; a write past the end extends it, and
//!   the gap reads as zeros.
//! * Always: a call may be dropped at any await. Whatever was handed over (buffer, hold) stays
//!   with the driver until the kernel is done with it; the effect may or may not take place.
//! * Never: a storage knows guest offsets.

mod claim;
#[cfg(target_os = "linux")]
mod file;
mod memory;
mod reserve;
mod shared;
#[cfg(target_os = "linux")]
mod sys;

use std::future::Future;

pub use claim::{Claim, Locking, Permissions};
#[cfg(target_os = "linux")]
pub use file::{
    CacheMode, Create, Driver, DriverChoice, FileAccess, FileOptions, FileStorage, Holder, Holders,
    HostSource, LockConflict, Obstacle,
};
pub use memory::MemoryStorage;
pub(crate) use reserve::{Reserve, reserve};
#[cfg(target_os = "linux")]
pub(crate) use sys::Pool;

use crate::buffer::{Buffer, Hold};
use crate::units::{HostOffset, HostRange};
use crate::{Error, Result};

/// How well a storage can do something.
///
/// ```
/// assert_ne!(lacuna::storage::Capability::Native, lacuna::storage::Capability::Unsupported);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Capability {
    /// The host does it, at a cost that does not grow with the bytes.
    Native,
    /// It works, by writing bytes.
    Emulated,
    /// It fails with [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported).
    Unsupported,
}

/// What a storage can do, fixed when it is opened.
///
/// ```
/// use lacuna::storage::{Capability, MemoryStorage, Storage};
/// assert_eq!(MemoryStorage::new().capabilities().punch_hole, Capability::Native);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Zeroing a range without sending its bytes.
    pub write_zeroes: Capability,
    /// Giving the space of a range back to the host.
    pub punch_hole: Capability,
    /// Changing the length: `Unsupported` where it is somebody else's to decide, as that of a block
    /// device or of an export. A server may still grow an export when it is asked.
    pub set_len: Capability,
    /// Whether the object may be written at all.
    pub writable: bool,
    /// Offsets and lengths that are multiples of this many bytes avoid read-modify-write.
    pub preferred_alignment_bytes: u32,
}

/// What zeroing may do with the host space of the range.
///
/// ```
/// assert_ne!(lacuna::storage::ZeroMode::Allocate, lacuna::storage::ZeroMode::MayUnmap);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ZeroMode {
    /// The range stays (or becomes) allocated, so that a later write cannot fail for lack of room.
    Allocate,
    /// The host may turn the range into a hole.
    MayUnmap,
}

/// What the host knows about a range without reading it.
///
/// ```
/// assert!(lacuna::storage::HostStatus::Hole.reads_zero());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HostStatus {
    /// Allocated; the content is unknown.
    Data,
    /// No space is reserved, reads as zeros.
    Hole,
    /// Space is reserved but was never written: reads as zeros.
    Unwritten,
    /// No space is reserved, and the content is unknown: some devices, and servers in front of
    /// them, do not say what a discarded range reads as.
    Vacant,
}

impl HostStatus {
    /// Says whether the bytes are known to be zeros.
    #[must_use]
    pub const fn reads_zero(self) -> bool {
        matches!(self, Self::Hole | Self::Unwritten)
    }

    /// Says whether no space is reserved, whatever the bytes are.
    #[must_use]
    pub const fn is_hole(self) -> bool {
        matches!(self, Self::Hole | Self::Vacant)
    }
}

/// A run of one status from a given offset on.
///
/// ```
/// use lacuna::storage::{HostExtent, HostStatus};
/// let extent = HostExtent { len: 4096, status: HostStatus::Data };
/// assert!(!extent.status.reads_zero());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostExtent {
    /// Bytes from the offset that was asked about; at least 1. The next run may be equal.
    pub len: u64,
    /// What is known of them.
    pub status: HostStatus,
}

/// The result of a transfer: the buffer always comes back.
pub type Transfer = (Result<()>, Buffer);

/// A step in the work of whoever uses a storage, as a test driver wants to know it.
///
/// The names are those of QEMU's `blkdebug`.
///
/// ```
/// assert_eq!(lacuna::storage::Event::L2Load.name(), "l2_load");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Event {
    /// Bytes around a write are about to be copied to their new place.
    CowWrite,
    /// A part of an L2 table is about to be read.
    L2Load,
    /// Guest data is about to be read.
    ReadAio,
    /// A compressed cluster is about to be read.
    ReadCompressed,
    /// A part of a refcount block is about to be read.
    RefblockLoad,
    /// Guest data is about to be written.
    WriteAio,
    /// A compressed cluster is about to be written.
    WriteCompressed,
}

impl Event {
    /// Returns QEMU's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::CowWrite => "cow_write",
            Self::L2Load => "l2_load",
            Self::ReadAio => "read_aio",
            Self::ReadCompressed => "read_compressed",
            Self::RefblockLoad => "refblock_load",
            Self::WriteAio => "write_aio",
            Self::WriteCompressed => "write_compressed",
        }
    }
}

/// A growing object that holds image bytes: a file, a block device, memory.
///
/// All calls may be in flight at once, from any thread. Overlapping writes in flight at the same
/// time leave one of their contents per sector, in no promised order. Nothing is durable before a
/// [`flush`](Self::flush) that began after the call had returned.
///
/// ```
/// use lacuna::buffer::Buffer;
/// use lacuna::storage::{MemoryStorage, Storage};
/// use lacuna::units::HostOffset;
///
/// pollster::block_on(async {
///     let storage = MemoryStorage::new();
///     storage.write_at(HostOffset(0), Buffer::from(&b"lacuna"[..])).await.0?;
///     let (result, bytes) = storage.read_at(HostOffset(4), Buffer::new(4)).await;
///     result?;
///     assert_eq!(&*bytes, b"na\0\0");
///     Ok::<_, lacuna::Error>(())
/// }).unwrap();
/// ```
pub trait Storage: Send + Sync + 'static {
    /// Fills the buffer from `offset` on; bytes past the end read as zeros.
    fn read_at(&self, offset: HostOffset, buffer: Buffer) -> impl Future<Output = Transfer> + Send;

    /// Writes the whole buffer at `offset`, extending the object where it ends earlier.
    fn write_at(&self, offset: HostOffset, buffer: Buffer)
    -> impl Future<Output = Transfer> + Send;

    /// Makes the range read as zeros, extending the object where it ends earlier.
    fn write_zeroes_at(
        &self,
        range: HostRange,
        mode: ZeroMode,
        hold: Hold,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Writes as [`write_at`](Self::write_at), and has these bytes durable when it returns; with
    /// what a flush makes durable, unless the storage can do it for one write.
    fn write_durably_at(
        &self,
        offset: HostOffset,
        buffer: Buffer,
    ) -> impl Future<Output = Transfer> + Send {
        async move {
            match self.write_at(offset, buffer).await {
                (Ok(()), buffer) => (self.flush().await, buffer),
                failed => failed,
            }
        }
    }

    /// Zeroes as [`write_zeroes_at`](Self::write_zeroes_at), and has the zeros durable when it
    /// returns; with what a flush makes durable, unless the storage can do it for one request.
    fn write_zeroes_durably_at(
        &self,
        range: HostRange,
        mode: ZeroMode,
        hold: Hold,
    ) -> impl Future<Output = Result<()>> + Send {
        async move {
            self.write_zeroes_at(range, mode, hold).await?;
            self.flush().await
        }
    }

    /// Gives the space of the range back; it reads as zeros then. Never changes the length.
    fn punch_hole_at(
        &self,
        range: HostRange,
        hold: Hold,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Says that the content of the range is not needed any more: it reads as what was there or as
    /// zeros from now on, in any mixture. `Unsupported` where that is of no use to anybody.
    fn discard_at(&self, range: HostRange, hold: Hold) -> impl Future<Output = Result<()>> + Send {
        self.punch_hole_at(range, hold)
    }

    /// Returns the range as something that the host can copy from, where it is part of a file.
    fn host_source(&self, _: HostRange) -> Option<HostSource> {
        None
    }

    /// Has the host copy bytes of another object to `to`, extending the object where it ends
    /// earlier. The source must not change meanwhile.
    ///
    /// `Unsupported` where the host cannot, or the source ends early: then the range holds
    /// anything, and is to be written in another way.
    fn copy_at(
        &self,
        _: HostSource,
        _: HostOffset,
        _: Hold,
    ) -> impl Future<Output = Result<()>> + Send {
        std::future::ready(Err(Error::unsupported("This storage cannot copy by itself")))
    }

    /// Reserves space for the range without changing what it reads as; may extend the object.
    fn allocate_at(&self, range: HostRange) -> impl Future<Output = Result<()>> + Send;

    /// Makes everything durable whose call had returned before this one began.
    ///
    /// After an error nothing that was unflushed may be taken for durable, ever. One that nobody waited for
    /// any more is remembered: each later flush fails then, of this object.
    fn flush(&self) -> impl Future<Output = Result<()>> + Send;

    /// Returns the length in bytes.
    fn len(&self) -> impl Future<Output = Result<u64>> + Send;

    /// Says whether there is no byte at all.
    fn is_empty(&self) -> impl Future<Output = Result<bool>> + Send {
        async { Ok(self.len().await? == 0) }
    }

    /// Cuts or extends to `len` bytes; what is added reads as zeros.
    ///
    /// A call that was dropped may still cut what is written later: `hold` is let go when that
    /// cannot happen any more.
    fn set_len(&self, len: u64, hold: Hold) -> impl Future<Output = Result<()>> + Send;

    /// Returns the status of the first run of `range`, never longer than it.
    ///
    /// Zero is claimed only where it is certain, also for writes not yet flushed; past the end
    /// everything is [`HostStatus::Hole`].
    fn status_at(&self, range: HostRange) -> impl Future<Output = Result<HostExtent>> + Send;

    /// Returns the statuses of the first runs of `range`, at least of one, as
    /// [`status_at`](Self::status_at) does: as many as one question to the host answers.
    fn extents_at(&self, range: HostRange) -> impl Future<Output = Result<Vec<HostExtent>>> + Send {
        async move { Ok(vec![self.status_at(range).await?]) }
    }

    /// Is told what comes next. Only test drivers care: they may make the next call fail, or wait.
    ///
    /// Nobody may be told while a lock is held.
    fn event(&self, _: Event) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }

    /// Returns what this storage can do.
    fn capabilities(&self) -> Capabilities;
}
