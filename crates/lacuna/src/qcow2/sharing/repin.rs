//! Pins again what is shared without a pin, as after a repair by QEMU that dropped all snapshots.

use super::pins::ClusterSet;
use crate::Result;
use crate::qcow2::check::Repair;
use crate::qcow2::image::Image;
use crate::qcow2::meta::Meta;
use crate::qcow2::need::Planned;
use crate::qcow2::write_back::Refcounting;
use crate::storage::Storage;
use crate::units::{GuestOffset, HostOffset};

/// How many entries are looked at under one lock.
const ENTRIES_AT_ONCE: u64 = 512;

/// A walk over the entries of the disk.
struct Walk {
    at: GuestOffset,
    /// Clusters that an entry showed.
    seen: ClusterSet,
    /// Clusters that a second entry showed, and no pin holds.
    found: Vec<HostOffset>,
}

impl<S: Storage> Image<S> {
    /// Pins every cluster that two guest clusters or more share and no pin holds, closes the image and
    /// puts COPIED flags right. Durable when it returns; a guest reads the same. Returns how many
    /// clusters it pinned.
    ///
    /// For images whose pins are gone: QEMU's `check -r all` drops all snapshots where there is a
    /// persistent bitmap. Memory: two bits for each host cluster that is shared, about.
    ///
    /// # Errors
    /// `ReadOnly` for an image opened read-only; `Corrupt` where pins or entries are damaged, or a check
    /// finds what it does not call a leak or a wrong COPIED flag; else as for writing metadata and for
    /// closing.
    ///
    /// ```
    /// # use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
    /// # use lacuna::storage::MemoryStorage;
    /// # pollster::block_on(async {
    /// let storage = MemoryStorage::new();
    /// create(&storage, &CreateOptions { size_bytes: 1 << 20, ..Default::default() }).await?;
    /// let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadWrite)).await?;
    /// assert_eq!(image.repin().await?, 0);
    /// # Ok::<_, lacuna::Error>(())
    /// # })?;
    /// # Ok::<_, lacuna::Error>(())
    /// ```
    pub async fn repin(self) -> Result<u64> {
        let hold = self.begin_pinning().await?;
        let (seen, found) = (ClusterSet::default(), Vec::new());
        let mut walk = Walk { at: GuestOffset(0), seen, found };
        let mut pinned = 0;
        while walk.at.0 < self.size() {
            self.plan(|meta| meta.walk_on(&mut walk)).await?;
            for host in walk.found.drain(..) {
                pinned += u64::from(self.plan(|meta| meta.pin_shared(host)).await?);
            }
        }
        self.write_back(Refcounting::Written).await?;
        drop(hold);
        self.clone().close().await?;
        self.repair(Repair::Leaks).await?;
        Ok(pinned)
    }
}

impl Meta {
    fn walk_on(&mut self, walk: &mut Walk) -> Planned<()> {
        let step = self.geometry().cluster_bytes();
        let stop = self.size_bytes.min(walk.at.0 + ENTRIES_AT_ONCE * step);
        while walk.at.0 < stop {
            if self.table(walk.at)?.is_none() {
                walk.at = self.pin_table_range(self.geometry().l1_index(walk.at)).1;
                continue;
            }
            if let Some(host) = self.shared_host(walk.at)? {
                let cluster = self.geometry().host_cluster(host);
                let is_second = !walk.seen.insert(cluster);
                walk.found.extend((is_second && !self.pins.holds(cluster)).then_some(host));
            }
            walk.at = walk.at + step;
        }
        Ok(())
    }

    /// Returns the cluster of an entry that something else references too. The cluster of zeros has
    /// pins of its own.
    fn shared_host(&mut self, guest: GuestOffset) -> Planned<Option<HostOffset>> {
        let entry = self.entry_to_change(guest)?;
        let is_other = |host: &HostOffset| self.decoder.zero_cluster != Some(*host);
        let Some(host) = entry.host().filter(is_other) else { return Ok(None) };
        let refcount = self.refcounts.read(self.geometry().host_cluster(host))?;
        Ok((refcount > 1).then_some(host))
    }

    /// Pins a cluster that is shared, if there is room for one more reference.
    fn pin_shared(&mut self, host: HostOffset) -> Planned<bool> {
        self.before_metadata_change()?;
        let cluster = self.geometry().host_cluster(host);
        let refcount = self.refcounts.read(cluster)?;
        let has_room = refcount < self.geometry().refcount_max();
        if refcount < 2 || !has_room || self.pins.holds(cluster) {
            return Ok(false);
        }
        let at = self.free_pin()?;
        self.refcounts.increase(cluster, 1)?;
        self.set_pin(at, host)?;
        Ok(true)
    }
}
