//! What the tables of an image add up to, without opening it.
//!
//! * Reads the image file only: header, active L1 and L2 tables, refcount blocks where a cluster may be
//!   shared. No data file, no backing file, no key.
//! * Never more than the caller's bound: where the tables are larger together, nothing is counted.
//! * Memory: one L2 table, 16 MiB of refcount blocks, one bit for each shared cluster and its
//!   neighbours.

use std::collections::BTreeMap;

use super::check::read::{read_bytes, read_words};
use super::check::refcounts::{RefcountReader, RefcountTable};
use super::format::{Geometry, Header, IncompatibleFeatures, L1Entry};
use super::mapping::{DataPlace, Decoder, Mapping, OnWrite, Run};
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange, HostOffset};
use crate::{Error, Result};

/// What the guest bytes of an image are, as its own tables say.
///
/// All but the last two add up to the size of the disk. Nothing is asked of the host or of the backing
/// file: clusters that were never written count as data, and what is unallocated may hold anything below.
///
/// ```
/// # use lacuna::qcow2::{self, CreateOptions};
/// # use lacuna::storage::MemoryStorage;
/// let storage = MemoryStorage::new();
/// let options = CreateOptions { size_bytes: 1 << 30, ..CreateOptions::default() };
/// pollster::block_on(qcow2::create(&storage, &options))?;
/// let header = pollster::block_on(qcow2::read_header(&storage))?;
/// let totals = pollster::block_on(qcow2::totals(&storage, &header, u64::MAX))?;
/// assert_eq!(totals.unwrap().unallocated_bytes, 1 << 30);
/// # Ok::<_, lacuna::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Totals {
    /// In clusters of their own that may hold anything.
    pub data_bytes: u64,
    /// Stored compressed; counted before compression.
    pub compressed_bytes: u64,
    /// Said to read as zeros.
    pub zero_bytes: u64,
    /// Not mentioned: the backing file decides, or they are zeros.
    pub unallocated_bytes: u64,
    /// Of the zeros and what is unallocated, how much has host space all the same.
    pub reserved_bytes: u64,
    /// Host clusters with a refcount above one that the active tables use, each once. Compressed
    /// clusters, which share host clusters among themselves, are left out.
    pub shared_bytes: u64,
}

/// Adds up the active tables of an image; nothing where they, and the refcounts that may be asked for,
/// take more than `most_table_bytes`.
///
/// A cluster whose entry has the copied flag is taken for unshared, as its refcount is exactly one
/// (B.4); `check` finds out where that is a lie.
///
/// # Errors
/// `Corrupt` where a table or an entry cannot be what it says; `Io`.
///
/// See [`Totals`] for an example.
pub async fn totals<S: Storage>(
    storage: &S,
    header: &Header,
    most_table_bytes: u64,
) -> Result<Option<Totals>> {
    let l1_bytes = u64::from(header.l1.entries) * 8;
    if l1_bytes > most_table_bytes {
        return Ok(None);
    }
    let l1 = read_words(storage, header.l1.offset, u64::from(header.l1.entries)).await?;
    let file_bytes = storage.len().await?;
    if l1_bytes.saturating_add(table_bytes(header, &l1, file_bytes)) > most_table_bytes {
        return Ok(None);
    }
    let refcounts = refcount_table(storage, header, file_bytes).await?;
    let mut count = Count::new(storage, header, &refcounts, file_bytes);
    for (table, range) in tables(header, &l1) {
        match L1Entry(table).table() {
            Some(at) => count.add_table(at, range).await?,
            None => count.totals.unallocated_bytes += range.len,
        }
    }
    count.totals.shared_bytes = count.shared.count() * header.geometry.cluster_bytes();
    Ok(Some(count.totals))
}

/// Returns the bytes of the L2 tables, and of the refcounts of a file of this length.
pub(super) fn table_bytes(header: &Header, l1: &[u64], file_bytes: u64) -> u64 {
    let geometry = &header.geometry;
    let l2_tables = l1.iter().filter(|entry| L1Entry(**entry).table().is_some()).count() as u64;
    let blocks = geometry.clusters_for(file_bytes).div_ceil(geometry.refcount_block_entries());
    (l2_tables + blocks).saturating_mul(geometry.cluster_bytes())
}

pub(super) async fn refcount_table<S: Storage>(
    storage: &S,
    header: &Header,
    file_bytes: u64,
) -> Result<RefcountTable> {
    let at = header.refcount_table;
    let geometry = header.geometry;
    // Only those of clusters in the file are looked up.
    let blocks = geometry.clusters_for(file_bytes).div_ceil(geometry.refcount_block_entries());
    let entries = (u64::from(at.clusters) << geometry.cluster_bits()) / 8;
    let entries = read_words(storage, at.offset, entries.min(blocks)).await?;
    Ok(RefcountTable::new(geometry, entries, file_bytes))
}

/// Every entry of the L1 table with the part of the disk that it is about; zeros past its end.
fn tables<'a>(header: &'a Header, l1: &'a [u64]) -> impl Iterator<Item = (u64, GuestRange)> + 'a {
    let coverage = header.geometry.l2_coverage_bytes();
    let range = move |index: usize| {
        let start = index as u64 * coverage;
        let len = header.size_bytes.saturating_sub(start).min(coverage);
        GuestRange::new(GuestOffset(start), len)
    };
    let told = l1.iter().enumerate().map(move |(index, entry)| (*entry, range(index)));
    let start = (l1.len() as u64).saturating_mul(coverage).min(header.size_bytes);
    let untold = GuestRange::new(GuestOffset(start), header.size_bytes - start);
    told.chain([(0, untold)]).filter(|(_, range)| !range.is_empty())
}

/// The sums so far.
struct Count<'a, S> {
    storage: &'a S,
    decoder: Decoder,
    refcounts: RefcountReader<'a, S>,
    file_clusters: u64,
    shared: Clusters,
    totals: Totals,
}

impl<'a, S: Storage> Count<'a, S> {
    fn new(storage: &'a S, header: &Header, refcounts: &'a RefcountTable, file_bytes: u64) -> Self {
        let incompatible = header.features.incompatible;
        let place = match incompatible.contains(IncompatibleFeatures::EXTERNAL_DATA_FILE) {
            true => DataPlace::External,
            false => DataPlace::ImageFile,
        };
        Self {
            storage,
            decoder: Decoder { geometry: header.geometry, place, zero_cluster: None },
            refcounts: RefcountReader::new(storage, refcounts),
            file_clusters: header.geometry.clusters_for(file_bytes),
            shared: Clusters::default(),
            totals: Totals::default(),
        }
    }

    /// Adds what a table says of `range`, which starts where the table does.
    async fn add_table(&mut self, at: HostOffset, range: GuestRange) -> Result<()> {
        let geometry = self.decoder.geometry;
        if !geometry.is_aligned(at.0) {
            return Err(Error::corrupt(format!("L2 table cannot lie at {at}")));
        }
        let width = geometry.entry_width().bytes();
        let len = geometry.clusters_for(range.len) * width;
        let entries = read_bytes(self.storage, at, len as usize).await?;
        let mut done = 0;
        while done < range.len {
            let rest = GuestRange::new(range.start + done, range.len - done);
            let skipped = (done >> geometry.cluster_bits()) * width;
            let run = self.decoder.run(&entries[skipped as usize..], rest)?;
            self.add(run).await?;
            done += run.len;
        }
        Ok(())
    }

    async fn add(&mut self, run: Run) -> Result<()> {
        let totals = &mut self.totals;
        match run.mapping {
            Mapping::Compressed(_) => totals.compressed_bytes += run.len,
            Mapping::Data { .. } => totals.data_bytes += run.len,
            Mapping::Unallocated { .. } => totals.unallocated_bytes += run.len,
            Mapping::Zero { .. } => totals.zero_bytes += run.len,
        }
        match run.mapping {
            Mapping::Compressed(_) | Mapping::Data { on_write: OnWrite::InPlace, .. } => Ok(()),
            Mapping::Data { host, .. } => self.add_shared(host, run.len).await,
            Mapping::Unallocated { reserved: Some(host) }
            | Mapping::Zero { reserved: Some(host) } => {
                totals.reserved_bytes += run.len;
                self.add_shared(host, run.len).await
            }
            Mapping::Unallocated { reserved: None } | Mapping::Zero { reserved: None } => Ok(()),
        }
    }

    /// Notes the clusters of a host range that something else references too.
    async fn add_shared(&mut self, host: HostOffset, len: u64) -> Result<()> {
        if self.decoder.place == DataPlace::External {
            return Ok(());
        }
        let geometry: Geometry = self.decoder.geometry;
        let first = geometry.host_cluster(host).0;
        let end = geometry.clusters_for(host.0.saturating_add(len)).min(self.file_clusters);
        for cluster in first..end {
            if self.refcounts.read(cluster).await? > 1 {
                self.shared.add(cluster);
            }
        }
        Ok(())
    }
}

/// A set of clusters: a bit each, in pages that exist only where there are some.
#[derive(Default)]
struct Clusters(BTreeMap<u64, [u64; 8]>);

impl Clusters {
    fn add(&mut self, cluster: u64) {
        let (page, bit) = (cluster / 512, cluster % 512);
        self.0.entry(page).or_default()[(bit / 64) as usize] |= 1 << (bit % 64);
    }

    fn count(&self) -> u64 {
        self.0.values().flatten().map(|bits| u64::from(bits.count_ones())).sum()
    }
}
