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

/// What happens to the host space of clusters that are freed (A.3.1).
///
/// Whether a cluster is freed at all is decided elsewhere; freed clusters are reused in any case.
///
/// ```
/// assert!(lacuna::qcow2::DiscardPolicy::default().guest);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DiscardPolicy {
    /// Punch what the guest discarded or zeroed with leave to unmap.
    pub guest: bool,
    /// Punch tables that are no longer needed.
    pub tables: bool,
}

impl Default for DiscardPolicy {
    fn default() -> Self {
        Self { guest: true, tables: false }
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
