//! Whether sharing is worth what pins take: their tables are whole clusters, so that a few equal
//! clusters save less than that.

use super::keeper::{Standing, most_references};
use super::share::Member;
use crate::Result;
use crate::qcow2::format::{Geometry, L1Entry};
use crate::qcow2::image::Image;
use crate::qcow2::meta::Meta;
use crate::storage::Storage;
use crate::units::{GuestCluster, HostCluster};

/// What sharing would save in an image file, and what its pins would take.
///
/// ```
/// use lacuna::qcow2::Worth;
/// assert!(Worth { saved_bytes: 4 << 21, pin_bytes: 3 << 21 }.pays());
/// assert!(!Worth { saved_bytes: 3 << 21, pin_bytes: 3 << 21 }.pays());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Worth {
    /// Bytes of clusters that would not be in use any more.
    pub saved_bytes: u64,
    /// Bytes of tables that pins would need beside those that are there.
    pub pin_bytes: u64,
}

impl Worth {
    /// Says whether more is saved than taken.
    #[must_use]
    pub const fn pays(&self) -> bool {
        self.saved_bytes > self.pin_bytes
    }
}

/// Returns the bytes of the tables that hold so many pins, as they are made: one L1 table, which begins
/// with a cluster and doubles, and L2 tables.
fn table_bytes(geometry: &Geometry, pins: u64) -> u64 {
    if pins == 0 {
        return 0;
    }
    let tables = pins.div_ceil(geometry.l2_entries());
    let l1_entries = tables.next_power_of_two().max(geometry.cluster_bytes() / 8);
    (tables + geometry.clusters_for(l1_entries * 8)) * geometry.cluster_bytes()
}

/// Pins that there are.
#[derive(Clone, Copy, Debug, Default)]
struct There {
    pins: u64,
    table_bytes: u64,
    /// Whether there is a snapshot table, which needs no cluster for one entry more, or hardly ever.
    has_snapshots: bool,
}

impl There {
    /// Returns what so many more pins take.
    fn cost_of(self, geometry: &Geometry, more: u64) -> u64 {
        if more == 0 {
            return 0;
        }
        let snapshot_table = if self.has_snapshots { 0 } else { geometry.cluster_bytes() };
        let all = table_bytes(geometry, self.pins + more);
        all.saturating_sub(self.table_bytes) + snapshot_table
    }
}

impl<S: Storage> Image<S> {
    /// Returns how many bytes the tables take that so many clusters more need to be pinned, by what the
    /// file has.
    ///
    /// # Errors
    /// As [`pin_facts`](super::pin_facts).
    ///
    /// ```
    /// # use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
    /// # use lacuna::storage::MemoryStorage;
    /// # pollster::block_on(async {
    /// let storage = MemoryStorage::new();
    /// create(&storage, &CreateOptions { size_bytes: 512, ..Default::default() }).await?;
    /// let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadOnly)).await?;
    /// // A snapshot table, an L1 table and one that has room for 8192.
    /// assert_eq!(image.pin_bytes_for(5).await?, 3 << 16);
    /// # Ok::<_, lacuna::Error>(())
    /// # })?;
    /// # Ok::<_, lacuna::Error>(())
    /// ```
    pub async fn pin_bytes_for(&self, pins: u64) -> Result<u64> {
        let facts = self.pin_facts().await?.unwrap_or_default();
        let has_snapshots = self.header().snapshots.count > 0;
        let there = There { pins: facts.keepers, table_bytes: facts.table_bytes, has_snapshots };
        Ok(there.cost_of(&self.geometry(), pins))
    }

    /// Weighs what sharing groups of clusters that look equal would save, as far as it takes to see that
    /// it pays. Nothing is read of them, so that it may be less.
    ///
    /// # Errors
    /// As [`share`](Self::share).
    pub(crate) async fn weigh(
        &self,
        groups: impl Iterator<Item = Vec<GuestCluster>> + Send,
    ) -> Result<Worth> {
        let _pins_stay = self.begin_pinning().await?;
        let (mut worth, mut pins) = (Worth::default(), 0);
        for group in groups {
            let members = self.members(&group).await?;
            let (saved, more) = self.0.meta.lock().gain(&members);
            worth.saved_bytes += saved;
            pins += more;
            worth.pin_bytes = self.0.meta.lock().pin_bytes_for(pins);
            if worth.pays() {
                break;
            }
        }
        Ok(worth)
    }

    /// As [`weigh`](Self::weigh), for groups of host clusters, each with one that others may show.
    pub(crate) async fn weigh_hosts(
        &self,
        groups: impl Iterator<Item = Vec<HostCluster>> + Send,
    ) -> Result<Worth> {
        let _pins_stay = self.begin_pinning().await?;
        let meta = self.0.meta.lock();
        let (mut worth, mut pins) = (Worth::default(), 0);
        for group in groups {
            worth.saved_bytes += (group.len() as u64 - 1) * meta.geometry().cluster_bytes();
            pins += u64::from(!group.iter().any(|host| meta.pins.holds(*host)));
            worth.pin_bytes = meta.pin_bytes_for(pins);
            if worth.pays() {
                break;
            }
        }
        Ok(worth)
    }

    /// Returns what one pin more takes.
    pub(crate) async fn next_pin_bytes(&self) -> Result<u64> {
        let _pins_stay = self.begin_pinning().await?;
        Ok(self.0.meta.lock().pin_bytes_for(1))
    }
}

impl Meta {
    fn pin_bytes_for(&self, more: u64) -> u64 {
        let geometry = self.geometry();
        let l1 = &self.pins.l1.entries;
        let tables = l1.iter().filter(|entry| **entry != L1Entry::UNALLOCATED).count() as u64;
        let l1_clusters = geometry.clusters_for(l1.len() as u64 * 8);
        let there = There {
            pins: self.pins.count(),
            table_bytes: (tables + l1_clusters) * geometry.cluster_bytes(),
            has_snapshots: !self.pins.snapshots().is_empty(),
        };
        there.cost_of(geometry, more)
    }

    /// Returns the bytes that members of a group save if they are equal, and how many pins that takes.
    fn gain(&self, members: &[Member]) -> (u64, u64) {
        let geometry = self.geometry();
        let is_single = |it: &&Member| it.standing == Standing::Single;
        let singles = members.iter().filter(is_single).count() as u64;
        let shared = members.iter().find_map(|it| match it.standing {
            Standing::Shared(host) => Some(geometry.host_cluster(host)),
            _ => None,
        });
        let (keepers, pins) = match shared {
            Some(cluster) => (0, u64::from(singles > 0 && !self.pins.holds(cluster))),
            None => {
                let keepers = singles.div_ceil(most_references(self) - 1);
                (keepers, if singles > 1 { keepers } else { 0 })
            }
        };
        let streams = members.iter().filter_map(|it| match it.standing {
            Standing::Compressed(entry) => entry.compressed_run(geometry),
            _ => None,
        });
        let streams: u64 = streams.skip(1).map(|run| run.range().len).sum();
        ((singles - keepers.min(singles)) * geometry.cluster_bytes() + streams, pins)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::format::{EntryWidth, Version};

    #[test]
    fn tables_are_counted_as_they_are_made() {
        let geometry = Geometry::new(Version::V3, 9, 4, EntryWidth::Standard).unwrap();
        let clusters = |pins| table_bytes(&geometry, pins) / 512;
        assert_eq!([0, 1, 64, 65, 4096].map(clusters), [0, 2, 2, 3, 65]);
        // A second cluster of L1 table.
        assert_eq!(clusters(4097), 67);
    }

    #[test]
    fn what_is_there_is_not_paid_again() {
        let geometry = Geometry::new(Version::V3, 21, 4, EntryWidth::Standard).unwrap();
        let none = There::default();
        assert_eq!(none.cost_of(&geometry, 0), 0);
        assert_eq!(none.cost_of(&geometry, 1), 3 << 21);
        let some = There { pins: 3, table_bytes: 2 << 21, has_snapshots: true };
        assert_eq!(some.cost_of(&geometry, 1000), 0);
    }
}
