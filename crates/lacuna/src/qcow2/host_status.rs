//! What storage says of data clusters, asked in large pieces.
//!
//! Never kept longer than one answer lives, or one walk by somebody who wants a picture and no more:
//! others may write the file. Neighbours in the guest may lie anywhere in the file, so answers are
//! kept by place.

use std::collections::BTreeMap;

use crate::Result;
use crate::storage::{HostExtent, HostStatus, Storage};
use crate::units::{HostOffset, HostRange};

/// The least that is asked about: scattered clusters share questions then.
const WINDOW_BYTES: u64 = 64 << 20;

/// Answers so far, which never overlap: the end and the status by the start.
#[derive(Debug, Default)]
pub(crate) struct HostStatuses(BTreeMap<HostOffset, (HostOffset, HostStatus)>);

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
        let found = storage.status_at(self.question(range)).await?;
        self.0.insert(range.start, (range.start + found.len, found.status));
        Ok(HostExtent { len: found.len.min(range.len), ..found })
    }

    fn known(&self, range: HostRange) -> Option<HostExtent> {
        let (_, &(end, status)) = self.0.range(..=range.start).next_back()?;
        let len = end.0.checked_sub(range.start.0).filter(|&len| len > 0)?;
        Some(HostExtent { len: len.min(range.len), status })
    }

    /// Asks as far as the next answer that is there already.
    fn question(&self, range: HostRange) -> HostRange {
        let wanted = range.len.max(WINDOW_BYTES).min(i64::MAX as u64 - range.start.0);
        let next = self.0.range(range.start..).next();
        let room = next.map_or(u64::MAX, |(start, _)| start.0 - range.start.0);
        HostRange::new(range.start, wanted.min(room))
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
}
