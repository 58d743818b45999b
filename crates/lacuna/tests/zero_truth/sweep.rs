//! Zeros stored as data are found and given back.

use lacuna::job::{SweepProgress, SweepReport, sweep, sweep_estimate};
use lacuna::qcow2::format::SubclusterBitmap;
use lacuna::qcow2::{OpenOptions, SharedZeroCluster, ZeroUnmap};
use pollster::block_on;

use super::scenario::{BELOW, Change, Disk, Left, Setup, assert_gave_back, writing};

const CLUSTER: u64 = 64 << 10;
const SIZE: u64 = 1 << 20;

/// Data, zeros stored as data, stored compressed, in part of a cluster; data in the last cluster.
const BEFORE: [Change; 5] = [
    Change::Write(0, CLUSTER, 7),
    Change::Write(CLUSTER, 4 * CLUSTER, 0),
    Change::Compressed(5 * CLUSTER, CLUSTER, 0),
    Change::Write(6 * CLUSTER + 512, CLUSTER - 512, 0),
    Change::Write(SIZE - CLUSTER, CLUSTER, 9),
];

fn swept(setup: &Setup<'_>, options: OpenOptions) -> (SweepReport, Left, Left, Disk) {
    let disk = Disk::make(&Setup { before: &BEFORE, ..*setup });
    let before = disk.left();
    let estimate = estimated(&disk, options.clone());
    assert_eq!(disk.left(), before, "an estimate changes nothing");
    let image = disk.open(options);
    let mut last = SweepProgress { done_bytes: 0, total_bytes: SIZE, read_bytes: 0 };
    let report = block_on(sweep(&image, &mut |progress| {
        assert!(progress.done_bytes >= last.done_bytes, "progress goes on");
        last = progress;
    }));
    block_on(image.close()).unwrap();
    let after = disk.left();
    assert!(before.bytes == after.bytes, "a guest reads what it did");
    let report = report.unwrap();
    assert_eq!((estimate.clusters, estimate.zeroed_bytes), (report.clusters, report.zeroed_bytes));
    // What compressed clusters free is not known before.
    let unknown = report.freed_bytes - estimate.freed_bytes;
    assert!(unknown == 0 || unknown == CLUSTER, "{estimate:?} {report:?}");
    (report, before, after, disk)
}

fn estimated(disk: &Disk, options: OpenOptions) -> SweepReport {
    let image = disk.open(options);
    let estimate = block_on(sweep_estimate(&image, &mut |_| {})).unwrap();
    block_on(image.close()).unwrap();
    estimate
}

#[test]
fn clusters_of_zeros_become_zero_and_their_space_goes_back() {
    let (report, before, after, disk) = swept(&Setup::default(), writing());
    assert!(
        after.entries[1..7].iter().all(|entry| entry.has_zero_flag() && entry.host().is_none())
    );
    assert_eq!(after.entries[0], before.entries[0]);
    assert_eq!(after.entries[15], before.entries[15]);
    // Five of data, and the one with compressed bytes.
    let expected = SweepReport {
        clusters: 8,
        read_bytes: 8 * CLUSTER,
        zeroed_bytes: 6 * CLUSTER,
        freed_bytes: 6 * CLUSTER,
    };
    assert_eq!(report, expected);
    // Of the compressed one the host had given a block only.
    assert_gave_back(before.allocated, after.allocated, 5 * CLUSTER + 4096);
    let again = block_on(sweep(&disk.open(writing()), &mut |_| {})).unwrap();
    assert_eq!(
        again,
        SweepReport { clusters: 2, read_bytes: 2 * CLUSTER, ..SweepReport::default() }
    );
}

#[test]
fn where_unallocated_reads_as_zeros_it_may_be_that() {
    for options in ["compat=1.1", "compat=0.10"] {
        let unallocating = writing().zero_unmap(ZeroUnmap::Unallocate);
        let (report, _, after, _) = swept(&Setup { options, ..Setup::default() }, unallocating);
        assert!(after.entries[1..7].iter().all(|entry| entry.word == 0), "{options}");
        assert_eq!(report.zeroed_bytes, 6 * CLUSTER, "{options}");
    }
}

#[test]
fn version_2_has_no_flag_and_unallocates() {
    let setup = Setup { options: "compat=0.10", ..Setup::default() };
    let (report, _, after, disk) = swept(&setup, writing());
    assert!(after.entries[1..7].iter().all(|entry| entry.word == 0), "{:?}", after.entries);
    assert_eq!((report.zeroed_bytes, report.freed_bytes), (6 * CLUSTER, 6 * CLUSTER));
    let path = disk.path.to_str().unwrap();
    testkit::foreign::QEMU_IMG.succeed(["check", path]);
}

#[test]
fn over_a_backing_file_zeros_hide_it() {
    let (report, _, after, _) = swept(&Setup { backing: true, ..Setup::default() }, writing());
    assert!(after.entries[1..6].iter().all(|entry| entry.has_zero_flag()));
    assert_eq!(after.bytes[7 * CLUSTER as usize], BELOW);
    // The cluster written in part has the other part from below.
    assert!(!after.entries[6].has_zero_flag());
    assert_eq!((report.clusters, report.zeroed_bytes), (8, 5 * CLUSTER));
}

#[test]
fn version_2_over_a_backing_file_shares_one_cluster_or_stays_as_it_is() {
    let setup = Setup { options: "compat=0.10", backing: true, ..Setup::default() };
    let (report, before, after, _) = swept(&setup, writing());
    assert_eq!(report, SweepReport::default());
    assert_eq!(before, after);
    let sharing = writing().shared_zero_cluster(SharedZeroCluster::On);
    let (report, before, after, _) = swept(&setup, sharing);
    let shared = after.entries[1].word;
    assert!(after.entries[1..6].iter().all(|entry| entry.word == shared && !entry.is_copied()));
    let expected = SweepReport {
        clusters: 8,
        read_bytes: 8 * CLUSTER,
        zeroed_bytes: 5 * CLUSTER,
        freed_bytes: 5 * CLUSTER,
    };
    assert_eq!(report, expected);
    // The zeros, the pins and the L1 table came.
    assert_gave_back(before.allocated + 3 * CLUSTER, after.allocated, 4 * CLUSTER + 4096);
}

#[test]
fn what_a_snapshot_shares_leaves_the_disk_but_frees_nothing() {
    let (report, _, after, disk) = swept(&Setup { snapshot: true, ..Setup::default() }, writing());
    assert!(after.entries[1].has_zero_flag());
    assert_eq!((report.zeroed_bytes, report.freed_bytes), (6 * CLUSTER, 0));
    let path = disk.path.to_str().unwrap();
    testkit::foreign::QEMU_IMG.succeed(["snapshot", "-a", "s", path]);
    assert!(disk.left().bytes == after.bytes, "the snapshot holds what it did");
}

#[test]
fn subclusters_of_zeros_become_zero_beside_data() {
    const SUB: u64 = 2048;
    let before = [Change::Write(0, CLUSTER, 7), Change::Write(4 * SUB, 6 * SUB, 0)];
    let options = "extended_l2=on";
    let disk = Disk::make(&Setup { options, before: &before, ..Setup::default() });
    let allocated = disk.left();
    let image = disk.open(writing());
    let report = block_on(sweep(&image, &mut |_| {})).unwrap();
    block_on(image.close()).unwrap();
    let after = disk.left();
    let expected = SubclusterBitmap::ALL_DATA.with_zero(4, 10);
    assert_eq!(after.entries[0].subclusters, expected);
    assert_eq!(after.bytes, allocated.bytes);
    assert_eq!(
        report,
        SweepReport {
            clusters: 1,
            read_bytes: 32 * SUB,
            zeroed_bytes: 6 * SUB,
            freed_bytes: 6 * SUB
        }
    );
    assert_gave_back(allocated.allocated, after.allocated, 6 * SUB);
}

#[test]
fn an_image_that_cannot_be_written_is_refused() {
    let disk = Disk::make(&Setup { before: &BEFORE, ..Setup::default() });
    let image = disk.open(OpenOptions::new(lacuna::qcow2::Access::ReadOnly));
    let refused = block_on(sweep(&image, &mut |_| {})).unwrap_err();
    assert_eq!(refused.kind(), lacuna::ErrorKind::ReadOnly);
}
