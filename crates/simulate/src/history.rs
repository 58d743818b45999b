//! What a disk may hold after requests that overlap in time, fail, or are cut off.
//!
//! * Every byte is judged alone. Requests that change one byte never overlap in time, so that they have
//!   an order; a read may overlap with anything.
//! * A change that failed, was dropped, or is a discard may have happened or not.
//! * A flush makes durable what was acknowledged before it was asked for, whoever wrote it.
//! * Another size is durable once it is acknowledged. What it cuts off may be anything until then, and
//!   zeros when it comes back.

use std::ops::Range;
use std::rc::Rc;

use lacuna::units::{GuestOffset, GuestRange};
use testkit::content;

/// A moment: they are counted.
pub(crate) type Tick = u64;

/// What a change leaves in its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fill {
    Zeros,
    /// Zeros in the end, and anything before that: nobody wants to know any more.
    Cut,
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

/// A size that the disk was to get.
#[derive(Clone, Copy, Debug)]
struct Size {
    bytes: u64,
    begun: Tick,
    done: Option<Tick>,
}

/// A change of the size that was begun.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SizeId(usize, ChangeId);

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

impl Eyes {
    /// The last moment that they can have seen.
    const fn last(self) -> Tick {
        match self {
            Self::Reader(_, last) | Self::AfterCrash(last) => last,
        }
    }
}

/// All that happened to a disk since somebody looked at all of it.
#[derive(Clone, Debug)]
pub(crate) struct History {
    /// As long as the disk was to be at most since.
    base: Rc<Vec<u8>>,
    /// How large it was then.
    size_bytes: u64,
    sizes: Vec<Size>,
    changes: Vec<Change>,
    now: Tick,
}

impl History {
    pub(crate) fn new(base: Vec<u8>) -> Self {
        let size_bytes = base.len() as u64;
        Self { base: Rc::new(base), size_bytes, sizes: Vec::new(), changes: Vec::new(), now: 0 }
    }

    /// Returns what there was when somebody looked at all of it.
    pub(crate) fn settled(&self) -> &[u8] {
        &self.base
    }

    /// Returns the moment it is: another one at each call.
    pub(crate) const fn tick(&mut self) -> Tick {
        self.now += 1;
        self.now
    }

    /// Takes over what was found: nothing else is possible any more.
    pub(crate) fn settle(&mut self, content: Vec<u8>) {
        (self.size_bytes, self.sizes) = (content.len() as u64, Vec::new());
        (self.base, self.changes) = (Rc::new(content), Vec::new());
    }

    /// Says whether something may have happened or not.
    pub(crate) fn is_open(&self) -> bool {
        self.changes.iter().any(|change| change.done.is_none() && change.range.len > 0)
    }

    /// Notes that the disk is to have another size.
    pub(crate) fn begin_resize(&mut self, bytes: u64) -> SizeId {
        let before = self.sizes.last().map_or(self.size_bytes, |size| size.bytes);
        let (start, end) = (before.min(bytes), before.max(bytes));
        if end > self.base.len() as u64 {
            Rc::make_mut(&mut self.base).resize(end as usize, 0);
        }
        let fill = if bytes < before { Fill::Cut } else { Fill::Zeros };
        let change = self.begin(GuestRange::new(GuestOffset(start), end - start), fill);
        self.sizes.push(Size { bytes, begun: self.now, done: None });
        SizeId(self.sizes.len() - 1, change)
    }

    /// Notes that the disk has the size, durably.
    pub(crate) fn resized(&mut self, id: SizeId) {
        self.acknowledge(id.1, true);
        self.sizes[id.0].done = Some(self.now);
    }

    /// Notes that the size was refused, and nothing done. Only for the last one.
    pub(crate) fn keep_size(&mut self, id: SizeId) {
        self.forget(id.1);
        self.sizes.truncate(id.0);
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

    /// Notes that a change was declined, and nothing done.
    pub(crate) fn forget(&mut self, id: ChangeId) {
        self.changes[id.0].range.len = 0;
    }

    /// Notes that a flush went well that was asked for at that moment.
    pub(crate) fn flushed(&mut self, asked: Tick) {
        let is_covered = |change: &&mut Change| change.done.is_some_and(|done| done < asked);
        self.changes.iter_mut().filter(is_covered).for_each(|change| change.is_durable = true);
    }

    /// Judges a whole disk, and the size it has.
    ///
    /// # Errors
    /// What cannot be, in words.
    pub(crate) fn judge_all(&self, seen: &[u8], eyes: Eyes) -> Result<(), String> {
        let size_bytes = seen.len() as u64;
        if !self.may_have(size_bytes, eyes) {
            let (first, sizes) = (self.size_bytes, &self.sizes);
            return Err(format!("{size_bytes:#x} bytes; it had {first:#x}, then {sizes:x?}"));
        }
        self.judge(GuestRange::new(GuestOffset(0), size_bytes), seen, eyes)
    }

    fn may_have(&self, bytes: u64, eyes: Eyes) -> bool {
        for size in self.sizes.iter().rev() {
            if size.begun <= eyes.last() && size.bytes == bytes {
                return true;
            }
            let is_settled = match (size.done, eyes) {
                (None, _) => false,
                (Some(done), Eyes::Reader(asked, _)) => done <= asked,
                (Some(_), Eyes::AfterCrash(_)) => true,
            };
            if is_settled {
                return false;
            }
        }
        self.size_bytes == bytes
    }

    /// Judges the bytes of a range.
    ///
    /// # Errors
    /// The first byte that cannot be, in words.
    pub(crate) fn judge(&self, range: GuestRange, seen: &[u8], eyes: Eyes) -> Result<(), String> {
        let expected = self.expected(range, eyes);
        if seen == expected {
            return Ok(());
        }
        if let Some(index) = self.first_wrong(range, seen, &expected, eyes) {
            let at = range.start.0 + index as u64;
            let (seen, expected, story) = (seen[index], expected[index], self.story(at));
            return Err(format!(
                "byte {at:#x} is {seen:#04x}, expected {expected:#04x} ({eyes:?}); changes there:{story}"
            ));
        }
        match seen.len() == expected.len() {
            true => Ok(()),
            false => Err(format!("{} bytes, expected {}", seen.len(), expected.len())),
        }
    }

    /// Returns the bytes if nothing is there that may be there or not.
    fn expected(&self, range: GuestRange, eyes: Eyes) -> Vec<u8> {
        let end = range.end().0.min(self.base.len() as u64);
        let range = GuestRange::new(range.start, end - range.start.0);
        let mut bytes = self.base[range.start.0 as usize..end as usize].to_vec();
        for change in self.changes.iter().filter(|change| change.is_settled(eyes)) {
            if let Some((place, piece)) = change.within(range) {
                bytes[place].copy_from_slice(&change.fill.bytes(piece));
            }
        }
        bytes
    }

    /// Returns the index of the first byte that is neither what is expected nor what something that may
    /// be there or not can have left since.
    fn first_wrong(
        &self,
        range: GuestRange,
        seen: &[u8],
        expected: &[u8],
        eyes: Eyes,
    ) -> Option<usize> {
        let mut is_wrong: Vec<bool> =
            seen.iter().zip(expected).map(|(seen, expected)| seen != expected).collect();
        let range = GuestRange::new(range.start, is_wrong.len() as u64);
        // Where a settled change hides those before it.
        let mut is_hidden = vec![false; is_wrong.len()];
        for change in self.changes.iter().rev() {
            let Some((place, piece)) = change.within(range) else { continue };
            if change.is_settled(eyes) {
                is_hidden[place].fill(true);
            } else if change.begun <= eyes.last() && is_wrong[place.clone()].contains(&true) {
                let hidden = &is_hidden[place.clone()];
                change.explain(piece, &mut is_wrong[place.clone()], hidden, &seen[place]);
            }
        }
        is_wrong.iter().position(|is_wrong| *is_wrong)
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
    /// Returns which part of a range it changes: as indices within the range, and as a range.
    fn within(&self, range: GuestRange) -> Option<(Range<usize>, GuestRange)> {
        let start = self.range.start.max(range.start);
        let end = self.range.end().min(range.end());
        let len = end.0.checked_sub(start.0).filter(|len| *len > 0)?;
        let index = (start.0 - range.start.0) as usize;
        Some((index..index + len as usize, GuestRange::new(start, len)))
    }

    /// Takes the bytes that it can have left, and that nothing hides, off those that are wrong.
    fn explain(&self, piece: GuestRange, is_wrong: &mut [bool], is_hidden: &[bool], seen: &[u8]) {
        if self.fill == Fill::Cut {
            is_wrong.iter_mut().zip(is_hidden).for_each(|(wrong, hidden)| *wrong &= *hidden);
            return;
        }
        let left = self.fill.bytes(piece);
        for (((wrong, hidden), seen), left) in
            is_wrong.iter_mut().zip(is_hidden).zip(seen).zip(&left)
        {
            *wrong &= *hidden | (seen != left);
        }
    }

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
    fn another_size_may_be_there_or_not_until_it_is_acknowledged() {
        let mut history = History::new(vec![9; 1024]);
        let now = |history: &mut History| Eyes::AfterCrash(history.tick());
        let cut = history.begin_resize(512);
        let eyes = now(&mut history);
        for seen in [vec![9; 512], vec![9; 1024], [[9; 512], [3; 512]].concat()] {
            history.judge_all(&seen, eyes).unwrap();
        }
        history.judge_all(&[9; 600], eyes).unwrap_err();
        history.resized(cut);
        let grown = history.begin_resize(2048);
        let eyes = now(&mut history);
        history.judge_all(&[9; 512], eyes).unwrap();
        history.judge_all(&[9; 1024], eyes).unwrap_err();
        let larger = [&[9; 512][..], &[0; 1536]].concat();
        history.judge_all(&larger, eyes).unwrap();
        history.resized(grown);
        let eyes = now(&mut history);
        history.judge_all(&[9; 512], eyes).unwrap_err();
        history.judge_all(&[9; 2048], eyes).unwrap_err();
        history.judge_all(&larger, eyes).unwrap();
        let refused = history.begin_resize(512);
        history.keep_size(refused);
        let eyes = now(&mut history);
        history.judge_all(&larger, eyes).unwrap();
        history.judge_all(&[9; 512], eyes).unwrap_err();
    }

    #[test]
    fn equal_clusters_have_equal_bytes() {
        let fill = pattern(7);
        assert_eq!(fill.bytes(range(0, 512)), fill.bytes(range(1024, 512)));
        assert_eq!(fill.bytes(range(500, 20))[12..], fill.bytes(range(0, 8)));
    }
}
