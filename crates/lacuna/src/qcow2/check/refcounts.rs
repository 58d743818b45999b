//! The refcounts on disk: the table, its blocks, and what is wrong with where they lie (B.8).

use foldhash::fast::RandomState;
use std::collections::HashMap;

use super::finding::FindingKind;
use super::read::{read_bytes, read_words};
use super::survey::Survey;
use crate::buffer::Buffer;
use crate::qcow2::format::{Geometry, MAX_REFCOUNT_TABLE_BYTES, RefcountTableEntry, RefcountWidth};
use crate::storage::Storage;
use crate::units::{HostOffset, HostRange};
use crate::{Error, Result};

/// Bytes of refcount blocks that are kept for looking up single refcounts.
const CACHE_BYTES: u64 = 16 << 20;

/// Where the refcounts of a range of clusters are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Block {
    /// No block: all its refcounts are zero.
    Absent,
    At(HostOffset),
    /// Past the end of the file: all its refcounts are zero, as far as they can be read.
    Outside(HostOffset),
    /// The offset is not aligned, or one that no file has.
    Unusable(HostOffset),
}

/// The refcount table.
#[derive(Clone, Debug)]
pub(crate) struct RefcountTable {
    geometry: Geometry,
    pub(crate) width: RefcountWidth,
    pub(crate) entries: Vec<u64>,
    file_bytes: u64,
}

impl RefcountTable {
    /// Takes the entries of a table whose blocks lie in a file of this length.
    pub(crate) const fn new(geometry: Geometry, entries: Vec<u64>, file_bytes: u64) -> Self {
        Self { geometry, width: RefcountWidth::of(&geometry), entries, file_bytes }
    }

    pub(crate) const fn empty(geometry: Geometry) -> Self {
        Self::new(geometry, Vec::new(), 0)
    }

    /// Returns an entry; behind the end of the table there is no block.
    pub(crate) fn entry(&self, index: u64) -> RefcountTableEntry {
        let entry = usize::try_from(index).ok().and_then(|index| self.entries.get(index));
        RefcountTableEntry(entry.copied().unwrap_or(0))
    }

    pub(crate) fn block(&self, index: u64) -> Block {
        match self.entry(index).block() {
            None => Block::Absent,
            Some(offset) if !self.geometry.is_aligned(offset.0) || offset.0 > i64::MAX as u64 => {
                Block::Unusable(offset)
            }
            Some(offset) if offset.0 >= self.file_bytes => Block::Outside(offset),
            Some(offset) => Block::At(offset),
        }
    }
}

impl Survey {
    pub(super) async fn walk_refcounts<S: Storage>(&mut self, storage: &S) {
        let table = self.header.refcount_table;
        let bytes = u64::from(table.clusters) << self.geometry.cluster_bits();
        let is_usable = table.offset.0 != 0
            && self.geometry.is_aligned(table.offset.0)
            && (1..=MAX_REFCOUNT_TABLE_BYTES).contains(&bytes);
        if !is_usable {
            self.needs_rebuild = true;
            let at = table.offset;
            self.record_refcount(FindingKind::RefcountTableUnusable { at, bytes });
            return;
        }
        self.refer_refcounts(HostRange::new(table.offset, bytes));
        match read_words(storage, table.offset, bytes / 8).await {
            Ok(entries) => {
                self.refcounts = RefcountTable::new(self.geometry, entries, self.file_bytes);
            }
            Err(error) => self.note_unreadable(table.offset, 0, &error, 1),
        }
        for index in 0..self.refcounts.entries.len() {
            let entry = self.refcounts.entries[index];
            if entry != 0 {
                self.count_block(index as u64, entry);
            }
        }
    }

    fn refer_refcounts(&mut self, region: HostRange) {
        if !self.refer_metadata(region) {
            return;
        }
        let first = self.geometry.host_cluster(region.start).0;
        let clusters = first..first + self.geometry.clusters_for(region.len);
        self.refcount_clusters.extend(clusters.filter_map(|cluster| u32::try_from(cluster).ok()));
    }

    fn count_block(&mut self, index: u64, entry: u64) {
        if RefcountTableEntry(entry).has_reserved_bits() {
            self.needs_rebuild = true;
            self.record_refcount(FindingKind::RefcountTableReserved { index, entry });
            return;
        }
        match self.refcounts.block(index) {
            Block::Absent => {}
            Block::Unusable(offset) if !self.geometry.is_aligned(offset.0) => {
                self.needs_rebuild = true;
                self.record_refcount(FindingKind::RefcountBlockUnaligned { index, offset });
            }
            Block::Outside(offset) | Block::Unusable(offset) => {
                self.needs_rebuild = true;
                self.record_refcount(FindingKind::RefcountBlockOutside { index, offset });
            }
            Block::At(offset) => self.count_usable_block(index, offset),
        }
    }

    fn count_usable_block(&mut self, index: u64, offset: HostOffset) {
        self.refer_refcounts(HostRange::new(offset, self.geometry.cluster_bytes()));
        let cluster = self.geometry.host_cluster(offset).0;
        let references = self.references.count(cluster);
        if references != 1 {
            self.needs_rebuild = true;
            let kind = FindingKind::RefcountBlockShared { index, offset, references };
            self.record_refcount(kind);
        }
        // Something that goes on past the end of the file claims the place too: it was not counted.
        self.needs_rebuild |= self.metadata.count(cluster) > 1;
    }
}

/// Refcounts of single clusters, read through a small cache of blocks.
pub(crate) struct RefcountReader<'a, S> {
    storage: &'a S,
    table: &'a RefcountTable,
    blocks: HashMap<u64, Buffer, RandomState>,
}

impl<'a, S: Storage> RefcountReader<'a, S> {
    pub(crate) fn new(storage: &'a S, table: &'a RefcountTable) -> Self {
        Self { storage, table, blocks: HashMap::default() }
    }

    /// Returns the refcount of a cluster; an error where its block cannot be used or read.
    pub(crate) async fn read(&mut self, cluster: u64) -> Result<u64> {
        let entries = self.table.geometry.refcount_block_entries();
        let (index, within) = (cluster / entries, (cluster % entries) as usize);
        if let Some(block) = self.blocks.get(&index) {
            return Ok(self.table.width.read(block, within));
        }
        let offset = match self.table.block(index) {
            Block::Absent | Block::Outside(_) => return Ok(0),
            Block::At(offset) => offset,
            Block::Unusable(offset) => {
                return Err(Error::corrupt(format!("Refcount block cannot lie at {offset}")));
            }
        };
        let cluster_bytes = self.table.geometry.cluster_bytes();
        let block = read_bytes(self.storage, offset, cluster_bytes as usize).await?;
        let refcount = self.table.width.read(&block, within);
        if self.blocks.len() as u64 >= (CACHE_BYTES / cluster_bytes).max(1) {
            self.blocks.clear();
        }
        self.blocks.insert(index, block);
        Ok(refcount)
    }
}
