//! A FAT16 file system with files in its root folder: what the demo uses where mke2fs is missing.
//!
//! Deterministic: the same files give the same bytes. Long names are not stored; a file is called
//! by its number and its extension.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const SECTOR: u64 = 512;
const SECTORS_PER_CLUSTER: u64 = 16;
const CLUSTER: u64 = SECTOR * SECTORS_PER_CLUSTER;
const ROOT_ENTRIES: u64 = 512;
const FIXED_DISK: u8 = 0xf8;
/// 1 January 2026, in the format of a folder entry.
const DATE: u16 = (2026 - 1980) << 9 | 1 << 5 | 1;

/// Where the parts of a file system of a given size lie, in sectors.
#[derive(Clone, Copy, Debug)]
struct Layout {
    total: u64,
    fat: u64,
}

impl Layout {
    fn new(size_bytes: u64) -> Self {
        let total = size_bytes / SECTOR;
        // An entry for each cluster there could be: a few more than are used.
        let fat = (total / SECTORS_PER_CLUSTER + 2).div_ceil(SECTOR / 2);
        Self { total, fat }
    }

    const fn root(self) -> u64 {
        1 + 2 * self.fat
    }

    const fn data(self) -> u64 {
        self.root() + ROOT_ENTRIES * 32 / SECTOR
    }

    const fn clusters(self) -> u64 {
        (self.total - self.data()) / SECTORS_PER_CLUSTER
    }

    /// The first sector of a cluster; the first of them has number 2.
    const fn cluster(self, number: u64) -> u64 {
        self.data() + (number - 2) * SECTORS_PER_CLUSTER
    }
}

/// Makes the file system in `target`, whose length decides its size; files that find no room are
/// left out. Returns how many were stored.
pub(super) fn build(target: &File, files: &[(String, Vec<u8>)]) -> io::Result<usize> {
    let layout = Layout::new(target.metadata()?.len());
    let mut table: Vec<u16> = vec![0xff00 | u16::from(FIXED_DISK), 0xffff];
    let mut root = vec![entry(b"LACUNA     ", 0x08, 0, 0)];
    for (name, content) in files.iter().take(ROOT_ENTRIES as usize - 1) {
        let first = table.len() as u64;
        let count = (content.len() as u64).div_ceil(CLUSTER);
        if count == 0 || first + count > layout.clusters() {
            continue;
        }
        target.write_all_at(content, layout.cluster(first) * SECTOR)?;
        table.extend((first + 1..first + count).map(|next| next as u16));
        table.push(0xffff);
        let short = short_name(root.len(), name);
        root.push(entry(&short, 0x20, first as u16, content.len() as u32));
    }
    target.write_all_at(&boot_sector(layout), 0)?;
    let table: Vec<u8> = table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    target.write_all_at(&table, SECTOR)?;
    target.write_all_at(&table, (1 + layout.fat) * SECTOR)?;
    target.write_all_at(&root.concat(), layout.root() * SECTOR)?;
    Ok(root.len() - 1)
}

fn boot_sector(layout: Layout) -> Vec<u8> {
    let mut sector = vec![0; SECTOR as usize];
    let mut put = |at: usize, bytes: &[u8]| sector[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0xeb, 0x3c, 0x90]);
    put(3, b"LACUNA  ");
    put(11, &(SECTOR as u16).to_le_bytes());
    put(13, &[SECTORS_PER_CLUSTER as u8]);
    put(14, &1_u16.to_le_bytes());
    put(16, &[2]);
    put(17, &(ROOT_ENTRIES as u16).to_le_bytes());
    put(21, &[FIXED_DISK]);
    put(22, &(layout.fat as u16).to_le_bytes());
    put(24, &63_u16.to_le_bytes());
    put(26, &255_u16.to_le_bytes());
    put(32, &(layout.total as u32).to_le_bytes());
    put(36, &[0x80, 0, 0x29]);
    put(39, b"1acu");
    put(43, b"LACUNA     FAT16   ");
    put(510, &[0x55, 0xaa]);
    sector
}

fn entry(name: &[u8; 11], attributes: u8, cluster: u16, size_bytes: u32) -> Vec<u8> {
    let mut entry = vec![0; 32];
    entry[..11].copy_from_slice(name);
    entry[11] = attributes;
    entry[24..26].copy_from_slice(&DATE.to_le_bytes());
    entry[26..28].copy_from_slice(&cluster.to_le_bytes());
    entry[28..].copy_from_slice(&size_bytes.to_le_bytes());
    entry
}

fn short_name(number: usize, name: &str) -> [u8; 11] {
    let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
    let letters: String = extension.chars().filter(char::is_ascii_alphanumeric).take(3).collect();
    let text = format!("F{number:07}{:<3}", letters.to_ascii_uppercase());
    let mut short = [b' '; 11];
    short.copy_from_slice(&text.as_bytes()[..11]);
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    fn built(size_bytes: u64, files: &[(String, Vec<u8>)]) -> (usize, Vec<u8>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fat");
        let file = File::create(&path).unwrap();
        file.set_len(size_bytes).unwrap();
        let stored = build(&file, files).unwrap();
        (stored, std::fs::read(path).unwrap())
    }

    #[test]
    fn sizes_are_those_of_fat16() {
        let layout = Layout::new(256 << 20);
        assert!((4085..65525).contains(&layout.clusters()), "{layout:?}");
        assert!(layout.fat * SECTOR / 2 >= layout.clusters() + 2, "{layout:?}");
    }

    #[test]
    fn files_are_found_by_following_their_chain() {
        let content: Vec<u8> = (0..CLUSTER * 2 + 5).map(|at| (at % 251) as u8).collect();
        let files = [("a.txt".to_owned(), vec![1; 10]), ("b.rs".to_owned(), content.clone())];
        let (stored, bytes) = built(64 << 20, &files);
        assert_eq!(stored, 2);

        let layout = Layout::new(64 << 20);
        let entry = &bytes[(layout.root() * SECTOR) as usize + 64..][..32];
        assert_eq!(&entry[..11], b"F0000002RS ");
        let first = u64::from(u16::from_le_bytes([entry[26], entry[27]]));
        let start = (layout.cluster(first) * SECTOR) as usize;
        assert_eq!(bytes[start..start + content.len()], content);
        let next = |cluster: u64| {
            let at = (SECTOR + cluster * 2) as usize;
            u64::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
        };
        assert_eq!([next(first), next(first + 1), next(first + 2)], [first + 1, first + 2, 0xffff]);
    }

    #[test]
    fn a_file_that_finds_no_room_is_left_out() {
        let files = [("big".to_owned(), vec![1; 65 << 20]), ("small".to_owned(), vec![1])];
        assert_eq!(built(64 << 20, &files).0, 1);
    }
}
