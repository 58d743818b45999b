//! Clusters and tables that have more than one owner: whoever writes gets another place first.

use super::{changing, discard, mixed_into, section, write, zero, zero_unmap};
use crate::Layout;
use crate::case::{Case, Step};
use crate::image::SnapshotTables;

const BYTES: u64 = 1 << 16;

fn case(
    name: impl Into<String>,
    proves: &str,
    layout: Layout,
    steps: impl IntoIterator<Item = Step>,
) -> Case {
    let name = format!("sharing/{}", name.into());
    Case::new(name, proves, section::REFCOUNTS, layout, changing(steps))
}

fn disk(version: u32) -> Layout {
    mixed_into(Layout::new(version, 16, 10 * BYTES))
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = snapshots();
    cases.extend(kinds());
    cases.extend(clusters());
    cases
}

/// Parts and wholes of what a snapshot has too.
fn over_all() -> Vec<Step> {
    vec![write(512, 512, 20), write(4 * BYTES, BYTES, 21), write(8 * BYTES - 512, 1024, 22)]
}

fn snapshots() -> Vec<Case> {
    use SnapshotTables::{Own, Shared};
    let mut cases = Vec::new();
    for version in [2, 3] {
        let suffix = if version == 2 { "-v2" } else { "" };
        cases.push(case(
            format!("snapshot-tables{suffix}"),
            "an L2 table that a snapshot has too is copied before an entry changes: the snapshot stays",
            disk(version).snapshot("before", Shared),
            over_all(),
        ));
        cases.push(case(
            format!("snapshot-clusters{suffix}"),
            "a cluster that a snapshot has too is not written in place, though the table is the disk's own",
            disk(version).snapshot("before", Own).since(7, 15),
            over_all(),
        ));
    }
    cases.push(case(
        "snapshot-later-cluster",
        "a cluster that the snapshot does not have is the disk's own",
        disk(3).snapshot("before", Own).since(8, 15).since(0, 16),
        [write(512, 512, 20), write(8 * BYTES + 512, 512, 21)],
    ));
    cases.push(case(
        "snapshots-three",
        "three snapshots keep what they have, with tables of their own and of the disk",
        disk(3).snapshot("one", Own).snapshot("two", Own).snapshot("three", Own).since(0, 15),
        over_all(),
    ));
    cases.push(case(
        "snapshot-small-clusters",
        "so it is with many small tables, which need more room at every write",
        super::mixed(3, 9).snapshot("before", Shared),
        [
            write(0, 512, 20),
            write(66 * 512, 2048, 21),
            write(149 * 512, 512, 22),
            write(4 * 512, 512, 23),
        ],
    ));
    cases
}

/// What else than a write must leave a snapshot alone, and kinds of clusters that tempt.
fn kinds() -> Vec<Case> {
    use SnapshotTables::{Own, Shared};
    let mut cases = Vec::new();
    for (word, step) in
        [("zero", zero as fn(u64, u64) -> Step), ("zero-unmap", zero_unmap), ("discard", discard)]
    {
        for (tables, suffix) in [(Shared, "tables"), (Own, "clusters")] {
            cases.push(case(
                format!("snapshot-{suffix}-{word}"),
                "zeroing and discarding takes nothing from a snapshot",
                disk(3).snapshot("before", tables),
                [step(0, 8 * BYTES), step(8 * BYTES + 512, 512), write(512, 512, 20)],
            ));
        }
        cases.push(case(
            format!("shared-{word}"),
            "zeroing and discarding takes nothing from another cluster of the disk",
            disk(3).shared(8, 0).shared(9, 4),
            [
                step(0, BYTES),
                step(9 * BYTES, BYTES),
                step(3 * BYTES, BYTES),
                write(9 * BYTES, 512, 20),
            ],
        ));
    }
    cases.push(case(
        "snapshot-reserved-zero",
        "the place of a zeroed cluster is not reused while a snapshot has it",
        (0..8).fold(Layout::new(3, 16, 8 * BYTES), Layout::reserved_zero).snapshot("before", Own),
        [write(0, BYTES, 20), write(BYTES + 512, 512, 21)],
    ));
    cases.push(case(
        "snapshot-zero-then-write",
        "a shared cluster that was zeroed in place of its data is still shared when it is written",
        disk(3).snapshot("before", Own),
        [zero(0, BYTES), write(0, 512, 20), zero(4 * BYTES, BYTES), write(4 * BYTES, BYTES, 21)],
    ));
    cases.push(case(
        "snapshot-compressed",
        "compressed clusters that a snapshot has too keep their streams",
        (0..6)
            .fold(Layout::new(3, 16, 8 * BYTES), |layout, cluster| {
                layout.compressed(cluster, cluster)
            })
            .snapshot("before", Own),
        [write(0, BYTES, 20), write(BYTES + 512, 512, 21), discard(2 * BYTES, BYTES)],
    ));
    cases.push(case(
        "snapshot-extended-l2",
        "subclusters of a cluster that a snapshot has too are written elsewhere",
        super::mixed_extended(16).snapshot("before", Own),
        [
            write(2 * BYTES, 512, 20),
            write(2048, 2048, 21),
            zero(7 * BYTES + 2048, 2048),
            discard(0, 2048),
        ],
    ));
    cases.push(case(
        "snapshot-extended-l2-tables",
        "so they are where the table is shared",
        super::mixed_extended(16).snapshot("before", Shared),
        [write(2 * BYTES, 512, 20), write(2048, 2048, 21), zero(7 * BYTES + 2048, 2048)],
    ));
    cases
}

fn clusters() -> Vec<Case> {
    let two = || Layout::new(3, 16, 8 * BYTES).data(0, 1).shared(1, 0).data(2, 2);
    vec![
        case(
            "two-entries",
            "a write to one of two entries with one cluster does not reach the other",
            two(),
            [write(512, 512, 20)],
        ),
        case(
            "two-entries-both",
            "when one has gone elsewhere, the other has the cluster for itself",
            two(),
            [write(BYTES, BYTES, 20), write(512, 512, 21), write(BYTES + 512, 512, 22)],
        ),
        case(
            "many-entries",
            "of six entries with one cluster each has its own content after it was written",
            (1..6).fold(Layout::new(3, 16, 8 * BYTES).data(0, 1), |layout, cluster| {
                layout.shared(cluster, 0)
            }),
            (0..5).map(|cluster| write(cluster * BYTES + 512, 512, 20 + cluster)),
        ),
        case(
            "two-entries-v2",
            "so it is in version 2",
            Layout::new(2, 16, 8 * BYTES).data(0, 1).shared(1, 0),
            [write(BYTES + 512, 512, 20)],
        ),
        case(
            "two-entries-snapshot",
            "so it is where a snapshot has the cluster as well",
            two().snapshot("before", SnapshotTables::Own),
            [write(512, 512, 20), write(BYTES + 512, 512, 21), write(2 * BYTES + 512, 512, 22)],
        ),
        case(
            "two-entries-narrow",
            "so it is with refcounts of two bits",
            Layout::new(3, 16, 8 * BYTES)
                .with(|image| image.refcount_order(1))
                .data(0, 1)
                .shared(1, 0)
                .shared(2, 0),
            [write(512, 512, 20), write(2 * BYTES + 512, 512, 21)],
        ),
    ]
}
