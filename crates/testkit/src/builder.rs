//! qcow2 images made byte by byte, right or wrong on purpose.
//!
//! * Always: refcounts, COPIED flags and tables agree unless something was overridden.
//! * Never: the engine's own encoder; this is the second opinion (qcow2: B.1 to B.9).

use std::collections::BTreeMap;

use crate::SparseBytes;

const COPIED: u64 = 1 << 63;

/// Where things lie in an image that was built.
///
/// ```
/// let built = testkit::ImageBuilder::new(3, 16, 1 << 20).data(0, b"guest").build();
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
}

#[derive(Clone, Debug)]
enum Content {
    Data(Vec<u8>),
    Zero,
    ReservedZero(Vec<u8>),
    Compressed(Vec<u8>),
}

/// Collects what an image is to hold.
///
/// ```
/// // A cluster whose L2 entry has a reserved bit set.
/// let image = testkit::ImageBuilder::new(3, 16, 1 << 20)
///     .data(0, &[7; 512])
///     .change_l2(0, |words| words[0] |= 1 << 56)
///     .build();
/// assert_eq!(image.bytes.read_vec(0, 4), b"QFI\xfb");
/// ```
#[derive(Clone)]
pub struct ImageBuilder {
    version: u32,
    cluster_bits: u32,
    size_bytes: u64,
    refcount_order: u32,
    features: [u64; 3],
    compression: u8,
    extended: bool,
    snapshots: Vec<String>,
    extensions: Vec<(u32, Vec<u8>)>,
    backing: Option<Vec<u8>>,
    clusters: BTreeMap<u64, Content>,
    subclusters: BTreeMap<u64, u64>,
    l2_changes: Vec<(u64, WordChange)>,
    l1_changes: Vec<(u64, WordChange)>,
    refcounts: BTreeMap<u64, u64>,
    fields: Vec<(usize, Vec<u8>)>,
}

type WordChange = fn(&mut [u64; 2]);

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
            snapshots: Vec::new(),
            extensions: Vec::new(),
            backing: None,
            clusters: BTreeMap::new(),
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

    /// Gives a guest cluster a subcluster bitmap other than "all data" or "all zero".
    #[must_use]
    pub fn subclusters(mut self, cluster: u64, bitmap: u64) -> Self {
        self.subclusters.insert(cluster, bitmap);
        self
    }

    /// Adds an internal snapshot that shares everything with the active disk.
    #[must_use]
    pub fn snapshot(mut self, name: &str) -> Self {
        self.snapshots.push(name.into());
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

    const fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    const fn entry_bytes(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    const fn l2_entries(&self) -> u64 {
        self.cluster_bytes() / self.entry_bytes()
    }
}

/// An image half-way: places are given from the front, uses are counted.
struct Layout<'a> {
    plan: &'a ImageBuilder,
    built: Built,
    next_cluster: u64,
    /// End of the last compressed stream.
    packed: u64,
    counts: BTreeMap<u64, u64>,
    entries: BTreeMap<u64, [u64; 2]>,
    l1_entries: u64,
}

impl<'a> Layout<'a> {
    fn of(plan: &'a ImageBuilder) -> Self {
        let clusters = plan.size_bytes.div_ceil(plan.cluster_bytes());
        let mut layout = Self {
            plan,
            built: Built::default(),
            next_cluster: 0,
            packed: 0,
            counts: BTreeMap::new(),
            entries: BTreeMap::new(),
            l1_entries: clusters.div_ceil(plan.l2_entries()),
        };
        layout.take(1);
        layout.built.l1 = layout.take((layout.l1_entries * 8).div_ceil(plan.cluster_bytes()));
        layout.place_clusters();
        layout.place_snapshots();
        layout
    }

    /// Takes `clusters` clusters (0 takes none) with refcount 1; returns their offset.
    fn take(&mut self, clusters: u64) -> u64 {
        let first = self.next_cluster;
        self.next_cluster += clusters;
        (first..self.next_cluster).for_each(|cluster| {
            self.counts.insert(cluster, 1);
        });
        first << self.plan.cluster_bits
    }

    fn place_clusters(&mut self) {
        for (cluster, content) in &self.plan.clusters {
            let index = cluster / self.plan.l2_entries();
            if !self.built.l2.contains_key(&index) {
                let table = self.take(1);
                self.built.l2.insert(index, table);
            }
            let words = self.place(*cluster, content);
            self.entries.insert(*cluster, words);
        }
    }

    fn place(&mut self, cluster: u64, content: &Content) -> [u64; 2] {
        let bitmap = |all| self.plan.subclusters.get(&cluster).copied().unwrap_or(all);
        let (data, zero) = match self.plan.extended {
            true => (bitmap(0xffff_ffff), bitmap(0xffff_ffff << 32)),
            false => (0, 0),
        };
        let flag = u64::from(!self.plan.extended);
        match content {
            Content::Zero => [flag, zero],
            Content::Data(bytes) => [self.store(cluster, bytes) | COPIED, data],
            Content::ReservedZero(stale) => [self.store(cluster, stale) | COPIED | flag, zero],
            Content::Compressed(stream) => [self.pack(cluster, stream), 0],
        }
    }

    fn store(&mut self, cluster: u64, bytes: &[u8]) -> u64 {
        assert!(bytes.len() as u64 <= self.plan.cluster_bytes(), "at most a cluster");
        let host = self.take(1);
        self.built.bytes.write(host, bytes);
        self.built.data.insert(cluster, host);
        host
    }

    /// Puts a stream behind the last one where that ended inside of a cluster.
    fn pack(&mut self, cluster: u64, stream: &[u8]) -> u64 {
        let bytes = self.plan.cluster_bytes();
        let len = (stream.len() as u64).max(1);
        let room = self.packed.next_multiple_of(bytes) - self.packed;
        let start = if room >= len { self.packed } else { self.take(len.div_ceil(bytes)) };
        self.packed = start + len;
        self.built.bytes.write(start, stream);
        self.built.data.insert(cluster, start);
        let sectors = (start + len - 1) / 512 - start / 512;
        for host in start / bytes..(start + len).div_ceil(bytes) {
            *self.counts.entry(host).or_insert(0) += 1;
        }
        if room < len {
            // `take` has counted once already.
            (start / bytes..(start + len).div_ceil(bytes)).for_each(|host| {
                *self.counts.entry(host).or_insert(1) -= 1;
            });
        }
        1 << 62 | sectors << (62 - (self.plan.cluster_bits - 8)) | start
    }

    /// Snapshots share all L2 tables, so each adds one to everything and takes COPIED away.
    fn place_snapshots(&mut self) {
        let count = self.plan.snapshots.len() as u64;
        let (tables, mut l1_offsets) = (self.built.l2.clone(), Vec::new());
        for _ in 0..count {
            l1_offsets.push(self.take((self.l1_entries * 8).div_ceil(self.plan.cluster_bytes())));
        }
        if count == 0 {
            return;
        }
        for table in tables.values() {
            *self.counts.entry(table >> self.plan.cluster_bits).or_insert(0) += count;
        }
        for words in self.entries.values_mut() {
            words[0] &= !COPIED;
        }
        self.count_shared(count);
        let mut table = Vec::new();
        for (index, (name, l1)) in self.plan.snapshots.iter().zip(&l1_offsets).enumerate() {
            for (entry, l2) in &tables {
                self.built.bytes.write(l1 + entry * 8, &l2.to_be_bytes());
            }
            self.snapshot_entry(&mut table, index as u64 + 1, name, *l1);
        }
        let clusters = (table.len() as u64).div_ceil(self.plan.cluster_bytes());
        self.built.snapshot_table = self.take(clusters);
        self.built.bytes.write(self.built.snapshot_table, &table);
    }

    /// Data clusters gain one reference per snapshot; compressed runs in each cluster they touch.
    fn count_shared(&mut self, count: u64) {
        let bits = self.plan.cluster_bits;
        for (cluster, words) in &self.entries {
            let Some(host) = self.built.data.get(cluster) else { continue };
            let len = match words[0] >> 62 & 1 {
                1 => ((words[0] & !(3 << 62)) >> (62 - (bits - 8))) * 512 + 512 - host % 512,
                _ => 1,
            };
            for host in host >> bits..=(host + len - 1) >> bits {
                *self.counts.entry(host).or_insert(0) += count;
            }
        }
    }

    fn snapshot_entry(&self, table: &mut Vec<u8>, id: u64, name: &str, l1: u64) {
        let id = id.to_string();
        table.extend(l1.to_be_bytes());
        table.extend((self.l1_entries as u32).to_be_bytes());
        table.extend((id.len() as u16).to_be_bytes());
        table.extend((name.len() as u16).to_be_bytes());
        table.extend([0; 20]);
        table.extend(24_u32.to_be_bytes());
        table.extend(0_u64.to_be_bytes());
        table.extend(self.plan.size_bytes.to_be_bytes());
        table.extend(u64::MAX.to_be_bytes());
        table.extend(id.as_bytes());
        table.extend(name.as_bytes());
        table.resize(table.len().next_multiple_of(8), 0);
    }

    fn finish(mut self) -> Built {
        self.place_refcounts();
        self.write_tables();
        self.write_header();
        for (offset, bytes) in &self.plan.fields {
            self.built.bytes.write(*offset as u64, bytes);
        }
        let end = self.next_cluster << self.plan.cluster_bits;
        self.built.bytes.set_len(self.built.bytes.len().max(end));
        self.built
    }

    /// Takes as many blocks as count everything, the blocks and their table included.
    fn place_refcounts(&mut self) {
        let per_block = (self.plan.cluster_bytes() * 8) >> self.plan.refcount_order;
        let (mut blocks, mut tables) = (1, 1);
        while (self.next_cluster + blocks + tables).div_ceil(per_block) > blocks {
            blocks += 1;
            tables = (blocks * 8).div_ceil(self.plan.cluster_bytes());
        }
        self.built.refcount_table = self.take(tables);
        for index in 0..blocks {
            let block = self.take(1);
            self.built.refcount_blocks.push(block);
            self.built.bytes.write(self.built.refcount_table + index * 8, &block.to_be_bytes());
        }
        self.counts.extend(&self.plan.refcounts);
        for (cluster, count) in std::mem::take(&mut self.counts) {
            let block = self.built.refcount_blocks.get((cluster / per_block) as usize);
            if let Some(block) = block.copied() {
                self.write_refcount(block, cluster % per_block, count);
            }
        }
    }

    /// Widths below a byte are packed from the lowest bit up, others are big-endian (B.8).
    fn write_refcount(&mut self, block: u64, index: u64, count: u64) {
        let order = self.plan.refcount_order;
        if order < 3 {
            let (at, shift) = (block + (index << order) / 8, (index << order) % 8);
            let old = self.built.bytes.read_vec(at, 1)[0];
            self.built.bytes.write(at, &[old | (count << shift) as u8]);
            return;
        }
        let width = 1 << (order - 3);
        let bytes = count.to_be_bytes();
        self.built.bytes.write(block + index * width, &bytes[8 - width as usize..]);
    }

    fn write_tables(&mut self) {
        let shared = !self.plan.snapshots.is_empty();
        let mut l1: BTreeMap<u64, [u64; 2]> = BTreeMap::new();
        for (index, table) in &self.built.l2 {
            l1.insert(*index, [if shared { *table } else { table | COPIED }, 0]);
        }
        for (index, change) in &self.plan.l1_changes {
            change(l1.entry(*index).or_default());
        }
        for (index, words) in l1 {
            self.built.bytes.write(self.built.l1 + index * 8, &words[0].to_be_bytes());
        }
        for (cluster, change) in &self.plan.l2_changes {
            change(self.entries.entry(*cluster).or_default());
        }
        let (per_table, width) = (self.plan.l2_entries(), self.plan.entry_bytes());
        for (cluster, words) in &self.entries {
            let table = self.built.l2.get(&(cluster / per_table));
            let table = table.expect("only entries of tables that exist can be changed");
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
            let at = table + cluster % per_table * width;
            self.built.bytes.write(at, &bytes[..width as usize]);
        }
    }

    fn write_header(&mut self) {
        let plan = self.plan;
        let mut header = b"QFI\xfb".to_vec();
        let tables = self.built.refcount_blocks.len() as u64 * 8;
        let tables = tables.div_ceil(plan.cluster_bytes()) as u32;
        header.extend(plan.version.to_be_bytes());
        header.extend([0; 12]);
        header.extend(plan.cluster_bits.to_be_bytes());
        header.extend(plan.size_bytes.to_be_bytes());
        header.extend([0; 4]);
        header.extend((self.l1_entries as u32).to_be_bytes());
        header.extend(self.built.l1.to_be_bytes());
        header.extend(self.built.refcount_table.to_be_bytes());
        header.extend(tables.to_be_bytes());
        header.extend((plan.snapshots.len() as u32).to_be_bytes());
        header.extend(self.built.snapshot_table.to_be_bytes());
        if plan.version >= 3 {
            plan.features.iter().for_each(|word| header.extend(word.to_be_bytes()));
            header.extend(plan.refcount_order.to_be_bytes());
            header.extend(112_u32.to_be_bytes());
            header.extend([plan.compression, 0, 0, 0, 0, 0, 0, 0]);
        }
        for (magic, data) in &plan.extensions {
            header.extend(magic.to_be_bytes());
            header.extend((data.len() as u32).to_be_bytes());
            header.extend(data);
            header.resize(header.len().next_multiple_of(8), 0);
        }
        header.extend([0; 8]);
        if let Some(name) = &plan.backing {
            let offset = header.len() as u64;
            header[8..16].copy_from_slice(&offset.to_be_bytes());
            header[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
            header.extend(name);
        }
        assert!(header.len() as u64 <= plan.cluster_bytes(), "the header fits its cluster");
        self.built.bytes.write(0, &header);
    }
}
