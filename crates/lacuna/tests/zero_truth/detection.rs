//! Zeros found on the write path (004-2, 004-5, 004-18 to -20).

use lacuna::block::{DetectZeroes, Layer, WriteFlags, ZeroDetection};
use lacuna::buffer::Buffer;
use lacuna::job::Target;
use lacuna::qcow2::Image;
use lacuna::qcow2::format::L2Entry;
use lacuna::storage::FileStorage;
use lacuna::units::GuestOffset;
use pollster::block_on;
use testkit::Random;

use super::scenario::{Change, Disk, Setup, assert_gave_back, writing};

const CLUSTER: u64 = 64 << 10;

fn detecting(disk: &Disk, level: ZeroDetection) -> DetectZeroes<Image<FileStorage>> {
    DetectZeroes::new(disk.open(writing()), level)
}

fn write(layer: &impl Layer, at: u64, bytes: &[u8]) {
    let (result, back) =
        block_on(layer.write(GuestOffset(at), Buffer::from(bytes), WriteFlags::empty()));
    result.unwrap();
    assert_eq!(&back[..], bytes, "the buffer comes back whole");
}

fn close(layer: DetectZeroes<Image<FileStorage>>) {
    block_on(layer.into_below().close()).unwrap();
}

/// Four clusters: data, zeros, one byte of data, zeros.
fn mixed() -> Vec<u8> {
    let mut bytes = vec![0; 4 * CLUSTER as usize];
    bytes[..CLUSTER as usize].fill(7);
    bytes[2 * CLUSTER as usize + 77] = 1;
    bytes
}

#[test]
fn clusters_of_zeros_inside_a_large_write_take_no_space() {
    let disk = Disk::make(&Setup::default());
    let layer = detecting(&disk, ZeroDetection::On);
    write(&layer, 0, &mixed());
    close(layer);
    let left = disk.left();
    assert_eq!(left.entries[1], L2Entry::ZERO_PLAIN);
    assert_eq!(left.entries[3], L2Entry::ZERO_PLAIN);
    assert!(left.entries[0].is_copied() && left.entries[2].is_copied());
    assert!(left.bytes[..mixed().len()] == mixed()[..]);
}

#[test]
fn without_detection_zeros_are_data() {
    let disk = Disk::make(&Setup::default());
    let layer = detecting(&disk, ZeroDetection::Off);
    write(&layer, 0, &mixed());
    close(layer);
    assert!(disk.left().entries[..4].iter().all(|entry| entry.host().is_some()));
}

#[test]
fn on_keeps_the_place_of_data_and_unmap_gives_it_back() {
    let before = [Change::Write(0, CLUSTER, 7)];
    for (level, given) in [(ZeroDetection::On, 0), (ZeroDetection::Unmap, CLUSTER)] {
        let disk = Disk::make(&Setup { before: &before, ..Setup::default() });
        let allocated = disk.allocated();
        let layer = detecting(&disk, level);
        write(&layer, 0, &vec![0; CLUSTER as usize]);
        close(layer);
        assert_gave_back(allocated, disk.allocated(), given);
        assert!(disk.left().bytes.iter().all(|byte| *byte == 0));
    }
}

#[test]
fn zeros_written_over_zeros_allocate_nothing() {
    let disk = Disk::make(&Setup { before: &[Change::ZeroUnmap(0, CLUSTER)], ..Setup::default() });
    let layer = detecting(&disk, ZeroDetection::Unmap);
    // Parts of a zero cluster, and of one that was never written (004-5a).
    write(&layer, 512, &[0; 4096]);
    write(&layer, CLUSTER + 100, &[0; 5000]);
    close(layer);
    assert!(disk.left().entries.iter().all(|entry| entry.host().is_none()));
}

/// 004-5a for what a request ends with: half of a zero cluster, half of one never written, and
/// half of one that holds data.
#[test]
fn zeros_at_the_ends_of_data_leave_zero_clusters_as_they_are() {
    let unit = |options| if options == "compat=1.1" { CLUSTER } else { CLUSTER / 32 };
    for options in ["compat=1.1", "extended_l2=on"] {
        let unit = unit(options);
        let before = [Change::ZeroUnmap(0, unit), Change::Write(4 * unit, unit, 9)];
        let disk = Disk::make(&Setup { options, before: &before, ..Setup::default() });
        let layer = detecting(&disk, ZeroDetection::Unmap);
        let mut bytes = vec![0; 2 * unit as usize];
        bytes[unit as usize / 2..][..unit as usize].fill(7);
        write(&layer, unit / 2, &bytes);
        write(&layer, 3 * unit, &[&vec![8; unit as usize][..], &vec![0; 512]].concat());
        let extents = block_on(layer.extents(layer.whole())).unwrap();
        close(layer);
        let left = disk.left();
        let expected = [&vec![0; unit as usize][..], &vec![7; unit as usize]].concat();
        assert!(left.bytes[..2 * unit as usize] == expected, "{options}");
        assert!(left.bytes[4 * unit as usize..][..512].iter().all(|byte| *byte == 0));
        assert!(left.bytes[4 * unit as usize + 512..][..512].iter().all(|byte| *byte == 9));
        let zeros: Vec<_> = extents
            .iter()
            .filter(|extent| extent.status.reads_zero && extent.range.start.0 < 3 * unit)
            .map(|extent| (extent.range.start.0 / unit, extent.range.len / unit))
            .collect();
        assert_eq!(zeros, [(0, 1), (2, 1)], "{options}: {extents:?}");
    }
}

#[test]
fn zeros_to_be_compressed_are_zeros_wherever_they_are_looked_for() {
    for (level, is_zero) in [(ZeroDetection::Off, false), (ZeroDetection::On, true)] {
        let disk =
            Disk::make(&Setup { before: &[Change::ZeroUnmap(0, CLUSTER)], ..Setup::default() });
        let allocated = disk.allocated();
        let layer = detecting(&disk, level);
        for at in [0, CLUSTER] {
            let zeros = Buffer::zeroed(CLUSTER as usize);
            block_on(layer.write_compressed(GuestOffset(at), zeros)).0.unwrap();
        }
        close(layer);
        let left = disk.left();
        assert_eq!(left.entries[..2] == [L2Entry::ZERO_PLAIN; 2], is_zero, "{level:?}");
        if is_zero {
            assert_gave_back(allocated, left.allocated, 0);
        }
    }
}

/// As QEMU does it.
#[test]
fn qemu_takes_compressed_zeros_for_zeros_too() {
    let disk = Disk::make(&Setup::default());
    let name = disk.path.to_str().unwrap();
    let options = format!("driver=qcow2,detect-zeroes=on,file.filename={name}");
    let words = ["--image-opts", &options, "-c", "write -c -P 0 0 64k"];
    testkit::foreign::QEMU_IO.succeed(words);
    assert_eq!(disk.left().entries[0], L2Entry::ZERO_PLAIN);
}

#[test]
fn only_the_thorough_level_notices_that_a_cluster_became_all_zeros() {
    let half = vec![0; CLUSTER as usize / 2];
    for (level, is_freed) in [(ZeroDetection::Unmap, false), (ZeroDetection::Thorough, true)] {
        let before = [Change::Write(0, CLUSTER, 7)];
        let disk = Disk::make(&Setup { before: &before, ..Setup::default() });
        let layer = detecting(&disk, level);
        write(&layer, 0, &half);
        write(&layer, CLUSTER / 2, &half);
        close(layer);
        let left = disk.left();
        assert_eq!(left.entries[0].host().is_none(), is_freed, "{level:?}");
        assert!(left.bytes.iter().all(|byte| *byte == 0));
    }
}

#[test]
fn qemu_finds_zeros_only_where_the_whole_request_is() {
    let disk = Disk::make(&Setup::default());
    let name = disk.path.to_str().unwrap();
    let options = format!("driver=qcow2,detect-zeroes=unmap,discard=unmap,file.filename={name}");
    let commands = ["write -P 0 0 64k", "write -P 0 64k 64k"];
    let words = ["--image-opts", &options, "-c", commands[0], "-c", commands[1]];
    testkit::foreign::QEMU_IO.succeed(words);
    let theirs = disk.left().entries;
    let disk = Disk::make(&Setup::default());
    let layer = detecting(&disk, ZeroDetection::Unmap);
    write(&layer, 0, &vec![0; 2 * CLUSTER as usize]);
    close(layer);
    assert_eq!(disk.left().entries, theirs);
}

/// Any level, any pieces: the guest reads what was written.
#[test]
fn the_guest_reads_what_it_wrote_at_every_level() {
    for seed in 0..8 {
        let mut random = Random::new(seed);
        let options = if seed % 2 == 0 { "compat=1.1" } else { "extended_l2=on" };
        let disk = Disk::make(&Setup { options, ..Setup::default() });
        let levels = [ZeroDetection::On, ZeroDetection::Unmap, ZeroDetection::Thorough];
        let layer = detecting(&disk, levels[random.below(3) as usize]);
        let mut model = vec![0; 1 << 20];
        for _ in 0..60 {
            let at = random.below(1 << 20);
            let len = (1 + random.below(200_000)).min((1 << 20) - at);
            let mut bytes = vec![0; len as usize];
            for _ in 0..random.below(4) {
                let from = random.below(len) as usize;
                let to = (from + 1 + random.below(9000) as usize).min(bytes.len());
                bytes[from..to].fill(random.below(255) as u8 + 1);
            }
            write(&layer, at, &bytes);
            model[at as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        close(layer);
        assert!(disk.left().bytes == model, "seed {seed}");
    }
}

/// Writers of data and of zeros in one cluster at once: nobody's bytes are lost to the reading
/// that the thorough level does.
#[test]
fn thorough_detection_is_atomic_against_writers_of_the_same_cluster() {
    let disk = Disk::make(&Setup { before: &[Change::Write(0, CLUSTER, 0)], ..Setup::default() });
    let layer = detecting(&disk, ZeroDetection::Thorough);
    std::thread::scope(|scope| {
        let zeros = || (0..200).for_each(|_| write(&layer, 0, &[0; 4096]));
        let data = || {
            for round in 1..=200 {
                write(&layer, 32 << 10, &[round as u8; 512]);
                let (result, bytes) = block_on(layer.read(GuestOffset(32 << 10), Buffer::new(512)));
                result.unwrap();
                assert!(bytes.iter().all(|byte| *byte == round as u8), "round {round}");
            }
        };
        let zeros = scope.spawn(zeros);
        data();
        zeros.join().unwrap();
    });
    close(layer);
}
