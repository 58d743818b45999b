//! Puts an image onto another backing file without changing what a guest reads.
//!
//! * Always driven by extents: what the image holds itself is not looked at, what both backing
//!   layers know to be zeros is not read, and where they share a layer nothing is compared.
//! * Copied is only what differs, in clusters (subclusters, where there are any): zeros become zero
//!   clusters, or bytes where version 2 has no such thing.
//! * The name of the backing file changes last, after all that was copied is durable. Until then
//!   every state reads as before over the old backing file, so that a job that was cut short can be
//!   run again and finds less to do.
//! * Memory: two buffers of [`REQUEST_BYTES`], and a compressed cluster.

use futures_util::future::join;

use super::Encoding;
use super::yielding::yield_now;
use crate::block::{
    AllocationDepth, DynLayer, Extent, ExtentCursor, ExtentStatus, Layer, WriteFlags, is_zero,
};
use crate::buffer::Buffer;
use crate::qcow2::{BackingName, Image};
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange};
use crate::{Error, Result};

/// How many bytes of each backing layer are looked at in one go: a whole number of clusters.
const REQUEST_BYTES: u64 = 2 << 20;

/// The backing file to come.
///
/// See [`rebase`] for an example.
#[derive(Clone)]
pub struct Onto<'a> {
    /// Its content.
    pub layer: &'a dyn DynLayer,
    /// What the image is to call it.
    pub name: BackingName,
    /// From which depth on, as the image's extents count it, the old chain and the new backing
    /// layer are the same files: there nothing can differ. Nothing where they share none.
    pub shared_from: Option<AllocationDepth>,
}

impl std::fmt::Debug for Onto<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Onto").field("name", &self.name).finish_non_exhaustive()
    }
}

/// How zeros of the old backing layer are stored, where the new one has something else.
///
/// ```
/// assert_eq!(lacuna::job::OldZeros::default(), lacuna::job::OldZeros::Zeroed);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OldZeros {
    /// As bytes, as qemu-img does; those past the end of the old layer are zeroed there too.
    Written,
    /// As zero clusters, which take no space.
    #[default]
    Zeroed,
}

/// How to rebase.
///
/// ```
/// use lacuna::job::{Encoding, RebaseOptions};
/// assert_eq!(RebaseOptions::default().encoding, Encoding::Plain);
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct RebaseOptions {
    /// How what is copied into the image is stored. Parts of a cluster are stored as they are.
    pub encoding: Encoding,
    /// How zeros are stored that come to lie in the image.
    pub zeros: OldZeros,
}

/// What was done to the bytes of the disk; the rest was left alone.
///
/// ```
/// assert_eq!(lacuna::job::Rebased::default().written_bytes, 0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rebased {
    /// Copied into the image.
    pub written_bytes: u64,
    /// Made zeros of the image's own.
    pub zeroed_bytes: u64,
}

/// Copies into `image` what differs between the layer it stands on and the one it is put onto (none,
/// where that is nothing), closes it, and has it name the new one.
///
/// The image reads its present backing layer until then; no other clone of it may be in use.
/// `progress` is told how many bytes of the disk are done, of how many. Dropped at any await, the
/// image is as after a crash: it reads as before, over the old backing layer.
///
/// # Errors
/// `InvalidRequest` where compression is asked for and not possible; else what reading, writing and
/// [`Image::close_onto`] give. The image is closed then, over its old backing file.
///
/// ```
/// use std::sync::Arc;
/// use lacuna::block::{Layer, WriteFlags};
/// use lacuna::buffer::Buffer;
/// use lacuna::job::{self, RebaseOptions};
/// use lacuna::qcow2::{Access, BackingName, CreateOptions, Image, OpenOptions, Parts, create};
/// use lacuna::units::GuestOffset;
/// use lacuna::{raw::Raw, storage::MemoryStorage};
///
/// pollster::block_on(async {
///     let base = Raw::create(MemoryStorage::new(), 1 << 20).await?;
///     base.write(GuestOffset(0), Buffer::from(&[7; 512][..]), WriteFlags::empty()).await.0?;
///     let backing = Some(BackingName { name: "base.raw".into(), format: Some("raw".into()) });
///     let options = CreateOptions { size_bytes: 1 << 30, backing, ..Default::default() };
///     let storage = Arc::new(MemoryStorage::new());
///     create(&storage, &options).await?;
///     let parts = Parts { backing: Some(Arc::new(base)), ..Parts::alone(Arc::clone(&storage)) };
///     let image = Image::open(parts, OpenOptions::new(Access::ReadWrite)).await?;
///
///     // Onto nothing: the image holds all there was.
///     let done = job::rebase(image, None, &RebaseOptions::default(), &mut |_, _| ()).await?;
///     assert_eq!(done.written_bytes, 65536);
///     let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadOnly)).await?;
///     assert_eq!(image.read(GuestOffset(0), Buffer::new(512)).await.1[0], 7);
///     Ok::<_, lacuna::Error>(())
/// }).unwrap();
/// ```
pub async fn rebase<S: Storage>(
    image: Image<S>,
    onto: Option<Onto<'_>>,
    options: &RebaseOptions,
    progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<Rebased> {
    let copied = match Work::new(&image, onto.as_ref(), options) {
        Ok(work) => work.copy(progress).await,
        Err(error) => Err(error),
    };
    match copied {
        Ok(done) => {
            image.close_onto(onto.map(|onto| onto.name)).await?;
            Ok(done)
        }
        Err(error) => match image.close().await {
            Ok(()) => Err(error),
            Err(second) => Err(error.context(format!("The image could not be closed ({second})"))),
        },
    }
}

/// Counts the bytes from `from` on that no layer supplies, and that would show what `new` has if it
/// were put below: those that `new` does not know to be zeros, all within it where its content is
/// not to be had (001-8). By extents alone.
///
/// # Errors
/// What asking for extents gives.
///
/// ```
/// use lacuna::job::uncovered_bytes;
/// use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
/// use lacuna::storage::MemoryStorage;
/// pollster::block_on(async {
///     let storage = MemoryStorage::new();
///     create(&storage, &CreateOptions { size_bytes: 1 << 20, ..Default::default() }).await?;
///     let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadOnly)).await?;
///     assert_eq!(uncovered_bytes(&image, 4096, None).await?, (1 << 20) - 4096);
///     Ok::<_, lacuna::Error>(())
/// }).unwrap();
/// ```
pub async fn uncovered_bytes<S: Storage>(
    image: &Image<S>,
    from: u64,
    new: Option<&dyn DynLayer>,
) -> Result<u64> {
    let (mut here, mut below) = (ExtentCursor::default(), Below::new(new));
    let (mut at, end, mut count) = (GuestOffset(from), image.whole().end(), 0);
    while at < end {
        let here = here.at(image, GuestRange::new(at, end - at)).await?;
        let is_bare = here.status.depth == AllocationDepth::NOWHERE;
        let below = match (is_bare, new) {
            (true, Some(_)) => below.at(here.range).await?,
            _ => Extent { status: ExtentStatus { reads_zero: false, ..here.status }, ..here },
        };
        count += if is_bare && !below.status.reads_zero { below.range.len } else { 0 };
        at = below.range.end();
    }
    Ok(count)
}

/// The layer to come: zeros where there is none, and past its end.
struct Below<'a> {
    layer: Option<&'a dyn DynLayer>,
    cursor: ExtentCursor,
}

impl<'a> Below<'a> {
    fn new(layer: Option<&'a dyn DynLayer>) -> Self {
        Self { layer, cursor: ExtentCursor::default() }
    }

    fn size(&self) -> u64 {
        self.layer.map_or(0, DynLayer::size)
    }

    async fn at(&mut self, range: GuestRange) -> Result<Extent> {
        let there = self.size().saturating_sub(range.start.0).min(range.len);
        match self.layer {
            Some(layer) if there > 0 => {
                self.cursor.at(layer, GuestRange::new(range.start, there)).await
            }
            _ => Ok(Extent { range, status: ExtentStatus::UNALLOCATED }),
        }
    }

    async fn read(&self, range: GuestRange) -> Result<Buffer> {
        let there = self.size().saturating_sub(range.start.0).min(range.len);
        let (mut bytes, behind) = match self.layer {
            Some(layer) if there > 0 => {
                let read = layer.read_boxed(range.start, Buffer::new(there as usize)).await;
                (told(read, "new backing file", range)?, range.len - there)
            }
            _ => return Ok(Buffer::zeroed(range.len as usize)),
        };
        if behind > 0 {
            let mut whole = Buffer::zeroed(range.len as usize);
            whole[..there as usize].copy_from_slice(&bytes);
            bytes = whole;
        }
        Ok(bytes)
    }
}

fn told((result, bytes): (Result<()>, Buffer), what: &str, range: GuestRange) -> Result<Buffer> {
    let told = |error: Error| error.context(format!("Reading the {what} at {}", range.start));
    result.map(|()| bytes).map_err(told)
}

/// What becomes of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Left,
    Written,
    Zeroed,
}

struct Work<'a, S: Storage> {
    image: &'a Image<S>,
    old: ExtentCursor,
    new: Below<'a>,
    shared_from: Option<AllocationDepth>,
    options: RebaseOptions,
    /// What the map can hold apart: copies are whole ones.
    unit: u64,
    size_bytes: u64,
    done: Rebased,
}

impl<'a, S: Storage> Work<'a, S> {
    fn new(image: &'a Image<S>, onto: Option<&Onto<'a>>, options: &RebaseOptions) -> Result<Self> {
        if options.encoding == Encoding::Compressed && image.header().has_external_data_file() {
            return Err(Error::invalid("An image with a data file cannot store compressed data"));
        }
        Ok(Self {
            image,
            old: ExtentCursor::default(),
            new: Below::new(onto.map(|onto| onto.layer)),
            shared_from: onto.and_then(|onto| onto.shared_from),
            options: *options,
            unit: image.zero_unit_bytes(),
            size_bytes: image.size_bytes(),
            done: Rebased::default(),
        })
    }

    async fn copy(mut self, progress: &mut (dyn FnMut(u64, u64) + Send)) -> Result<Rebased> {
        let mut at = GuestOffset(0);
        progress(0, self.size_bytes);
        while at.0 < self.size_bytes {
            let rest = GuestRange::new(at, self.size_bytes - at.0);
            at = self.step(rest).await?;
            progress(at.0, self.size_bytes);
            yield_now().await;
        }
        Ok(self.done)
    }

    /// Does the start of `rest`; returns where to go on.
    async fn step(&mut self, rest: GuestRange) -> Result<GuestOffset> {
        let old = self.old.at(self.image, rest).await?;
        if old.status.depth == AllocationDepth::TOP {
            return Ok(old.range.end());
        }
        let new = self.new.at(old.range).await?;
        let whole = self.whole_units(new.range, rest);
        if self.is_same(old.status, new.status) && whole > 0 {
            return Ok(rest.start + whole);
        }
        // Within one unit there may be anything: all of it is read then.
        let is_known = whole > 0;
        let len = if is_known { whole.min(REQUEST_BYTES) } else { self.unit.min(rest.len) };
        let range = GuestRange::new(rest.start, len);
        let old_zero = is_known && old.status.reads_zero;
        let new_zero = is_known && new.status.reads_zero;
        let (old, new) = join(self.read_old(range, old_zero), self.read_new(range, new_zero)).await;
        self.bring_over(range, old?, &new?).await?;
        Ok(range.end())
    }

    /// Returns how many bytes of a range are whole units; the end of the disk ends one.
    fn whole_units(&self, range: GuestRange, rest: GuestRange) -> u64 {
        match range.end() == rest.end() {
            true => range.len,
            false => range.len / self.unit * self.unit,
        }
    }

    fn is_same(&self, old: ExtentStatus, new: ExtentStatus) -> bool {
        let is_shared = self.shared_from.is_some_and(|depth| old.depth >= depth);
        is_shared || (old.reads_zero && new.reads_zero)
    }

    async fn read_old(&self, range: GuestRange, is_zero: bool) -> Result<Buffer> {
        if is_zero {
            return Ok(Buffer::zeroed(range.len as usize));
        }
        let read = self.image.read(range.start, Buffer::new(range.len as usize)).await;
        told(read, "old backing file", range)
    }

    async fn read_new(&self, range: GuestRange, is_zero: bool) -> Result<Buffer> {
        match is_zero {
            true => Ok(Buffer::zeroed(range.len as usize)),
            false => self.new.read(range).await,
        }
    }

    /// Copies the units of `range` that differ.
    async fn bring_over(&mut self, range: GuestRange, old: Buffer, new: &[u8]) -> Result<()> {
        let unit = self.unit as usize;
        let fates: Vec<Fate> =
            old.chunks(unit).zip(new.chunks(unit)).map(|(old, new)| fate(old, new)).collect();
        let (mut old, mut at) = (old, range.start);
        for run in fates.chunk_by(|left, right| left == right) {
            let rest = old.split_off((run.len() * unit).min(old.len()));
            let part = GuestRange::new(at, old.len() as u64);
            let writes_zeros =
                self.options.zeros == OldZeros::Written && at.0 < self.image.backing_bytes();
            match run[0] {
                Fate::Left => {}
                Fate::Zeroed if !writes_zeros => {
                    self.image.zero_for_good(part).await?;
                    self.done.zeroed_bytes += part.len;
                }
                Fate::Written | Fate::Zeroed => {
                    self.write(at, old).await?;
                    self.done.written_bytes += part.len;
                }
            }
            (old, at) = (rest, part.end());
        }
        Ok(())
    }

    async fn write(&self, start: GuestOffset, bytes: Buffer) -> Result<()> {
        if self.options.encoding == Encoding::Plain {
            return self.image.write(start, bytes, WriteFlags::empty()).await.0;
        }
        let cluster = self.image.geometry().cluster_bytes();
        let (mut at, mut bytes) = (start, bytes);
        while !bytes.is_empty() {
            let len = (cluster - at.0 % cluster).min(bytes.len() as u64);
            let rest = bytes.split_off(len as usize);
            let is_whole = len == cluster || (at.0 % cluster == 0 && at.0 + len == self.size_bytes);
            match is_whole {
                true => self.image.write_compressed(at, bytes).await.0?,
                false => self.image.write(at, bytes, WriteFlags::empty()).await.0?,
            }
            (bytes, at) = (rest, at + len);
        }
        Ok(())
    }
}

fn fate(old: &[u8], new: &[u8]) -> Fate {
    match () {
        () if old == new => Fate::Left,
        () if is_zero(old) => Fate::Zeroed,
        () => Fate::Written,
    }
}
