//! Keepers: what guest clusters with equal bytes are to share, and what each of them is now.
//!
//! * Always: a keeper's references are taken before anything points to it, and those that nobody used
//!   go back when it is dropped: so it stays what it is meanwhile.
//! * Always: a standard cluster is a keeper only if no entry with COPIED points to it: a fresh one, or
//!   one that is shared already.

use crate::qcow2::format::{CompressedRun, L2Entry};
use crate::qcow2::image::Image;
use crate::qcow2::mapping::Mapping;
use crate::qcow2::meta::Meta;
use crate::qcow2::need::{Planned, Stop};
use crate::qcow2::quarantine::{Freed, FreedBy};
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange, HostCluster, HostOffset};
use crate::{Error, ErrorKind};

/// No keeper gets more references than this part of what a refcount can count: every snapshot that is
/// made later adds one for each sharer.
const PART_FOR_SHARERS: u64 = 64;
/// Nor more than this, however wide refcounts are.
const MOST_SHARERS: u64 = 1 << 20;

/// What a guest cluster is, for one who wants it to share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Compressed; the entry.
    Compressed(L2Entry),
    /// Nothing can be shared here, or nothing would be gained.
    Other,
    /// Data in a cluster that is shared already.
    Shared(HostOffset),
    /// Data in a cluster of its own.
    Single,
}

/// A place that guest clusters may share, with references that are taken and not used yet.
pub(super) struct Keeper<'a, S: Storage> {
    image: &'a Image<S>,
    /// What entries are to be.
    pub(super) entry: L2Entry,
    clusters: Vec<HostCluster>,
    /// References of each cluster.
    unused: u64,
    /// Who may share it, if their bytes are the same.
    pub(super) members: Vec<GuestOffset>,
}

impl<'a, S: Storage> Keeper<'a, S> {
    /// Begins without a reference.
    pub(super) fn new(image: &'a Image<S>) -> Self {
        let (clusters, members) = (Vec::new(), Vec::new());
        Self { image, entry: L2Entry::UNALLOCATED, clusters, unused: 0, members }
    }

    /// Allocates a cluster for it, which is the reference of its pin.
    pub(super) fn allocate(&mut self, meta: &mut Meta) -> Planned<HostOffset> {
        meta.before_metadata_change()?;
        let host = meta.allocate(1)?;
        self.entry = meta.sharing_entry(host);
        self.clusters = vec![meta.geometry().host_cluster(host)];
        self.unused = 1;
        Ok(host)
    }

    /// Takes one more reference for each member, as far as there is room, of what a guest cluster shows.
    /// Members for which there is none are given back.
    pub(super) fn take(&mut self, meta: &mut Meta, entry: L2Entry) -> Planned<Vec<GuestOffset>> {
        meta.before_metadata_change()?;
        let clusters = meta.references(entry).to_vec();
        let mut room = u64::MAX;
        // All are at hand then, so that taking cannot stop half-way.
        for cluster in &clusters {
            let refcount = meta.refcounts.read(*cluster)?;
            room = room.min(most_references(meta).saturating_sub(refcount));
        }
        let pin = u64::from(needs_pin(meta, entry));
        let count = (self.members.len() as u64).min(room.saturating_sub(pin));
        for cluster in &clusters {
            meta.refcounts.increase(*cluster, count)?;
        }
        (self.entry, self.clusters, self.unused) = (entry, clusters, count);
        Ok(self.members.split_off(count as usize))
    }

    /// Pins it, and takes the references that a fresh one lacks for its members.
    pub(super) fn pin(&mut self, meta: &mut Meta) -> Planned<()> {
        let Some(host) = self.entry.host().filter(|_| needs_pin(meta, self.entry)) else {
            return Ok(());
        };
        meta.before_metadata_change()?;
        let cluster = meta.geometry().host_cluster(host);
        meta.refcounts.read(cluster)?;
        let at = meta.free_pin()?;
        let wanted = self.members.len() as u64 + 1;
        meta.refcounts.increase(cluster, wanted - self.unused)?;
        self.unused = wanted;
        meta.set_pin(at, host)?;
        self.unused -= 1;
        meta.needs_data_sync = true;
        Ok(())
    }

    /// Has the entry of a member show it, if it is still one that may. Returns how many clusters nothing
    /// references any more; nothing where it may not.
    pub(super) fn attach(&mut self, meta: &mut Meta, guest: GuestOffset) -> Planned<Option<u64>> {
        let range = GuestRange::new(guest, meta.geometry().cluster_bytes());
        if range.end().0 > meta.size_bytes {
            // The disk was cut within it, which no hold on whole clusters keeps anybody from.
            return Ok(None);
        }
        meta.before_metadata_change()?;
        let may = match meta.standing(guest)? {
            Standing::Compressed(old) => self.entry.is_compressed() && old != self.entry,
            Standing::Single => !self.entry.is_compressed(),
            Standing::Other | Standing::Shared(_) => false,
        };
        if !may || !meta.owns_table(guest) || self.unused == 0 {
            return Ok(None);
        }
        let old = meta.entry_to_change(guest)?;
        meta.prepare_free(old)?;
        meta.set_entry(guest, self.entry)?;
        self.unused -= 1;
        Ok(Some(meta.free_entry(old, FreedBy::Always)?))
    }

    /// Takes `count` references of a cluster that has room for them, and whose refcount is at hand.
    pub(super) fn take_of(&mut self, meta: &mut Meta, host: HostOffset, count: u64) -> Planned<()> {
        let cluster = meta.geometry().host_cluster(host);
        meta.refcounts.increase(cluster, count)?;
        (self.entry, self.clusters, self.unused) = (meta.sharing_entry(host), vec![cluster], count);
        Ok(())
    }

    /// Says whether it has no reference that is not in use.
    pub(super) const fn is_idle(&self) -> bool {
        self.unused == 0
    }

    /// So many references are in use.
    pub(super) const fn use_some(&mut self, count: u64) {
        self.unused -= count;
    }

    /// One reference is in use.
    pub(super) const fn use_one(&mut self) {
        self.unused -= 1;
    }

    /// Returns the stream that members share, or where their cluster lies.
    pub(super) fn stream(&self) -> Option<CompressedRun> {
        self.entry.compressed_run(&self.image.geometry())
    }
}

impl<S: Storage> Drop for Keeper<'_, S> {
    fn drop(&mut self) {
        if self.unused == 0 {
            return;
        }
        let mut meta = self.image.0.meta.lock();
        for cluster in &self.clusters {
            for _ in 0..self.unused {
                let at = meta.in_flight.moment();
                let freed = Freed { cluster: *cluster, by: FreedBy::Always, at };
                // More than there can be: no search for space is to wait for this one.
                meta.quarantine.push(freed, u64::MAX);
            }
        }
    }
}

/// Returns how many references a shared cluster may have, its pin included.
pub(super) fn most_references(meta: &Meta) -> u64 {
    (meta.geometry().refcount_max() / PART_FOR_SHARERS).min(MOST_SHARERS) + 1
}

fn needs_pin(meta: &Meta, entry: L2Entry) -> bool {
    let cluster = entry.host().map(|host| meta.geometry().host_cluster(host));
    cluster.is_some_and(|cluster| !meta.pins.holds(cluster))
}

impl Meta {
    /// Returns what a whole guest cluster is.
    pub(super) fn standing(&mut self, guest: GuestOffset) -> Planned<Standing> {
        let Some(entry) = self.entry(guest)? else { return Ok(Standing::Other) };
        let (mapping, len) = self.decoder.decode(entry, guest).map_err(Stop::Corrupt)?;
        let host = match mapping {
            Mapping::Compressed(_) => return Ok(Standing::Compressed(entry)),
            Mapping::Data { host, .. } if len == self.geometry().cluster_bytes() => host,
            Mapping::Data { .. } | Mapping::Unallocated { .. } | Mapping::Zero { .. } => {
                return Ok(Standing::Other);
            }
        };
        if host >= self.zero_from {
            return Ok(Standing::Other);
        }
        let cluster = self.geometry().host_cluster(host);
        let refcount = self.refcounts.read(cluster)?;
        Ok(match refcount.saturating_sub(self.quarantine.pending(cluster)) {
            1 => Standing::Single,
            0 => Standing::Other,
            _ if entry.is_copied() => Standing::Other,
            _ => Standing::Shared(host),
        })
    }
}

impl<S: Storage> Image<S> {
    /// Says why clusters of this image cannot be [shared](Self::share), if they cannot: it was opened
    /// read-only, has an external data file, refcounts of 1 to 4 bits, or keeps clusters where they are.
    ///
    /// ```
    /// # use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
    /// # use lacuna::storage::MemoryStorage;
    /// # pollster::block_on(async {
    /// let storage = MemoryStorage::new();
    /// create(&storage, &CreateOptions { size_bytes: 512, ..Default::default() }).await?;
    /// let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadOnly)).await?;
    /// assert_eq!(image.why_not_share().unwrap().kind(), lacuna::ErrorKind::ReadOnly);
    /// # Ok::<_, lacuna::Error>(())
    /// # })?;
    /// # Ok::<_, lacuna::Error>(())
    /// ```
    #[must_use]
    pub fn why_not_share(&self) -> Option<Error> {
        let keeps = crate::qcow2::options::OnDiscard::KeepMapping;
        let meta = self.0.meta.lock();
        let external = self.0.data.is_some();
        let text = match () {
            () if !meta.writable => {
                return Some(Error::new(ErrorKind::ReadOnly, "The image was opened read-only"));
            }
            () if external => "Data lies in an external file, where clusters have no refcounts",
            () if meta.geometry().refcount_order() < 3 => {
                "Refcounts of 1 to 4 bits count too few sharers; amend the image to 16 bits first"
            }
            () if meta.on_discard == keeps => {
                "The image keeps its clusters where they are, and sharing moves them; open it with \
                 discards that free to give that up"
            }
            () => return None,
        };
        Some(Error::unsupported(text))
    }
}
