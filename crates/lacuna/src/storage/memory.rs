//! An image in memory, sparse in pages.

use std::collections::BTreeMap;

use parking_lot::RwLock;

use super::{Capabilities, Capability, HostExtent, HostStatus, Storage, Transfer, ZeroMode};
use crate::Result;
use crate::buffer::{Buffer, Hold};
use crate::units::{HostOffset, HostRange};

const PAGE: u64 = 4096;

/// An object in memory; pages never written take no space and count as holes.
///
/// ```
/// use lacuna::storage::{MemoryStorage, Storage};
/// let storage = MemoryStorage::new();
/// assert_eq!(pollster::block_on(storage.len()).unwrap(), 0);
/// ```
#[derive(Debug, Default)]
pub struct MemoryStorage(RwLock<Pages>);

#[derive(Debug, Default)]
struct Pages {
    len: u64,
    by_index: BTreeMap<u64, Box<[u8; PAGE as usize]>>,
}

impl MemoryStorage {
    /// Makes an empty object.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns a copy of the whole content.
    ///
    /// # Panics
    /// If the content does not fit into the address space.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let pages = self.0.read();
        let mut bytes = vec![0; usize::try_from(pages.len).expect("content fits into memory")];
        pages.read(0, &mut bytes);
        bytes
    }
}

impl From<&[u8]> for MemoryStorage {
    fn from(bytes: &[u8]) -> Self {
        let storage = Self::new();
        storage.0.write().write(0, bytes);
        storage
    }
}

/// The parts of `[offset, offset + len)`, page by page: page, start in it, place in the buffer, size.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let position = offset + done as u64;
        let within = (position % PAGE) as usize;
        let size = (PAGE as usize - within).min(len - done);
        let piece = (position / PAGE, within, done, size);
        done += size;
        (size > 0).then_some(piece)
    })
}

impl Pages {
    fn read(&self, offset: u64, bytes: &mut [u8]) {
        for (page, within, at, size) in pieces(offset, bytes.len()) {
            match self.by_index.get(&page) {
                Some(page) => {
                    bytes[at..at + size].copy_from_slice(&page[within..within + size]);
                }
                None => bytes[at..at + size].fill(0),
            }
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (page, within, at, size) in pieces(offset, bytes.len()) {
            let page = self.by_index.entry(page).or_insert_with(|| Box::new([0; PAGE as usize]));
            page[within..within + size].copy_from_slice(&bytes[at..at + size]);
        }
        self.len = self.len.max(offset + bytes.len() as u64);
    }

    /// Zeros `[start, end)`: whole pages go, the rest is overwritten.
    fn clear(&mut self, start: u64, end: u64) {
        let (first, last) = (start.div_ceil(PAGE), end / PAGE);
        let doomed: Vec<u64> =
            self.by_index.range(first..last.max(first)).map(|(k, _)| *k).collect();
        for page in doomed {
            self.by_index.remove(&page);
        }
        for page in [start / PAGE, end / PAGE] {
            let (from, to) = (start.max(page * PAGE), end.min((page + 1) * PAGE));
            if let (true, Some(bytes)) = (from < to, self.by_index.get_mut(&page)) {
                bytes[(from - page * PAGE) as usize..(to - page * PAGE) as usize].fill(0);
            }
        }
    }
}

impl Storage for MemoryStorage {
    async fn read_at(&self, offset: HostOffset, mut buffer: Buffer) -> Transfer {
        self.0.read().read(offset.0, &mut buffer);
        (Ok(()), buffer)
    }

    async fn write_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        self.0.write().write(offset.0, &buffer);
        (Ok(()), buffer)
    }

    async fn write_zeroes_at(&self, range: HostRange, _: ZeroMode, _: Hold) -> Result<()> {
        let mut pages = self.0.write();
        pages.clear(range.start.0, range.end().0);
        pages.len = pages.len.max(range.end().0);
        Ok(())
    }

    async fn punch_hole_at(&self, range: HostRange, _: Hold) -> Result<()> {
        self.0.write().clear(range.start.0, range.end().0);
        Ok(())
    }

    async fn allocate_at(&self, range: HostRange) -> Result<()> {
        let mut pages = self.0.write();
        pages.len = pages.len.max(range.end().0);
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn len(&self) -> Result<u64> {
        Ok(self.0.read().len)
    }

    async fn set_len(&self, len: u64, _: Hold) -> Result<()> {
        let mut pages = self.0.write();
        let end = pages.len.max(len);
        pages.clear(len, end);
        pages.len = len;
        Ok(())
    }

    async fn status_at(&self, range: HostRange) -> Result<HostExtent> {
        let pages = self.0.read();
        let first = range.start.0 / PAGE;
        let present = pages.by_index.contains_key(&first);
        let mut end = (first + 1) * PAGE;
        while end < range.end().0 && pages.by_index.contains_key(&(end / PAGE)) == present {
            end = match present {
                true => end + PAGE,
                // The next page that exists ends the hole.
                false => {
                    pages.by_index.range(end / PAGE..).next().map_or(u64::MAX, |(k, _)| k * PAGE)
                }
            };
        }
        let status = if present { HostStatus::Data } else { HostStatus::Hole };
        Ok(HostExtent { len: end.min(range.end().0) - range.start.0, status })
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            write_zeroes: Capability::Native,
            punch_hole: Capability::Native,
            set_len: Capability::Native,
            writable: true,
            preferred_alignment_bytes: 1,
        }
    }
}
