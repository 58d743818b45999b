//! File systems by their superblocks, and how much of them is free.
//!
//! What a superblock says of free space may be some seconds old while a guest runs, or lie.

use super::Reader;
use super::partitions::{Part, little};

/// How a guest gives back what it deleted.
const FSTRIM: &str = "fstrim";

/// A file system on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileSystem {
    pub(crate) kind: &'static str,
    /// Where it begins on the disk, in bytes.
    pub(crate) start: u64,
    pub(crate) len: u64,
    /// What it has left, where its superblock says so.
    pub(crate) free_bytes: Option<u64>,
    /// What a guest runs to give back what it deleted.
    pub(crate) discarded_by: &'static str,
}

/// What a superblock says.
struct Found {
    kind: &'static str,
    free_bytes: Option<u64>,
    discarded_by: &'static str,
}

/// Says which file system a part of a disk holds.
pub(super) fn recognise(disk: &Reader<'_>, part: Part) -> Option<FileSystem> {
    let readers = [ext, xfs, btrfs, ntfs, fat, lvm];
    let found = readers.into_iter().find_map(|reader| reader(disk, part))?;
    Some(FileSystem {
        kind: found.kind,
        start: part.start,
        len: part.len,
        free_bytes: found.free_bytes.filter(|free| *free <= part.len),
        discarded_by: found.discarded_by,
    })
}

fn ext(disk: &Reader<'_>, part: Part) -> Option<Found> {
    let block = disk.within(part, 1024, 1024)?;
    if little::<2>(&block, 0x38) != 0xef53 {
        return None;
    }
    let block_bytes = 1024_u64.checked_shl(little::<4>(&block, 0x18) as u32)?;
    let has_high_halves = little::<4>(&block, 0x60) & 0x80 != 0;
    let high = if has_high_halves { little::<4>(&block, 0x158) } else { 0 };
    let free = little::<4>(&block, 0x0c) | high << 32;
    // Extents, 64 bits or flexible groups: only the last of the family has them.
    let kind = if little::<4>(&block, 0x60) & 0x2c0 != 0 { "ext4" } else { "ext2 or ext3" };
    Some(Found { kind, free_bytes: free.checked_mul(block_bytes), discarded_by: FSTRIM })
}

fn xfs(disk: &Reader<'_>, part: Part) -> Option<Found> {
    let block = disk.within(part, 0, 512)?;
    let big = |at: usize, len: usize| {
        block[at..at + len].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
    };
    let free_bytes = big(144, 8).checked_mul(big(4, 4));
    (&block[..4] == b"XFSB").then_some(Found { kind: "XFS", free_bytes, discarded_by: FSTRIM })
}

fn btrfs(disk: &Reader<'_>, part: Part) -> Option<Found> {
    let block = disk.within(part, 64 << 10, 4096)?;
    let free_bytes = little::<8>(&block, 0x70).checked_sub(little::<8>(&block, 0x78));
    let found = Found { kind: "btrfs", free_bytes, discarded_by: FSTRIM };
    (&block[0x40..0x48] == b"_BHRfS_M").then_some(found)
}

fn ntfs(disk: &Reader<'_>, part: Part) -> Option<Found> {
    let block = disk.within(part, 0, 512)?;
    let found = Found { kind: "NTFS", free_bytes: None, discarded_by: "Optimize-Volume -ReTrim" };
    (&block[3..11] == b"NTFS    ").then_some(found)
}

fn fat(disk: &Reader<'_>, part: Part) -> Option<Found> {
    let block = disk.within(part, 0, 512)?;
    let is_fat = block[510..] == [0x55, 0xaa]
        && (&block[0x36..0x39] == b"FAT" || &block[0x52..0x57] == b"FAT32");
    is_fat.then_some(Found { kind: "FAT", free_bytes: None, discarded_by: FSTRIM })
}

fn lvm(disk: &Reader<'_>, part: Part) -> Option<Found> {
    let label = disk.within(part, 512, 8)?;
    let found = Found { kind: "LVM", free_bytes: None, discarded_by: FSTRIM };
    (label == b"LABELONE").then_some(found)
}
