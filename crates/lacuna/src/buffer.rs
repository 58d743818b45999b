//! Owned, aligned, pooled I/O buffers.
//!
//! * A storage call takes its [`Buffer`] by value and gives it back with the result. A future that
//!   is dropped half-way leaves the buffer with the driver until the kernel is done with it.
//! * Whatever must outlive the I/O as well (the range lock of the request) rides in the buffer as
//!   its [`Hold`].
//! * Memory is aligned to [`ALIGNMENT`] at the start of a block, always initialised, and returns
//!   to its pool with the last part of it; each thread keeps up to 256 KiB of it at hand.

mod near;

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::sync::{Arc, LazyLock};

use parking_lot::Mutex;

/// Alignment in bytes of the memory of a fresh buffer: enough for O_DIRECT anywhere.
pub const ALIGNMENT: usize = 4096;

/// Someone who is told when the last I/O of a request is over.
///
/// ```
/// use std::sync::Arc;
/// use std::sync::atomic::{AtomicU64, Ordering};
/// use lacuna::buffer::{Hold, Release};
///
/// struct Last(AtomicU64);
/// impl Release for Last {
///     fn release(&self, token: u64) { self.0.store(token, Ordering::Relaxed) }
/// }
/// let last = Arc::new(Last(AtomicU64::new(0)));
/// drop(Hold::new(last.clone(), 7));
/// assert_eq!(last.0.load(Ordering::Relaxed), 7);
/// ```
pub trait Release: Send + Sync {
    /// Takes note that the holder of `token` is gone. Must not block on I/O.
    fn release(&self, token: u64);
}

/// Keeps a request's locks until the driver lets go of the buffer; releases its token when dropped.
///
/// See [`Release`] for an example. [`Hold::none`] holds nothing.
#[derive(Default)]
pub struct Hold(Option<(Arc<dyn Release>, u64)>);

impl Hold {
    /// Makes a hold that calls `owner.release(token)` when dropped.
    #[must_use]
    pub fn new(owner: Arc<dyn Release>, token: u64) -> Self {
        Self(Some((owner, token)))
    }

    /// Makes a hold that holds nothing.
    #[must_use]
    pub const fn none() -> Self {
        Self(None)
    }

    /// Makes two holds of one: what it holds is released when both are gone.
    pub(crate) fn shared(self) -> (Self, Self) {
        let both = Arc::new(HeldTogether(self));
        (Self::new(Arc::clone(&both) as Arc<dyn Release>, 0), Self::new(both, 0))
    }
}

/// What several share: the last to drop it releases it.
struct HeldTogether<T>(T);

impl<T: Send + Sync> Release for HeldTogether<T> {
    fn release(&self, _token: u64) {}
}

/// What the buffer of a caller held: it rides with each part of it that a driver has.
pub(crate) struct OuterHold(Option<Arc<HeldTogether<Hold>>>);

impl OuterHold {
    /// Takes it out of the buffer.
    pub(crate) fn of(buffer: &mut Buffer) -> Self {
        let hold = buffer.take_hold();
        Self(hold.0.is_some().then(|| Arc::new(HeldTogether(hold))))
    }

    /// Returns a hold of both; `inner` is released first.
    pub(crate) fn with(&self, inner: Hold) -> Hold {
        match &self.0 {
            Some(outer) => Hold::new(Arc::new(HeldTogether((inner, Arc::clone(outer)))), 0),
            None => inner,
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some((owner, token)) = self.0.take() {
            owner.release(token);
        }
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Hold").field(&self.0.as_ref().map(|(_, token)| token)).finish()
    }
}

/// A part of a block of memory, owned by whoever holds it.
///
/// ```
/// use lacuna::buffer::Buffer;
/// let mut head = Buffer::zeroed(1024);
/// let mut tail = head.split_off(512);
/// tail.fill(7);
/// head.unsplit(tail);
/// assert_eq!(head[512], 7);
/// ```
pub struct Buffer {
    /// The block this is a part of; parts of one block never overlap.
    block: NonNull<Block>,
    start: usize,
    len: usize,
    hold: Hold,
}

struct Block {
    /// How many buffers are parts of this block.
    parts: AtomicUsize,
    data: NonNull<u8>,
    capacity: usize,
    /// Where it goes when unused; empty while on the shelf, or pool and block would own each other.
    pool: Option<Arc<Shelves>>,
}

// SAFETY: a Buffer is the only one to reach its bytes (parts are disjoint, see `split_off`), and
// the shared Block is touched through an atomic count only.
unsafe impl Send for Buffer {}
// SAFETY: a shared Buffer gives shared access to its bytes and nothing else.
unsafe impl Sync for Buffer {}
// SAFETY: a Block on a shelf belongs to the shelf alone.
unsafe impl Send for Block {}

impl Buffer {
    /// Returns `len` bytes of unspecified (but initialised) content from the common pool.
    #[must_use]
    pub fn new(len: usize) -> Self {
        match near::take(len) {
            Some(block) => Self::whole(block, len),
            None => COMMON.take(len),
        }
    }

    /// Makes a buffer of an unused block.
    fn whole(mut block: Box<Block>, len: usize) -> Self {
        *block.parts.get_mut() = 1;
        Self { block: NonNull::from(Box::leak(block)), start: 0, len, hold: Hold::none() }
    }

    /// Returns `len` zero bytes from the common pool.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let mut buffer = Self::new(len);
        buffer.fill(0);
        buffer
    }

    /// Gives the buffer something to keep while it is with a driver, instead of what it keeps so far.
    pub fn set_hold(&mut self, hold: Hold) {
        self.hold = hold;
    }

    /// Takes the hold out again.
    pub fn take_hold(&mut self) -> Hold {
        std::mem::take(&mut self.hold)
    }

    /// Splits off the bytes from `at` on; `self` keeps those before it, and its hold.
    ///
    /// # Panics
    /// If `at` lies past the end.
    #[must_use]
    pub fn split_off(&mut self, at: usize) -> Self {
        assert!(at <= self.len, "split at {at} of {} bytes", self.len);
        // SAFETY: the block lives while any part does, and `self` is one.
        unsafe { self.block.as_ref() }.parts.fetch_add(1, Ordering::Relaxed);
        let tail = Self {
            block: self.block,
            start: self.start + at,
            len: self.len - at,
            hold: Hold::none(),
        };
        self.len = at;
        tail
    }

    /// Joins the part that follows this one again; its hold is released.
    ///
    /// # Panics
    /// If `tail` is not the part right behind this one.
    pub fn unsplit(&mut self, tail: Self) {
        assert!(self.is_followed_by(&tail), "only neighbours of one block can be joined");
        self.len += tail.len;
    }

    /// Says whether `tail` is the part right behind this one.
    pub(crate) fn is_followed_by(&self, tail: &Self) -> bool {
        tail.block == self.block && tail.start == self.start + self.len
    }

    /// Joins a part that is done, if there is one, with the part behind it.
    pub(crate) fn joined(done: Option<Self>, next: Self) -> Self {
        match done {
            Some(mut done) => {
                done.unsplit(next);
                done
            }
            None => next,
        }
    }

    /// Shortens the buffer to its first `len` bytes; longer is no change.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Returns the size in bytes of the block of memory that this is a part of: a power of two, of
    /// at least [`ALIGNMENT`].
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        // SAFETY: the block lives while any part does, and `self` is one.
        unsafe { self.block.as_ref() }.capacity
    }

    /// Returns the address for a system call that reads from the buffer.
    #[must_use]
    pub fn as_ptr(&self) -> *const u8 {
        self.deref().as_ptr()
    }
}

impl From<&[u8]> for Buffer {
    fn from(bytes: &[u8]) -> Self {
        let mut buffer = Self::new(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: [start, start + len) lies in the block (split_off keeps to it), is initialised
        // (blocks are zeroed when made) and belongs to this part alone.
        unsafe {
            let data = self.block.as_ref().data.as_ptr();
            std::slice::from_raw_parts(data.add(self.start), self.len)
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes the access exclusive.
        unsafe {
            let data = self.block.as_ref().data.as_ptr();
            std::slice::from_raw_parts_mut(data.add(self.start), self.len)
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the block lives while any part does, and `self` is one.
        if unsafe { self.block.as_ref() }.parts.fetch_sub(1, Ordering::Release) != 1 {
            return;
        }
        fence(Ordering::Acquire);
        // SAFETY: this was the last part, so the block is ours alone; it came from `Box::leak`.
        let block = unsafe { Box::from_raw(self.block.as_ptr()) };
        if let Some(mut block) = near::keep(block)
            && let Some(pool) = block.pool.take()
        {
            pool.put_back(block);
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer").field("len", &self.len).field("hold", &self.hold).finish()
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: `data` was allocated with this layout in `Shelves::make`.
        unsafe { dealloc(self.data.as_ptr(), layout(self.capacity)) }
    }
}

/// Memory that comes back: shelves of blocks of equal size, at most `keep_bytes` on them.
///
/// ```
/// let pool = lacuna::buffer::BufferPool::new(1 << 20);
/// assert_eq!(pool.take(65536).len(), 65536);
/// ```
#[derive(Clone)]
pub struct BufferPool(Arc<Shelves>);

struct Shelves {
    keep_bytes: usize,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    /// Blocks of `ALIGNMENT << index` bytes.
    #[expect(clippy::vec_box, reason = "parts point at their block, which must not move")]
    by_size: Vec<Vec<Box<Block>>>,
    bytes: usize,
}

static COMMON: LazyLock<BufferPool> = LazyLock::new(|| BufferPool::new(32 << 20));

impl BufferPool {
    /// Makes an empty pool that keeps at most `keep_bytes` of unused memory.
    #[must_use]
    pub fn new(keep_bytes: usize) -> Self {
        Self(Arc::new(Shelves { keep_bytes, kept: Mutex::default() }))
    }

    /// Returns a buffer of `len` bytes of unspecified (but initialised) content.
    #[must_use]
    pub fn take(&self, len: usize) -> Buffer {
        let capacity = len.max(ALIGNMENT).next_power_of_two();
        let block = self.0.take(capacity).unwrap_or_else(|| self.0.make(capacity));
        Buffer::whole(block, len)
    }
}

impl fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BufferPool").field("kept_bytes", &self.0.kept.lock().bytes).finish()
    }
}

impl Shelves {
    fn take(self: &Arc<Self>, capacity: usize) -> Option<Box<Block>> {
        let mut kept = self.kept.lock();
        let mut block = kept.by_size.get_mut(shelf(capacity))?.pop()?;
        kept.bytes -= capacity;
        block.pool = Some(Arc::clone(self));
        Some(block)
    }

    fn make(self: &Arc<Self>, capacity: usize) -> Box<Block> {
        // SAFETY: the layout has a size of at least ALIGNMENT.
        let data = unsafe { alloc_zeroed(layout(capacity)) };
        let Some(data) = NonNull::new(data) else { handle_alloc_error(layout(capacity)) };
        Box::new(Block { parts: AtomicUsize::new(1), data, capacity, pool: Some(Arc::clone(self)) })
    }

    fn put_back(&self, block: Box<Block>) {
        let mut kept = self.kept.lock();
        if kept.bytes + block.capacity > self.keep_bytes {
            return;
        }
        kept.bytes += block.capacity;
        let shelf = shelf(block.capacity);
        if kept.by_size.len() <= shelf {
            kept.by_size.resize_with(shelf + 1, Vec::new);
        }
        kept.by_size[shelf].push(block);
    }
}

fn shelf(capacity: usize) -> usize {
    (capacity / ALIGNMENT).trailing_zeros() as usize
}

fn layout(capacity: usize) -> Layout {
    Layout::from_size_align(capacity, ALIGNMENT).expect("capacities are bounded powers of two")
}
