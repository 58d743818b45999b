//! The claims about the whole disk: all zero, all unallocated (000-14).
//!
//! Looked at only where they are made. A data cluster contradicts the first unless its bytes are
//! zeros, as those of a preallocated image are; where the host does not know, they are read.

use super::finding::FindingKind;
use super::read::read_bytes;
use super::survey::Survey;
use crate::Result;
use crate::block::is_zero;
use crate::qcow2::format::{AutoclearFeatures, L2Entry, SubclusterBitmap, SubclusterState};
use crate::storage::Storage;
use crate::units::{HostOffset, HostRange};

impl Survey {
    /// Records, once for each claim, the first entry that contradicts it.
    pub(super) async fn check_claims<S: Storage>(&mut self, storage: &S) {
        let mut claims = self.header.zero_claims();
        // Each table and each cluster once, however often an image names it.
        let tables: Vec<u64> = match claims.is_empty() || self.io_failed {
            true => Vec::new(),
            false => self.tables.iter_active().map(|(cluster, _)| cluster).collect(),
        };
        let mut zeros = Zeros::new(self.clusters);
        for cluster in tables {
            if claims.is_empty() {
                return;
            }
            let table = self.host(cluster);
            if let Err(error) = self.check_table(storage, table, &mut claims, &mut zeros).await {
                self.note_unreadable(table, 2, &error, 1);
                return;
            }
        }
    }

    async fn check_table<S: Storage>(
        &mut self,
        storage: &S,
        table: HostOffset,
        claims: &mut AutoclearFeatures,
        zeros: &mut Zeros,
    ) -> Result<()> {
        let bytes = read_bytes(storage, table, self.geometry.cluster_bytes() as usize).await?;
        let width = self.geometry.entry_width().bytes() as usize;
        for (index, entry) in bytes.chunks_exact(width).map(decode).enumerate() {
            if entry == L2Entry::UNALLOCATED {
                continue;
            }
            let mut wrong = *claims & AutoclearFeatures::ALL_UNALLOCATED;
            if claims.contains(AutoclearFeatures::ALL_ZERO)
                && !self.is_zero(storage, entry, zeros).await?
            {
                wrong |= AutoclearFeatures::ALL_ZERO;
            }
            for claim in wrong {
                let claim = claim.bits().trailing_zeros();
                self.report
                    .record(FindingKind::ClaimWrong { claim, table, index: index as u64 }, 1);
            }
            *claims -= wrong;
        }
        Ok(())
    }

    async fn is_zero<S: Storage>(
        &self,
        storage: &S,
        entry: L2Entry,
        zeros: &mut Zeros,
    ) -> Result<bool> {
        let Some(host) = entry.host().filter(|_| !entry.is_compressed()) else {
            return Ok(!entry.is_compressed());
        };
        let cluster = self.geometry.host_cluster(host).0;
        let has_data = match self.geometry.has_subclusters() {
            true => entry.subclusters.has_data(),
            false => !entry.has_zero_flag(),
        };
        if !has_data || zeros.contains(cluster) {
            return Ok(true);
        }
        if holds_zeros(storage, HostRange::new(host, self.geometry.cluster_bytes())).await? {
            zeros.insert(cluster);
            return Ok(true);
        }
        match self.geometry.has_subclusters() {
            true => self.subclusters_are_zero(storage, entry, host).await,
            false => Ok(false),
        }
    }

    async fn subclusters_are_zero<S: Storage>(
        &self,
        storage: &S,
        entry: L2Entry,
        host: HostOffset,
    ) -> Result<bool> {
        let unit = self.geometry.subcluster_bytes();
        for index in 0..32 {
            let part = HostRange::new(host + u64::from(index) * unit, unit);
            let is_data = entry.subclusters.state(index) == SubclusterState::Data;
            if is_data && !holds_zeros(storage, part).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Host clusters that hold nothing but zeros: a bit for each in the file.
struct Zeros(Vec<u64>);

impl Zeros {
    fn new(clusters: u64) -> Self {
        Self(vec![0; clusters.div_ceil(64) as usize])
    }

    fn contains(&self, cluster: u64) -> bool {
        self.0.get((cluster / 64) as usize).is_some_and(|word| word >> (cluster % 64) & 1 == 1)
    }

    fn insert(&mut self, cluster: u64) {
        if let Some(word) = self.0.get_mut((cluster / 64) as usize) {
            *word |= 1 << (cluster % 64);
        }
    }
}

fn decode(bytes: &[u8]) -> L2Entry {
    let word = |at: usize| {
        let bytes = bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u64::from_be_bytes)
    };
    L2Entry { word: word(0), subclusters: SubclusterBitmap(word(8)) }
}

async fn holds_zeros<S: Storage>(storage: &S, range: HostRange) -> Result<bool> {
    let known = storage.status_at(range).await?;
    if known.status.reads_zero() && known.len == range.len {
        return Ok(true);
    }
    Ok(is_zero(&read_bytes(storage, range.start, range.len as usize).await?))
}
