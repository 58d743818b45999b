//! Which clusters hold metadata other than L2 tables, and which hold two kinds of it.
//!
//! Memory: 2 bits per cluster, in pages that exist only where there is some.

use super::references::PAGE;

/// Bits of one page: seen once, seen more often.
type Page = [[u64; PAGE / 64]; 2];

/// Clusters counted up to two.
#[derive(Debug)]
pub(crate) struct Census {
    len: u64,
    pages: Vec<Option<Box<Page>>>,
}

impl Census {
    /// Makes a census of clusters `0..len` in which none was seen.
    pub(crate) fn new(len: u64) -> Self {
        let mut pages = Vec::new();
        pages.resize_with(usize::try_from(len.div_ceil(PAGE as u64)).unwrap_or(0), || None);
        Self { len, pages }
    }

    /// Counts a cluster, if it is one of the census.
    pub(crate) fn add(&mut self, cluster: u64) {
        let (page, word, bit) = place(cluster);
        if cluster >= self.len {
            return;
        }
        let [once, again] =
            &mut **self.pages[page].get_or_insert_with(|| Box::new([[0; PAGE / 64]; 2]));
        again[word] |= once[word] & bit;
        once[word] |= bit;
    }

    /// Returns how often a cluster was seen: 2 stands for any more.
    pub(crate) fn count(&self, cluster: u64) -> u64 {
        let (page, word, bit) = place(cluster);
        let Some(Some(page)) = self.pages.get(page) else { return 0 };
        page.iter().map(|bits| u64::from(bits[word] & bit != 0)).sum()
    }
}

const fn place(cluster: u64) -> (usize, usize, u64) {
    let within = (cluster % PAGE as u64) as usize;
    ((cluster / PAGE as u64) as usize, within / 64, 1 << (within % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_stop_at_two_and_at_the_end() {
        let mut census = Census::new(5000);
        for cluster in [7, 4999, 4999, 4999, 5000, u64::MAX] {
            census.add(cluster);
        }
        let counts = [6, 7, 4999, 5000, u64::MAX].map(|cluster| census.count(cluster));
        assert_eq!(counts, [0, 1, 2, 0, 0]);
    }
}
