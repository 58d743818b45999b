//! Every form of an image, read and not changed.

use super::{mixed, mixed_extended, mixed_into, reading, section};
use crate::Layout;
use crate::case::{Case, Fact};
use crate::content;
use crate::image::SnapshotTables;
use crate::layout::deflate_stream;
use crate::protocol::Need;

fn read(name: impl Into<String>, proves: &str, section: &'static str, layout: Layout) -> Case {
    let name = format!("read/{}", name.into());
    Case::new(name, proves, section, layout, reading()).fact(Fact::Unchanged)
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for bits in [9, 12, 16, 21] {
        let proves = format!("version 3 with clusters of {} bytes is read", 1 << bits);
        cases.push(read(
            format!("v3-cluster-{}", 1 << bits),
            &proves,
            section::MAPPING,
            mixed(3, bits),
        ));
        let proves = format!("version 2 with clusters of {} bytes is read", 1 << bits);
        cases.push(read(
            format!("v2-cluster-{}", 1 << bits),
            &proves,
            section::MAPPING,
            mixed(2, bits),
        ));
    }
    for bits in [14, 16, 21] {
        let name = format!("extended-l2-{}", 1 << bits);
        let proves = "subclusters of data, zeros and nothing are told apart";
        cases.push(read(name, proves, section::EXTENDED, mixed_extended(bits)));
    }
    cases.extend(forms());
    cases.extend(compressed());
    cases.extend(data_files());
    cases
}

fn forms() -> Vec<Case> {
    let plain = || Layout::new(3, 16, 8 << 16);
    vec![
        read("empty", "a disk without any table of clusters is zeros", section::MAPPING, plain()),
        read("no-disk", "a disk of no bytes is opened", section::HEADER, Layout::new(3, 16, 0)),
        read(
            "all-reserved-zeros",
            "preallocated clusters with the zero flag are zeros, whatever lies there",
            section::STANDARD,
            (0..8).fold(plain(), Layout::reserved_zero),
        ),
        read(
            "size-not-multiple",
            "the last cluster may be part of one",
            section::HEADER,
            Layout::new(3, 16, (3 << 16) + 512).data(0, 1).data(3, 2),
        ),
        read(
            "l1-longer",
            "an L1 table may be longer than the disk needs",
            section::MAPPING,
            mixed(3, 16).with(|image| image.l1_entries(5000)),
        ),
        read(
            "header-104",
            "a header of version 3 without a compression type is one of deflate",
            section::HEADER,
            mixed(3, 16).with(|image| image.header_bytes(104)),
        ),
        read(
            "header-256",
            "a longer header with zeros in its unknown fields is read",
            section::HEADER,
            mixed(3, 16).with(|image| image.header_bytes(256)),
        ),
        read(
            "snapshot-tables",
            "a disk that shares its L2 tables with a snapshot is read",
            section::SNAPSHOTS,
            mixed(3, 16).snapshot("before", SnapshotTables::Shared),
        ),
        read(
            "shared-clusters",
            "several L2 entries may point to one host cluster",
            section::REFCOUNTS,
            plain().data(0, 1).shared(1, 0).shared(7, 0).data(2, 2).shared(3, 2),
        ),
        read(
            "dirty",
            "a dirty image is read as it is, and opening it for reading writes nothing",
            section::HEADER,
            mixed(3, 16).needing(Need::Dirty).with(|image| image.features(1, 1, 0)),
        ),
        read(
            "unknown-autoclear",
            "opening for reading leaves unknown autoclear bits",
            section::HEADER,
            mixed(3, 16).with(|image| image.features(0, 0, 1 << 40)),
        ),
        read(
            "unknown-compatible",
            "unknown compatible bits and extensions keep nobody from reading",
            section::EXTENSIONS,
            mixed(3, 16)
                .with(|image| image.features(0, 1 << 50, 0).extension(0x1234_5678, b"somebody's")),
        ),
        read(
            "bitmap",
            "an image with a bitmap is read, and opening it for reading leaves the bitmap",
            section::BITMAPS,
            mixed(3, 16).with(|image| image.bitmap("nightly", 2, 16)),
        ),
    ]
}

fn compressed() -> Vec<Case> {
    let crossing = |layout: Layout| {
        let layout = layout.with(|image| image.dense());
        (0..8).fold(layout, |layout, cluster| {
            // Hard to compress, so that streams are long and end in the middle of clusters.
            let bytes = noise(cluster, 1 << 16);
            let stream = deflate_stream(&bytes, 12);
            layout.stream(cluster, &bytes, &stream[..])
        })
    };
    let repeated = noise(1, 20_000).repeat(4)[..1 << 16].to_vec();
    vec![
        read(
            "deflate-crossing",
            "a compressed cluster may lie across the border of host clusters",
            section::COMPRESSED,
            crossing(Layout::new(3, 16, 8 << 16)),
        ),
        read(
            "deflate-far",
            "distances of more than 4 KiB within a deflate stream are followed",
            section::COMPRESSED,
            Layout::new(3, 16, 2 << 16).stream(1, &repeated, &deflate_stream(&repeated, 15)),
        ),
        read(
            "deflate-trailing",
            "bytes behind the end of a stream are somebody else's",
            section::COMPRESSED,
            {
                let bytes = content(3, 0..1 << 16);
                let stream = [deflate_stream(&bytes, 12), vec![0xa5; 300]].concat();
                Layout::new(3, 16, 2 << 16).stream(0, &bytes, &stream)
            },
        ),
        read(
            "zstd",
            "clusters of zstd are read",
            section::COMPRESSED,
            mixed_into(Layout::new(3, 16, 8 << 16).zstd()),
        ),
        read(
            "zstd-4096",
            "clusters of zstd are read, of 4 KiB too",
            section::COMPRESSED,
            mixed_into(Layout::new(3, 12, 8 << 12).zstd()),
        ),
        read(
            "zstd-extended-l2",
            "a compressed cluster has no subclusters",
            section::EXTENDED,
            mixed_into(Layout::new(3, 16, 8 << 16).extended().zstd()),
        ),
    ]
}

fn data_files() -> Vec<Case> {
    let layout = || {
        let layout = Layout::new(3, 16, 8 << 16).data_file();
        layout.data(0, 1).zero(1).reserved_zero(2).data(5, 2)
    };
    vec![
        read("data-file", "guest data is read from an external file", section::DATA_FILE, layout()),
        read(
            "data-file-raw",
            "so is it from one that is a raw image, where the map says data",
            section::DATA_FILE,
            raw_data_file(),
        ),
    ]
}

/// A data file that is a raw image: all is mapped, zeros are zeros there too.
pub(super) fn raw_data_file() -> Layout {
    let layout = Layout::new(3, 16, 6 << 16).data_file().with(|image| image.features(0, 0, 2));
    (0..6).fold(layout, |layout, cluster| layout.data(cluster, cluster + 1))
}

/// Bytes that do not compress well: of 64 values.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut random = crate::Random::new(seed + 1000);
    (0..len).map(|_| (random.next() & 63) as u8 | 1).collect()
}
