//! Every storage keeps the contract: memory, and files in every combination of driver and cache,
//! on the file system of the scratch folder (ext4, mostly) and on tmpfs.

#![cfg(target_os = "linux")]

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use lacuna::ErrorKind;
use lacuna::storage::{
    CacheMode, Create, DriverChoice, FileOptions, FileStorage, MemoryStorage, Storage,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use testkit::storage_conformance;

const TMPFS: &str = "/dev/shm";

fn options(cache: CacheMode, driver: DriverChoice) -> FileOptions {
    FileOptions { cache, driver, create: Create::Exclusive, ..FileOptions::read_write() }
}

/// Makes a new file per call; the folder goes with the closure.
fn files(place: &Path, options: FileOptions) -> impl Fn() -> Arc<FileStorage> {
    let folder = tempfile::tempdir_in(place).expect("a scratch folder can be made");
    let count = AtomicU64::new(0);
    move || {
        let name = count.fetch_add(1, Ordering::Relaxed).to_string();
        let storage = FileStorage::open(folder.path().join(name), &options);
        Arc::new(storage.expect("the scratch file opens"))
    }
}

/// Says whether a place takes O_DIRECT at all; a refusal must be told as such.
fn takes_direct(place: &Path) -> bool {
    let folder = tempfile::tempdir_in(place).expect("a scratch folder can be made");
    let options = options(CacheMode::Direct, DriverChoice::Threads);
    match FileStorage::open(folder.path().join("probe"), &options) {
        Ok(_) => true,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            false
        }
    }
}

fn conforms(place: &Path, cache: CacheMode, driver: DriverChoice) {
    if cache != CacheMode::Direct || takes_direct(place) {
        storage_conformance(files(place, options(cache, driver)));
    }
}

/// Stands for an event loop of somebody else's: polls the eventfd and takes up completions.
fn run_loop(event_fd: &OwnedFd, storage: &Weak<FileStorage>) {
    // Looks from time to time whether there is a storage yet.
    let timeout = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
    loop {
        let mut waits = [PollFd::new(event_fd, PollFlags::IN)];
        let ready = poll(&mut waits, Some(&timeout)).expect("poll works");
        let Some(storage) = storage.upgrade() else { return };
        if ready > 0 {
            storage.complete().expect("the eventfd can be read");
        }
    }
}

fn conforms_with_foreign_loop(place: &Path, cache: CacheMode) {
    let make = files(place, options(cache, DriverChoice::External));
    storage_conformance(|| {
        let storage = make();
        let event_fd = storage.event_fd().expect("the driver is External");
        let event_fd = event_fd.try_clone_to_owned().expect("a descriptor can be copied");
        let weak = Arc::downgrade(&storage);
        std::thread::spawn(move || run_loop(&event_fd, &weak));
        assert!(storage.as_fd().try_clone_to_owned().is_ok());
        storage
    });
}

#[test]
fn memory_conforms() {
    storage_conformance(MemoryStorage::new);
    storage_conformance(|| Arc::new(MemoryStorage::new()));
}

#[test]
fn simulated_storage_conforms() {
    use testkit::SparseBytes;
    use testkit::sim::{Pace, SimHost};
    storage_conformance(|| {
        SimHost::without_record(Pace::AtOnce, 1).add_file(SparseBytes::default())
    });
}

#[test]
fn buffered_file_conforms_with_io_uring() {
    conforms(&std::env::temp_dir(), CacheMode::Buffered, DriverChoice::IoUring);
}

#[test]
fn buffered_file_conforms_with_threads() {
    conforms(&std::env::temp_dir(), CacheMode::Buffered, DriverChoice::Threads);
}

#[test]
fn buffered_file_conforms_with_a_foreign_loop() {
    conforms_with_foreign_loop(&std::env::temp_dir(), CacheMode::Buffered);
}

#[test]
fn direct_file_conforms_with_io_uring() {
    conforms(&std::env::temp_dir(), CacheMode::Direct, DriverChoice::IoUring);
}

#[test]
fn direct_file_conforms_with_threads() {
    conforms(&std::env::temp_dir(), CacheMode::Direct, DriverChoice::Threads);
}

#[test]
fn direct_file_conforms_with_a_foreign_loop() {
    let place = std::env::temp_dir();
    if takes_direct(&place) {
        conforms_with_foreign_loop(&place, CacheMode::Direct);
    }
}

#[test]
fn file_with_large_writes_past_the_cache_conforms() {
    for driver in [DriverChoice::IoUring, DriverChoice::Threads] {
        conforms(&std::env::temp_dir(), CacheMode::LargeWritesDirect, driver);
    }
}

/// Large writes past the cache and small ones through it, over each other.
#[test]
fn writes_of_both_ways_meet_in_one_file() {
    use lacuna::buffer::Buffer;
    use lacuna::storage::Storage;
    use lacuna::units::HostOffset;
    use pollster::block_on;
    const SIZE: usize = 8 << 20;
    let seed = testkit::seeds(1).next().expect("a seed");
    println!("seed {seed}");
    let mut random = testkit::Random::new(seed);
    let folder = tempfile::tempdir().expect("a scratch folder can be made");
    let path = folder.path().join("file");
    let options = options(CacheMode::LargeWritesDirect, DriverChoice::Auto);
    let storage = FileStorage::open(&path, &options).expect("the file opens");
    let mut model = vec![0; SIZE];
    for step in 0..200 {
        let unit = *random.pick(&[1, 512, 4096, 65536]);
        let start = random.index(SIZE) / unit * unit;
        let len = (1 + random.index(2 << 20)).next_multiple_of(unit).min(SIZE - start);
        let len = if random.one_in(2) { len.min(unit * 3) } else { len };
        let byte = step as u8 + 1;
        let bytes = Buffer::from(&vec![byte; len][..]);
        block_on(storage.write_at(HostOffset(start as u64), bytes)).0.expect("writes");
        model[start..start + len].fill(byte);
        let (from, many) = (random.index(SIZE), 1 + random.index(1 << 20));
        let many = many.min(SIZE - from);
        let (result, read) = block_on(storage.read_at(HostOffset(from as u64), Buffer::new(many)));
        result.expect("reads");
        assert!(read[..] == model[from..from + many], "step {step}");
    }
    block_on(storage.flush()).expect("flushes");
    let stored = std::fs::read(&path).expect("the file is there");
    assert!(stored[..] == model[..stored.len()]);
}

#[test]
fn tmpfs_file_conforms_in_every_combination() {
    for cache in [CacheMode::Buffered, CacheMode::Direct, CacheMode::LargeWritesDirect] {
        for driver in [DriverChoice::IoUring, DriverChoice::Threads] {
            conforms(Path::new(TMPFS), cache, driver);
        }
    }
}

#[test]
fn a_storage_opened_for_reading_refuses_every_change() {
    use lacuna::buffer::{Buffer, Hold};
    use lacuna::storage::ZeroMode;
    use lacuna::units::{HostOffset, HostRange};
    let file = tempfile::NamedTempFile::new().expect("a scratch file can be made");
    let storage =
        FileStorage::open(file.path(), &FileOptions::read_only()).expect("the file opens");
    let range = HostRange::new(HostOffset(0), 512);
    pollster::block_on(async {
        let results = [
            storage.write_at(HostOffset(0), Buffer::zeroed(1)).await.0,
            storage.write_zeroes_at(range, ZeroMode::MayUnmap, Hold::none()).await,
            storage.punch_hole_at(range, Hold::none()).await,
            storage.allocate_at(range).await,
            storage.set_len(1, Hold::none()).await,
        ];
        for result in results {
            assert_eq!(result.expect_err("a change").kind(), ErrorKind::ReadOnly);
        }
        assert!(!storage.capabilities().writable);
        assert!(storage.is_empty().await.expect("has a length"));
    });
}
