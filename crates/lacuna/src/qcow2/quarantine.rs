//! Host clusters on their way out: no longer mapped, not yet reusable.
//!
//! * Always: a refcount falls only after the mapping change that dropped the reference is durable
//!   (D.1-2), and after every request is over that began before it (D.1-58).
//! * Always: a host range is punched while its refcount still keeps it from reuse (D.1-4).

use super::in_flight::{InFlight, Moment};
use crate::units::HostCluster;

type Map<V> = std::collections::HashMap<u64, V, foldhash::fast::RandomState>;

/// References that may wait for a write-back: 10 MiB of memory.
const MAX_WAITING: usize = 1 << 18;

/// Why a cluster is freed, which decides whether its host range is punched (A.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum FreedBy {
    /// It lies beyond the end of the disk, or its mapping was removed on purpose.
    Always,
    /// The space is about to be reused, as after a copy on write.
    CopyOnWrite,
    /// The guest discarded it, or zeroed it and allowed holes.
    Guest,
    /// A table that is no longer needed, or anything else.
    Other,
}

/// One reference that is gone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Freed {
    pub(super) cluster: HostCluster,
    pub(super) by: FreedBy,
    /// Requests that began before may still use the cluster.
    pub(super) at: Moment,
}

#[derive(Debug, Default)]
pub(super) struct Quarantine {
    /// References whose mapping change may not be durable yet.
    waiting: Vec<Freed>,
    /// References whose mapping change is durable, but an older request still runs.
    held_up: Vec<Freed>,
    /// How many references of each cluster are here.
    pending: Map<u64>,
    /// How many waiting clusters lose their last reference.
    leaving: u64,
}

impl Quarantine {
    /// Adds a reference of a cluster whose refcount is `refcount` now. Says whether it is the
    /// last one.
    pub(super) fn push(&mut self, freed: Freed, refcount: u64) -> bool {
        let pending = self.pending.entry(freed.cluster.0).or_default();
        *pending += 1;
        let is_last = *pending == refcount;
        self.leaving += u64::from(is_last);
        self.waiting.push(freed);
        is_last
    }

    /// Returns how many references of the cluster are about to go.
    pub(super) fn pending(&self, cluster: HostCluster) -> u64 {
        self.pending.get(&cluster.0).copied().unwrap_or(0)
    }

    /// Says whether so many references wait that a write-back should come first: memory is
    /// bounded by about 40 bytes for each.
    pub(super) fn is_crowded(&self) -> bool {
        self.waiting.len() >= MAX_WAITING
    }

    /// Says whether no reference is about to go.
    pub(super) fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// Returns how many clusters a write-back would make reusable.
    pub(super) const fn leaving(&self) -> u64 {
        self.leaving
    }

    /// Takes those whose fate is decided by the write-back that begins now.
    pub(super) fn begin_release(&mut self) -> Vec<Freed> {
        self.leaving = 0;
        std::mem::take(&mut self.waiting)
    }

    /// Sorts a batch whose mapping changes are durable: what can go now is returned, in order of
    /// cluster, the rest is kept for a later write-back.
    pub(super) fn ready(&mut self, durable: Vec<Freed>, in_flight: &InFlight) -> Vec<Freed> {
        let mut all = std::mem::take(&mut self.held_up);
        all.extend(durable);
        let (mut ready, held_up): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|freed| in_flight.all_began_after(freed.at));
        self.held_up = held_up;
        ready.sort_by_key(|freed| freed.cluster);
        ready
    }

    /// Takes back references that could go but did not yet.
    pub(super) fn keep(&mut self, durable: Vec<Freed>) {
        self.held_up.extend(durable);
    }

    /// Puts a batch back whose write-back did not succeed.
    pub(super) fn undo(&mut self, batch: Vec<Freed>) {
        self.waiting.extend(batch);
    }

    /// The references were taken off the refcounts.
    pub(super) fn released(&mut self, cluster: HostCluster) {
        if let Some(count) = self.pending.get_mut(&cluster.0) {
            *count -= 1;
            if *count == 0 {
                self.pending.remove(&cluster.0);
            }
        }
    }
}
