//! What an image remembers: internal snapshots and dirty bitmaps that QEMU's programs made.

mod bitmaps;
mod snapshots;
mod vm_state;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lacuna::block::{DiscardMode, Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::{Access, Image, OpenOptions, Parts};
use lacuna::raw::Raw;
use lacuna::storage::MemoryStorage;
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;
use tempfile::TempDir;
use testkit::foreign::{QEMU_IMG, qemu_io};

type Memory = Arc<MemoryStorage>;

/// An image that QEMU's programs make in a folder of its own.
struct Stock {
    folder: TempDir,
}

impl Stock {
    fn create(options: &str, size: &str) -> Self {
        let stock = Self { folder: tempfile::tempdir().unwrap() };
        stock.img(&["create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", size]);
        stock
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("a.qcow2")
    }

    fn img(&self, words: &[&str]) -> String {
        QEMU_IMG.succeed_in(self.folder.path(), words)
    }

    fn io(&self, commands: &[&str]) {
        qemu_io(&self.path(), commands.iter().map(ToString::to_string));
    }

    /// The image as it is now, in memory.
    fn load(&self) -> Memory {
        load(&self.path())
    }

    /// The disk as QEMU shows it, or that of a snapshot.
    fn content(&self, snapshot: Option<&str>) -> Vec<u8> {
        let mut words = vec!["convert", "-f", "qcow2", "-O", "raw"];
        words.extend(snapshot.iter().flat_map(|name| ["-l", name]));
        words.extend(["a.qcow2", "content.raw"]);
        self.img(&words);
        std::fs::read(self.folder.path().join("content.raw")).unwrap()
    }
}

fn load(path: &Path) -> Memory {
    Arc::new(MemoryStorage::from(&std::fs::read(path).unwrap()[..]))
}

fn open(storage: &Memory, access: Access) -> Image<Memory> {
    open_with(storage, OpenOptions::new(access))
}

fn open_with(storage: &Memory, options: OpenOptions) -> Image<Memory> {
    block_on(Image::open(Parts::alone(Arc::clone(storage)), options)).unwrap()
}

/// Opens an image on top of a raw disk.
fn open_over(storage: &Memory, base: &Path, options: OpenOptions) -> Image<Memory> {
    let base = block_on(Raw::open(load(base))).unwrap();
    let backing: Arc<dyn lacuna::block::DynLayer> = Arc::new(base);
    let parts = Parts { backing: Some(backing), ..Parts::alone(Arc::clone(storage)) };
    block_on(Image::open(parts, options)).unwrap()
}

fn range(start: u64, len: u64) -> GuestRange {
    GuestRange::new(GuestOffset(start), len)
}

fn read(layer: &impl Layer, range: GuestRange) -> lacuna::Result<Vec<u8>> {
    let (result, bytes) = block_on(layer.read(range.start, Buffer::new(range.len as usize)));
    result.map(|()| bytes.to_vec())
}

fn content(layer: &impl Layer) -> Vec<u8> {
    read(layer, layer.whole()).unwrap()
}

fn write(layer: &impl Layer, at: u64, byte: u8, len: u64) {
    let bytes = Buffer::from(&vec![byte; len as usize][..]);
    block_on(layer.write(GuestOffset(at), bytes, WriteFlags::empty())).0.unwrap();
}

fn zero(layer: &impl Layer, range: GuestRange) {
    block_on(layer.write_zeroes(range, ZeroFlags::MAY_UNMAP)).unwrap();
}

fn discard(layer: &impl Layer, range: GuestRange) {
    block_on(layer.discard(range, DiscardMode::Guest)).unwrap();
}
