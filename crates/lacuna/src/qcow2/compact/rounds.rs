//! The order in which kinds move: nothing moves together with a table that points to it.

use super::bits::Bits;
use super::collect::Collector;
use super::moves::{Load, Move, Pointer, miscounted};
use super::plan::{Facts, Plan, Run};
use super::streams::Packer;
use super::structures::{Kind, Structures, Table};
use super::{CompactClusters, Compaction};
use crate::Result;
use crate::qcow2::check::refcounts::Block;
use crate::qcow2::format::OFFSET_MASK;
use crate::storage::Storage;
use crate::units::{HostCluster, HostOffset, HostRange};

/// Passes over the image. Almost always one is enough; what had no room in it may have some in the next.
const PASSES: usize = 10;
/// Memory for a cluster that moves, and for a pointer to it.
pub(super) const MOVE_BYTES: u64 = (size_of::<Move>() + 40) as u64;
pub(super) const POINTER_BYTES: u64 = size_of::<Pointer>() as u64;

/// What is moved out of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Area {
    /// Where tables are to gather.
    Front,
    /// Everything but that.
    Strays,
    /// What lies beyond the goal.
    Tail,
    /// Where a table is to come.
    Windows,
}

impl<S: Storage> Compaction<'_, S> {
    /// Moves until nothing moves any more.
    pub(super) async fn run(&mut self) -> Result<()> {
        for _ in 0..PASSES {
            self.moved_any = false;
            self.pass().await?;
            if !self.moved_any || self.report.is_stopped {
                break;
            }
        }
        Ok(())
    }

    async fn pass(&mut self) -> Result<()> {
        self.structures = Structures::read(self.storage).await?;
        self.give_up_blocks().await?;
        // What is yet to be put in order needs room behind the end that is counted.
        if !self.leaves_data {
            self.shorten_table().await?;
        }
        self.plan = self.make_plan();
        if self.end() <= self.plan.goal {
            return Ok(());
        }
        self.add_blocks(self.plan.goal).await?;
        self.send_away().await?;
        if !self.plan.windows.is_empty() {
            self.empty(Area::Windows).await?;
        }
        self.empty(Area::Tail).await
    }

    /// Makes a plan of what is in use now.
    pub(super) fn make_plan(&self) -> Plan {
        let used = self.used();
        let tables: Vec<Run> = self.structures.tables.values().map(|it| it.run).collect();
        let per_block = self.geometry.refcount_block_entries();
        let blocks = self.blocks().count() as u64;
        Plan::new(&Facts { used: &used, blocks, per_block, tables: &tables })
    }

    /// Returns the clusters in use.
    pub(super) fn used(&self) -> Bits {
        let mut used = Bits::new(self.clusters);
        self.counts.used().for_each(|cluster| used.insert(cluster));
        used
    }

    /// Returns the first cluster behind all that is in use.
    pub(super) fn end(&self) -> u64 {
        self.counts.used().last().map_or(1, |last| last + 1)
    }

    /// Returns the refcount blocks: index and cluster.
    pub(super) fn blocks(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let table = &self.counts.table;
        (0..table.entries.len() as u64).filter_map(|index| match table.block(index) {
            Block::At(offset) => Some((index, self.geometry.host_cluster(offset).0)),
            _ => None,
        })
    }

    async fn empty(&mut self, area: Area) -> Result<()> {
        self.structures = Structures::read(self.storage).await?;
        self.move_data(area).await?;
        self.move_l2(area).await?;
        for kind in [Kind::Bitmap, Kind::L1, Kind::Directory, Kind::Snapshots] {
            self.move_tables(area, kind).await?;
        }
        self.move_blocks(area).await?;
        self.move_tables(area, Kind::Refcounts).await
    }

    fn is_in(&self, area: Area, cluster: u64) -> bool {
        match area {
            Area::Front => self.front.contains(cluster),
            Area::Strays => !self.front.contains(cluster),
            Area::Tail => cluster >= self.plan.goal,
            Area::Windows => self.plan.in_window(cluster),
        }
    }

    // ---- data ------------------------------------------------------------------------------

    /// Moves data and compressed streams, as much at a time as memory allows.
    pub(super) async fn move_data(&mut self, area: Area) -> Result<()> {
        let metadata = self.metadata();
        let mut from = 0;
        while !self.report.is_stopped && self.plan.holes.next(0).is_some() {
            let (sources, end) = self.slice(area, &metadata, from);
            let Some(end) = end else { break };
            from = end;
            let mut collector = Collector::new(self.geometry, &sources);
            collector.data(self.storage, &self.structures).await?;
            let mut load = collector.load;
            self.check_weights(&load)?;
            self.ready_anchors(&load, 1).await?;
            let mut holes = std::mem::take(&mut self.plan.holes);
            Packer::new(self.geometry, &holes).pack(&mut load.moves, &mut holes);
            self.plan.holes = holes;
            if area != Area::Tail || !self.leaves_data {
                self.assign(&mut load.moves);
            }
            self.count(&load, |moved| &mut moved.data);
            self.carry(load).await?;
            self.drop_anchors().await?;
        }
        Ok(())
    }

    /// Returns clusters from `from` on that are to move, as many as memory allows, and where they end.
    fn slice(&self, area: Area, metadata: &Bits, from: u64) -> (Bits, Option<u64>) {
        let (mut sources, mut end, mut bytes) = (Bits::new(self.clusters), None, 0);
        let used = self.counts.iter_from(from);
        for (cluster, count) in used {
            if metadata.contains(cluster) || !self.is_in(area, cluster) {
                continue;
            }
            bytes += MOVE_BYTES + POINTER_BYTES * count;
            if end.is_some() && bytes > self.options.memory_bytes {
                break;
            }
            sources.insert(cluster);
            end = Some(cluster + 1);
        }
        (sources, end)
    }

    /// Returns the clusters that hold no data.
    pub(super) fn metadata(&self) -> Bits {
        let mut metadata = Bits::new(self.clusters);
        metadata.insert(0);
        self.structures.l2.keys().for_each(|cluster| metadata.insert(*cluster));
        let tables = self.structures.tables.values().flat_map(|table| table.run.iter());
        tables.for_each(|cluster| metadata.insert(cluster));
        self.blocks().for_each(|(_, cluster)| metadata.insert(cluster));
        metadata
    }

    /// Every pointer to a cluster must have been found before it moves.
    pub(super) fn check_weights(&self, load: &Load) -> Result<()> {
        let is_wrong = |it: &&Move| {
            let cluster = self.geometry.host_cluster(it.from.start).0;
            !it.is_stream() && self.counts.count(cluster) != it.weight
        };
        match load.moves.iter().find(is_wrong) {
            Some(wrong) => Err(miscounted(wrong.from.start)),
            None => Ok(()),
        }
    }

    /// Gives whole clusters the lowest holes, in the order in which their pointers were found.
    fn assign(&mut self, moves: &mut [Move]) {
        let mut from = 0;
        for it in moves.iter_mut().filter(|it| !it.is_stream()) {
            let Some(hole) = self.plan.holes.next(from) else { break };
            self.plan.holes.remove(hole);
            from = hole;
            place(it, self.geometry.host_offset(HostCluster(hole)));
        }
    }

    pub(super) fn count(&mut self, load: &Load, kind: fn(&mut CompactClusters) -> &mut u64) {
        let moved = |it: &&Move| it.to.is_some();
        let streams = load.moves.iter().filter(moved).filter(|it| it.is_stream()).count() as u64;
        let clusters: u64 = load
            .moves
            .iter()
            .filter(moved)
            .filter(|it| !it.is_stream())
            .map(|it| it.from.len >> self.geometry.cluster_bits())
            .sum();
        self.report.moved.streams += streams;
        *kind(&mut self.report.moved) += clusters;
    }

    // ---- tables ----------------------------------------------------------------------------

    pub(super) async fn move_l2(&mut self, area: Area) -> Result<()> {
        if self.report.is_stopped {
            return Ok(());
        }
        self.structures = Structures::read(self.storage).await?;
        let mut sources = Bits::new(self.clusters);
        let tables = self.structures.l2.keys().filter(|cluster| self.is_in(area, **cluster));
        tables.for_each(|cluster| sources.insert(*cluster));
        if sources.next(0).is_none() {
            return Ok(());
        }
        let mut collector = Collector::new(self.geometry, &sources);
        collector.l2_tables(self.storage, &self.structures).await?;
        let mut load = collector.load;
        self.check_weights(&load)?;
        self.assign(&mut load.moves);
        self.count(&load, |moved| &mut moved.l2_tables);
        self.carry(load).await
    }

    pub(super) async fn move_tables(&mut self, area: Area, kind: Kind) -> Result<()> {
        if self.report.is_stopped {
            return Ok(());
        }
        self.structures = Structures::read(self.storage).await?;
        let mut load = Load::default();
        let tables = self.structures.of(kind).filter(|table| self.is_to_move(area, table.run));
        let tables: Vec<Table> = tables.cloned().collect();
        for table in &tables {
            let Some(first) = self.room(area, table.run) else { continue };
            let bytes = table.run.clusters << self.geometry.cluster_bits();
            let range = HostRange::new(table.range.start, bytes);
            let to = self.geometry.host_offset(HostCluster(first));
            add(&mut load, range, Some(to), &table.pointers);
        }
        self.check_weights(&load)?;
        self.count(
            &load,
            match kind {
                Kind::Refcounts => |moved| &mut moved.refcounts,
                _ => |moved| &mut moved.tables,
            },
        );
        self.carry(load).await
    }

    fn is_to_move(&self, area: Area, run: Run) -> bool {
        match run.clusters {
            1 => self.is_in(area, run.first),
            // Windows are not in windows.
            _ => area == Area::Tail && run.end() > self.plan.goal,
        }
    }

    /// Returns where a table can go now.
    fn room(&mut self, area: Area, run: Run) -> Option<u64> {
        if run.clusters == 1 {
            let hole = self.plan.holes.next(0)?;
            self.plan.holes.remove(hole);
            return Some(hole);
        }
        let first = self.plan.window(run).filter(|_| area == Area::Tail)?;
        let target = Run { first, clusters: run.clusters };
        target.iter().all(|cluster| self.counts.count(cluster) == 0).then_some(first)
    }

    // ---- refcount blocks -------------------------------------------------------------------

    /// Says whether a block counts nothing that stays.
    pub(super) fn is_doomed(&self, index: u64) -> bool {
        index >= self.plan.goal.div_ceil(self.geometry.refcount_block_entries())
    }

    pub(super) async fn move_blocks(&mut self, area: Area) -> Result<()> {
        if self.report.is_stopped {
            return Ok(());
        }
        let mut load = Load::default();
        let blocks: Vec<_> = self
            .blocks()
            .filter(|(index, cluster)| !self.is_doomed(*index) && self.is_in(area, *cluster))
            .collect();
        for (index, cluster) in blocks {
            self.add_block(&mut load, index, cluster, None).await?;
        }
        self.check_weights(&load)?;
        self.assign(&mut load.moves);
        self.count(&load, |moved| &mut moved.refcounts);
        self.carry(load).await
    }

    /// Moves blocks that are to go out of the way, to where they count themselves: so each can be
    /// given up alone, whatever becomes of the others in a crash.
    pub(super) async fn send_away(&mut self) -> Result<()> {
        let per_block = self.geometry.refcount_block_entries();
        let mut load = Load::default();
        let doomed: Vec<_> = self
            .blocks()
            .filter(|(index, cluster)| self.is_doomed(*index) && cluster / per_block != *index)
            .collect();
        for (index, cluster) in doomed {
            let mut own = index * per_block..((index + 1) * per_block).min(self.clusters);
            if let Some(to) = own.find(|cluster| self.counts.count(*cluster) == 0) {
                self.add_block(&mut load, index, cluster, Some(to)).await?;
            }
        }
        self.check_weights(&load)?;
        self.count(&load, |moved| &mut moved.refcounts);
        self.carry(load).await
    }

    async fn add_block(
        &self,
        load: &mut Load,
        index: u64,
        cluster: u64,
        to: Option<u64>,
    ) -> Result<()> {
        let header = crate::qcow2::read_header(self.storage).await?;
        let host = |cluster| self.geometry.host_offset(HostCluster(cluster));
        let from = HostRange::new(host(cluster), self.geometry.cluster_bytes());
        let pointer = header.refcount_table.offset + index * 8;
        add(load, from, to.map(host), &[pointer]);
        Ok(())
    }
}

/// Adds a move of whole clusters.
fn add(load: &mut Load, from: HostRange, to: Option<HostOffset>, pointers: &[HostOffset]) {
    let rank = load.moves.len() as u32;
    let (len, weight) = (from.len, pointers.len() as u64);
    let old = from.start.0;
    let mut it = Move { from, to: None, len, old, new: 0, mask: OFFSET_MASK, weight };
    if let Some(to) = to {
        place(&mut it, to);
    }
    load.moves.push(it);
    load.pointers.extend(pointers.iter().map(|at| Pointer { rank, at: *at }));
}

pub(super) fn place(it: &mut Move, to: HostOffset) {
    it.to = Some(HostRange::new(to, it.from.len));
    it.new = to.0;
}
