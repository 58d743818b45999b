//! What storage says of data clusters, asked in large pieces.
//!
//! Never kept longer than one answer lives, or one walk by somebody who wants a picture and no more:
//! others may write the file. Neighbours in the guest may lie anywhere in the file, so answers are
//! kept by place, and a bounded number of them: a file may lie in millions of pieces.

use std::collections::BTreeMap;

use crate::storage::{HostExtent, HostStatus, Storage};
use crate::units::{HostOffset, HostRange};
use crate::{Error, Result};

/// A question of this size is not made larger.
const LARGE_BYTES: u64 = 64 << 20;

/// So many answers are kept, which is a few MiB; then all are forgotten. Asking again is right, if slow.
const MOST_ANSWERS: usize = 1 << 16;

/// Answers so far, by where they start. Where two overlap, the later start counts.
#[derive(Debug, Default)]
pub(crate) struct HostStatuses {
    /// The end and the status by the start.
    known: BTreeMap<HostOffset, (HostOffset, HostStatus)>,
    /// The answer that was of use last: mostly it is again.
    last: Option<(HostRange, HostStatus)>,
}

impl HostStatuses {
    /// Returns the status of the first run of `range`, never longer than it.
    pub(crate) async fn first<S: Storage>(
        &mut self,
        storage: &S,
        range: HostRange,
    ) -> Result<HostExtent> {
        if let Some(known) = self.known(range) {
            return Ok(known);
        }
        let found = storage.extents_at(self.question(range)).await?;
        if self.known.len() >= MOST_ANSWERS {
            self.known.clear();
        }
        let mut start = range.start;
        for run in &found {
            self.known.insert(start, (start + run.len, run.status));
            start = start + run.len;
        }
        let first = found.first().ok_or_else(|| Error::corrupt("A storage without status"))?;
        Ok(HostExtent { len: first.len.min(range.len), ..*first })
    }

    /// As [`first`](Self::first), where no question is needed.
    pub(crate) fn known(&mut self, range: HostRange) -> Option<HostExtent> {
        let (found, status) = match self.last {
            Some((last, status)) if last.contains(range.start) => (last, status),
            _ => {
                let (&start, &(end, status)) = self.known.range(..=range.start).next_back()?;
                (HostRange::new(start, end - start), status)
            }
        };
        let len = found.end().0.checked_sub(range.start.0).filter(|&len| len > 0)?;
        self.last = Some((found, status));
        Some(HostExtent { len: len.min(range.len), status })
    }

    /// Asks as far as the next answer that is there already: clusters that are scattered over a long
    /// run share its answer. A large question stays as it is, since the host would go on to look
    /// for what nobody asked about.
    fn question(&self, range: HostRange) -> HostRange {
        if range.len >= LARGE_BYTES {
            return range;
        }
        let most = (i64::MAX as u64).saturating_sub(range.start.0).max(range.len);
        let next = self.known.range(range.start..).next();
        let room = next.map_or(u64::MAX, |(start, _)| start.0 - range.start.0);
        HostRange::new(range.start, most.min(room))
    }
}

#[cfg(test)]
mod tests {
    use pollster::block_on;

    use super::*;
    use crate::storage::MemoryStorage;

    #[test]
    fn an_answer_serves_every_place_in_it_and_none_outside() {
        let storage = MemoryStorage::new();
        block_on(
            storage.write_at(HostOffset(1 << 20), crate::buffer::Buffer::from(&[1; 65536][..])),
        )
        .0
        .unwrap();
        let mut statuses = HostStatuses::default();
        let mut ask = |start, len| {
            let range = HostRange::new(HostOffset(start), len);
            let fresh = block_on(storage.status_at(range)).unwrap();
            let found = block_on(statuses.first(&storage, range)).unwrap();
            assert_eq!(found.status, fresh.status, "{start}");
            assert!(found.len <= len && found.len > 0);
        };
        for start in [1 << 20, (1 << 20) + 512, 4096, 0, (1 << 20) - 512, 2 << 20, 1 << 40] {
            ask(start, 512);
            ask(start, 65536);
        }
    }

    #[test]
    fn answers_do_not_pile_up() {
        let storage = MemoryStorage::new();
        block_on(storage.write_at(HostOffset(0), crate::buffer::Buffer::from(&[1; 8][..])))
            .0
            .unwrap();
        let mut statuses = HostStatuses::default();
        for at in 0..MOST_ANSWERS as u64 {
            let place = HostOffset((1 << 40) + 2 * at);
            statuses.known.insert(place, (place + 1, HostStatus::Data));
        }
        let found = block_on(statuses.first(&storage, HostRange::new(HostOffset(0), 8))).unwrap();
        assert_eq!((found.len, found.status), (8, HostStatus::Data));
        assert_eq!(statuses.known.len(), 1);
    }
}
