//! Where the partitions of a disk lie: the old table of four with its logical ones, and GPT.
//!
//! * By hand: two numbers of each entry are needed, and crates want a device to write to.
//! * Never believed: an entry past the end of the disk is left out, a chain of logical partitions ends
//!   after [`MOST`].

use super::Reader;

/// More partitions than this are not looked at.
const MOST: usize = 128;
const SECTOR: u64 = 512;
/// Sizes of sectors by which GPT may count.
const GPT_SECTORS: [u64; 2] = [512, 4096];
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
const PROTECTIVE: u8 = 0xee;

/// A part of a disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) start: u64,
    pub(super) len: u64,
}

/// Returns the partitions, in the order of their table; none where there is no table.
pub(super) fn partitions(disk: &Reader<'_>) -> Vec<Part> {
    let entries = table(disk, 0).unwrap_or_default();
    let mut parts = match entries.iter().any(|entry| entry.kind == PROTECTIVE) {
        true => GPT_SECTORS.into_iter().find_map(|sector| gpt(disk, sector)).unwrap_or_default(),
        false => entries.iter().flat_map(|entry| entry.parts(disk)).collect(),
    };
    parts.retain(|part| part.len > 0 && part.start.saturating_add(part.len) <= disk.size_bytes());
    parts.truncate(MOST);
    parts
}

/// An entry of a table of four, in sectors.
#[derive(Clone, Copy)]
struct Entry {
    kind: u8,
    start: u64,
    len: u64,
}

fn table(disk: &Reader<'_>, at: u64) -> Option<Vec<Entry>> {
    let sector = disk.bytes(at, SECTOR)?;
    if sector[510..] != [0x55, 0xaa] {
        return None;
    }
    let entries = sector[446..510].chunks_exact(16).map(|entry| Entry {
        kind: entry[4],
        start: little::<4>(entry, 8),
        len: little::<4>(entry, 12),
    });
    Some(entries.filter(|entry| entry.kind != 0).collect())
}

impl Entry {
    fn parts(self, disk: &Reader<'_>) -> Vec<Part> {
        match EXTENDED.contains(&self.kind) {
            true => logical(disk, self.start),
            false => vec![Part { start: self.start * SECTOR, len: self.len * SECTOR }],
        }
    }
}

/// Follows the chain of logical partitions within an extended one.
fn logical(disk: &Reader<'_>, extended: u64) -> Vec<Part> {
    let (mut parts, mut at) = (Vec::new(), extended);
    while parts.len() < MOST {
        let Some(entries) = table(disk, at * SECTOR) else { break };
        let is_link = |entry: &&Entry| EXTENDED.contains(&entry.kind);
        let own = entries.iter().find(|entry| !is_link(entry));
        let Some(own) = own else { break };
        parts.push(Part { start: (at + own.start) * SECTOR, len: own.len * SECTOR });
        let Some(next) = entries.iter().find(is_link) else { break };
        at = extended + next.start;
    }
    parts
}

fn gpt(disk: &Reader<'_>, sector: u64) -> Option<Vec<Part>> {
    let header = disk.bytes(sector, 92)?;
    if &header[..8] != b"EFI PART" {
        return None;
    }
    let at = little::<8>(&header, 72).checked_mul(sector)?;
    let (count, size) = (little::<4>(&header, 80), little::<4>(&header, 84));
    if !(128..=4096).contains(&size) {
        return None;
    }
    let entries = disk.bytes(at, count.min(MOST as u64) * size)?;
    let part = |entry: &[u8]| {
        let (first, last) = (little::<8>(entry, 32), little::<8>(entry, 40));
        let sectors = last.checked_sub(first)?.checked_add(1)?;
        let is_used = entry[..16].iter().any(|byte| *byte != 0);
        let start = first.checked_mul(sector)?;
        is_used.then_some(Part { start, len: sectors.checked_mul(sector)? })
    };
    Some(entries.chunks_exact(size as usize).filter_map(part).collect())
}

/// Reads `N` bytes at `at` as a number, the least byte first.
pub(super) fn little<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + N].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
