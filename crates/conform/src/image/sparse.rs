//! Bytes of a file with holes, cheap to copy: crash states of one image share their pages.

use std::collections::BTreeMap;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::{Arc, LazyLock};

use lacuna::storage::HostStatus;

/// Bytes of a page.
const PAGE: u64 = 4096;

type Page = Arc<[u8; PAGE as usize]>;

/// The page that stands for reserved space nobody has written.
static UNWRITTEN: LazyLock<Page> = LazyLock::new(|| Arc::new([0; PAGE as usize]));

/// The content of a file; pages that are not there are holes.
///
/// ```
/// let mut file = lacuna_conform::image::SparseBytes::default();
/// file.write(5000, b"lacuna");
/// assert_eq!(file.len(), 5006);
/// assert_eq!(file.read_vec(4999, 3), b"\0la");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct SparseBytes {
    len: u64,
    /// Shared by copies until one of them changes.
    pages: Arc<BTreeMap<u64, Page>>,
}

impl From<&[u8]> for SparseBytes {
    fn from(bytes: &[u8]) -> Self {
        let mut file = Self::default();
        for (index, page) in bytes.chunks(PAGE as usize).enumerate() {
            if page.iter().any(|byte| *byte != 0) {
                file.write(index as u64 * PAGE, page);
            }
        }
        file.len = bytes.len() as u64;
        file
    }
}

/// The parts of `start..end`, page by page: page index and range in the page.
fn pieces(start: u64, end: u64) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    (start / PAGE..end.div_ceil(PAGE)).filter(move |_| start < end).map(move |page| {
        let from = start.max(page * PAGE) - page * PAGE;
        let to = end.min((page + 1) * PAGE) - page * PAGE;
        (page, from as usize..to as usize)
    })
}

impl SparseBytes {
    /// Returns the length in bytes.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Says whether there is no byte.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `bytes` from `offset` on; zeros past the end.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) {
        let mut rest = bytes;
        let end = offset + rest.len() as u64;
        for (page, within) in pieces(offset, end) {
            let (part, tail) = rest.split_at_mut(within.len());
            match self.pages.get(&page) {
                Some(page) => part.copy_from_slice(&page[within]),
                None => part.fill(0),
            }
            rest = tail;
        }
    }

    /// Returns `len` bytes from `offset` on.
    #[must_use]
    pub fn read_vec(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(offset, &mut bytes);
        bytes
    }

    /// Says whether `bytes` are what is there from `offset` on; zeros past the end.
    ///
    /// ```
    /// let mut file = lacuna_conform::image::SparseBytes::default();
    /// file.write(5000, b"lacuna");
    /// assert!(file.holds(4998, b"\0\0lacuna\0"));
    /// assert!(!file.holds(5000, b"Lacuna"));
    /// ```
    #[must_use]
    pub fn holds(&self, offset: u64, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        pieces(offset, offset + bytes.len() as u64).all(|(page, within)| {
            let (part, tail) = rest.split_at(within.len());
            rest = tail;
            part == &self.page(page)[within]
        })
    }

    /// Says whether `start..end` is zeros.
    #[must_use]
    pub fn reads_zero(&self, start: u64, end: u64) -> bool {
        let pages = start / PAGE..end.div_ceil(PAGE).max(start / PAGE);
        self.pages.range(pages).all(|(page, bytes)| {
            let (from, to) = (start.max(page * PAGE), end.min((page + 1) * PAGE));
            let within = (from - page * PAGE) as usize..(to - page * PAGE) as usize;
            from >= to || bytes[within.clone()] == UNWRITTEN[within]
        })
    }

    fn page(&self, index: u64) -> &[u8; PAGE as usize] {
        self.pages.get(&index).unwrap_or(&UNWRITTEN)
    }

    /// Returns everything.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        self.read_vec(0, usize::try_from(self.len).expect("content fits into memory"))
    }

    /// Writes `bytes` at `offset`, extending the file where it ends earlier.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut rest = bytes;
        let end = offset + rest.len() as u64;
        if bytes.is_empty() {
            return;
        }
        let pages = Arc::make_mut(&mut self.pages);
        for (page, within) in pieces(offset, end) {
            let (part, tail) = rest.split_at(within.len());
            let page = pages.entry(page).or_insert_with(|| Arc::clone(&UNWRITTEN));
            Arc::make_mut(page)[within].copy_from_slice(part);
            rest = tail;
        }
        self.len = self.len.max(end);
    }

    /// Makes `start..end` a hole as far as it covers whole pages, and zeros; the length stays.
    pub fn punch(&mut self, start: u64, end: u64) {
        self.clear(start, end, None);
    }

    /// Makes `start..end` zeros with its space reserved, extending the file.
    pub fn zero(&mut self, start: u64, end: u64) {
        self.clear(start, end, Some(&UNWRITTEN));
        self.len = self.len.max(end);
    }

    fn clear(&mut self, start: u64, end: u64, whole: Option<&Page>) {
        let inner = start.div_ceil(PAGE)..(end / PAGE).max(start.div_ceil(PAGE));
        let touched = start / PAGE..end.div_ceil(PAGE).max(start / PAGE);
        if whole.is_none() && self.pages.range(touched).next().is_none() {
            return;
        }
        let pages = Arc::make_mut(&mut self.pages);
        let present: Vec<u64> = pages.range(inner.clone()).map(|(page, _)| *page).collect();
        for page in present {
            pages.remove(&page);
        }
        if let Some(unwritten) = whole {
            pages.extend(inner.map(|page| (page, Arc::clone(unwritten))));
        }
        for edge in [start / PAGE, end / PAGE] {
            let (from, to) = (start.max(edge * PAGE), end.min((edge + 1) * PAGE));
            if let (true, Some(page)) = (from < to, pages.get_mut(&edge)) {
                let within = (from - edge * PAGE) as usize..(to - edge * PAGE) as usize;
                if page[within.clone()].iter().any(|byte| *byte != 0) {
                    Arc::make_mut(page)[within].fill(0);
                }
            }
        }
    }

    /// Reserves space for `start..end` without a change of its content.
    pub fn allocate(&mut self, start: u64, end: u64) {
        let pages = Arc::make_mut(&mut self.pages);
        for (page, _) in pieces(start, end) {
            pages.entry(page).or_insert_with(|| Arc::clone(&UNWRITTEN));
        }
        self.len = self.len.max(end);
    }

    /// Cuts or extends to `len` bytes.
    pub fn set_len(&mut self, len: u64) {
        let end = self.len.max(len);
        self.punch(len, end.next_multiple_of(PAGE));
        self.len = len;
    }

    /// Returns the status at `offset` and the end of the run of pages that share it.
    #[must_use]
    pub fn status(&self, offset: u64) -> (HostStatus, u64) {
        let first = offset / PAGE;
        let status = self.page_status(first);
        if status == HostStatus::Hole {
            let next = self.pages.range(first..).next();
            return (status, next.map_or(u64::MAX, |(page, _)| page * PAGE));
        }
        let mut end = first + 1;
        while self.page_status(end) == status {
            end += 1;
        }
        (status, end * PAGE)
    }

    fn page_status(&self, page: u64) -> HostStatus {
        match self.pages.get(&page) {
            None => HostStatus::Hole,
            Some(bytes) if Arc::ptr_eq(bytes, &UNWRITTEN) => HostStatus::Unwritten,
            Some(_) => HostStatus::Data,
        }
    }

    /// Returns the pages that are no holes, which differ from those of `other`, and those of `other` that they
    /// stand for. Pages that two files share are known to be equal without a look at their bytes.
    pub fn pages_beside<'a>(
        &'a self,
        other: &'a Self,
    ) -> impl Iterator<Item = (u64, Option<&'a [u8]>, Option<&'a [u8]>)> {
        let mut pages = self.pages.iter().peekable();
        let mut others = other.pages.iter().peekable();
        std::iter::from_fn(move || {
            loop {
                let next = pages.peek().map(|(index, _)| **index);
                let other = others.peek().map(|(index, _)| **index);
                let index = next.into_iter().chain(other).min()?;
                let page = pages.next_if(|(at, _)| **at == index).map(|(_, page)| page);
                let other = others.next_if(|(at, _)| **at == index).map(|(_, page)| page);
                let is_shared = |page: &Page| other.is_some_and(|other| Arc::ptr_eq(page, other));
                if !page.is_some_and(is_shared) {
                    return Some((index, page.map(|it| &it[..]), other.map(|it| &it[..])));
                }
            }
        })
    }

    /// Returns how many bytes are not holes, in whole pages.
    #[must_use]
    pub fn allocated_bytes(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }

    /// Writes the content to a file, holes as holes.
    ///
    /// # Errors
    /// What the host says.
    pub fn write_to(&self, path: &Path) -> std::io::Result<()> {
        let mut file = std::fs::File::create(path)?;
        for (page, bytes) in self.pages.iter() {
            let at = page * PAGE;
            let len = (self.len.saturating_sub(at)).min(PAGE) as usize;
            file.seek(SeekFrom::Start(at))?;
            file.write_all(&bytes[..len])?;
        }
        file.set_len(self.len)
    }

    /// Writes the content to a file for foreign tools, holes as holes.
    ///
    /// # Panics
    /// If the file cannot be written.
    pub fn save(&self, path: &Path) {
        let written = self.write_to(path);
        written.unwrap_or_else(|error| panic!("Writing {}: {error}", path.display()));
    }

    /// Reads a file whole.
    ///
    /// # Panics
    /// If the file cannot be read.
    #[must_use]
    pub fn load(path: &Path) -> Self {
        let bytes = std::fs::read(path)
            .unwrap_or_else(|error| panic!("Reading {}: {error}", path.display()));
        Self::from(&bytes[..])
    }
}
