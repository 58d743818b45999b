//! Requests under way: who may touch which guest clusters, and since when.
//!
//! * Whoever changes the map conflicts with all but reads; shared (data written in place) conflicts
//!   with those, and with its like only over the same bytes, so that a dropped write that is still
//!   with the driver does not land on a later one; reads conflict with nothing.
//! * Always: a freed host cluster is reused only when every request that began before it was
//!   freed is over, since such a request may still move its bytes (D.1-58).
//! * Always: what a request reserved and never linked goes back when its last hold is dropped.

use event_listener::{Event, EventListener};
use smallvec::SmallVec;

use crate::units::{GuestRange, HostRange};

/// How a request touches its clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Touch {
    /// Reads guest bytes.
    Read,
    /// Writes guest bytes where they lie.
    Shared,
    /// Moves guest bytes and changes the map.
    Exclusive,
    /// Changes the map and moves no bytes: excludes others, but keeps no cluster from reuse.
    Map,
}

/// A request's place in the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token(pub(super) u64);

/// The moment a request began or a cluster was freed: later ones are greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment(u64);

#[derive(Debug)]
struct Entry {
    began: Moment,
    touch: Touch,
    clusters: GuestRange,
    reserved: SmallVec<[HostRange; 2]>,
}

#[derive(Debug, Default)]
pub(super) struct InFlight {
    entries: Vec<Option<Entry>>,
    vacant: Vec<usize>,
    now: u64,
    over: Event,
    /// Metadata writes that are with the driver, maybe of a write-back that was dropped.
    metadata_writes: u64,
}

impl InFlight {
    /// Enters a request, or returns what to wait for where it conflicts with another.
    pub(super) fn begin(
        &mut self,
        touch: Touch,
        clusters: GuestRange,
    ) -> Result<Token, EventListener> {
        if self.conflicts(touch, clusters) {
            return Err(self.over.listen());
        }
        self.now += 1;
        let entry = Entry { began: Moment(self.now), touch, clusters, reserved: SmallVec::new() };
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.entries.push(None);
            self.entries.len() - 1
        });
        self.entries[index] = Some(entry);
        Ok(Token(index as u64))
    }

    /// Says whether such a request has to wait.
    pub(super) fn conflicts(&self, touch: Touch, clusters: GuestRange) -> bool {
        let excludes = |other: &Entry| match (touch, other.touch) {
            (Touch::Read, _) | (_, Touch::Read) => false,
            _ => other.clusters.overlaps(&clusters),
        };
        self.entries.iter().flatten().any(excludes)
    }

    /// Returns what becomes ready when the next request is over.
    pub(super) fn wait(&self) -> EventListener {
        self.over.listen()
    }

    /// Has everyone who waits look again.
    pub(super) fn wake_all(&self) {
        self.over.notify(usize::MAX);
    }

    /// Takes note of host clusters that go back unless the request links them.
    pub(super) fn reserve(&mut self, token: Token, range: HostRange) {
        if let Some(entry) = self.entries[token.0 as usize].as_mut() {
            entry.reserved.push(range);
        }
    }

    /// The map shows the first `len` bytes of what the request had reserved.
    pub(super) fn linked(&mut self, token: Token, len: u64) {
        let entry = self.entries[token.0 as usize].as_mut();
        if let Some(first) = entry.and_then(|entry| entry.reserved.first_mut()) {
            let len = len.min(first.len);
            *first = HostRange::new(first.start + len, first.len - len);
        }
    }

    /// Something shows all that the request had reserved.
    pub(super) fn all_linked(&mut self, token: Token) {
        if let Some(entry) = self.entries[token.0 as usize].as_mut() {
            entry.reserved.clear();
        }
    }

    /// Ends a request; returns what it had reserved and not linked.
    pub(super) fn end(&mut self, token: Token) -> SmallVec<[HostRange; 2]> {
        let entry = self.entries[token.0 as usize].take();
        self.vacant.push(token.0 as usize);
        self.over.notify(usize::MAX);
        let mut reserved = entry.map(|entry| entry.reserved).unwrap_or_default();
        reserved.retain(|range| !range.is_empty());
        reserved
    }

    pub(super) const fn metadata_write_begins(&mut self) {
        self.metadata_writes += 1;
    }

    pub(super) fn metadata_write_over(&mut self) {
        self.metadata_writes -= 1;
        self.over.notify(usize::MAX);
    }

    pub(super) const fn has_metadata_writes(&self) -> bool {
        self.metadata_writes > 0
    }

    /// Returns the present moment, later than any request's beginning.
    pub(super) fn moment(&mut self) -> Moment {
        self.now += 1;
        Moment(self.now)
    }

    /// Says whether every request that began before `moment` and does more than read is over.
    pub(super) fn changes_are_over(&self, moment: Moment) -> bool {
        let mut all = self.entries.iter().flatten();
        all.all(|entry| entry.began > moment || entry.touch == Touch::Read)
    }

    /// Says whether every request that began before `moment` and moves bytes is over.
    pub(super) fn all_began_after(&self, moment: Moment) -> bool {
        self.entries.iter().flatten().all(|entry| entry.began > moment || entry.touch == Touch::Map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{GuestOffset, HostOffset};

    fn range(start: u64, len: u64) -> GuestRange {
        GuestRange::new(GuestOffset(start), len)
    }

    #[test]
    fn changers_of_a_mapping_exclude_each_other_and_writers_in_place_but_not_readers() {
        let mut list = InFlight::default();
        let token = list.begin(Touch::Exclusive, range(0, 10)).unwrap();
        assert!(list.begin(Touch::Exclusive, range(9, 1)).is_err());
        assert!(list.begin(Touch::Shared, range(9, 1)).is_err());
        assert!(list.begin(Touch::Read, range(9, 1)).is_ok());
        assert!(list.begin(Touch::Exclusive, range(10, 1)).is_ok());
        assert!(list.end(token).is_empty());
        assert!(list.begin(Touch::Shared, range(8, 1)).is_ok());
        assert!(list.begin(Touch::Shared, range(9, 1)).is_ok());
        assert!(list.begin(Touch::Shared, range(9, 1)).is_err());
    }

    #[test]
    fn a_read_from_before_a_free_keeps_the_cluster_from_reuse() {
        let mut list = InFlight::default();
        let old = list.begin(Touch::Read, range(0, 10)).unwrap();
        let freed = list.moment();
        let _young = list.begin(Touch::Read, range(0, 10)).unwrap();
        assert!(!list.all_began_after(freed));
        list.end(old);
        assert!(list.all_began_after(freed));
    }

    #[test]
    fn what_was_reserved_and_not_linked_comes_back() {
        let mut list = InFlight::default();
        let token = list.begin(Touch::Exclusive, range(0, 10)).unwrap();
        list.reserve(token, HostRange::new(HostOffset(512), 512));
        assert_eq!(list.end(token).len(), 1);
    }
}
