//! A disk that stores what is written to it once: whole clusters share a place with what was written
//! before.
//!
//! * Always: bytes decide, not fingerprints. What was forgotten, or changed since, costs a cluster and
//!   nothing else.
//! * What shares already gets one more sharer at once, without a write. What had a place of its own is
//!   written, and shared later, many at a time: that makes it durable, which is slow. In an image that
//!   is not complete yet ([`Keepers::InPlace`]) others share it where it lies, at once as well.
//! * Where sharing has to pay ([`Sharing::WhereItPays`]), what looks equal waits until it does.
//! * Memory: [`DedupWritesOptions::memory_bytes`], and a list of at most
//!   [`DedupWritesOptions::batch_bytes`] of clusters that wait to be shared.

use std::collections::HashMap;

use parking_lot::Mutex;

use super::fingerprint::{Fingerprint, Fingerprinter};
use super::index::Index;
use super::share::Sharing;
use crate::block::{DiscardMode, Extent, KnownZeroes, Layer, WriteFlags, ZeroFlags, is_zero};
use crate::buffer::Buffer;
use crate::job::convert::Target;
use crate::qcow2::{Encoder, Image, Shared, Stream, Worth};
use crate::storage::{HostSource, Storage, Transfer};
use crate::units::{GuestCluster, GuestOffset, GuestRange};
use crate::{Error, Result};

/// When clusters that wait to be shared are.
///
/// ```
/// assert_eq!(lacuna::job::AtFlush::default(), lacuna::job::AtFlush::Leave);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AtFlush {
    /// When they are many; flushes are as fast as they can be.
    #[default]
    Leave,
    /// Also at each flush, before it.
    Share,
}

/// What others share of a cluster that has a place of its own.
///
/// ```
/// assert_eq!(lacuna::job::Keepers::default(), lacuna::job::Keepers::Fresh);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Keepers {
    /// A copy, made durable before: a power cut leaves leaks at worst.
    #[default]
    Fresh,
    /// The cluster itself. For an image that is of no use before it is complete: a power cut before
    /// the next flush may leave entries with COPIED to what others share.
    InPlace,
}

/// How writes are deduplicated.
///
/// ```
/// assert_eq!(lacuna::job::DedupWritesOptions::default().memory_bytes, 64 << 20);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct DedupWritesOptions {
    /// Bytes for fingerprints: 16 for each cluster of the disk are enough, with fewer the oldest are
    /// forgotten.
    pub memory_bytes: u64,
    /// With so many bytes of clusters waiting they are shared, by the write that comes next.
    pub batch_bytes: u64,
    /// What a flush does with those that wait.
    pub at_flush: AtFlush,
    /// What is shared of clusters that were written alone.
    pub keepers: Keepers,
    /// When clusters share.
    pub sharing: Sharing,
    /// Of fingerprints, for runs that are to be the same again. `None` draws one, so that no guest can
    /// prepare content for it.
    pub seed: Option<u64>,
}

impl Default for DedupWritesOptions {
    fn default() -> Self {
        Self {
            memory_bytes: 64 << 20,
            batch_bytes: 64 << 20,
            at_flush: AtFlush::default(),
            keepers: Keepers::default(),
            sharing: Sharing::default(),
            seed: None,
        }
    }
}

/// An image whose equal clusters share one place as they are written.
///
/// Only whole clusters share, and only with what was written through this layer. All else is as the
/// image does it. [`finish`](Self::finish) shares what still waits.
///
/// ```
/// use lacuna::block::{Layer, WriteFlags};
/// use lacuna::buffer::Buffer;
/// use lacuna::job::{DedupWrites, DedupWritesOptions};
/// use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
/// use lacuna::storage::MemoryStorage;
/// use lacuna::units::GuestOffset;
///
/// pollster::block_on(async {
///     let storage = MemoryStorage::new();
///     create(&storage, &CreateOptions { size_bytes: 1 << 20, ..Default::default() }).await?;
///     let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadWrite)).await?;
///     let disk = DedupWrites::new(image.clone(), DedupWritesOptions::default())?;
///     let same = Buffer::from(&[7; 4 << 16][..]);
///     disk.write(GuestOffset(0), same, WriteFlags::empty()).await.0?;
///     disk.finish().await?;
///     assert_eq!(disk.shared().freed_bytes, 3 << 16);
///     image.close().await
/// }).unwrap();
/// ```
#[derive(Debug)]
pub struct DedupWrites<S: Storage> {
    image: Image<S>,
    options: DedupWritesOptions,
    fingerprinter: Fingerprinter,
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    index: Index,
    waiting: Waiting,
    shared: Shared,
    /// Whether sharing has paid so far.
    pays: bool,
    declined: Worth,
}

/// Clusters that were written and look equal.
#[derive(Debug, Default)]
struct Waiting {
    groups: Vec<Vec<GuestCluster>>,
    /// In which group a cluster is.
    of: HashMap<GuestCluster, usize, foldhash::fast::RandomState>,
}

impl Waiting {
    /// Puts a cluster into the group of another.
    fn add(&mut self, like: GuestCluster, cluster: GuestCluster) {
        let group = *self.of.entry(like).or_insert_with(|| {
            self.groups.push(vec![like]);
            self.groups.len() - 1
        });
        self.groups[group].push(cluster);
        self.of.insert(cluster, group);
    }
}

/// What a write begins with.
enum Start {
    /// So many bytes to write as they are.
    Plain(usize),
    /// A cluster that looks like another.
    Like(Alike),
}

/// What a cluster looks like.
#[derive(Clone, Copy)]
struct Alike {
    other: GuestCluster,
    fingerprint: Fingerprint,
}

impl<S: Storage> DedupWrites<S> {
    /// Puts the deduplication on top of an image.
    ///
    /// # Errors
    /// What [`Image::why_not_share`] says.
    pub fn new(image: Image<S>, options: DedupWritesOptions) -> Result<Self> {
        if let Some(reason) = image.why_not_share() {
            return Err(reason);
        }
        let clusters = image.geometry().clusters_for(image.size_bytes());
        let index = Index::new(clusters, options.memory_bytes);
        let known = Known {
            index,
            waiting: Waiting::default(),
            shared: Shared::default(),
            pays: options.sharing == Sharing::Always,
            declined: Worth::default(),
        };
        Ok(Self {
            image,
            options,
            fingerprinter: Fingerprinter::new(options.seed),
            known: Mutex::new(known),
        })
    }

    /// Returns the image.
    pub const fn image(&self) -> &Image<S> {
        &self.image
    }

    /// Returns what was shared so far. What was never written since others shared it counts as
    /// shared, and not as freed.
    pub fn shared(&self) -> Shared {
        self.known.lock().shared
    }

    /// Returns what was not shared in the end, as it would not have paid.
    pub fn declined(&self) -> Worth {
        self.known.lock().declined
    }

    /// Shares what still waits, if it is to; durable on return.
    ///
    /// # Errors
    /// As [`Image::share`].
    pub async fn finish(&self) -> Result<()> {
        let waiting = std::mem::take(&mut self.known.lock().waiting);
        if waiting.groups.is_empty() {
            return Ok(());
        }
        if self.options.sharing == Sharing::WhereItPays {
            let worth = self.image.weigh(waiting.groups.iter().cloned()).await?;
            if !worth.pays() {
                self.known.lock().declined = worth;
                return Ok(());
            }
        }
        let shared = self.image.share(&waiting.groups).await?;
        let total = &mut self.known.lock().shared;
        total.shared += shared.shared;
        total.freed_bytes += shared.freed_bytes;
        total.differed += shared.differed;
        total.keepers += shared.keepers;
        Ok(())
    }

    async fn share_when_many(&self) -> Result<()> {
        let waiting = self.known.lock().waiting.of.len() as u64;
        match waiting * self.image.geometry().cluster_bytes() >= self.options.batch_bytes {
            true => Box::pin(self.finish()).await,
            false => Ok(()),
        }
    }

    async fn write_runs(&self, offset: GuestOffset, buffer: Buffer, flags: WriteFlags) -> Transfer {
        let (mut at, mut rest, mut done) = (offset, buffer, None);
        while !rest.is_empty() {
            let start = self.start(at, &rest);
            let len = match start {
                Start::Plain(len) => len,
                Start::Like(_) => self.image.geometry().cluster_bytes() as usize,
            };
            let behind = rest.split_off(len);
            let (result, part) = match start {
                Start::Plain(_) => self.image.write(at, rest, flags).await,
                Start::Like(like) => Box::pin(self.write_like(at, rest, flags, like)).await,
            };
            at = at + len as u64;
            rest = behind;
            done = Some(Buffer::joined(done, part));
            if let Err(error) = result {
                return (Err(error), Buffer::joined(done, rest));
            }
        }
        (Ok(()), Buffer::joined(done, rest))
    }

    /// Notes the clusters that a write begins with, up to one that looks like another.
    fn start(&self, at: GuestOffset, bytes: &[u8]) -> Start {
        let size = self.image.geometry().cluster_bytes();
        let head = (at.0.next_multiple_of(size) - at.0) as usize;
        let mut plain = head;
        while let Some(content) = bytes.get(plain..plain + size as usize) {
            let cluster = GuestCluster((at.0 + plain as u64) / size);
            match self.meet(cluster, content) {
                Some(like) if plain == 0 => return Start::Like(like),
                Some(_) => return Start::Plain(plain),
                None => plain += size as usize,
            }
        }
        Start::Plain(bytes.len())
    }

    /// Returns a cluster that looks like this one, or notes it.
    fn meet(&self, cluster: GuestCluster, content: &[u8]) -> Option<Alike> {
        if is_zero(content) {
            return None;
        }
        let fingerprint = self.fingerprinter.of(content);
        let index = &mut self.known.lock().index;
        match index.find(fingerprint).filter(|other| *other != cluster) {
            None => {
                index.note(fingerprint, cluster);
                None
            }
            Some(other) => Some(Alike { other, fingerprint }),
        }
    }

    async fn write_like(
        &self,
        at: GuestOffset,
        buffer: Buffer,
        flags: WriteFlags,
        like: Alike,
    ) -> Transfer {
        match self.write_without_place(at, &buffer, like).await {
            Ok(true) if flags.contains(WriteFlags::FUA) => (self.image.flush().await, buffer),
            Ok(true) => (Ok(()), buffer),
            Ok(false) => {
                let (result, buffer) = self.image.write(at, buffer, flags).await;
                (self.wait(at, like, result).await, buffer)
            }
            Err(error) => (Err(error), buffer),
        }
    }

    async fn write_without_place(
        &self,
        at: GuestOffset,
        bytes: &[u8],
        like: Alike,
    ) -> Result<bool> {
        let cluster = self.image.geometry().guest_cluster(at);
        let mut is_done = self.image.write_shared(cluster, bytes, like.other).await?;
        if !is_done
            && self.keeps_in_place().await?
            && let Some(keepers) = self.image.keep_in_place(like.other).await?
        {
            is_done = self.image.write_shared(cluster, bytes, like.other).await?;
            self.known.lock().shared.keepers += keepers;
        }
        self.known.lock().shared.shared += u64::from(is_done);
        Ok(is_done)
    }

    /// Says whether a cluster is shared where it lies.
    async fn keeps_in_place(&self) -> Result<bool> {
        if self.options.keepers == Keepers::Fresh {
            return Ok(false);
        }
        let waiting = {
            let known = self.known.lock();
            if known.pays {
                return Ok(true);
            }
            known.waiting.of.len() - known.waiting.groups.len() + 1
        };
        let saved_bytes = waiting as u64 * self.image.geometry().cluster_bytes();
        let pin_bytes = self.image.next_pin_bytes().await?;
        let pays = Worth { saved_bytes, pin_bytes }.pays();
        self.known.lock().pays |= pays;
        Ok(pays)
    }

    /// Has a cluster that was written wait for being shared.
    async fn wait(&self, at: GuestOffset, like: Alike, written: Result<()>) -> Result<()> {
        written?;
        let cluster = self.image.geometry().guest_cluster(at);
        {
            let known = &mut *self.known.lock();
            known.index.note(like.fingerprint, cluster);
            // What is there now has others share it where it lies, from the next one on.
            if self.options.keepers == Keepers::InPlace && known.pays {
                return Ok(());
            }
            known.waiting.add(like.other, cluster);
        }
        self.share_when_many().await
    }
}

impl<S: Storage> Layer for DedupWrites<S> {
    fn size_bytes(&self) -> u64 {
        self.image.size_bytes()
    }

    fn is_read_only(&self) -> bool {
        self.image.is_read_only()
    }

    fn zero_unit_bytes(&self) -> u64 {
        self.image.zero_unit_bytes()
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        self.image.known_zeroes().await
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        self.image.read(offset, buffer).await
    }

    async fn write(&self, offset: GuestOffset, buffer: Buffer, flags: WriteFlags) -> Transfer {
        let size = self.image.geometry().cluster_bytes();
        let has_whole = offset.0.next_multiple_of(size) + size <= offset.0 + buffer.len() as u64;
        match has_whole && offset.0 + buffer.len() as u64 <= self.image.size_bytes() {
            true => self.write_runs(offset, buffer, flags).await,
            false => self.image.write(offset, buffer, flags).await,
        }
    }

    fn host_source(&self, extent: &Extent) -> Option<HostSource> {
        self.image.host_source(extent)
    }

    async fn copy_from(&self, _: GuestOffset, _: HostSource) -> Result<()> {
        Err(Error::unsupported("What the host copies is not seen, and could not be deduplicated"))
    }

    async fn write_zeroes(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        self.image.write_zeroes(range, flags).await
    }

    async fn discard(&self, range: GuestRange, mode: DiscardMode) -> Result<()> {
        self.image.discard(range, mode).await
    }

    async fn flush(&self) -> Result<()> {
        if self.options.at_flush == AtFlush::Share {
            self.finish().await?;
        }
        self.image.flush().await
    }

    async fn settled(&self) {
        self.image.settled().await;
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        self.image.extents(range).await
    }
}

impl<S: Storage> Target for DedupWrites<S> {
    fn encoder(&self) -> Option<Encoder> {
        Target::encoder(&self.image)
    }

    async fn write_encoded(
        &self,
        offset: GuestOffset,
        buffer: Buffer,
        stream: Option<Stream>,
    ) -> Transfer {
        let geometry = self.image.geometry();
        let is_whole =
            geometry.is_aligned(offset.0) && buffer.len() as u64 == geometry.cluster_bytes();
        let cluster = geometry.guest_cluster(offset);
        let like = if is_whole { self.meet(cluster, &buffer) } else { None };
        let Some(like) = like else {
            return self.image.write_encoded(offset, buffer, stream).await;
        };
        match self.write_without_place(offset, &buffer, like).await {
            Ok(true) => (Ok(()), buffer),
            Ok(false) => {
                let (result, buffer) = self.image.write_encoded(offset, buffer, stream).await;
                (self.wait(offset, like, result).await, buffer)
            }
            Err(error) => (Err(error), buffer),
        }
    }
}
