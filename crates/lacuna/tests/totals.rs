//! What the tables of an image add up to, held against what they were made of.

use std::path::Path;

use lacuna::ErrorKind;
use lacuna::qcow2::{Totals, read_header, totals};
use lacuna::storage::{FileOptions, FileStorage, MemoryStorage, Storage};
use pollster::block_on;
use testkit::ImageBuilder;
use testkit::foreign::{QEMU_IMG, QEMU_IO};

const CLUSTER: u64 = 65536;

fn of(storage: &impl Storage, most_table_bytes: u64) -> lacuna::Result<Option<Totals>> {
    let header = block_on(read_header(storage))?;
    block_on(totals(storage, &header, most_table_bytes))
}

fn of_file(path: &Path) -> Totals {
    let storage = FileStorage::open(path, &FileOptions::read_only()).unwrap();
    of(&storage, u64::MAX).unwrap().unwrap()
}

/// Makes an image with the stock tools; commands of qemu-img are told by their first word.
fn image(options: &str, size: &str, steps: &[&str]) -> (tempfile::TempDir, Totals) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let name = path.to_str().unwrap();
    QEMU_IMG.succeed(["create", "-q", "-f", "qcow2", "-o", options, name, size]);
    for step in steps {
        match step.strip_prefix("snapshot ") {
            Some(words) => {
                let words = ["snapshot", "-q"].into_iter().chain(words.split(' '));
                QEMU_IMG.succeed(words.chain([name]))
            }
            None => QEMU_IO.succeed(["-f", "qcow2", "-c", step, name]),
        };
    }
    let totals = of_file(&path);
    (folder, totals)
}

#[test]
fn every_kind_of_cluster_is_counted_in_its_own_sum() {
    let steps = [
        "write -P 1 0 1M",
        "write -z 64k 128k",
        "write -zu 2M 256k",
        "write -c -P 3 4M 64k",
        "write -P 4 16743424 33792",
    ];
    let (_folder, totals) = image("cluster_size=64k", "16777216", &steps);
    let expected = Totals {
        data_bytes: (1 << 20) - 2 * CLUSTER + CLUSTER,
        compressed_bytes: CLUSTER,
        zero_bytes: 2 * CLUSTER + 4 * CLUSTER,
        unallocated_bytes: (16 << 20) - (1 << 20) - 6 * CLUSTER,
        reserved_bytes: 2 * CLUSTER,
        shared_bytes: 0,
    };
    assert_eq!(totals, expected);
}

#[test]
fn subclusters_are_counted_one_by_one() {
    let steps = ["write -P 1 128k 4k", "write -z 160k 6k"];
    let (_folder, totals) = image("extended_l2=on", "1M", &steps);
    let expected = Totals {
        data_bytes: 4096,
        zero_bytes: 6144,
        unallocated_bytes: (1 << 20) - 4096 - 6144,
        reserved_bytes: CLUSTER - 4096,
        ..Totals::default()
    };
    assert_eq!(totals, expected);
}

#[test]
fn clusters_of_snapshots_are_shared_until_they_are_written_or_the_snapshot_goes() {
    let mut steps = vec!["write -P 1 0 1M", "snapshot -c one", "snapshot -c two"];
    assert_eq!(image("refcount_bits=16", "4G", &steps).1.shared_bytes, 1 << 20);
    steps.push("write -P 2 0 256k");
    assert_eq!(image("refcount_bits=4", "4G", &steps).1.shared_bytes, 3 << 18);
    steps.extend(["snapshot -d one", "snapshot -d two"]);
    assert_eq!(image("refcount_bits=16", "4G", &steps).1.shared_bytes, 0);
}

#[test]
fn a_last_cluster_counts_as_far_as_the_disk_goes() {
    let (_folder, totals) = image("cluster_size=64k", "100k", &["write -P 1 64k 36k"]);
    assert_eq!((totals.data_bytes, totals.unallocated_bytes), (36 << 10, 64 << 10));
}

fn small() -> ImageBuilder {
    ImageBuilder::new(3, 16, 40 * CLUSTER).data(0, &[1]).data(1, &[2])
}

fn stored(builder: &ImageBuilder) -> MemoryStorage {
    MemoryStorage::from(&builder.build().bytes.to_vec()[..])
}

#[test]
fn a_host_cluster_that_many_guest_clusters_share_counts_once() {
    let data = small().build().data;
    assert_eq!(data[&1], data[&0] + CLUSTER);
    // Both entries point to the first cluster, without the copied flag.
    let shared = small()
        .change_l2(0, |words| words[0] &= !(1 << 63))
        .change_l2(1, |words| words[0] = (words[0] & !(1 << 63)) - CLUSTER)
        .refcount(data[&0] / CLUSTER, 2)
        .refcount(data[&1] / CLUSTER, 0);
    let totals = of(&stored(&shared), u64::MAX).unwrap().unwrap();
    assert_eq!((totals.data_bytes, totals.shared_bytes), (2 * CLUSTER, CLUSTER));
}

#[test]
fn nothing_is_counted_past_the_bound() {
    let storage = stored(&small());
    assert_eq!(of(&storage, 4).unwrap(), None);
    assert_eq!(of(&storage, 2 * CLUSTER).unwrap(), None);
    assert!(of(&storage, 2 * CLUSTER + 8).unwrap().is_some());
}

#[test]
fn impossible_entries_are_corrupt() {
    for damaged in [
        small().change_l1(0, |words| words[0] += 512),
        small().change_l2(1, |words| words[0] += 512),
        small().change_l2(1, |words| words[0] = 1 << 62).features(1 << 2, 0, 0),
    ] {
        assert_eq!(of(&stored(&damaged), u64::MAX).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}

#[test]
fn tables_and_refcounts_that_lie_nowhere_are_no_reason_to_fail() {
    // A cluster far past the end of the file has no refcount that anybody could have written.
    let lost = small().change_l2(1, |words| words[0] = (1 << 50) + CLUSTER);
    let totals = of(&stored(&lost), u64::MAX).unwrap().unwrap();
    assert_eq!((totals.data_bytes, totals.shared_bytes), (2 * CLUSTER, 0));
}
