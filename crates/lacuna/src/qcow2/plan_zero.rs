//! Decides what zeroing and discarding leave in the map: the table of A.2.1, as code. Pure.

use super::format::{L2Entry, SubclusterBitmap};
use super::meta::Meta;
use super::need::Planned;
use super::quarantine::FreedBy;
use crate::units::{GuestOffset, GuestRange};

/// What the caller wants of whole clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Intent {
    /// A guest discard: reads as zeros afterwards, space is given back.
    Discard,
    /// Nothing of this image remains: the backing layer shows through.
    Forget,
    /// Reads as zeros, the host cluster stays reserved.
    ZeroKeep,
    /// Reads as zeros, space may be given back.
    ZeroFree,
}

/// Applies `intent` to the leading whole clusters of `range` (all bounds on cluster borders).
/// Returns how many bytes are done: a slice's worth, or a table's where none is needed.
pub(super) fn clear_clusters(meta: &mut Meta, range: GuestRange, intent: Intent) -> Planned<u64> {
    meta.before_change(GuestRange::new(range.start, 0))?;
    if leaves_no_table(meta, range.start, intent)? {
        let coverage = meta.geometry().l2_coverage_bytes();
        let table_end = GuestOffset((range.start.0 / coverage + 1) * coverage);
        return Ok(table_end.min(range.end()) - range.start);
    }
    let end = meta.slice_end(range.start).min(range.end());
    meta.before_change(GuestRange::new(range.start, end - range.start))?;
    let cluster_bytes = meta.geometry().cluster_bytes() as usize;
    for start in (range.start.0..end.0).step_by(cluster_bytes) {
        clear_cluster(meta, GuestOffset(start), intent)?;
    }
    Ok(end - range.start)
}

/// Says whether there is no L2 table and need not be one.
fn leaves_no_table(meta: &Meta, guest: GuestOffset, intent: Intent) -> Planned<bool> {
    let needs_entries = match intent {
        Intent::Discard => meta.has_backing,
        Intent::Forget => false,
        Intent::ZeroFree | Intent::ZeroKeep => true,
    };
    Ok(!needs_entries && meta.table(guest)?.is_none())
}

fn clear_cluster(meta: &mut Meta, guest: GuestOffset, intent: Intent) -> Planned<()> {
    let old = meta.entry_to_change(guest)?;
    let new = cleared(meta, old, intent);
    if new == old && meta.table(guest)?.is_some() {
        // 001-3: an entry that is in the target state is not dirtied.
        return Ok(());
    }
    replace(meta, guest, old, new)
}

fn replace(meta: &mut Meta, guest: GuestOffset, old: L2Entry, new: L2Entry) -> Planned<()> {
    meta.own_table(guest)?;
    // A table just copied or made has the same entry, and its slice is at hand after this.
    meta.entry(guest)?;
    let frees = meta.references(old) != meta.references(new);
    if frees {
        meta.prepare_free(old)?;
    }
    meta.set_entry(guest, new)?;
    if frees {
        meta.free_entry(old, FreedBy::Guest)?;
    }
    Ok(())
}

/// Returns what `intent` leaves of an entry (A.2.1; extended entries likewise).
fn cleared(meta: &Meta, old: L2Entry, intent: Intent) -> L2Entry {
    match intent {
        Intent::Forget => L2Entry::UNALLOCATED,
        Intent::Discard if !meta.has_backing && old == L2Entry::UNALLOCATED => old,
        Intent::Discard if !meta.has_zero_flag() => L2Entry::UNALLOCATED,
        Intent::Discard | Intent::ZeroFree => zero_entry(meta, None),
        Intent::ZeroKeep if old.is_compressed() => zero_entry(meta, None),
        Intent::ZeroKeep => zero_entry(meta, meta.decoder.host(old).map(|_| old)),
    }
}

fn zero_entry(meta: &Meta, keep: Option<L2Entry>) -> L2Entry {
    let entry = keep.unwrap_or(L2Entry::UNALLOCATED);
    match meta.geometry().has_subclusters() {
        true => entry.with_subclusters(SubclusterBitmap::ALL_ZERO),
        false => entry.with_zero_flag(),
    }
}

/// What became of subclusters that were to be zeroed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Subzeroed {
    Done,
    /// Compressed clusters have no subclusters: write bytes instead.
    NotPossible,
}

/// Makes whole subclusters of one cluster read as zeros; the host cluster stays.
pub(super) fn zero_subclusters(meta: &mut Meta, range: GuestRange) -> Planned<Subzeroed> {
    meta.before_change(range)?;
    let cluster = meta.geometry().cover_clusters(GuestRange::new(range.start, 1)).start;
    let old = meta.entry_to_change(cluster)?;
    if old.is_compressed() {
        return Ok(Subzeroed::NotPossible);
    }
    let unit = meta.geometry().subcluster_bytes();
    let from = (range.start - cluster) / unit;
    let to = (range.end() - cluster) / unit;
    let new = old.with_subclusters(old.subclusters.with_zero(from as u32, to as u32));
    if new != old || meta.table(cluster)?.is_none() {
        replace(meta, cluster, old, new)?;
    }
    Ok(Subzeroed::Done)
}
