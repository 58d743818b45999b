//! What is below: shorter, longer, hidden and shown.

use super::{changing, discard, reading, section, write, zero, zero_unmap};
use crate::Layout;
use crate::case::{Case, Fact, Step};

const BYTES: u64 = 1 << 16;
/// Ends in the middle of a cluster.
const SHORT: u64 = 3 * BYTES + 1536;

fn read(name: &str, proves: &str, layout: Layout) -> Case {
    let name = format!("backing/{name}");
    Case::new(name, proves, section::MAPPING, layout, reading()).fact(Fact::Unchanged)
}

fn change(name: &str, proves: &str, layout: Layout, steps: impl IntoIterator<Item = Step>) -> Case {
    Case::new(format!("backing/{name}"), proves, section::MAPPING, layout, changing(steps))
}

fn disk(version: u32) -> Layout {
    Layout::new(version, 16, 8 * BYTES)
}

/// An image as a backing file, with zeros and holes of its own over a raw file.
fn image_below(size: u64) -> Layout {
    Layout::new(3, 16, size).over_raw(2 * BYTES + 512, 70).data(1, 71).zero(2).compressed(3, 72)
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = reads();
    cases.extend(writes());
    cases.extend(zeroes());
    cases
}

fn reads() -> Vec<Case> {
    vec![
        read(
            "raw-shorter",
            "behind the end of a shorter backing file there are zeros",
            disk(3).over_raw(SHORT, 60).data(1, 1).zero(2),
        ),
        read(
            "raw-longer",
            "of a longer backing file no more is read than the disk has",
            disk(3).over_raw(12 * BYTES, 60).data(1, 1).zero(2).reserved_zero(7),
        ),
        read(
            "raw-v2",
            "version 2 reads what it does not have from its backing file",
            disk(2).over_raw(SHORT, 60).data(1, 1),
        ),
        read(
            "image-shorter",
            "so it is with a backing file of qcow2, which has zeros of its own",
            disk(3).over_image(&image_below(SHORT)).data(0, 1).zero(3),
        ),
        read(
            "image-longer",
            "so it is with a longer one",
            disk(3).over_image(&image_below(12 * BYTES)).data(0, 1),
        ),
        read(
            "image-other-clusters",
            "a backing file may have clusters of another size",
            disk(3).over_image(&Layout::new(3, 9, SHORT).data(0, 1).data(5, 2).zero(7)).data(1, 3),
        ),
        read(
            "extended-l2",
            "subclusters that have nothing show what is below",
            disk(3)
                .extended()
                .over_raw(SHORT, 60)
                .subclusters(0, 1, 0x0f, 0xf0)
                .subclusters(3, 2, 1, 0),
        ),
        read(
            "data-file",
            "an image with an external data file may have a backing file",
            disk(3).data_file().over_raw(SHORT, 60).data(1, 1).zero(2),
        ),
    ]
}

fn writes() -> Vec<Case> {
    let parts =
        || [write(512, 512, 20), write(3 * BYTES, 512, 21), write(5 * BYTES + 512, 512, 22)];
    vec![
        change(
            "write-raw-shorter",
            "a part of a cluster is written, the rest comes from below, and zeros behind its end",
            disk(3).over_raw(SHORT, 60).data(1, 1).zero(2),
            parts(),
        ),
        change(
            "write-raw-longer",
            "a longer backing file does not show behind the end of the disk",
            Layout::new(3, 16, 3 * BYTES + 1024).over_raw(12 * BYTES, 60),
            [write(3 * BYTES, 512, 20), write(BYTES - 512, 1024, 21)],
        ),
        change(
            "write-raw-v2",
            "version 2 copies from below on a write as well",
            disk(2).over_raw(SHORT, 60).data(1, 1),
            parts(),
        ),
        change(
            "write-image",
            "what is copied from a backing image is what it shows, zeros and compressed clusters too",
            disk(3).over_image(&image_below(SHORT)),
            [
                write(BYTES + 512, 512, 20),
                write(2 * BYTES + 512, 512, 21),
                write(3 * BYTES + 512, 512, 22),
            ],
        ),
        change(
            "write-over-zeros",
            "a write into a cluster with the zero flag does not show what is below",
            disk(3).over_raw(8 * BYTES, 60).zero(1).reserved_zero(2),
            [write(BYTES + 512, 512, 20), write(2 * BYTES + 512, 512, 21)],
        ),
        change(
            "write-extended-l2",
            "a write copies no more from below than the subclusters that it touches",
            disk(3).extended().over_raw(SHORT, 60).subclusters(0, 1, 0x0f, 0xf0),
            [write(512, 512, 20), write(8 * 2048 + 512, 512, 21), write(3 * BYTES + 512, 512, 22)],
        ),
    ]
}

fn zeroes() -> Vec<Case> {
    let over = |version| disk(version).over_raw(SHORT, 60).data(1, 1);
    let mut cases = Vec::new();
    for version in [2, 3] {
        for (word, step) in [("zero", zero as fn(u64, u64) -> Step), ("zero-unmap", zero_unmap)] {
            cases.push(change(
                &format!("{word}-v{version}"),
                "zeroed clusters hide what is below, behind its end too",
                over(version),
                [step(0, 2 * BYTES), step(2 * BYTES + 512, 512), step(3 * BYTES, 3 * BYTES)],
            ));
        }
        cases.push(change(
            &format!("discard-v{version}"),
            "a discard does not show again what the guest had overwritten or zeroed",
            match version {
                2 => over(2),
                _ => over(3).zero(2).reserved_zero(4),
            },
            [discard(0, 6 * BYTES)],
        ));
    }
    cases.push(change(
        "zero-extended-l2",
        "zeroed subclusters hide what is below, and no others",
        disk(3).extended().over_raw(SHORT, 60).subclusters(0, 1, 0x0f, 0xf0),
        [zero_unmap(10 * 2048, 2 * 2048), zero_unmap(BYTES, BYTES), discard(0, 2048)],
    ));
    cases
}
