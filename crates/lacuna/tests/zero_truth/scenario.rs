//! A disk made by qemu-img, changed by the engine or by qemu-io, and what is left of it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lacuna::block::{DiscardMode, DynLayer, Extent, Layer, WriteFlags, ZeroFlags, is_zero};
use lacuna::buffer::Buffer;
use lacuna::qcow2::format::{EntryWidth, Header, L1Entry, L2Entry, SubclusterBitmap};
use lacuna::qcow2::{Access, Image, OpenOptions, Parts};
use lacuna::raw::Raw;
use lacuna::storage::{FileAccess, FileOptions, FileStorage};
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;
use tempfile::TempDir;
use testkit::foreign::{QEMU_IMG, qemu_img_check, qemu_io};

/// The byte that the backing file is full of.
pub(crate) const BELOW: u8 = 0xbb;

/// One change; offsets and lengths in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change {
    Compressed(u64, u64, u8),
    Discard(u64, u64),
    Write(u64, u64, u8),
    Zero(u64, u64),
    ZeroUnmap(u64, u64),
}

impl Change {
    /// Returns the command that has qemu-io do it.
    pub(crate) fn command(self) -> String {
        match self {
            Self::Compressed(at, len, byte) => format!("write -c -P {byte} {at} {len}"),
            Self::Discard(at, len) => format!("discard {at} {len}"),
            Self::Write(at, len, byte) => format!("write -P {byte} {at} {len}"),
            Self::Zero(at, len) => format!("write -z {at} {len}"),
            Self::ZeroUnmap(at, len) => format!("write -z -u {at} {len}"),
        }
    }
}

/// What a disk is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup<'a> {
    /// Of `qemu-img create -o`.
    pub(crate) options: &'a str,
    pub(crate) size_bytes: u64,
    /// Whether a backing file full of [`BELOW`] lies under it.
    pub(crate) backing: bool,
    /// What happens before, by qemu-io.
    pub(crate) before: &'a [Change],
    /// Whether a snapshot is taken then.
    pub(crate) snapshot: bool,
}

impl Default for Setup<'_> {
    fn default() -> Self {
        Self {
            options: "compat=1.1",
            size_bytes: 1 << 20,
            backing: false,
            before: &[],
            snapshot: false,
        }
    }
}

/// A disk on the host.
pub(crate) struct Disk {
    _folder: TempDir,
    pub(crate) path: PathBuf,
    below: Option<PathBuf>,
}

/// What is known of a disk.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Left {
    /// The L2 entries in guest order, none where there is no table.
    pub(crate) entries: Vec<L2Entry>,
    pub(crate) bytes: Vec<u8>,
    /// What the image tells of itself; what it calls zero is.
    pub(crate) extents: Vec<Extent>,
    /// Bytes that the file takes on the host.
    pub(crate) allocated: u64,
}

impl Disk {
    pub(crate) fn make(setup: &Setup<'_>) -> Self {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("disk.qcow2");
        let below = setup.backing.then(|| folder.path().join("below.raw"));
        let size = setup.size_bytes.to_string();
        let mut words = vec!["create", "-q", "-f", "qcow2", "-o", setup.options];
        if let Some(below) = &below {
            std::fs::write(below, vec![BELOW; setup.size_bytes as usize]).unwrap();
            words.extend(["-F", "raw", "-b", below.to_str().unwrap()]);
        }
        words.extend([path.to_str().unwrap(), &size]);
        QEMU_IMG.succeed(&words);
        let disk = Self { _folder: folder, path, below };
        if !setup.before.is_empty() {
            disk.by_qemu(setup.before);
        }
        if setup.snapshot {
            QEMU_IMG.succeed(["snapshot", "-c", "s", disk.path.to_str().unwrap()]);
        }
        disk
    }

    /// Has qemu-io change the disk.
    pub(crate) fn by_qemu(&self, changes: &[Change]) {
        qemu_io(&self.path, changes.iter().map(|change| change.command()));
    }

    pub(crate) fn open(&self, options: OpenOptions) -> Image<FileStorage> {
        let files = |access| FileOptions { access, ..FileOptions::default() };
        let storage = FileStorage::open(&self.path, &files(FileAccess::ReadWrite)).unwrap();
        let backing = self.below.as_ref().map(|below| {
            let file = FileStorage::open(below, &files(FileAccess::ReadOnly)).unwrap();
            Arc::new(block_on(Raw::open(file)).unwrap()) as Arc<dyn DynLayer>
        });
        block_on(Image::open(Parts { backing, ..Parts::alone(storage) }, options)).unwrap()
    }

    /// Has the engine change the disk.
    pub(crate) fn by_us(&self, options: OpenOptions, changes: &[Change]) {
        let image = self.open(options);
        for change in changes {
            block_on(apply(&image, *change));
        }
        block_on(image.close()).unwrap();
    }

    /// Returns what is left, and asserts that qemu-img finds nothing wrong.
    pub(crate) fn left(&self) -> Left {
        let checked = qemu_img_check(&self.path);
        assert!(checked.is_clean(), "{}", checked.text);
        let image = self.open(OpenOptions::new(Access::ReadOnly));
        let whole = Buffer::new(image.size_bytes() as usize);
        let (result, bytes) = block_on(image.read(GuestOffset(0), whole));
        result.unwrap();
        let extents = all_extents(&image);
        for zeros in extents.iter().filter(|extent| extent.status.reads_zero) {
            let part = &bytes[zeros.range.start.0 as usize..zeros.range.end().0 as usize];
            assert!(is_zero(part), "{zeros:?}");
        }
        let (entries, allocated) = (entries(&self.path), self.allocated());
        Left { entries, bytes: bytes.to_vec(), extents, allocated }
    }

    pub(crate) fn allocated(&self) -> u64 {
        std::fs::File::open(&self.path).unwrap().sync_all().unwrap();
        std::fs::metadata(&self.path).unwrap().blocks() * 512
    }
}

/// Returns the extents of the whole disk, in as many answers as they take.
fn all_extents<L: Layer>(image: &L) -> Vec<Extent> {
    let (mut all, mut rest) = (Vec::new(), image.whole());
    while !rest.is_empty() {
        let answer = block_on(image.extents(rest)).unwrap();
        let end = answer.last().expect("an answer goes on").range.end();
        rest = GuestRange::new(end, rest.end() - end);
        all.extend(answer);
    }
    all
}

pub(crate) fn writing() -> OpenOptions {
    OpenOptions::new(Access::ReadWrite)
}

pub(crate) async fn apply<L: Layer + Compress>(image: &L, change: Change) {
    let range = |at, len| GuestRange::new(GuestOffset(at), len);
    match change {
        Change::Compressed(at, len, byte) => image.compressed(at, vec![byte; len as usize]).await,
        Change::Discard(at, len) => {
            image.discard(range(at, len), DiscardMode::Guest).await.unwrap();
        }
        Change::Write(at, len, byte) => {
            let bytes = Buffer::from(&vec![byte; len as usize][..]);
            image.write(GuestOffset(at), bytes, WriteFlags::empty()).await.0.unwrap();
        }
        Change::Zero(at, len) => {
            image.write_zeroes(range(at, len), ZeroFlags::empty()).await.unwrap();
        }
        Change::ZeroUnmap(at, len) => {
            image.write_zeroes(range(at, len), ZeroFlags::MAY_UNMAP).await.unwrap();
        }
    }
}

/// Writes compressed clusters, where a layer can.
pub(crate) trait Compress {
    async fn compressed(&self, at: u64, bytes: Vec<u8>);
}

impl<S: lacuna::storage::Storage> Compress for Image<S> {
    async fn compressed(&self, at: u64, bytes: Vec<u8>) {
        self.write_compressed(GuestOffset(at), Buffer::from(&bytes[..])).await.0.unwrap();
    }
}

/// Reads all L2 entries of the active tables straight from the file.
fn entries(path: &Path) -> Vec<L2Entry> {
    entries_of(&std::fs::read(path).unwrap())
}

/// Returns the L2 entries of the active tables in guest order, none where there is no table.
pub(crate) fn entries_of(file: &[u8]) -> Vec<L2Entry> {
    let word = |at: usize| u64::from_be_bytes(file[at..at + 8].try_into().unwrap());
    let header = Header::decode(&file[..512.max(file.len().min(65536))]).unwrap();
    let geometry = header.geometry;
    let clusters = geometry.clusters_for(header.size_bytes) as usize;
    let width = geometry.entry_width().bytes() as usize;
    let tables = (0..header.l1.entries as usize)
        .map(|index| L1Entry(word(header.l1.offset.0 as usize + index * 8)).table());
    let per_table = geometry.cluster_bytes() as usize / width;
    let entry = |table: usize, index: usize| {
        let at = table + index * width;
        let extended = geometry.entry_width() == EntryWidth::Extended;
        let subclusters = SubclusterBitmap(if extended { word(at + 8) } else { 0 });
        L2Entry { word: word(at), subclusters }
    };
    let all = tables.flat_map(|table| {
        (0..per_table).map(move |index| {
            table.map_or(L2Entry::UNALLOCATED, |table| entry(table.0 as usize, index))
        })
    });
    all.take(clusters).collect()
}

/// File systems allot blocks for their own records of a file: up to this many bytes are theirs.
const SLACK: u64 = 16 << 10;

/// Asserts that a file gave `expected` bytes back to the host.
#[track_caller]
pub(crate) fn assert_gave_back(before: u64, after: u64, expected: u64) {
    let given = before as i64 - after as i64;
    let off = given.abs_diff(expected as i64);
    assert!(off <= SLACK, "{given} bytes given back, not {expected}");
}

/// Asserts that a file takes no more space than another.
#[track_caller]
pub(crate) fn assert_not_larger(ours: u64, theirs: u64) {
    assert!(ours <= theirs + SLACK, "takes {ours} bytes, not {theirs}");
}
