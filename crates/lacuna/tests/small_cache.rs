//! Caches that hold less than an operation looks at: slower, but it ends.
//!
//! A read too many is made to fail, so that a plan that starts over for ever fails a test instead
//! of hanging it.

use lacuna::block::{DiscardMode, Layer, WriteFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, Placement, Shrink, create};
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;
use testkit::SparseBytes;
use testkit::sim::{Fault, OperationKind, Pace, SimHost, SimStorage};

/// Reads that are allowed to one test, far fewer than starting over would make.
const PATIENCE: usize = 4_000;

fn made(host: &SimHost, cluster_bytes: u64, size_bytes: u64) -> SimStorage {
    host.order(Fault::io(OperationKind::Read, PATIENCE).forever());
    let storage = host.add_file(SparseBytes::default());
    let options = CreateOptions { size_bytes, cluster_bytes, ..CreateOptions::default() };
    block_on(create(&storage, &options)).unwrap();
    storage
}

/// With the smallest cache there is.
fn open(storage: &SimStorage) -> Image<SimStorage> {
    let options = OpenOptions::new(Access::ReadWrite).placement(Placement::TwoCursors);
    block_on(Image::open(Parts::alone(storage.clone()), options.cache_bytes(0))).unwrap()
}

fn write(image: &Image<SimStorage>, at: u64, len: usize) {
    let buffer = Buffer::from(&vec![7; len][..]);
    block_on(image.write(GuestOffset(at), buffer, WriteFlags::empty())).0.unwrap();
}

#[test]
fn shrinking_looks_through_refcount_blocks_larger_than_the_cache() {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let storage = made(&host, 2 << 20, 1 << 30);
    let image = open(&storage);
    write(&image, 0, 512);
    write(&image, 512 << 20, 512);
    block_on(image.flush()).unwrap();
    block_on(image.resize(2 << 20, Shrink::Allow)).unwrap();
    block_on(image.close()).unwrap();
}

#[test]
fn the_end_is_found_behind_more_unused_refcounts_than_the_cache_holds() {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    // Blocks of 512 bytes count 128 KiB of the file each.
    let storage = made(&host, 512, 32 << 20);
    let image = open(&storage);
    write(&image, 0, 24 << 20);
    block_on(image.discard(GuestRange::new(GuestOffset(1 << 20), 23 << 20), DiscardMode::Full))
        .unwrap();
    block_on(image.close()).unwrap();
    let image = open(&storage);
    let before = host.content(0).len();
    block_on(image.resize(1 << 20, Shrink::Allow)).unwrap();
    block_on(image.close()).unwrap();
    assert!(host.content(0).len() < before);
}

#[test]
fn a_run_is_placed_behind_more_used_refcounts_than_the_cache_holds() {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let storage = made(&host, 512, 64 << 20);
    let image = open(&storage);
    write(&image, 0, 24 << 20);
    block_on(image.close()).unwrap();
    let image = open(&storage);
    write(&image, 32 << 20, 4096);
    block_on(image.close()).unwrap();
}
