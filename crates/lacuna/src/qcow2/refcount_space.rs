//! How much room refcounts take: arithmetic that new images, growing ones and estimates share.

use super::format::Geometry;

/// Whether a refcount table is sized for more than what it must count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    Exact,
    /// Half as many clusters again as the table has itself.
    ToGrow,
}

/// The clusters that refcounts take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RefcountSpace {
    pub(crate) blocks: u64,
    pub(crate) table_clusters: u64,
}

impl RefcountSpace {
    /// Returns how many blocks count `clusters` clusters, themselves and their table. Blocks and
    /// table count as clusters too, so this looks for the point where nothing more is added.
    pub(crate) const fn counting(geometry: &Geometry, mut clusters: u64, room: Room) -> Self {
        let per_block = geometry.refcount_block_entries();
        let per_table_cluster = geometry.cluster_bytes() / 8;
        let (mut blocks, mut table_clusters) = (0_u64, 0_u64);
        let mut is_roomy = matches!(room, Room::Exact);
        loop {
            let before = (blocks, table_clusters);
            blocks = (clusters + table_clusters + blocks).div_ceil(per_block);
            table_clusters = blocks.div_ceil(per_table_cluster);
            if blocks != before.0 || table_clusters != before.1 {
                continue;
            }
            if is_roomy {
                return Self { blocks, table_clusters };
            }
            clusters += table_clusters.div_ceil(2);
            is_roomy = true;
        }
    }
}

/// Returns how long an image is whose every guest cluster lies in it, by QEMU's account: header,
/// both levels of the map, refcounts that fit exactly, and the data.
pub(crate) const fn fully_allocated_bytes(geometry: &Geometry, size_bytes: u64) -> u64 {
    let data = geometry.clusters_for(size_bytes);
    let tables = data.div_ceil(geometry.l2_entries());
    let l1 = geometry.clusters_for(tables * 8);
    let counted = 1 + l1 + tables + data;
    let refcounts = RefcountSpace::counting(geometry, counted, Room::Exact);
    (counted + refcounts.blocks + refcounts.table_clusters) << geometry.cluster_bits()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::format::{EntryWidth, Version};

    #[test]
    fn blocks_count_themselves_and_their_table() {
        for (cluster_bits, order) in [(9, 0), (9, 6), (12, 4), (16, 4), (21, 1)] {
            let geometry =
                Geometry::new(Version::V3, cluster_bits, order, EntryWidth::Standard).unwrap();
            for clusters in (0..40).map(|power| (1 << power) - 1) {
                let exact = RefcountSpace::counting(&geometry, clusters, Room::Exact);
                let counted = exact.blocks * geometry.refcount_block_entries();
                assert!(counted >= clusters + exact.blocks + exact.table_clusters);
                let roomy = RefcountSpace::counting(&geometry, clusters, Room::ToGrow);
                assert!(roomy.blocks >= exact.blocks);
            }
        }
    }
}
