//! An image of a case, and what must be read from it.
//!
//! * Always: what is put into the image is put into the content beside it, by the same call.

use std::collections::{BTreeMap, BTreeSet};

use flate2::{Compress, Compression, FlushCompress, Status};

use crate::content;
use crate::image::{ImageBuilder, SnapshotTables, SparseBytes};
use crate::protocol::Need;

/// The image that a case is about.
pub(crate) const IMAGE: &str = "disk.qcow2";
/// What it has below it.
pub(crate) const BACKING: &str = "base";
/// Where its guest data is, if elsewhere.
pub(crate) const DATA_FILE: &str = "disk.data";

/// Extension with the name of the backing format.
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// The files of a case, and the content of the disk and of its snapshots.
///
/// ```
/// use lacuna_conform::Layout;
/// let layout = Layout::new(3, 16, 2 << 16).data(1, 7);
/// assert_eq!(layout.content().len(), 2 << 16);
/// ```
#[derive(Clone)]
pub struct Layout {
    pub(crate) image: ImageBuilder,
    /// What the guest reads.
    content: SparseBytes,
    /// What was below the disk before anything was put into it.
    pub(crate) snapshots: Vec<(String, SparseBytes)>,
    /// Files beside the image, by name.
    pub(crate) beside: BTreeMap<String, SparseBytes>,
    version: u32,
    cluster_bits: u32,
    size_bytes: u64,
    is_zstd: bool,
    needs: BTreeSet<Need>,
    has_shared: bool,
}

impl Layout {
    /// Starts an image of `version` (2 or 3) with clusters of `1 << cluster_bits` bytes.
    #[must_use]
    pub fn new(version: u32, cluster_bits: u32, size_bytes: u64) -> Self {
        let mut content = SparseBytes::default();
        content.set_len(size_bytes);
        Self {
            image: ImageBuilder::new(version, cluster_bits, size_bytes),
            content,
            snapshots: Vec::new(),
            beside: BTreeMap::new(),
            version,
            cluster_bits,
            size_bytes,
            is_zstd: false,
            needs: (version == 2).then_some(Need::Version2).into_iter().collect(),
            has_shared: false,
        }
    }

    /// Returns what the guest reads.
    #[must_use]
    pub const fn content(&self) -> &SparseBytes {
        &self.content
    }

    /// Returns the bytes of a cluster.
    #[must_use]
    pub const fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(crate) const fn version(&self) -> u32 {
        self.version
    }

    /// Returns what an engine must be able to do to read it.
    pub(crate) const fn needs(&self) -> &BTreeSet<Need> {
        &self.needs
    }

    /// Says whether several entries of the disk have one cluster.
    pub(crate) const fn has_shared(&self) -> bool {
        self.has_shared
    }

    pub(crate) fn needing(mut self, need: Need) -> Self {
        self.needs.insert(need);
        self
    }

    /// Changes the image where the guest does not see it.
    pub(crate) fn with(mut self, change: impl FnOnce(ImageBuilder) -> ImageBuilder) -> Self {
        self.image = change(self.image);
        self
    }

    pub(crate) fn extended(self) -> Self {
        self.needing(Need::ExtendedL2).with(ImageBuilder::extended)
    }

    pub(crate) fn zstd(mut self) -> Self {
        self.is_zstd = true;
        self.needing(Need::Zstd).with(ImageBuilder::zstd)
    }

    /// Puts a raw file of `len` bytes below; comes before any data.
    pub(crate) fn over_raw(self, len: u64, seed: u64) -> Self {
        let below = SparseBytes::from(&content(seed, 0..len)[..]);
        self.over("raw", below.clone(), &below)
    }

    /// Puts an image below, which may have files below it; comes before any data.
    pub(crate) fn over_image(mut self, below: &Self) -> Self {
        self.needs.extend(&below.needs);
        let rename = |name: &String| format!("{BACKING}-{name}");
        let files = below.beside.iter().map(|(name, bytes)| (rename(name), bytes.clone()));
        self.beside.extend(files);
        let image = match below.beside.contains_key(BACKING) {
            true => below.image.clone().backing(&rename(&BACKING.to_owned())),
            false => below.image.clone(),
        };
        self.over("qcow2", image.build().bytes, &below.content)
    }

    fn over(mut self, format: &str, file: SparseBytes, shown: &SparseBytes) -> Self {
        self.content = shown.clone();
        self.content.set_len(self.size_bytes);
        self.beside.insert(BACKING.to_owned(), file);
        self.needing(Need::Backing)
            .with(|image| image.backing(BACKING).extension(BACKING_FORMAT, format.as_bytes()))
    }

    pub(crate) fn data_file(self) -> Self {
        self.needing(Need::DataFile).with(|image| image.data_file(DATA_FILE))
    }

    /// Fills a cluster.
    #[must_use]
    pub fn data(mut self, cluster: u64, seed: u64) -> Self {
        let bytes = self.cluster_content(cluster, seed);
        self.put(cluster, &bytes);
        self.with(|image| image.data(cluster, &bytes))
    }

    /// Makes a cluster zeros, without a place for it.
    pub(crate) fn zero(mut self, cluster: u64) -> Self {
        self.put(cluster, &vec![0; 1 << self.cluster_bits]);
        self.with(|image| image.zero(cluster))
    }

    /// Makes a cluster zeros that has a place with something else in it.
    pub(crate) fn reserved_zero(mut self, cluster: u64) -> Self {
        let stale = self.cluster_content(cluster, 99);
        self.put(cluster, &vec![0; 1 << self.cluster_bits]);
        self.with(|image| image.reserved_zero(cluster, &stale))
    }

    /// Puts a compressed stream into a cluster.
    pub(crate) fn compressed(self, cluster: u64, seed: u64) -> Self {
        let bytes = self.cluster_content(cluster, seed);
        let stream = if self.is_zstd { zstd_stream(&bytes) } else { deflate_stream(&bytes, 12) };
        self.stream(cluster, &bytes, &stream)
    }

    /// Puts this stream into a cluster, which it is the content of.
    pub(crate) fn stream(mut self, cluster: u64, bytes: &[u8], stream: &[u8]) -> Self {
        self.put(cluster, bytes);
        let need = if self.is_zstd { Need::Zstd } else { Need::Deflate };
        self.needing(need).with(|image| image.compressed(cluster, stream))
    }

    /// Lets a cluster use the place of one before it.
    pub(crate) fn shared(mut self, cluster: u64, with: u64) -> Self {
        let bytes = self.content.read_vec(with << self.cluster_bits, 1 << self.cluster_bits);
        self.put(cluster, &bytes);
        self.has_shared = true;
        self.with(|image| image.shared(cluster, with))
    }

    /// Fills some subclusters of a cluster: `data` and `zero` have a bit for each, others stay what is
    /// below.
    pub(crate) fn subclusters(mut self, cluster: u64, seed: u64, data: u32, zero: u32) -> Self {
        let (start, step) = (cluster << self.cluster_bits, 1 << (self.cluster_bits - 5));
        for index in 0..32 {
            let at = start + index * step;
            match (data >> index & 1, zero >> index & 1) {
                (1, _) => self.content.write(at, &content(seed, at..at + step)),
                (_, 1) => self.content.punch(at, at + step),
                _ => {}
            }
        }
        self.content.set_len(self.size_bytes);
        let bitmap = u64::from(zero) << 32 | u64::from(data);
        let bytes = self.cluster_content(cluster, seed);
        self.with(|image| match data {
            0 => image.zero(cluster).subclusters(cluster, bitmap),
            _ => image.data(cluster, &bytes).subclusters(cluster, bitmap),
        })
    }

    /// Keeps the disk as it is now as a snapshot.
    pub(crate) fn snapshot(mut self, name: &str, tables: SnapshotTables) -> Self {
        self.snapshots.push((name.to_owned(), self.content.clone()));
        self.with(|image| image.snapshot_with(name, tables))
    }

    /// Fills a cluster after the snapshots were made, which have tables of their own.
    pub(crate) fn since(mut self, cluster: u64, seed: u64) -> Self {
        let bytes = self.cluster_content(cluster, seed);
        self.put(cluster, &bytes);
        self.with(|image| image.since(cluster, &bytes))
    }

    fn cluster_content(&self, cluster: u64, seed: u64) -> Vec<u8> {
        content(seed, cluster << self.cluster_bits..(cluster + 1) << self.cluster_bits)
    }

    fn put(&mut self, cluster: u64, bytes: &[u8]) {
        self.content.write(cluster << self.cluster_bits, bytes);
        self.content.set_len(self.size_bytes);
    }
}

/// Makes a raw deflate stream whose matches go back less than `1 << window_bits`.
pub(crate) fn deflate_stream(bytes: &[u8], window_bits: u8) -> Vec<u8> {
    let mut stream = Vec::with_capacity(bytes.len() + 1024);
    let mut state = Compress::new_with_window_bits(Compression::new(6), false, window_bits);
    let done = state.compress_vec(bytes, &mut stream, FlushCompress::Finish);
    assert!(matches!(done, Ok(Status::StreamEnd)), "a kilobyte is room for what deflate adds");
    stream
}

fn zstd_stream(bytes: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(bytes, 3).expect("memory takes everything")
}
