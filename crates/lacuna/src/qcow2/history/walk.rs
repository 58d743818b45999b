//! Walks over L2 tables: what they reference is counted, and COPIED flags are put right on the way.
//!
//! * Always: a table whose flags change is written to a free cluster; nothing in use is touched.
//! * Bounded: a map names no more tables than the file has clusters.

use std::pin::pin;

use futures_util::{StreamExt, stream};

use super::change::Change;
use super::counts::{Counted, Counts, Direction};
use crate::buffer::Buffer;
use crate::qcow2::format::{Geometry, L1Entry, L2Entry};
use crate::qcow2::image::Image;
use crate::storage::Storage;
use crate::units::{HostCluster, HostOffset};
use crate::{Error, Result};

/// Neighbouring tables are read together, up to so many bytes.
const READ_BYTES: u64 = 1 << 20;
/// Zeros of a table are passed by in groups: most of the map of a large disk is zeros.
const GROUP_BYTES: usize = 64;
/// So many reads are under way at once.
const READS_AT_ONCE: usize = 2;

/// What a walk does with a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Visit {
    /// A reference goes that a map has on the table and on what it shows.
    Drop,
    /// The snapshot goes that had it with the disk: a reference goes on all that it shows, and it is the
    /// disk's own.
    Inherit,
    /// The disk has the table for itself; clusters may have become its own.
    Own,
    /// The disk shows what the table of a snapshot shows.
    Show,
    /// A snapshot and the disk have the table from here on.
    Share,
}

/// A table of a map, by its place in the L1 table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Named {
    pub(super) index: usize,
    pub(super) table: HostOffset,
}

impl<S: Storage> Change<'_, S> {
    /// Returns the tables that a map names, checked.
    pub(super) fn named(&self, l1: &[L1Entry], what: &str) -> Result<Vec<Named>> {
        let tables = l1.iter().enumerate();
        let tables: Vec<Named> = tables
            .filter_map(|(index, entry)| entry.table().map(|table| Named { index, table }))
            .collect();
        if tables.len() as u64 > self.geometry.clusters_for(self.file_bytes) {
            return Err(Error::corrupt(format!(
                "{what} names {} L2 tables, more than the file has clusters",
                tables.len()
            )));
        }
        for named in &tables {
            let Named { index, table } = *named;
            if !self.geometry.is_aligned(table.0) || table.0 >= self.file_bytes {
                return Err(Error::corrupt(format!(
                    "{what} (index {index}) names an L2 table at {table}, where none can be"
                ))
                .at(table));
            }
        }
        Ok(tables)
    }

    pub(super) async fn walk(&mut self, tables: &[Named], visit: Visit) -> Result<()> {
        let (image, cluster_bytes) = (self.image, self.geometry.cluster_bytes());
        let runs: Vec<&[Named]> = runs(tables, cluster_bytes);
        let reads = runs.into_iter().map(|run| read_run(image, run, cluster_bytes));
        let mut reads = pin!(stream::iter(reads).buffered(READS_AT_ONCE));
        while let Some(read) = reads.next().await {
            let (run, mut rest) = read?;
            for named in run {
                let behind = rest.split_off(cluster_bytes as usize);
                let table = std::mem::replace(&mut rest, behind);
                self.visit(*named, table, visit).await?;
            }
        }
        Ok(())
    }

    async fn visit(&mut self, named: Named, mut bytes: Buffer, visit: Visit) -> Result<()> {
        let cluster = self.geometry.host_cluster(named.table);
        match visit {
            Visit::Drop => {
                self.count_entries(&mut bytes, Direction::Down, Flags::Keep).await?;
                self.step(cluster, Direction::Down).await
            }
            Visit::Inherit => {
                self.step(cluster, Direction::Down).await?;
                match self.count_entries(&mut bytes, Direction::Down, Flags::Right).await? {
                    true => self.replace(named, bytes, 1).await,
                    false => self.own(named),
                }
            }
            Visit::Share => {
                match self.count_entries(&mut bytes, Direction::Up, Flags::Clear).await? {
                    true => self.replace(named, bytes, 2).await,
                    false => self.share(named).await,
                }
            }
            Visit::Show => {
                match self.count_entries(&mut bytes, Direction::Up, Flags::Clear).await? {
                    true => self.write_table(named, bytes, 1).await,
                    false => self.share(named).await,
                }
            }
            Visit::Own => match self.right_flags(&mut bytes).await? {
                true => self.replace(named, bytes, 1).await,
                false => self.own(named),
            },
        }
    }

    /// The disk has the table for itself, where it is.
    fn own(&mut self, named: Named) -> Result<()> {
        self.new_l1[named.index] = L1Entry::new(named.table);
        Ok(())
    }

    async fn step(&mut self, cluster: HostCluster, direction: Direction) -> Result<()> {
        self.counted(|counts| counts.step(cluster, direction)).await.map(drop)
    }

    /// The table has one more reference, and stays where it is.
    async fn share(&mut self, named: Named) -> Result<()> {
        let cluster = self.geometry.host_cluster(named.table);
        self.step(cluster, Direction::Up).await?;
        self.new_l1[named.index] = L1Entry::new(named.table).with_copied(false);
        Ok(())
    }

    /// The table loses a reference to one with `bytes`.
    async fn replace(&mut self, named: Named, bytes: Buffer, references: u64) -> Result<()> {
        let cluster = self.geometry.host_cluster(named.table);
        self.step(cluster, Direction::Down).await?;
        self.write_table(named, bytes, references).await
    }

    async fn write_table(&mut self, named: Named, bytes: Buffer, references: u64) -> Result<()> {
        let at = self.take(1).await?;
        let cluster = self.geometry.host_cluster(at);
        self.counted(|counts| counts.set(cluster, references)).await?;
        self.new_l1[named.index] = L1Entry::new(at).with_copied(references == 1);
        self.write(at, bytes).await
    }

    /// Counts what a table references. Says whether a flag changed.
    async fn count_entries(
        &mut self,
        bytes: &mut [u8],
        direction: Direction,
        flags: Flags,
    ) -> Result<bool> {
        let mut pass = Pass::over(bytes, &self.geometry);
        self.counted(|counts| pass.count(counts, direction, flags)).await?;
        Ok(pass.changed)
    }

    /// Sets COPIED where a cluster has one reference, and clears it elsewhere. Says whether that
    /// changed anything.
    async fn right_flags(&mut self, bytes: &mut [u8]) -> Result<bool> {
        let mut pass = Pass::over(bytes, &self.geometry);
        self.counted(|counts| pass.right_flags(counts)).await?;
        Ok(pass.changed)
    }
}

/// Groups neighbours.
fn runs(tables: &[Named], cluster_bytes: u64) -> Vec<&[Named]> {
    let most = (READ_BYTES / cluster_bytes).max(1) as usize;
    let follows = |a: &Named, b: &Named| a.table + cluster_bytes == b.table;
    tables.chunk_by(follows).flat_map(|run| run.chunks(most)).collect()
}

async fn read_run<'a, S: Storage>(
    image: &Image<S>,
    run: &'a [Named],
    cluster_bytes: u64,
) -> Result<(&'a [Named], Buffer)> {
    let bytes = image.load(run[0].table, run.len() as u64 * cluster_bytes, "L2 tables").await?;
    Ok((run, bytes))
}

/// What counting does with COPIED flags on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flags {
    Clear,
    Keep,
    /// By what was counted.
    Right,
}

/// A walk over the entries of one table: it stops where a refcount is lacking, and goes on there.
struct Pass<'a> {
    geometry: Geometry,
    bytes: &'a mut [u8],
    /// Where the next entry starts.
    at: usize,
    /// A flag is not what it was.
    changed: bool,
}

impl<'a> Pass<'a> {
    const fn over(bytes: &'a mut [u8], geometry: &Geometry) -> Self {
        Self { geometry: *geometry, bytes, at: 0, changed: false }
    }

    /// Moves on to the next entry that references something, and returns its first word.
    fn next_used(&mut self) -> Option<L2Entry> {
        let width = self.geometry.entry_width().bytes() as usize;
        while self.at < self.bytes.len() {
            let rest = &self.bytes[self.at..];
            let group = rest.first_chunk().filter(|_| self.at.is_multiple_of(GROUP_BYTES));
            if group.is_some_and(is_zero) {
                self.at += GROUP_BYTES;
                continue;
            }
            match word_at(rest) {
                0 => self.at += width,
                word => return Some(L2Entry { word, ..L2Entry::UNALLOCATED }),
            }
        }
        None
    }

    fn put(&mut self, entry: L2Entry, before: L2Entry) {
        if entry != before {
            self.bytes[self.at..][..8].copy_from_slice(&entry.word.to_be_bytes());
            self.changed = true;
        }
        self.at += self.geometry.entry_width().bytes() as usize;
    }

    fn count(&mut self, counts: &mut Counts, direction: Direction, flags: Flags) -> Counted<()> {
        while let Some(entry) = self.next_used() {
            let count = count_entry(counts, &self.geometry, entry, direction)?;
            let flagged = match (flags, count) {
                (Flags::Clear, Some(_)) => entry.with_copied(false),
                (Flags::Right, Some(count)) => entry.with_copied(count == 1),
                (Flags::Clear | Flags::Keep | Flags::Right, _) => entry,
            };
            self.put(flagged, entry);
        }
        Ok(())
    }

    fn right_flags(&mut self, counts: &Counts) -> Counted<()> {
        while let Some(entry) = self.next_used() {
            let right = match entry.host() {
                Some(host) => {
                    let count = counts.of_shown(self.geometry.host_cluster(host))?;
                    entry.with_copied(count == 1)
                }
                None => entry,
            };
            self.put(right, entry);
        }
        Ok(())
    }
}

fn is_zero(group: &[u8; GROUP_BYTES]) -> bool {
    let words = group.as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word));
    words.fold(0, |all, word| all | word) == 0
}

/// Returns the word that `bytes` start with.
fn word_at(bytes: &[u8]) -> u64 {
    bytes.first_chunk::<8>().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

/// Counts what an entry references; returns how often its cluster is, if COPIED says something about
/// that.
fn count_entry(
    counts: &mut Counts,
    geometry: &Geometry,
    entry: L2Entry,
    direction: Direction,
) -> Counted<Option<u64>> {
    if let Some(run) = entry.compressed_run(geometry) {
        return counts.step_range(run.range(), direction).map(|()| None);
    }
    let Some(host) = entry.host() else { return Ok(None) };
    if !geometry.is_aligned(host.0) {
        return Err(Error::corrupt(format!(
            "An L2 entry ({:#x}) names {host}, which is not a multiple of the cluster size",
            entry.word
        ))
        .into());
    }
    counts.step(geometry.host_cluster(host), direction).map(Some)
}
