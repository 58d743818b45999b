//! Finding what lies in the way, and every pointer to it, by a walk of the tables.

use std::collections::HashMap;

use foldhash::fast::RandomState;
use futures_util::StreamExt;
use futures_util::stream;

use super::bits::Bits;
use super::moves::{Load, Move, Pointer};
use super::structures::{Kind, Structures};
use crate::Result;
use crate::qcow2::check::copied::entries;
use crate::qcow2::check::read::read_words;
use crate::qcow2::check::tables::{Uses, batches, read_batch};
use crate::qcow2::format::{
    BitmapCluster, BitmapTableEntry, Geometry, L1Entry, L2Entry, OFFSET_MASK,
};
use crate::storage::Storage;
use crate::units::{HostOffset, HostRange};

/// Batches of tables in flight.
const READS_IN_FLIGHT: usize = 8;

/// What was found so far.
pub(super) struct Collector<'a> {
    geometry: Geometry,
    sources: &'a Bits,
    ranks: HashMap<u64, u32, RandomState>,
    pub(super) load: Load,
}

impl<'a> Collector<'a> {
    pub(super) fn new(geometry: Geometry, sources: &'a Bits) -> Self {
        Self { geometry, sources, ranks: HashMap::default(), load: Load::default() }
    }

    /// Finds data and compressed streams: L2 tables and bitmap tables point to them.
    pub(super) async fn data<S: Storage>(
        &mut self,
        storage: &S,
        structures: &Structures,
    ) -> Result<()> {
        let cluster_bytes = self.geometry.cluster_bytes();
        let uses = |(cluster, times): (&u64, &u64)| (*cluster, Uses { active: 0, total: *times });
        let mut reads = stream::iter(batches(structures.l2.iter().map(uses), cluster_bytes))
            .map(|batch| read_batch(storage, batch, cluster_bytes))
            .buffered(READS_IN_FLIGHT);
        let width = self.geometry.entry_width();
        while let Some(batch) = reads.next().await {
            for (cluster, uses, table) in batch {
                for (index, entry) in entries(&table?, width) {
                    let at = HostOffset(cluster * cluster_bytes + index * width.bytes());
                    self.entry(at, entry, uses.total);
                }
            }
        }
        for table in structures.of(Kind::Bitmap) {
            let times = table.pointers.len() as u64;
            let words = read_words(storage, table.range.start, table.range.len / 8).await?;
            for (index, word) in (0..).zip(words) {
                if let BitmapCluster::Data(host) = BitmapTableEntry(word).cluster() {
                    self.cluster(table.range.start + index * 8, host, times);
                }
            }
        }
        Ok(())
    }

    /// Finds L2 tables: L1 tables point to them.
    pub(super) async fn l2_tables<S: Storage>(
        &mut self,
        storage: &S,
        structures: &Structures,
    ) -> Result<()> {
        for l1 in structures.of(Kind::L1) {
            let times = l1.pointers.len() as u64;
            let words = read_words(storage, l1.range.start, l1.range.len / 8).await?;
            for (index, word) in (0..).zip(words) {
                if let Some(table) = L1Entry(word).table() {
                    self.cluster(l1.range.start + index * 8, table, times);
                }
            }
        }
        Ok(())
    }

    fn entry(&mut self, at: HostOffset, entry: L2Entry, times: u64) {
        if let Some(run) = entry.compressed_run(&self.geometry) {
            self.stream(at, entry.word, run.range(), times);
        } else if let Some(host) = entry.host() {
            self.cluster(at, host, times);
        }
    }

    /// Notes a pointer to a whole cluster.
    pub(super) fn cluster(&mut self, at: HostOffset, host: HostOffset, times: u64) {
        if self.sources.contains(self.geometry.host_cluster(host).0) {
            let from = HostRange::new(host, self.geometry.cluster_bytes());
            let len = from.len;
            let found =
                Move { from, to: None, len, old: host.0, new: 0, mask: OFFSET_MASK, weight: 0 };
            self.note(at, found, times);
        }
    }

    fn stream(&mut self, at: HostOffset, word: u64, from: HostRange, times: u64) {
        if self.geometry.host_clusters(from).any(|cluster| self.sources.contains(cluster)) {
            let len = from.len;
            let found = Move { from, to: None, len, old: word, new: 0, mask: !0, weight: 0 };
            self.note(at, found, times);
        }
    }

    /// Adds a pointer to what was found before, or for the first time. Compressed clusters are told
    /// apart by their bit, which no offset has.
    fn note(&mut self, at: HostOffset, found: Move, times: u64) {
        let next = self.load.moves.len() as u32;
        let rank = *self.ranks.entry(found.old).or_insert(next);
        if rank == next {
            self.load.moves.push(found);
        }
        self.load.moves[rank as usize].weight += times;
        self.load.pointers.push(Pointer { rank, at });
    }
}
