//! Copied flags held against the refcounts on disk: set means that the refcount is exactly one.
//!
//! Only the active tables count (B.4). The walk has marked every cluster with what its entries
//! say, and the comparison has looked at the marks; this pass names the entries, so it runs only
//! where something is suspect.

use futures_util::StreamExt;
use futures_util::stream;

use super::finding::FindingKind;
use super::l2::Meaning;
use super::refcounts::RefcountReader;
use super::survey::Survey;
use super::tables::{batches, read_batch};
use super::walk::READS_IN_FLIGHT;
use super::{Listener, Phase};
use crate::qcow2::format::{EntryWidth, L1Entry, L2Entry, SubclusterBitmap};
use crate::storage::Storage;
use crate::units::HostOffset;

/// Returns the entries of a table that are not all zeros, with their indices.
pub(crate) fn entries(
    bytes: &[u8],
    width: EntryWidth,
) -> impl Iterator<Item = (u64, L2Entry)> + '_ {
    bytes.chunks_exact(width.bytes() as usize).enumerate().filter_map(|(index, bytes)| {
        let words = bytes.as_chunks::<8>().0;
        let word = u64::from_be_bytes(*words.first()?);
        let second = words.get(1).map_or(0, |word| u64::from_be_bytes(*word));
        let entry = L2Entry { word, subclusters: SubclusterBitmap(second) };
        (entry != L2Entry::UNALLOCATED).then_some((index as u64, entry))
    })
}

impl Survey {
    pub(super) async fn check_flags<S: Storage>(&mut self, storage: &S, listener: Listener<'_>) {
        if !self.flags_suspect {
            return;
        }
        let before = self.report.corruptions;
        let refcounts = self.refcounts.clone();
        let mut reader = RefcountReader::new(storage, &refcounts);
        self.check_l1_flags(&mut reader).await;
        let tables = std::mem::replace(&mut self.tables, super::tables::Tables::new(0));
        let cluster_bytes = self.geometry.cluster_bytes();
        let total = tables.iter_active().count() as u64;
        let mut reads = stream::iter(batches(tables.iter_active(), cluster_bytes))
            .map(|batch| read_batch(storage, batch, cluster_bytes))
            .buffered(READS_IN_FLIGHT);
        let mut done = 0;
        while let Some(batch) = reads.next().await {
            done += batch.len() as u64;
            for (cluster, uses, table) in batch {
                // What cannot be read was counted by the walk.
                let Ok(bytes) = table else { continue };
                self.check_table_flags(&mut reader, self.host(cluster), &bytes, uses.active).await;
            }
            Self::tell(listener, Phase::Copied, done, total);
        }
        drop(reads);
        for (at, uses) in tables.unaligned().filter(|(_, uses)| uses.active > 0) {
            let bytes = super::read::read_bytes(storage, at, cluster_bytes as usize).await;
            if let Ok(bytes) = bytes {
                self.check_table_flags(&mut reader, at, &bytes, uses.active).await;
            }
        }
        self.tables = tables;
        self.wrong_flags = self.report.corruptions - before;
    }

    async fn check_l1_flags<S: Storage>(&mut self, reader: &mut RefcountReader<'_, S>) {
        for index in 0..self.l1.len() {
            let entry = L1Entry(self.l1[index]);
            let Some(table) = entry.table() else { continue };
            // A refcount that cannot be read was counted by the comparison.
            let Ok(refcount) = reader.read(self.geometry.host_cluster(table).0).await else {
                continue;
            };
            if (refcount == 1) != entry.is_copied() {
                let (index, entry) = (index as u64, entry.0);
                self.report.record(FindingKind::CopiedTable { index, entry, refcount }, 1);
            }
        }
    }

    async fn check_table_flags<S: Storage>(
        &mut self,
        reader: &mut RefcountReader<'_, S>,
        table: HostOffset,
        bytes: &[u8],
        times: u64,
    ) {
        for (index, entry) in entries(bytes, self.geometry.entry_width()) {
            let Meaning::Allocated(host) = self.meaning(entry) else { continue };
            let refcount = match self.has_data_file() {
                true => 1,
                false => match reader.read(self.geometry.host_cluster(host).0).await {
                    Ok(refcount) => refcount,
                    Err(_) => continue,
                },
            };
            if (refcount == 1) != entry.is_copied() {
                let entry = entry.word;
                let kind = FindingKind::CopiedData { table, index, entry, refcount };
                self.report.record(kind, times);
            }
        }
    }
}
