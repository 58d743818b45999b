//! A run of clusters is one change (004-12), counted by what the storage sees.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lacuna::Result;
use lacuna::block::{DiscardMode, Layer, ZeroFlags};
use lacuna::buffer::{Buffer, Hold};
use lacuna::qcow2::{Access, Image, OpenOptions, Parts};
use lacuna::storage::{Capabilities, HostExtent, MemoryStorage, Storage, Transfer, ZeroMode};
use lacuna::units::{GuestOffset, GuestRange, HostOffset, HostRange};
use pollster::block_on;

use super::scenario::{Change, Disk, Setup};

const CLUSTER: u64 = 4096;
/// Two L2 tables of clusters.
const SIZE: u64 = 2 * 512 * CLUSTER;

/// Counts what changes the object.
#[derive(Clone)]
struct Counting {
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

/// A disk whose first `data` bytes were written in guest order.
fn disk(data: u64) -> (Image<Counting>, Counting) {
    let before: Vec<Change> = (data > 0).then_some(Change::Write(0, data, 7)).into_iter().collect();
    let options = "cluster_size=4k";
    let disk =
        Disk::make(&Setup { options, size_bytes: SIZE, before: &before, ..Setup::default() });
    let bytes = std::fs::read(&disk.path).unwrap();
    let storage = Counting {
        inner: Arc::new(MemoryStorage::from(&bytes[..])),
        writes: Arc::default(),
        punches: Arc::default(),
    };
    let parts = Parts::alone(storage.clone());
    (block_on(Image::open(parts, OpenOptions::new(Access::ReadWrite))).unwrap(), storage)
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
    block_on(async {
        image.discard(whole(), DiscardMode::Guest).await?;
        // The second flush brings the lowered refcounts.
        image.flush().await?;
        image.flush().await
    })
    .unwrap();
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
