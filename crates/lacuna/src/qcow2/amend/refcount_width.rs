//! Refcounts of another width: a new table with new blocks, written behind everything in use. One
//! sector of the header names both the table and the width, so that a crash leaves the old ones or
//! the new ones, whole. The old ones are counted by neither afterwards, and punched.
//!
//! * Only for an image that is closed.
//! * Memory: a block of each kind, and eight bytes for each block there is.

use std::collections::BTreeSet;

use crate::buffer::{Buffer, Hold};
use crate::qcow2::check::read::{read_bytes, read_words};
use crate::qcow2::check::refcounts::{Block, RefcountReader, RefcountTable};
use crate::qcow2::format::{
    Geometry, Header, MAX_REFCOUNT_TABLE_BYTES, RefcountTableLocation, RefcountWidth,
};
use crate::storage::Storage;
use crate::units::{HostCluster, HostOffset, HostRange};
use crate::{Error, ErrorKind, Result};

/// Where the header names the width (B.1).
const ORDER_AT: usize = 96;
/// What storage does not tear.
const SECTOR: usize = 512;

/// Tells how much is done, of how much.
type Listener<'a> = &'a mut (dyn FnMut(u64, u64) + Send);

/// Gives the image in `storage`, whose header is `header`, refcounts of `1 << order` bits.
///
/// # Errors
/// `InvalidRequest` where a refcount does not fit, with the cluster it is of; `NoSpace` where the
/// table would be too large; `Corrupt` where a block cannot be used; before the image changes.
pub(super) async fn change<S: Storage>(
    storage: &S,
    header: &Header,
    order: u32,
    listener: Listener<'_>,
) -> Result<()> {
    let old = Old::read(storage, header).await?;
    let now = header.geometry;
    let geometry = Geometry::new(now.version(), now.cluster_bits(), order, now.entry_width())?;
    let used = old.survey(storage, &geometry).await?;
    let layout = Layout::new(&geometry, used)?;
    write(storage, &old, &geometry, &layout, listener).await?;
    storage.flush().await?;
    switch(storage, &geometry, &layout).await?;
    for range in old.ranges() {
        // Space that is not given back is no harm, and not every host can (D.1-6).
        if storage.punch_hole_at(range, Hold::none()).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// The refcounts as they are.
struct Old {
    geometry: Geometry,
    table: RefcountTable,
    location: RefcountTableLocation,
    /// The clusters of table and blocks, which count no more afterwards.
    own: BTreeSet<u64>,
    file_clusters: u64,
}

/// What has to be counted.
struct Used {
    /// Indices of the new blocks that count something.
    blocks: BTreeSet<u64>,
    /// The first cluster behind all that is in use.
    end: u64,
}

impl Old {
    async fn read<S: Storage>(storage: &S, header: &Header) -> Result<Self> {
        let (geometry, location) = (header.geometry, header.refcount_table);
        let file_bytes = storage.len().await?;
        let bytes = u64::from(location.clusters) << geometry.cluster_bits();
        let entries = read_words(storage, location.offset, bytes / 8).await?;
        let table = RefcountTable::new(geometry, entries, file_bytes);
        let first = geometry.host_cluster(location.offset).0;
        let mut own: BTreeSet<u64> = (first..first + u64::from(location.clusters)).collect();
        for index in 0..table.entries.len() as u64 {
            match table.block(index) {
                Block::Absent => {}
                Block::At(offset) => {
                    own.insert(geometry.host_cluster(offset).0);
                }
                Block::Outside(offset) | Block::Unusable(offset) => {
                    return Err(Error::corrupt(format!(
                        "Refcount block {index} cannot lie at {offset}; check the image first"
                    )));
                }
            }
        }
        let file_clusters = geometry.clusters_for(file_bytes);
        Ok(Self { geometry, table, location, own, file_clusters })
    }

    /// Finds out what is counted, and that all of it fits.
    async fn survey<S: Storage>(&self, storage: &S, new: &Geometry) -> Result<Used> {
        let (per_old, per_new) =
            (self.geometry.refcount_block_entries(), new.refcount_block_entries());
        let most = most(new);
        let mut used = Used { blocks: BTreeSet::new(), end: self.file_clusters };
        for index in 0..self.table.entries.len() as u64 {
            let Block::At(offset) = self.table.block(index) else { continue };
            let block = read_bytes(storage, offset, self.geometry.cluster_bytes() as usize).await?;
            for within in 0..per_old {
                let (cluster, count) =
                    (index * per_old + within, self.table.width.read(&block, within as usize));
                if count == 0 || self.own.contains(&cluster) {
                    continue;
                }
                if count > most {
                    return Err(self.too_narrow(cluster, count, new));
                }
                used.blocks.insert(cluster / per_new);
                used.end = used.end.max(cluster + 1);
            }
        }
        Ok(used)
    }

    fn too_narrow(&self, cluster: u64, count: u64, new: &Geometry) -> Error {
        let at = self.geometry.host_offset(HostCluster(cluster));
        let bits = 1 << new.refcount_order();
        Error::invalid(format!(
            "Refcount {count} of the cluster at {at} does not fit into {bits} bits"
        ))
        .at(at)
    }

    /// Returns where table and blocks lie.
    fn ranges(&self) -> Vec<HostRange> {
        let bytes = self.geometry.cluster_bytes();
        let mut ranges: Vec<HostRange> = Vec::new();
        for cluster in &self.own {
            let start = self.geometry.host_offset(HostCluster(*cluster));
            match ranges.last_mut() {
                Some(last) if last.end() == start => last.len += bytes,
                _ => ranges.push(HostRange::new(start, bytes)),
            }
        }
        debug_assert!(ranges.iter().any(|range| range.start <= self.location.offset), "the table");
        ranges
    }
}

/// The largest refcount of a width.
fn most(geometry: &Geometry) -> u64 {
    u64::MAX >> (64 - (1_u32 << geometry.refcount_order()))
}

/// Where the new structure goes: blocks, then the table.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Layout {
    first: u64,
    /// Indices of the blocks, in order; they lie in this order as well.
    blocks: Vec<u64>,
    table_clusters: u64,
}

impl Layout {
    /// Finds the smallest one that counts itself too.
    fn new(geometry: &Geometry, used: Used) -> Result<Self> {
        let (per_block, first) = (geometry.refcount_block_entries(), used.end);
        let mut blocks = used.blocks;
        let mut table_clusters = 1;
        loop {
            let end = first + blocks.len() as u64 + table_clusters;
            let before = (blocks.len(), table_clusters);
            blocks.extend(first / per_block..=(end - 1) / per_block);
            let table_bytes = blocks.last().map_or(0, |last| (last + 1).saturating_mul(8));
            if table_bytes > MAX_REFCOUNT_TABLE_BYTES {
                return Err(Error::new(
                    ErrorKind::NoSpace,
                    format!("The refcount table would need {table_bytes} bytes at this width"),
                ));
            }
            // Both only grow, and the table is bounded: this ends.
            table_clusters = table_clusters.max(geometry.clusters_for(table_bytes));
            if before == (blocks.len(), table_clusters) {
                let blocks = blocks.into_iter().collect();
                return Ok(Self { first, blocks, table_clusters });
            }
        }
    }

    const fn table_at(&self) -> u64 {
        self.first + self.blocks.len() as u64
    }

    const fn contains(&self, cluster: u64) -> bool {
        self.first <= cluster && cluster < self.table_at() + self.table_clusters
    }
}

async fn write<S: Storage>(
    storage: &S,
    old: &Old,
    geometry: &Geometry,
    layout: &Layout,
    listener: Listener<'_>,
) -> Result<()> {
    let mut reader = RefcountReader::new(storage, &old.table);
    let table_bytes = layout.table_clusters << geometry.cluster_bits();
    let mut table = vec![0; table_bytes as usize];
    for (place, index) in layout.blocks.iter().enumerate() {
        listener(place as u64, layout.blocks.len() as u64);
        let at = geometry.host_offset(HostCluster(layout.first + place as u64));
        let block = fill(old, geometry, layout, *index, &mut reader).await?;
        put(storage, at, &block).await?;
        if let Some(entry) = table.as_chunks_mut::<8>().0.get_mut(*index as usize) {
            *entry = at.0.to_be_bytes();
        }
    }
    listener(layout.blocks.len() as u64, layout.blocks.len() as u64);
    put(storage, geometry.host_offset(HostCluster(layout.table_at())), &table).await
}

async fn fill<S: Storage>(
    old: &Old,
    geometry: &Geometry,
    layout: &Layout,
    index: u64,
    reader: &mut RefcountReader<'_, S>,
) -> Result<Vec<u8>> {
    let (width, per_block) = (RefcountWidth::of(geometry), geometry.refcount_block_entries());
    let mut block = vec![0; geometry.cluster_bytes() as usize];
    for within in 0..per_block {
        let cluster = index * per_block + within;
        let count = match () {
            () if layout.contains(cluster) => 1,
            () if cluster >= layout.first || old.own.contains(&cluster) => 0,
            () => reader.read(cluster).await?,
        };
        if count > 0 {
            width.write(&mut block, within as usize, count);
        }
    }
    Ok(block)
}

/// Names the new table and the width, in one sector.
async fn switch<S: Storage>(storage: &S, geometry: &Geometry, layout: &Layout) -> Result<()> {
    let (result, mut sector) = storage.read_at(HostOffset(0), Buffer::new(SECTOR)).await;
    result?;
    let offset = geometry.host_offset(HostCluster(layout.table_at()));
    let location = RefcountTableLocation { offset, clusters: layout.table_clusters as u32 };
    let (at, bytes) = location.header_update();
    let at = at.0 as usize;
    sector[at..at + bytes.len()].copy_from_slice(&bytes);
    sector[ORDER_AT..ORDER_AT + 4].copy_from_slice(&geometry.refcount_order().to_be_bytes());
    storage.write_at(HostOffset(0), sector).await.0?;
    storage.flush().await
}

async fn put<S: Storage>(storage: &S, at: HostOffset, bytes: &[u8]) -> Result<()> {
    storage.write_at(at, Buffer::from(bytes)).await.0
}
