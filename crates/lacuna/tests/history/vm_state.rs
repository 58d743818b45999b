//! The state of a virtual machine, exchanged with stock: behind the disk, and in no guest's sight.

use lacuna::ErrorKind;
use lacuna::qcow2::{Access, Image, OpenOptions, Shrink, SnapshotChoice};
use lacuna::storage::Storage as _;
use lacuna::units::HostOffset;
use pollster::block_on;

use super::*;

/// Layouts, and how far apart tables are: the state of the first spans several.
const LAYOUTS: [&str; 4] = [
    "compat=1.1,cluster_size=512",
    "compat=0.10",
    "compat=1.1,refcount_bits=64",
    "compat=1.1,extended_l2=on,cluster_size=16k",
];

fn write_state(image: &Image<Memory>, at: u64, byte: u8, len: usize) {
    let bytes = Buffer::from(&vec![byte; len][..]);
    block_on(image.write_vm_state(at, bytes)).0.unwrap();
}

fn state(image: &Image<Memory>, at: u64, len: usize) -> Vec<u8> {
    let (result, bytes) = block_on(image.read_vm_state(at, Buffer::new(len)));
    result.unwrap();
    bytes.to_vec()
}

impl Stock {
    /// Puts an image that was changed in memory back, and has it checked.
    fn store(&self, storage: &Memory) {
        let len = block_on(storage.len()).unwrap();
        let bytes = Buffer::new(len as usize);
        let (result, bytes) = block_on(storage.read_at(HostOffset(0), bytes));
        result.unwrap();
        std::fs::write(self.path(), &bytes[..]).unwrap();
        self.img(&["check", "-q", "a.qcow2"]);
    }
}

#[test]
fn stock_reads_what_we_write_and_we_what_stock_writes() {
    for layout in LAYOUTS {
        let stock = Stock::create(layout, "1000k");
        stock.io(&["write -P 1 0 1000k", "write -b -P 2 4k 100k"]);
        let storage = stock.load();
        let image = open(&storage, Access::ReadWrite);
        assert_eq!(state(&image, 0, 4096), [0; 4096], "{layout}");
        assert_eq!(state(&image, 4096, 102_400), vec![2; 102_400], "{layout}");
        // Part of a cluster, over what is there; and far behind.
        write_state(&image, 5120, 3, 1024);
        write_state(&image, 3 << 20, 4, 512);
        assert!(content(&image) == vec![1; 1000 << 10], "{layout}");
        block_on(image.close()).unwrap();
        stock.store(&storage);
        stock.io(&[
            "read -b -P 2 4k 1k",
            "read -b -P 3 5k 1k",
            "read -b -P 2 6k 98k",
            "read -b -P 4 3M 512",
            "read -b -P 0 3146240 4k",
            "read -P 1 0 1000k",
        ]);
    }
}

#[test]
fn a_snapshot_keeps_it() {
    let stock = Stock::create("compat=1.1", "1M");
    let storage = stock.load();
    let image = open(&storage, Access::ReadWrite);
    write_state(&image, 0, 7, 102_400);
    block_on(image.create_snapshot(&"s".into(), std::time::UNIX_EPOCH)).unwrap();
    write_state(&image, 0, 8, 102_400);
    block_on(image.apply_snapshot(&SnapshotChoice::Name("s".into()))).unwrap();
    assert_eq!(state(&image, 0, 102_400), vec![7; 102_400]);
    block_on(image.close()).unwrap();
    stock.store(&storage);
    stock.io(&["read -b -P 7 0 100k"]);
}

#[test]
fn nothing_comes_from_the_backing_file_and_bitmaps_hear_nothing() {
    let base = Stock::create("compat=1.1", "64M");
    base.io(&["write -P 9 0 64M"]);
    let bytes = base.content(None);
    std::fs::write(base.folder.path().join("base.raw"), bytes).unwrap();
    let stock = Stock::create("compat=1.1,cluster_size=4k", "1M");
    stock.img(&["bitmap", "--add", "-g", "4k", "a.qcow2", "b"]);
    let storage = stock.load();
    let path = base.folder.path().join("base.raw");
    let image = open_over(&storage, &path, OpenOptions::new(Access::ReadWrite));
    assert_eq!(state(&image, 0, 5000), [0; 5000]);
    write_state(&image, 1000, 7, 10);
    assert_eq!(state(&image, 0, 1000), [0; 1000]);
    assert_eq!(state(&image, 1010, 5000), [0; 5000]);
    let bitmap = block_on(image.bitmap(&"b".into())).unwrap();
    assert_eq!(block_on(bitmap.ranges().next()).unwrap(), None);
}

#[test]
fn another_size_of_the_disk_ends_it_and_shows_none_of_it() {
    for (layout, size) in [("compat=1.1,cluster_size=4k", 9 << 20), ("compat=0.10", 512 << 10)] {
        let stock = Stock::create(layout, "1M");
        stock.io(&["write -P 1 0 1M", "write -b -P 2 0 4M"]);
        let storage = stock.load();
        let image = open(&storage, Access::ReadWrite);
        block_on(image.resize(size, Shrink::Allow)).unwrap();
        let mut expected = vec![1; 1 << 20];
        expected.resize(size as usize, 0);
        assert!(content(&image) == expected, "{layout}");
        assert_eq!(state(&image, 0, 1 << 20), vec![0; 1 << 20], "{layout}");
        block_on(image.close()).unwrap();
        // No leak either: the check says so.
        stock.store(&storage);
    }
}

#[test]
fn what_cannot_be_mapped_or_kept_is_refused() {
    let stock = Stock::create("compat=1.1,cluster_size=512", "1M");
    let image = open(&stock.load(), Access::ReadWrite);
    for at in [1 << 40, u64::MAX - 10, u64::MAX] {
        let (result, _) = block_on(image.write_vm_state(at, Buffer::zeroed(512)));
        assert_eq!(result.unwrap_err().kind(), ErrorKind::OutOfBounds, "{at}");
        let (result, _) = block_on(image.read_vm_state(at, Buffer::zeroed(512)));
        assert_eq!(result.unwrap_err().kind(), ErrorKind::OutOfBounds, "{at}");
    }
    let image = open(&stock.load(), Access::ReadOnly);
    let (result, _) = block_on(image.write_vm_state(0, Buffer::zeroed(512)));
    assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnly);
}
