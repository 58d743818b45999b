//! How an image is opened.

use std::sync::Arc;

use super::refcounts::Placement;
use crate::block::DynLayer;

/// What may be done with an opened image.
///
/// ```
/// assert_ne!(lacuna::qcow2::Access::ReadOnly, lacuna::qcow2::Access::ReadWrite);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Nothing is written, not even to repair or to clear autoclear bits.
    ReadOnly,
    /// Everything. A dirty image is repaired first.
    ReadWrite,
}

/// Whether a guest's wish to give space back is heard (QEMU: `discard=`).
///
/// ```
/// assert_ne!(lacuna::qcow2::GuestDiscard::Ignore, lacuna::qcow2::GuestDiscard::Unmap);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum GuestDiscard {
    /// Discards change nothing, and zeroing keeps the space, leave to unmap or not.
    Ignore,
    /// Discarded and zeroed clusters are freed.
    #[default]
    Unmap,
}

/// What happens to the host space of clusters that are freed, by the reason they are (A.3.1).
///
/// Freed clusters are reused in any case; this decides which are punched out of the file before.
/// Clusters about to be reused never are, those behind the end of a shrunk disk always are.
///
/// ```
/// use lacuna::qcow2::{DiscardPolicy, GuestDiscard};
/// let quiet = DiscardPolicy { guest: GuestDiscard::Ignore, ..DiscardPolicy::default() };
/// assert!(quiet.snapshot && !quiet.other);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DiscardPolicy {
    /// Whether discards are heard at all.
    pub guest: GuestDiscard,
    /// Punch what the guest discarded or zeroed with leave to unmap (`pass-discard-request`).
    pub request: bool,
    /// Punch what only a deleted snapshot used (`pass-discard-snapshot`).
    pub snapshot: bool,
    /// Punch anything else, as tables that are no longer needed (`pass-discard-other`).
    pub other: bool,
}

impl Default for DiscardPolicy {
    fn default() -> Self {
        Self { guest: GuestDiscard::Unmap, request: true, snapshot: true, other: false }
    }
}

/// How much an image asks to learn what is zero.
///
/// ```
/// assert_eq!(lacuna::qcow2::ExtentDetail::default(), lacuna::qcow2::ExtentDetail::Map);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ExtentDetail {
    /// What the image's own map says: every data cluster may hold anything.
    #[default]
    Map,
    /// Also what storage knows: data clusters that were never written (holes, unwritten space of a
    /// preallocated image) read as zeros.
    Host,
}

/// What the map says of clusters that were zeroed with leave to unmap, or discarded (001-2).
///
/// ```
/// assert_eq!(lacuna::qcow2::ZeroUnmap::default(), lacuna::qcow2::ZeroUnmap::Flag);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ZeroUnmap {
    /// That they read as zeros, whatever may be put below later.
    #[default]
    Flag,
    /// Nothing, where that reads as zeros too: no backing layer, or one that is known to be zero
    /// there (001-6). A backing file that is put below later shows (001-8).
    Unallocate,
}

/// Whether zeroed clusters share one cluster of zeros where no flag can say "zero": in version 2 over
/// a backing layer (004-3).
///
/// A few references to the shared cluster lie beyond the end of the disk, where no guest gets, so that
/// whoever changes the image afterwards leaves it sound. Images that can mark zeros, and those without a
/// backing layer, are not affected.
///
/// ```
/// use lacuna::qcow2::SharedZeroCluster;
/// assert_eq!(SharedZeroCluster::default(), SharedZeroCluster::AsRemembered);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SharedZeroCluster {
    /// Where the image remembers one.
    #[default]
    AsRemembered,
    /// No cluster begins to share; those that do are known to be zeros all the same.
    Off,
    /// Yes; the image remembers it.
    On,
}

/// Whether a discard takes the place on the host from a cluster (002-6).
///
/// A place that is kept is moved by two things only: a write to a cluster that a snapshot shares,
/// and one to a compressed cluster, go to a new one.
///
/// ```
/// assert_eq!(lacuna::qcow2::OnDiscard::default(), lacuna::qcow2::OnDiscard::Free);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnDiscard {
    /// The cluster is freed.
    #[default]
    Free,
    /// The cluster keeps its place and reads as zeros (QEMU: `discard-no-unref`), so that nothing
    /// the guest does changes where its clusters lie. Its bytes are punched out of the file,
    /// where nothing else references them and the policy says so.
    KeepMapping,
}

/// The smallest unit of a discard.
///
/// ```
/// use lacuna::qcow2::DiscardUnit;
/// assert_eq!(DiscardUnit::default(), DiscardUnit::Subcluster);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DiscardUnit {
    /// Whole clusters, as with QEMU: less is ignored.
    Cluster,
    /// Subclusters, where the image has them (002-15).
    #[default]
    Subcluster,
}

/// How to open an image.
///
/// ```
/// use lacuna::qcow2::{Access, OpenOptions, Placement};
/// let options = OpenOptions::new(Access::ReadWrite)
///     .placement(Placement::QemuCompatible)
///     .cache_bytes(64 << 20);
/// ```
#[derive(Clone, Debug)]
pub struct OpenOptions {
    pub(super) access: Access,
    pub(super) placement: Placement,
    pub(super) cache_bytes: u64,
    pub(super) discard: DiscardPolicy,
    pub(super) detail: ExtentDetail,
    pub(super) lazy_refcounts: Option<bool>,
    pub(super) zero_unmap: ZeroUnmap,
    pub(super) on_discard: Option<OnDiscard>,
    pub(super) discard_unit: DiscardUnit,
    pub(super) shared_zero: SharedZeroCluster,
    pub(super) bitmap_intents: bool,
}

impl OpenOptions {
    /// Starts from the defaults: two cursors, 32 MiB of table cache, guest discards punched.
    #[must_use]
    pub fn new(access: Access) -> Self {
        Self {
            access,
            placement: Placement::default(),
            cache_bytes: 32 << 20,
            discard: DiscardPolicy::default(),
            detail: ExtentDetail::default(),
            lazy_refcounts: None,
            zero_unmap: ZeroUnmap::default(),
            on_discard: None,
            discard_unit: DiscardUnit::default(),
            shared_zero: SharedZeroCluster::default(),
            bitmap_intents: true,
        }
    }

    /// Chooses what may be done with the image.
    #[must_use]
    pub const fn access(self, access: Access) -> Self {
        Self { access, ..self }
    }

    /// Chooses how host clusters are placed.
    #[must_use]
    pub const fn placement(self, placement: Placement) -> Self {
        Self { placement, ..self }
    }

    /// Bounds the cached L2 tables in bytes; refcount blocks take up to a quarter of that more.
    /// Tables that cannot be written at once may pass the bound by half.
    #[must_use]
    pub const fn cache_bytes(self, cache_bytes: u64) -> Self {
        Self { cache_bytes, ..self }
    }

    /// Returns how many bytes of L2 tables are cached at most.
    pub(crate) const fn table_bytes(&self) -> u64 {
        self.cache_bytes
    }

    /// Chooses how much is asked to learn what is zero.
    #[must_use]
    pub const fn extent_detail(self, detail: ExtentDetail) -> Self {
        Self { detail, ..self }
    }

    /// Chooses whether refcounts may be written late, which needs version 3; without a choice the
    /// image says.
    #[must_use]
    pub const fn lazy_refcounts(self, lazy_refcounts: Option<bool>) -> Self {
        Self { lazy_refcounts, ..self }
    }

    /// Chooses which freed host space is given back.
    #[must_use]
    pub const fn discard(self, discard: DiscardPolicy) -> Self {
        Self { discard, ..self }
    }

    /// Chooses what zeroed and discarded clusters become.
    #[must_use]
    pub const fn zero_unmap(self, zero_unmap: ZeroUnmap) -> Self {
        Self { zero_unmap, ..self }
    }

    /// Chooses whether discarded clusters keep their place, which needs version 3; without a choice
    /// the image says ([`CreateOptions::keep_mapping`](super::CreateOptions::keep_mapping)).
    #[must_use]
    pub const fn on_discard(self, on_discard: OnDiscard) -> Self {
        Self { on_discard: Some(on_discard), ..self }
    }

    /// Chooses the smallest unit of a discard.
    #[must_use]
    pub const fn discard_unit(self, discard_unit: DiscardUnit) -> Self {
        Self { discard_unit, ..self }
    }

    /// Chooses whether zeroed clusters share one of zeros, where the format has no zero flag.
    #[must_use]
    pub const fn shared_zero_cluster(self, shared_zero: SharedZeroCluster) -> Self {
        Self { shared_zero, ..self }
    }

    /// Chooses whether enabled bitmaps survive a crash, which is so by default: before the first
    /// change in each region of the disk, a bit in the header says so, durably. Else a crash leaves
    /// them in use, and nobody can believe them.
    #[must_use]
    pub const fn bitmap_intents(self, bitmap_intents: bool) -> Self {
        Self { bitmap_intents, ..self }
    }
}

/// What an image is made of: its file, and what the file names, opened by the caller.
///
/// ```
/// use lacuna::{qcow2::Parts, storage::MemoryStorage};
/// let parts = Parts::alone(MemoryStorage::new());
/// assert!(parts.backing.is_none());
/// ```
pub struct Parts<S> {
    /// The image file.
    pub storage: S,
    /// The external data file, where the image has one.
    pub data: Option<S>,
    /// The backing layer, where the image has one.
    pub backing: Option<Arc<dyn DynLayer>>,
}

impl<S> Parts<S> {
    /// An image that consists of one file.
    pub const fn alone(storage: S) -> Self {
        Self { storage, data: None, backing: None }
    }
}

impl<S: std::fmt::Debug> std::fmt::Debug for Parts<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parts")
            .field("storage", &self.storage)
            .field("data", &self.data)
            .field("backing", &self.backing.as_ref().map(|layer| layer.size()))
            .finish()
    }
}
