//! A disk under a name.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lacuna::Error;
use lacuna::block::is_all_zeroes;
use lacuna_nbd::context::Context;
use lacuna_nbd::server::{Export as Description, Refusal};
use lacuna_nbd::wire::{InitState, TransmissionFlags};
use lacuna_nbd::{BlockSizes, ContextId, ExportName};
use parking_lot::{Condvar, Mutex};

use crate::ServedDisk;
use crate::facts::{Fact, LayerBitmaps, facts};

/// How long a client waits for what is true at the start, if it asks for it.
const LONGEST_WALK: Duration = Duration::from_secs(1);

/// Exports that were made in this process.
static EXPORTS: AtomicU64 = AtomicU64::new(0);

/// How a disk is served.
///
/// ```
/// use lacuna_export::ExportOptions;
/// let options = ExportOptions { read_only: true, ..ExportOptions::default() };
/// assert!(options.allocation_depth);
/// ```
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// A text for people.
    pub description: Option<String>,
    /// Refuse changes, also where the disk would take them.
    pub read_only: bool,
    /// How many clients at once; 0 is any number.
    pub shared: usize,
    /// Offer `qemu:allocation-depth`.
    pub allocation_depth: bool,
    /// Offer these bitmaps; nothing is all that can be read.
    pub bitmaps: Option<Vec<String>>,
    /// Tell clients that they may use several connections.
    pub multi_conn: bool,
    /// Offer `x-lacuna:layers`, dirty in these bitmaps, and `x-lacuna:layers:NAME` for each bitmap
    /// that a level has.
    pub layers: Option<LayerBitmaps>,
    /// Let clients change the size.
    pub resize: bool,
    /// Sizes that requests are told to keep to.
    pub block_sizes: BlockSizes,
    /// It is there beside another one, which may go without a name as if it were alone
    /// ([`Exports::with_only_as_default`](crate::Exports::with_only_as_default)).
    pub is_companion: bool,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            description: None,
            read_only: false,
            shared: 0,
            allocation_depth: true,
            bitmaps: None,
            multi_conn: true,
            layers: Some(LayerBitmaps::default()),
            resize: false,
            block_sizes: BlockSizes::default(),
            is_companion: false,
        }
    }
}

/// What was done through an export since it was added.
///
/// ```
/// assert_eq!(lacuna_export::Statistics::default().reads, 0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Reads that were answered.
    pub reads: u64,
    /// Bytes of them.
    pub read_bytes: u64,
    /// Writes that were answered.
    pub writes: u64,
    /// Bytes of them.
    pub written_bytes: u64,
    /// Zeroings and trims.
    pub zeroes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Block status requests.
    pub statuses: u64,
    /// Requests that ended in an error.
    pub errors: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) reads: AtomicU64,
    pub(crate) read_bytes: AtomicU64,
    pub(crate) writes: AtomicU64,
    pub(crate) written_bytes: AtomicU64,
    pub(crate) zeroes: AtomicU64,
    pub(crate) flushes: AtomicU64,
    pub(crate) statuses: AtomicU64,
    pub(crate) errors: AtomicU64,
}

impl Counters {
    fn snapshot(&self) -> Statistics {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Statistics {
            reads: of(&self.reads),
            read_bytes: of(&self.read_bytes),
            writes: of(&self.writes),
            written_bytes: of(&self.written_bytes),
            zeroes: of(&self.zeroes),
            flushes: of(&self.flushes),
            statuses: of(&self.statuses),
            errors: of(&self.errors),
        }
    }
}

/// A disk that clients reach by a name.
///
/// ```
/// use lacuna::{raw::Raw, storage::MemoryStorage};
/// use lacuna_export::{Export, ExportOptions, Plain};
/// let disk = pollster::block_on(Raw::create(MemoryStorage::new(), 1 << 20))?;
/// let export = Export::new("root", Plain(disk), ExportOptions::default()).unwrap();
/// assert_eq!(export.clients().now, 0);
/// # Ok::<_, lacuna::Error>(())
/// ```
#[derive(Debug)]
pub struct Export<D> {
    name: ExportName,
    disk: D,
    options: ExportOptions,
    facts: Vec<(Context, Fact)>,
    /// One for each export of the process.
    number: u64,
    clients: Mutex<Crowd>,
    changed: Condvar,
    pub(crate) counters: Counters,
}

/// How many clients an export has.
///
/// ```
/// assert_eq!(lacuna_export::Clients::default().ever, 0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clients {
    /// Connected at this moment.
    pub now: usize,
    /// Connected since the export was added.
    pub ever: u64,
}

impl<D: ServedDisk> Export<D> {
    /// Names a disk; the empty name is the default export.
    ///
    /// # Errors
    /// `InvalidRequest` where the protocol has no such names: NUL in it, or above 4096 bytes.
    pub fn new(name: &str, disk: D, options: ExportOptions) -> lacuna::Result<Self> {
        let name = ExportName::new(name).ok_or_else(|| {
            Error::invalid("The name of an export has at most 4096 bytes and no NUL")
        })?;
        let facts = facts(&disk, &options);
        Ok(Self {
            name,
            disk,
            options,
            facts,
            number: EXPORTS.fetch_add(1, Ordering::Relaxed),
            clients: Mutex::default(),
            changed: Condvar::new(),
            counters: Counters::default(),
        })
    }

    /// Returns the name.
    pub const fn name(&self) -> &ExportName {
        &self.name
    }

    /// Returns the disk.
    pub const fn disk(&self) -> &D {
        &self.disk
    }

    /// Returns how it is served.
    pub const fn options(&self) -> &ExportOptions {
        &self.options
    }

    /// Returns what was done through it.
    pub fn statistics(&self) -> Statistics {
        self.counters.snapshot()
    }

    /// Returns how many clients it has and had.
    pub fn clients(&self) -> Clients {
        self.clients.lock().clients
    }

    /// Says whether changes are refused.
    pub fn is_read_only(&self) -> bool {
        self.options.read_only || self.disk.is_read_only()
    }

    /// Returns what a meta context tells.
    pub(crate) fn fact(&self, id: ContextId) -> Option<&Fact> {
        self.facts.iter().find(|(context, _)| context.id == id).map(|(_, fact)| fact)
    }

    /// Describes the export as it is at this moment (000-11: never from an earlier look).
    pub(crate) async fn describe(&self, wants_init_state: bool) -> Description {
        let mut description = Description::new(self.disk.size_bytes());
        description.name = Some(self.name.clone());
        description.description = self.options.description.clone();
        description.flags = self.flags();
        description.block_sizes = self.options.block_sizes;
        description.contexts = self.facts.iter().map(|(context, _)| context.clone()).collect();
        if wants_init_state {
            description.init_state = self.init_state().await;
        }
        description
    }

    fn flags(&self) -> TransmissionFlags {
        type Flags = TransmissionFlags;
        let mut flags = Flags::SEND_FLUSH | Flags::SEND_FUA | Flags::SEND_CACHE;
        if self.is_read_only() {
            flags |= Flags::READ_ONLY;
        } else {
            flags |= Flags::SEND_TRIM | Flags::SEND_WRITE_ZEROES | Flags::SEND_FAST_ZERO;
            flags.set(Flags::SEND_RESIZE, self.options.resize);
        }
        flags.set(Flags::CAN_MULTI_CONN, self.options.multi_conn);
        flags.set(Flags::ROTATIONAL, self.disk.is_rotational());
        flags
    }

    /// What is not known is not claimed: an error here says no more than "unknown", nor does a
    /// walk that takes long.
    async fn init_state(&self) -> InitState {
        let mut state = InitState::empty();
        let walk = tokio::time::timeout(LONGEST_WALK, is_all_zeroes(&self.disk)).await;
        state.set(InitState::ZERO, matches!(walk, Ok(Ok(true))));
        let extents = self.disk.extents(self.disk.whole()).await.unwrap_or_default();
        state.set(InitState::SPARSE, extents.iter().any(|extent| extent.status.is_hole));
        state
    }

    /// Counts a client in, unless there are as many as there may be.
    pub(crate) fn admit(self: &Arc<Self>) -> Result<Guest<D>, Refusal> {
        let most = self.options.shared;
        let mut crowd = self.clients.lock();
        if crowd.is_retired {
            return Err(Refusal::Unknown);
        }
        if crowd.is_kept_out {
            let text = format!("Export {} is being changed; try again in a moment", self.name);
            return Err(Refusal::Policy(text));
        }
        if most != 0 && crowd.clients.now >= most {
            let text = format!("Export {} has its {most} clients already", self.name);
            return Err(Refusal::Policy(text));
        }
        crowd.clients.now += 1;
        crowd.clients.ever += 1;
        Ok(Guest(Arc::clone(self)))
    }

    pub(crate) const fn number(&self) -> u64 {
        self.number
    }

    /// Lets no client in any more. Those that are there stay.
    pub fn retire(&self) {
        self.clients.lock().is_retired = true;
    }

    /// Lets no client in as long as what is returned lives. Nothing where some are there, or somebody else
    /// does the same.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use lacuna::{raw::Raw, storage::MemoryStorage};
    /// # use lacuna_export::{Export, ExportOptions, Plain};
    /// # let disk = pollster::block_on(Raw::create(MemoryStorage::new(), 1 << 20))?;
    /// let export = Arc::new(Export::new("root", Plain(disk), ExportOptions::default())?);
    /// let empty = export.keep_out().unwrap();
    /// // Nobody sees what happens to the disk here.
    /// drop(empty);
    /// # Ok::<_, lacuna::Error>(())
    /// ```
    pub fn keep_out(self: &Arc<Self>) -> Option<Empty<D>> {
        let mut crowd = self.clients.lock();
        if crowd.clients.now > 0 || crowd.is_kept_out {
            return None;
        }
        crowd.is_kept_out = true;
        Some(Empty(Arc::clone(self)))
    }

    /// Waits until no client is left, at most for so long; says whether it came to that.
    pub fn wait_until_left(&self, patience: Duration) -> bool {
        let deadline = Instant::now().checked_add(patience);
        let mut crowd = self.clients.lock();
        while crowd.clients.now > 0 {
            match deadline {
                None => self.changed.wait(&mut crowd),
                Some(deadline) if self.changed.wait_until(&mut crowd, deadline).timed_out() => {
                    return crowd.clients.now == 0;
                }
                Some(_) => {}
            }
        }
        true
    }
}

/// How many clients there are, and whether more may come.
#[derive(Debug, Default)]
struct Crowd {
    clients: Clients,
    is_retired: bool,
    /// For a moment.
    is_kept_out: bool,
}

/// An export that no client has, and none gets; made by [`Export::keep_out`], with an example there.
#[derive(Debug)]
pub struct Empty<D>(Arc<Export<D>>);

impl<D> Drop for Empty<D> {
    fn drop(&mut self) {
        self.0.clients.lock().is_kept_out = false;
    }
}

/// A client's place at an export, given back when it leaves.
#[derive(Debug)]
pub(crate) struct Guest<D>(Arc<Export<D>>);

impl<D> Guest<D> {
    pub(crate) const fn export(&self) -> &Arc<Export<D>> {
        &self.0
    }
}

impl<D> Drop for Guest<D> {
    fn drop(&mut self) {
        self.0.clients.lock().clients.now -= 1;
        self.0.changed.notify_all();
    }
}
