//! What a guest keeps on a disk, as far as that tells of space that it freed and never gave back.
//!
//! A disk image cannot know which files were deleted. A file system can: what it calls free and the
//! image still stores is of no use to anybody, and only the guest may say so, by discards or zeros.

mod file_systems;
mod partitions;

use lacuna::block::DynLayer;
use lacuna::buffer::Buffer;
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;
use serde_json::{Value, json};

use self::file_systems::{FileSystem, recognise};
use self::partitions::{Part, partitions};
use crate::output::short_size;

/// Most bytes that are read of a table.
const MOST_BYTES: u64 = 1 << 20;

/// A file system, and what the image stores for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Guest {
    found: FileSystem,
    /// Bytes in its range that this image has as data.
    stored_bytes: u64,
}

/// Looks for file systems on a disk. What cannot be read is not there.
pub(super) fn look(disk: &dyn DynLayer) -> Vec<Guest> {
    let reader = Reader(disk);
    let whole = Part { start: 0, len: reader.size_bytes() };
    let found = match recognise(&reader, whole) {
        Some(found) => vec![found],
        None => {
            partitions(&reader).into_iter().filter_map(|part| recognise(&reader, part)).collect()
        }
    };
    found
        .into_iter()
        .map(|found| Guest { found, stored_bytes: stored_bytes(disk, &found) })
        .collect()
}

fn stored_bytes(disk: &dyn DynLayer, found: &FileSystem) -> u64 {
    let (mut at, end, mut bytes) = (found.start, found.start + found.len, 0);
    while at < end {
        let range = GuestRange::new(GuestOffset(at), end - at);
        let extents = block_on(disk.extents_boxed(range)).unwrap_or_default();
        let Some(last) = extents.last() else { break };
        at = last.range.end().0;
        let data = extents.iter().filter(|extent| extent.is_own_data());
        bytes += data.map(|extent| extent.range.len).sum::<u64>();
    }
    bytes
}

impl Guest {
    /// Returns how much is stored that the file system calls free; nothing where it does not say.
    fn stale_bytes(&self) -> Option<u64> {
        let used = self.found.len - self.found.free_bytes?;
        Some(self.stored_bytes.saturating_sub(used))
    }

    /// Returns what to do first, where much was freed and never given back.
    pub(super) fn advice(&self) -> Option<String> {
        let FileSystem { kind, start, len, discarded_by, .. } = self.found;
        let place = if start == 0 { String::new() } else { format!(" at {}", short_size(start)) };
        let what = match self.stale_bytes() {
            Some(stale) if stale > len / 20 => format!(
                "about {} of the {kind}{place} are stored and hold deleted files only",
                short_size(stale)
            ),
            None if self.stored_bytes > len / 10 * 9 => {
                format!(
                    "nearly all of the {kind}{place} is stored, as if nothing was ever discarded"
                )
            }
            _ => return None,
        };
        Some(format!(
            "{what}; only the guest can give that back: {discarded_by} there (with discard=unmap), or wipe its \
             free space with zeros, and run this again"
        ))
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "file-system": self.found.kind,
            "start": self.found.start,
            "length": self.found.len,
            "free-bytes": self.found.free_bytes,
            "stored-bytes": self.stored_bytes,
            "stale-bytes": self.stale_bytes(),
            "advice": self.advice(),
        })
    }
}

/// Reads a disk; what cannot be read is missing.
struct Reader<'a>(&'a dyn DynLayer);

impl Reader<'_> {
    fn size_bytes(&self) -> u64 {
        self.0.size()
    }

    fn bytes(&self, at: u64, len: u64) -> Option<Vec<u8>> {
        let is_inside = at.checked_add(len)? <= self.size_bytes() && len <= MOST_BYTES;
        let buffer = is_inside.then(|| Buffer::new(len as usize))?;
        let (result, bytes) = block_on(self.0.read_boxed(GuestOffset(at), buffer));
        result.ok().map(|()| bytes.to_vec())
    }

    fn within(&self, part: Part, at: u64, len: u64) -> Option<Vec<u8>> {
        let is_inside = at + len <= part.len;
        is_inside.then(|| self.bytes(part.start + at, len))?
    }
}

#[cfg(test)]
mod tests {
    use lacuna::raw::Raw;
    use lacuna::storage::MemoryStorage;

    use super::*;

    const MIB: usize = 1 << 20;

    fn seen(bytes: &[u8]) -> Vec<Guest> {
        let disk = block_on(Raw::open(MemoryStorage::from(bytes))).unwrap();
        look(&disk)
    }

    fn put(disk: &mut [u8], at: usize, bytes: &[u8]) {
        disk[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Writes a superblock with `free` blocks of 4 KiB.
    fn put_ext4(disk: &mut [u8], at: usize, free: u32) {
        put(disk, at + 1024 + 0x38, &0xef53_u16.to_le_bytes());
        put(disk, at + 1024 + 0x18, &2_u32.to_le_bytes());
        put(disk, at + 1024 + 0x60, &0x2c2_u32.to_le_bytes());
        put(disk, at + 1024 + 0x0c, &free.to_le_bytes());
        put(disk, at + 1024 + 0x158, &[0; 4]);
    }

    fn put_entry(disk: &mut [u8], table: usize, index: usize, entry: (u8, usize, usize)) {
        let (kind, start, len) = entry;
        let at = table + 446 + 16 * index;
        disk[at + 4] = kind;
        put(disk, at + 8, &(start as u32 / 512).to_le_bytes());
        put(disk, at + 12, &(len as u32 / 512).to_le_bytes());
        put(disk, table + 510, &[0x55, 0xaa]);
    }

    fn places(guests: &[Guest]) -> Vec<(&str, u64, u64)> {
        guests.iter().map(|guest| (guest.found.kind, guest.found.start, guest.found.len)).collect()
    }

    #[test]
    fn a_disk_may_be_one_file_system() {
        let mut disk = vec![1; MIB];
        put_ext4(&mut disk, 0, 200);
        let seen = seen(&disk);
        assert_eq!(places(&seen), [("ext4", 0, MIB as u64)]);
        assert_eq!(seen[0].stale_bytes(), Some(200 * 4096));
        assert!(seen[0].advice().unwrap().contains("fstrim"));
    }

    #[test]
    fn primary_and_logical_partitions_are_looked_into() {
        let mut disk = vec![0; 8 * MIB];
        put_entry(&mut disk, 0, 0, (0x83, MIB, MIB));
        put_entry(&mut disk, 0, 1, (0x05, 4 * MIB, 4 * MIB));
        put_entry(&mut disk, 4 * MIB, 0, (0x07, MIB, MIB));
        // Relative to the extended partition, and back to the first: no chain is endless.
        put_entry(&mut disk, 4 * MIB, 1, (0x05, 0, MIB));
        put(&mut disk, MIB, b"XFSB");
        put(&mut disk, 5 * MIB + 3, b"NTFS    ");
        let seen = seen(&disk);
        let mib = MIB as u64;
        assert_eq!(places(&seen)[..2], [("XFS", mib, mib), ("NTFS", 5 * mib, mib)]);
    }

    #[test]
    fn gpt_is_read_and_what_lies_outside_is_left_out() {
        let mut disk = vec![0; 4 * MIB];
        put_entry(&mut disk, 0, 0, (0xee, 512, 4 * MIB - 512));
        put(&mut disk, 512, b"EFI PART");
        put(&mut disk, 512 + 72, &2_u64.to_le_bytes());
        put(&mut disk, 512 + 80, &u32::MAX.to_le_bytes());
        put(&mut disk, 512 + 84, &128_u32.to_le_bytes());
        for (index, (first, last)) in
            [(2048_u64, 4095_u64), (4096, u64::MAX - 1)].into_iter().enumerate()
        {
            let at = 1024 + 128 * index;
            put(&mut disk, at, &[7; 16]);
            put(&mut disk, at + 32, &first.to_le_bytes());
            put(&mut disk, at + 40, &last.to_le_bytes());
        }
        put(&mut disk, MIB + (64 << 10) + 0x40, b"_BHRfS_M");
        assert_eq!(places(&seen(&disk)), [("btrfs", MIB as u64, MIB as u64)]);
    }

    #[test]
    fn a_disk_of_any_bytes_is_no_obstacle() {
        for byte in [0, 0x55, 0xaa, 0xff] {
            for len in [0, 511, 512, 4096, 70_000] {
                assert_eq!(seen(&vec![byte; len]), [], "{byte} {len}");
            }
        }
    }
}
