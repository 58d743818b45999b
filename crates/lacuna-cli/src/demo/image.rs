//! The demo's qcow2 images: made, lived in, measured, made short again.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use lacuna::block::{Extent, Layer, WriteFlags, ZeroFlags, is_zero};
use lacuna::blocking::Disk;
use lacuna::buffer::Buffer;
use lacuna::job::{self, DedupOptions};
use lacuna::qcow2::{Access, CompactOptions, CreateOptions, Image, OpenOptions, Parts, create};
use lacuna::storage::{FileOptions, FileStorage};
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;

use super::guest::{Content, GuestWrite, Step};
use super::{DemoResult, file_system};

/// Whether a write of zeros is taken for what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Detection {
    /// Bytes are bytes.
    Off,
    /// A block of zeros becomes a request to zero it.
    On,
}

/// What there is to say about an image at a moment.
#[derive(Debug)]
pub(super) struct Measured {
    /// Length of the file.
    pub(super) file_bytes: u64,
    /// What the host allocated for it.
    pub(super) host_bytes: u64,
    /// The map of the disk.
    pub(super) extents: Vec<Extent>,
}

/// An open image that a guest lives in.
#[derive(Debug)]
pub(super) struct GuestImage {
    image: Image<FileStorage>,
    path: PathBuf,
    detection: Detection,
}

impl GuestImage {
    /// Makes an empty image.
    pub(super) fn create(path: &Path, detection: Detection) -> DemoResult<Self> {
        Ok(Self { image: new_image(path)?, path: path.to_owned(), detection })
    }

    /// Takes it through a step of the guest's life, flushed at the end, and measures it.
    pub(super) fn live(&self, content: &Content, step: Step) -> DemoResult<Measured> {
        content.play(step, &mut |request| self.write(&request))?;
        block_on(self.image.flush())?;
        self.measure()
    }

    fn write(&self, request: &GuestWrite<'_>) -> DemoResult {
        let start = GuestOffset(request.offset);
        if self.detection == Detection::On && is_zero(request.bytes) {
            let range = GuestRange::new(start, request.bytes.len() as u64);
            block_on(self.image.write_zeroes(range, ZeroFlags::MAY_UNMAP))?;
        } else {
            block_on(self.image.write(start, Buffer::from(request.bytes), WriteFlags::empty())).0?;
        }
        Ok(())
    }

    pub(super) fn measure(&self) -> DemoResult<Measured> {
        measure(&self.image, &self.path)
    }

    /// Closes the image cleanly.
    pub(super) fn close(self) -> DemoResult {
        Ok(block_on(self.image.close())?)
    }
}

/// Gives back in place what an image does not need: zeros that it stores, equal clusters, the tail of
/// the file. Tells how many clusters share a place now.
pub(super) fn reclaim(path: &Path) -> DemoResult<(Measured, u64)> {
    let image = open_as(path, Access::ReadWrite)?;
    block_on(job::sweep(&image, &mut |_| ()))?;
    let deduped = block_on(job::dedup(&image, DedupOptions::default(), &mut |_| ()))?;
    block_on(image.close())?;
    let image = open_as(path, Access::ReadWrite)?;
    block_on(image.compact(&CompactOptions::default(), &mut |_| ()))?;
    Ok((measure(&open(path)?, path)?, deduped.shared))
}

/// Opens an image for reading.
pub(super) fn open(path: &Path) -> DemoResult<Image<FileStorage>> {
    open_as(path, Access::ReadOnly)
}

fn open_as(path: &Path, access: Access) -> DemoResult<Image<FileStorage>> {
    let options = match access {
        Access::ReadOnly => FileOptions::read_only(),
        Access::ReadWrite => FileOptions::read_write(),
    };
    let storage = FileStorage::open(path, &options)?;
    Ok(block_on(Image::open(Parts::alone(storage), OpenOptions::new(access)))?)
}

fn new_image(path: &Path) -> DemoResult<Image<FileStorage>> {
    let storage = FileStorage::open(path, &FileOptions::replace())?;
    let options = CreateOptions { size_bytes: file_system::SIZE_BYTES, ..CreateOptions::default() };
    block_on(create(&storage, &options))?;
    Ok(block_on(Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadWrite)))?)
}

fn measure(image: &Image<FileStorage>, path: &Path) -> DemoResult<Measured> {
    let metadata = path.metadata()?;
    let disk = Disk::new(image.clone());
    let extents = disk.extents(image.whole()).collect::<lacuna::Result<_>>()?;
    Ok(Measured { file_bytes: metadata.len(), host_bytes: metadata.blocks() * 512, extents })
}
