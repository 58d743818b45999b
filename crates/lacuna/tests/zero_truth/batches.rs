//! A run of clusters is one change (004-12), counted by what the storage sees.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lacuna::Result;
use lacuna::block::{DiscardMode, DynLayer, Layer, Preallocation, WriteFlags, ZeroFlags};
use lacuna::buffer::{Buffer, Hold};
use lacuna::qcow2::format::EntryWidth;
use lacuna::qcow2::{
    Access, CreateOptions, Image, OpenOptions, Parts, PreallocationLayout, SharedZeroCluster,
    create,
};
use lacuna::raw::Raw;
use lacuna::storage::{Capabilities, HostExtent, MemoryStorage, Storage, Transfer, ZeroMode};
use lacuna::units::{GuestOffset, GuestRange, HostOffset, HostRange};
use pollster::block_on;

use super::scenario::{Change, Disk, Setup};

const CLUSTER: u64 = 4096;
/// Two L2 tables of clusters.
const SIZE: u64 = 2 * 512 * CLUSTER;

/// Counts what changes the object.
#[derive(Clone)]
pub(crate) struct Counting {
    inner: Arc<MemoryStorage>,
    writes: Arc<AtomicU64>,
    punches: Arc<AtomicU64>,
}

impl Storage for Counting {
    async fn read_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        self.inner.read_at(offset, buffer).await
    }

    async fn write_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.inner.write_at(offset, buffer).await
    }

    async fn write_zeroes_at(&self, range: HostRange, mode: ZeroMode, hold: Hold) -> Result<()> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.inner.write_zeroes_at(range, mode, hold).await
    }

    async fn punch_hole_at(&self, range: HostRange, hold: Hold) -> Result<()> {
        self.punches.fetch_add(1, Ordering::Relaxed);
        self.inner.punch_hole_at(range, hold).await
    }

    async fn allocate_at(&self, range: HostRange) -> Result<()> {
        self.inner.allocate_at(range).await
    }

    async fn flush(&self) -> Result<()> {
        self.inner.flush().await
    }

    async fn len(&self) -> Result<u64> {
        self.inner.len().await
    }

    async fn set_len(&self, len: u64, hold: Hold) -> Result<()> {
        self.inner.set_len(len, hold).await
    }

    async fn status_at(&self, range: HostRange) -> Result<HostExtent> {
        self.inner.status_at(range).await
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }
}

impl Counting {
    pub(crate) fn of(image: &[u8]) -> Self {
        let inner = Arc::new(MemoryStorage::from(image));
        Self { inner, writes: Arc::default(), punches: Arc::default() }
    }

    fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    pub(crate) fn punches(&self) -> u64 {
        self.punches.load(Ordering::Relaxed)
    }

    /// Forgets what was counted so far.
    fn start(&self) {
        self.writes.store(0, Ordering::Relaxed);
        self.punches.store(0, Ordering::Relaxed);
    }
}

/// A disk whose first `data` bytes were written in guest order.
fn disk(data: u64) -> (Image<Counting>, Counting) {
    let before: Vec<Change> = (data > 0).then_some(Change::Write(0, data, 7)).into_iter().collect();
    let options = "cluster_size=4k";
    let disk =
        Disk::make(&Setup { options, size_bytes: SIZE, before: &before, ..Setup::default() });
    opened(&std::fs::read(&disk.path).unwrap(), OpenOptions::new(Access::ReadWrite))
}

fn opened(image: &[u8], options: OpenOptions) -> (Image<Counting>, Counting) {
    let storage = Counting::of(image);
    let parts = Parts::alone(storage.clone());
    (block_on(Image::open(parts, options)).unwrap(), storage)
}

/// A disk whose every cluster has its place in one run behind all tables, and holds data.
fn in_one_run(options: CreateOptions) -> (Image<Counting>, Counting) {
    let options = CreateOptions {
        size_bytes: SIZE,
        preallocation: Preallocation::Metadata,
        preallocation_layout: PreallocationLayout::Contiguous,
        ..options
    };
    let storage = MemoryStorage::new();
    block_on(create(&storage, &options)).unwrap();
    let (image, storage) = opened(&storage.to_vec(), OpenOptions::new(Access::ReadWrite));
    let data = Buffer::from(&vec![7; SIZE as usize][..]);
    block_on(image.write(GuestOffset(0), data, WriteFlags::FUA)).0.unwrap();
    storage.start();
    (image, storage)
}

fn small() -> CreateOptions {
    CreateOptions { cluster_bytes: CLUSTER, ..CreateOptions::default() }
}

fn extended() -> CreateOptions {
    CreateOptions {
        cluster_bytes: 16384,
        entry_width: EntryWidth::Extended,
        ..CreateOptions::default()
    }
}

/// Flushes twice: the second flush brings the lowered refcounts.
async fn settle(image: &Image<Counting>) {
    image.flush().await.unwrap();
    image.flush().await.unwrap();
}

fn whole() -> GuestRange {
    GuestRange::new(GuestOffset(0), SIZE)
}

#[test]
fn zeroing_a_run_that_keeps_its_place_writes_each_l2_table_once() {
    let (image, storage) = disk(SIZE);
    block_on(image.write_zeroes(whole(), ZeroFlags::FUA)).unwrap();
    assert_eq!(storage.writes.load(Ordering::Relaxed), 2, "one for each of the two L2 tables");
    assert_eq!(storage.punches.load(Ordering::Relaxed), 0);
}

#[test]
fn discarding_a_run_writes_each_table_and_block_once_and_punches_each_host_run_once() {
    let (image, storage) = disk(SIZE);
    block_on(image.discard(whole(), DiscardMode::Guest)).unwrap();
    block_on(settle(&image));
    // Two L2 tables, and the one refcount block, whose 2048 counts reach over all clusters.
    assert_eq!(storage.writes.load(Ordering::Relaxed), 3);
    // The second L2 table lies between the two runs of data.
    assert_eq!(storage.punches.load(Ordering::Relaxed), 2);
}

#[test]
fn zeroing_what_was_never_written_makes_each_table_and_pointer_once() {
    let (image, storage) = disk(0);
    block_on(image.write_zeroes(whole(), ZeroFlags::FUA | ZeroFlags::MAY_UNMAP)).unwrap();
    // Two fresh tables, the refcounts of their clusters, one sector of the L1 table.
    let writes = storage.writes.load(Ordering::Relaxed);
    assert!(writes <= 4, "{writes} writes for 1024 clusters");
}

#[test]
fn zeroing_again_writes_nothing() {
    let (image, storage) = disk(SIZE);
    block_on(image.write_zeroes(whole(), ZeroFlags::FUA)).unwrap();
    let before = storage.writes.load(Ordering::Relaxed);
    block_on(image.write_zeroes(whole(), ZeroFlags::FUA)).unwrap();
    assert_eq!(storage.writes.load(Ordering::Relaxed), before);
}

/// What a discard or zeroing of a run costs: writes of tables and refcount blocks, and punches.
fn cost(kind: CreateOptions, discards: bool, range: GuestRange) -> (u64, u64) {
    let (image, storage) = in_one_run(kind);
    block_on(async {
        match discards {
            true => image.discard(range, DiscardMode::Guest).await.unwrap(),
            false => image.write_zeroes(range, ZeroFlags::MAY_UNMAP).await.unwrap(),
        }
        settle(&image).await;
    });
    (storage.writes(), storage.punches())
}

#[test]
fn a_run_that_is_freed_costs_a_write_per_table_one_per_block_and_one_punch() {
    for discards in [true, false] {
        // Two L2 tables side by side, written in one call, and the one refcount block.
        assert_eq!(cost(small(), discards, whole()), (2, 1));
        assert_eq!(cost(extended(), discards, whole()), (2, 1), "one L2 table of four slices");
    }
}

#[test]
fn a_run_that_keeps_its_place_costs_the_tables_and_one_punch_over_all_slices() {
    for discards in [true, false] {
        let kept = |options| CreateOptions { keep_mapping: true, ..options };
        assert_eq!(cost(kept(small()), discards, whole()), (1, 1));
        assert_eq!(cost(kept(extended()), discards, whole()), (1, 1));
    }
}

#[test]
fn a_run_that_begins_and_ends_inside_clusters_is_one_punch_where_it_keeps_its_place() {
    for discards in [true, false] {
        let kind = CreateOptions { keep_mapping: true, ..extended() };
        let range = GuestRange::new(GuestOffset(10 * 512), SIZE - 30 * 512);
        assert_eq!(cost(kind, discards, range), (1, 1));
        // Without, the parts of clusters that stay go at once, the clusters when they are free.
        assert_eq!(cost(extended(), discards, range), (2, 3));
    }
}

#[test]
fn a_run_of_reserved_zero_clusters_is_freed_at_the_same_price() {
    for kind in [small(), extended()] {
        let (image, storage) = in_one_run(kind);
        block_on(image.write_zeroes(whole(), ZeroFlags::FUA)).unwrap();
        assert_eq!((storage.writes(), storage.punches()), (1, 0), "they keep their space");
        storage.start();
        block_on(image.discard(whole(), DiscardMode::Guest)).unwrap();
        block_on(settle(&image));
        assert_eq!((storage.writes(), storage.punches()), (2, 1));
    }
}

#[test]
fn a_run_of_compressed_clusters_is_freed_at_the_same_price() {
    let storage = MemoryStorage::new();
    block_on(create(&storage, &CreateOptions { size_bytes: SIZE, ..small() })).unwrap();
    let (image, storage) = opened(&storage.to_vec(), OpenOptions::new(Access::ReadWrite));
    for cluster in 0..512 {
        let bytes = Buffer::from(&[cluster as u8 | 1; CLUSTER as usize][..]);
        block_on(image.write_compressed(GuestOffset(cluster * CLUSTER), bytes)).0.unwrap();
    }
    block_on(image.flush()).unwrap();
    storage.start();
    let first_table = GuestRange::new(GuestOffset(0), 512 * CLUSTER);
    block_on(image.write_zeroes(first_table, ZeroFlags::MAY_UNMAP)).unwrap();
    block_on(settle(&image));
    // One L2 table and the refcount block; the L2 table lies behind the first few streams.
    assert_eq!(storage.writes(), 2);
    assert!(storage.punches() <= 2, "{} punches", storage.punches());
}

#[test]
fn writing_to_reserved_zero_clusters_costs_their_table_and_the_data() {
    let (image, storage) = in_one_run(small());
    block_on(image.write_zeroes(whole(), ZeroFlags::FUA)).unwrap();
    storage.start();
    let data = Buffer::from(&vec![8; 512 * CLUSTER as usize][..]);
    block_on(image.write(GuestOffset(0), data, WriteFlags::FUA)).0.unwrap();
    assert_eq!(storage.writes(), 2, "the run of data in one piece, and one L2 table");
}

/// An overlay of version 2 that shares zeros, whose first cluster does already.
fn overlay() -> (Image<Counting>, Counting) {
    let options = "compat=0.10,cluster_size=4k";
    let disk = Disk::make(&Setup { options, size_bytes: SIZE, backing: true, ..Setup::default() });
    let bytes = std::fs::read(&disk.path).unwrap();
    let storage = Counting::of(&bytes);
    let below = MemoryStorage::from(&vec![7; SIZE as usize][..]);
    let below: Arc<dyn DynLayer> = Arc::new(block_on(Raw::open(below)).unwrap());
    let parts = Parts { backing: Some(below), ..Parts::alone(storage.clone()) };
    let options = OpenOptions::new(Access::ReadWrite).shared_zero_cluster(SharedZeroCluster::On);
    let image = block_on(Image::open(parts, options)).unwrap();
    let first = GuestRange::new(GuestOffset(0), CLUSTER);
    block_on(image.write_zeroes(first, ZeroFlags::FUA)).unwrap();
    (image, storage)
}

#[test]
fn a_run_that_shares_zeros_writes_each_table_and_the_refcounts_once() {
    let (image, storage) = overlay();
    let before = storage.writes.load(Ordering::Relaxed);
    block_on(image.write_zeroes(whole(), ZeroFlags::FUA | ZeroFlags::MAY_UNMAP)).unwrap();
    // One L2 table that is there and a fresh one, the refcounts, one sector of the L1 table.
    let writes = storage.writes.load(Ordering::Relaxed) - before;
    assert!(writes <= 4, "{writes} writes for 1023 clusters");
}

#[test]
fn discarding_data_to_shared_zeros_writes_each_table_once_and_punches_each_host_run_once() {
    let (image, storage) = overlay();
    let bytes = Buffer::from(&vec![9; SIZE as usize][..]);
    block_on(image.write(GuestOffset(0), bytes, WriteFlags::FUA)).0.unwrap();
    let writes = storage.writes.load(Ordering::Relaxed);
    let punches = storage.punches.load(Ordering::Relaxed);
    block_on(async {
        image.discard(whole(), DiscardMode::Guest).await?;
        image.flush().await?;
        image.flush().await
    })
    .unwrap();
    // The raised refcount, two L2 tables, the lowered refcounts.
    let writes = storage.writes.load(Ordering::Relaxed) - writes;
    assert!(writes <= 4, "{writes} writes for 1024 clusters");
    let punches = storage.punches.load(Ordering::Relaxed) - punches;
    assert!(punches <= 3, "{punches} punches");
}
