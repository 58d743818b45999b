//! Moving a batch: bytes, then pointers, then counts.
//!
//! | step | written | a crash before the next leaves |
//! |---|---|---|
//! | 1 | counts of the new places, then bytes there; *flush* | leaks |
//! | 2 | second pins of what is pinned, at the new places; *flush* | leaks |
//! | 3 | every pointer but pins, in any order; *flush* | both places whole, with a count that is high enough |
//! | 4 | pins; *flush* | the same |
//! | 5 | counts of the old places, second pins; *flush* | leaks |
//! | 6 | counts of the new places that had such; *flush* | leaks |
//! | 7 | holes punched in the old places that nobody uses any more | space not given back |
//!
//! Steps 2, 4 and 6 are only for what is pinned ([`anchors`](super::anchors)).
//!
//! * Always: counts are raised before bytes are copied, so that a refcount block which moves has both of
//!   its places counted in both of its copies.

use super::Compaction;
use super::anchors::Crossing;
use super::counts::Changes;
use crate::buffer::{Buffer, Hold};
use crate::qcow2::patch::{Word, write_words};
use crate::storage::{HostStatus, Storage, ZeroMode};
use crate::units::{HostOffset, HostRange};
use crate::{Error, Result};

/// Bytes that are copied at once, unless a cluster is larger.
const COPY_BYTES: u64 = 1 << 20;

/// Something that moves, and how its pointers change.
#[derive(Clone, Copy, Debug)]
pub(super) struct Move {
    /// What is counted of the old place.
    pub(super) from: HostRange,
    /// Where to, and what is counted there; nothing while it has no place.
    pub(super) to: Option<HostRange>,
    /// Bytes to copy.
    pub(super) len: u64,
    /// What its pointers are, as far as `mask` goes.
    pub(super) old: u64,
    /// What they become.
    pub(super) new: u64,
    pub(super) mask: u64,
    /// How many references its pointers are.
    pub(super) weight: u64,
}

impl Move {
    /// Returns what one of its pointers becomes.
    pub(super) const fn word(&self, at: HostOffset) -> Word {
        Word { at, old: self.old, new: self.new, mask: self.mask }
    }

    /// Says whether it is a compressed stream, whose pointers are whole words.
    pub(super) const fn is_stream(&self) -> bool {
        self.mask == !0
    }
}

/// A word of some table that points to the move of that rank.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pointer {
    pub(super) rank: u32,
    pub(super) at: HostOffset,
}

/// What moves in a round, with all pointers to it.
#[derive(Debug, Default)]
pub(super) struct Load {
    pub(super) moves: Vec<Move>,
    pub(super) pointers: Vec<Pointer>,
}

impl Load {
    /// Sorts the pointers by what they point to, and leaves out what has no place.
    fn sort(&mut self) {
        let moves = &self.moves;
        self.pointers.retain(|it| moves[it.rank as usize].to.is_some());
        self.pointers.sort_unstable_by_key(|pointer| (pointer.rank, pointer.at));
        self.pointers.dedup_by_key(|pointer| (pointer.rank, pointer.at));
    }
}

impl<S: Storage> Compaction<'_, S> {
    /// Moves everything that has a place, in batches; ends early where somebody asks to.
    pub(super) async fn carry(&mut self, mut load: Load) -> Result<()> {
        load.sort();
        let mut pointers = &load.pointers[..];
        let mut first = 0;
        while first < load.moves.len() && !self.report.is_stopped {
            let (end, bytes) = self.batch_end(&load.moves, first, pointers);
            let count = pointers.partition_point(|pointer| (pointer.rank as usize) < end);
            let (now, later) = pointers.split_at(count);
            if bytes > 0 {
                self.batch(&load.moves, first..end, now, bytes).await?;
            }
            pointers = later;
            first = end;
        }
        Ok(())
    }

    /// Returns where the batch ends that begins with a move, and how many bytes it has: as much as a
    /// batch takes, and no more pinned clusters than can be pinned twice.
    fn batch_end(&self, moves: &[Move], first: usize, pointers: &[Pointer]) -> (usize, u64) {
        let most = self.anchors.end_of_batch(&self.geometry, pointers).unwrap_or(moves.len());
        let (mut end, mut bytes) = (first, 0);
        while let Some(next) = moves[..most].get(end) {
            let len = next.to.map_or(0, |to| to.len);
            if bytes > 0 && bytes + len > self.batch_bytes {
                break;
            }
            bytes += len;
            end += 1;
        }
        (end, bytes)
    }

    async fn batch(
        &mut self,
        all: &[Move],
        range: std::ops::Range<usize>,
        pointers: &[Pointer],
        bytes: u64,
    ) -> Result<()> {
        let before = (self.report.moved_bytes, self.report.metadata_bytes);
        let moves: Vec<Move> = all[range].iter().filter(|it| it.to.is_some()).copied().collect();
        let crossing = self.crossing(all, pointers);
        let lowered = self.lowered(&moves)?;
        let settled = self.raised(&moves);
        self.write_counts(&crossing.raised(&settled)).await?;
        self.copy_all(&moves).await?;
        self.storage.flush().await?;
        self.cross(&crossing).await?;
        self.counts.reload(self.storage).await?;
        self.write_counts(&lowered).await?;
        self.lift_anchors(&crossing, &settled).await?;
        self.storage.flush().await?;
        self.punch(&lowered).await;
        self.moved_any = true;
        self.report.peak_extra_bytes = self.report.peak_extra_bytes.max(bytes);
        let moved = self.report.moved_bytes - before.0;
        let written = moved + self.report.metadata_bytes - before.1;
        self.tell_moved();
        let step = self.options.after_batch(written).await;
        self.report.is_stopped |= step == super::CompactStep::Stop;
        Ok(())
    }

    /// Has everything point to the new places, durably.
    async fn cross(&mut self, crossing: &Crossing) -> Result<()> {
        if crossing.splits {
            self.cover().await?;
        }
        for words in [&crossing.anchors, &crossing.words, &crossing.pins] {
            self.switch(words).await?;
        }
        Ok(())
    }

    /// Changes words, durably.
    pub(super) async fn switch(&mut self, words: &[Word]) -> Result<()> {
        if words.is_empty() {
            return Ok(());
        }
        self.report.metadata_bytes += write_words(self.storage, words).await?;
        self.storage.flush().await
    }

    /// Writes counts; not durable yet.
    pub(super) async fn write_counts(&mut self, changes: &Changes) -> Result<()> {
        self.report.metadata_bytes += self.counts.write(self.storage, changes).await?;
        Ok(())
    }

    fn raised(&self, moves: &[Move]) -> Changes {
        let mut changes = Changes::new();
        for (to, weight) in moves.iter().filter_map(|it| Some((it.to?, it.weight))) {
            for cluster in self.geometry.host_clusters(to) {
                let count = changes.entry(cluster).or_insert_with(|| self.counts.count(cluster));
                *count += weight;
            }
        }
        changes
    }

    fn lowered(&self, moves: &[Move]) -> Result<Changes> {
        let mut changes = Changes::new();
        for it in moves {
            for cluster in self.geometry.host_clusters(it.from) {
                let count = changes.entry(cluster).or_insert_with(|| self.counts.count(cluster));
                *count = count.checked_sub(it.weight).ok_or_else(|| miscounted(it.from.start))?;
            }
        }
        Ok(changes)
    }

    /// Copies in pieces that are neighbours at both ends.
    async fn copy_all(&mut self, moves: &[Move]) -> Result<()> {
        let mut rest = moves;
        while let Some(first) = rest.first() {
            let Some(to) = first.to else { break };
            let (mut len, mut count) = (first.len, 1);
            while let Some(next) = rest.get(count) {
                let follows = next.from.start.0 == first.from.start.0 + len
                    && next.to.is_some_and(|it| it.start.0 == to.start.0 + len);
                if !follows || len + next.len > COPY_BYTES {
                    break;
                }
                len += next.len;
                count += 1;
            }
            self.copy(HostRange::new(first.from.start, len), to.start).await?;
            self.report.moved_bytes += len;
            rest = &rest[count..];
        }
        Ok(())
    }

    /// Copies bytes; what is a hole stays one.
    async fn copy(&self, from: HostRange, to: HostOffset) -> Result<()> {
        let mut done = 0;
        while done < from.len {
            let len = (from.len - done).min(COPY_BYTES);
            let (source, target) = (HostRange::new(from.start + done, len), to + done);
            let known = self.storage.status_at(source).await?;
            if known.status == HostStatus::Hole && known.len == len {
                let target = HostRange::new(target, len);
                let mode = ZeroMode::MayUnmap;
                self.storage.write_zeroes_at(target, mode, Hold::none()).await?;
            } else {
                let read = self.storage.read_at(source.start, Buffer::new(len as usize)).await;
                read.0.map_err(|error| {
                    error.context(format!("Reading what is to move from {}", source.start))
                })?;
                self.storage.write_at(target, read.1).await.0?;
            }
            done += len;
        }
        Ok(())
    }

    /// Gives back the space of what nobody uses any more, durably so.
    pub(super) async fn punch(&mut self, changes: &Changes) {
        let bytes = self.geometry.cluster_bytes();
        let mut free: Vec<HostRange> = Vec::new();
        for cluster in changes.iter().filter(|(_, count)| **count == 0).map(|(it, _)| *it) {
            let start = HostOffset(cluster * bytes);
            match free.last_mut() {
                Some(last) if last.end() == start => last.len += bytes,
                _ => free.push(HostRange::new(start, bytes)),
            }
        }
        for range in free {
            // Space that is not given back is no harm, and not every host can (D.1-6).
            if self.storage.punch_hole_at(range, Hold::none()).await.is_err() {
                return;
            }
        }
    }
}

#[cold]
pub(super) fn miscounted(at: HostOffset) -> Error {
    Error::corrupt(format!("What lies at {at} is not referenced as often as was counted")).at(at)
}
