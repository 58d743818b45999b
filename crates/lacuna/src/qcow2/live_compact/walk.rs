//! The walk: through all tables once, moving what can move at once and noting what more entries show.
//!
//! * A table that changes behind the walk is seen in the next pass.

use std::collections::{HashMap, VecDeque};

use foldhash::fast::RandomState;

use super::super::format::L2Entry;
use super::super::image::Image;
use super::super::pointers::{MOST_POINTERS, Owner, Pointer, weight};
use super::super::table_walk::{Others, TableWalk};
use super::moves::{Holes, Outcome, Prepared};
use crate::Result;
use crate::storage::Storage;
use crate::units::{GuestOffset, HostCluster, HostOffset};

/// Copies that are pinned at most before their pins are made durable.
const MOST_PREPARED: usize = 64;
/// Memory for what several entries show, and for each entry.
const NOTE_BYTES: u64 = 100;
const POINTER_BYTES: u64 = size_of::<Pointer>() as u64;

/// A walk under way.
#[derive(Debug)]
pub(super) struct Walk {
    pub(super) holes: Holes,
    memory_bytes: u64,
    tables: TableWalk,
    queue: VecDeque<(Pointer, L2Entry)>,
    /// What several entries show, by place or, compressed, by the word of an entry.
    noted: HashMap<u64, Vec<Pointer>, RandomState>,
    noted_bytes: u64,
    prepared: Vec<Prepared>,
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
            tables: TableWalk::new(others),
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

impl<S: Storage> Image<S> {
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
        let Some(piece) = self.read_entries(&mut walk.tables).await? else { return Ok(None) };
        let geometry = self.geometry();
        for (pointer, entry) in piece.entries(&geometry) {
            let last = match entry.compressed_run(&geometry) {
                Some(run) => Some(HostOffset(run.range().end().0 - 1)),
                None => entry.host(),
            };
            if last.is_some_and(|last| geometry.host_cluster(last).0 >= walk.holes.goal) {
                walk.queue.push_back((pointer, entry));
            }
        }
        Ok(Some(piece.bytes()))
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
