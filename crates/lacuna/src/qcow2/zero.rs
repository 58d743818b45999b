//! Zeroing and discarding.

use super::format::Version;
use super::image::Image;
use super::in_flight::Touch;
use super::mapping::DataPlace;
use super::need::Need;
use super::plan_zero::{Intent, Subzeroed, clear_clusters, zero_subclusters};
use crate::block::{DiscardMode, WriteFlags, ZeroFlags};
use crate::buffer::{Buffer, Hold};
use crate::storage::{Capability, Storage, ZeroMode};
use crate::units::{GuestOffset, GuestRange, HostOffset, HostRange};
use crate::{Error, Result};

/// Bytes of explicit zeros in flight at once.
const ZERO_BYTES_AT_ONCE: u64 = 2 << 20;

/// A range cut at the borders of a unit: what is before, whole units, what is behind.
struct Parts {
    head: GuestRange,
    middle: GuestRange,
    tail: GuestRange,
}

/// Cuts `range` at multiples of `unit`. The end of the disk counts as a border: whole units then
/// reach past it.
fn cut(range: GuestRange, unit: u64, disk_bytes: u64) -> Parts {
    let end = match range.end().0 == disk_bytes {
        true => range.end().0.next_multiple_of(unit),
        false => range.end().0,
    };
    let part = |from: u64, to: u64| GuestRange::new(GuestOffset(from), to.saturating_sub(from));
    let first = range.start.0.next_multiple_of(unit);
    if first >= range.end().0 {
        // Inside one unit, be it the last one: the end of the disk completes no unit whose start
        // is left out.
        let nothing = part(range.end().0, range.end().0);
        return Parts { head: range, middle: nothing, tail: nothing };
    }
    let last = (end / unit * unit).max(first);
    Parts {
        head: part(range.start.0, first),
        middle: part(first, last),
        tail: part(last, range.end().0),
    }
}

impl<S: Storage> Image<S> {
    pub(super) async fn zero_guest(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        self.0.meta.lock().check_bounds(range)?;
        if range.is_empty() {
            return Ok(());
        }
        match self.geometry().version() {
            Version::V2 => self.zero_without_flag(range, flags).await?,
            Version::V3 => self.zero_with_flag(range, flags).await?,
        }
        if flags.contains(ZeroFlags::FUA) { self.flush_all().await } else { Ok(()) }
    }

    /// Version 2 cannot say "zero": unallocated is zero only where nothing lies below (001-5).
    async fn zero_without_flag(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        if self.0.backing.is_some() {
            return self.zero_by_bytes(range, flags).await;
        }
        let parts = cut(range, self.geometry().cluster_bytes(), self.size());
        self.zero_part_by_bytes(parts.head, flags).await?;
        self.clear(parts.middle, Intent::Forget).await?;
        self.zero_part_by_bytes(parts.tail, flags).await
    }

    async fn zero_with_flag(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        if self.place() == DataPlace::External {
            self.zero_data_file(range, flags).await?;
        }
        let parts = cut(range, self.geometry().subcluster_bytes(), self.size());
        self.zero_part(parts.head, flags).await?;
        if !parts.middle.is_empty() {
            let hold = self.exclude_others(parts.middle).await?;
            self.zero_units(parts.middle, flags, hold).await?;
        }
        self.zero_part(parts.tail, flags).await
    }

    /// A raw data file must read as zeros by itself: its bytes go first (D.1-47).
    async fn zero_data_file(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        if !self.0.header.lock().has_raw_external_data() {
            return Ok(());
        }
        let mode = match flags.contains(ZeroFlags::MAY_UNMAP) {
            true => ZeroMode::MayUnmap,
            false => ZeroMode::Allocate,
        };
        let host = HostRange::new(HostOffset(range.start.0), range.len);
        self.plan(|meta| meta.before_change(range)).await?;
        let hold = self.exclude_others(range).await?;
        self.data_storage().write_zeroes_at(host, mode, hold).await
    }

    /// Zeros whole subclusters (or clusters) that `hold` keeps others away from.
    async fn zero_units(&self, range: GuestRange, flags: ZeroFlags, hold: Hold) -> Result<()> {
        let intent = match flags.contains(ZeroFlags::MAY_UNMAP) {
            true => Intent::ZeroFree,
            false => Intent::ZeroKeep,
        };
        let end_of_units = self.size().next_multiple_of(self.geometry().subcluster_bytes());
        let parts = cut(range, self.geometry().cluster_bytes(), end_of_units);
        let head = self.zero_some_subclusters(parts.head).await?;
        self.clear_held(parts.middle, intent).await?;
        let tail = self.zero_some_subclusters(parts.tail).await?;
        // Writing bytes takes the clusters for itself.
        drop(hold);
        for (part, outcome) in [(parts.head, head), (parts.tail, tail)] {
            if outcome == Subzeroed::NotPossible {
                let end = part.end().0.min(self.size());
                let inside = GuestRange::new(part.start, end - part.start.0);
                self.zero_by_bytes(inside, flags).await?;
            }
        }
        Ok(())
    }

    /// Zeros subclusters of one cluster.
    async fn zero_some_subclusters(&self, range: GuestRange) -> Result<Subzeroed> {
        match range.is_empty() {
            true => Ok(Subzeroed::Done),
            false => self.plan(|meta| zero_subclusters(meta, range)).await,
        }
    }

    /// Zeros less than a unit: the whole unit, where the rest of it reads as zeros anyway
    /// (004-5a), else by bytes.
    async fn zero_part(&self, part: GuestRange, flags: ZeroFlags) -> Result<()> {
        if part.is_empty() {
            return Ok(());
        }
        let unit = self.geometry().subcluster_bytes();
        let start = part.start.0 / unit * unit;
        let whole = GuestRange::new(GuestOffset(start), unit);
        let end = (start + unit).min(self.size());
        let before = GuestRange::new(whole.start, part.start.0 - start);
        let behind = GuestRange::new(part.end(), end - part.end().0);
        let hold = self.exclude_others(whole).await?;
        if self.reads_zero(before).await? && self.reads_zero(behind).await? {
            return self.zero_units(whole, flags, hold).await;
        }
        drop(hold);
        self.zero_by_bytes(part, flags).await
    }

    async fn zero_part_by_bytes(&self, part: GuestRange, flags: ZeroFlags) -> Result<()> {
        if part.is_empty() || self.reads_zero(part).await? {
            return Ok(());
        }
        self.zero_by_bytes(part, flags).await
    }

    pub(super) async fn zero_by_bytes(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        if flags.contains(ZeroFlags::FAST) {
            return Err(Error::unsupported(format!(
                "{} bytes at {} cannot be zeroed faster than written",
                range.len, range.start
            )));
        }
        let mut at = range.start;
        while at < range.end() {
            let len = ZERO_BYTES_AT_ONCE.min(range.end() - at);
            let zeros = Buffer::zeroed(len as usize);
            self.write_guest(at, zeros, WriteFlags::empty()).await.0?;
            at = at + len;
        }
        Ok(())
    }

    // ---- discard ---------------------------------------------------------------------------

    pub(super) async fn discard_guest(&self, range: GuestRange, mode: DiscardMode) -> Result<()> {
        self.0.meta.lock().check_bounds(range)?;
        let intent = match (mode, self.geometry().version()) {
            (DiscardMode::Full, _) => Intent::Forget,
            // Old data would show through from below, and no flag can hide it (D.1-7).
            (DiscardMode::Guest, Version::V2) if self.0.backing.is_some() => return Ok(()),
            (DiscardMode::Guest, _) => Intent::Discard,
        };
        let parts = cut(range, self.geometry().cluster_bytes(), self.size());
        self.clear(parts.middle, intent).await?;
        self.discard_in_data_file(parts.middle).await
    }

    /// The data file's space goes back once the map no longer shows it.
    async fn discard_in_data_file(&self, range: GuestRange) -> Result<()> {
        if self.place() == DataPlace::ImageFile || range.is_empty() || !self.0.discard.guest {
            return Ok(());
        }
        self.flush_all().await?;
        let hold = self.exclude_others(range).await?;
        let end = range.end().0.min(self.size());
        let host = HostRange::new(HostOffset(range.start.0), end - range.start.0);
        match self.data_storage().capabilities().punch_hole {
            Capability::Unsupported => Ok(()),
            _ => self.data_storage().punch_hole_at(host, hold).await,
        }
    }

    /// Changes the map of whole clusters.
    pub(super) async fn clear(&self, range: GuestRange, intent: Intent) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let _hold = self.exclude_others(range).await?;
        self.clear_held(range, intent).await
    }

    pub(super) async fn clear_held(&self, range: GuestRange, intent: Intent) -> Result<()> {
        let mut at = range.start;
        while at < range.end() {
            let rest = GuestRange::new(at, range.end() - at);
            at = at + self.plan(|meta| clear_clusters(meta, rest, intent)).await?;
        }
        Ok(())
    }

    /// Waits until nothing else changes these clusters, and keeps it so while the hold lives.
    pub(super) async fn exclude_others(&self, range: GuestRange) -> Result<Hold> {
        let clusters = self.geometry().cover_clusters(range);
        let token = self
            .plan(|meta| Ok(meta.in_flight.begin(Touch::Map, clusters).map_err(Need::Turn)?))
            .await?;
        Ok(self.hold(token))
    }

    pub(super) fn size(&self) -> u64 {
        self.0.meta.lock().size_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_at_cluster_borders_and_the_end_of_the_disk_is_one() {
        let parts = cut(GuestRange::new(GuestOffset(100), 2000), 512, 2100);
        assert_eq!((parts.head.len, parts.middle.start.0, parts.middle.len), (412, 512, 2048));
        assert!(parts.tail.is_empty());
        let parts = cut(GuestRange::new(GuestOffset(600), 100), 512, 9999);
        assert_eq!((parts.head.len, parts.middle.len, parts.tail.len), (100, 0, 0));
        let parts = cut(GuestRange::new(GuestOffset(512), 700), 512, 9999);
        assert_eq!((parts.head.len, parts.middle.len, parts.tail.len), (0, 512, 188));
        let parts = cut(GuestRange::new(GuestOffset(600), 100), 512, 700);
        assert_eq!((parts.head.len, parts.middle.len, parts.tail.len), (100, 0, 0));
        let parts = cut(GuestRange::new(GuestOffset(512), 188), 512, 700);
        assert_eq!((parts.head.len, parts.middle.start.0, parts.middle.len), (0, 512, 512));
    }
}
