//! Cached pieces ("slices") of L2 tables or refcount blocks.
//!
//! * Always: a slice that is dirty or being written stays, so a reload never sees old bytes.
//! * Always: a table that was just allocated ("fresh") needs no load: what was not touched is zero.
//! * Never: a slice of a freed cluster stays (D.1-10: it would be flushed over the new owner).

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::units::HostOffset;

type Map<V> = std::collections::HashMap<u64, V, foldhash::fast::RandomState>;

/// How many slices an image that is written must be able to hold: what one plan looks at.
pub(super) const LEAST_TO_WRITE: usize = 64;

/// How many an image must that is only read.
pub(super) const LEAST_TO_READ: usize = 4;

/// Slices keyed by where they lie, within a bound on their bytes.
#[derive(Debug)]
pub(super) struct TableCache {
    slice_bytes: u64,
    cluster_bytes: u64,
    capacity: usize,
    slots: Vec<Slot>,
    by_offset: Map<usize>,
    /// Where the search for a victim goes on (second-chance replacement).
    hand: usize,
    dirty: BTreeSet<u64>,
    /// Clusters whose content exists nowhere but here.
    fresh: BTreeSet<u64>,
    /// Fresh tables on their way to storage, which may still hold what was there before.
    fresh_written: BTreeSet<u64>,
    /// Counts completed write-backs: a load that overlapped one may hold old bytes.
    generation: u64,
}

#[derive(Debug)]
struct Slot {
    offset: u64,
    bytes: Arc<[u8]>,
    referenced: bool,
    writing: bool,
}

/// Bytes of a table on their way to storage.
#[derive(Clone, Debug)]
pub(super) struct DirtySlice {
    pub(super) offset: HostOffset,
    pub(super) bytes: Arc<[u8]>,
}

/// What of a cache storage does not have.
#[derive(Debug)]
pub(super) struct Unwritten {
    dirty: BTreeSet<u64>,
    fresh: BTreeSet<u64>,
}

impl Unwritten {
    /// Whole tables were written, and are durable: from now on they change in place.
    pub(super) fn fresh_is_durable(&mut self) {
        self.fresh.clear();
    }
}

impl TableCache {
    /// Holds at least `least` slices.
    pub(super) fn new(cluster_bytes: u64, capacity_bytes: u64, least: usize) -> Self {
        let slice_bytes = cluster_bytes.min(4096);
        Self {
            slice_bytes,
            cluster_bytes,
            capacity: ((capacity_bytes / slice_bytes) as usize).max(least),
            slots: Vec::new(),
            by_offset: Map::default(),
            hand: 0,
            dirty: BTreeSet::new(),
            fresh: BTreeSet::new(),
            fresh_written: BTreeSet::new(),
            generation: 0,
        }
    }

    /// Returns how many bytes of tables there are.
    pub(super) fn cached_bytes(&self) -> u64 {
        self.slots.len() as u64 * self.slice_bytes
    }

    pub(super) const fn slice_bytes(&self) -> u64 {
        self.slice_bytes
    }

    /// Returns where the slice that holds `offset` starts.
    pub(super) const fn slice_of(&self, offset: HostOffset) -> HostOffset {
        HostOffset(offset.0 & !(self.slice_bytes - 1))
    }

    /// Raises the bound for a plan that needs so many slices at once, or it would never have them
    /// all.
    pub(super) fn make_room_for(&mut self, slices: u64) {
        let wanted = usize::try_from(slices.saturating_mul(2)).unwrap_or(usize::MAX);
        self.capacity = self.capacity.max(wanted);
    }

    /// Returns the slice at `offset`, or nothing where it must be loaded first.
    pub(super) fn read(&mut self, offset: HostOffset) -> Option<&[u8]> {
        let slot = self.find(offset)?;
        let slot = &mut self.slots[slot];
        slot.referenced = true;
        Some(&slot.bytes)
    }

    /// Returns the slice at `offset` for changing, which makes it dirty.
    pub(super) fn change(&mut self, offset: HostOffset) -> Option<&mut [u8]> {
        let slot = self.find(offset)?;
        self.dirty.insert(offset.0);
        let slot = &mut self.slots[slot];
        slot.referenced = true;
        Some(Arc::make_mut(&mut slot.bytes))
    }

    fn find(&mut self, offset: HostOffset) -> Option<usize> {
        if let Some(slot) = self.by_offset.get(&offset.0) {
            return Some(*slot);
        }
        let table = offset.0 & !(self.cluster_bytes - 1);
        if !self.fresh.contains(&table) && !self.fresh_written.contains(&table) {
            return None;
        }
        Some(self.place(offset, Arc::from(vec![0; self.slice_bytes as usize])))
    }

    /// Returns the mark to give [`insert_loaded`](Self::insert_loaded) with what a load brings.
    pub(super) const fn generation(&self) -> u64 {
        self.generation
    }

    /// Takes loaded bytes, unless a write-back since `generation` may have made them old.
    pub(super) fn insert_loaded(&mut self, offset: HostOffset, bytes: &[u8], generation: u64) {
        if generation == self.generation && self.find(offset).is_none() {
            self.place(offset, Arc::from(bytes));
        }
    }

    fn place(&mut self, offset: HostOffset, bytes: Arc<[u8]>) -> usize {
        let slot = Slot { offset: offset.0, bytes, referenced: true, writing: false };
        let index = match self.victim() {
            Some(index) => {
                self.by_offset.remove(&self.slots[index].offset);
                self.slots[index] = slot;
                index
            }
            None => {
                self.slots.push(slot);
                self.slots.len() - 1
            }
        };
        self.by_offset.insert(offset.0, index);
        index
    }

    /// Returns a slot to reuse, once the cache is full; nothing where all are dirty.
    fn victim(&mut self) -> Option<usize> {
        if self.slots.len() < self.capacity {
            return None;
        }
        for _ in 0..2 * self.slots.len() {
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = &mut self.slots[self.hand];
            if slot.writing || self.dirty.contains(&slot.offset) {
                continue;
            }
            if !std::mem::take(&mut slot.referenced) {
                return Some(self.hand);
            }
        }
        None
    }

    /// Declares the cluster at `table` an all-zero table that storage does not have yet.
    pub(super) fn make_fresh(&mut self, table: HostOffset) {
        self.forget(table);
        self.fresh.insert(table.0);
    }

    /// Declares the cluster at `to` a table that storage does not have yet, with what is known of the one at
    /// `from`: what is cached, which is newer, and else what was `stored`.
    pub(super) fn copy_fresh(&mut self, from: HostOffset, to: HostOffset, stored: &[u8]) {
        self.make_fresh(to);
        for (at, stored) in
            (0..).step_by(self.slice_bytes as usize).zip(stored.chunks(self.slice_bytes as usize))
        {
            let bytes = self.read(from + at).map_or_else(|| stored.to_vec(), <[u8]>::to_vec);
            if let Some(target) = self.change(to + at) {
                target.copy_from_slice(&bytes);
            }
        }
    }

    /// Drops all that is cached of a cluster that stopped being a table.
    pub(super) fn forget(&mut self, table: HostOffset) {
        self.fresh.remove(&table.0);
        self.fresh_written.remove(&table.0);
        for offset in (table.0..table.0 + self.cluster_bytes).step_by(self.slice_bytes as usize) {
            self.dirty.remove(&offset);
            if let Some(index) = self.by_offset.remove(&offset) {
                self.remove_slot(index);
            }
        }
    }

    fn remove_slot(&mut self, index: usize) {
        self.slots.swap_remove(index);
        if let Some(moved) = self.slots.get(index) {
            self.by_offset.insert(moved.offset, index);
        }
    }

    /// Says whether something is not in storage.
    pub(super) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty() || !self.fresh.is_empty()
    }

    /// Drops everything: the tables are others now. What is being loaded is not believed.
    pub(super) fn forget_all(&mut self) {
        self.slots.clear();
        self.by_offset.clear();
        self.hand = 0;
        self.dirty.clear();
        self.fresh.clear();
        self.fresh_written.clear();
        self.generation += 1;
    }

    /// Says whether so much is dirty that it should be written before more is changed.
    pub(super) fn is_crowded(&self) -> bool {
        self.dirty.len() > self.capacity / 2 || self.fresh.len() > self.capacity / 2
    }

    /// Hands out all fresh tables, each whole. Until [`written`](Self::written) they stay cached.
    pub(super) fn take_fresh(&mut self) -> Vec<DirtySlice> {
        let fresh = std::mem::take(&mut self.fresh);
        self.fresh_written.clone_from(&fresh);
        fresh.into_iter().map(|table| self.assemble(table)).collect()
    }

    fn assemble(&mut self, table: u64) -> DirtySlice {
        let mut bytes = vec![0; self.cluster_bytes as usize];
        for at in (0..self.cluster_bytes).step_by(self.slice_bytes as usize) {
            let offset = table + at;
            self.dirty.remove(&offset);
            if let Some(index) = self.by_offset.get(&offset) {
                let slot = &mut self.slots[*index];
                slot.writing = true;
                bytes[at as usize..][..self.slice_bytes as usize].copy_from_slice(&slot.bytes);
            }
        }
        DirtySlice { offset: HostOffset(table), bytes: Arc::from(bytes) }
    }

    /// Hands out all dirty slices in order of offset.
    pub(super) fn take_dirty(&mut self) -> Vec<DirtySlice> {
        let dirty = std::mem::take(&mut self.dirty);
        dirty.into_iter().map(|offset| self.start_writing(offset)).collect()
    }

    fn start_writing(&mut self, offset: u64) -> DirtySlice {
        let slot = &mut self.slots[self.by_offset[&offset]];
        slot.writing = true;
        DirtySlice { offset: HostOffset(offset), bytes: Arc::clone(&slot.bytes) }
    }

    /// Returns what is dirty and what is fresh, to be given back to [`redo`](Self::redo).
    pub(super) fn unwritten(&self) -> Unwritten {
        Unwritten { dirty: self.dirty.clone(), fresh: self.fresh.clone() }
    }

    /// What was handed out may not have reached storage: it is dirty again.
    pub(super) fn redo(&mut self, unwritten: Unwritten) {
        let cached = |offset: &u64| self.by_offset.contains_key(offset);
        self.dirty.extend(unwritten.dirty.into_iter().filter(cached));
        // Those that were forgotten meanwhile are somebody else's clusters by now.
        let known = std::mem::take(&mut self.fresh_written);
        self.fresh.extend(unwritten.fresh.into_iter().filter(|table| known.contains(table)));
        for slot in &mut self.slots {
            slot.writing = false;
        }
    }

    /// Takes note that everything handed out is in storage now.
    pub(super) fn written(&mut self) {
        self.generation += 1;
        self.fresh_written.clear();
        for slot in &mut self.slots {
            slot.writing = false;
        }
    }

    /// Returns the clusters whose content exists nowhere but here.
    #[cfg(test)]
    pub(super) fn fresh_tables(&self) -> usize {
        self.fresh.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> TableCache {
        TableCache::new(65536, 64 * 4096, LEAST_TO_WRITE)
    }

    #[test]
    fn a_full_cache_keeps_dirty_slices_and_drops_clean_ones() {
        let mut cache = cache();
        for index in 0..200 {
            cache.insert_loaded(HostOffset(index * 4096), &[1; 4096], 0);
            if index == 3 {
                cache.change(HostOffset(3 * 4096)).unwrap()[0] = 9;
            }
        }
        assert_eq!(cache.read(HostOffset(3 * 4096)).unwrap()[0], 9);
        assert!(cache.slots.len() <= 64);
    }

    #[test]
    fn a_load_that_overlapped_a_write_back_is_not_believed() {
        let mut cache = cache();
        let before = cache.generation();
        cache.written();
        cache.insert_loaded(HostOffset(0), &[1; 4096], before);
        assert!(cache.read(HostOffset(0)).is_none());
    }

    #[test]
    fn a_fresh_table_is_zero_without_a_load_and_is_written_whole() {
        let mut cache = cache();
        cache.make_fresh(HostOffset(65536));
        cache.change(HostOffset(65536 + 8192)).unwrap()[5] = 7;
        let written = cache.take_fresh();
        assert_eq!(written.len(), 1);
        assert_eq!(written[0].bytes.len(), 65536);
        assert_eq!(written[0].bytes[8192 + 5], 7);
        assert!(cache.take_dirty().is_empty());
        assert_eq!(cache.fresh_tables(), 0);
    }

    #[test]
    fn a_forgotten_table_is_never_written() {
        let mut cache = cache();
        cache.make_fresh(HostOffset(0));
        cache.change(HostOffset(4096)).unwrap()[0] = 1;
        cache.forget(HostOffset(0));
        assert!(cache.take_fresh().is_empty() && cache.take_dirty().is_empty());
    }
}
