//! Decides how a guest write reaches the host. Pure: loaded tables in, pieces out.

use super::format::{L2Entry, SubclusterBitmap, SubclusterState};
use super::in_flight::{Token, Touch};
use super::mapping::{DataPlace, Mapping, OnWrite};
use super::meta::Meta;
use super::need::{Need, Planned, Stop};
use super::quarantine::FreedBy;
use super::vm_state::Region;
use crate::Error;
use crate::units::{GuestOffset, GuestRange, HostOffset, HostRange};

/// The leading part of a write, and how it is done.
#[derive(Debug)]
pub(super) enum WritePiece {
    /// The cluster takes new bytes where it lies; the map stays.
    InPlace { token: Token, host: HostOffset, len: u64 },
    /// Bytes go to clusters that the map does not show yet; afterwards they are linked.
    Link(NewData),
}

impl WritePiece {
    /// Returns how many bytes of the write this piece does.
    pub(super) const fn len(&self) -> u64 {
        match self {
            Self::InPlace { len, .. } => *len,
            Self::Link(new) => new.guest.len,
        }
    }

    /// Returns where the host bytes of this piece end.
    pub(super) fn host_end(&self) -> HostOffset {
        match self {
            Self::InPlace { host, len, .. } => *host + *len,
            Self::Link(new) => new.host + new.guest.len,
        }
    }
}

/// Clusters to be filled and then linked.
#[derive(Clone, Debug)]
pub(super) struct NewData {
    pub(super) token: Token,
    pub(super) region: Region,
    /// The bytes of the write.
    pub(super) guest: GuestRange,
    /// Where the first of them goes.
    pub(super) host: HostOffset,
    /// Bytes before them that have to be copied along.
    pub(super) head: GuestRange,
    /// Bytes behind them that have to be copied along.
    pub(super) tail: GuestRange,
    /// Host bytes that nobody writes read as zeros.
    pub(super) reads_zero: bool,
    /// The clusters were reserved for this very range before (a zero cluster that kept its place).
    reused: bool,
}

impl NewData {
    /// Returns where a byte of the head or tail goes.
    pub(super) fn host_of(&self, guest: GuestOffset) -> HostOffset {
        HostOffset(self.host.0 + guest.0 - self.guest.start.0)
    }

    /// Returns all bytes that hold data afterwards.
    fn filled(&self) -> GuestRange {
        GuestRange::new(self.head.start, self.tail.end() - self.head.start)
    }
}

/// Plans the first piece of a write to `range`, which lies within the region and is not empty.
///
/// `behind` is where the host bytes of the piece before it end, if there was one: QEMU's
/// placement goes on there.
pub(super) fn plan_write(
    meta: &mut Meta,
    region: Region,
    range: GuestRange,
    behind: Option<HostOffset>,
) -> Planned<WritePiece> {
    // Bounds once more: the disk may have shrunk while this waited.
    meta.before_write(region, range)?;
    meta.before_data()?;
    let run = meta.run(range)?;
    match run.mapping {
        Mapping::Data { host, on_write: OnWrite::InPlace } if meta.owns_table(range.start) => {
            in_place(meta, GuestRange::new(range.start, run.len), host)
        }
        _ => link(meta, region, range, behind),
    }
}

fn in_place(meta: &mut Meta, guest: GuestRange, host: HostOffset) -> Planned<WritePiece> {
    check_host(meta, HostRange::new(host, guest.len))?;
    let token = meta.in_flight.begin(Touch::Shared, guest).map_err(Need::Turn)?;
    Ok(WritePiece::InPlace { token, host, len: guest.len })
}

fn check_host(meta: &Meta, host: HostRange) -> Planned<()> {
    match meta.decoder.place {
        DataPlace::External => Ok(()),
        DataPlace::ImageFile => meta.structures.check(host, None).map_err(Stop::Corrupt),
    }
}

/// What was reserved beyond everything ever written was lost with the file's end (D.1-46).
fn check_reserved(meta: &Meta, host: HostOffset, guest: GuestOffset) -> Planned<()> {
    if meta.decoder.place == DataPlace::External || host < meta.zero_from {
        return Ok(());
    }
    Err(Stop::Corrupt(Error::corrupt(format!(
        "Guest offset {guest} has host offset {host} reserved, beyond the end of the file at {}",
        meta.zero_from
    ))))
}

fn link(
    meta: &mut Meta,
    region: Region,
    range: GuestRange,
    behind: Option<HostOffset>,
) -> Planned<WritePiece> {
    let first_cluster = meta.geometry().cover_clusters(GuestRange::new(range.start, 1));
    if meta.in_flight.conflicts(Touch::Exclusive, first_cluster) {
        return Err(Need::Turn(meta.in_flight.wait()).into());
    }
    meta.own_table(range.start)?;
    let piece = collect(meta, range)?;
    let clusters = meta.geometry().cover_clusters(piece.guest);
    if meta.in_flight.conflicts(Touch::Exclusive, clusters) {
        return Err(Need::Turn(meta.in_flight.wait()).into());
    }
    let place = match piece.reserved {
        Some(host) => {
            check_reserved(meta, host, clusters.start)?;
            NewPlace { host, clusters: clusters.len, reads_zero: false }
        }
        None => new_clusters(meta, clusters, behind)?,
    };
    let token = meta.in_flight.begin(Touch::Exclusive, clusters).map_err(Need::Turn)?;
    if piece.reserved.is_none() && meta.decoder.place == DataPlace::ImageFile {
        meta.in_flight.reserve(token, HostRange::new(place.host, place.clusters));
    }
    let guest = GuestRange::new(
        piece.guest.start,
        piece.guest.end().min(clusters.start + place.clusters) - piece.guest.start,
    );
    let tail = match guest == piece.guest {
        true => piece.tail,
        false => GuestRange::new(guest.end(), 0),
    };
    Ok(WritePiece::Link(NewData {
        token,
        region,
        guest,
        host: place.host + (guest.start.0 - clusters.start.0),
        head: piece.head,
        tail,
        reads_zero: place.reads_zero,
        reused: piece.reserved.is_some(),
    }))
}

/// Host bytes for new clusters.
struct NewPlace {
    host: HostOffset,
    /// In bytes; maybe fewer than were asked for.
    clusters: u64,
    reads_zero: bool,
}

fn new_clusters(
    meta: &mut Meta,
    clusters: GuestRange,
    behind: Option<HostOffset>,
) -> Planned<NewPlace> {
    if meta.decoder.place == DataPlace::External {
        // Guest and host offsets are equal there; what the file held before is unknown.
        let host = HostOffset(clusters.start.0);
        return Ok(NewPlace { host, clusters: clusters.len, reads_zero: false });
    }
    let zero_from = meta.zero_from;
    let count = clusters.len >> meta.geometry().cluster_bits();
    let found = meta.allocate_behind(count, behind)?;
    Ok(NewPlace {
        host: found.start,
        clusters: found.clusters << meta.geometry().cluster_bits(),
        reads_zero: found.start >= zero_from,
    })
}

struct Collected {
    guest: GuestRange,
    reserved: Option<HostOffset>,
    head: GuestRange,
    tail: GuestRange,
}

/// Collects neighbouring clusters that are written the same way, within one table slice.
fn collect(meta: &mut Meta, range: GuestRange) -> Planned<Collected> {
    let cluster_bytes = meta.geometry().cluster_bytes();
    let first = meta.geometry().cover_clusters(GuestRange::new(range.start, 1)).start;
    let first_entry = meta.entry_to_change(first)?;
    let reserved = reservation(meta, first_entry)?;
    let (mut last_entry, mut end) = (first_entry, first + cluster_bytes);
    let limit = meta.slice_end(first);
    while end < range.end() && end < limit {
        let entry = meta.entry_to_change(end)?;
        let expected = reserved.map(|host| host + (end - first));
        if written_in_place(meta, entry) || reservation(meta, entry)? != expected {
            break;
        }
        (last_entry, end) = (entry, end + cluster_bytes);
    }
    let end = end.min(range.end());
    let guest = GuestRange::new(range.start, end - range.start);
    // Bytes that stay where they are need no copy.
    let moved = |entry| reserved.is_none().then_some(entry);
    let head = head_of(meta, guest, moved(first_entry));
    let tail = tail_of(meta, guest, moved(last_entry));
    Ok(Collected { guest, reserved, head, tail })
}

/// Returns the host cluster that is already set aside for the guest cluster and not shared.
fn reservation(meta: &Meta, entry: L2Entry) -> Planned<Option<HostOffset>> {
    if entry.is_compressed() || !entry.is_copied() {
        return Ok(None);
    }
    let host = meta.decoder.host(entry);
    if let Some(host) = host {
        check_host(meta, HostRange::new(host, meta.geometry().cluster_bytes()))?;
    }
    Ok(host)
}

/// Says whether a whole-cluster write would go to the cluster as it is.
fn written_in_place(meta: &Meta, entry: L2Entry) -> bool {
    let is_data = match meta.geometry().has_subclusters() {
        true => entry.subclusters == SubclusterBitmap::ALL_DATA,
        false => !entry.has_zero_flag(),
    };
    !entry.is_compressed() && entry.is_copied() && meta.decoder.host(entry).is_some() && is_data
}

/// Returns the bytes before the write that must be copied: to the start of its subcluster, and,
/// where the bytes move to a new cluster, from the first that holds data in the old one.
fn head_of(meta: &Meta, guest: GuestRange, moved_from: Option<L2Entry>) -> GuestRange {
    let unit = meta.geometry().subcluster_bytes();
    let cluster = guest.start.0 & !(meta.geometry().cluster_bytes() - 1);
    let mut start = guest.start.0 / unit * unit;
    if let Some(first) = moved_from.and_then(|entry| data_units(meta, entry)) {
        start = start.min(cluster + first.start * unit);
    }
    GuestRange::new(GuestOffset(start), guest.start.0 - start)
}

/// Returns the bytes behind the write that must be copied, likewise.
fn tail_of(meta: &Meta, guest: GuestRange, moved_from: Option<L2Entry>) -> GuestRange {
    let unit = meta.geometry().subcluster_bytes();
    let cluster = (guest.end().0 - 1) & !(meta.geometry().cluster_bytes() - 1);
    let mut end = guest.end().0.next_multiple_of(unit);
    if let Some(last) = moved_from.and_then(|entry| data_units(meta, entry)) {
        end = end.max(cluster + last.end * unit);
    }
    GuestRange::new(guest.end(), end - guest.end().0)
}

/// Returns from which to which subcluster (of 32, or of one) an entry holds data of its own.
fn data_units(meta: &Meta, entry: L2Entry) -> Option<std::ops::Range<u64>> {
    let units = meta.geometry().cluster_bytes() / meta.geometry().subcluster_bytes();
    if entry.is_compressed() {
        return Some(0..units);
    }
    if !meta.geometry().has_subclusters() {
        return None;
    }
    let holds = |index: &u32| entry.subclusters.state(*index) == SubclusterState::Data;
    let first = (0..32).find(holds)?;
    let last = (0..32).rev().find(holds)?;
    Some(u64::from(first)..u64::from(last) + 1)
}

/// Puts written clusters into the map and drops what they replace.
///
/// Cluster by cluster and so that it can be called again after a [`Need`]: a cluster that shows
/// its new place already is done.
pub(super) fn link_data(meta: &mut Meta, new: &NewData) -> Planned<()> {
    let clusters = meta.geometry().cover_clusters(new.guest);
    for start in (clusters.start.0..clusters.end().0).step_by(clusters_step(meta)) {
        let guest = GuestOffset(start);
        let old = meta.entry_to_change(guest)?;
        let is_linked = meta.decoder.host(old) == Some(new.host_of(guest));
        if new.reused || !is_linked {
            meta.prepare_free(old)?;
            meta.set_entry(guest, linked_entry(meta, new, guest, old))?;
        }
        if !new.reused && !is_linked {
            meta.in_flight.linked(new.token, meta.geometry().cluster_bytes());
            meta.free_entry(old, FreedBy::CopyOnWrite)?;
        }
    }
    meta.needs_data_sync = true;
    Ok(())
}

const fn clusters_step(meta: &Meta) -> usize {
    meta.geometry().cluster_bytes() as usize
}

fn linked_entry(meta: &Meta, new: &NewData, guest: GuestOffset, old: L2Entry) -> L2Entry {
    let entry = L2Entry::standard(new.host_of(guest));
    if !meta.geometry().has_subclusters() {
        return entry;
    }
    let unit = meta.geometry().subcluster_bytes();
    let cluster = GuestRange::new(guest, meta.geometry().cluster_bytes());
    let filled = new.filled().intersection(&cluster).unwrap_or(cluster);
    let from = (filled.start - guest) / unit;
    let to = (filled.end() - guest).div_ceil(unit);
    let before = if old.is_compressed() { SubclusterBitmap(0) } else { old.subclusters };
    entry.with_subclusters(before.with_data(from as u32, to as u32))
}
