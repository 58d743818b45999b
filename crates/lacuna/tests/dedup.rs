//! A whole image deduplicated: by brute force, with stock tools, among writers, in several runs.

use std::collections::HashMap;
use std::path::Path;

use lacuna::ErrorKind;
use lacuna::block::{Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::job::{
    AtFlush, Dedup, DedupOptions, DedupWrites, DedupWritesOptions, Deduped, Keepers, Sharing, dedup,
};
use lacuna::qcow2::format::Version;
use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, Worth, create};
use lacuna::storage::{FileOptions, FileStorage};
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;
use testkit::foreign::{assert_same_guest, qemu_img_check, qemu_io};
use testkit::{Random, seeds};

/// Clusters of the disk, about two thirds of which hold data.
const CLUSTERS: u64 = 150;

fn opened(path: &Path, access: Access) -> Image<FileStorage> {
    let files = match access {
        Access::ReadOnly => FileOptions::read_only(),
        Access::ReadWrite => FileOptions::read_write(),
    };
    let storage = FileStorage::open(path, &files).unwrap();
    block_on(Image::open(Parts::alone(storage), OpenOptions::new(access))).unwrap()
}

/// Bytes of a cluster: of few kinds, so that many are alike; kind 0 is zeros.
fn bytes_of(kind: u64, cluster_bytes: u64) -> Vec<u8> {
    (0..cluster_bytes).map(|at| (kind * (1 + at / 512 % 7)) as u8).collect()
}

/// Makes an image with clusters of few kinds, plain and compressed. Returns the kinds of plain ones.
fn build(
    path: &Path,
    cluster_bytes: u64,
    version: Version,
    random: &mut Random,
) -> HashMap<u64, u64> {
    let size_bytes = CLUSTERS * cluster_bytes + 512;
    let storage = FileStorage::open(path, &FileOptions::replace()).unwrap();
    let options = CreateOptions { size_bytes, cluster_bytes, version, ..CreateOptions::default() };
    block_on(create(&storage, &options)).unwrap();
    drop(storage);
    let image = opened(path, Access::ReadWrite);
    let mut kinds = HashMap::new();
    for index in 0..CLUSTERS {
        let kind = random.below(12);
        let bytes = Buffer::from(&bytes_of(kind, cluster_bytes)[..]);
        let at = GuestOffset(index * cluster_bytes);
        match random.below(9) {
            0..3 => continue,
            3 => block_on(image.write_compressed(at, bytes)).0.unwrap(),
            _ => {
                kinds.insert(index, kind);
                block_on(image.write(at, bytes, WriteFlags::empty())).0.unwrap();
            }
        }
    }
    block_on(image.close()).unwrap();
    kinds
}

/// How many clusters a sharing saves among plain ones: zeros share nothing.
fn saved(kinds: &HashMap<u64, u64>) -> u64 {
    let mut counts = HashMap::<u64, u64>::new();
    kinds
        .values()
        .filter(|kind| **kind > 0)
        .for_each(|kind| *counts.entry(*kind).or_default() += 1);
    counts.values().map(|count| count - 1).sum()
}

fn run(path: &Path, options: DedupOptions) -> Deduped {
    let image = opened(path, Access::ReadWrite);
    let done = block_on(dedup(&image, options, &mut |_| ())).unwrap();
    block_on(image.close()).unwrap();
    done
}

fn assert_clean(path: &Path, when: &str) {
    let check = qemu_img_check(path);
    assert!(check.is_clean(), "{when}: {}", check.text);
}

#[test]
fn all_that_brute_force_finds_is_shared_and_nothing_else_changes() {
    let folder = tempfile::tempdir().unwrap();
    let (path, copy) = (folder.path().join("a.qcow2"), folder.path().join("copy.qcow2"));
    for seed in seeds(4) {
        for (cluster_bytes, version) in
            [(512, Version::V3), (4096, Version::V2), (65536, Version::V3)]
        {
            let mut random = Random::new(seed * 7 + cluster_bytes);
            let kinds = build(&path, cluster_bytes, version, &mut random);
            std::fs::copy(&path, &copy).unwrap();
            // Slices of a few clusters, so that groups are cut; windows are 1 MiB at least.
            let slice_bytes = *random.pick(&[0, 5 * cluster_bytes, 64 << 20]);
            let options = DedupOptions { slice_bytes, ..DedupOptions::default() };
            let done = run(&path, options);
            let told = format!(
                "seed {seed}, clusters of {cluster_bytes}, slices of {slice_bytes}: {done:?}"
            );
            assert!(done.freed_bytes >= saved(&kinds) * cluster_bytes, "{told}");
            assert_eq!(done.zero_clusters > 0, kinds.values().any(|kind| *kind == 0), "{told}");
            assert_eq!(done.differed, 0, "{told}");
            assert_clean(&path, &told);
            assert_same_guest(("qcow2", &path), ("qcow2", &copy));
            let again = run(&path, options);
            assert_eq!((again.shared, again.freed_bytes), (0, 0), "{told}, then {again:?}");
        }
    }
}

#[test]
fn stock_writes_to_a_shared_image_leave_it_clean_and_another_run_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    for seed in seeds(3) {
        let mut random = Random::new(seed);
        build(&path, 4096, Version::V3, &mut random);
        run(&path, DedupOptions::default());
        for _ in 0..3 {
            let mut write = || {
                let (at, len) = (random.below(CLUSTERS * 8) * 512, (1 + random.below(20)) * 512);
                let len = len.min(CLUSTERS * 4096 - at);
                match random.below(3) {
                    0 => format!("discard {at} {len}"),
                    1 => format!("write -z -u {at} {len}"),
                    _ => format!("write -P {} {at} {len}", 1 + random.below(3)),
                }
            };
            let commands: Vec<String> = (0..12).map(|_| write()).collect();
            qemu_io(&path, commands.clone());
            assert_clean(&path, &format!("seed {seed}, after {commands:?}"));
            let done = run(&path, DedupOptions::default());
            assert_clean(&path, &format!("seed {seed}, after {commands:?} and {done:?}"));
        }
    }
}

#[test]
fn a_run_that_was_cut_off_is_gone_on_with() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    let mut random = Random::new(5);
    let kinds = build(&path, 512, Version::V3, &mut random);
    let options = DedupOptions { slice_bytes: 20 * 512, ..DedupOptions::default() };
    let mut freed_bytes = 0;
    for steps in 1..8 {
        let image = opened(&path, Access::ReadWrite);
        let mut part = Dedup::new(&image, options).unwrap();
        for _ in 0..steps {
            block_on(part.step()).unwrap();
        }
        freed_bytes += part.so_far().freed_bytes;
        drop(part);
        block_on(image.close()).unwrap();
        assert_clean(&path, &format!("after {steps} steps"));
    }
    assert!(freed_bytes > 0);
    freed_bytes += run(&path, options).freed_bytes;
    assert!(freed_bytes >= saved(&kinds) * 512, "{freed_bytes}");
    assert_clean(&path, "at the end");
}

#[test]
fn guests_write_meanwhile_and_lose_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    let mut random = Random::new(6);
    build(&path, 4096, Version::V3, &mut random);
    let image = opened(&path, Access::ReadWrite);
    let write = || {
        let mut model = HashMap::new();
        let mut random = Random::new(7);
        for _ in 0..400 {
            // Whole clusters that are alike, and sectors that make them differ.
            let (at, kind) = (random.below(CLUSTERS) * 4096, random.below(3) + 1);
            let len = if random.one_in(3) { 512 } else { 4096 };
            let bytes = &bytes_of(kind, 4096)[..len];
            block_on(image.write(GuestOffset(at), Buffer::from(bytes), WriteFlags::empty()))
                .0
                .unwrap();
            for (sector, bytes) in bytes.chunks(512).enumerate() {
                model.insert(at + sector as u64 * 512, bytes.to_vec());
            }
        }
        model
    };
    let options = DedupOptions { slice_bytes: 8 * 4096, ..DedupOptions::default() };
    let model = std::thread::scope(|scope| {
        let writer = scope.spawn(write);
        while !writer.is_finished() {
            block_on(dedup(&image, options, &mut |_| ())).unwrap();
        }
        writer.join().unwrap()
    });
    for (at, expected) in model {
        let (result, bytes) = block_on(image.read(GuestOffset(at), Buffer::new(512)));
        result.unwrap();
        assert!(bytes[..] == expected[..], "sector at {at}");
    }
    block_on(image.close()).unwrap();
    assert_clean(&path, "after writes and deduplication");
}

#[test]
fn what_cannot_be_done_is_refused_before_anything_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    build(&path, 4096, Version::V3, &mut Random::new(8));
    let reason = |access, options| {
        let image = opened(&path, access);
        Dedup::new(&image, options).map(|_| ()).map_err(|error| error.kind())
    };
    let few = DedupOptions { memory_bytes: (1 << 20) - 1, ..DedupOptions::default() };
    assert_eq!(reason(Access::ReadOnly, DedupOptions::default()), Err(ErrorKind::ReadOnly));
    assert_eq!(reason(Access::ReadWrite, few), Err(ErrorKind::InvalidRequest));
    assert_eq!(reason(Access::ReadWrite, DedupOptions::default()), Ok(()));
}

/// Threads write, each to clusters of its own, what others write as well; zeros and discards between.
#[test]
fn threads_that_write_through_a_sharing_layer_read_what_they_wrote() {
    const THREADS: u64 = 3;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    let ways = [
        (1, AtFlush::Leave, Keepers::Fresh),
        (2, AtFlush::Share, Keepers::Fresh),
        (3, AtFlush::Leave, Keepers::InPlace),
    ];
    for (seed, at_flush, keepers) in ways {
        build(&path, 4096, Version::V3, &mut Random::new(seed));
        let image = opened(&path, Access::ReadWrite);
        let options = DedupWritesOptions {
            memory_bytes: 1500,
            batch_bytes: 64 << 10,
            at_flush,
            keepers,
            ..DedupWritesOptions::default()
        };
        let disk = DedupWrites::new(image.clone(), options).unwrap();
        let work = |own: u64| {
            let (mut random, mut model) = (Random::new(seed * 10 + own), HashMap::new());
            for _ in 0..500 {
                let cluster = random.below(CLUSTERS / THREADS) * THREADS + own;
                let at = GuestOffset(cluster * 4096);
                match random.below(12) {
                    0 => {
                        block_on(
                            disk.write_zeroes(GuestRange::new(at, 4096), ZeroFlags::MAY_UNMAP),
                        )
                        .unwrap();
                        model.insert(cluster, vec![0; 4096]);
                    }
                    1 => block_on(disk.flush()).unwrap(),
                    2 => {
                        let (result, bytes) = block_on(disk.read(at, Buffer::new(4096)));
                        result.unwrap();
                        let wrote = model.get(&cluster);
                        assert!(wrote.is_none_or(|wrote| wrote[..] == bytes[..]), "{cluster}");
                    }
                    kind => {
                        let bytes = bytes_of(kind, 4096);
                        let flags = if kind == 5 { WriteFlags::FUA } else { WriteFlags::empty() };
                        block_on(disk.write(at, Buffer::from(&bytes[..]), flags)).0.unwrap();
                        model.insert(cluster, bytes);
                    }
                }
            }
            model
        };
        let models: Vec<HashMap<u64, Vec<u8>>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|own| {
                    scope.spawn({
                        let work = &work;
                        move || work(own)
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        block_on(disk.finish()).unwrap();
        assert!(disk.shared().shared > 100, "{:?}", disk.shared());
        for (cluster, wrote) in models.into_iter().flatten() {
            let (result, bytes) =
                block_on(image.read(GuestOffset(cluster * 4096), Buffer::new(4096)));
            result.unwrap();
            assert!(bytes[..] == wrote[..], "seed {seed}, cluster {cluster}");
        }
        drop(disk);
        block_on(image.close()).unwrap();
        assert_clean(&path, &format!("{at_flush:?} {keepers:?}"));
    }
}

/// Writes clusters through a layer of these options into a new image; returns what was shared, what was
/// not, and the length of the file.
fn written(
    path: &Path,
    (cluster_bytes, contents): (u64, &[u8]),
    options: DedupWritesOptions,
) -> (u64, Worth, u64) {
    let storage = FileStorage::open(path, &FileOptions::replace()).unwrap();
    let size_bytes = contents.len() as u64 * cluster_bytes;
    let new = CreateOptions { size_bytes, cluster_bytes, ..CreateOptions::default() };
    block_on(create(&storage, &new)).unwrap();
    drop(storage);
    let image = opened(path, Access::ReadWrite);
    let disk = DedupWrites::new(image.clone(), options).unwrap();
    for (at, content) in (0..).zip(contents) {
        let bytes = Buffer::from(&vec![*content; cluster_bytes as usize][..]);
        block_on(disk.write(GuestOffset(at * cluster_bytes), bytes, WriteFlags::empty()))
            .0
            .unwrap();
    }
    block_on(disk.finish()).unwrap();
    let told = (disk.shared().shared, disk.declined());
    drop(disk);
    block_on(image.close()).unwrap();
    assert_clean(path, &format!("{options:?}"));
    let image = opened(path, Access::ReadOnly);
    for (at, content) in (0..).zip(contents) {
        let at = GuestOffset(at * cluster_bytes);
        let (result, bytes) = block_on(image.read(at, Buffer::new(cluster_bytes as usize)));
        result.unwrap();
        assert!(bytes.iter().all(|byte| byte == content), "{options:?}: {at}");
    }
    (told.0, told.1, path.metadata().unwrap().len())
}

/// Three clusters are what the tables of pins take; with so few more is stored, not less.
#[test]
fn what_does_not_pay_is_not_shared_on_the_way_and_what_does_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for (name, keepers) in [("fresh", Keepers::Fresh), ("in-place", Keepers::InPlace)] {
        let weighed = DedupWritesOptions {
            keepers,
            sharing: Sharing::WhereItPays,
            ..DedupWritesOptions::default()
        };
        let always = DedupWritesOptions { sharing: Sharing::Always, ..weighed };
        let (few, many) = ([1, 2, 1, 1, 1, 3], [1, 2, 1, 1, 1, 3, 3, 2, 1, 4]);
        let write = |with: &str, contents: &[u8], options| {
            written(&path(&format!("{name}-{with}")), (2 << 20, contents), options)
        };
        let (shared, declined, len) = write("few", &few, weighed);
        assert_eq!((shared, declined.saved_bytes), (0, 3 << 21), "{name}");
        let (shared, _, longer) = write("few-always", &few, always);
        assert!(shared >= 3 && longer >= len, "{name}: {shared}, {longer} and {len}");
        let (shared, declined, _) = write("many", &many, weighed);
        assert!(shared >= 6 && declined == Worth::default(), "{name}: {shared} {declined:?}");
    }
}

/// As above, of an image that is there.
#[test]
fn what_does_not_pay_is_not_shared_in_an_image() {
    let folder = tempfile::tempdir().unwrap();
    let options = DedupOptions { sharing: Sharing::WhereItPays, ..DedupOptions::default() };
    for (name, contents, shared) in [("few", &[1, 2, 1, 1, 1][..], 0), ("many", &[1; 6], 6)] {
        let path = folder.path().join(name);
        // Nothing equal at first, which is written over by what is.
        let others: Vec<u8> = (10..10 + contents.len() as u8).collect();
        written(&path, (2 << 20, &others), DedupWritesOptions::default());
        let image = opened(&path, Access::ReadWrite);
        for (at, content) in (0..).zip(contents) {
            let bytes = Buffer::from(&vec![*content; 2 << 20][..]);
            block_on(image.write(GuestOffset(at << 21), bytes, WriteFlags::empty())).0.unwrap();
        }
        let done = block_on(dedup(&image, options, &mut |_| ())).unwrap();
        assert_eq!(done.shared, shared, "{name}: {done:?}");
        assert_eq!(done.declined.saved_bytes > 0, shared == 0, "{name}: {done:?}");
        block_on(image.close()).unwrap();
        assert_clean(&path, name);
    }
}
