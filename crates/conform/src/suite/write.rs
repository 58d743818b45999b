//! Data into every form of an image.

use super::read::raw_data_file;
use super::{changing, mixed, mixed_extended, mixed_into, section, write};
use crate::Layout;
use crate::case::{Case, Fact, Step};

fn case(
    name: impl Into<String>,
    proves: &str,
    section: &'static str,
    layout: Layout,
    steps: impl IntoIterator<Item = Step>,
) -> Case {
    Case::new(format!("write/{}", name.into()), proves, section, layout, changing(steps))
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for bits in [9, 12, 16, 21] {
        for version in [2, 3] {
            let name = format!("v{version}-cluster-{}", 1 << bits);
            let proves = format!(
                "version {version} with clusters of {} bytes is written: whole ones, parts, over each kind",
                1 << bits
            );
            let layout = mixed(version, bits);
            cases.push(case(name, &proves, section::MAPPING, layout, all_kinds(1 << bits)));
        }
    }
    for bits in [14, 16, 21] {
        let name = format!("extended-l2-{}", 1 << bits);
        let proves = "a write into a subcluster leaves its neighbours as they were";
        let steps = subclusters(1 << bits);
        cases.push(case(name, proves, section::EXTENDED, mixed_extended(bits), steps));
    }
    for order in 0..=6 {
        let layout = mixed(3, 12).with(|image| image.refcount_order(order));
        let name = format!("refcount-bits-{}", 1 << order);
        let proves = format!("refcounts of {} bits are counted right", 1 << order);
        // A stream more in a cluster would be more than one bit can count.
        let layout = if order == 0 { one_bit() } else { layout };
        cases.push(case(name, &proves, section::REFCOUNTS, layout, all_kinds(4096)));
    }
    cases.extend(forms());
    cases
}

/// Refcounts of one bit: nothing is used twice, so at most one stream in a cluster.
fn one_bit() -> Layout {
    let layout = Layout::new(3, 12, (9 << 12) + 2048).with(|image| image.refcount_order(0));
    layout.data(0, 1).zero(1).reserved_zero(3).data(4, 2).compressed(5, 3).data(7, 5).data(9, 6)
}

/// Parts of clusters of each kind, pieces across borders, whole clusters, and the end of the disk, of
/// [`mixed`] layouts.
fn all_kinds(bytes: u64) -> Vec<Step> {
    let part = (bytes / 4).max(512);
    let last = if bytes < 4096 { 149 } else { 9 };
    vec![
        write(0, part, 20),
        write(bytes + bytes - part, part, 21),
        write(2 * bytes, part, 22),
        write(3 * bytes, part, 23),
        write(5 * bytes, part, 24),
        write(7 * bytes - 512, 1024, 25),
        write(8 * bytes, bytes, 26),
        write(last * bytes, 512, 27),
    ]
}

fn subclusters(bytes: u64) -> Vec<Step> {
    let unit = bytes / 32;
    vec![
        write(2 * bytes + 20 * unit, unit, 30),
        write(2 * bytes + 24 * unit, 512, 31),
        write(2 * bytes + 7 * unit + unit - 512, 1024, 32),
        write(8 * bytes, 512, 33),
        write(bytes + 3 * unit, 2 * unit, 34),
        write(3 * bytes, 512, 35),
        write(5 * bytes + unit, unit, 36),
        write(7 * bytes, bytes, 37),
    ]
}

fn forms() -> Vec<Case> {
    let empty = |bits, clusters: u64| Layout::new(3, bits, clusters << bits);
    let grown = || vec![write(0, 1 << 19, 1), write(1 << 20, 1 << 19, 2)];
    vec![
        case(
            "many-l2-tables",
            "new L2 tables and refcount blocks are made as they are needed",
            section::REFCOUNTS,
            empty(9, 4096),
            grown(),
        ),
        case(
            "refcount-table-grows",
            "a refcount table that is full gets another place",
            section::REFCOUNTS,
            empty(9, 16384).with(|image| image.refcount_order(6)),
            [write(0, 1 << 20, 1), write(4 << 20, 1 << 20, 2), write(7 << 20, 1 << 20, 3)],
        ),
        case(
            "size-not-multiple",
            "the last part of a cluster is written, and not more",
            section::HEADER,
            Layout::new(3, 16, (3 << 16) + 1024).data(0, 1),
            [write(3 << 16, 1024, 2), write((3 << 16) + 512, 512, 3)],
        ),
        case(
            "l1-longer",
            "an L1 table that is longer than needed is written where it lies",
            section::MAPPING,
            mixed(3, 16).with(|image| image.l1_entries(5000)),
            all_kinds(1 << 16),
        ),
        case(
            "preallocated",
            "a write into a preallocated cluster makes the rest of it zeros",
            section::STANDARD,
            (0..8).fold(empty(16, 8), Layout::reserved_zero),
            [write(4096, 512, 1), write(3 << 16, 2 << 16, 2), write((7 << 16) - 512, 1024, 3)],
        ),
        case(
            "compressed-neighbours",
            "a write over a compressed cluster leaves the streams that share its host cluster",
            section::COMPRESSED,
            (0..8).fold(empty(16, 8), |layout, cluster| layout.compressed(cluster, cluster)),
            [write(1 << 16, 1 << 16, 20), write(4 << 16, 512, 21), write(7 << 16, 1 << 16, 22)],
        ),
        case(
            "compressed-crossing",
            "a write over a compressed cluster gives back both host clusters that it lies in",
            section::COMPRESSED,
            (0..8).fold(empty(9, 8).with(|image| image.dense()), |layout, cluster| {
                layout.compressed(cluster, cluster)
            }),
            (0..4).map(|pair| write(pair * 1024, 512, 30 + pair)),
        ),
        case(
            "zstd",
            "a write over clusters of zstd",
            section::COMPRESSED,
            mixed_into(Layout::new(3, 16, 8 << 16).zstd()),
            [write(5 << 16, 512, 1), write((7 << 16) - 512, 1024, 2)],
        ),
        case(
            "data-file",
            "guest data goes to the external file, at its guest offset",
            section::DATA_FILE,
            Layout::new(3, 16, 8 << 16).data_file().data(0, 1).zero(1).reserved_zero(2),
            [
                write(512, 512, 2),
                write((1 << 16) + 512, 512, 3),
                write(2 << 16, 512, 4),
                write(6 << 16, 1 << 16, 5),
            ],
        ),
        case(
            "data-file-raw",
            "a raw data file holds what the guest reads, or is no longer called raw",
            section::DATA_FILE,
            raw_data_file(),
            [write(512, 512, 2), write((3 << 16) - 512, 1024, 3)],
        )
        .fact(Fact::RawDataFile),
        case(
            "lazy-refcounts",
            "with lazy refcounts the image is closed clean",
            section::HEADER,
            mixed(3, 16).with(|image| image.features(0, 1, 0)),
            all_kinds(1 << 16),
        ),
    ]
}
