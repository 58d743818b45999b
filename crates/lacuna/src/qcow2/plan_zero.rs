//! Decides what zeroing and discarding leave in the map: the table of A.2.1, as code. Pure.

use smallvec::SmallVec;

use super::format::{L2Entry, SubclusterBitmap};
use super::mapping::DataPlace;
use super::meta::Meta;
use super::need::{Planned, Stop};
use super::options::{DiscardUnit, OnDiscard};
use super::quarantine::FreedBy;
use crate::units::{GuestOffset, GuestRange, HostRange};

/// What the caller wants of whole clusters or subclusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Intent {
    /// Nothing of this image remains, and the host gets its space back in any case.
    Cut,
    /// A guest discard: reads as zeros afterwards, space is given back.
    Discard,
    /// Nothing of this image remains: the backing layer shows through.
    Forget,
    /// As `Cut`, where the backing layer reads the same: nothing changes for the guest, and bitmaps
    /// are not told.
    Repeated,
    /// Reads as zeros, space may be given back.
    ZeroFree,
    /// Reads as zeros, the host cluster stays reserved.
    ZeroKeep,
}

impl Intent {
    const fn freed_by(self) -> FreedBy {
        match self {
            Self::Cut | Self::Repeated => FreedBy::Always,
            Self::Discard | Self::Forget | Self::ZeroFree | Self::ZeroKeep => FreedBy::Guest,
        }
    }

    const fn may_free(self) -> bool {
        !matches!(self, Self::ZeroKeep)
    }
}

/// What a step of clearing did.
#[derive(Debug, Default)]
pub(super) struct Cleared {
    /// How many bytes of the range are done.
    pub(super) len: u64,
    /// Host bytes that stay reserved, hold nothing any more, and belong to nobody else.
    pub(super) vacated: SmallVec<[HostRange; 2]>,
    /// Bytes of host clusters that nothing references any more.
    pub(super) freed_bytes: u64,
    /// How many entries came to share the cluster of zeros.
    shared: u64,
}

impl Cleared {
    fn vacate(&mut self, next: Option<HostRange>) {
        let Some(next) = next else { return };
        self.freed_bytes += next.len;
        match self.vacated.last_mut() {
            Some(last) if last.end() == next.start => last.len += next.len,
            _ => self.vacated.push(next),
        }
    }
}

/// Applies `intent` to the leading whole clusters of `range` (all bounds on cluster borders): at
/// most a slice's worth, or a table's where none is needed.
pub(super) fn clear_clusters(
    meta: &mut Meta,
    range: GuestRange,
    intent: Intent,
) -> Planned<Cleared> {
    meta.before_metadata_change()?;
    if leaves_no_table(meta, range.start, intent)? {
        let coverage = meta.geometry().l2_coverage_bytes();
        let table_end = GuestOffset((range.start.0 / coverage + 1) * coverage);
        let len = table_end.min(range.end()) - range.start;
        return Ok(Cleared { len, ..Cleared::default() });
    }
    let end = meta.slice_end(range.start).min(range.end());
    // What lies behind the disk is none of the guest's bytes.
    let changed = match intent {
        Intent::Repeated => 0,
        _ => end.0.min(meta.size_bytes).saturating_sub(range.start.0),
    };
    meta.before_change(GuestRange::new(range.start, changed))?;
    let mut done = Cleared::default();
    if !meta.takes_zero_references(intent) {
        clear_up_to(meta, range.start, end, intent, &mut done)?;
        return Ok(done);
    }
    let (end, references) = meta.take_zero_references(range.start, end)?;
    let result = clear_up_to(meta, range.start, end, intent, &mut done);
    meta.return_zero_references(references - done.shared)?;
    result.map(|()| done)
}

fn clear_up_to(
    meta: &mut Meta,
    start: GuestOffset,
    end: GuestOffset,
    intent: Intent,
    done: &mut Cleared,
) -> Planned<()> {
    while start + done.len < end {
        match clear_cluster(meta, start + done.len, intent, done) {
            // What was vacated must not be forgotten by planning again from the start.
            Err(Stop::Need(_)) if done.len > 0 => break,
            result => result?,
        }
        done.len += meta.geometry().cluster_bytes();
    }
    Ok(())
}

/// Says whether there is no L2 table and need not be one.
fn leaves_no_table(meta: &Meta, guest: GuestOffset, intent: Intent) -> Planned<bool> {
    let needs_entries = match intent {
        Intent::Discard => meta.has_backing,
        Intent::Cut | Intent::Forget | Intent::Repeated => false,
        Intent::ZeroFree | Intent::ZeroKeep => true,
    };
    Ok(!needs_entries && meta.table(guest)?.is_none())
}

fn clear_cluster(
    meta: &mut Meta,
    guest: GuestOffset,
    intent: Intent,
    done: &mut Cleared,
) -> Planned<()> {
    let old = meta.entry_to_change(guest)?;
    let new = cleared(meta, old, intent);
    if new == old && meta.table(guest)?.is_some() {
        // 001-3: an entry that is in the target state is not dirtied.
        return Ok(());
    }
    let cluster = GuestRange::new(guest, meta.geometry().cluster_bytes());
    let left = vacates(meta, old, new, cluster, intent)?;
    done.freed_bytes += replace(meta, guest, old, new, intent.freed_by())?;
    done.shared += u64::from(meta.shared_zeros(intent) == Some(new));
    done.vacate(left);
    Ok(())
}

/// Replaces an entry. Returns the bytes of host clusters that nothing references any more.
fn replace(
    meta: &mut Meta,
    guest: GuestOffset,
    old: L2Entry,
    new: L2Entry,
    by: FreedBy,
) -> Planned<u64> {
    meta.before_mapping(new)?;
    meta.own_table(guest)?;
    // A table just copied or made has the same entry, and its slice is at hand after this.
    meta.entry(guest)?;
    let frees = meta.references(old) != meta.references(new);
    check_place(meta, old)?;
    if frees {
        meta.prepare_free(old)?;
    }
    meta.set_entry(guest, new)?;
    match frees {
        true => Ok(meta.free_entry(old, by)? << meta.geometry().cluster_bits()),
        false => Ok(0),
    }
}

/// Refuses to free or punch what holds metadata: an entry that points there is corrupt.
fn check_place(meta: &Meta, entry: L2Entry) -> Planned<()> {
    if meta.decoder.place == DataPlace::External || entry.is_compressed() {
        return Ok(());
    }
    let Some(host) = entry.host() else { return Ok(()) };
    let cluster = HostRange::new(host, meta.geometry().cluster_bytes());
    meta.structures.check(cluster, None).map_err(Stop::Corrupt)
}

/// Returns what `intent` leaves of an entry (A.2.1; extended entries likewise).
fn cleared(meta: &Meta, old: L2Entry, intent: Intent) -> L2Entry {
    let place = meta.decoder.host(old).map(|_| old).filter(|entry| !entry.is_compressed());
    if let Some(shared) = meta.shared_zeros(intent) {
        return shared;
    }
    match intent {
        Intent::Cut | Intent::Forget | Intent::Repeated => L2Entry::UNALLOCATED,
        Intent::Discard if !meta.has_backing && old == L2Entry::UNALLOCATED => old,
        Intent::Discard if !meta.has_zero_flag() => L2Entry::UNALLOCATED,
        // Reads as zeros, and no entry of version 2 may say so.
        Intent::ZeroFree if !meta.has_zero_flag() && !meta.has_backing => L2Entry::UNALLOCATED,
        Intent::Discard | Intent::ZeroFree => match meta.on_discard {
            OnDiscard::Free => zero_entry(meta, None),
            OnDiscard::KeepMapping => zero_entry(meta, place),
        },
        Intent::ZeroKeep => zero_entry(meta, place),
    }
}

fn zero_entry(meta: &Meta, keep: Option<L2Entry>) -> L2Entry {
    let entry = keep.unwrap_or(L2Entry::UNALLOCATED);
    match meta.geometry().has_subclusters() {
        true => entry.with_subclusters(SubclusterBitmap::ALL_ZERO),
        false => entry.with_zero_flag(),
    }
}

/// Returns the host bytes of `part`, a part of one cluster, where the cluster keeps them but they
/// hold nothing any more. Never those that a snapshot or another cluster shares (002-6).
fn vacates(
    meta: &mut Meta,
    old: L2Entry,
    new: L2Entry,
    part: GuestRange,
    intent: Intent,
) -> Planned<Option<HostRange>> {
    let Some(host) = new.host().filter(|host| old.host() == Some(*host)) else { return Ok(None) };
    if !intent.may_free() || meta.decoder.place == DataPlace::External {
        return Ok(None);
    }
    if meta.refcounts.read(meta.geometry().host_cluster(host))? != 1 {
        return Ok(None);
    }
    let within = meta.geometry().within_cluster(part.start.0);
    Ok(Some(HostRange::new(host + within, part.len)))
}

/// What became of subclusters that were to be cleared.
#[derive(Debug)]
pub(super) enum Subcleared {
    /// They read as asked.
    Done(Cleared),
    /// Compressed clusters have no subclusters.
    NotPossible,
}

/// Applies `intent` to whole subclusters of one cluster.
///
/// A cluster none of whose subclusters holds data any more is freed, where `intent` allows it
/// (002-15).
pub(super) fn clear_subclusters(
    meta: &mut Meta,
    range: GuestRange,
    intent: Intent,
) -> Planned<Subcleared> {
    meta.before_change(range)?;
    let cluster = meta.geometry().cover_clusters(GuestRange::new(range.start, 1)).start;
    if leaves_no_table(meta, cluster, intent)? {
        return Ok(Subcleared::Done(Cleared::default()));
    }
    let old = meta.entry_to_change(cluster)?;
    if old.is_compressed() {
        return Ok(Subcleared::NotPossible);
    }
    let new = subcleared(meta, old, range, intent);
    if new == old && meta.table(cluster)?.is_some() {
        return Ok(Subcleared::Done(Cleared::default()));
    }
    let left = match meta.discard_unit {
        DiscardUnit::Cluster => None,
        DiscardUnit::Subcluster => vacates(meta, old, new, range, intent)?,
    };
    let freed_bytes = replace(meta, cluster, old, new, intent.freed_by())?;
    let mut done = Cleared { freed_bytes, ..Cleared::default() };
    done.vacate(left);
    Ok(Subcleared::Done(done))
}

fn subcleared(meta: &Meta, old: L2Entry, range: GuestRange, intent: Intent) -> L2Entry {
    let unit = meta.geometry().subcluster_bytes();
    let within = meta.geometry().within_cluster(range.start.0);
    let (from, to) = ((within / unit) as u32, ((within + range.len) / unit) as u32);
    let bitmap = match intent {
        Intent::Cut | Intent::Forget | Intent::Repeated => {
            old.subclusters.with_unallocated(from, to)
        }
        // Unallocated reads as zeros already.
        Intent::Discard if !meta.has_backing => old.subclusters.with_zero_for_data(from, to),
        Intent::Discard | Intent::ZeroFree | Intent::ZeroKeep => {
            old.subclusters.with_zero(from, to)
        }
    };
    let frees = intent.may_free()
        && meta.on_discard == OnDiscard::Free
        && meta.discard_unit == DiscardUnit::Subcluster
        && !bitmap.has_data();
    let entry = if frees { L2Entry::UNALLOCATED } else { old };
    entry.with_subclusters(bitmap)
}
