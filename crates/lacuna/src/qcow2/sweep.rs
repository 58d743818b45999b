//! Zeros that take space although nobody needs them written: found by reading, given back.
//!
//! * Always: what is cleared was read as zeros while nobody could change it. The first look takes no
//!   clusters for itself, so that a range without zeros holds nobody up.
//! * Always: content stays as it was; only what the map says of it changes.

use super::clear::{Clearing, cut};
use super::image::Image;
use super::mapping::{Mapping, OnWrite};
use super::meta::Meta;
use super::plan_zero::Intent;
use super::view::View;
use crate::block::is_zero;
use crate::buffer::Buffer;
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange};
use crate::{ErrorKind, Result};

/// What became of a range.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Swept {
    /// Guest bytes that were data and are zeros by the map now.
    pub(crate) zeroed_bytes: u64,
    /// Host bytes of the image file that nothing uses any more.
    pub(crate) freed_bytes: u64,
}

impl<S: Storage> Image<S> {
    /// Says whether the map can tell of zeros at all.
    pub(crate) fn can_say_zero(&self) -> bool {
        self.can_flag_zeros() || self.0.backing.is_none() || self.shares_zeros()
    }

    /// Clears the clusters and subclusters of `range` that hold zeros. Reads all of it at once. Nothing
    /// where the disk was cut before its end.
    pub(crate) async fn sweep_range(&self, range: GuestRange) -> Result<Option<Swept>> {
        let is_there = |meta: &mut Meta| {
            meta.before_metadata_change()?;
            Ok(meta.check_bounds(range).is_ok())
        };
        if !self.plan(is_there).await? {
            return Ok(None);
        }
        let mut swept = Swept::default();
        for run in self.zero_units(range).await? {
            self.give_way().await;
            self.sweep_run(run, &mut swept).await?;
        }
        Ok(Some(swept))
    }

    /// Counts what [`sweep_range`](Self::sweep_range) would clear, and clears nothing. Of
    /// compressed clusters it does not know what they would free.
    pub(crate) async fn count_sweepable(&self, range: GuestRange) -> Result<Option<Swept>> {
        if self.0.meta.lock().check_bounds(range).is_err() {
            return Ok(None);
        }
        let mut swept = Swept::default();
        for run in self.zero_units(range).await? {
            let mut at = run.start;
            while at < run.end() {
                let rest = GuestRange::new(at, run.end() - at);
                let found = self.plan(|meta| meta.run(rest)).await?;
                self.count_run(GuestRange::new(at, found.len), found.mapping, &mut swept);
                at = at + found.len;
            }
        }
        Ok(Some(swept))
    }

    fn count_run(&self, part: GuestRange, mapping: Mapping, swept: &mut Swept) {
        let bytes = part.end().0.min(self.size()).saturating_sub(part.start.0);
        match mapping {
            Mapping::Compressed(_) => swept.zeroed_bytes += bytes,
            Mapping::Data { on_write, .. } => {
                swept.zeroed_bytes += bytes;
                if on_write == OnWrite::InPlace {
                    let geometry = self.geometry();
                    let end_of_units = self.size().next_multiple_of(geometry.subcluster_bytes());
                    let whole = cut(part, geometry.cluster_bytes(), end_of_units).middle;
                    swept.freed_bytes += whole.len;
                }
            }
            Mapping::Unallocated { .. } | Mapping::Zero { .. } => {}
        }
    }

    /// Returns the runs of whole units in `range` that read as zeros. Reads all of it at once.
    async fn zero_units(&self, range: GuestRange) -> Result<Vec<GuestRange>> {
        let unit = self.geometry().subcluster_bytes();
        let units = cut(range, unit, self.size()).middle;
        let len = units.end().0.min(range.end().0).saturating_sub(units.start.0);
        let bytes = self.look(GuestRange::new(units.start, len)).await?;
        Ok(zero_runs(&bytes, units.start, unit))
    }

    /// Reads by the map; the caller keeps the clusters from being changed.
    pub(super) async fn look(&self, range: GuestRange) -> Result<Buffer> {
        let (result, bytes) =
            self.read_mapped(View::Active, range.start, Buffer::new(range.len as usize)).await;
        result.map(|()| bytes)
    }

    /// Looks again at units that held zeros, now that nobody else writes there.
    async fn sweep_run(&self, run: GuestRange, swept: &mut Swept) -> Result<()> {
        let mut clearing = Clearing::begin(self.exclude_others(run).await?);
        let mut at = run.start;
        while at < run.end() {
            let rest = GuestRange::new(at, run.end() - at);
            let found = self.plan(|meta| meta.run(rest)).await?;
            let part = GuestRange::new(at, found.len);
            if matches!(found.mapping, Mapping::Data { .. } | Mapping::Compressed(_)) {
                clearing = self.sweep_held(part, clearing, swept).await?;
            }
            at = at + found.len;
        }
        Ok(())
    }

    async fn sweep_held(
        &self,
        part: GuestRange,
        clearing: Clearing,
        swept: &mut Swept,
    ) -> Result<Clearing> {
        let len = part.end().0.min(self.size()).saturating_sub(part.start.0);
        if len == 0 || !is_zero(&self.look(GuestRange::new(part.start, len)).await?) {
            return Ok(clearing);
        }
        let (hold, kept) = clearing.hold.shared();
        let cleared = match self.clear_units(part, Intent::ZeroFree, hold).await {
            // Nothing more can share the zeros: they stay data.
            Err(error) if error.kind() == ErrorKind::Unsupported && !self.can_flag_zeros() => {
                return Ok(Clearing::begin(kept));
            }
            result => result?,
        };
        // Parts of compressed clusters stay as they are.
        let refused: u64 = cleared.refused.iter().map(|part| part.len).sum();
        swept.zeroed_bytes += len.saturating_sub(refused);
        swept.freed_bytes += cleared.freed_bytes;
        self.discard_in_data_file(GuestRange::new(part.start, len), cleared.hold).await?;
        Ok(Clearing::begin(kept))
    }
}

/// Returns the runs of whole units in `bytes` that are zeros; the last unit may be cut off by the
/// end of the disk.
fn zero_runs(bytes: &[u8], start: GuestOffset, unit: u64) -> Vec<GuestRange> {
    let mut runs: Vec<GuestRange> = Vec::new();
    for (index, chunk) in (0..).zip(bytes.chunks(unit as usize)) {
        if !is_zero(chunk) {
            continue;
        }
        let at = start + index * unit;
        match runs.last_mut() {
            Some(last) if last.end() == at => last.len += unit,
            _ => runs.push(GuestRange::new(at, unit)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_zero_units_are_found_between_data_and_at_the_end() {
        let mut bytes = vec![0; 5 * 512 + 100];
        bytes[1024] = 1;
        let runs = zero_runs(&bytes, GuestOffset(4096), 512);
        let run = |start, len| GuestRange::new(GuestOffset(start), len);
        assert_eq!(runs, [run(4096, 1024), run(4096 + 1536, 3 * 512)]);
    }
}
