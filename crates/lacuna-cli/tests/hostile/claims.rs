//! Images that claim what cannot be true: sizes, counts, places and streams that made other programs
//! crash, or take all memory or time (reference D.2, and D.1 about sizes).

use testkit::ImageBuilder;

use crate::case::{CLUSTER, assert_outcomes, image};

fn judge(name: &str, builder: ImageBuilder) {
    assert_outcomes(name, &builder);
}

/// The image with one snapshot, some bytes of whose entry are others.
fn snapshot(at: usize, bytes: &[u8]) -> ImageBuilder {
    let image = image(3).snapshot("one");
    let table = image.build().snapshot_table as usize;
    image.patch(table + at, bytes)
}

#[test]
fn cve_2014_0143_huge_l1_table_of_a_snapshot() {
    judge("cve_2014_0143_huge_l1_table_of_a_snapshot", snapshot(8, &[0xff; 4]));
}

#[test]
fn cve_2014_0143_cluster_indexes_beyond_any_refcount() {
    let damage = |words: &mut [u64; 2]| words[0] = 1 << 63 | 0x00ff_ffff_ffff_0000;
    judge("cve_2014_0143_cluster_indexes_beyond_any_refcount", image(3).change_l2(1, damage));
}

#[test]
fn cve_2014_0143_l1_table_larger_than_its_disk() {
    let end = image(3).build().bytes.len().to_be_bytes();
    let image = image(3).patch(36, &[0, 0x3f, 0xff, 0xff]).patch(40, &end);
    judge("cve_2014_0143_l1_table_larger_than_its_disk", image);
}

#[test]
fn cve_2014_0144_snapshots_without_number() {
    judge("cve_2014_0144_snapshots_without_number", snapshot(0, &[]).patch(60, &[0xff; 4]));
}

#[test]
fn cve_2014_0144_snapshot_table_at_the_end_of_the_world() {
    let place = (u64::MAX - 0xffff).to_be_bytes();
    judge(
        "cve_2014_0144_snapshot_table_at_the_end_of_the_world",
        snapshot(0, &[]).patch(64, &place),
    );
}

#[test]
fn cve_2014_0144_header_longer_than_the_file() {
    judge("cve_2014_0144_header_longer_than_the_file", image(3).patch(100, &[0xff; 4]));
}

#[test]
fn cve_2014_0144_refcount_table_without_end() {
    judge("cve_2014_0144_refcount_table_without_end", image(3).patch(56, &[0xff; 4]));
}

#[test]
fn cve_2014_0144_extension_longer_than_any_header() {
    let extension = [0xde, 0xad, 0xbe, 0xef, 0xff, 0xff, 0xff, 0xff];
    judge("cve_2014_0144_extension_longer_than_any_header", image(3).patch(112, &extension));
}

#[test]
fn cve_2014_0144_backing_file_name_longer_than_any() {
    let place = [0, 0, 0, 0, 0, 0, 1, 0, 0xff, 0xff, 0xff, 0xff];
    judge("cve_2014_0144_backing_file_name_longer_than_any", image(3).patch(8, &place));
}

#[test]
fn cve_2014_0145_l1_table_of_a_snapshot_larger_than_the_active_one() {
    let entries = 65536_u32.to_be_bytes();
    let name = "cve_2014_0145_l1_table_of_a_snapshot_larger_than_the_active_one";
    judge(name, snapshot(8, &entries));
}

#[test]
fn cve_2014_0146_an_error_before_the_snapshots_are_known() {
    let name = "cve_2014_0146_an_error_before_the_snapshots_are_known";
    judge(name, snapshot(0, &[]).patch(40, &0x201_u64.to_be_bytes()));
}

#[test]
fn cve_2014_0147_refcounts_that_are_negative_elsewhere() {
    let name = "cve_2014_0147_refcounts_that_are_negative_elsewhere";
    judge(name, image(3).refcount_order(6).refcount(3, u64::MAX).refcount(2, 1 << 63));
}

#[test]
fn cve_2014_0223_a_disk_beyond_all_offsets() {
    judge("cve_2014_0223_a_disk_beyond_all_offsets", image(3).patch(24, &[0xff; 8]));
}

/// A disk of 2 EiB less one cluster of 2 MiB, all of it unallocated, of 200 KiB of file.
#[test]
fn cve_2015_5162_a_tiny_file_with_an_enormous_disk() {
    let size = (1_u64 << 61) - (2 << 20);
    let image = ImageBuilder::new(3, 21, 1 << 20).patch(24, &size.to_be_bytes());
    let l1_entries = size.div_ceil(1 << 39) as u32;
    judge(
        "cve_2015_5162_a_tiny_file_with_an_enormous_disk",
        image.patch(36, &l1_entries.to_be_bytes()),
    );
}

#[test]
fn l1_table_where_the_header_is() {
    judge("l1_table_where_the_header_is", image(3).patch(40, &[0; 8]));
}

#[test]
fn l1_table_beyond_2_to_the_63() {
    judge("l1_table_beyond_2_to_the_63", image(3).patch(40, &(1_u64 << 63).to_be_bytes()));
}

#[test]
fn refcount_table_beyond_the_end() {
    judge("refcount_table_beyond_the_end", image(3).patch(48, &(1_u64 << 50).to_be_bytes()));
}

#[test]
fn clusters_of_no_size() {
    judge("clusters_of_no_size", image(3).patch(20, &[0, 0, 0, 64]));
}

#[test]
fn refcounts_of_no_width() {
    judge("refcounts_of_no_width", image(3).patch(96, &[0, 0, 0, 31]));
}

/// Noise where a deflate stream should be.
#[test]
fn compressed_noise() {
    judge("compressed_noise", image(3).compressed(5, &[0xa5; 700]));
}

/// All of 64 KiB from a few bytes, and a stream that claims to go on beyond the file.
#[test]
fn compressed_stream_beyond_the_end() {
    let damage = |words: &mut [u64; 2]| words[0] |= 0xff << 54;
    judge("compressed_stream_beyond_the_end", image(3).compressed(5, &[1; 9]).change_l2(5, damage));
}

/// Zeros without end in a frame of zstd that says that it holds 2 GiB.
#[test]
fn compressed_bomb() {
    // Magic; a single segment with its size in 4 bytes; then blocks of 128 KiB of one byte each.
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0xa0, 0, 0, 0, 0x80];
    (0..16_000).for_each(|_| frame.extend([0x02, 0x00, 0x10, 0]));
    frame.truncate(CLUSTER);
    judge("compressed_bomb", image(3).zstd().compressed(5, &frame));
}

#[test]
fn compressed_entry_with_the_zero_flag_of_others() {
    // Bit 0 is a part of the offset there: the stream lies at an odd place.
    let damage = |words: &mut [u64; 2]| words[0] |= 1;
    let name = "compressed_entry_with_the_zero_flag_of_others";
    judge(name, image(3).compressed(5, &[0x4b; 64]).change_l2(5, damage));
}

#[test]
fn bitmap_directory_of_any_length() {
    let mut extension = vec![0xff; 4];
    extension.extend([0; 4]);
    extension.extend([0xff; 8]);
    extension.extend(0x10000_u64.to_be_bytes());
    let image = image(3).features(0, 0, 1).extension(0x2385_2875, &extension);
    judge("bitmap_directory_of_any_length", image);
}
