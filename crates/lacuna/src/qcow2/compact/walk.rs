//! Going through data in the order in which it is to lie: as the active disk has it, then as snapshots
//! have it, then bitmaps.

use std::ops::ControlFlow;

use futures_util::{StreamExt, stream};

use super::bits::Bits;
use super::structures::{Kind, L1_AT, Structures, Table};
use crate::Result;
use crate::qcow2::check::copied::entries;
use crate::qcow2::check::read::{read_bytes, read_words};
use crate::qcow2::format::{BitmapCluster, BitmapTableEntry, L1Entry};
use crate::storage::Storage;
use crate::units::{HostOffset, HostRange};

/// Tables in flight.
const READS_IN_FLIGHT: usize = 8;

/// What an entry of some table shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// A host cluster, and the guest cluster that shows it where that is one of the active disk.
    Data { guest: Option<u64>, host: u64 },
    /// A compressed stream.
    Stream(HostRange),
}

/// Who looks, and says whether to go on.
pub(super) type Visit<'a> = &'a mut (dyn FnMut(Seen) -> ControlFlow<()> + Send);

/// Shows every entry of each table once; `clusters` is how many the file has.
pub(super) async fn walk<S: Storage>(
    storage: &S,
    structures: &Structures,
    clusters: u64,
    visit: Visit<'_>,
) -> Result<()> {
    let is_active = |table: &&Table| table.pointers.contains(&L1_AT);
    let active = structures.of(Kind::L1).filter(is_active);
    let others = structures.of(Kind::L1).filter(|table| !is_active(table));
    let mut walked = Bits::new(clusters);
    for l1 in active.chain(others) {
        if walk_disk(storage, structures, l1, &mut walked, visit).await?.is_break() {
            return Ok(());
        }
    }
    for table in structures.of(Kind::Bitmap) {
        for word in read_words(storage, table.range.start, table.range.len / 8).await? {
            let BitmapCluster::Data(host) = BitmapTableEntry(word).cluster() else { continue };
            let host = structures.geometry.host_cluster(host).0;
            if visit(Seen::Data { guest: None, host }).is_break() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Goes through those tables of a disk that no other disk has shown.
async fn walk_disk<S: Storage>(
    storage: &S,
    structures: &Structures,
    l1: &Table,
    walked: &mut Bits,
    visit: Visit<'_>,
) -> Result<ControlFlow<()>> {
    let geometry = &structures.geometry;
    let is_active = l1.pointers.contains(&L1_AT);
    let mut tables = Vec::new();
    let words = read_words(storage, l1.range.start, l1.range.len / 8).await?;
    for (index, word) in (0..).zip(words) {
        let Some(table) = L1Entry(word).table() else { continue };
        let cluster = geometry.host_cluster(table).0;
        if !walked.contains(cluster) {
            walked.insert(cluster);
            tables.push((index, table));
        }
    }
    let len = geometry.cluster_bytes() as usize;
    let read = async |(index, at): (u64, HostOffset)| (index, read_bytes(storage, at, len).await);
    let mut reads = stream::iter(tables).map(read).buffered(READS_IN_FLIGHT);
    while let Some((index, table)) = reads.next().await {
        for (within, entry) in entries(&table?, geometry.entry_width()) {
            let guest = is_active.then_some(index * geometry.l2_entries() + within);
            let seen = match (entry.compressed_run(geometry), entry.host()) {
                (Some(run), _) => Seen::Stream(run.range()),
                (None, Some(host)) => Seen::Data { guest, host: geometry.host_cluster(host).0 },
                (None, None) => continue,
            };
            if visit(seen).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
    }
    Ok(ControlFlow::Continue(()))
}
