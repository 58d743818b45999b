//! Where each byte of a chain lies: its extents with the level that decides them.
//!
//! * Always in guest order, without gaps, neighbours of the same facts joined across answers.
//! * Levels count as `qemu-img map` counts them: the top is 0, and what no level allocates belongs
//!   to the last one that was asked. A backing layer that is too short is not asked.
//! * The host is asked what lies below allocated clusters only where the caller wants that, and then
//!   once for each place, however often the walk comes back to it.

use std::collections::VecDeque;

use super::disk::Disk;
use super::open::{Chain, LevelFacts};
use crate::Result;
use crate::block::{AllocationDepth, Extent, ExtentStatus, Layer, no_status};
use crate::qcow2::HostStatuses;
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange, HostRange};

/// A run of a chain that one level decides.
///
/// ```
/// # use lacuna::chain::MapRun;
/// # use lacuna::{block::ExtentStatus, units::{GuestOffset, GuestRange}};
/// let range = GuestRange::new(GuestOffset(0), 4096);
/// let run = MapRun { range, status: ExtentStatus::UNALLOCATED, level: 0, never_written: false };
/// assert!(!run.is_present() && run.status.reads_zero);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapRun {
    /// Where.
    pub range: GuestRange,
    /// What is known. The depth is nowhere exactly where no level allocates the run.
    pub status: ExtentStatus,
    /// Index in [`Chain::levels`] of the level that decides.
    pub level: usize,
    /// Reads as zeros only since the host never wrote what the level takes for data.
    pub never_written: bool,
}

impl MapRun {
    /// Says whether some level allocates the run.
    #[must_use]
    pub fn is_present(&self) -> bool {
        self.status.depth != AllocationDepth::NOWHERE
    }

    fn is_continued_by(&self, next: &Self) -> bool {
        let extent = |run: &Self| Extent { range: run.range, status: run.status };
        (self.level, self.never_written) == (next.level, next.never_written)
            && extent(self).is_continued_by(&extent(next))
    }
}

/// Goes through a chain; made by [`Chain::map`].
///
/// ```
/// # use std::path::Path;
/// # use lacuna::chain::{self, ChainOptions, Format, MemoryOpener};
/// # use lacuna::{block::Layer, qcow2::Access, storage::MemoryStorage};
/// # let opener = MemoryOpener::default().with("disk", MemoryStorage::from(&[7; 4096][..]));
/// # let options = ChainOptions::new(Format::Raw, Access::ReadOnly);
/// # let chain = pollster::block_on(chain::open(&opener, Path::new("disk"), &options))?;
/// # pollster::block_on(async {
/// let mut map = chain.map(chain.disk().whole());
/// while let Some(run) = map.next().await? {
///     println!("{:?} in {}", run.range, chain.levels()[run.level].content_path().display());
/// }
/// # Ok::<_, lacuna::Error>(())
/// # })?;
/// # Ok::<_, lacuna::Error>(())
/// ```
pub struct Map<'a, S: Storage> {
    chain: &'a Chain<S>,
    /// What was not asked about yet.
    rest: GuestRange,
    /// What the levels say, before the host was asked.
    told: VecDeque<MapRun>,
    /// What is known but not out yet.
    known: VecDeque<MapRun>,
    /// What the host said so far, of the levels where it is to be asked.
    host: Vec<Option<HostStatuses>>,
}

impl<S: Storage> Chain<S> {
    /// Goes through `range` from its start.
    pub fn map(&self, range: GuestRange) -> Map<'_, S> {
        let host = self.levels().iter().map(|_| None).collect();
        Map { chain: self, rest: range, told: VecDeque::new(), known: VecDeque::new(), host }
    }
}

impl<S: Storage> Map<'_, S> {
    /// Has the host asked what lies below the allocated clusters of a qcow2 level: what was never
    /// written reads as zeros. Of a raw level it is asked in any case.
    #[must_use]
    pub fn asking_host_of(mut self, level: usize) -> Self {
        let is_qcow2 = self.chain.level_disk(level).is_some_and(|disk| disk.as_qcow2().is_some());
        if let (Some(host), true) = (self.host.get_mut(level), is_qcow2) {
            *host = Some(HostStatuses::default());
        }
        self
    }

    /// Returns the next run, or nothing at the end.
    ///
    /// # Errors
    /// As [`Layer::extents`].
    pub async fn next(&mut self) -> Result<Option<MapRun>> {
        // The last known run may go on in the next answer.
        while self.known.len() < 2 {
            match self.told.pop_front() {
                Some(run) => self.judge(run).await?,
                None if self.rest.is_empty() => break,
                None => self.learn().await?,
            }
        }
        Ok(self.known.pop_front())
    }

    async fn learn(&mut self) -> Result<()> {
        let extents = self.chain.disk().extents(self.rest).await?;
        let last = extents.last().ok_or_else(|| no_status(self.rest))?;
        let end = last.range.end();
        for extent in extents {
            split(extent, self.chain.levels(), &mut self.told);
        }
        self.rest = GuestRange::new(end, self.rest.end().0.saturating_sub(end.0));
        Ok(())
    }

    /// Takes over a run, or of one that the host should be asked about as much as it says at once.
    async fn judge(&mut self, run: MapRun) -> Result<()> {
        let disk = self.chain.level_disk(run.level).and_then(Disk::as_qcow2);
        let host = self.host.get_mut(run.level).and_then(Option::as_mut);
        let is_data = run.is_present() && !run.status.reads_zero;
        let (Some(disk), Some(host), Some(at), true) = (disk, host, run.status.host, is_data)
        else {
            push(&mut self.known, run);
            return Ok(());
        };
        let found = host.first(disk.data_storage(), HostRange::new(at, run.range.len)).await?;
        let (part, rest) = run.cut(found.len);
        let never_written = found.status.reads_zero();
        let is_hole = found.status.is_hole();
        let status = ExtentStatus { reads_zero: never_written, is_hole, ..part.status };
        push(&mut self.known, MapRun { status, never_written, ..part });
        if !rest.range.is_empty() {
            self.told.push_front(rest);
        }
        Ok(())
    }
}

impl MapRun {
    /// Cuts off the first `len` bytes, or all where there are not so many.
    fn cut(self, len: u64) -> (Self, Self) {
        let len = len.min(self.range.len);
        let range = GuestRange::new(self.range.start + len, self.range.len - len);
        let rest = Self { range, status: self.status.advanced(len), ..self };
        (Self { range: GuestRange::new(self.range.start, len), ..self }, rest)
    }
}

/// Cuts an extent where a level ends, since there another one decides.
fn split(extent: Extent, levels: &[LevelFacts], out: &mut VecDeque<MapRun>) {
    let mut at = extent.range.start;
    while at < extent.range.end() {
        let (reached, end) = reach(at, levels);
        let len = (extent.range.end() - at).min(end.saturating_sub(at.0)).max(1);
        let status = extent.status.advanced(at - extent.range.start);
        push(out, run(GuestRange::new(at, len), status, reached));
        at = at + len;
    }
}

/// The last level that is asked about `at`, and up to where that holds.
fn reach(at: GuestOffset, levels: &[LevelFacts]) -> (usize, u64) {
    let asked = levels.iter().skip(1).take_while(|level| level.size_bytes > at.0);
    let end = asked.clone().map(|level| level.size_bytes).min().unwrap_or(u64::MAX);
    (asked.count(), end)
}

fn run(range: GuestRange, status: ExtentStatus, reached: usize) -> MapRun {
    match (status.depth.0 as usize).checked_sub(1) {
        Some(level) if level <= reached => MapRun { range, status, level, never_written: false },
        // Allocated nowhere, or zeros that a layer gives past its end.
        _ => {
            let depth = AllocationDepth::NOWHERE;
            let status = ExtentStatus { depth, ..status };
            MapRun { range, status, level: reached, never_written: false }
        }
    }
}

fn push(out: &mut VecDeque<MapRun>, next: MapRun) {
    match out.back_mut() {
        Some(last) if last.is_continued_by(&next) => last.range.len += next.range.len,
        _ => out.push_back(next),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::Format;

    fn levels(sizes: &[u64]) -> Vec<LevelFacts> {
        let level = |&size_bytes: &u64| LevelFacts {
            path: size_bytes.to_string().into(),
            format: Format::Raw,
            size_bytes,
            data_path: None,
        };
        sizes.iter().map(level).collect()
    }

    fn mapped(depth: u32, start: u64, len: u64, sizes: &[u64]) -> Vec<(u64, u64, usize, bool)> {
        let range = GuestRange::new(GuestOffset(start), len);
        let status = ExtentStatus { depth: AllocationDepth(depth), ..ExtentStatus::UNALLOCATED };
        let mut out = VecDeque::new();
        split(Extent { range, status }, &levels(sizes), &mut out);
        out.iter()
            .map(|run| (run.range.start.0, run.range.len, run.level, run.is_present()))
            .collect()
    }

    #[test]
    fn what_no_level_allocates_belongs_to_the_last_one_asked() {
        assert_eq!(mapped(0, 0, 100, &[100]), [(0, 100, 0, false)]);
        assert_eq!(mapped(0, 0, 100, &[100, 100]), [(0, 100, 1, false)]);
        // The middle level is short: what is below it is never asked past its end.
        assert_eq!(mapped(0, 0, 100, &[100, 40, 100]), [(0, 40, 2, false), (40, 60, 0, false)]);
        let steps = [(0, 20, 2, false), (20, 40, 1, false), (60, 40, 0, false)];
        assert_eq!(mapped(0, 0, 100, &[100, 60, 20]), steps);
    }

    #[test]
    fn zeros_past_the_end_of_a_short_layer_are_not_its_own() {
        assert_eq!(mapped(2, 0, 100, &[100, 40]), [(0, 40, 1, true), (40, 60, 0, false)]);
        assert_eq!(mapped(1, 0, 100, &[100, 40]), [(0, 100, 0, true)]);
    }
}
