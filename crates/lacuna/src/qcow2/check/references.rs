//! How often each host cluster is referenced, counted in memory.
//!
//! * Memory: 2 bytes per host cluster where the counts stay below 16384, 4 bytes where they do
//!   not, in pages of 4096 clusters that exist only where a cluster is referenced. Plus 8 bytes
//!   per page. Sized by the length of the file, never by what a header claims (D.1-44).
//! * Beside its count a cluster carries two marks: some entry of the active tables refers to it
//!   with, or without, the copied flag. They tell whether the flags need a closer look.
//! * Never: an index past the length it was made for is counted, or panics.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use foldhash::fast::RandomState;

/// Clusters in a page; a power of two.
pub(crate) const PAGE: usize = 4096;

const COUNT_BITS: u32 = 14;
/// The low part of the count in a word.
pub(super) const COUNT_MASK: u16 = (1 << COUNT_BITS) - 1;
/// Counts stop growing here: 30 bits.
const MOST: u64 = (1 << (COUNT_BITS + 16)) - 1;

/// What an entry of the active tables says of the cluster that it refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    /// The copied flag is set.
    Copied,
    /// The flag means nothing here: compressed, inactive, or not an entry.
    None,
    /// The copied flag is clear.
    NotCopied,
}

impl Mark {
    pub(super) const COPIED: u16 = 1 << 15;
    pub(super) const NOT_COPIED: u16 = 1 << 14;

    pub(crate) const fn of(copied: bool) -> Self {
        if copied { Self::Copied } else { Self::NotCopied }
    }

    const fn bits(self) -> u16 {
        match self {
            Self::Copied => Self::COPIED,
            Self::None => 0,
            Self::NotCopied => Self::NOT_COPIED,
        }
    }
}

/// Words of one page: the marks and the low bits of the counts.
pub(super) type Page = [u16; PAGE];

/// Counts per host cluster.
#[derive(Debug)]
pub(crate) struct References {
    len: u64,
    low: Vec<Option<Box<Page>>>,
    /// The high bits of counts, for pages that need them.
    high: HashMap<usize, Box<Page>, RandomState>,
}

impl References {
    /// Makes counts of zero for clusters `0..len`.
    pub(crate) fn new(len: u64) -> Self {
        let pages = usize::try_from(len.div_ceil(PAGE as u64)).unwrap_or(usize::MAX);
        let mut low = Vec::new();
        low.resize_with(pages, || None);
        Self { len, low, high: HashMap::default() }
    }

    /// Makes room to count clusters `0..len`, if there is less.
    pub(crate) fn grow(&mut self, len: u64) {
        self.len = self.len.max(len);
        let pages = usize::try_from(self.len.div_ceil(PAGE as u64)).unwrap_or(usize::MAX);
        self.low.resize_with(pages, || None);
    }

    /// Returns how many clusters can be counted.
    pub(crate) const fn len(&self) -> u64 {
        self.len
    }

    /// Adds `times` references to a cluster.
    #[inline]
    pub(crate) fn add(&mut self, cluster: u64, times: u64, mark: Mark) {
        let Some((page, index)) = self.locate(cluster) else { return };
        let words = self.low[page].get_or_insert_with(|| Box::new([0; PAGE]));
        let word = &mut words[index];
        let count = u64::from(*word & COUNT_MASK) + times;
        if count <= u64::from(COUNT_MASK) {
            // The sum fits, so the bits above stay as they are.
            *word = (*word & !COUNT_MASK) | count as u16 | mark.bits();
            return;
        }
        *word |= mark.bits();
        self.carry(page, index, times);
    }

    /// Takes one reference off a cluster, if it has any.
    pub(crate) fn subtract_one(&mut self, cluster: u64) {
        let Some((page, index)) = self.locate(cluster) else { return };
        let Some(less) = self.word_count(page, index).checked_sub(1) else { return };
        if let Some(words) = &mut self.low[page] {
            words[index] = (words[index] & !COUNT_MASK) | (less as u16 & COUNT_MASK);
        }
        if let Some(words) = self.high.get_mut(&page) {
            words[index] = (less >> COUNT_BITS) as u16;
        }
    }

    #[cold]
    fn carry(&mut self, page: usize, index: usize, times: u64) {
        let count = (self.word_count(page, index) + times.min(MOST)).min(MOST);
        let high = match self.high.entry(page) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Box::new([0; PAGE])),
        };
        high[index] = (count >> COUNT_BITS) as u16;
        if let Some(words) = &mut self.low[page] {
            words[index] = (words[index] & !COUNT_MASK) | (count as u16 & COUNT_MASK);
        }
    }

    /// Returns the references to a cluster; none past the end.
    pub(crate) fn count(&self, cluster: u64) -> u64 {
        self.locate(cluster).map_or(0, |(page, index)| self.word_count(page, index))
    }

    /// Returns the words of the page with these clusters, and whether some of its counts have
    /// high bits. Nothing where no cluster of the page is referenced.
    pub(super) fn page(&self, page: usize) -> Option<(&Page, bool)> {
        let words = self.low.get(page)?.as_deref()?;
        Some((words, self.high.contains_key(&page)))
    }

    /// Returns the clusters from `from` on that are referenced, with their counts, in order.
    pub(crate) fn iter_from(&self, from: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let first = usize::try_from(from / PAGE as u64).unwrap_or(usize::MAX);
        let pages = self.low.iter().enumerate().skip(first);
        pages
            .filter_map(|(page, words)| words.as_deref().map(|words| (page, words)))
            .flat_map(move |(page, words)| {
                let used = words.iter().enumerate().filter(|(_, word)| **word & COUNT_MASK != 0);
                // A count with high bits only has zeros below: look at those pages in full.
                let all = self.high.contains_key(&page).then(|| words.iter().enumerate());
                let some = all.is_none().then_some(used);
                let indices = all
                    .into_iter()
                    .flatten()
                    .map(|(i, _)| i)
                    .chain(some.into_iter().flatten().map(|(i, _)| i));
                indices.map(move |i| ((page * PAGE + i) as u64, self.word_count(page, i)))
            })
            .filter(move |(cluster, count)| *cluster >= from && *count > 0)
    }

    fn word_count(&self, page: usize, index: usize) -> u64 {
        let low = self.low[page].as_ref().map_or(0, |words| words[index] & COUNT_MASK);
        let high = match self.high.is_empty() {
            true => 0,
            false => self.high.get(&page).map_or(0, |words| words[index]),
        };
        u64::from(high) << COUNT_BITS | u64::from(low)
    }

    fn locate(&self, cluster: u64) -> Option<(usize, usize)> {
        let page = (cluster / PAGE as u64) as usize;
        (cluster < self.len).then_some((page, (cluster % PAGE as u64) as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_add_up_across_the_page_of_high_bits() {
        let mut references = References::new(10_000);
        for times in [1, COUNT_MASK.into(), 1, 1 << 20] {
            references.add(5000, times, Mark::None);
        }
        assert_eq!(references.count(5000), 2 + u64::from(COUNT_MASK) + (1 << 20));
        assert_eq!(references.count(5001), 0);
    }

    #[test]
    fn counts_stop_at_thirty_bits() {
        let mut references = References::new(1);
        references.add(0, u64::MAX, Mark::None);
        references.add(0, 5, Mark::None);
        assert_eq!(references.count(0), MOST);
    }

    #[test]
    fn clusters_past_the_end_are_ignored() {
        let mut references = References::new(5);
        references.add(5, 1, Mark::None);
        references.add(u64::MAX, 1, Mark::None);
        assert_eq!((references.count(5), references.count(u64::MAX)), (0, 0));
    }

    #[test]
    fn iteration_gives_what_is_referenced_in_order() {
        let mut references = References::new(20_000);
        references.add(3, 1, Mark::Copied);
        references.add(4096, 1 << 14, Mark::None);
        references.add(19_999, 7, Mark::NotCopied);
        let found: Vec<_> = references.iter_from(4).collect();
        assert_eq!(found, [(4096, 1 << 14), (19_999, 7)]);
        assert_eq!(references.iter_from(0).next(), Some((3, 1)));
    }

    #[test]
    fn pages_exist_only_where_something_is_referenced() {
        let mut references = References::new(1 << 31);
        references.add(1 << 30, 1, Mark::None);
        assert_eq!(references.low.iter().flatten().count(), 1);
        assert!(references.high.is_empty());
    }
}
