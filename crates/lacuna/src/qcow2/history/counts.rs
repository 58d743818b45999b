//! Refcounts as they are in storage and as they are to be, as far as somebody looked.
//!
//! * Always: a function finishes, or names the block that it lacks and has changed nothing.
//! * Always: a cluster is taken only if storage calls it free, so that it may be written at once.
//! * Memory: each block that was looked at, twice where it changes.

use crate::buffer::Buffer;
use crate::qcow2::format::{
    Geometry, MAX_REFCOUNT_TABLE_BYTES, RefcountTableLocation, RefcountWidth,
};
use crate::units::{HostCluster, HostOffset, HostRange};
use crate::{Error, ErrorKind, Result};

/// No cluster may lie at or beyond this offset (B.11).
const HOST_LIMIT: u64 = 1 << 56;

/// Why there is no result.
#[derive(Debug)]
pub(super) enum Lack {
    /// This block is not in memory: try again with it.
    Block(u64),
    /// What was asked for cannot be.
    Fail(Error),
}

impl From<Error> for Lack {
    fn from(error: Error) -> Self {
        Self::Fail(error)
    }
}

/// A result, or what is lacking.
pub(super) type Counted<T> = std::result::Result<T, Lack>;

/// Whether references come or go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Down,
    Up,
}

#[derive(Debug)]
struct Block {
    /// As in storage; zeros where there is none.
    old: Buffer,
    /// As it is to be, if that is something else.
    now: Option<Vec<u8>>,
    /// Where it goes.
    place: Option<HostCluster>,
}

impl Block {
    fn now(&self) -> &[u8] {
        self.now.as_deref().unwrap_or(&self.old)
    }
}

#[derive(Debug)]
pub(super) struct Counts {
    geometry: Geometry,
    width: RefcountWidth,
    /// Blocks in storage: their offsets, 0 where there is none.
    table: Vec<u64>,
    location: RefcountTableLocation,
    blocks: Vec<Option<Block>>,
    /// Blocks that are to be different, in the order in which they became so.
    changed: Vec<u64>,
    /// No cluster below is free.
    single_cursor: u64,
    /// No run that is long enough starts below.
    run_cursor: u64,
    /// What was taken, and where the lowest of it lies.
    taken: Vec<HostRange>,
    first_taken: u64,
    /// Where the new table lies, and for how many entries.
    new_table: Option<(HostCluster, u64)>,
}

/// What is written last, and what names it.
pub(super) struct NewRefcounts {
    pub(super) location: RefcountTableLocation,
    pub(super) table: Vec<u64>,
    pub(super) pieces: Vec<(HostOffset, Vec<u8>)>,
}

impl Counts {
    pub(super) fn new(
        geometry: Geometry,
        table: Vec<u64>,
        location: RefcountTableLocation,
    ) -> Self {
        Self {
            geometry,
            width: RefcountWidth::of(&geometry),
            table,
            location,
            blocks: Vec::new(),
            changed: Vec::new(),
            single_cursor: 1,
            run_cursor: 1,
            taken: Vec::new(),
            first_taken: u64::MAX,
            new_table: None,
        }
    }

    /// Returns where a block lies in storage, if it is there.
    pub(super) fn place_of(&self, index: u64) -> Option<HostOffset> {
        let offset = self.table.get(index as usize).copied().unwrap_or(0);
        (offset != 0).then_some(HostOffset(offset))
    }

    /// Takes in a block that was lacking.
    pub(super) fn insert(&mut self, index: u64, old: Buffer) {
        let index = index as usize;
        if self.blocks.len() <= index {
            self.blocks.resize_with(index + 1, || None);
        }
        self.blocks[index] = Some(Block { old, now: None, place: None });
    }

    fn block(&self, index: u64) -> Counted<&Block> {
        let block = self.blocks.get(index as usize).and_then(Option::as_ref);
        block.ok_or(Lack::Block(index))
    }

    /// Returns the block of a cluster, and its place in there. No division: it is done for each entry
    /// of each table.
    const fn locate(&self, cluster: HostCluster) -> (u64, usize) {
        let entries = self.geometry.refcount_block_entries();
        (cluster.0 >> entries.trailing_zeros(), (cluster.0 & (entries - 1)) as usize)
    }

    /// Returns the refcount that a cluster has in storage.
    fn old(&self, cluster: HostCluster) -> Counted<u64> {
        let (index, within) = self.locate(cluster);
        Ok(self.width.read(&self.block(index)?.old, within))
    }

    /// Returns how often a cluster that something shows is counted.
    pub(super) fn of_shown(&self, cluster: HostCluster) -> Counted<u64> {
        self.check_counted(cluster)?;
        self.now(cluster)
    }

    /// Refuses a cluster that no block counts, in storage or of those made here: none is made for what an
    /// entry says, which may be anything.
    fn check_counted(&self, cluster: HostCluster) -> Counted<()> {
        let index = self.locate(cluster).0 as usize;
        let is_made = || self.blocks.get(index).is_some_and(Option::is_some);
        match index < self.table.len() || is_made() {
            true => Ok(()),
            false => Err(self.uncounted(cluster).into()),
        }
    }

    /// Returns the refcount that a cluster is to have.
    pub(super) fn now(&self, cluster: HostCluster) -> Counted<u64> {
        let (index, within) = self.locate(cluster);
        Ok(self.width.read(self.block(index)?.now(), within))
    }

    /// Sets the refcount of a cluster whose block is at hand.
    pub(super) fn set(&mut self, cluster: HostCluster, count: u64) -> Counted<()> {
        if count > self.geometry.refcount_max() {
            return Err(self.overflow(cluster, count.into()).into());
        }
        let (index, within) = self.locate(cluster);
        let width = self.width;
        let block = self.blocks.get_mut(index as usize).and_then(Option::as_mut);
        let block = block.ok_or(Lack::Block(index))?;
        let changed = &mut self.changed;
        let now = block.now.get_or_insert_with(|| {
            changed.push(index);
            block.old.to_vec()
        });
        width.write(now, within, count);
        Ok(())
    }

    fn overflow(&self, cluster: HostCluster, count: u128) -> Error {
        let (at, bits) = (self.geometry.host_offset(cluster), self.geometry.refcount_bits());
        let way_out = match bits {
            ..16 => "amend the image to refcount_bits=16 or more first",
            16..64 => "amend the image to refcount_bits=64 first",
            // No program counted that far.
            _ => "run check -r all",
        };
        Error::invalid(format!(
            "The cluster at {at} would have {count} references; refcounts of {bits} bits count to \
             {}: {way_out}",
            self.geometry.refcount_max()
        ))
        .at(at)
    }

    /// Adds a reference to a cluster in use, or takes one off. Returns how many it has then.
    pub(super) fn step(&mut self, cluster: HostCluster, direction: Direction) -> Counted<u64> {
        self.check_counted(cluster)?;
        let (index, within) = self.locate(cluster);
        let block = self.block(index)?;
        let now = self.width.read(block.now(), within);
        // What storage calls free is counted only where it was taken: elsewhere one look is enough.
        let is_old =
            || now > 0 && cluster.0 < self.first_taken || self.width.read(&block.old, within) > 0;
        let next = match direction {
            Direction::Up if is_old() => match now.checked_add(1) {
                Some(more) => more,
                None => return Err(self.overflow(cluster, u128::from(now) + 1).into()),
            },
            Direction::Down if now > 0 => now - 1,
            Direction::Up | Direction::Down => return Err(self.uncounted(cluster).into()),
        };
        self.set(cluster, next).map(|()| next)
    }

    fn uncounted(&self, cluster: HostCluster) -> Error {
        let at = self.geometry.host_offset(cluster);
        Error::corrupt(format!(
            "The cluster at {at} has more references than its refcount says; run check -r all"
        ))
        .at(at)
    }

    /// Takes a reference off each cluster of a table.
    pub(super) fn drop_range(&mut self, range: HostRange) -> Counted<()> {
        self.step_range(range, Direction::Down)
    }

    /// Adds a reference to each cluster of a range, or takes one off.
    pub(super) fn step_range(&mut self, range: HostRange, direction: Direction) -> Counted<()> {
        self.have_at_hand(range)?;
        let mut clusters = self.geometry.host_clusters(range);
        clusters.try_for_each(|cluster| self.step(HostCluster(cluster), direction).map(drop))
    }

    fn have_at_hand(&self, range: HostRange) -> Counted<()> {
        let mut clusters = self.geometry.host_clusters(range);
        clusters.try_for_each(|cluster| self.of_shown(HostCluster(cluster)).map(drop))
    }

    // ---- free clusters ---------------------------------------------------------------------

    /// Takes a run of clusters that are free; each has one reference then.
    pub(super) fn take(&mut self, count: u64) -> Counted<HostCluster> {
        let mut at = if count == 1 { self.single_cursor } else { self.run_cursor };
        loop {
            let start = self.first_free(at);
            let cursor = if count == 1 { &mut self.single_cursor } else { &mut self.run_cursor };
            let start = match start {
                Ok(Some(start)) => start,
                Ok(None) => {
                    let entries = self.geometry.refcount_block_entries();
                    at = (at / entries + 1) * entries;
                    *cursor = at;
                    continue;
                }
                Err(lack) => return Err(lack),
            };
            *cursor = start;
            let mut end = start + 1;
            while end < start + count && self.is_free(end)? {
                end += 1;
            }
            if end == start + count {
                return self.claim(start, count);
            }
            at = end;
        }
    }

    fn claim(&mut self, start: u64, count: u64) -> Counted<HostCluster> {
        if start + count > HOST_LIMIT >> self.geometry.cluster_bits() {
            let text = "The image file would pass the 64 PiB that the format can address";
            return Err(Error::new(ErrorKind::NoSpace, text).into());
        }
        (start..start + count).try_for_each(|cluster| self.set(HostCluster(cluster), 1))?;
        if count == 1 {
            self.single_cursor = start + 1;
        }
        self.first_taken = self.first_taken.min(start);
        let at = self.geometry.host_offset(HostCluster(start));
        add(&mut self.taken, HostRange::new(at, count << self.geometry.cluster_bits()));
        Ok(HostCluster(start))
    }

    fn is_free(&self, cluster: u64) -> Counted<bool> {
        let cluster = HostCluster(cluster);
        Ok(self.old(cluster)? == 0 && self.now(cluster)? == 0)
    }

    /// Finds the first free cluster from `from` on that the block of `from` counts.
    fn first_free(&self, from: u64) -> Counted<Option<u64>> {
        let (index, within) = self.locate(HostCluster(from));
        let block = self.block(index)?;
        let (width, entries) = (self.width, self.geometry.refcount_block_entries() as usize);
        let now = block.now();
        let is_free = |at: &usize| width.read(&block.old, *at) == 0 && width.read(now, *at) == 0;
        let found = match width {
            RefcountWidth::Bits16 => {
                let both = block.old.as_chunks::<2>().0.iter().zip(now.as_chunks::<2>().0);
                let mut rest = both.skip(within);
                rest.position(|(old, now)| *old == [0; 2] && *now == [0; 2]).map(|at| within + at)
            }
            _ => (within..entries).find(is_free),
        };
        Ok(found.map(|at| from - within as u64 + at as u64))
    }

    // ---- the end ---------------------------------------------------------------------------

    /// Gives everything that changed a place, the table too. To be called again until it finishes.
    pub(super) fn settle(&mut self) -> Counted<()> {
        let mut done = 0;
        while let Some(index) = self.changed.get(done).copied() {
            if self.block(index)?.place.is_none() {
                self.move_block(index)?;
            }
            done += 1;
            if done == self.changed.len() {
                self.place_table()?;
            }
        }
        Ok(())
    }

    fn move_block(&mut self, index: u64) -> Counted<()> {
        let before = self.place_of(index).map(|offset| self.geometry.host_cluster(offset));
        if let Some(before) = before {
            self.now(before)?;
        }
        let place = self.take(1)?;
        if let Some(before) = before {
            self.step(before, Direction::Down)?;
        }
        if let Some(block) = self.blocks.get_mut(index as usize).and_then(Option::as_mut) {
            block.place = Some(place);
        }
        Ok(())
    }

    /// Takes room for the table, or for a longer one.
    fn place_table(&mut self) -> Counted<()> {
        let last = self.changed.iter().max().copied().unwrap_or(0);
        let needed = (self.table.len() as u64).max(last + 1);
        let had = match self.new_table {
            Some((_, entries)) if entries >= needed => return Ok(()),
            Some((at, entries)) => HostRange::new(self.geometry.host_offset(at), entries * 8),
            None => {
                let len = u64::from(self.location.clusters) << self.geometry.cluster_bits();
                HostRange::new(self.location.offset, len)
            }
        };
        let per_cluster = self.geometry.cluster_bytes() / 8;
        let grows = needed > self.table.len() as u64;
        let roomy = if grows { needed + needed / 2 } else { needed };
        let entries = roomy.max(1).next_multiple_of(per_cluster);
        if entries * 8 > MAX_REFCOUNT_TABLE_BYTES {
            let text = format!("The refcount table would pass {MAX_REFCOUNT_TABLE_BYTES} bytes");
            return Err(Error::new(ErrorKind::NoSpace, text).into());
        }
        self.have_at_hand(had)?;
        let at = self.take(entries / per_cluster)?;
        self.drop_range(had)?;
        self.new_table = Some((at, entries));
        Ok(())
    }

    /// Returns what is to be written, once everything has its place.
    pub(super) fn finish(&self) -> Result<NewRefcounts> {
        let Some((at, entries)) = self.new_table else {
            return Err(Error::invalid("The refcount table has no place yet"));
        };
        let mut table = self.table.clone();
        table.resize(entries as usize, 0);
        let mut pieces = Vec::new();
        for index in &self.changed {
            let block = self.blocks.get(*index as usize).and_then(Option::as_ref);
            let Some(Block { now: Some(now), place: Some(place), .. }) = block else { continue };
            let offset = self.geometry.host_offset(*place);
            table[*index as usize] = offset.0;
            pieces.push((offset, now.clone()));
        }
        let offset = self.geometry.host_offset(at);
        let clusters = (entries * 8 / self.geometry.cluster_bytes()) as u32;
        pieces.push((offset, table.iter().flat_map(|entry| entry.to_be_bytes()).collect()));
        Ok(NewRefcounts { location: RefcountTableLocation { offset, clusters }, table, pieces })
    }

    /// Returns what was taken.
    pub(super) fn taken(&self) -> &[HostRange] {
        &self.taken
    }

    /// Returns what nothing references any more.
    pub(super) fn freed(&self) -> Vec<HostRange> {
        let mut indices = self.changed.clone();
        indices.sort_unstable();
        let bytes = self.geometry.cluster_bytes();
        let entries = self.geometry.refcount_block_entries();
        let mut freed = Vec::new();
        for index in indices {
            let block = self.blocks.get(index as usize).and_then(Option::as_ref);
            let Some(Block { old, now: Some(now), .. }) = block else { continue };
            for within in 0..entries {
                let at = within as usize;
                if self.width.read(now, at) == 0 && self.width.read(old, at) > 0 {
                    let cluster = HostCluster(index * entries + within);
                    add(&mut freed, HostRange::new(self.geometry.host_offset(cluster), bytes));
                }
            }
        }
        freed
    }
}

/// Adds a range to a list, or to the last one there if it follows that.
fn add(ranges: &mut Vec<HostRange>, range: HostRange) {
    match ranges.last_mut() {
        Some(last) if last.end() == range.start => last.len += range.len,
        _ => ranges.push(range),
    }
}
