//! All that a check knows of an image: filled by the walk, judged by the comparison, used by the
//! repair.

use super::census::Census;
use super::finding::{FindingClass, FindingKind};
use super::read::read_vec;
use super::refcounts::RefcountTable;
use super::references::{Mark, References};
use super::report::CheckReport;
use super::snapshots::SnapshotDamage;
use super::tables::Tables;
use super::{Listener, Phase, Progress};
use crate::qcow2::format::{Geometry, Header, IncompatibleFeatures};
use crate::storage::Storage;
use crate::units::{HostCluster, HostOffset, HostRange};
use crate::{Error, Result};

/// Most clusters in a file that is checked: as many as QEMU takes.
const MAX_CLUSTERS: u64 = i32::MAX as u64;
/// Clusters past the end of the file in which references are noted, so that a repair does not put
/// something there. Enough for the refcounts of the largest file, twice.
const PAST_END: u64 = 1 << 22;

/// What an image's host clusters are used for, and what is wrong with that.
pub(crate) struct Survey {
    pub(crate) header: Header,
    pub(crate) geometry: Geometry,
    pub(crate) file_bytes: u64,
    /// Clusters that are compared; past them lies only what `references` notes as not to be used.
    pub(crate) clusters: u64,
    pub(crate) references: References,
    /// Metadata that is not an L2 table, by cluster.
    pub(crate) metadata: Census,
    pub(crate) tables: Tables,
    /// The active L1 table.
    pub(crate) l1: Vec<u64>,
    /// The active L1 table lies in the file. Otherwise the header is wrong about it, and what looks
    /// like its entries may be anything.
    pub(crate) l1_is_inside: bool,
    pub(crate) refcounts: RefcountTable,
    /// Every reference is known. Otherwise a cluster without references may be in use all the
    /// same, so that nothing is freed.
    pub(crate) is_complete: bool,
    /// Refcounts cannot be put right where they are: blocks are missing or cannot be used.
    pub(crate) needs_rebuild: bool,
    /// Something could not be read, so that nothing is to be written.
    pub(crate) io_failed: bool,
    /// Clusters of the refcount table and its blocks, as often as they were counted.
    pub(crate) refcount_clusters: Vec<u32>,
    /// Corruptions that new refcounts put right.
    pub(crate) refcount_corruptions: u64,
    /// Some copied flag may contradict its refcount.
    pub(crate) flags_suspect: bool,
    /// Findings in entries that a repair can put right.
    pub(crate) repairable_entries: u64,
    /// Corruptions that are copied flags.
    pub(crate) wrong_flags: u64,
    pub(crate) snapshots: SnapshotDamage,
    pub(crate) report: CheckReport,
}

impl Survey {
    /// Walks the image and compares. Nothing is written.
    pub(crate) async fn make<S: Storage>(storage: &S, listener: Listener<'_>) -> Result<Self> {
        let header = read_header(storage).await?;
        let mut survey = Self::new(header, storage.len().await?)?;
        survey.walk(storage, listener).await;
        survey.compare(storage, listener).await;
        survey.check_flags(storage, listener).await;
        survey.check_claims(storage).await;
        Ok(survey)
    }

    fn new(header: Header, file_bytes: u64) -> Result<Self> {
        let geometry = header.geometry;
        let clusters = geometry.clusters_for(file_bytes);
        if clusters > MAX_CLUSTERS {
            return Err(Error::unsupported(format!(
                "File has {clusters} clusters; at most {MAX_CLUSTERS} can be checked"
            )));
        }
        // Whole sectors only, as QEMU counts them.
        let total_clusters = geometry.clusters_for(header.size_bytes & !511);
        Ok(Self {
            geometry,
            file_bytes,
            clusters,
            references: References::new(clusters + PAST_END),
            metadata: Census::new(clusters),
            tables: Tables::new(clusters),
            l1: Vec::new(),
            l1_is_inside: true,
            refcounts: RefcountTable::empty(geometry),
            is_complete: true,
            needs_rebuild: false,
            io_failed: false,
            refcount_clusters: Vec::new(),
            refcount_corruptions: 0,
            flags_suspect: false,
            repairable_entries: 0,
            wrong_flags: 0,
            snapshots: SnapshotDamage::default(),
            report: CheckReport { total_clusters, ..CheckReport::default() },
            header,
        })
    }

    pub(crate) fn has_data_file(&self) -> bool {
        self.header.features.incompatible.contains(IncompatibleFeatures::EXTERNAL_DATA_FILE)
    }

    /// Says whether a cluster lies in the file.
    pub(super) const fn is_inside(&self, cluster: u64) -> bool {
        cluster < self.geometry.clusters_for(self.file_bytes)
    }

    /// Counts references to every cluster of a region.
    ///
    /// The last cluster of a file may be short, so a region may end past the file, but by less
    /// than a cluster. Others are not counted: returns false.
    pub(super) fn refer(&mut self, region: HostRange, times: u64, mark: Mark) -> bool {
        let (start, len) = (region.start.0, region.len);
        if len == 0 {
            return true;
        }
        let cluster_bytes = self.geometry.cluster_bytes();
        let last = start.saturating_add(len - 1);
        if last.saturating_add(1) >= self.file_bytes.saturating_add(cluster_bytes) {
            self.refer_past_end(region, last, times);
            return false;
        }
        let bits = self.geometry.cluster_bits();
        self.clusters = self.clusters.max((last >> bits) + 1);
        for cluster in start >> bits..=last >> bits {
            self.references.add(cluster, times, mark);
        }
        true
    }

    #[cold]
    fn refer_past_end(&mut self, region: HostRange, last: u64, times: u64) {
        let kind = FindingKind::ReferencePastEnd { start: region.start, len: region.len };
        self.report.record(kind, times);
        self.is_complete = false;
        self.flags_suspect = true;
        let bits = self.geometry.cluster_bits();
        let outside = (region.start.0 >> bits).max(self.geometry.clusters_for(self.file_bytes));
        for cluster in outside..=(last >> bits).min(self.references.len()) {
            self.references.add(cluster, 1, Mark::None);
        }
    }

    /// Counts references to metadata that is not an L2 table. Returns whether it lies in the file.
    pub(super) fn refer_metadata(&mut self, region: HostRange) -> bool {
        let is_inside = self.refer(region, 1, Mark::None);
        // Of one that goes on past the end, what is in the file is metadata all the same.
        let first = self.geometry.host_cluster(region.start).0;
        let end = region.start.0.saturating_add(region.len);
        for cluster in first..self.geometry.clusters_for(end.min(self.file_bytes)) {
            self.metadata.add(cluster);
        }
        is_inside
    }

    /// Records something that new refcounts put right.
    pub(super) fn record_refcount(&mut self, kind: FindingKind) {
        self.refcount_corruptions += u64::from(kind.class() == FindingClass::Corruption);
        self.report.record(kind, 1);
    }

    /// Returns the refcount that a cluster should have, given the one that it has.
    ///
    /// Without all references known the greater of both is taken: too high wastes space, too low
    /// loses data.
    pub(crate) fn target(&self, cluster: u64, refcount: u64) -> u64 {
        let references = self.references.count(cluster);
        let wanted = if self.is_complete { references } else { references.max(refcount) };
        wanted.min(self.geometry.refcount_max())
    }

    pub(crate) const fn host(&self, cluster: u64) -> HostOffset {
        self.geometry.host_offset(HostCluster(cluster))
    }

    pub(super) fn tell(listener: Listener<'_>, phase: Phase, done: u64, total: u64) {
        listener(Progress { phase, done, total });
    }
}

async fn read_header<S: Storage>(storage: &S) -> Result<Header> {
    let start = read_vec(storage, HostOffset(0), 512).await?;
    let cluster_bytes = Header::peek_cluster_bytes(&start)?;
    Header::decode_for_check(&read_vec(storage, HostOffset(0), cluster_bytes).await?)
}
