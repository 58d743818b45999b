//! What sharing equal clusters would save, at several cluster sizes, with nothing written.
//!
//! * Counts by fingerprints of 64 bits that no guest can foresee: among 2^28 clusters one pair is
//!   taken for equal wrongly in one of five hundred counts. Sharing itself compares bytes.
//! * Never more memory than asked for, and what [`walk`](super::walk) takes: where fingerprints would
//!   take more, the cluster size with the most of them is sampled, and its figures are estimates.

use std::pin::pin;

use futures_util::TryStreamExt;

use super::fingerprint::{Fingerprint, Fingerprinter};
use super::sample::{MOST_SOURCES, Met, Sample, Tally};
use super::walk::{Window, windows};
use crate::block::{Extent, Layer, is_zero};
use crate::units::GuestRange;
use crate::{Error, Result};

/// Less memory than this makes no sense.
const LEAST_MEMORY_BYTES: u64 = 1 << 20;
/// Cluster sizes of the format (B.1).
const CLUSTER_SIZES: std::ops::RangeInclusive<u64> = 512..=2 << 20;
/// What is hashed before the next size is: it stays in the nearest cache.
const BLOCK_BYTES: u64 = 64 << 10;

/// How to count duplicates.
///
/// ```
/// let options = lacuna::job::DuplicateOptions::default();
/// assert_eq!(options.cluster_sizes, [4096, 8192, 16384, 32768, 65536]);
/// ```
#[derive(Clone, Debug)]
pub struct DuplicateOptions {
    /// Cluster sizes to count at, in bytes: powers of two from 512 to 2 MiB.
    pub cluster_sizes: Vec<u64>,
    /// Bytes that the fingerprints of all sizes may take together, at least 1 MiB. Where they would
    /// take more, sizes are sampled ([`SizeDuplicates::one_in`]).
    pub memory_bytes: u64,
}

impl Default for DuplicateOptions {
    fn default() -> Self {
        let cluster_sizes = (12..=16).map(|bits| 1 << bits).collect();
        Self { cluster_sizes, memory_bytes: 256 << 20 }
    }
}

/// A disk to look at.
///
/// See [`estimate_duplicates`] for an example.
#[derive(Debug)]
pub struct DuplicateSource<'a, L> {
    /// The disk. Only what its top layer holds counts, nothing of backing layers.
    pub layer: &'a L,
    /// The size of its clusters, where it has any: clusters that share one place in the host already
    /// are found then.
    pub cluster_bytes: Option<u64>,
}

/// What is stored in a disk as it is.
///
/// ```
/// assert_eq!(lacuna::job::SourceFacts::default().data_bytes, 0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourceFacts {
    /// Guest bytes that its map calls data.
    pub data_bytes: u64,
    /// Of these, how many are stored compressed; they count by what they are compressed from.
    pub compressed_bytes: u64,
    /// Of these, how many share a place with others already and take nothing.
    pub shared_bytes: u64,
}

/// Clusters of one size.
///
/// ```
/// use lacuna::job::ClusterCounts;
/// let counts = ClusterCounts { data: 5, distinct: 3, ..ClusterCounts::default() };
/// assert_eq!(counts.duplicates(), 2);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClusterCounts {
    /// Clusters that hold data other than zeros.
    pub data: u64,
    /// Clusters that are data by the map, and hold nothing but zeros. They share nothing: zeros need
    /// no cluster.
    pub zero: u64,
    /// Different contents among `data`; estimated where the size is sampled.
    pub distinct: u64,
    /// L2 tables that an image of this cluster size needs for `data`, with standard entries.
    pub l2_tables: u64,
}

impl ClusterCounts {
    /// Returns how many clusters could share another's place.
    #[must_use]
    pub const fn duplicates(&self) -> u64 {
        self.data.saturating_sub(self.distinct)
    }
}

/// What was counted at one cluster size.
///
/// See [`estimate_duplicates`] for an example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SizeDuplicates {
    /// The size.
    pub cluster_bytes: u64,
    /// Each source by itself, in the order that they were given in.
    pub sources: Vec<ClusterCounts>,
    /// All sources as if they were one.
    pub total: ClusterCounts,
    /// One fingerprint in so many was kept; with 1 the figures are exact, else `distinct` is an
    /// estimate whose relative error is about one divided by the square root of `kept`.
    pub one_in: u64,
    /// Fingerprints that were kept.
    pub kept: u64,
}

impl SizeDuplicates {
    /// Returns the bytes that sharing within each source saves.
    #[must_use]
    pub fn inside_bytes(&self) -> u64 {
        self.sources.iter().map(ClusterCounts::duplicates).sum::<u64>() * self.cluster_bytes
    }

    /// Returns the bytes that sharing across sources saves, on top of what sharing within each does.
    #[must_use]
    pub fn across_bytes(&self) -> u64 {
        let distinct: u64 = self.sources.iter().map(|source| source.distinct).sum();
        distinct.saturating_sub(self.total.distinct) * self.cluster_bytes
    }

    /// Returns about what a file takes that holds `counts` in clusters of this size, with what of
    /// `stored` has a cluster of its own: L2 tables and refcounts of 16 bits included.
    #[must_use]
    pub const fn file_bytes(&self, counts: &ClusterCounts, stored: u64) -> u64 {
        let used = stored.saturating_add(counts.l2_tables);
        // The header, the L1 table, the refcount table.
        let clusters = used + used.div_ceil(self.cluster_bytes / 2) + 3;
        clusters.saturating_mul(self.cluster_bytes)
    }
}

/// What was counted.
///
/// See [`estimate_duplicates`] for an example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Duplicates {
    /// The sources as they are, in the order that they were given in.
    pub sources: Vec<SourceFacts>,
    /// What was counted at each of the sizes asked for, in their order.
    pub sizes: Vec<SizeDuplicates>,
}

/// Counts clusters with equal content in some disks, within each and across all, at several cluster
/// sizes. Writes nothing.
///
/// Reads what the top layer of each disk holds as data, once, whatever the number of sizes.
/// `progress` is told how many bytes lie behind, of how many.
///
/// # Errors
/// `InvalidRequest` for a size that is none of the format, for too little memory, for no size and for
/// more than 1,023 disks; else what reading gives.
///
/// ```
/// use lacuna::block::{Layer, WriteFlags};
/// use lacuna::buffer::Buffer;
/// use lacuna::job::{DuplicateOptions, DuplicateSource, estimate_duplicates};
/// use lacuna::{raw::Raw, storage::MemoryStorage, units::GuestOffset};
///
/// pollster::block_on(async {
///     let disk = Raw::create(MemoryStorage::new(), 1 << 20).await?;
///     let content = Buffer::from(&[7; 128 << 10][..]);
///     disk.write(GuestOffset(0), content, WriteFlags::empty()).await.0?;
///     let sources = [DuplicateSource { layer: &disk, cluster_bytes: None }];
///     let options = DuplicateOptions::default();
///     let found = estimate_duplicates(&sources, &options, &mut |_, _| ()).await?;
///     assert_eq!(found.sizes[0].inside_bytes(), 31 * 4096);
///     assert_eq!(found.sizes[4].inside_bytes(), 64 << 10);
///     Ok::<_, lacuna::Error>(())
/// }).unwrap();
/// ```
pub async fn estimate_duplicates<L: Layer>(
    sources: &[DuplicateSource<'_, L>],
    options: &DuplicateOptions,
    progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<Duplicates> {
    check(sources, options)?;
    let mut count = Count::new(options);
    let total_bytes = sources.iter().map(|source| source.layer.size_bytes()).sum();
    let unit_bytes = options.cluster_sizes.iter().copied().max().unwrap_or_default();
    let mut behind = 0;
    progress(behind, total_bytes);
    for source in sources {
        count.begin(source.cluster_bytes);
        let mut windows = pin!(windows(source.layer, source.layer.whole(), unit_bytes));
        while let Some(window) = windows.try_next().await? {
            count.window(&window);
            progress(behind + window.range.end().0, total_bytes);
        }
        count.end();
        behind += source.layer.size_bytes();
    }
    Ok(count.finish())
}

fn check<L>(sources: &[DuplicateSource<'_, L>], options: &DuplicateOptions) -> Result<()> {
    let is_size = |bytes: &u64| bytes.is_power_of_two() && CLUSTER_SIZES.contains(bytes);
    let of_sources = sources.iter().filter_map(|source| source.cluster_bytes);
    if let Some(wrong) =
        options.cluster_sizes.iter().copied().chain(of_sources).find(|bytes| !is_size(bytes))
    {
        return Err(Error::invalid(format!(
            "A cluster has a power of two from 512 bytes to 2 MiB, not {wrong} bytes"
        )));
    }
    if options.cluster_sizes.is_empty() || sources.len() > MOST_SOURCES {
        return Err(Error::invalid(format!(
            "Duplicates are counted at one cluster size or more, in at most {MOST_SOURCES} disks"
        )));
    }
    if options.memory_bytes < LEAST_MEMORY_BYTES {
        return Err(Error::invalid("Counting duplicates takes at least 1 MiB of memory"));
    }
    Ok(())
}

struct Count {
    fingerprinter: Fingerprinter,
    memory_bytes: u64,
    sizes: Vec<SizeCount>,
    facts: Vec<SourceFacts>,
    /// Places in the host of the current source, where clusters may share some.
    places: Option<Places>,
}

/// What is counted at one size.
struct SizeCount {
    cluster_bytes: u64,
    sample: Sample,
    total: SourceCount,
    sources: Vec<SourceCount>,
}

#[derive(Default)]
struct SourceCount {
    data: u64,
    zero: u64,
    distinct: Tally,
    l2_tables: u64,
    /// Guest bytes that were looked at.
    next: u64,
    /// Tables before this one are counted.
    next_table: u64,
}

struct Places {
    cluster_bytes: u64,
    sample: Sample,
    clusters: u64,
    distinct: Tally,
}

impl Count {
    fn new(options: &DuplicateOptions) -> Self {
        let sizes = options.cluster_sizes.iter().map(|&bytes| SizeCount::new(bytes)).collect();
        Self {
            fingerprinter: Fingerprinter::new(None),
            memory_bytes: options.memory_bytes,
            sizes,
            facts: Vec::new(),
            places: None,
        }
    }

    fn begin(&mut self, cluster_bytes: Option<u64>) {
        self.facts.push(SourceFacts::default());
        self.places = cluster_bytes.map(Places::new);
        self.sizes.iter_mut().for_each(|size| size.sources.push(SourceCount::default()));
    }

    fn window(&mut self, window: &Window) {
        for part in &window.parts {
            self.note_facts(part);
            let largest = self.sizes.iter().map(|size| size.cluster_bytes).max();
            for block in blocks(part.range, largest.unwrap_or_default().max(BLOCK_BYTES)) {
                for size in &mut self.sizes {
                    size.block(window, block, self.fingerprinter);
                }
                self.keep_to_memory();
            }
        }
    }

    fn note_facts(&mut self, part: &Extent) {
        let Some(facts) = self.facts.last_mut() else { return };
        facts.data_bytes += part.range.len;
        if part.status.is_compressed {
            facts.compressed_bytes += part.range.len;
        } else if let Some(places) = &mut self.places {
            places.note(part, self.fingerprinter);
        }
    }

    /// Thins what takes the most, as long as all take too much.
    fn keep_to_memory(&mut self) {
        loop {
            let places = self.places.iter_mut().map(|places| &mut places.sample);
            let samples = self.sizes.iter_mut().map(|size| &mut size.sample).chain(places);
            let (mut total, mut largest) = (0, None);
            for sample in samples {
                total += sample.memory_bytes();
                if largest
                    .as_ref()
                    .is_none_or(|found: &&mut Sample| found.memory_bytes() < sample.memory_bytes())
                {
                    largest = Some(sample);
                }
            }
            let is_enough = total <= self.memory_bytes;
            if is_enough || !largest.is_some_and(Sample::thin) {
                return;
            }
        }
    }

    fn end(&mut self) {
        if let (Some(places), Some(facts)) = (self.places.take(), self.facts.last_mut()) {
            facts.shared_bytes = places.shared_bytes();
        }
    }

    fn finish(self) -> Duplicates {
        let sizes = self.sizes.into_iter().map(SizeCount::finish).collect();
        Duplicates { sources: self.facts, sizes }
    }
}

/// Cuts a range at multiples of `step`.
fn blocks(range: GuestRange, step: u64) -> impl Iterator<Item = GuestRange> {
    (range.start.0 / step..range.end().0.div_ceil(step)).filter_map(move |index| {
        GuestRange::new(crate::units::GuestOffset(index * step), step).intersection(&range)
    })
}

impl SizeCount {
    fn new(cluster_bytes: u64) -> Self {
        let (sample, total) = (Sample::default(), SourceCount::default());
        Self { cluster_bytes, sample, total, sources: Vec::new() }
    }

    /// Counts the clusters that `block` has a part of.
    fn block(&mut self, window: &Window, block: GuestRange, fingerprinter: Fingerprinter) {
        let index = self.sources.len() - 1;
        let Some(source) = self.sources.last_mut() else { return };
        let size = self.cluster_bytes;
        let mut at = (block.start.0 / size * size).max(source.next);
        while at < block.end().0 {
            let start = (at - window.range.start.0) as usize;
            let content = &window.bytes[start..start + size as usize];
            at += size;
            source.next = at;
            if is_zero(content) {
                source.zero += 1;
                continue;
            }
            source.data += 1;
            source.note_table((at - 1) / (size * (size / 8)));
            let fingerprint = fingerprinter.of(content);
            match self.sample.meet(fingerprint, index) {
                Met::New => {
                    source.distinct.add(fingerprint);
                    self.total.distinct.add(fingerprint);
                }
                Met::Elsewhere => source.distinct.add(fingerprint),
                Met::Here | Met::Left => {}
            }
        }
    }

    fn finish(self) -> SizeDuplicates {
        let level = self.sample.level();
        let mut total = self.total.counts(level);
        let sources: Vec<_> = self.sources.iter().map(|source| source.counts(level)).collect();
        for source in &sources {
            total.data += source.data;
            total.zero += source.zero;
            total.l2_tables += source.l2_tables;
        }
        // Of one source, the sample says the same of both.
        total.distinct = self.total.distinct.estimate(level).min(total.data);
        SizeDuplicates {
            cluster_bytes: self.cluster_bytes,
            sources,
            total,
            one_in: 1 << level,
            kept: self.total.distinct.estimate(level) >> level,
        }
    }
}

impl SourceCount {
    fn note_table(&mut self, table: u64) {
        if table >= self.next_table {
            self.l2_tables += 1;
            self.next_table = table + 1;
        }
    }

    fn counts(&self, level: u32) -> ClusterCounts {
        let distinct = self.distinct.estimate(level).min(self.data);
        ClusterCounts { data: self.data, zero: self.zero, distinct, l2_tables: self.l2_tables }
    }
}

impl Places {
    fn new(cluster_bytes: u64) -> Self {
        Self { cluster_bytes, sample: Sample::default(), clusters: 0, distinct: Tally::default() }
    }

    /// Counts the clusters that begin in a part whose place is known.
    fn note(&mut self, part: &Extent, fingerprinter: Fingerprinter) {
        let Some(host) = part.status.host else { return };
        let first = part.range.start.0.next_multiple_of(self.cluster_bytes);
        for at in (first..part.range.end().0).step_by(self.cluster_bytes as usize) {
            let place = (host.0 + (at - part.range.start.0)) / self.cluster_bytes;
            let fingerprint: Fingerprint = fingerprinter.of(&place.to_le_bytes());
            self.clusters += 1;
            if self.sample.meet(fingerprint, 0) == Met::New {
                self.distinct.add(fingerprint);
            }
        }
    }

    fn shared_bytes(&self) -> u64 {
        let distinct = self.distinct.estimate(self.sample.level());
        self.clusters.saturating_sub(distinct) * self.cluster_bytes
    }
}
