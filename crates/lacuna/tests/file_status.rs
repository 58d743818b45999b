//! What a file's status says: data, holes and reserved space, and never zero of what was written.
//!
//! Needs a file system that tells its extents (ext4, XFS, btrfs) under the scratch folder.

#![cfg(target_os = "linux")]

use lacuna::buffer::{Buffer, Hold};
use lacuna::storage::{
    CacheMode, Capability, FileOptions, FileStorage, HostExtent, HostStatus, Storage, ZeroMode,
};
use lacuna::units::{HostOffset, HostRange};
use pollster::block_on;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

fn range(start: u64, len: u64) -> HostRange {
    HostRange::new(HostOffset(start), len)
}

fn new_file(cache: CacheMode) -> (TempDir, FileStorage) {
    let folder = tempfile::tempdir().expect("a scratch folder can be made");
    let options = FileOptions { cache, ..FileOptions::replace() };
    let storage = FileStorage::open(folder.path().join("image"), &options);
    (folder, storage.expect("the scratch file opens"))
}

fn write(storage: &FileStorage, offset: u64, len: usize) {
    let buffer = Buffer::from(&vec![7; len][..]);
    block_on(storage.write_at(HostOffset(offset), buffer)).0.expect("the file can be written");
}

fn read(storage: &FileStorage, offset: u64, len: usize) {
    let (result, _) = block_on(storage.read_at(HostOffset(offset), Buffer::new(len)));
    result.expect("the file can be read");
}

/// All runs of a range, equal neighbours joined.
fn runs(storage: &FileStorage, start: u64, end: u64) -> Vec<(HostStatus, u64)> {
    let mut runs: Vec<(HostStatus, u64)> = Vec::new();
    let mut at = start;
    while at < end {
        let extent = block_on(storage.status_at(range(at, end - at))).expect("it has a status");
        match runs.last_mut() {
            Some((status, len)) if *status == extent.status => *len += extent.len,
            _ => runs.push((extent.status, extent.len)),
        }
        at += extent.len;
    }
    runs
}

#[test]
fn a_reserved_range_is_unwritten_and_a_gap_is_a_hole() {
    let (_folder, storage) = new_file(CacheMode::Buffered);
    block_on(storage.allocate_at(range(0, MIB))).expect("space can be reserved");
    block_on(storage.set_len(2 * MIB, Hold::none())).expect("the length can be set");
    let expected = [(HostStatus::Unwritten, MIB), (HostStatus::Hole, 2 * MIB)];
    assert_eq!(runs(&storage, 0, 3 * MIB), expected);
}

/// ext4 calls dirty pages in a reserved range unwritten when asked without writeback: whoever
/// believes that loses them.
#[test]
fn buffered_data_in_a_reserved_range_is_data_before_any_flush() {
    let (_folder, storage) = new_file(CacheMode::Buffered);
    block_on(storage.allocate_at(range(0, MIB))).expect("space can be reserved");
    write(&storage, 65_536, 4096);
    write(&storage, 300_000, 10);
    let expected = [
        (HostStatus::Unwritten, 65_536),
        (HostStatus::Data, 4096),
        (HostStatus::Unwritten, 299_008 - 69_632),
        (HostStatus::Data, 4096),
        (HostStatus::Unwritten, MIB - 303_104),
    ];
    assert_eq!(runs(&storage, 0, MIB), expected);
    block_on(storage.flush()).expect("the file can be flushed");
    assert_eq!(runs(&storage, 0, MIB), expected);
}

/// Reading puts clean pages into the cache, which SEEK_DATA takes for data; the map knows better.
#[test]
fn a_reserved_range_that_was_read_is_still_unwritten() {
    let (_folder, storage) = new_file(CacheMode::Buffered);
    block_on(storage.allocate_at(range(0, MIB))).expect("space can be reserved");
    read(&storage, 0, 65_536);
    write(&storage, 131_072, 4096);
    read(&storage, 0, MIB as usize);
    let expected = [
        (HostStatus::Unwritten, 131_072),
        (HostStatus::Data, 4096),
        (HostStatus::Unwritten, MIB - 135_168),
    ];
    assert_eq!(runs(&storage, 0, MIB), expected);
}

#[test]
fn data_written_past_the_cache_is_data() {
    let (_folder, storage) = new_file(CacheMode::Direct);
    block_on(storage.allocate_at(range(0, MIB))).expect("space can be reserved");
    write(&storage, 65_536, 4096);
    let expected = [
        (HostStatus::Unwritten, 65_536),
        (HostStatus::Data, 4096),
        (HostStatus::Unwritten, MIB - 69_632),
    ];
    assert_eq!(runs(&storage, 0, MIB), expected);
}

#[test]
fn an_answer_starts_and_ends_where_the_question_does() {
    let (_folder, storage) = new_file(CacheMode::Buffered);
    write(&storage, 0, 10_000);
    let ask = |start, len| block_on(storage.status_at(range(start, len))).expect("has a status");
    assert_eq!(ask(100, 1000), HostExtent { len: 1000, status: HostStatus::Data });
    // The last page belongs to the file up to its end only.
    assert_eq!(ask(9000, 10_000), HostExtent { len: 1000, status: HostStatus::Data });
    assert_eq!(ask(10_000, 10_000), HostExtent { len: 10_000, status: HostStatus::Hole });
    block_on(storage.set_len(20_000, Hold::none())).expect("the length can be set");
    assert_eq!(ask(15_001, 10_000), HostExtent { len: 4999, status: HostStatus::Hole });
}

#[test]
fn a_file_in_more_pieces_than_one_answer_holds_is_told_in_full() {
    let (_folder, storage) = new_file(CacheMode::Buffered);
    const PIECES: u64 = 100;
    for piece in 0..PIECES {
        write(&storage, piece * 131_072, 65_536);
    }
    let found = runs(&storage, 0, PIECES * 131_072);
    assert_eq!(found.len() as u64, 2 * PIECES);
    for pair in found.chunks(2) {
        assert_eq!(pair, [(HostStatus::Data, 65_536), (HostStatus::Hole, 65_536)]);
    }
}

#[test]
fn zeroing_leaves_reserved_space_or_a_hole_as_asked() {
    let (_folder, storage) = new_file(CacheMode::Buffered);
    assert_eq!(storage.capabilities().write_zeroes, Capability::Native);
    write(&storage, 0, MIB as usize);
    let zero = |start, mode| {
        block_on(storage.write_zeroes_at(range(start, 65_536), mode, Hold::none()))
            .expect("a range can be zeroed");
    };
    zero(65_536, ZeroMode::MayUnmap);
    zero(2 * 65_536, ZeroMode::Allocate);
    let expected = [
        (HostStatus::Data, 65_536),
        (HostStatus::Hole, 65_536),
        (HostStatus::Unwritten, 65_536),
        (HostStatus::Data, MIB - 3 * 65_536),
    ];
    assert_eq!(runs(&storage, 0, MIB), expected);
}

#[test]
fn pages_written_behind_a_question_under_way_are_never_called_zero() {
    let (_folder, storage) = new_file(CacheMode::Buffered);
    const PAGES: u64 = 256;
    block_on(storage.allocate_at(range(0, PAGES * 4096))).expect("space can be reserved");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for page in 0..PAGES {
                write(&storage, page * 4096, 4096);
                let found = block_on(storage.status_at(range(page * 4096, 4096)));
                assert_eq!(found.expect("it has a status").status, HostStatus::Data, "page {page}");
            }
        });
        scope.spawn(|| {
            for _ in 0..100 {
                runs(&storage, 0, PAGES * 4096);
            }
        });
    });
    assert_eq!(runs(&storage, 0, PAGES * 4096), [(HostStatus::Data, PAGES * 4096)]);
}
