//! The walk: through all tables once, moving what can move at once and noting what more entries show.
//!
//! * Always: a table is read piece by piece, what is cached of it being newer.
//! * A table that changes behind the walk is seen in the next pass.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use foldhash::fast::RandomState;

use super::super::format::{L1Entry, L2Entry};
use super::super::image::Image;
use super::super::meta::Meta;
use super::super::snapshots;
use super::moves::{Holes, Outcome, Prepared};
use super::pointers::{MOST_POINTERS, Owner, Pointer, Table, weight};
use crate::Result;
use crate::storage::Storage;
use crate::units::{GuestOffset, HostCluster, HostOffset};

/// Bytes of a table that are read at once.
const PIECE_BYTES: u64 = 64 << 10;
/// Copies that are pinned at most before their pins are made durable.
const MOST_PREPARED: usize = 64;
/// Memory for what several entries show, and for each entry.
const NOTE_BYTES: u64 = 100;
const POINTER_BYTES: u64 = size_of::<Pointer>() as u64;

/// Tables that snapshots or pins have: by place, how often, and the entry of the pins that names it.
pub(super) type Others = BTreeMap<u64, (u32, Option<u32>)>;

/// A walk under way.
#[derive(Debug)]
pub(super) struct Walk {
    pub(super) holes: Holes,
    memory_bytes: u64,
    others: Others,
    /// Those of them that the disk has too.
    seen: HashSet<u64, RandomState>,
    at: At,
    queue: VecDeque<(Pointer, L2Entry)>,
    /// What several entries show, by place or, compressed, by the word of an entry.
    noted: HashMap<u64, Vec<Pointer>, RandomState>,
    noted_bytes: u64,
    prepared: Vec<Prepared>,
}

/// The next piece.
#[derive(Clone, Copy, Debug)]
enum At {
    /// Of the table that this entry of the active L1 table names.
    Active { index: usize, done: u64 },
    /// Of the first other table from this one on.
    Others { table: u64, done: u64 },
}

/// What a part of the walk did.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Walked {
    pub(super) read_bytes: u64,
    pub(super) moved_bytes: u64,
    pub(super) is_over: bool,
}

impl Walk {
    pub(super) fn new(goal: u64, memory_bytes: u64, others: Others) -> Self {
        Self {
            holes: Holes::below(goal),
            memory_bytes,
            others,
            seen: HashSet::default(),
            at: At::Active { index: 0, done: 0 },
            queue: VecDeque::new(),
            noted: HashMap::default(),
            noted_bytes: 0,
            prepared: Vec::new(),
        }
    }

    /// Returns the compressed streams that were found, by the word of their entries.
    pub(super) fn into_streams(self) -> Vec<(u64, Vec<Pointer>)> {
        let is_stream = |word: u64| L2Entry { word, ..L2Entry::default() }.is_compressed();
        self.noted.into_iter().filter(|(word, _)| is_stream(*word)).collect()
    }

    /// Returns the next table, and from which of its bytes on.
    fn next_piece(&mut self, meta: &Meta) -> Option<(Table, u64)> {
        while let At::Active { index, done } = self.at {
            let Some(entry) = meta.l1.entries.get(index) else {
                self.at = At::Others { table: 0, done: 0 };
                break;
            };
            self.at = match done + PIECE_BYTES < meta.geometry().cluster_bytes() {
                true => At::Active { index, done: done + PIECE_BYTES },
                false => At::Active { index: index + 1, done: 0 },
            };
            if let Some(at) = placed(meta, *entry) {
                return Some((self.active_table(at, index), done));
            }
        }
        self.next_other(meta)
    }

    fn active_table(&mut self, at: HostOffset, index: usize) -> Table {
        let others = self.others.get(&at.0).map_or(0, |(times, _)| *times);
        if others > 0 {
            self.seen.insert(at.0);
        }
        Table { at, owner: Owner::Active(index as u32), times: others + 1 }
    }

    fn next_other(&mut self, meta: &Meta) -> Option<(Table, u64)> {
        loop {
            let At::Others { table, done } = self.at else { return None };
            let (place, (times, pins)) = self.others.range(table..).next()?;
            let done = if *place == table { done } else { 0 };
            self.at = match done + PIECE_BYTES < meta.geometry().cluster_bytes() {
                true => At::Others { table: *place, done: done + PIECE_BYTES },
                false => At::Others { table: place + 1, done: 0 },
            };
            if !self.seen.contains(place) {
                let owner = pins.map_or(Owner::Snapshots, Owner::Pins);
                return Some((Table { at: HostOffset(*place), owner, times: *times }, done));
            }
        }
    }

    /// Notes an entry; returns all that show the same. Nothing where there is no memory for it.
    fn note(&mut self, key: u64, pointer: Pointer) -> Option<&[Pointer]> {
        let is_known = self.noted.contains_key(&key);
        let bytes = POINTER_BYTES + if is_known { 0 } else { NOTE_BYTES };
        if self.noted_bytes + bytes > self.memory_bytes {
            return None;
        }
        self.noted_bytes += bytes;
        let pointers = self.noted.entry(key).or_default();
        pointers.push(pointer);
        Some(pointers)
    }

    fn take(&mut self, key: u64) -> Vec<Pointer> {
        let pointers = self.noted.remove(&key).unwrap_or_default();
        self.noted_bytes -= NOTE_BYTES + POINTER_BYTES * pointers.len() as u64;
        pointers
    }
}

/// Returns the table of an entry, where it can be one.
fn placed(meta: &Meta, entry: L1Entry) -> Option<HostOffset> {
    entry.table().filter(|table| meta.geometry().is_aligned(table.0) && *table < meta.zero_from)
}

impl<S: Storage> Image<S> {
    /// Finds the tables of snapshots and pins. Nobody may change pins meanwhile.
    pub(super) async fn other_tables(&self) -> Result<Others> {
        let mut others = Others::new();
        let header = self.header();
        if header.snapshots.count == 0 {
            return Ok(others);
        }
        for snapshot in snapshots::read_table(self.storage(), &header).await?.0 {
            if snapshot.is_pin() {
                continue;
            }
            snapshot.check_l1(&header.geometry)?;
            let range = snapshot.l1.range();
            let len = range.len.min(self.storage().len().await?.saturating_sub(range.start.0));
            let bytes = self.load(range.start, len, "L1 table of a snapshot").await?;
            let meta = self.0.meta.lock();
            for word in bytes.as_chunks::<8>().0 {
                if let Some(table) = placed(&meta, L1Entry(u64::from_be_bytes(*word))) {
                    others.entry(table.0).or_default().0 += 1;
                }
            }
        }
        let mut meta = self.0.meta.lock();
        for (index, entry) in (0..).zip(&meta.pins.l1.entries) {
            if let Some(table) = placed(&meta, *entry) {
                others.insert(table.0, (1, Some(index)));
            }
        }
        meta.moves_snapshots = true;
        Ok(others)
    }

    /// Goes on with a walk for about so many bytes.
    pub(super) async fn walk_on(&self, walk: &mut Walk, slice_bytes: u64) -> Result<Walked> {
        let mut done = Walked::default();
        while done.read_bytes < slice_bytes {
            let Some((pointer, entry)) = walk.queue.pop_front() else {
                match self.read_piece(walk).await? {
                    Some(bytes) => done.read_bytes += bytes,
                    None => {
                        done.is_over = true;
                        break;
                    }
                }
                continue;
            };
            let outcome = self.consider(walk, pointer, entry).await?;
            if outcome == Outcome::Moved {
                done.read_bytes += self.geometry().cluster_bytes();
                done.moved_bytes += self.geometry().cluster_bytes();
            }
            if walk.prepared.len() >= MOST_PREPARED {
                self.link_prepared(walk).await?;
            }
            if outcome == Outcome::NoRoom {
                done.is_over = true;
                break;
            }
        }
        self.link_prepared(walk).await?;
        Ok(done)
    }

    /// Has pinned clusters be shown at their new places, once the pins there are durable.
    async fn link_prepared(&self, walk: &mut Walk) -> Result<()> {
        if walk.prepared.is_empty() {
            return Ok(());
        }
        self.write_back(self.usual_refcounting()).await?;
        for prepared in std::mem::take(&mut walk.prepared) {
            self.plan(|meta| meta.link_pinned(&prepared)).await?;
        }
        Ok(())
    }

    /// Queues what the next piece of a table shows behind the goal. Nothing at the end.
    async fn read_piece(&self, walk: &mut Walk) -> Result<Option<u64>> {
        let next = walk.next_piece(&self.0.meta.lock());
        let Some((table, from)) = next else { return Ok(None) };
        let geometry = self.geometry();
        let len = PIECE_BYTES.min(geometry.cluster_bytes() - from);
        let mut bytes = self.load(table.at + from, len, "L2 table").await?;
        self.take_newer(table.at + from, &mut bytes);
        let width = geometry.entry_width();
        let first = (from / width.bytes()) as u32;
        for (index, entry) in (first..).zip(bytes.chunks(width.bytes() as usize)) {
            let entry = L2Entry::at_start(entry, width);
            let last = match entry.compressed_run(&geometry) {
                Some(run) => Some(HostOffset(run.range().end().0 - 1)),
                None => entry.host(),
            };
            if last.is_some_and(|last| geometry.host_cluster(last).0 >= walk.holes.goal) {
                walk.queue.push_back((Pointer { table, index }, entry));
            }
        }
        Ok(Some(len))
    }

    /// Puts what memory has of a table over what storage had.
    fn take_newer(&self, start: HostOffset, bytes: &mut [u8]) {
        let mut meta = self.0.meta.lock();
        let slice_bytes = meta.l2.slice_bytes() as usize;
        for (nth, slice) in (0..).zip(bytes.chunks_mut(slice_bytes)) {
            if let Some(newer) = meta.l2.read(start + nth * slice_bytes as u64) {
                slice.copy_from_slice(newer);
            }
        }
    }

    /// Moves what an entry shows, or notes it until all that show the same are known.
    async fn consider(&self, walk: &mut Walk, pointer: Pointer, entry: L2Entry) -> Result<Outcome> {
        let Some(host) = entry.host() else {
            walk.note(entry.word, pointer);
            return Ok(Outcome::Shared);
        };
        if let Owner::Active(index) = pointer.table.owner
            && pointer.table.times == 1
        {
            let geometry = self.geometry();
            let start = u64::from(index) * geometry.l2_coverage_bytes();
            let guest = start + (u64::from(pointer.index) << geometry.cluster_bits());
            let outcome = self.move_single(GuestOffset(guest), host, &mut walk.holes).await?;
            if outcome != Outcome::Shared {
                return Ok(outcome);
            }
        }
        self.consider_shared(walk, pointer, host).await
    }

    async fn consider_shared(
        &self,
        walk: &mut Walk,
        pointer: Pointer,
        host: HostOffset,
    ) -> Result<Outcome> {
        let Some(pointers) = walk.note(host.0, pointer) else { return Ok(Outcome::Shared) };
        let (count, weight) = (pointers.len(), weight(pointers));
        let cluster = HostCluster(host.0 >> self.geometry().cluster_bits());
        let refcount = self.plan(|meta| meta.settled_refcount(cluster)).await?;
        if refcount != Some(weight) || count > MOST_POINTERS {
            return Ok(Outcome::Shared);
        }
        let pointers = walk.take(host.0);
        if self.0.meta.lock().pins.holds(cluster) {
            return match self.prepare_pinned(pointers, host, &mut walk.holes).await? {
                Ok(prepared) => {
                    walk.prepared.push(prepared);
                    Ok(Outcome::Moved)
                }
                Err(outcome) => Ok(outcome),
            };
        }
        self.move_shared(&pointers, host, &mut walk.holes).await
    }
}
