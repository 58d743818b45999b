//! All index arithmetic of one image (qcow2: header, cluster_bits and refcount_order).

#![expect(
    clippy::arithmetic_side_effects,
    reason = "cluster_bits and refcount_order are checked when a Geometry is made, and bound every shift"
)]

use crate::units::{GuestCluster, GuestOffset, GuestRange, HostCluster, HostOffset, HostRange};
use crate::{Error, Result};

/// Smallest cluster: 512 bytes (B.1).
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Largest cluster that QEMU opens: 2 MiB (B.1).
pub const MAX_CLUSTER_BITS: u32 = 21;
/// Subclusters in a cluster with extended L2 entries (B.7).
pub const SUBCLUSTERS: u32 = 32;

/// The version of the format.
///
/// ```
/// use lacuna::qcow2::format::Version;
/// assert!(Version::V2 < Version::V3);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    /// Version 2, `compat=0.10`: no feature bits, no zero flag, 16-bit refcounts.
    V2,
    /// Version 3, `compat=1.1`.
    V3,
}

/// How wide L2 entries are.
///
/// ```
/// use lacuna::qcow2::format::EntryWidth;
/// assert_eq!(EntryWidth::Extended.bytes(), 16);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EntryWidth {
    /// 8 bytes: one state for the whole cluster.
    Standard,
    /// 16 bytes: a bitmap gives each of 32 subclusters a state.
    Extended,
}

impl EntryWidth {
    /// Returns the size of an entry in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Standard => 8,
            Self::Extended => 16,
        }
    }
}

/// The sizes of an image and everything that follows from them.
///
/// ```
/// use lacuna::qcow2::format::{EntryWidth, Geometry, Version};
/// use lacuna::units::GuestOffset;
///
/// let geometry = Geometry::new(Version::V3, 16, 4, EntryWidth::Standard).unwrap();
/// assert_eq!(geometry.l2_entries(), 8192);
/// assert_eq!(geometry.l1_index(GuestOffset(512 << 20)), 1);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Geometry {
    version: Version,
    cluster_bits: u32,
    refcount_order: u32,
    entry_width: EntryWidth,
}

impl Geometry {
    /// Makes a geometry, or says which value is out of its limits.
    ///
    /// # Errors
    /// `Corrupt` where a value is outside of what the format (and QEMU) allows.
    pub fn new(
        version: Version,
        cluster_bits: u32,
        refcount_order: u32,
        entry_width: EntryWidth,
    ) -> Result<Self> {
        let smallest = match entry_width {
            EntryWidth::Standard => MIN_CLUSTER_BITS,
            EntryWidth::Extended => 14,
        };
        if !(smallest..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
            return Err(Error::corrupt(format!(
                "Cluster size is 2^{cluster_bits} bytes; 2^{smallest} to 2^{MAX_CLUSTER_BITS} are allowed"
            )));
        }
        if refcount_order > 6 || (version == Version::V2 && refcount_order != 4) {
            return Err(Error::corrupt(format!(
                "Refcount order is {refcount_order}; {} allowed",
                if version == Version::V2 { "version 2 has only 4" } else { "0 to 6 are" }
            )));
        }
        Ok(Self { version, cluster_bits, refcount_order, entry_width })
    }

    /// Returns the version of the format.
    #[must_use]
    pub const fn version(&self) -> Version {
        self.version
    }

    /// Returns the binary logarithm of the cluster size.
    #[must_use]
    pub const fn cluster_bits(&self) -> u32 {
        self.cluster_bits
    }

    /// Returns the cluster size in bytes.
    #[must_use]
    pub const fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Returns the width of L2 entries.
    #[must_use]
    pub const fn entry_width(&self) -> EntryWidth {
        self.entry_width
    }

    /// Says whether L2 entries carry subcluster bitmaps.
    #[must_use]
    pub const fn has_subclusters(&self) -> bool {
        matches!(self.entry_width, EntryWidth::Extended)
    }

    /// Returns the smallest unit with a state of its own, in bytes: subcluster or cluster.
    #[must_use]
    pub const fn subcluster_bytes(&self) -> u64 {
        match self.entry_width {
            EntryWidth::Standard => self.cluster_bytes(),
            EntryWidth::Extended => self.cluster_bytes() / SUBCLUSTERS as u64,
        }
    }

    /// Returns the number of entries in an L2 table.
    #[must_use]
    pub const fn l2_entries(&self) -> u64 {
        self.cluster_bytes() / self.entry_width.bytes()
    }

    /// Returns how many guest bytes one L1 entry covers.
    #[must_use]
    pub const fn l2_coverage_bytes(&self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// Returns the binary logarithm of the refcount width in bits.
    #[must_use]
    pub const fn refcount_order(&self) -> u32 {
        self.refcount_order
    }

    /// Returns the refcount width in bits: 1 to 64.
    #[must_use]
    pub const fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// Returns the greatest refcount that fits.
    #[must_use]
    pub const fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// Returns the number of refcounts in a refcount block.
    #[must_use]
    pub const fn refcount_block_entries(&self) -> u64 {
        (self.cluster_bytes() * 8) >> self.refcount_order
    }

    /// Returns the cluster that holds the guest byte.
    #[must_use]
    pub const fn guest_cluster(&self, offset: GuestOffset) -> GuestCluster {
        GuestCluster(offset.0 >> self.cluster_bits)
    }

    /// Returns the cluster that holds the host byte.
    #[must_use]
    pub const fn host_cluster(&self, offset: HostOffset) -> HostCluster {
        HostCluster(offset.0 >> self.cluster_bits)
    }

    /// Returns the indices of the host clusters in which a range lies.
    #[must_use]
    pub const fn host_clusters(&self, range: HostRange) -> std::ops::Range<u64> {
        let end = range.start.0.saturating_add(range.len);
        self.host_cluster(range.start).0..self.clusters_for(end)
    }

    /// Returns where a host cluster starts.
    #[must_use]
    pub const fn host_offset(&self, cluster: HostCluster) -> HostOffset {
        HostOffset(cluster.0 << self.cluster_bits)
    }

    /// Returns where a guest cluster starts.
    #[must_use]
    pub const fn guest_offset(&self, cluster: GuestCluster) -> GuestOffset {
        GuestOffset(cluster.0 << self.cluster_bits)
    }

    /// Returns the distance of an offset from the start of its cluster, in bytes.
    #[must_use]
    pub const fn within_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_bytes() - 1)
    }

    /// Says whether an offset is the start of a cluster.
    #[must_use]
    pub const fn is_aligned(&self, offset: u64) -> bool {
        self.within_cluster(offset) == 0
    }

    /// Returns the index of the L1 entry for a guest byte.
    #[must_use]
    pub const fn l1_index(&self, offset: GuestOffset) -> u64 {
        (offset.0 >> self.cluster_bits) / self.l2_entries()
    }

    /// Returns the index of the L2 entry for a guest byte within its table.
    #[must_use]
    pub const fn l2_index(&self, offset: GuestOffset) -> u64 {
        (offset.0 >> self.cluster_bits) % self.l2_entries()
    }

    /// Returns the number of clusters that hold `bytes` bytes.
    #[must_use]
    pub const fn clusters_for(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_bytes())
    }

    /// Returns the number of L1 entries that a disk of `size_bytes` needs.
    #[must_use]
    pub const fn l1_entries_for(&self, size_bytes: u64) -> u64 {
        self.clusters_for(size_bytes).div_ceil(self.l2_entries())
    }

    /// Widens a guest range to whole clusters.
    #[must_use]
    pub const fn cover_clusters(&self, range: GuestRange) -> GuestRange {
        let start = range.start.0 & !(self.cluster_bytes() - 1);
        let end = (range.start.0 + range.len).next_multiple_of(self.cluster_bytes());
        GuestRange { start: GuestOffset(start), len: end - start }
    }
}
