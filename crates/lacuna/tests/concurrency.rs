//! One image, many threads: neighbours in one cluster never disturb each other.

use std::path::Path;
use std::pin::pin;
use std::process::Command;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::thread;

use lacuna::block::{DiscardMode, Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::{Access, Image, OpenOptions, Parts};
use lacuna::storage::MemoryStorage;
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;
use testkit::Random;

const THREADS: u64 = 4;
const STRIPE: u64 = 1024;
const DISK: u64 = 4 << 20;

/// Writes and reads only the stripes of its own number, which lie in everybody's clusters.
fn work(image: &Image<Arc<MemoryStorage>>, own: u64, seed: u64) -> Vec<u8> {
    let stripes = DISK / STRIPE / THREADS;
    let mut model = vec![0; stripes as usize];
    let mut random = Random::new(seed * 1_000_003 + own + 1);
    for _ in 0..800 {
        let stripe = random.below(stripes);
        let start = GuestOffset((stripe * THREADS + own) * STRIPE);
        let range = GuestRange::new(start, STRIPE);
        match random.below(10) {
            0..=4 => {
                let byte = 1 + random.below(255) as u8;
                let bytes = Buffer::from(&vec![byte; STRIPE as usize][..]);
                block_on(image.write(start, bytes, WriteFlags::empty())).0.unwrap();
                model[stripe as usize] = byte;
            }
            5 | 6 => {
                block_on(image.write_zeroes(range, ZeroFlags::MAY_UNMAP)).unwrap();
                model[stripe as usize] = 0;
            }
            // Less than a cluster: keeps the content, but takes the same locks.
            7 => block_on(image.discard(range, DiscardMode::Guest)).unwrap(),
            8 if random.below(8) == 0 => block_on(image.flush()).unwrap(),
            _ => {
                let (result, bytes) = block_on(image.read(start, Buffer::new(STRIPE as usize)));
                result.unwrap();
                let expected = model[stripe as usize];
                assert!(bytes.iter().all(|byte| *byte == expected), "stripe {stripe} of {own}");
            }
        }
    }
    model
}

fn create(path: &Path, options: &str, size_bytes: u64) {
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", options])
        .arg(path)
        .arg(size_bytes.to_string())
        .status()
        .expect("qemu-img: apt-get install qemu-utils");
    assert!(made.success());
}

fn run(options: &str, cache_bytes: u64, seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    create(&path, options, DISK);
    let storage = Arc::new(MemoryStorage::from(&std::fs::read(&path).unwrap()[..]));
    let open = OpenOptions::new(Access::ReadWrite).cache_bytes(cache_bytes);
    let image = block_on(Image::open(Parts::alone(storage.clone()), open)).unwrap();
    let models: Vec<_> = thread::scope(|scope| {
        let image = &image;
        let threads: Vec<_> =
            (0..THREADS).map(|own| scope.spawn(move || work(image, own, seed))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (own, model) in models.iter().enumerate() {
        for (stripe, expected) in model.iter().enumerate() {
            let start = GuestOffset((stripe as u64 * THREADS + own as u64) * STRIPE);
            let (result, bytes) = block_on(image.read(start, Buffer::new(STRIPE as usize)));
            result.unwrap();
            assert!(bytes.iter().all(|byte| byte == expected), "{options} seed {seed}: {start}");
        }
    }
    block_on(image.close()).unwrap();
    std::fs::write(&path, storage.to_vec()).unwrap();
    let check = Command::new("qemu-img").arg("check").arg(&path).output().unwrap();
    assert!(check.status.success(), "{options} seed {seed}: {check:?}");
}

#[test]
fn threads_that_share_clusters_keep_their_own_bytes() {
    for options in [
        "compat=1.1",
        "compat=0.10",
        "cluster_size=4096",
        "extended_l2=on",
        "cluster_size=2048,refcount_bits=1",
    ] {
        for seed in 1..4 {
            run(options, 32 << 20, seed);
            // So small that tables come and go all the time.
            run(options, 0, seed);
        }
    }
}

/// Polls to the end; returns how often others could run meanwhile.
fn turns(work: impl Future<Output = lacuna::Result<()>>) -> usize {
    let (mut work, mut context) = (pin!(work), Context::from_waker(Waker::noop()));
    let mut turns = 0;
    loop {
        if let Poll::Ready(result) = work.as_mut().poll(&mut context) {
            result.unwrap();
            return turns;
        }
        turns += 1;
    }
}

#[test]
fn work_on_a_large_range_lets_others_of_the_thread_run() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    // 64 tables of 512 MiB.
    create(&path, "compat=1.1", 32 << 30);
    let storage = Arc::new(MemoryStorage::from(&std::fs::read(&path).unwrap()[..]));
    let open = OpenOptions::new(Access::ReadWrite);
    let image = block_on(Image::open(Parts::alone(storage), open)).unwrap();
    let whole = image.whole();
    for flags in [ZeroFlags::empty(), ZeroFlags::MAY_UNMAP] {
        let turns = turns(image.write_zeroes(whole, flags));
        assert!(turns >= 63, "{turns} turns for {flags:?}");
    }
    let turns = turns(image.discard(whole, DiscardMode::Guest));
    assert!(turns >= 63, "{turns} turns for a discard");
    block_on(image.close()).unwrap();
}
