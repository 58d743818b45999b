//! What a walk over an image's extents tells, held against what reading and `qemu-img map` give.

use std::path::Path;

use lacuna::block::{Extent, Layer, is_zero};
use lacuna::blocking::Disk;
use lacuna::qcow2::{Access, ExtentDetail, Image, OpenOptions, Parts};
use lacuna::storage::{FileOptions, FileStorage, Locking};
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;
use testkit::foreign::{QEMU_IMG, QEMU_IO};
use testkit::{Random, seeds};

fn open(path: &Path, access: Access, detail: ExtentDetail) -> Disk<Image<FileStorage>> {
    let options = match access {
        Access::ReadOnly => FileOptions::read_only(),
        Access::ReadWrite => FileOptions::read_write(),
    };
    // One image is held open both ways here; nobody changes it.
    let options = FileOptions { locking: Locking::Off, ..options };
    let storage = FileStorage::open(path, &options).unwrap();
    let options = OpenOptions::new(access).extent_detail(detail);
    Disk::new(block_on(Image::open(Parts::alone(storage), options)).unwrap())
}

fn extents(disk: &Disk<Image<FileStorage>>, range: GuestRange) -> Vec<Extent> {
    disk.extents(range).collect::<Result<_, _>>().unwrap()
}

fn create(path: &Path, options: &str, size: &str) {
    let path = path.to_str().unwrap();
    QEMU_IMG.succeed(["create", "-q", "-f", "qcow2", "-o", options, path, size]);
}

fn qemu_io(path: &Path, commands: &[String]) {
    let mut words = vec!["-f", "qcow2"];
    words.extend(commands.iter().flat_map(|command| ["-c", command]));
    words.push(path.to_str().unwrap());
    QEMU_IO.succeed(words);
}

/// Joins neighbours, whose facts need not be told in one answer.
fn zeros(extents: &[Extent]) -> Vec<(u64, u64, bool)> {
    let mut out: Vec<(u64, u64, bool)> = Vec::new();
    for extent in extents {
        let (start, len, zero) = (extent.range.start.0, extent.range.len, extent.status.reads_zero);
        match out.last_mut() {
            Some(last) if last.2 == zero => last.1 += len,
            _ => out.push((start, len, zero)),
        }
    }
    out
}

#[test]
fn a_preallocated_image_reads_as_zeros_without_a_read() {
    let folder = tempfile::tempdir().unwrap();
    for preallocation in ["metadata", "falloc"] {
        let path = folder.path().join(preallocation);
        create(&path, &format!("preallocation={preallocation},cluster_size=4k"), "40M");
        let disk = open(&path, Access::ReadOnly, ExtentDetail::Host);
        let found = extents(&disk, disk.layer().whole());
        assert_eq!(zeros(&found), [(0, 40 << 20, true)], "{preallocation}");
        assert!(found.iter().all(|extent| !extent.status.is_hole), "{preallocation}");
        let disk = open(&path, Access::ReadOnly, ExtentDetail::Map);
        let found = extents(&disk, disk.layer().whole());
        assert_eq!(zeros(&found), [(0, 40 << 20, false)], "{preallocation}");
    }
}

/// 000-7: tables end every 2 MiB here, and answers do not.
#[test]
fn one_status_over_many_tables_is_one_extent() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    create(&path, "cluster_size=4k", "40M");
    qemu_io(&path, &["write -z 1M 30M".to_owned()]);
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let disk = open(&path, access, ExtentDetail::Map);
        let answer = block_on(disk.layer().extents(disk.layer().whole())).unwrap();
        let runs: Vec<_> =
            answer.iter().map(|it| (it.range.len >> 20, it.status.depth.0)).collect();
        assert_eq!(runs, [(1, 0), (30, 1), (9, 0)], "{access:?}");
        assert!(answer.iter().all(|extent| extent.status.reads_zero));
    }
}

/// 000-8: nothing is cut down to 32 bits, at offsets or at lengths.
#[test]
fn extents_of_a_disk_of_a_pebibyte_are_as_long_as_they_are() {
    const SIZE: u64 = 1 << 50;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    create(&path, "cluster_size=2M", &SIZE.to_string());
    qemu_io(&path, &[format!("write -P 7 {} 2M", SIZE - (4 << 20))]);
    let disk = open(&path, Access::ReadOnly, ExtentDetail::Map);
    let answer = block_on(disk.layer().extents(disk.layer().whole())).unwrap();
    let runs: Vec<_> = answer.iter().map(|it| (it.range.len, it.status.reads_zero)).collect();
    assert_eq!(runs, [(SIZE - (4 << 20), true), (2 << 20, false), (2 << 20, true)]);
    let map = QEMU_IMG.succeed(["map", "--output=json", path.to_str().unwrap()]);
    let data = map.lines().find(|line| line.contains("\"data\": true")).unwrap();
    assert!(data.contains(&format!("\"start\": {},", SIZE - (4 << 20))), "{map}");
}

/// Random images, random questions; zeros are held against the bytes, and the walk past the cache
/// (read-only) against the one through it (writable).
#[test]
fn every_walk_tells_the_same_and_claims_no_zero_that_is_none() {
    for seed in seeds(1) {
        println!("seed {seed}");
        compare_walks(&mut Random::new(seed));
    }
}

fn compare_walks(random: &mut Random) {
    let folder = tempfile::tempdir().unwrap();
    let variants = [
        "cluster_size=4k",
        "cluster_size=512,compat=0.10",
        "cluster_size=64k",
        "cluster_size=64k,extended_l2=on",
        "cluster_size=4k,preallocation=metadata",
        "cluster_size=16k,extended_l2=on,preallocation=metadata",
    ];
    for (number, options) in variants.iter().enumerate() {
        let path = folder.path().join(number.to_string());
        let size = 24 << 20;
        create(&path, options, &size.to_string());
        let mut commands = Vec::new();
        for _ in 0..60 {
            let start = random.below(size / 512) * 512;
            let len = ((1 + random.below(400)) * 512).min(size - start);
            let what = ["write -P 7", "write -z", "write -z -u", "discard", "write -P 0"];
            let what = what[random.below(5) as usize];
            commands.push(format!("{what} {start} {len}"));
        }
        qemu_io(&path, &commands);
        let map = open(&path, Access::ReadOnly, ExtentDetail::Map);
        let whole = map.layer().whole();
        let by_map = extents(&map, whole);
        let host = open(&path, Access::ReadOnly, ExtentDetail::Host);
        for extent in extents(&host, whole).iter().filter(|extent| extent.status.reads_zero) {
            let mut bytes = vec![1; extent.range.len as usize];
            host.read_at(extent.range.start, &mut bytes).unwrap();
            assert!(is_zero(&bytes), "{options}: {extent:?}");
        }
        let writable = open(&path, Access::ReadWrite, ExtentDetail::Map);
        let joined = |extents: &[Extent]| {
            let mut builder = lacuna::block::ExtentBuilder::default();
            extents.iter().for_each(|extent| builder.push(*extent));
            builder.finish()
        };
        assert_eq!(joined(&by_map), joined(&extents(&writable, whole)), "{options}");
        for _ in 0..50 {
            let start = random.below(size);
            let range = GuestRange::new(GuestOffset(start), 1 + random.below(size - start));
            let part: Vec<Extent> = by_map
                .iter()
                .filter_map(|extent| {
                    let range = extent.range.intersection(&range)?;
                    let status = extent.status.advanced(range.start - extent.range.start);
                    (!range.is_empty()).then_some(Extent { range, status })
                })
                .collect();
            assert_eq!(joined(&extents(&map, range)), joined(&part), "{options} {range:?}");
        }
        block_on(writable.into_layer().close()).unwrap();
    }
}
