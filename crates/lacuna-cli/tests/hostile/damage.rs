//! The table of damages that `qemu-img check` was tried with (reference B.13), a test for each row.

use testkit::ImageBuilder;

use crate::case::{assert_outcomes, image};

const COPIED: u64 = 1 << 63;
/// Where the first cluster with data is; the next lie behind it.
const DATA: u64 = 0x30000;
const L2: u64 = 0x20000;

fn judge(name: &str, builder: ImageBuilder) {
    assert_outcomes(name, &builder);
}

#[test]
fn healthy_image() {
    let built = image(3).build();
    assert_eq!((built.l1, built.l2[&0], built.data[&0]), (0x10000, L2, DATA), "the layout");
    judge("healthy_image", image(3));
}

#[test]
fn l2_offset_unaligned() {
    judge("l2_offset_unaligned", image(3).change_l2(1, |words| words[0] += 0x200));
}

#[test]
fn l2_offset_beyond_the_end() {
    let damage = |words: &mut [u64; 2]| words[0] = COPIED | 1 << 40;
    judge("l2_offset_beyond_the_end", image(3).change_l2(1, damage));
}

#[test]
fn copied_flag_missing() {
    judge("copied_flag_missing", image(3).change_l2(1, |words| words[0] &= !COPIED));
}

#[test]
fn two_entries_with_one_cluster() {
    let damage = |words: &mut [u64; 2]| words[0] = COPIED | DATA;
    judge("two_entries_with_one_cluster", image(3).change_l2(1, damage));
}

#[test]
fn reserved_bit_1() {
    judge("reserved_bit_1", image(3).change_l2(1, |words| words[0] |= 2));
}

#[test]
fn reserved_bit_56() {
    judge("reserved_bit_56", image(3).change_l2(1, |words| words[0] |= 1 << 56));
}

#[test]
fn l2_entry_to_its_own_table() {
    let damage = |words: &mut [u64; 2]| words[0] = COPIED | L2;
    judge("l2_entry_to_its_own_table", image(3).change_l2(4, damage));
}

#[test]
fn l1_offset_unaligned() {
    judge("l1_offset_unaligned", image(3).change_l1(0, |words| words[0] += 0x200));
}

#[test]
fn l1_offset_beyond_the_end() {
    let damage = |words: &mut [u64; 2]| words[0] = COPIED | 1 << 40;
    judge("l1_offset_beyond_the_end", image(3).change_l1(0, damage));
}

#[test]
fn l1_reserved_bit() {
    judge("l1_reserved_bit", image(3).change_l1(0, |words| words[0] |= 1));
}

/// The refcount table comes behind all the rest, its block behind it.
fn refcount_table(entry: u64) -> ImageBuilder {
    let at = image(3).build().refcount_table as usize;
    image(3).patch(at, &entry.to_be_bytes())
}

#[test]
fn refcount_table_entry_unaligned() {
    let block = image(3).build().refcount_blocks[0];
    judge("refcount_table_entry_unaligned", refcount_table(block + 0x200));
}

#[test]
fn refcount_0_of_a_used_cluster() {
    judge("refcount_0_of_a_used_cluster", image(3).refcount(DATA >> 16, 0));
}

#[test]
fn refcount_2_of_a_cluster_used_once() {
    judge("refcount_2_of_a_cluster_used_once", image(3).refcount(DATA >> 16, 2));
}

#[test]
fn refcount_block_missing() {
    judge("refcount_block_missing", refcount_table(0));
}

#[test]
fn subcluster_both_data_and_zero() {
    let damage = |words: &mut [u64; 2]| words[1] |= 1 << 32;
    judge("subcluster_both_data_and_zero", image(3).extended().change_l2(1, damage));
}

#[test]
fn zero_flag_in_version_2() {
    judge("zero_flag_in_version_2", image(2).change_l2(1, |words| words[0] |= 1));
}
