//! Counting references: everything in the image that points to host clusters.
//!
//! The order of the parts is QEMU's, so that findings come in a familiar order: header, active
//! tables, snapshots, encryption header, bitmaps, refcounts.

use futures_util::StreamExt;
use futures_util::stream;

use super::finding::FindingKind;
use super::survey::Survey;
use super::tables::{Tables, batches, read_batch};
use super::{Listener, Phase};
use crate::storage::Storage;
use crate::units::{HostOffset, HostRange};

/// Batches of tables in flight: enough to keep a disk busy, at most 8 MiB (16 with the largest
/// clusters).
pub(crate) const READS_IN_FLIGHT: usize = 8;

impl Survey {
    pub(super) async fn walk<S: Storage>(&mut self, storage: &S, listener: Listener<'_>) {
        let first = HostRange::new(HostOffset(0), self.geometry.cluster_bytes());
        self.refer_metadata(first);
        self.walk_active_l1(storage).await;
        self.walk_snapshots(storage).await;
        self.walk_tables(storage, listener).await;
        if let Some(luks) = &self.header.extensions.encryption_header {
            self.refer_metadata(HostRange::new(luks.offset, luks.len_bytes));
        }
        self.walk_bitmaps(storage).await;
        self.walk_refcounts(storage).await;
    }

    /// Reads every L2 table once, in the order of the file.
    async fn walk_tables<S: Storage>(&mut self, storage: &S, listener: Listener<'_>) {
        let mut tables = std::mem::replace(&mut self.tables, Tables::new(0));
        tables.seal();
        let cluster_bytes = self.geometry.cluster_bytes();
        let total = tables.iter().count() as u64;
        let mut reads = stream::iter(batches(tables.iter(), cluster_bytes))
            .map(|batch| read_batch(storage, batch, cluster_bytes))
            .buffered(READS_IN_FLIGHT);
        let mut done = 0;
        while let Some(batch) = reads.next().await {
            done += batch.len() as u64;
            for (cluster, uses, table) in batch {
                let at = self.host(cluster);
                match table {
                    Ok(bytes) => self.count_table(at, &bytes, uses),
                    Err(error) => self.note_unreadable(at, 2, &error, uses.total),
                }
            }
            Self::tell(listener, Phase::Walk, done, total);
        }
        drop(reads);
        self.walk_unaligned(storage, &tables).await;
        self.tables = tables;
    }

    /// Reads the tables that do not start with a cluster. What they seem to point to is counted,
    /// which is the safe side: nothing of it is freed.
    async fn walk_unaligned<S: Storage>(&mut self, storage: &S, tables: &Tables) {
        let cluster_bytes = self.geometry.cluster_bytes();
        for (at, uses) in tables.unaligned() {
            match super::read::read_bytes(storage, at, cluster_bytes as usize).await {
                Ok(bytes) => self.count_table(at, &bytes, uses),
                Err(error) => self.note_unreadable(at, 2, &error, uses.total),
            }
        }
    }

    pub(super) fn note_unreadable(
        &mut self,
        at: HostOffset,
        level: u8,
        error: &crate::Error,
        times: u64,
    ) {
        self.is_complete = false;
        self.io_failed |= error.kind() != crate::ErrorKind::Corrupt;
        let kind = FindingKind::TableUnreadable { at, level, text: error.to_string() };
        self.report.record(kind, times);
    }
}
