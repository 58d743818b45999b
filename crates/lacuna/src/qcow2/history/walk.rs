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
use crate::units::HostOffset;
use crate::{Error, Result};

/// Neighbouring tables are read together, up to so many bytes.
const READ_BYTES: u64 = 1 << 20;
/// So many reads are under way at once.
const READS_AT_ONCE: usize = 4;

/// What a walk does with a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Visit {
    /// A reference goes that a map has on the table and on what it shows.
    Drop,
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
                self.count_entries(&bytes, Direction::Down).await?;
                self.counted(|counts| counts.step(cluster, Direction::Down)).await
            }
            Visit::Share => {
                self.count_entries(&bytes, Direction::Up).await?;
                match clear_flags(&mut bytes, &self.geometry) {
                    true => self.replace(named, bytes, 2).await,
                    false => self.share(named).await,
                }
            }
            Visit::Show => {
                self.count_entries(&bytes, Direction::Up).await?;
                match clear_flags(&mut bytes, &self.geometry) {
                    true => self.write_table(named, bytes, 1).await,
                    false => self.share(named).await,
                }
            }
            Visit::Own => match self.right_flags(&mut bytes).await? {
                true => self.replace(named, bytes, 1).await,
                false => {
                    self.new_l1[named.index] = L1Entry::new(named.table);
                    Ok(())
                }
            },
        }
    }

    /// The table has one more reference, and stays where it is.
    async fn share(&mut self, named: Named) -> Result<()> {
        let cluster = self.geometry.host_cluster(named.table);
        self.counted(|counts| counts.step(cluster, Direction::Up)).await?;
        self.new_l1[named.index] = L1Entry::new(named.table).with_copied(false);
        Ok(())
    }

    /// The table loses a reference to one with `bytes`.
    async fn replace(&mut self, named: Named, bytes: Buffer, references: u64) -> Result<()> {
        let cluster = self.geometry.host_cluster(named.table);
        self.counted(|counts| counts.step(cluster, Direction::Down)).await?;
        self.write_table(named, bytes, references).await
    }

    async fn write_table(&mut self, named: Named, bytes: Buffer, references: u64) -> Result<()> {
        let at = self.take(1).await?;
        let cluster = self.geometry.host_cluster(at);
        self.counted(|counts| counts.set(cluster, references)).await?;
        self.new_l1[named.index] = L1Entry::new(at).with_copied(references == 1);
        self.write(at, bytes).await
    }

    async fn count_entries(&mut self, bytes: &[u8], direction: Direction) -> Result<()> {
        let (geometry, mut at) = (self.geometry, 0);
        self.counted(|counts| count_from(counts, &geometry, bytes, &mut at, direction)).await
    }

    /// Sets COPIED where a cluster has one reference, and clears it elsewhere. Says whether that
    /// changed anything.
    async fn right_flags(&mut self, bytes: &mut [u8]) -> Result<bool> {
        let (geometry, mut at, mut changed) = (self.geometry, 0, false);
        self.counted(|counts| right_from(counts, &geometry, bytes, &mut at, &mut changed)).await?;
        Ok(changed)
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

/// Returns what the entry at the start of `bytes` is, as far as its first word goes.
fn word_at(bytes: &[u8]) -> u64 {
    bytes.first_chunk::<8>().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

/// Counts what entries reference, from byte `at` on.
fn count_from(
    counts: &mut Counts,
    geometry: &Geometry,
    bytes: &[u8],
    at: &mut usize,
    direction: Direction,
) -> Counted<()> {
    let width = geometry.entry_width().bytes() as usize;
    for entry in bytes[*at..].chunks_exact(width) {
        let word = word_at(entry);
        if word != 0 {
            count_entry(counts, geometry, word, direction)?;
        }
        *at += width;
    }
    Ok(())
}

fn count_entry(
    counts: &mut Counts,
    geometry: &Geometry,
    word: u64,
    direction: Direction,
) -> Counted<()> {
    let entry = L2Entry { word, ..L2Entry::UNALLOCATED };
    if let Some(run) = entry.compressed_run(geometry) {
        return counts.step_range(run.range(), direction);
    }
    let Some(host) = entry.host() else { return Ok(()) };
    if !geometry.is_aligned(host.0) {
        return Err(Error::corrupt(format!(
            "An L2 entry ({word:#x}) names {host}, which is not a multiple of the cluster size"
        ))
        .into());
    }
    counts.step(geometry.host_cluster(host), direction)
}

/// Takes COPIED off all entries. Says whether one had it.
fn clear_flags(bytes: &mut [u8], geometry: &Geometry) -> bool {
    let mut changed = false;
    for place in bytes.chunks_exact_mut(geometry.entry_width().bytes() as usize) {
        let entry = L2Entry { word: word_at(place), ..L2Entry::UNALLOCATED };
        if entry.is_copied() && entry.host().is_some() {
            place[..8].copy_from_slice(&entry.with_copied(false).word.to_be_bytes());
            changed = true;
        }
    }
    changed
}

fn right_from(
    counts: &Counts,
    geometry: &Geometry,
    bytes: &mut [u8],
    at: &mut usize,
    changed: &mut bool,
) -> Counted<()> {
    let width = geometry.entry_width().bytes() as usize;
    for place in bytes[*at..].chunks_exact_mut(width) {
        let entry = L2Entry { word: word_at(place), ..L2Entry::UNALLOCATED };
        if let Some(host) = entry.host() {
            let right = entry.with_copied(counts.now(geometry.host_cluster(host))? == 1);
            if right != entry {
                place[..8].copy_from_slice(&right.word.to_be_bytes());
                *changed = true;
            }
        }
        *at += width;
    }
    Ok(())
}
