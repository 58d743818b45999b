//! Kinds of images: every combination of what the format offers, built without the engine.
//!
//! ```
//! use testkit::case::{Backing, Kind, Store};
//! let kind = Kind { backing: Backing::RawShorter, store: Store::Zstd, ..Kind::plain(16) };
//! let case = kind.build(1);
//! let image = pollster::block_on(case.in_memory().open()).unwrap();
//! assert_eq!(image.geometry().cluster_bytes(), kind.cluster_bytes());
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::sim::{Pace, SimHost};
use crate::{AfterDiscard, ImageBuilder, Menu, ModelDisk, Random, Rules, SparseBytes, content};
use lacuna::block::DynLayer;
use lacuna::qcow2::{
    Access, Image, OnDiscard, OpenOptions, Parts, Placement, SharedZeroCluster, ZeroUnmap,
};
use lacuna::raw::Raw;
use lacuna::storage::{MemoryStorage, Storage};
use lacuna::units::{GuestOffset, GuestRange};

/// What lies below the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Nothing.
    None,
    /// A raw file that ends before the disk does.
    RawShorter,
    /// A raw file that ends behind the disk.
    RawLonger,
    /// An image that ends before the disk does.
    Qcow2Shorter,
    /// An image that ends behind the disk.
    Qcow2Longer,
}

/// Where guest data lies, and how it is compressed where it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// In the image, compressed clusters by deflate.
    Deflate,
    /// In the image, compressed clusters by zstd.
    Zstd,
    /// In a data file.
    DataFile,
    /// In a data file that reads as the disk does.
    RawDataFile,
}

/// One kind of image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// 2 or 3.
    pub version: u32,
    /// Width of an offset within a cluster.
    pub cluster_bits: u32,
    /// Whether clusters have subclusters.
    pub extended: bool,
    /// What lies below.
    pub backing: Backing,
    /// Where guest data lies.
    pub store: Store,
    /// Refcounts have two to the power of this many bits.
    pub refcount_order: u32,
    /// Whether refcounts may be written late.
    pub lazy: bool,
    /// Zeroed clusters share one, where there is no flag.
    pub shared_zero: bool,
}

/// The byte of the header with the first eight autoclear features.
const LAST_AUTOCLEAR_BYTE: u64 = 95;

const BACKINGS: [Backing; 5] = [
    Backing::None,
    Backing::RawShorter,
    Backing::RawLonger,
    Backing::Qcow2Shorter,
    Backing::Qcow2Longer,
];

impl Kind {
    /// The plainest image: version 3, no backing, 16-bit refcounts.
    pub const fn plain(cluster_bits: u32) -> Self {
        Self {
            version: 3,
            cluster_bits,
            extended: false,
            backing: Backing::None,
            store: Store::Deflate,
            refcount_order: 4,
            lazy: false,
            shared_zero: false,
        }
    }

    /// Every combination that the format allows.
    pub fn every() -> Vec<Self> {
        let mut kinds = Vec::new();
        for cluster_bits in [9, 12, 16, 21] {
            for backing in BACKINGS {
                kinds.push(Self { version: 2, backing, ..Self::plain(cluster_bits) });
                kinds.extend(Self::every_of_version_3(cluster_bits, backing));
            }
        }
        kinds
    }

    fn every_of_version_3(cluster_bits: u32, backing: Backing) -> Vec<Self> {
        let mut kinds = Vec::new();
        for extended in [false, true] {
            for store in [Store::Deflate, Store::Zstd, Store::DataFile, Store::RawDataFile] {
                let raw_over_backing = store == Store::RawDataFile && backing != Backing::None;
                if (extended && cluster_bits < 14) || raw_over_backing {
                    continue;
                }
                for (refcount_order, lazy) in (0..7).flat_map(|o| [(o, false), (o, true)]) {
                    let plain = Self::plain(cluster_bits);
                    kinds.push(Self { extended, backing, store, refcount_order, lazy, ..plain });
                }
            }
        }
        kinds
    }

    /// A spread: every combination but for refcount width and lazy refcounts, which rotate.
    pub fn spread() -> Vec<Self> {
        let rotates = |(index, kind): &(usize, Self)| {
            let turn = (index / 14) % 14;
            kind.version == 2
                || (kind.refcount_order as usize, kind.lazy) == (turn / 2, turn % 2 == 1)
        };
        let version_2 = Self::every().into_iter().filter(|kind| kind.version == 2);
        let version_3 = Self::every().into_iter().filter(|kind| kind.version == 3);
        version_2.chain(version_3.enumerate().filter(rotates).map(|(_, kind)| kind)).collect()
    }

    /// Version 2 over each kind of backing file, with a shared zero cluster.
    fn sharing() -> impl Iterator<Item = Self> {
        let sharing = |kind: Self| Self { shared_zero: true, ..kind };
        let flagless = |kind: &Self| {
            // Larger clusters take long to fill, and show nothing more.
            kind.version == 2 && kind.backing != Backing::None && kind.cluster_bits <= 16
        };
        Self::every().into_iter().filter(flagless).map(sharing)
    }

    /// What a test run goes through, numbered: the spread, or everything with `LACUNA_LONG`, or
    /// of that the one that `LACUNA_KIND` names.
    pub fn for_this_run() -> Vec<(u64, Self)> {
        let long = std::env::var_os("LACUNA_LONG").is_some();
        let kinds = if long { Self::every() } else { Self::spread() };
        let only = std::env::var("LACUNA_KIND").ok().map(|text| text.parse::<u64>().unwrap());
        let numbered = (0..).zip(kinds.into_iter().chain(Self::sharing()));
        numbered.filter(|(number, _)| only.is_none_or(|only| only == *number)).collect()
    }

    /// Returns the size of a cluster.
    pub const fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Returns the whole clusters around `range`.
    pub fn cover(&self, range: GuestRange) -> GuestRange {
        let start = range.start.0 / self.cluster_bytes() * self.cluster_bytes();
        let end = range.end().0.next_multiple_of(self.cluster_bytes());
        GuestRange::new(GuestOffset(start), end - start)
    }

    /// A disk of a few L2 tables where they are small, and a last cluster that is not whole.
    pub fn size_bytes(&self) -> u64 {
        let clusters = match self.cluster_bits {
            9 => 200,
            12 => 90,
            14 | 16 => 20,
            _ => 5,
        };
        let tail = if self.cluster_bits == 9 { 0 } else { 1536 };
        clusters * self.cluster_bytes() + tail
    }

    /// Says whether clusters can be compressed.
    pub const fn allows_compression(&self) -> bool {
        matches!(self.store, Store::Deflate | Store::Zstd)
    }

    /// Says whether guest data lies in a file of its own.
    pub const fn has_data_file(&self) -> bool {
        matches!(self.store, Store::DataFile | Store::RawDataFile)
    }

    /// Returns what may be asked of such an image.
    pub fn menu(&self) -> Menu {
        Menu {
            cluster_bytes: self.cluster_bytes(),
            resize_up_to: Some(self.size_bytes() * 3 / 2),
            compressed: self.allows_compression(),
            reopen: true,
            full_discard: true,
        }
    }

    /// Returns what a model of such an image goes by.
    pub fn rules(&self) -> Rules {
        let flagless = self.version == 2 && self.backing != Backing::None;
        let ignores_discards = flagless && !self.shared_zero;
        Rules {
            cluster_bytes: self.cluster_bytes(),
            after_discard: match ignores_discards {
                true => AfterDiscard::Unchanged,
                false => AfterDiscard::Zeros,
            },
            // Without leave to unmap, data keeps its cluster, which may then hold anything.
            zero_is_kept: !flagless,
            starts_unallocated: self.store != Store::RawDataFile,
        }
    }

    /// Makes an image of this kind and what belongs to it.
    pub fn build(&self, seed: u64) -> Case {
        let backing = self.build_backing(&mut Random::new(seed ^ 0xba_c6));
        let mut builder = self.builder();
        if let Some(below) = &backing {
            builder = builder.backing(below.name()).extension(0xe279_2aca, below.format.as_bytes());
        }
        let data = self.has_data_file().then(|| {
            let mut file = SparseBytes::default();
            file.set_len(self.size_bytes());
            file
        });
        let options = self.options(seed);
        let mut image = builder.build().bytes;
        if self.version == 3 && !self.has_data_file() && seed.is_multiple_of(2) {
            image.write(LAST_AUTOCLEAR_BYTE, &[self.claims()]);
        }
        Case { kind: *self, image, data, backing, options }
    }

    /// What an empty image may say of itself: that it maps nothing, and that it is all zeros.
    fn claims(&self) -> u8 {
        if self.backing == Backing::None { 0b1100 } else { 0b1000 }
    }

    /// Makes an image whose internal snapshot "one" shares every cluster, and says what it holds.
    pub fn build_with_snapshot(&self, seed: u64) -> (Case, SparseBytes) {
        let mut random = Random::new(seed ^ 0x54_a9);
        let (mut builder, mut guest) = (self.builder(), SparseBytes::default());
        for cluster in 0..self.size_bytes() / self.cluster_bytes() {
            let start = GuestOffset(cluster * self.cluster_bytes());
            let bytes = content(random.next(), GuestRange::new(start, self.cluster_bytes()));
            // The first few are there in any case.
            match random.below(4) {
                0 | 1 => {}
                2 if cluster > 3 && self.version == 3 => {
                    builder = builder.reserved_zero(cluster, &bytes);
                    continue;
                }
                _ if cluster > 3 => continue,
                _ => {}
            }
            guest.write(start.0, &bytes);
            builder = builder.data(cluster, &bytes);
        }
        guest.set_len(self.size_bytes());
        let image = builder.snapshot("one").build().bytes;
        let options = self.options(seed);
        (Case { kind: *self, image, data: None, backing: None, options }, guest)
    }

    fn options(&self, seed: u64) -> OpenOptions {
        match self.shared_zero {
            true => options(seed, self.version).shared_zero_cluster(SharedZeroCluster::On),
            false => options(seed, self.version),
        }
    }

    /// Returns a builder for an image of this kind, without a backing file.
    pub fn builder(&self) -> ImageBuilder {
        let mut builder = ImageBuilder::new(self.version, self.cluster_bits, self.size_bytes());
        builder = builder.refcount_order(self.refcount_order);
        if self.extended {
            builder = builder.extended();
        }
        if self.lazy {
            builder = builder.features(0, 1, 0);
        }
        match self.store {
            Store::Deflate => builder,
            Store::Zstd => builder.zstd(),
            Store::DataFile => builder.features(4, 0, 0).extension(0x4441_5441, b"data.raw"),
            Store::RawDataFile => builder.features(4, 0, 2).extension(0x4441_5441, b"data.raw"),
        }
    }

    /// Some clusters hold data, one of them only in part; the others are holes.
    pub fn build_backing(&self, random: &mut Random) -> Option<Below> {
        let shorter = self.size_bytes() / 2 / 512 * 512 + 512;
        let longer = self.size_bytes() * 5 / 4 / 512 * 512;
        let (format, size) = match self.backing {
            Backing::None => return None,
            Backing::RawShorter => ("raw", shorter),
            Backing::RawLonger => ("raw", longer),
            Backing::Qcow2Shorter => ("qcow2", shorter),
            Backing::Qcow2Longer => ("qcow2", longer),
        };
        // Another cluster size below: boundaries do not fall together.
        let bits = if self.cluster_bits == 16 { 12 } else { 16 };
        let mut guest = SparseBytes::default();
        let mut builder = ImageBuilder::new(3, bits, size);
        for cluster in 0..size.div_ceil(1 << bits) {
            let start = cluster << bits;
            let len = (1_u64 << bits).min(size - start);
            if random.one_in(2) {
                let bytes = content(random.next(), GuestRange::new(GuestOffset(start), len));
                guest.write(start, &bytes);
                builder = builder.data(cluster, &bytes);
            } else if random.one_in(4) {
                builder = builder.zero(cluster);
            }
        }
        guest.set_len(size);
        let file = if format == "raw" { guest.clone() } else { builder.build().bytes };
        Some(Below { format, file, guest })
    }
}

/// Some seeds have a cache that holds hardly a table, some QEMU's placement, some discards that
/// keep places or leave nothing.
fn options(seed: u64, version: u32) -> OpenOptions {
    let options = OpenOptions::new(Access::ReadWrite);
    let mut random = Random::new(seed ^ 0x09_71);
    let options = if random.one_in(2) { options.cache_bytes(1) } else { options };
    let options = match random.one_in(2) {
        true => options,
        false => options.placement(Placement::QemuCompatible),
    };
    let options = match random.one_in(4) {
        true => options.zero_unmap(ZeroUnmap::Unallocate),
        false => options,
    };
    match random.one_in(4) && version == 3 {
        true => options.on_discard(OnDiscard::KeepMapping),
        false => options,
    }
}

/// A backing file.
#[derive(Clone)]
pub struct Below {
    /// Its format, as an image names it.
    pub format: &'static str,
    /// The bytes of the file.
    pub file: SparseBytes,
    /// What a guest would see of it.
    pub guest: SparseBytes,
}

impl Below {
    /// Returns the name that images have for it.
    pub const fn name(&self) -> &'static str {
        "backing.img"
    }

    fn layer(&self) -> Arc<dyn DynLayer> {
        let host = SimHost::without_record(Pace::AtOnce, 0);
        let storage = host.add_file(self.file.clone());
        match self.format {
            "raw" => Arc::new(pollster::block_on(Raw::open(storage)).unwrap()),
            _ => {
                let options = OpenOptions::new(Access::ReadOnly);
                let parts = Parts { storage, data: None, backing: None };
                Arc::new(pollster::block_on(Image::open(parts, options)).unwrap())
            }
        }
    }
}

/// An image and its surroundings, as bytes.
#[derive(Clone)]
pub struct Case {
    /// What kind of image it is.
    pub kind: Kind,
    /// The bytes of the image file.
    pub image: SparseBytes,
    /// The bytes of its data file.
    pub data: Option<SparseBytes>,
    /// The file below.
    pub backing: Option<Below>,
    /// How it is opened.
    pub options: OpenOptions,
}

/// The same, ready to be opened any number of times.
#[derive(Clone)]
pub struct Files<S> {
    /// The image file.
    pub image: S,
    /// The data file.
    pub data: Option<S>,
    /// The disk below.
    pub backing: Option<Arc<dyn DynLayer>>,
    /// How it is opened.
    pub options: OpenOptions,
}

impl Case {
    /// The model of an image that shows the guest `content` from the start.
    pub fn model_of(&self, content: &SparseBytes) -> ModelDisk {
        let mut model = self.model();
        let range = GuestRange::new(GuestOffset(0), content.len());
        model.adopt(range, &content.to_vec());
        model
    }

    /// Returns the model of an image that nobody has written to.
    pub fn model(&self) -> ModelDisk {
        let guest = self.backing.as_ref().map(|below| below.guest.clone());
        ModelDisk::new(self.kind.rules(), self.kind.size_bytes(), guest)
    }

    /// Puts image and data file on `host`, as files 0 and 1.
    pub fn on(&self, host: &SimHost) -> Files<crate::sim::SimStorage> {
        Files {
            image: host.add_file(self.image.clone()),
            data: self.data.as_ref().map(|data| host.add_file(data.clone())),
            backing: self.backing_layer(),
            options: self.options.clone(),
        }
    }

    /// Puts image and data file into memory.
    pub fn in_memory(&self) -> Files<Arc<MemoryStorage>> {
        let memory = |bytes: &SparseBytes| Arc::new(MemoryStorage::from(&bytes.to_vec()[..]));
        Files {
            image: memory(&self.image),
            data: self.data.as_ref().map(memory),
            backing: self.backing_layer(),
            options: self.options.clone(),
        }
    }

    /// Opens the file below.
    pub fn backing_layer(&self) -> Option<Arc<dyn DynLayer>> {
        self.backing.as_ref().map(Below::layer)
    }

    /// The same surroundings with other content.
    pub fn with_content(&self, mut files: Vec<SparseBytes>) -> Self {
        let data = self.data.as_ref().and_then(|_| files.pop());
        let image = files.pop().expect("the image is file 0");
        Self { image, data, ..self.clone() }
    }

    /// Writes all files for foreign tools; returns the image's path.
    pub fn save(&self, folder: &Path) -> PathBuf {
        if let Some(data) = &self.data {
            data.save(&folder.join("data.raw"));
        }
        if let Some(below) = &self.backing {
            below.file.save(&folder.join(below.name()));
        }
        let path = folder.join("image.qcow2");
        self.image.save(&path);
        path
    }
}

impl<S: Storage + Clone> Files<S> {
    /// Opens the image.
    pub async fn open(&self) -> lacuna::Result<Image<S>> {
        let parts = Parts {
            storage: self.image.clone(),
            data: self.data.clone(),
            backing: self.backing.clone(),
        };
        Image::open(parts, self.options.clone()).await
    }
}

impl Files<Arc<MemoryStorage>> {
    /// What the image file and the data file hold now.
    pub fn content(&self) -> Vec<SparseBytes> {
        let files = [Some(&self.image), self.data.as_ref()];
        files.into_iter().flatten().map(|file| SparseBytes::from(&file.to_vec()[..])).collect()
    }
}
