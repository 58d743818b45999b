//! Dirty bitmaps are read as QEMU's programs left them, with what we changed since.

use std::sync::Arc;

use lacuna::block::Layer;
use lacuna::qcow2::{Access, DirtyBitmap, Image, Shrink};
use lacuna::storage::MemoryStorage;
use lacuna::{Error, ErrorKind};
use pollster::block_on;
use testkit::Random;

use super::{Memory, Stock, discard, open, range, write, zero};

const KIB: u64 = 1 << 10;

fn bitmap(image: &Image<Memory>, name: &str) -> DirtyBitmap<Memory> {
    block_on(image.bitmap(&name.into())).unwrap()
}

fn refused(image: &Image<Memory>, name: &str) -> Error {
    block_on(image.bitmap(&name.into())).unwrap_err()
}

/// The dirty ranges: start and length.
fn dirty(bitmap: &DirtyBitmap<Memory>) -> Vec<(u64, u64)> {
    let mut ranges = bitmap.ranges();
    let next = || block_on(ranges.next()).unwrap();
    std::iter::from_fn(next).map(|range| (range.start.0, range.len)).collect()
}

/// The same, put together from answers about parts of the disk, with few extents each.
fn dirty_by_extents(bitmap: &DirtyBitmap<Memory>, size: u64, step: u64) -> Vec<(u64, u64)> {
    let mut found: Vec<(u64, u64)> = Vec::new();
    let mut at = 0;
    while at < size {
        let asked = range(at, step.min(size - at));
        let told = block_on(bitmap.extents(asked, 2)).unwrap();
        assert!((1..=2).contains(&told.len()), "{told:?}");
        for extent in told {
            assert_eq!(extent.range.start.0, at);
            at = extent.range.end().0;
            match found.last_mut() {
                _ if !extent.is_dirty => {}
                Some(last) if last.0 + last.1 == extent.range.start.0 => last.1 += extent.range.len,
                _ => found.push((extent.range.start.0, extent.range.len)),
            }
        }
        assert!(at <= asked.end().0);
    }
    found
}

#[test]
fn bitmaps_of_stock_are_listed_with_what_can_be_done_with_them() {
    let stock = Stock::create("compat=1.1", "4M");
    stock.img(&["bitmap", "--add", "a.qcow2", "first"]);
    stock.img(&["bitmap", "--add", "--disable", "-g", "512", "a.qcow2", "second"]);
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let image = open(&stock.load(), access);
        let facts = block_on(image.bitmaps()).unwrap();
        let seen: Vec<_> = facts
            .iter()
            .map(|it| (it.name.to_string(), it.granularity_bytes, it.is_enabled, it.is_in_use))
            .collect();
        let expected =
            [("first".into(), 64 * KIB, true, false), ("second".into(), 512, false, false)];
        assert_eq!(seen, expected);
        assert!(facts.iter().all(|it| it.problem.is_none()));
        assert_eq!(refused(&image, "third").kind(), ErrorKind::NotFound);
    }
}

#[test]
fn what_stock_marked_is_read_in_guest_order() {
    for granularity in [512, 4 * KIB, 64 * KIB, 1 << 20] {
        let stock = Stock::create("compat=1.1,cluster_size=4k", "40M");
        let text = granularity.to_string();
        stock.img(&["bitmap", "--add", "-g", &text, "a.qcow2", "b"]);
        let writes =
            [(0, 512), (4096, 8192), (5 << 20, 3 << 20), (33 << 20, 512), (40955 << 10, 5120)];
        for (at, len) in writes {
            stock.io(&[&format!("write {at} {len}")]);
        }
        let mut expected: Vec<(u64, u64)> = Vec::new();
        for (at, len) in writes {
            let start = at / granularity * granularity;
            let end = (at + len).next_multiple_of(granularity).min(40 << 20);
            match expected.last_mut() {
                Some(last) if start <= last.0 + last.1 => {
                    last.1 = end.max(last.0 + last.1) - last.0;
                }
                _ => expected.push((start, end - start)),
            }
        }
        let image = open(&stock.load(), Access::ReadOnly);
        let bitmap = bitmap(&image, "b");
        assert_eq!(bitmap.granularity_bytes(), granularity);
        assert_eq!(dirty(&bitmap), expected, "{granularity}");
        for step in [40 << 20, 3 << 20, 10_000 * 512] {
            assert_eq!(dirty_by_extents(&bitmap, 40 << 20, step), expected, "{granularity} {step}");
        }
    }
}

#[test]
fn what_is_written_here_shows_at_once_and_after_closing() {
    let stock = Stock::create("compat=1.1,cluster_size=4k", "8M");
    stock.io(&["write -P 1 0 8M"]);
    stock.img(&["bitmap", "--add", "-g", "4k", "a.qcow2", "on"]);
    stock.img(&["bitmap", "--add", "--disable", "-g", "4k", "a.qcow2", "off"]);
    stock.io(&["write 1M 4k"]);
    let storage = stock.load();
    let image = open(&storage, Access::ReadWrite);
    let (on, off) = (bitmap(&image, "on"), bitmap(&image, "off"));
    assert_eq!(dirty(&on), [(1024 * KIB, 4 * KIB)]);
    write(&image, 512, 2, 512);
    zero(&image, range(1028 * KIB, 4 * KIB));
    discard(&image, range(4096 * KIB, 64 * KIB));
    let expected = [(0, 4 * KIB), (1024 * KIB, 8 * KIB), (4096 * KIB, 64 * KIB)];
    assert_eq!(dirty(&on), expected);
    assert_eq!(dirty_by_extents(&on, 8 << 20, 1 << 20), expected);
    assert_eq!(dirty(&off), []);
    // In use by us is no reason to refuse, for whoever asks this image.
    assert!(block_on(image.bitmaps()).unwrap().iter().all(|it| it.problem.is_none()));
    assert_eq!(dirty(&bitmap(&image, "on")), expected);
    // Somebody who reads the file alone is told of whole regions: what is marked is here only.
    let other = open(&storage, Access::ReadOnly);
    assert_eq!(dirty(&bitmap(&other, "on")), [(0, 2 << 20), (4 << 20, 1 << 20)]);
    let facts = block_on(other.bitmaps()).unwrap();
    assert!(facts.iter().all(|it| it.problem.is_none()), "{facts:?}");
    block_on(image.close()).unwrap();
    assert_eq!(dirty(&on), expected, "a handle lives on after the image was closed");
    let image = open(&storage, Access::ReadOnly);
    assert_eq!(dirty(&bitmap(&image, "on")), expected);
    assert_eq!(dirty(&bitmap(&image, "off")), []);
}

#[test]
fn random_changes_are_told_as_a_model_has_them() {
    const SIZE: u64 = 16 << 20;
    for (seed, granularity) in [(1, 512), (2, 4096), (3, 65536)] {
        let stock = Stock::create("compat=1.1,cluster_size=512", "16M");
        stock.img(&["bitmap", "--add", "-g", &granularity.to_string(), "a.qcow2", "b"]);
        stock.io(&["write 3M 2M"]);
        let image = open(&stock.load(), Access::ReadWrite);
        let bitmap = bitmap(&image, "b");
        let mut model = vec![false; (SIZE / granularity) as usize];
        let note = |model: &mut Vec<bool>, at: u64, len: u64| {
            let end = (at + len).div_ceil(granularity);
            model[(at / granularity) as usize..end as usize].fill(true);
        };
        note(&mut model, 3 << 20, 2 << 20);
        let mut random = Random::new(seed);
        for _ in 0..60 {
            let (at, len) = (random.below(SIZE / 512 - 64) * 512, (1 + random.below(64)) * 512);
            match random.below(3) {
                0 => zero(&image, range(at, len)),
                _ => write(&image, at, 1, len),
            }
            note(&mut model, at, len);
            let mut expected: Vec<(u64, u64)> = Vec::new();
            for (index, _) in model.iter().enumerate().filter(|(_, dirty)| **dirty) {
                let start = index as u64 * granularity;
                match expected.last_mut() {
                    Some(last) if last.0 + last.1 == start => last.1 += granularity,
                    _ => expected.push((start, granularity)),
                }
            }
            assert_eq!(dirty(&bitmap), expected, "seed {seed}");
        }
        assert_eq!(dirty_by_extents(&bitmap, SIZE, SIZE), dirty(&bitmap));
    }
}

#[test]
fn an_opened_bitmap_follows_a_disk_that_gets_another_size() {
    let stock = Stock::create("compat=1.1,cluster_size=512", "1M");
    for (name, flag) in [("on", "--enable"), ("off", "--disable")] {
        stock.img(&["bitmap", "--add", flag, "-g", "512", "a.qcow2", name]);
    }
    stock.img(&["bitmap", "--enable", "a.qcow2", "off"]);
    stock.io(&["write 512k 64k"]);
    stock.img(&["bitmap", "--disable", "a.qcow2", "off"]);
    let image = open(&stock.load(), Access::ReadWrite);
    let (on, off) = (bitmap(&image, "on"), bitmap(&image, "off"));
    let before = [(512 * KIB, 64 * KIB)];
    assert_eq!((dirty(&on), dirty(&off)), (before.to_vec(), before.to_vec()));
    block_on(image.resize(64 << 20, Shrink::Refuse)).unwrap();
    // Old tables and what was freed with them are used for something else.
    write(&image, 0, 1, 512 * KIB);
    block_on(image.flush()).unwrap();
    write(&image, 2 << 20, 1, 4096);
    assert_eq!(dirty(&off), before);
    let grown = (1 << 20, 63 << 20);
    assert_eq!(dirty(&on), [(0, 576 * KIB), grown]);
    block_on(image.resize(256 << 10, Shrink::Allow)).unwrap();
    assert_eq!((dirty(&on), dirty(&off)), (vec![(0, 256 * KIB)], vec![]));
    let past = block_on(on.extents(range(256 << 10, 512), 1)).unwrap_err();
    assert_eq!(past.kind(), ErrorKind::OutOfBounds);
    block_on(image.close()).unwrap();
}

/// Where the directory of the bitmaps lies (B.3, B.10).
fn directory(image: &[u8]) -> usize {
    let magic = 0x2385_2875_u32.to_be_bytes();
    let extension = image.windows(4).position(|window| window == magic).unwrap();
    number(image, extension + 24) as usize
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// An image of 64 MiB with one bitmap in which everything is dirty or nothing, by its table.
struct Hostile {
    bytes: Vec<u8>,
    entry: usize,
}

impl Hostile {
    fn new() -> Self {
        let stock = Stock::create("compat=1.1,cluster_size=512", "64M");
        stock.img(&["bitmap", "--add", "-g", "512", "a.qcow2", "b"]);
        let bytes = std::fs::read(stock.path()).unwrap();
        let entry = directory(&bytes);
        Self { bytes, entry }
    }

    fn table(&self) -> usize {
        number(&self.bytes, self.entry) as usize
    }

    fn patch(mut self, at: usize, bytes: &[u8]) -> Self {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn open(&self) -> Image<Memory> {
        open(&Arc::new(MemoryStorage::from(&self.bytes[..])), Access::ReadOnly)
    }
}

#[test]
fn a_bitmap_that_cannot_be_true_is_refused() {
    let entry = Hostile::new().entry;
    let table = Hostile::new().table();
    // Table offset and entries, flags, type and granularity stand at 0, 8, 12, 16, 17 (B.10).
    for (at, bytes, kind, text) in [
        (entry, &0x201_u64.to_be_bytes()[..], ErrorKind::Corrupt, "multiple of the cluster size"),
        (entry, &(1_u64 << 40).to_be_bytes()[..], ErrorKind::Corrupt, "passes the end of the file"),
        (entry, &u64::MAX.to_be_bytes()[..], ErrorKind::Corrupt, "multiple of the cluster size"),
        (entry + 8, &[0; 4][..], ErrorKind::Corrupt, "entries"),
        (entry + 8, &[0xff; 4][..], ErrorKind::Corrupt, "entries"),
        (entry + 8, &[0, 0, 0, 1][..], ErrorKind::Corrupt, "does not cover"),
        (entry + 8, &[0, 0x10, 0, 0][..], ErrorKind::Corrupt, "passes the end of the file"),
        (entry + 12, &[0, 0, 0, 3][..], ErrorKind::Corrupt, "marked in use"),
        (entry + 12, &[0, 0, 1, 2][..], ErrorKind::Unsupported, "Flags 0x100"),
        (entry + 16, &[2][..], ErrorKind::Unsupported, "Type 2"),
        (entry + 17, &[8][..], ErrorKind::Corrupt, "Granularity"),
        (entry + 17, &[200][..], ErrorKind::Corrupt, "Granularity"),
        (table + 8, &(1_u64 << 56).to_be_bytes()[..], ErrorKind::Corrupt, "entry 1 "),
        (table + 8, &0x401_u64.to_be_bytes()[..], ErrorKind::Corrupt, "entry 1 "),
        (table + 16, &(1_u64 << 40).to_be_bytes()[..], ErrorKind::Corrupt, "entry 2 "),
    ] {
        let image = Hostile::new().patch(at, bytes).open();
        let error = refused(&image, "b");
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn entries_without_data_are_all_clear_or_all_set() {
    let hostile = Hostile::new();
    let table = hostile.table();
    // A cluster of 512 bytes has the bits of 2 MiB.
    let set = 1_u64.to_be_bytes();
    let hostile =
        hostile.patch(table + 8, &set).patch(table + 16, &set).patch(table + 31 * 8, &set);
    let image = hostile.open();
    let bitmap = bitmap(&image, "b");
    let expected = [(2 << 20, 4 << 20), (62 << 20, 2 << 20)];
    assert_eq!(dirty(&bitmap), expected);
    assert_eq!(dirty_by_extents(&bitmap, 64 << 20, 64 << 20), expected);
}

#[test]
fn a_bitmap_that_an_old_program_wrote_past_is_not_there() {
    let hostile = Hostile::new();
    // The autoclear bits stand at 88 of the header.
    let image = hostile.patch(88, &[0; 8]).open();
    assert!(block_on(image.bitmaps()).unwrap().is_empty());
    let error = refused(&image, "b");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("outdated"), "{error}");
}

#[test]
fn of_two_bitmaps_of_one_name_the_second_is_refused() {
    let stock = Stock::create("compat=1.1", "1M");
    stock.img(&["bitmap", "--add", "a.qcow2", "b"]);
    stock.img(&["bitmap", "--add", "a.qcow2", "c"]);
    let mut bytes = std::fs::read(stock.path()).unwrap();
    let second = directory(&bytes) + 32;
    bytes[second + 24] = b'b';
    let image = open(&Arc::new(MemoryStorage::from(&bytes[..])), Access::ReadOnly);
    let problems: Vec<_> =
        block_on(image.bitmaps()).unwrap().into_iter().map(|it| it.problem.is_some()).collect();
    assert_eq!(problems, [false, true]);
    assert_eq!(dirty(&bitmap(&image, "b")), []);
}
