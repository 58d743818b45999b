//! Gives everything in an image its place, from the front, and counts its uses.

use std::collections::BTreeMap;

use super::builder::{Built, Content, ImageBuilder, SnapshotTables};

const COPIED: u64 = 1 << 63;
const BITMAPS: u32 = 0x2385_2875;

/// An image half-way: places are given from the front, uses are counted.
pub(super) struct Layout<'a> {
    plan: &'a ImageBuilder,
    built: Built,
    next_cluster: u64,
    /// End of the last compressed stream.
    packed: u64,
    counts: BTreeMap<u64, u64>,
    entries: BTreeMap<u64, [u64; 2]>,
    l1_entries: u64,
    /// Header extensions that point to what was placed.
    extensions: Vec<(u32, Vec<u8>)>,
}

impl<'a> Layout<'a> {
    pub(super) fn of(plan: &'a ImageBuilder) -> Self {
        let clusters = plan.size_bytes.div_ceil(plan.cluster_bytes());
        let mut layout = Self {
            plan,
            built: Built {
                data_file: plan.has_data_file.then(Default::default),
                ..Built::default()
            },
            next_cluster: 0,
            packed: 0,
            counts: BTreeMap::new(),
            entries: BTreeMap::new(),
            extensions: Vec::new(),
            l1_entries: plan.l1_entries.unwrap_or(0).max(clusters.div_ceil(plan.l2_entries())),
        };
        layout.take(1);
        layout.built.l1 = layout.take((layout.l1_entries * 8).div_ceil(plan.cluster_bytes()));
        layout.place_clusters();
        layout.place_snapshots();
        layout.place_bitmaps();
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
            self.take_table(index);
            let words = self.place(*cluster, content);
            self.entries.insert(*cluster, words);
        }
    }

    fn take_table(&mut self, index: u64) {
        if !self.built.l2.contains_key(&index) {
            let table = self.take(1);
            self.built.l2.insert(index, table);
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
            Content::Shared(with) => self.share(cluster, *with),
        }
    }

    /// One more entry for a host cluster: whoever has it writes elsewhere from now on.
    fn share(&mut self, cluster: u64, with: u64) -> [u64; 2] {
        let host = *self.built.data.get(&with).expect("what is shared has data");
        *self.counts.entry(host >> self.plan.cluster_bits).or_insert(0) += 1;
        self.built.data.insert(cluster, host);
        let words = self.entries.get_mut(&with).expect("it was placed before");
        words[0] &= !COPIED;
        *words
    }

    fn store(&mut self, cluster: u64, bytes: &[u8]) -> u64 {
        assert!(bytes.len() as u64 <= self.plan.cluster_bytes(), "at most a cluster");
        if let Some(file) = &mut self.built.data_file {
            let host = cluster << self.plan.cluster_bits;
            file.write(host, bytes);
            return host;
        }
        let host = self.take(1);
        self.built.bytes.write(host, bytes);
        self.built.data.insert(cluster, host);
        host
    }

    /// Puts a stream behind the last one, where that ended inside of a cluster that has room or is the
    /// last one.
    fn pack(&mut self, cluster: u64, stream: &[u8]) -> u64 {
        let bytes = self.plan.cluster_bytes();
        let len = (stream.len() as u64).max(1);
        let end = self.packed.next_multiple_of(bytes);
        let is_last = end == self.next_cluster << self.plan.cluster_bits;
        let goes_on =
            end - self.packed >= len || self.plan.is_dense && is_last && end > self.packed;
        let start = if goes_on { self.packed } else { self.next_cluster << self.plan.cluster_bits };
        let clusters = start / bytes..(start + len).div_ceil(bytes);
        self.next_cluster = self.next_cluster.max(clusters.end);
        for host in clusters {
            *self.counts.entry(host).or_insert(0) += 1;
        }
        self.packed = start + len;
        self.built.bytes.write(start, stream);
        self.built.data.insert(cluster, start);
        let sectors = (start + len - 1) / 512 - start / 512;
        1 << 62 | sectors << (62 - (self.plan.cluster_bits - 8)) | start
    }

    /// Each snapshot adds one to all clusters, and to the tables that it shares, and takes COPIED away.
    fn place_snapshots(&mut self) {
        let count = self.plan.snapshots.len() as u64;
        let l1_clusters = (self.l1_entries * 8).div_ceil(self.plan.cluster_bytes());
        let l1_offsets: Vec<u64> = (0..count).map(|_| self.take(l1_clusters)).collect();
        if count == 0 {
            return;
        }
        for words in self.entries.values_mut() {
            words[0] &= !COPIED;
        }
        self.count_shared(count);
        let mut table = Vec::new();
        for (index, ((name, kind), l1)) in self.plan.snapshots.iter().zip(&l1_offsets).enumerate() {
            for (entry, l2) in self.snapshot_tables(*kind) {
                self.built.bytes.write(l1 + entry * 8, &l2.to_be_bytes());
            }
            self.snapshot_entry(&mut table, index as u64 + 1, name, *l1);
        }
        let clusters = (table.len() as u64).div_ceil(self.plan.cluster_bytes());
        self.built.snapshot_table = self.take(clusters);
        self.built.bytes.write(self.built.snapshot_table, &table);
        for (cluster, content) in &self.plan.since {
            self.place_since(*cluster, content);
        }
    }

    /// Returns the L2 tables of a snapshot by L1 index: those of the disk, or copies.
    fn snapshot_tables(&mut self, kind: SnapshotTables) -> BTreeMap<u64, u64> {
        let shared = self.built.l2.clone();
        if kind == SnapshotTables::Shared {
            for table in shared.values() {
                *self.counts.entry(table >> self.plan.cluster_bits).or_insert(0) += 1;
            }
            return shared;
        }
        let copies: BTreeMap<u64, u64> =
            shared.into_keys().map(|index| (index, self.take(1))).collect();
        self.write_entries(&copies);
        copies
    }

    /// Puts new data into the disk: the snapshots keep the old cluster.
    fn place_since(&mut self, cluster: u64, content: &Content) {
        let is_apart = self.plan.snapshots.iter().all(|(_, kind)| *kind == SnapshotTables::Own);
        assert!(is_apart, "the disk has tables of its own");
        self.take_table(cluster / self.plan.l2_entries());
        if let Some(old) = self.built.data.get(&cluster) {
            *self.counts.entry(old >> self.plan.cluster_bits).or_insert(1) -= 1;
        }
        let words = self.place(cluster, content);
        self.entries.insert(cluster, words);
    }

    /// A directory of one cluster, and a table of one cluster for each bitmap, which says "all zeros".
    fn place_bitmaps(&mut self) {
        if self.plan.bitmaps.is_empty() {
            return;
        }
        self.built.bitmap_directory = self.take(1);
        let mut directory = Vec::new();
        for bitmap in &self.plan.bitmaps {
            let table = self.take(1);
            let covered = (self.plan.cluster_bytes() * 8) << bitmap.granularity_bits;
            directory.extend(table.to_be_bytes());
            directory.extend((self.plan.size_bytes.div_ceil(covered) as u32).to_be_bytes());
            directory.extend(bitmap.flags.to_be_bytes());
            directory.extend([1, bitmap.granularity_bits]);
            directory.extend((bitmap.name.len() as u16).to_be_bytes());
            directory.extend([0; 4]);
            directory.extend(bitmap.name.as_bytes());
            directory.resize(directory.len().next_multiple_of(8), 0);
        }
        self.built.bytes.write(self.built.bitmap_directory, &directory);
        let mut extension = (self.plan.bitmaps.len() as u32).to_be_bytes().to_vec();
        extension.extend([0; 4]);
        extension.extend((directory.len() as u64).to_be_bytes());
        extension.extend(self.built.bitmap_directory.to_be_bytes());
        self.extensions.push((BITMAPS, extension));
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

    pub(super) fn finish(mut self) -> Built {
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
        let is_shared = |(_, kind): &(String, SnapshotTables)| *kind == SnapshotTables::Shared;
        let shared = self.plan.snapshots.iter().any(is_shared);
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
        self.write_entries(&self.built.l2.clone());
    }

    /// Writes the entries as they are now into these L2 tables.
    fn write_entries(&mut self, tables: &BTreeMap<u64, u64>) {
        let (per_table, width) = (self.plan.l2_entries(), self.plan.entry_bytes());
        for (cluster, words) in &self.entries {
            let table = tables.get(&(cluster / per_table));
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
            header.extend(plan.header_bytes.to_be_bytes());
            header.push(plan.compression);
            header.resize(plan.header_bytes as usize, 0);
        }
        for (magic, data) in plan.extensions.iter().chain(&self.extensions) {
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
