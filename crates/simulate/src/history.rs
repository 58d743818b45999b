//! What a disk may hold after requests that overlap in time, fail, or are cut off.
//!
//! * Every byte is judged alone. Requests that change one byte never overlap in time, so that they have
//!   an order; a read may overlap with anything.
//! * A change that failed, was dropped, or is a discard may have happened or not.
//! * A flush makes durable what was acknowledged before it was asked for, whoever wrote it.

use lacuna::units::{GuestOffset, GuestRange};
use testkit::content;

/// A moment: they are counted.
pub(crate) type Tick = u64;

/// What a change leaves in its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fill {
    Zeros,
    /// Bytes that follow from the seed and the place within a cluster: equal clusters come to be.
    Pattern {
        seed: u64,
        cluster_bytes: u64,
    },
}

impl Fill {
    pub(crate) fn bytes(self, range: GuestRange) -> Vec<u8> {
        let Self::Pattern { seed, cluster_bytes } = self else {
            return vec![0; range.len as usize];
        };
        let (mut bytes, mut at) = (Vec::with_capacity(range.len as usize), range.start.0);
        while at < range.end().0 {
            let within = at % cluster_bytes;
            let len = (cluster_bytes - within).min(range.end().0 - at);
            let piece = GuestRange::new(GuestOffset(within), len);
            bytes.extend(content(seed, piece));
            at += len;
        }
        bytes
    }

    fn byte(self, at: u64) -> u8 {
        self.bytes(GuestRange::new(GuestOffset(at), 1))[0]
    }
}

#[derive(Clone, Debug)]
struct Change {
    range: GuestRange,
    fill: Fill,
    begun: Tick,
    /// When it was acknowledged; never for one that may have happened or not.
    done: Option<Tick>,
    is_durable: bool,
}

/// A change that was begun.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChangeId(usize);

/// For whom bytes are judged.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Eyes {
    /// Somebody who asked at the first and was answered at the second moment.
    Reader(Tick, Tick),
    /// Somebody who opens the image after a crash at that moment.
    AfterCrash(Tick),
}

/// All that happened to a disk since somebody looked at all of it.
#[derive(Clone, Debug)]
pub(crate) struct History {
    base: Vec<u8>,
    changes: Vec<Change>,
    now: Tick,
}

impl History {
    pub(crate) const fn new(base: Vec<u8>) -> Self {
        Self { base, changes: Vec::new(), now: 0 }
    }

    pub(crate) const fn size_bytes(&self) -> u64 {
        self.base.len() as u64
    }

    pub(crate) const fn whole(&self) -> GuestRange {
        GuestRange::new(GuestOffset(0), self.size_bytes())
    }

    /// Returns the moment it is: another one at each call.
    pub(crate) const fn tick(&mut self) -> Tick {
        self.now += 1;
        self.now
    }

    /// Takes over what was found: nothing else is possible any more.
    pub(crate) fn settle(&mut self, content: Vec<u8>) {
        (self.base, self.changes) = (content, Vec::new());
    }

    pub(crate) fn begin(&mut self, range: GuestRange, fill: Fill) -> ChangeId {
        let begun = self.tick();
        self.changes.push(Change { range, fill, begun, done: None, is_durable: false });
        ChangeId(self.changes.len() - 1)
    }

    /// Notes that a change was acknowledged, and whether it is durable by itself.
    pub(crate) fn acknowledge(&mut self, id: ChangeId, is_durable: bool) {
        let now = self.tick();
        let change = &mut self.changes[id.0];
        (change.done, change.is_durable) = (Some(now), is_durable);
    }

    /// Notes that a flush went well that was asked for at that moment.
    pub(crate) fn flushed(&mut self, asked: Tick) {
        let is_covered = |change: &&mut Change| change.done.is_some_and(|done| done < asked);
        self.changes.iter_mut().filter(is_covered).for_each(|change| change.is_durable = true);
    }

    /// Judges the bytes of a range.
    ///
    /// # Errors
    /// The first byte that cannot be, in words.
    pub(crate) fn judge(&self, range: GuestRange, seen: &[u8], eyes: Eyes) -> Result<(), String> {
        let expected = self.expected(range, eyes);
        for (index, (seen, expected)) in seen.iter().zip(&expected).enumerate() {
            let at = range.start.0 + index as u64;
            if seen != expected && !self.may_be(at, *seen, eyes) {
                let story = self.story(at);
                return Err(format!(
                    "byte {at:#x} is {seen:#04x}, expected {expected:#04x} ({eyes:?}); changes there:{story}"
                ));
            }
        }
        match seen.len() == expected.len() {
            true => Ok(()),
            false => Err(format!("{} bytes, expected {}", seen.len(), expected.len())),
        }
    }

    /// Returns the bytes if nothing is there that may be there or not.
    fn expected(&self, range: GuestRange, eyes: Eyes) -> Vec<u8> {
        let end = range.end().0.min(self.size_bytes());
        let mut bytes = self.base[range.start.0 as usize..end as usize].to_vec();
        for change in self.changes.iter().filter(|change| change.is_settled(eyes)) {
            let start = change.range.start.0.max(range.start.0);
            let end = change.range.end().0.min(end);
            if start < end {
                let piece = GuestRange::new(GuestOffset(start), end - start);
                let at = (start - range.start.0) as usize;
                bytes[at..at + piece.len as usize].copy_from_slice(&change.fill.bytes(piece));
            }
        }
        bytes
    }

    /// Says whether a byte may be that, though it is not what is expected.
    fn may_be(&self, at: u64, value: u8, eyes: Eyes) -> bool {
        let last = match eyes {
            Eyes::Reader(_, last) | Eyes::AfterCrash(last) => last,
        };
        for change in self.at(at).rev() {
            if change.begun <= last && change.fill.byte(at) == value {
                return true;
            }
            if change.is_settled(eyes) {
                return false;
            }
        }
        self.base[at as usize] == value
    }

    fn at(&self, at: u64) -> impl DoubleEndedIterator<Item = &Change> {
        let is_there =
            move |change: &&Change| (change.range.start.0..change.range.end().0).contains(&at);
        self.changes.iter().filter(is_there)
    }

    fn story(&self, at: u64) -> String {
        self.at(at)
            .map(|change| {
                let byte = change.fill.byte(at);
                let Change { range, begun, done, is_durable, .. } = change;
                format!("\n  {byte:#04x} by {range:x?}, begun {begun}, acknowledged {done:?}, durable: {is_durable}")
            })
            .collect()
    }
}

impl Change {
    /// Says whether it must be seen, unless something later hides it.
    const fn is_settled(&self, eyes: Eyes) -> bool {
        match (self.done, eyes) {
            (None, _) => false,
            (Some(done), Eyes::Reader(asked, _)) => done <= asked,
            (Some(_), Eyes::AfterCrash(_)) => self.is_durable,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> GuestRange {
        GuestRange::new(GuestOffset(start), len)
    }

    fn pattern(seed: u64) -> Fill {
        Fill::Pattern { seed, cluster_bytes: 512 }
    }

    #[test]
    fn an_unacknowledged_change_may_be_seen_or_not_and_an_acknowledged_one_must() {
        let mut history = History::new(vec![9; 1024]);
        let (old, new) = (vec![9; 512], pattern(1).bytes(range(0, 512)));
        let asked = history.tick();
        let id = history.begin(range(0, 512), pattern(1));
        let during = Eyes::Reader(asked, history.tick());
        for bytes in [&old, &new] {
            history.judge(range(0, 512), bytes, during).unwrap();
        }
        history.judge(range(0, 512), &[8; 512], during).unwrap_err();
        history.acknowledge(id, false);
        let now = history.tick();
        history.judge(range(0, 512), &new, Eyes::Reader(now, now)).unwrap();
        history.judge(range(0, 512), &old, Eyes::Reader(now, now)).unwrap_err();
        // Whoever asked before it was acknowledged may have been answered before it.
        history.judge(range(0, 512), &old, during).unwrap();
    }

    #[test]
    fn a_crash_loses_what_no_flush_covered() {
        let mut history = History::new(vec![0; 1024]);
        let first = history.begin(range(0, 512), pattern(1));
        history.acknowledge(first, false);
        let asked = history.tick();
        let second = history.begin(range(0, 512), pattern(2));
        history.acknowledge(second, false);
        history.flushed(asked);
        let eyes = Eyes::AfterCrash(history.tick());
        for seed in [1, 2] {
            history.judge(range(0, 512), &pattern(seed).bytes(range(0, 512)), eyes).unwrap();
        }
        history.judge(range(0, 512), &[0; 512], eyes).unwrap_err();
    }

    #[test]
    fn equal_clusters_have_equal_bytes() {
        let fill = pattern(7);
        assert_eq!(fill.bytes(range(0, 512)), fill.bytes(range(1024, 512)));
        assert_eq!(fill.bytes(range(500, 20))[12..], fill.bytes(range(0, 8)));
    }
}
