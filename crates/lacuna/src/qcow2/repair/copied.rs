//! Entries put right: copied flags, and the few other things that can be.
//!
//! | entry | becomes | why nothing is lost |
//! |---|---|---|
//! | copied flag against the refcount (active tables) | the flag follows the refcount | |
//! | reserved cluster at an offset that is not aligned | the same state without a cluster | it holds no guest data |
//! | compressed with the copied flag | without | the flag has no meaning there |
//! | L1 entry with bits but no offset | zero | readers see no table in either |
//!
//! * Never: a table is written most of whose entries cannot be entries. Then a damaged pointer takes
//!   guest data or something else for a table, and whoever mends the pointer wants it as it was.

use super::super::check::copied::entries;
use super::super::check::l2::Meaning;
use super::super::check::read::read_bytes;
use super::super::check::refcounts::RefcountReader;
use super::super::check::tables::Tables;
use super::super::check::{FindingKind, Survey};
use super::Round;
use crate::Result;
use crate::qcow2::format::{Geometry, L1Entry, L2Entry};
use crate::storage::Storage;
use crate::units::HostOffset;

/// Entries of the L1 table that are put right at once: a table of any length takes little memory.
const L1_PART: usize = 8192;

/// What is put right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    All,
    /// All but copied flags.
    NoFlags,
}

/// What is put right in a table.
struct Change {
    index: u64,
    entry: L2Entry,
    kind: FindingKind,
}

/// The refcounts that clusters have when the repair is through.
struct Final<'a, S> {
    reader: RefcountReader<'a, S>,
}

impl<S: Storage> Final<'_, S> {
    /// Returns the refcount; nothing where no flag would be right, because there are more
    /// references than a refcount can hold.
    async fn refcount(&mut self, survey: &Survey, cluster: u64) -> Result<Option<u64>> {
        let references = survey.references.count(cluster);
        if cluster >= survey.clusters {
            return self.reader.read(cluster).await.map(Some);
        }
        if references > survey.geometry.refcount_max() {
            return Ok(None);
        }
        if survey.is_complete {
            return Ok(Some(references));
        }
        // Refcounts were only raised, and are not going to be lowered.
        self.reader.read(cluster).await.map(|refcount| Some(refcount.max(references)))
    }
}

impl<S: Storage> Round<'_, S> {
    /// Puts entries right that the refcounts of step 3 allow, and flushes.
    pub(super) async fn repair_entries(&mut self, scope: Scope) -> Result<()> {
        let refcounts = self.survey.refcounts.clone();
        let mut last = Final { reader: RefcountReader::new(self.storage, &refcounts) };
        self.repair_l1(scope, &mut last).await?;
        let tables = std::mem::replace(&mut self.survey.tables, Tables::new(0));
        let result = self.repair_tables(scope, &tables, &mut last).await;
        self.survey.tables = tables;
        result?;
        self.flush().await
    }

    async fn repair_l1(&mut self, scope: Scope, last: &mut Final<'_, S>) -> Result<()> {
        let at = self.survey.header.l1.offset;
        let bytes = self.survey.l1.len() as u64 * 8;
        let is_believable = self.is_believable_l1();
        for first in (0..self.survey.l1.len()).step_by(L1_PART) {
            let rights = self.right_l1_part(scope, last, first).await?;
            if rights.is_empty() {
                continue;
            }
            if !is_believable || !self.may_write(at, bytes, 1) {
                self.doubt(at, is_believable);
                return Ok(());
            }
            self.write_l1_part(first, rights).await?;
        }
        Ok(())
    }

    /// Returns which entries of a part of the L1 table are to be others.
    async fn right_l1_part(
        &self,
        scope: Scope,
        last: &mut Final<'_, S>,
        first: usize,
    ) -> Result<Vec<(usize, L1Entry, FindingKind)>> {
        let mut rights = Vec::new();
        for index in first..(first + L1_PART).min(self.survey.l1.len()) {
            let entry = L1Entry(self.survey.l1[index]);
            let right = self.right_l1(scope, last, index as u64, entry).await?;
            rights.extend(right.map(|(right, kind)| (index, right, kind)));
        }
        Ok(rights)
    }

    async fn write_l1_part(
        &mut self,
        first: usize,
        rights: Vec<(usize, L1Entry, FindingKind)>,
    ) -> Result<()> {
        let encode = |words: &[u64]| -> Vec<u8> {
            words.iter().flat_map(|word| word.to_be_bytes()).collect()
        };
        let part = first..(first + L1_PART).min(self.survey.l1.len());
        let mut words = self.survey.l1[part.clone()].to_vec();
        let old = encode(&words);
        for (index, right, _) in &rights {
            words[index - first] = right.0;
        }
        let at = self.survey.header.l1.offset + first as u64 * 8;
        self.write_changes(at, &old, &encode(&words)).await?;
        self.survey.l1[part].copy_from_slice(&words);
        for (_, _, kind) in rights {
            self.report.record_repaired(kind, 1);
        }
        Ok(())
    }

    async fn right_l1(
        &self,
        scope: Scope,
        last: &mut Final<'_, S>,
        index: u64,
        entry: L1Entry,
    ) -> Result<Option<(L1Entry, FindingKind)>> {
        let Some(table) = entry.table() else {
            let headless = entry != L1Entry::UNALLOCATED;
            let kind = FindingKind::L1Headless { index, entry: entry.0 };
            return Ok(headless.then_some((L1Entry::UNALLOCATED, kind)));
        };
        if scope == Scope::NoFlags {
            return Ok(None);
        }
        let cluster = self.survey.geometry.host_cluster(table).0;
        let Some(refcount) = last.refcount(self.survey, cluster).await? else { return Ok(None) };
        let right = entry.with_copied(refcount == 1);
        let kind = FindingKind::CopiedTable { index, entry: entry.0, refcount };
        Ok((right != entry).then_some((right, kind)))
    }

    async fn repair_tables(
        &mut self,
        scope: Scope,
        tables: &Tables,
        last: &mut Final<'_, S>,
    ) -> Result<()> {
        for (cluster, uses) in tables.iter() {
            // Flags count in active tables only (B.4).
            if uses.active > 0 || scope == Scope::NoFlags {
                self.repair_table(scope, cluster, last).await?;
            }
        }
        Ok(())
    }

    async fn repair_table(
        &mut self,
        scope: Scope,
        cluster: u64,
        last: &mut Final<'_, S>,
    ) -> Result<()> {
        let geometry = self.survey.geometry;
        let at = self.survey.host(cluster);
        let old = read_bytes(self.storage, at, geometry.cluster_bytes() as usize).await?;
        let mut changes = Vec::new();
        for (index, entry) in entries(&old, geometry.entry_width()) {
            let change = match scope {
                Scope::All => self.right_flag(last, at, index, entry).await?,
                Scope::NoFlags => self.right_otherwise(at, index, entry),
            };
            changes.extend(change);
        }
        if changes.is_empty() {
            return Ok(());
        }
        let is_believable = self.is_believable_l2(&old);
        if !is_believable || !self.may_write(at, geometry.cluster_bytes(), 0) {
            self.doubt(at, is_believable);
            return Ok(());
        }
        let mut new = old.to_vec();
        let width = geometry.entry_width().bytes() as usize;
        for change in &changes {
            let place = change.index as usize * width;
            new[place..place + 8].copy_from_slice(&change.entry.word.to_be_bytes());
        }
        self.write_changes(at, &old, &new).await?;
        for change in changes {
            self.report.record_repaired(change.kind, 1);
        }
        Ok(())
    }

    /// Says whether a table may be written: no metadata but itself lies in its place.
    fn may_write(&mut self, at: HostOffset, len: u64, expected: u64) -> bool {
        let geometry = self.survey.geometry;
        let first = geometry.host_cluster(at).0;
        let mut clusters = first..first + geometry.clusters_for(len);
        let free = clusters.all(|cluster| self.survey.metadata.count(cluster) <= expected);
        if !free {
            self.survey.report.record(FindingKind::L2Overlaps { table: at }, 1);
        }
        free
    }

    fn doubt(&mut self, table: HostOffset, is_believable: bool) {
        if !is_believable {
            self.survey.report.record(FindingKind::TableDoubtful { table }, 1);
        }
    }

    fn is_believable_l1(&self) -> bool {
        let Survey { geometry, file_bytes, .. } = &*self.survey;
        let tables = self.survey.l1.iter().filter(|word| **word != 0);
        is_believable(tables.map(|word| {
            let entry = L1Entry(*word);
            let lies_right = |at: HostOffset| geometry.is_aligned(at.0) && at.0 < *file_bytes;
            !entry.has_reserved_bits() && entry.table().is_none_or(lies_right)
        }))
    }

    fn is_believable_l2(&self, table: &[u8]) -> bool {
        let found = entries(table, self.survey.geometry.entry_width());
        is_believable(found.map(|(_, entry)| self.could_be_entry(entry)))
    }

    fn could_be_entry(&self, entry: L2Entry) -> bool {
        let survey = &*self.survey;
        let geometry = &survey.geometry;
        match survey.meaning(entry) {
            Meaning::Compressed => entry
                .with_copied(false)
                .compressed_run(geometry)
                .is_some_and(|run| run.range().start.0 < survey.file_bytes),
            Meaning::Allocated(host) => {
                let is_inside = survey.has_data_file() || host.0 < survey.file_bytes;
                geometry.is_aligned(host.0) && is_inside && !has_strange_bits(entry, geometry)
            }
            Meaning::Nothing => !has_strange_bits(entry, geometry),
        }
    }

    fn right_otherwise(&self, table: HostOffset, index: u64, entry: L2Entry) -> Option<Change> {
        match self.survey.meaning(entry) {
            Meaning::Compressed if entry.is_copied() => {
                let offset = entry.compressed_run(&self.survey.geometry)?.range().start;
                let kind =
                    FindingKind::CompressedCopied { table, index, entry: entry.word, offset };
                Some(Change { index, entry: entry.with_copied(false), kind })
            }
            Meaning::Allocated(offset)
                if !self.survey.geometry.is_aligned(offset.0) && !self.survey.holds_data(entry) =>
            {
                let kind = FindingKind::PreallocatedUnaligned { table, index, offset };
                // The state stays: the zero flag, or the bits of the subclusters.
                let plain = match self.survey.geometry.has_subclusters() {
                    true => L2Entry::UNALLOCATED,
                    false => L2Entry::ZERO_PLAIN,
                };
                Some(Change { index, entry: plain.with_subclusters(entry.subclusters), kind })
            }
            _ => None,
        }
    }

    async fn right_flag(
        &self,
        last: &mut Final<'_, S>,
        table: HostOffset,
        index: u64,
        entry: L2Entry,
    ) -> Result<Option<Change>> {
        let Meaning::Allocated(host) = self.survey.meaning(entry) else { return Ok(None) };
        let refcount = match self.survey.has_data_file() {
            true => 1,
            false => {
                let cluster = self.survey.geometry.host_cluster(host).0;
                match last.refcount(self.survey, cluster).await? {
                    Some(refcount) => refcount,
                    None => return Ok(None),
                }
            }
        };
        let right = entry.with_copied(refcount == 1);
        let kind = FindingKind::CopiedData { table, index, entry: entry.word, refcount };
        Ok((right != entry).then_some(Change { index, entry: right, kind }))
    }
}

fn has_strange_bits(entry: L2Entry, geometry: &Geometry) -> bool {
    entry.without_zero_flag().has_reserved_bits(geometry)
}

/// Says whether something is a table, by which of its entries could be right: half of them, or all
/// but one.
fn is_believable(entries: impl Iterator<Item = bool>) -> bool {
    let (mut right, mut wrong) = (0_u64, 0_u64);
    for could_be_right in entries {
        match could_be_right {
            true => right += 1,
            false => wrong += 1,
        }
    }
    wrong <= right.max(1)
}
