//! Copies that the host makes: no data comes through here, and the content is the same.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lacuna::block::{Layer, WriteFlags};
use lacuna::buffer::{Buffer, Hold};
use lacuna::job::{ConvertOptions, Mover, TargetContent, convert};
use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
use lacuna::raw::Raw;
use lacuna::storage::{
    Capabilities, FileOptions, FileStorage, HostExtent, HostSource, Storage, Transfer, ZeroMode,
};
use lacuna::units::{GuestOffset, HostOffset, HostRange};
use lacuna::{ErrorKind, Result};
use pollster::block_on;
use testkit::foreign::{assert_same_guest, qemu_img_check};

const SIZE: u64 = 8 << 20;

/// A file that counts the bytes of reads and writes that are larger than a table.
struct Counting {
    file: FileStorage,
    moved: Arc<AtomicU64>,
}

impl Counting {
    fn create(path: &Path) -> (Self, Arc<AtomicU64>) {
        let moved = Arc::new(AtomicU64::new(0));
        let file = FileStorage::open(path, &FileOptions::replace()).unwrap();
        (Self { file, moved: Arc::clone(&moved) }, moved)
    }

    fn count(&self, len: usize) {
        self.moved.fetch_add(if len > 65536 { len as u64 } else { 0 }, Ordering::Relaxed);
    }
}

impl Storage for Counting {
    async fn read_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        self.count(buffer.len());
        self.file.read_at(offset, buffer).await
    }

    async fn write_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        self.count(buffer.len());
        self.file.write_at(offset, buffer).await
    }

    async fn write_zeroes_at(&self, range: HostRange, mode: ZeroMode, hold: Hold) -> Result<()> {
        self.file.write_zeroes_at(range, mode, hold).await
    }

    async fn punch_hole_at(&self, range: HostRange, hold: Hold) -> Result<()> {
        self.file.punch_hole_at(range, hold).await
    }

    fn host_source(&self, range: HostRange) -> Option<HostSource> {
        self.file.host_source(range)
    }

    async fn copy_at(&self, source: HostSource, to: HostOffset, hold: Hold) -> Result<()> {
        self.file.copy_at(source, to, hold).await
    }

    async fn allocate_at(&self, range: HostRange) -> Result<()> {
        self.file.allocate_at(range).await
    }

    async fn flush(&self) -> Result<()> {
        self.file.flush().await
    }

    async fn len(&self) -> Result<u64> {
        self.file.len().await
    }

    async fn set_len(&self, len: u64, hold: Hold) -> Result<()> {
        self.file.set_len(len, hold).await
    }

    async fn status_at(&self, range: HostRange) -> Result<HostExtent> {
        self.file.status_at(range).await
    }

    fn capabilities(&self) -> Capabilities {
        self.file.capabilities()
    }
}

async fn new_image(path: &Path) -> (Image<Counting>, Arc<AtomicU64>) {
    let (storage, moved) = Counting::create(path);
    let options = CreateOptions { size_bytes: SIZE, ..CreateOptions::default() };
    create(&storage, &options).await.unwrap();
    let parts = Parts::alone(storage);
    (Image::open(parts, OpenOptions::new(Access::ReadWrite)).await.unwrap(), moved)
}

/// Data here and there, in whole clusters: what lies behind the end of a file cannot be copied.
async fn fill<L: Layer>(disk: &L) {
    for (at, len, byte) in [(1 << 20, 1 << 20, 1), (3 << 20, 2 << 20, 2), (7 << 20, 2 << 16, 3)] {
        let bytes = Buffer::from(&vec![byte; len][..]);
        disk.write(GuestOffset(at), bytes, WriteFlags::empty()).await.0.unwrap();
    }
    disk.flush().await.unwrap();
}

async fn copy<A: Layer, B: lacuna::job::Target>(source: &A, target: &B) {
    let (mover, content) = (Mover::Host, TargetContent::Zero);
    let options = ConvertOptions { mover, content, ..ConvertOptions::default() };
    convert(source, target, &options, &mut |_| {}).await.unwrap();
}

#[test]
fn between_qcow2_and_raw_the_host_moves_all_data() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name| folder.path().join(name);
    block_on(async {
        let (source, read) = new_image(&path("source")).await;
        fill(&source).await;
        read.store(0, Ordering::Relaxed);
        let (target, written) = new_image(&path("image")).await;
        copy(&source, &target).await;
        target.close().await.unwrap();
        let (file, written_raw) = Counting::create(&path("raw"));
        let raw = Raw::create(file, SIZE).await.unwrap();
        copy(&source, &raw).await;
        let (again, written_again) = new_image(&path("again")).await;
        copy(&raw, &again).await;
        again.close().await.unwrap();
        let all =
            [("source", read), ("image", written), ("raw", written_raw), ("again", written_again)];
        for (name, moved) in all {
            assert_eq!(moved.load(Ordering::Relaxed), 0, "bytes of {name} came through here");
        }
        source.close().await.unwrap();
    });
    let source = path("source");
    for name in ["image", "again"] {
        assert_same_guest(("qcow2", &source), ("qcow2", &path(name)));
        assert!(qemu_img_check(&path(name)).is_clean());
    }
    assert_same_guest(("qcow2", &source), ("raw", &path("raw")));
}

#[test]
fn a_source_that_ends_early_is_refused_and_not_taken_for_zeros() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    std::fs::write(&from, [7; 1000]).unwrap();
    let source = FileStorage::open(&from, &FileOptions::read_only()).unwrap();
    let target = FileStorage::open(&to, &FileOptions::replace()).unwrap();
    let range = |len| source.host_source(HostRange::new(HostOffset(0), len)).unwrap();
    let error = block_on(target.copy_at(range(4096), HostOffset(0), Hold::none())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    block_on(target.copy_at(range(1000), HostOffset(512), Hold::none())).unwrap();
    assert_eq!(std::fs::read(&to).unwrap()[512..1512], [7; 1000]);
}

#[test]
fn where_the_host_cannot_copy_the_job_does() {
    let folder = tempfile::tempdir().unwrap();
    block_on(async {
        let (source, _) = new_image(&folder.path().join("source")).await;
        fill(&source).await;
        let memory = lacuna::storage::MemoryStorage::new();
        let target = Raw::create(memory, SIZE).await.unwrap();
        copy(&source, &target).await;
        let (result, bytes) = target.read(GuestOffset(3 << 20), Buffer::new(2 << 20)).await;
        result.unwrap();
        assert!(bytes.iter().all(|byte| *byte == 2));
        source.close().await.unwrap();
    });
}
