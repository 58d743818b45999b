//! Data put in the order in which guests have it, in the file as it is, through few free clusters.
//!
//! The story: tables gather at the front of the file; behind them, data gets the places that are left,
//! as `walk` shows it: the active disk from its start, then what only snapshots have, then bitmaps.
//! A cluster that several guest clusters share has the place of the first. `shuffle` says who moves
//! when. Clusters of compressed streams stay where compaction has packed them.
//!
//! * Always: what is free is as much as a batch, at the end of the file or wherever holes are.
//! * Bounded: as many places at a time as memory allows, each time with a walk of the tables.

use std::collections::HashMap;
use std::ops::ControlFlow;

use foldhash::fast::RandomState;

use super::bits::Bits;
use super::collect::Collector;
use super::moves::{Load, Move, Pointer};
use super::rounds::{Area, MOVE_BYTES, POINTER_BYTES, place};
use super::shuffle::{Piece, Shuffle, Step};
use super::structures::{Kind, Structures};
use super::walk::{Seen, walk};
use super::{CompactEstimate, CompactExtents, Compaction};
use crate::Result;
use crate::storage::{Capability, Storage};
use crate::units::HostCluster;

/// What is to be done to have data in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Disorder {
    /// Clusters with data that lie elsewhere than in their places.
    pub(super) displaced: u64,
    /// Runs of the active disk.
    pub(super) extents: CompactExtents,
    /// How often its data does not follow, in the file, what comes before it on the disk, wherever on
    /// the disk that is; what shows an earlier cluster once more does not count.
    jumps: CompactExtents,
    /// How many of these lead back.
    back: u64,
}

/// What data cannot have, and what it can.
struct Layout {
    /// Clusters that hold something else than data.
    fixed: Bits,
    /// How many clusters hold data.
    data: u64,
}

impl Layout {
    /// Returns the places of data, in order.
    fn places(&self) -> impl Iterator<Item = u64> + Send + '_ {
        (1..).filter(|cluster| !self.fixed.contains(*cluster)).take(self.data as usize)
    }
}

impl<S: Storage> Compaction<'_, S> {
    /// Puts data in order, unless it lies as well as it can. Compaction has ended, but for data.
    pub(super) async fn put_in_order(&mut self) -> Result<()> {
        self.structures = Structures::read(self.storage).await?;
        self.plan = self.make_plan();
        let now = self.disorder(&self.layout().await?).await?;
        self.report.extents = Some(now.extents);
        if self.is_in_order(&now) {
            return Ok(());
        }
        self.open_window().await?;
        self.gather().await?;
        let layout = self.layout().await?;
        let bytes = self.disorder(&layout).await?.displaced << self.geometry.cluster_bits();
        self.total_bytes = self.report.moved_bytes + bytes;
        let mut rank = 0;
        while !self.report.is_stopped && rank < layout.data {
            rank = self.order_some(&layout, rank).await?;
        }
        Ok(())
    }

    /// Says what putting data in order would do.
    pub(super) async fn estimate_order(&self, estimate: &mut CompactEstimate) -> Result<()> {
        let layout = self.layout().await?;
        let now = self.disorder(&layout).await?;
        estimate.extents = Some(now.extents);
        if self.is_in_order(&now) {
            return Ok(());
        }
        let front = self.front(&layout.fixed);
        let strays = self.single_tables().filter(|cluster| !front.contains(*cluster)).count();
        let mut wanted = Layout { fixed: layout.fixed.clone(), ..layout };
        self.single_tables().for_each(|cluster| wanted.fixed.remove(cluster));
        front.iter().for_each(|cluster| wanted.fixed.insert(cluster));
        let gathered = self.disorder_to(&layout, &wanted).await?;
        estimate.extents = Some(gathered.extents);
        let clusters = gathered.displaced + strays as u64;
        estimate.moved_bytes = clusters << self.geometry.cluster_bits();
        Ok(())
    }

    /// Says whether nothing would be gained: who reads the disk jumps as little as can be where tables
    /// are, and nothing is left for compaction to move.
    fn is_in_order(&self, now: &Disorder) -> bool {
        now.back == 0 && now.jumps.before <= now.jumps.after && self.end() <= self.plan.goal
    }

    /// Notes how many runs the active disk has now.
    pub(super) async fn count_extents_after(&mut self) -> Result<()> {
        self.structures = Structures::read(self.storage).await?;
        let now = self.disorder(&self.layout().await?).await?.extents.before;
        if let Some(extents) = &mut self.report.extents {
            extents.after = now;
        }
        Ok(())
    }

    /// Finds what data cannot have: what tables, and compressed streams, lie in.
    async fn layout(&self) -> Result<Layout> {
        let (geometry, mut fixed) = (self.geometry, self.metadata());
        let mut visit = |seen| {
            if let Seen::Stream(range) = seen {
                geometry.host_clusters(range).for_each(|cluster| fixed.insert(cluster));
            }
            ControlFlow::Continue(())
        };
        walk(self.storage, &self.structures, self.clusters, &mut visit).await?;
        let data = self.counts.used().filter(|cluster| !fixed.contains(*cluster)).count() as u64;
        Ok(Layout { fixed, data })
    }

    /// Compares where data lies with its places.
    async fn disorder(&self, layout: &Layout) -> Result<Disorder> {
        self.disorder_to(layout, layout).await
    }

    /// Compares where data lies with the places that another layout has for it.
    async fn disorder_to(&self, layout: &Layout, wanted: &Layout) -> Result<Disorder> {
        let mut tally = Tally::default();
        let (mut places, mut met) = (wanted.places(), Bits::new(self.clusters));
        let mut visit = |seen| {
            if let Seen::Data { guest, host } = seen
                && !layout.fixed.contains(host)
            {
                let is_first = !met.contains(host);
                met.insert(host);
                let place = if is_first { places.next() } else { None };
                tally.note(guest, host, place);
            }
            ControlFlow::Continue(())
        };
        walk(self.storage, &self.structures, self.clusters, &mut visit).await?;
        Ok(tally.disorder)
    }

    // ---- room ------------------------------------------------------------------------------

    /// Counts clusters behind what is in use as free ones, as many as a batch takes.
    async fn open_window(&mut self) -> Result<()> {
        let window = (self.batch_bytes >> self.geometry.cluster_bits()).max(1);
        let end = self.end().max(self.plan.goal + window).min(self.furthest().await?);
        self.clusters = self.clusters.max(end);
        self.counts.grow(self.clusters);
        self.add_blocks(end).await
    }

    /// Returns the end of what the file can have, for a while.
    pub(super) async fn furthest(&self) -> Result<u64> {
        let per_block = self.geometry.refcount_block_entries();
        let counted = self.counts.table.entries.len() as u64 * per_block;
        Ok(match self.storage.capabilities().set_len {
            Capability::Unsupported => {
                counted.min(self.storage.len().await? >> self.geometry.cluster_bits())
            }
            Capability::Native | Capability::Emulated => counted,
        })
    }

    /// Returns the clusters in which nothing is.
    fn free(&self) -> Bits {
        let (used, mut free) = (self.used(), Bits::new(self.clusters));
        let is_counted = |cluster: &u64| self.counts.has_block(*cluster);
        let unused = (1..self.clusters).filter(|cluster| !used.contains(*cluster));
        unused.filter(is_counted).for_each(|cluster| free.insert(cluster));
        free
    }

    // ---- tables ----------------------------------------------------------------------------

    /// Returns tables of one cluster, but those refcount blocks that are to go.
    fn single_tables(&self) -> impl Iterator<Item = u64> + '_ {
        let tables = self.structures.tables.values().filter(|table| table.run.clusters == 1);
        let blocks = self.blocks().filter(|(index, _)| !self.is_doomed(*index));
        let l2 = self.structures.l2.keys().copied();
        l2.chain(tables.map(|table| table.run.first)).chain(blocks.map(|(_, cluster)| cluster))
    }

    /// Returns where they can lie together: the first clusters that they, or data, can have.
    fn front(&self, fixed: &Bits) -> Bits {
        let mut stays = fixed.clone();
        self.single_tables().for_each(|cluster| stays.remove(cluster));
        let mut front = Bits::new(self.clusters);
        let cells = (1..self.clusters).filter(|cluster| !stays.contains(*cluster));
        cells.take(self.single_tables().count()).for_each(|cluster| front.insert(cluster));
        front
    }

    /// Moves tables to the front: data goes out of it first.
    async fn gather(&mut self) -> Result<()> {
        self.structures = Structures::read(self.storage).await?;
        self.front = self.front(&self.layout().await?.fixed);
        if self.single_tables().all(|cluster| self.front.contains(cluster)) {
            return Ok(());
        }
        self.plan.holes = self.free_where(|front, cluster| !front.contains(cluster));
        self.move_data(Area::Front).await?;
        self.plan.holes = self.free_where(Bits::contains);
        self.move_l2(Area::Strays).await?;
        for kind in [Kind::Bitmap, Kind::L1, Kind::Directory, Kind::Snapshots] {
            self.move_tables(Area::Strays, kind).await?;
        }
        self.move_blocks(Area::Strays).await?;
        self.move_tables(Area::Strays, Kind::Refcounts).await?;
        self.structures = Structures::read(self.storage).await?;
        Ok(())
    }

    fn free_where(&self, is_wanted: fn(&Bits, u64) -> bool) -> Bits {
        let mut free = self.free();
        let others: Vec<u64> =
            free.iter().filter(|cluster| !is_wanted(&self.front, *cluster)).collect();
        others.into_iter().for_each(|cluster| free.remove(cluster));
        free
    }

    // ---- data ------------------------------------------------------------------------------

    /// Brings data to as many places as memory allows, from that rank on. Returns the next rank.
    async fn order_some(&mut self, layout: &Layout, from: u64) -> Result<u64> {
        let (owners, end) = self.owners(layout, from).await?;
        let mut sources = Bits::new(self.clusters);
        for (host, place) in owners.iter().filter(|(host, place)| host != place) {
            sources.insert(*host);
            if self.counts.count(*place) > 0 {
                sources.insert(*place);
            }
        }
        if sources.next(0).is_some() {
            let mut collector = Collector::new(self.geometry, &sources);
            collector.data(self.storage, &self.structures).await?;
            self.check_weights(&collector.load)?;
            self.shuffle(collector.load, owners).await?;
        }
        Ok(end)
    }

    /// Finds who is to have the places from that rank on, and the rank at which memory ends.
    async fn owners(&self, layout: &Layout, from: u64) -> Result<(Vec<(u64, u64)>, u64)> {
        let (mut owners, mut rank, mut bytes) = (Vec::new(), 0, 0);
        let (mut places, mut met) = (layout.places(), Bits::new(self.clusters));
        let counts = &self.counts;
        let cost = |cluster| 2 * MOVE_BYTES + POINTER_BYTES * counts.count(cluster);
        let mut visit = |seen| {
            let Seen::Data { host, .. } = seen else { return ControlFlow::Continue(()) };
            if layout.fixed.contains(host) || met.contains(host) {
                return ControlFlow::Continue(());
            }
            met.insert(host);
            let Some(place) = places.next() else { return ControlFlow::Break(()) };
            if rank >= from {
                bytes += if host == place { 16 } else { cost(host) + cost(place) };
                if bytes > self.options.memory_bytes && !owners.is_empty() {
                    return ControlFlow::Break(());
                }
                owners.push((host, place));
            }
            rank += 1;
            ControlFlow::Continue(())
        };
        walk(self.storage, &self.structures, self.clusters, &mut visit).await?;
        let end = if owners.is_empty() { layout.data } else { from + owners.len() as u64 };
        Ok((owners, end))
    }

    async fn shuffle(&mut self, mut load: Load, owners: Vec<(u64, u64)>) -> Result<()> {
        let most = (self.batch_bytes >> self.geometry.cluster_bits()).max(1) as usize;
        let aside_from = owners.last().map_or(0, |(_, place)| place + 1);
        let places: HashMap<u64, u64, RandomState> =
            owners.into_iter().filter(|(host, place)| host != place).collect();
        let at = |it: &Move| self.geometry.host_cluster(it.from.start).0;
        let piece = |it| Piece { at: at(it), place: places.get(&at(it)).copied() };
        let pieces = load.moves.iter().map(piece).collect();
        // Behind all places, where nobody misses what they take.
        self.ready_anchors(&load, aside_from).await?;
        let mut shuffle = Shuffle::new(pieces, self.free(), aside_from);
        load.pointers.sort_unstable_by_key(|pointer| (pointer.rank, pointer.at));
        loop {
            let steps = shuffle.choose(most);
            if steps.is_empty() || self.report.is_stopped {
                return self.drop_anchors().await;
            }
            let batch = self.batch_of(&load, &steps);
            self.count(&batch, |moved| &mut moved.data);
            self.carry(batch).await?;
            for step in &steps {
                let moved = &mut load.moves[step.piece];
                moved.from.start = self.geometry.host_offset(HostCluster(step.to));
                moved.old = moved.from.start.0;
            }
            shuffle.take(&steps);
        }
    }

    /// Returns what moves by these steps.
    fn batch_of(&self, load: &Load, steps: &[Step]) -> Load {
        let mut batch = Load::default();
        for (rank, step) in (0..).zip(steps) {
            let mut moved = load.moves[step.piece];
            place(&mut moved, self.geometry.host_offset(HostCluster(step.to)));
            batch.moves.push(moved);
            let first = load.pointers.partition_point(|it| (it.rank as usize) < step.piece);
            let own = load.pointers[first..].iter();
            let own = own.take_while(|it| it.rank as usize == step.piece);
            batch.pointers.extend(own.map(|it| Pointer { rank, ..*it }));
        }
        batch
    }
}

/// Counts runs, as data comes by.
#[derive(Debug, Default)]
struct Tally {
    disorder: Disorder,
    /// The guest cluster before, where it lies, and where it is to lie.
    last: Option<(u64, u64, Option<u64>)>,
    /// Where the last one lies, and is to lie, that was met for the first time.
    last_first: Option<(u64, u64)>,
}

impl Tally {
    /// Notes a cluster; a place is given where it is met for the first time.
    fn note(&mut self, guest: Option<u64>, host: u64, place: Option<u64>) {
        self.disorder.displaced += u64::from(place.is_some_and(|place| place != host));
        let Some(guest) = guest else { return };
        let last = self.last;
        let is_next = last.is_some_and(|last| last.0 + 1 == guest);
        let follows = last.is_some_and(|last| last.1 + 1 == host);
        let will_follow =
            last.is_some_and(|last| last.2.zip(place).is_some_and(|(last, it)| last + 1 == it));
        let Disorder { extents, jumps, back, .. } = &mut self.disorder;
        extents.before += u64::from(!is_next || !follows);
        extents.after += u64::from(!is_next || !will_follow);
        if let Some(place) = place {
            let last = self.last_first.replace((host, place));
            *back += u64::from(last.is_some_and(|last| last.0 > host));
            jumps.before += u64::from(last.is_none_or(|last| last.0 + 1 != host));
            jumps.after += u64::from(last.is_none_or(|last| last.1 + 1 != place));
        }
        self.last = Some((guest, host, place));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_counted_as_they_are_and_as_they_are_to_be() {
        let mut tally = Tally::default();
        // Two neighbours, one elsewhere, one behind a gap of the guest, one that shares the first.
        let seen = [(0, 9, Some(4)), (1, 10, Some(5)), (2, 7, Some(6)), (5, 8, Some(7))];
        seen.iter().for_each(|(guest, host, place)| tally.note(Some(*guest), *host, *place));
        tally.note(Some(6), 9, None);
        tally.note(None, 3, Some(8));
        let extents = CompactExtents { before: 3, after: 3 };
        let jumps = CompactExtents { before: 2, after: 1 };
        assert_eq!(tally.disorder, Disorder { displaced: 5, extents, jumps, back: 1 });
    }
}
