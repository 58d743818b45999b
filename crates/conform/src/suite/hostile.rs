//! Damaged images: an answer in time, and no further damage.

use super::{Field, READ, WRITE, patched, section, write};
use crate::Layout;
use crate::case::{Case, Fact, Step};
use crate::image::{Built, ImageBuilder, SnapshotTables};
use crate::layout::{BACKING, IMAGE};
use crate::protocol::Need;

const BYTES: u64 = 1 << 16;
const COPIED: u64 = 1 << 63;
/// The cluster whose entry is damaged.
const DAMAGED: u64 = 1;
/// The others of the disk that have data.
const SOUND: [u64; 3] = [0, 2, 3];

/// What a word of an image is changed to.
type Value = fn(&Built) -> u64;

/// Reads what is there, and changes all of it that may be, in small pieces.
fn used() -> Vec<Step> {
    let read = |cluster: u64| Step::Read { at: cluster * BYTES, len: 4096 };
    vec![
        WRITE,
        read(0),
        read(DAMAGED),
        read(3),
        write(DAMAGED * BYTES + 512, 512, 20),
        read(DAMAGED),
        write(6 * BYTES, 512, 21),
        Step::Flush,
        Step::Close,
        READ,
        read(2),
        read(DAMAGED),
        Step::Close,
    ]
}

fn disk() -> Layout {
    Layout::new(3, 16, 8 * BYTES).data(0, 1).data(1, 2).data(2, 3).data(3, 4)
}

fn damaged(name: &str, what: &str, layout: Layout, sound: &[u64]) -> Case {
    let proves = format!("{what}: an answer in time, and what is sound stays so");
    Case::new(format!("hostile/{name}"), proves, section::NONE, layout, used()).survives(sound)
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = entries();
    cases.extend(pointers());
    cases.extend(numbers());
    cases.extend(streams());
    cases.extend(loops());
    cases
}

/// Overrides a word that lies where the image says.
fn word(layout: Layout, at: impl Fn(&Built) -> u64, value: impl Fn(&Built) -> u64) -> Layout {
    let built = layout.image.build();
    let (at, value) = (at(&built), value(&built));
    layout.with(|image| image.patch(at as usize, &value.to_be_bytes()))
}

/// Entries of the L2 table that lead astray.
fn entries() -> Vec<Case> {
    let entry = |built: &Built| built.l2[&0] + DAMAGED * 8;
    let rows: [(&str, &str, Value); 9] = [
        ("l2-unaligned", "an L2 entry that is not aligned", |built| {
            (built.data[&1] + 512) | COPIED
        }),
        ("l2-beyond", "an L2 entry beyond the end of the file", |_| 1 << 40 | COPIED),
        ("l2-far-beyond", "an L2 entry at the end of all offsets", |_| {
            0x00ff_ffff_ffff_0000 | COPIED
        }),
        ("l2-to-itself", "an L2 entry that leads to its own table", |built| built.l2[&0] | COPIED),
        ("l2-to-l1", "an L2 entry that leads to the L1 table", |built| built.l1 | COPIED),
        ("l2-to-refcounts", "an L2 entry that leads to a refcount block", |built| {
            built.refcount_blocks[0] | COPIED
        }),
        ("l2-to-refcount-table", "an L2 entry that leads to the refcount table", |built| {
            built.refcount_table | COPIED
        }),
        ("l2-reserved-bit", "an L2 entry with a reserved bit", |built| {
            built.data[&1] | COPIED | 1 << 56
        }),
        ("l2-compressed-copied", "a compressed cluster with the flag of one that is not", |_| {
            (3 << 62) | (5 * BYTES)
        }),
    ];
    let row = |(name, what, value): (&str, &str, Value)| {
        damaged(name, what, word(disk(), entry, value), &SOUND)
    };
    rows.into_iter().map(row).collect()
}

/// Pointers of other tables.
fn pointers() -> Vec<Case> {
    let l1 = |value: Value| word(disk(), |built| built.l1, value);
    let table = |value: Value| word(disk(), |built| built.refcount_table, value);
    vec![
        damaged(
            "l1-unaligned",
            "an L1 entry that is not aligned",
            l1(|built| (built.l2[&0] + 512) | COPIED),
            &[],
        ),
        damaged(
            "l1-beyond",
            "an L1 entry beyond the end of the file",
            l1(|_| 1 << 40 | COPIED),
            &[],
        ),
        damaged(
            "l1-to-itself",
            "an L1 entry that leads to the L1 table",
            l1(|built| built.l1 | COPIED),
            &[],
        ),
        damaged(
            "refcount-table-unaligned",
            "an entry of the refcount table that is not aligned",
            table(|built| built.refcount_blocks[0] + 512),
            &SOUND,
        ),
        damaged("refcount-block-missing", "a refcount block that is missing", table(|_| 0), &SOUND),
        damaged(
            "refcount-block-beyond",
            "a refcount block beyond the end of the file",
            table(|_| 1 << 40),
            &SOUND,
        ),
        damaged(
            "refcount-block-is-l2",
            "a refcount block that is an L2 table",
            table(|built| built.l2[&0]),
            &[],
        ),
        damaged(
            "subclusters-both",
            "a subcluster that is data and zeros at once",
            Layout::new(3, 16, 8 * BYTES)
                .extended()
                .data(0, 1)
                .data(1, 2)
                .data(2, 3)
                .data(3, 4)
                .with(|image| image.change_l2(DAMAGED, |words| words[1] |= 1 << 32)),
            &SOUND,
        ),
        damaged(
            "zero-flag-v2",
            "the zero flag in version 2",
            Layout::new(2, 16, 8 * BYTES)
                .data(0, 1)
                .data(1, 2)
                .data(2, 3)
                .data(3, 4)
                .with(|image| image.change_l2(DAMAGED, |words| words[0] |= 1)),
            &SOUND,
        ),
    ]
}

/// Numbers that are too large.
fn numbers() -> Vec<Case> {
    let rows: [(&str, &str, &[Field]); 13] = [
        ("size-huge", "a disk of eight exbibytes with one L1 entry", &[(24, 1 << 63, 8)]),
        ("l1-size-huge", "an L1 table of two thousand million entries", &[(36, 0x7fff_ffff, 4)]),
        ("l1-size-zero", "an L1 table without an entry", &[(36, 0, 4)]),
        (
            "l1-offset-beyond",
            "an L1 table at the end of all offsets",
            &[(40, 0x7fff_ffff_ffff_0000, 8)],
        ),
        ("l1-offset-unaligned", "an L1 table that is not aligned", &[(40, 0x10001, 8)]),
        (
            "refcount-table-huge",
            "a refcount table of four thousand million clusters",
            &[(56, 0xffff_ffff, 4)],
        ),
        (
            "refcount-table-beyond",
            "a refcount table beyond the end of the file",
            &[(48, 1 << 50, 8)],
        ),
        (
            "snapshots-huge",
            "four thousand million snapshots",
            &[(60, 0xffff_ffff, 4), (64, 0x50000, 8)],
        ),
        (
            "snapshot-table-beyond",
            "a snapshot table at the end of all offsets",
            &[(60, 1, 4), (64, 0xffff_ffff_ffff_0000, 8)],
        ),
        ("header-length-huge", "a header of four gibibytes", &[(100, 0xffff_ffff, 4)]),
        (
            "header-length-short",
            "a header of version 3 that ends before its fields",
            &[(100, 72, 4)],
        ),
        (
            "extension-huge",
            "a header extension of four gibibytes",
            &[(112, 0x1234_5678, 4), (116, 0xffff_fff0, 4)],
        ),
        (
            "backing-name-huge",
            "a name of a backing file without end",
            &[(8, 200, 8), (16, 0xffff_ffff, 4)],
        ),
    ];
    let row = |(name, what, fields): (&str, &str, &[Field])| {
        let steps = [READ, Step::Read { at: 0, len: 4096 }, Step::Close];
        let steps = steps.into_iter().chain([WRITE, write(512, 512, 20), Step::Close]);
        let proves = format!("{what}: an answer in time");
        let name = format!("hostile/{name}");
        let layout = disk().with(|image| patched(image, fields));
        Case::new(name, proves, section::NONE, layout, steps).survives(&[])
    };
    let mut cases: Vec<Case> = rows.into_iter().map(row).collect();
    cases.push(damaged(
        "snapshot-l1-huge",
        "a snapshot whose L1 table has four thousand million entries",
        {
            let layout = disk().snapshot("before", SnapshotTables::Shared);
            let at = layout.image.build().snapshot_table as usize + 8;
            layout.with(|image| image.patch(at, &[0xff; 4]))
        },
        &[],
    ));
    cases
}

/// Compressed clusters that cannot be.
fn streams() -> Vec<Case> {
    let layout = |stream: Vec<u8>| {
        let layout = Layout::new(3, 16, 8 * BYTES).data(0, 1).data(2, 3).data(3, 4);
        layout.stream(DAMAGED, &[0; 1 << 16], &stream)
    };
    let bomb = crate::layout::deflate_stream(&vec![0; 16 << 20], 15);
    vec![
        damaged("deflate-garbage", "a stream of garbage", layout(vec![0xff; 3000]), &SOUND),
        damaged("deflate-empty", "a stream that ends at once", layout(vec![3, 0]), &SOUND),
        damaged("deflate-longer", "a stream of 16 MiB for a cluster", layout(bomb), &SOUND),
        damaged(
            "deflate-beyond",
            "a stream beyond the end of the file",
            layout(vec![3, 0])
                .with(|image| image.change_l2(DAMAGED, |words| words[0] = 1 << 62 | 1 << 40)),
            &SOUND,
        ),
        damaged(
            "deflate-offset-zero",
            "a stream where the header is",
            layout(vec![3, 0]).with(|image| image.change_l2(DAMAGED, |words| words[0] = 1 << 62)),
            &SOUND,
        ),
        damaged(
            "zstd-garbage",
            "a frame of garbage",
            Layout::new(3, 16, 8 * BYTES).zstd().data(0, 1).data(2, 3).data(3, 4).stream(
                DAMAGED,
                &[0; 1 << 16],
                &[0x28, 0xb5, 0x2f, 0xfd, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
            ),
            &SOUND,
        ),
    ]
}

/// Chains that never end.
fn loops() -> Vec<Case> {
    let endless = |name: &str, what: &str, layout: Layout| {
        let steps = [
            READ,
            Step::Read { at: 0, len: 512 },
            Step::Read { at: 7 * BYTES, len: 512 },
            Step::Close,
        ];
        let proves = format!("{what}: an answer in time");
        Case::new(format!("hostile/{name}"), proves, section::NONE, layout, steps)
            .survives(&[])
            .fact(Fact::Unchanged)
    };
    let below =
        |image: ImageBuilder, name: &str| image.backing(name).extension(0xe279_2aca, b"qcow2");
    let over = |name: &str| {
        let layout = Layout::new(3, 16, 8 * BYTES).needing(Need::Backing).data(0, 1);
        layout.with(|image| below(image, name))
    };
    let mut two = over(BACKING);
    two.beside.insert(BACKING.to_owned(), over(IMAGE).image.build().bytes);
    vec![
        endless("backing-itself", "an image that is its own backing file", over(IMAGE)),
        endless("backing-loop", "two images that are each other's backing file", two),
        endless("backing-missing", "a backing file that is not there", over("nowhere")),
    ]
}
