//! An opened image: what its requests share, and how they get what planning needs.
//!
//! Locks, in this order: of bitmaps, first of their edits, then, behind requests in flight, their
//! turn (both async), then the write-back turn (async, one write-back at a time), then the metadata
//! (short, never across an await), then the header (likewise).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::format::{Features, Geometry, Header, IncompatibleFeatures};
use super::in_flight::Token;
use super::mapping::DataPlace;
use super::meta::{LoadedTable, Meta};
use super::need::{Need, Planned, Stop};
use super::options::{DiscardPolicy, ExtentDetail, OpenOptions, Parts, ZeroUnmap};
use super::turn::Turn;
use super::write_back::{Piece, Refcounting};
use crate::block::{BoxFuture, DynLayer};
use crate::buffer::{Buffer, Hold, Release};
use crate::storage::{Event, Storage};
use crate::units::HostOffset;
use crate::{Error, Result};

/// The hold of a metadata write, as opposed to that of a request.
pub(super) const METADATA: u64 = u64::MAX;

/// The hold of a cut of the file: nothing is changed meanwhile.
pub(super) const CUT: u64 = u64::MAX - 1;

/// A qcow2 image.
///
/// Cheap to clone; all clones are one image. Requests may run at the same time from any thread.
/// Close it with [`close`](Self::close): an image that is only dropped is left as after a crash,
/// which loses nothing that was flushed but may leave leaks and the dirty bit.
///
/// ```
/// use lacuna::block::{Layer, WriteFlags};
/// use lacuna::buffer::Buffer;
/// use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
/// use lacuna::storage::MemoryStorage;
/// use lacuna::units::GuestOffset;
///
/// pollster::block_on(async {
///     let storage = MemoryStorage::new();
///     create(&storage, &CreateOptions { size_bytes: 1 << 30, ..Default::default() }).await?;
///     let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadWrite)).await?;
///     image.write(GuestOffset(4096), Buffer::from(&[7; 512][..]), WriteFlags::FUA).await.0?;
///     let (result, bytes) = image.read(GuestOffset(4096), Buffer::new(512)).await;
///     result?;
///     assert_eq!(bytes[0], 7);
///     image.close().await
/// }).unwrap();
/// ```
pub struct Image<S: Storage>(pub(super) Arc<Inner<S>>);

impl<S: Storage> Clone for Image<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<S: Storage> std::fmt::Debug for Image<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image").field("header", &self.0.header).finish_non_exhaustive()
    }
}

pub(super) struct Inner<S> {
    pub(super) storage: S,
    pub(super) data: Option<S>,
    pub(super) backing: Option<Arc<dyn DynLayer>>,
    pub(super) header: Mutex<Header>,
    pub(super) meta: Mutex<Meta>,
    pub(super) discard: DiscardPolicy,
    pub(super) detail: ExtentDetail,
    /// Whether refcounts may be written late.
    pub(super) lazy: bool,
    pub(super) zero_unmap: ZeroUnmap,
    /// One write-back at a time.
    pub(super) turn: Turn,
    /// One change of which bitmaps there are, or of how long they are, at a time.
    pub(super) bitmap_edits: Turn,
    /// Bitmaps are marked in use, or stored, by one at a time; waits for no request.
    pub(super) bitmap_turn: Turn,
    /// Whether bitmaps are to survive a crash.
    pub(super) bitmap_intents: bool,
    /// How many flushes were asked for, and up to which one all is durable.
    pub(super) flushes_asked: AtomicU64,
    pub(super) flushes_done: AtomicU64,
    pub(super) write_backs: AtomicU64,
    /// How many wait for a moment without requests.
    pub(super) waiting_to_be_alone: AtomicUsize,
}

impl<S: Storage> Release for Inner<S> {
    fn release(&self, token: u64) {
        let mut meta = self.meta.lock();
        match token {
            METADATA => meta.in_flight.metadata_write_over(),
            CUT => meta.resume(),
            token => meta.end(Token(token)),
        }
    }
}

/// What an image did so far, and holds.
///
/// ```
/// let counts = lacuna::qcow2::Counts::default();
/// assert_eq!(counts.write_backs, 0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Ordered write-backs of metadata, those of flushes included.
    pub write_backs: u64,
    /// Write-backs made only to get at clusters that were freed shortly before, so that the file
    /// need not grow.
    pub write_backs_for_reuse: u64,
    /// Bytes of L2 tables and refcount blocks that are in memory now.
    pub cached_table_bytes: u64,
}

impl<S: Storage> Image<S> {
    pub(super) fn from_parts(
        parts: Parts<S>,
        header: Header,
        meta: Meta,
        options: &OpenOptions,
    ) -> Self {
        let lazy = super::open::is_lazy(&header, options);
        Self(Arc::new(Inner {
            storage: parts.storage,
            data: parts.data,
            backing: parts.backing,
            header: Mutex::new(header),
            meta: Mutex::new(meta),
            discard: options.discard,
            detail: options.detail,
            lazy,
            zero_unmap: options.zero_unmap,
            turn: Turn::default(),
            bitmap_edits: Turn::default(),
            bitmap_turn: Turn::default(),
            bitmap_intents: options.bitmap_intents,
            flushes_asked: AtomicU64::new(0),
            flushes_done: AtomicU64::new(0),
            write_backs: AtomicU64::new(0),
            waiting_to_be_alone: AtomicUsize::new(0),
        }))
    }

    /// Returns the header as it stands in memory.
    #[must_use]
    pub fn header(&self) -> Header {
        self.0.header.lock().clone()
    }

    /// Returns the sizes of the image.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        *self.0.meta.lock().geometry()
    }

    /// Returns the image file.
    #[must_use]
    pub fn storage(&self) -> &S {
        &self.0.storage
    }

    /// Returns what closed the image to changes, if anything did: a contradiction that was found in
    /// it, or a flush that failed.
    #[must_use]
    pub fn failure(&self) -> Option<Error> {
        self.0.meta.lock().failed.clone()
    }

    /// Returns what was counted since the image was opened.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let meta = self.0.meta.lock();
        Counts {
            write_backs: self.0.write_backs.load(Ordering::Relaxed),
            write_backs_for_reuse: meta.refcounts.released_by_search(),
            cached_table_bytes: meta.l2.cached_bytes() + meta.refcounts.blocks.cached_bytes(),
        }
    }

    /// Makes everything durable, brings refcounts and bitmaps up to date and clears the dirty
    /// bit. No clone can change the image afterwards; requests of other clones that still run fail
    /// or finish; nothing is lost, but they may leave leaks.
    ///
    /// # Errors
    /// The first failure of a write or flush; the image is then as after a crash.
    pub async fn close(self) -> Result<()> {
        if !self.0.meta.lock().writable {
            return Ok(());
        }
        self.close_but_for_dirty_bit().await?;
        self.clear_dirty_bit().await
    }

    /// Closes the image for all clones, whose file needs a check afterwards.
    pub(super) async fn close_but_for_dirty_bit(&self) -> Result<()> {
        // From here on a change would be missing in bitmaps, or not be covered by the dirty bit.
        self.0.meta.lock().closed = true;
        self.store_bitmaps().await?;
        self.write_back(Refcounting::Written).await?;
        // The first one freed clusters; their refcounts are dirty now.
        self.write_back(Refcounting::Written).await?;
        self.round_up_length().await
    }

    /// The file ends with a whole cluster, or behind compressed ones with a whole sector.
    async fn round_up_length(&self) -> Result<()> {
        let len = self.0.storage.len().await?;
        let grown_to = self.0.meta.lock().refcounts.grown_to();
        let right = grown_to.map_or(0, |end| end.0).max(len.next_multiple_of(512));
        match right > len {
            // Nobody writes any more.
            true => self.0.storage.set_len(right, Hold::none()).await,
            false => Ok(()),
        }
    }

    // ---- planning --------------------------------------------------------------------------

    /// Plans under the lock, and does what planning needs outside of it, until there is a plan.
    pub(super) async fn plan<T>(
        &self,
        mut decide: impl FnMut(&mut Meta) -> Planned<T>,
    ) -> Result<T> {
        loop {
            let planned = decide(&mut self.0.meta.lock());
            match planned {
                Ok(plan) => return Ok(plan),
                Err(Stop::Need(need)) => self.satisfy(need).await?,
                Err(Stop::Fail(error)) => return Err(error),
                Err(Stop::Corrupt(error)) => {
                    return Err(Box::pin(self.mark_corrupt(error)).await);
                }
            }
        }
    }

    /// Boxed, since a write-back plans in turn; this is never the fast path.
    fn satisfy(&self, need: Need) -> BoxFuture<'_, Result<()>> {
        match need {
            Need::DropClaims(claims) => Box::pin(self.drop_claims(claims)),
            Need::DirtyBit => Box::pin(self.set_dirty_bit()),
            Need::FirstChange => Box::pin(self.mark_bitmaps_in_use()),
            Need::BitmapIntent => Box::pin(self.write_intents()),
            Need::L2Slice(offset) => Box::pin(self.load_l2_slice(offset)),
            Need::L2Table(offset) => Box::pin(self.load_l2_table(offset)),
            Need::RefcountSlice(offset) => Box::pin(self.load_refcount_slice(offset)),
            Need::RefcountBlock(offset) => Box::pin(self.load_refcount_block(offset)),
            Need::StoredRefcounts => Box::pin(self.write_back(Refcounting::Written)),
            Need::Turn(over) => Box::pin(async {
                over.await;
                Ok(())
            }),
            Need::ZeroCluster => Box::pin(self.ready_zero_cluster()),
            Need::WriteBack => Box::pin(self.write_back(self.usual_refcounting())),
        }
    }

    async fn load_l2_slice(&self, offset: HostOffset) -> Result<()> {
        let (generation, len) = {
            let meta = self.0.meta.lock();
            (meta.l2.generation(), meta.l2.slice_bytes())
        };
        self.0.storage.event(Event::L2Load).await;
        let bytes = self.load(offset, len, "L2 table").await?;
        self.0.meta.lock().l2.insert_loaded(offset, &bytes, generation);
        Ok(())
    }

    async fn load_refcount_slice(&self, offset: HostOffset) -> Result<()> {
        let (generation, len) = {
            let meta = self.0.meta.lock();
            (meta.refcounts.blocks.generation(), meta.refcounts.blocks.slice_bytes())
        };
        self.0.storage.event(Event::RefblockLoad).await;
        let bytes = self.load(offset, len, "refcount block").await?;
        self.0.meta.lock().refcounts.blocks.insert_loaded(offset, &bytes, generation);
        Ok(())
    }

    async fn load_refcount_block(&self, offset: HostOffset) -> Result<()> {
        let (generation, len) = {
            let meta = self.0.meta.lock();
            (meta.refcounts.blocks.generation(), meta.geometry().cluster_bytes())
        };
        let bytes = self.load(offset, len, "refcount block").await?.to_vec();
        self.0.meta.lock().loaded_block = Some(LoadedTable { offset, bytes, generation });
        Ok(())
    }

    async fn load_l2_table(&self, offset: HostOffset) -> Result<()> {
        let (generation, len) = {
            let meta = self.0.meta.lock();
            (meta.l2.generation(), meta.geometry().cluster_bytes())
        };
        let bytes = self.load(offset, len, "L2 table").await?.to_vec();
        self.0.meta.lock().loaded_table = Some(LoadedTable { offset, bytes, generation });
        Ok(())
    }

    pub(super) async fn load(&self, offset: HostOffset, len: u64, what: &str) -> Result<Buffer> {
        let (result, bytes) = self.0.storage.read_at(offset, Buffer::new(len as usize)).await;
        result.map_err(|error| {
            error.context(format!("Reading {what} at host offset {offset}")).at(offset)
        })?;
        Ok(bytes)
    }

    /// Returns the hold of a request: whoever drops it last ends the request.
    pub(super) fn hold(&self, token: Token) -> Hold {
        Hold::new(Arc::clone(&self.0) as Arc<dyn Release>, token.0)
    }

    /// Returns where guest data lies: the external data file where there is one, else the image
    /// file.
    #[must_use]
    pub fn data_storage(&self) -> &S {
        self.0.data.as_ref().unwrap_or(&self.0.storage)
    }

    // ---- header bits -----------------------------------------------------------------------

    async fn set_dirty_bit(&self) -> Result<()> {
        let _turn = self.0.turn.take().await;
        if self.0.meta.lock().gate.dirty_bit {
            self.change_incompatible(|bits| bits.insert(IncompatibleFeatures::DIRTY)).await?;
            self.0.meta.lock().gate.dirty_bit = false;
        }
        Ok(())
    }

    async fn clear_dirty_bit(&self) -> Result<()> {
        let is_set =
            self.0.header.lock().features.incompatible.contains(IncompatibleFeatures::DIRTY);
        if is_set {
            self.change_incompatible(|bits| bits.remove(IncompatibleFeatures::DIRTY)).await?;
        }
        Ok(())
    }

    /// Marks an image that contradicts itself (version 3) and allows no more changes. Returns the
    /// error to report: the contradiction, whether or not it could be marked.
    pub(super) async fn mark_corrupt(&self, error: Error) -> Error {
        let writable = {
            let mut meta = self.0.meta.lock();
            meta.failed.get_or_insert_with(|| error.clone());
            meta.writable
        };
        if writable && self.geometry().version() == super::format::Version::V3 {
            let marked =
                self.change_incompatible(|bits| bits.insert(IncompatibleFeatures::CORRUPT));
            if let Err(second) = marked.await {
                return error.context(format!("Could not mark the image corrupt ({second})"));
            }
        }
        error
    }

    async fn change_incompatible(
        &self,
        change: impl FnOnce(&mut IncompatibleFeatures),
    ) -> Result<()> {
        self.change_features(|features| change(&mut features.incompatible)).await
    }

    /// Changes the feature words, durably.
    pub(super) async fn change_features(&self, change: impl FnOnce(&mut Features)) -> Result<()> {
        self.wait_for_metadata_writes().await;
        let (offset, bytes) = {
            let mut header = self.0.header.lock();
            change(&mut header.features);
            header.features.header_update()
        };
        self.write_header_field(offset, &bytes).await
    }

    /// Writes a header field and makes it durable.
    pub(super) async fn write_header_field(&self, offset: HostOffset, bytes: &[u8]) -> Result<()> {
        self.write_bytes(offset, bytes).await?;
        self.sync().await
    }

    pub(super) async fn write_bytes(&self, offset: HostOffset, bytes: &[u8]) -> Result<()> {
        self.write_piece(Piece { offset, bytes: bytes.to_vec() }).await
    }

    pub(super) fn place(&self) -> DataPlace {
        match self.0.data {
            Some(_) => DataPlace::External,
            None => DataPlace::ImageFile,
        }
    }
}
