//! Block devices and full file systems, which take root to set up:
//! `cargo test --package lacuna --test storage_privileged -- --ignored`.

#![cfg(target_os = "linux")]

use std::path::{Path, PathBuf};
use std::process::Command;

use lacuna::ErrorKind;
use lacuna::block::{KnownZeroes, Layer, WriteFlags, is_all_zeroes};
use lacuna::buffer::{Buffer, Hold};
use lacuna::qcow2::{Access, CreateOptions, ExtentDetail, Image, OpenOptions, Parts, create};
use lacuna::raw::Raw;
use lacuna::storage::{
    CacheMode, Capability, DriverChoice, FileOptions, FileStorage, HostStatus, Storage, ZeroMode,
};
use lacuna::units::{GuestOffset, HostOffset, HostRange};
use pollster::block_on;
use testkit::Random;

const DEVICE_BYTES: u64 = 4 << 20;

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|_| panic!("{program} is missing: apt-get install mount"));
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A loop device with large sectors, taken down again at the end.
struct LoopDevice {
    path: PathBuf,
    _file: tempfile::NamedTempFile,
}

impl LoopDevice {
    fn new(sector: &str) -> Self {
        let file = tempfile::NamedTempFile::new().expect("a scratch file can be made");
        file.as_file().set_len(DEVICE_BYTES).expect("it can be extended");
        let name = file.path().to_str().expect("the path is plain");
        let device = run("losetup", &["--sector-size", sector, "--show", "--find", name]);
        Self { path: device.into(), _file: file }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        run("losetup", &["--detach", self.path.to_str().expect("the path is plain")]);
    }
}

fn range(start: u64, len: u64) -> HostRange {
    HostRange::new(HostOffset(start), len)
}

fn open(path: &Path, cache: CacheMode, driver: DriverChoice) -> FileStorage {
    let options = FileOptions { cache, driver, ..FileOptions::read_write() };
    FileStorage::open(path, &options).expect("it opens")
}

async fn random_calls(storage: &FileStorage, model: &mut [u8], random: &mut Random) {
    for step in 0..200 {
        let unit = *random.pick(&[1, 512, 4096]);
        let start = random.below(DEVICE_BYTES / unit) * unit;
        let len = (1 + random.below(100_000 / unit)) * unit;
        let here = range(start, len.min(DEVICE_BYTES - start));
        let place = here.start.0 as usize..here.end().0 as usize;
        let byte = random.next() as u8;
        match random.below(4) {
            0 => {
                let mode = *random.pick(&[ZeroMode::Allocate, ZeroMode::MayUnmap]);
                storage.write_zeroes_at(here, mode, Hold::none()).await.expect("zeroes");
                model[place.clone()].fill(0);
            }
            1 => {
                storage.punch_hole_at(here, Hold::none()).await.expect("punches");
                model[place.clone()].fill(0);
            }
            _ => {
                model[place.clone()].fill(byte);
                let buffer = Buffer::from(&model[place.clone()]);
                storage.write_at(here.start, buffer).await.0.expect("writes");
            }
        }
        let (result, bytes) = storage.read_at(HostOffset(0), Buffer::new(model.len())).await;
        result.expect("reads");
        assert!(*bytes == *model, "other bytes after step {step} at {here:?}");
    }
}

#[test]
#[ignore = "needs root and loop devices"]
fn a_block_device_works_like_a_file_that_cannot_grow() {
    for (sector, cache, driver) in [
        ("4096", CacheMode::Direct, DriverChoice::IoUring),
        ("4096", CacheMode::Buffered, DriverChoice::Threads),
        ("512", CacheMode::Direct, DriverChoice::Threads),
    ] {
        let device = LoopDevice::new(sector);
        let storage = open(&device.path, cache, driver);
        let capabilities = storage.capabilities();
        assert_eq!(capabilities.set_len, Capability::Unsupported);
        assert_eq!(capabilities.write_zeroes, Capability::Native);
        block_on(async {
            assert_eq!(storage.len().await.expect("has a length"), DEVICE_BYTES);
            let mut model = vec![0; DEVICE_BYTES as usize];
            random_calls(&storage, &mut model, &mut Random::new(1)).await;
            storage.flush().await.expect("flushes");
            let error =
                storage.set_len(DEVICE_BYTES + 4096, Hold::none()).await.expect_err("cannot grow");
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            storage.set_len(DEVICE_BYTES, Hold::none()).await.expect("no change is fine");
            for (offset, len) in [(DEVICE_BYTES, 4096), (DEVICE_BYTES - 100, 200)] {
                let (result, _) = storage.write_at(HostOffset(offset), Buffer::zeroed(len)).await;
                assert_eq!(result.expect_err("no room").kind(), ErrorKind::NoSpace);
            }
            let past = range(DEVICE_BYTES - 8192, 65_536);
            let error = storage.allocate_at(past).await.expect_err("no room");
            assert_eq!(error.kind(), ErrorKind::NoSpace);
            storage.punch_hole_at(past, Hold::none()).await.expect("what is there is punched");
            let zeroed = storage.write_zeroes_at(past, ZeroMode::MayUnmap, Hold::none()).await;
            assert_eq!(zeroed.expect_err("no room").kind(), ErrorKind::NoSpace);
            let status = storage.status_at(range(0, DEVICE_BYTES)).await.expect("has a status");
            assert_eq!((status.status, status.len), (HostStatus::Data, DEVICE_BYTES));
            let status = storage.status_at(range(DEVICE_BYTES, 1)).await.expect("has a status");
            assert_eq!(status.status, HostStatus::Hole);
        });
    }
}

/// What a device holds nobody can know: it is data, and never known to be zero (000-5).
#[test]
#[ignore = "needs root and loop devices"]
fn a_block_device_is_never_known_to_be_zero() {
    let device = LoopDevice::new("512");
    let storage = || open(&device.path, CacheMode::Buffered, DriverChoice::Threads);
    block_on(async {
        let raw = Raw::open(storage()).await.expect("opens");
        assert_eq!(raw.known_zeroes().await.expect("knows nothing"), KnownZeroes::NOTHING);
        assert!(!is_all_zeroes(&raw).await.expect("looks"));
        let extents = raw.extents(raw.whole()).await.expect("has extents");
        assert_eq!(extents.len(), 1);
        assert!(!extents[0].status.reads_zero && !extents[0].status.is_hole);
        drop(raw);
        // An image on it knows of its own clusters all the same.
        let options = CreateOptions { size_bytes: 1 << 20, ..CreateOptions::default() };
        create(&storage(), &options).await.expect("makes an image");
        let parts = Parts::alone(storage());
        let options = OpenOptions::new(Access::ReadWrite).extent_detail(ExtentDetail::Host);
        let image = Image::open(parts, options).await.expect("opens");
        let bytes = Buffer::from(&[7; 65_536][..]);
        image.write(GuestOffset(65_536), bytes, WriteFlags::empty()).await.0.expect("writes");
        let extents = image.extents(image.whole()).await.expect("has extents");
        let zeros: Vec<_> = extents.iter().map(|extent| extent.status.reads_zero).collect();
        assert_eq!(zeros, [true, false, true]);
        image.close().await.expect("closes");
    });
}

/// A small tmpfs, unmounted again at the end.
struct SmallMount(tempfile::TempDir);

impl SmallMount {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a scratch folder can be made");
        let name = folder.path().to_str().expect("the path is plain");
        run("mount", &["-t", "tmpfs", "-o", "size=1m", "none", name]);
        Self(folder)
    }
}

impl Drop for SmallMount {
    fn drop(&mut self) {
        run("umount", &[self.0.path().to_str().expect("the path is plain")]);
    }
}

#[test]
#[ignore = "needs root to mount"]
fn a_full_file_system_is_told_as_no_space() {
    for cache in [CacheMode::Buffered, CacheMode::Direct] {
        for driver in [DriverChoice::IoUring, DriverChoice::Threads] {
            let mount = SmallMount::new();
            let options = FileOptions { cache, driver, ..FileOptions::replace() };
            let storage = FileStorage::open(mount.0.path().join("f"), &options).expect("opens");
            block_on(async {
                let (first, _) =
                    storage.write_at(HostOffset(0), Buffer::from(&[7; 8192][..])).await;
                first.expect("the first fits");
                for offset in [8192, 8000] {
                    let buffer = Buffer::zeroed(2 << 20);
                    let (result, buffer) = storage.write_at(HostOffset(offset), buffer).await;
                    assert_eq!(result.expect_err("no room").kind(), ErrorKind::NoSpace);
                    assert_eq!(buffer.len(), 2 << 20);
                }
                let reserved = storage.allocate_at(range(0, 4 << 20)).await;
                assert_eq!(reserved.expect_err("no room").kind(), ErrorKind::NoSpace);
                let (result, bytes) = storage.read_at(HostOffset(0), Buffer::new(8000)).await;
                result.expect("reads");
                assert!(bytes.iter().all(|byte| *byte == 7));
            });
            drop(storage);
        }
    }
}
