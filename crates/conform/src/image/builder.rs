//! qcow2 images made byte by byte, right or wrong on purpose.
//!
//! * Always: refcounts, COPIED flags and tables agree unless something was overridden.
//! * Never: the engine's own encoder; this is the second opinion.
//!
//! What is to be in it is collected here; `layout` gives everything its place.

use std::collections::BTreeMap;

use super::SparseBytes;
use super::layout::Layout;

/// Where things lie in an image that was built.
///
/// ```
/// let built = lacuna_conform::image::ImageBuilder::new(3, 16, 1 << 20).data(0, b"guest").build();
/// assert_eq!(built.bytes.read_vec(built.data[&0], 5), b"guest");
/// ```
#[derive(Clone, Debug, Default)]
pub struct Built {
    /// The file.
    pub bytes: SparseBytes,
    /// Offset of the active L1 table.
    pub l1: u64,
    /// Offsets of L2 tables, by L1 index.
    pub l2: BTreeMap<u64, u64>,
    /// Offsets of data, by guest cluster; for compressed clusters that of the stream.
    pub data: BTreeMap<u64, u64>,
    /// Offset of the refcount table.
    pub refcount_table: u64,
    /// Offsets of the refcount blocks.
    pub refcount_blocks: Vec<u64>,
    /// Offset of the snapshot table, 0 without snapshots.
    pub snapshot_table: u64,
    /// Offset of the bitmap directory, 0 without bitmaps.
    pub bitmap_directory: u64,
    /// The external data file, where the image has one.
    pub data_file: Option<SparseBytes>,
}

#[derive(Clone, Debug)]
pub(super) enum Content {
    Data(Vec<u8>),
    Zero,
    ReservedZero(Vec<u8>),
    Compressed(Vec<u8>),
    /// The host cluster of another guest cluster.
    Shared(u64),
}

/// Whose L2 tables a snapshot goes by.
///
/// ```
/// use lacuna_conform::image::{ImageBuilder, SnapshotTables};
/// let image = ImageBuilder::new(3, 16, 1 << 20)
///     .data(0, b"old")
///     .snapshot_with("before", SnapshotTables::Own)
///     .since(0, b"new");
/// assert_ne!(image.build().snapshot_table, 0);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotTables {
    /// Those of the disk: as it is right after a snapshot was made.
    Shared,
    /// Copies: as it is once the disk was written, and its tables were copied for that.
    Own,
}

#[derive(Clone, Debug)]
pub(super) struct BitmapPlan {
    pub(super) name: String,
    pub(super) flags: u32,
    pub(super) granularity_bits: u8,
}

/// Collects what an image is to hold.
///
/// ```
/// // A cluster whose L2 entry has a reserved bit set.
/// let image = lacuna_conform::image::ImageBuilder::new(3, 16, 1 << 20)
///     .data(0, &[7; 512])
///     .change_l2(0, |words| words[0] |= 1 << 56)
///     .build();
/// assert_eq!(image.bytes.read_vec(0, 4), b"QFI\xfb");
/// ```
#[derive(Clone)]
pub struct ImageBuilder {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    pub(super) size_bytes: u64,
    pub(super) refcount_order: u32,
    pub(super) features: [u64; 3],
    pub(super) compression: u8,
    pub(super) extended: bool,
    pub(super) header_bytes: u32,
    pub(super) l1_entries: Option<u64>,
    pub(super) snapshots: Vec<(String, SnapshotTables)>,
    pub(super) bitmaps: Vec<BitmapPlan>,
    pub(super) extensions: Vec<(u32, Vec<u8>)>,
    pub(super) backing: Option<Vec<u8>>,
    pub(super) has_data_file: bool,
    pub(super) is_dense: bool,
    pub(super) clusters: BTreeMap<u64, Content>,
    pub(super) since: BTreeMap<u64, Content>,
    pub(super) subclusters: BTreeMap<u64, u64>,
    pub(super) l2_changes: Vec<(u64, WordChange)>,
    pub(super) l1_changes: Vec<(u64, WordChange)>,
    pub(super) refcounts: BTreeMap<u64, u64>,
    pub(super) fields: Vec<(usize, Vec<u8>)>,
}

pub(super) type WordChange = fn(&mut [u64; 2]);

impl ImageBuilder {
    /// Starts an image of `version` (2 or 3) with clusters of `1 << cluster_bits` bytes.
    #[must_use]
    pub const fn new(version: u32, cluster_bits: u32, size_bytes: u64) -> Self {
        Self {
            version,
            cluster_bits,
            size_bytes,
            refcount_order: 4,
            features: [0; 3],
            compression: 0,
            extended: false,
            header_bytes: 112,
            l1_entries: None,
            snapshots: Vec::new(),
            bitmaps: Vec::new(),
            extensions: Vec::new(),
            backing: None,
            has_data_file: false,
            is_dense: false,
            clusters: BTreeMap::new(),
            since: BTreeMap::new(),
            subclusters: BTreeMap::new(),
            l2_changes: Vec::new(),
            l1_changes: Vec::new(),
            refcounts: BTreeMap::new(),
            fields: Vec::new(),
        }
    }

    /// Makes refcounts `1 << order` bits wide.
    #[must_use]
    pub const fn refcount_order(mut self, order: u32) -> Self {
        self.refcount_order = order;
        self
    }

    /// Makes L2 entries 16 bytes wide and sets the feature bit for it.
    #[must_use]
    pub const fn extended(mut self) -> Self {
        self.extended = true;
        self.features[0] |= 1 << 4;
        self
    }

    /// Says that compressed clusters are zstd frames.
    #[must_use]
    pub const fn zstd(mut self) -> Self {
        self.compression = 1;
        self.features[0] |= 1 << 3;
        self
    }

    /// Adds feature bits: incompatible, compatible, autoclear.
    #[must_use]
    pub const fn features(mut self, incompatible: u64, compatible: u64, autoclear: u64) -> Self {
        self.features[0] |= incompatible;
        self.features[1] |= compatible;
        self.features[2] |= autoclear;
        self
    }

    /// Adds a header extension.
    #[must_use]
    pub fn extension(mut self, magic: u32, data: &[u8]) -> Self {
        self.extensions.push((magic, data.into()));
        self
    }

    /// Names a backing file; its format is an extension (0xe2792aca) of its own.
    #[must_use]
    pub fn backing(mut self, name: &str) -> Self {
        self.backing = Some(name.into());
        self
    }

    /// Makes the header of version 3 this long: 104 bytes have no compression type, what is beyond
    /// 112 is zeros.
    #[must_use]
    pub const fn header_bytes(mut self, bytes: u32) -> Self {
        self.header_bytes = bytes;
        self
    }

    /// Gives the L1 table this many entries, at least as many as the disk needs.
    #[must_use]
    pub const fn l1_entries(mut self, entries: u64) -> Self {
        self.l1_entries = Some(entries);
        self
    }

    /// Puts guest data into an external file of this name, at guest offsets; comes before any data.
    #[must_use]
    pub fn data_file(mut self, name: &str) -> Self {
        self.has_data_file = true;
        self.features[0] |= 1 << 2;
        self.extension(0x4441_5441, name.as_bytes())
    }

    /// Adds a bitmap in which nothing is marked, and the bit that says that bitmaps are kept.
    #[must_use]
    pub fn bitmap(mut self, name: &str, flags: u32, granularity_bits: u8) -> Self {
        self.features[2] |= 1;
        self.bitmaps.push(BitmapPlan { name: name.into(), flags, granularity_bits });
        self
    }

    /// Packs compressed streams without gaps, so that some lie in two host clusters.
    #[must_use]
    pub const fn dense(mut self) -> Self {
        self.is_dense = true;
        self
    }

    /// Puts bytes (at most a cluster, padded with zeros) into a guest cluster.
    #[must_use]
    pub fn data(mut self, cluster: u64, bytes: &[u8]) -> Self {
        self.clusters.insert(cluster, Content::Data(bytes.into()));
        self
    }

    /// Makes a guest cluster read as zeros without a host cluster.
    #[must_use]
    pub fn zero(mut self, cluster: u64) -> Self {
        self.clusters.insert(cluster, Content::Zero);
        self
    }

    /// Makes a guest cluster read as zeros with a host cluster that holds `stale` bytes.
    #[must_use]
    pub fn reserved_zero(mut self, cluster: u64, stale: &[u8]) -> Self {
        self.clusters.insert(cluster, Content::ReservedZero(stale.into()));
        self
    }

    /// Puts a compressed stream into a guest cluster, packed behind the one before.
    #[must_use]
    pub fn compressed(mut self, cluster: u64, stream: &[u8]) -> Self {
        self.clusters.insert(cluster, Content::Compressed(stream.into()));
        self
    }

    /// Lets a guest cluster use the host cluster of one before it.
    ///
    /// # Panics
    /// If that does not come before it; when built, if it holds no data.
    #[must_use]
    pub fn shared(mut self, cluster: u64, with: u64) -> Self {
        assert!(with < cluster, "what is shared comes first");
        self.clusters.insert(cluster, Content::Shared(with));
        self
    }

    /// Puts bytes into a guest cluster that had data or nothing when the snapshots were made.
    /// Needs snapshots with [tables of their own](SnapshotTables::Own).
    #[must_use]
    pub fn since(mut self, cluster: u64, bytes: &[u8]) -> Self {
        self.since.insert(cluster, Content::Data(bytes.into()));
        self
    }

    /// Gives a guest cluster a subcluster bitmap other than "all data" or "all zero".
    #[must_use]
    pub fn subclusters(mut self, cluster: u64, bitmap: u64) -> Self {
        self.subclusters.insert(cluster, bitmap);
        self
    }

    /// Adds an internal snapshot that shares everything with the active disk.
    #[must_use]
    pub fn snapshot(self, name: &str) -> Self {
        self.snapshot_with(name, SnapshotTables::Shared)
    }

    /// Adds an internal snapshot, with tables as told.
    #[must_use]
    pub fn snapshot_with(mut self, name: &str, tables: SnapshotTables) -> Self {
        self.snapshots.push((name.into(), tables));
        self
    }

    /// Changes the words of a guest cluster's L2 entry at the very end (the second is 0 with
    /// standard entries, and not written).
    #[must_use]
    pub fn change_l2(mut self, cluster: u64, change: WordChange) -> Self {
        self.l2_changes.push((cluster, change));
        self
    }

    /// Changes the (first) word of an L1 entry at the very end.
    #[must_use]
    pub fn change_l1(mut self, index: u64, change: WordChange) -> Self {
        self.l1_changes.push((index, change));
        self
    }

    /// Overrides the refcount of a host cluster.
    #[must_use]
    pub fn refcount(mut self, host_cluster: u64, value: u64) -> Self {
        self.refcounts.insert(host_cluster, value);
        self
    }

    /// Overrides bytes of the file at the very end: a header field, a table entry, anything.
    #[must_use]
    pub fn patch(mut self, offset: usize, bytes: &[u8]) -> Self {
        self.fields.push((offset, bytes.into()));
        self
    }

    /// Makes the image.
    #[must_use]
    pub fn build(&self) -> Built {
        Layout::of(self).finish()
    }

    pub(super) const fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(super) const fn entry_bytes(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    pub(super) const fn l2_entries(&self) -> u64 {
        self.cluster_bytes() / self.entry_bytes()
    }
}
