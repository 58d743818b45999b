//! Copies a disk to another one: [`cut`] decides what to read, [`pump`] moves it, [`sparse`] finds
//! zeros in what was read, [`units`] compresses it on all cores.
//!
//! * Never reads what extents call zero; never writes zeros where the target is zero already.
//! * Always in guest order by default, one write at a time while reads run ahead, so that a new
//!   image is laid out as `qemu-img convert` lays it out, and the same for any number of threads.
//! * Memory: at most `in_flight + 2` buffers of [`REQUEST_BYTES`] with writes in order, twice
//!   `in_flight` and one more with writes in any order. Compressing, they are of
//!   [`ENCODE_BYTES`] or a cluster, and each has what it is compressed to beside it.
//! * Dropping the future at any await leaves a valid target with part of the content.

mod cut;
mod failure;
mod pump;
mod sparse;
mod target;
#[cfg(test)]
mod tests;
mod units;

pub use failure::{CopyFailure, CopyStep};
pub use target::Target;

use crate::block::{KnownZeroes, Layer};
use crate::{Error, Result};

/// How many bytes one request reads at most: what `qemu-img convert` uses.
const REQUEST_BYTES: u64 = 2 << 20;

/// How many bytes are compressed on one thread in one go: enough to make the hop not count.
const ENCODE_BYTES: u64 = 512 << 10;

/// What is known of the target before the first write.
///
/// ```
/// assert_eq!(lacuna::job::TargetContent::default(), lacuna::job::TargetContent::Unknown);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TargetContent {
    /// Anything may be there: zeros are made by zeroing.
    #[default]
    Unknown,
    /// All of it reads as zeros (a new image without backing): zeros need no request.
    Zero,
    /// The source is the upper part of a chain, opened without the lower one, and the target is that
    /// lower one: what no layer of the source decides is left alone.
    Beneath {
        /// How far the target shows where the source decides nothing; past it the source reads as
        /// zeros.
        shown_bytes: u64,
    },
    /// A backing layer of the target reads the same as the backing layer of the source does: what
    /// the source's top layer leaves to its backing layer is left out.
    Backing {
        /// Size of the source's backing layer.
        source_bytes: u64,
        /// Size of the target's backing layer. Past it the target reads as zeros.
        target_bytes: u64,
    },
}

/// How data is stored in the target.
///
/// ```
/// assert_eq!(lacuna::job::Encoding::default(), lacuna::job::Encoding::Plain);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encoding {
    /// As it is.
    #[default]
    Plain,
    /// Compressed cluster by cluster, where that makes it smaller.
    Compressed,
}

/// In which order writes are given to the target.
///
/// ```
/// assert_eq!(lacuna::job::WriteOrder::default(), lacuna::job::WriteOrder::Guest);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WriteOrder {
    /// One after the other, by guest offset: the layout of a new image is predictable.
    #[default]
    Guest,
    /// As reads complete, several at once: faster on some hosts.
    Any,
}

/// What happens to zeros of the source where the target reads as zeros already.
///
/// ```
/// assert_eq!(lacuna::job::KnownZeros::default(), lacuna::job::KnownZeros::Left);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KnownZeros {
    /// The target is left alone, unless those are zeros of its backing layer.
    #[default]
    Left,
    /// They are zeroed again, as qemu-img does: a qcow2 image gets tables that say so.
    Zeroed,
}

/// Where content is compressed.
///
/// ```
/// assert_eq!(lacuna::job::Threads::default(), lacuna::job::Threads::Cores);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Threads {
    /// Where the job is polled. For executors that must know of everything that goes on.
    Caller,
    /// On threads of the library's own, as many as the host has cores; all jobs share them.
    #[default]
    Cores,
}

/// Who moves data.
///
/// ```
/// assert_eq!(lacuna::job::Mover::default(), lacuna::job::Mover::Job);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mover {
    /// The host, from file to file, sharing blocks where its file system can; where it cannot, and
    /// for content that is to be compressed, the job. Zeros in data are not looked for then.
    Host,
    /// The job: it reads and writes.
    #[default]
    Job,
}

/// How to convert.
///
/// ```
/// use lacuna::job::{ConvertOptions, Encoding, TargetContent};
/// let options = ConvertOptions {
///     content: TargetContent::Zero,
///     encoding: Encoding::Compressed,
///     ..ConvertOptions::default()
/// };
/// assert_eq!(options.sparse_bytes, 4096);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct ConvertOptions {
    /// What is known of the target before the first write.
    pub content: TargetContent,
    /// How data is stored.
    pub encoding: Encoding,
    /// How many requests may be in flight; at least 1 is taken.
    pub in_flight: usize,
    /// What happens to zeros that the target has already, where nothing else is known of its
    /// content.
    pub known_zeros: KnownZeros,
    /// In which order writes are given to the target.
    pub order: WriteOrder,
    /// Runs of zeros in data become zeros of the target from this length on, found in blocks of
    /// the largest power of two in it. 0 writes every byte of the source, known zeros included.
    pub sparse_bytes: u64,
    /// Where content is compressed; what comes of it is the same.
    pub threads: Threads,
    /// Who moves the bytes of data.
    pub mover: Mover,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            content: TargetContent::default(),
            encoding: Encoding::default(),
            in_flight: 8,
            known_zeros: KnownZeros::default(),
            order: WriteOrder::default(),
            sparse_bytes: 4096,
            threads: Threads::default(),
            mover: Mover::default(),
        }
    }
}

/// What a job is doing.
///
/// ```
/// assert_ne!(lacuna::job::Phase::Copy, lacuna::job::Phase::Flush);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Moving content.
    Copy,
    /// Making it durable.
    Flush,
}

/// How far a job is.
///
/// ```
/// use lacuna::job::{Phase, Progress};
/// let progress = Progress { phase: Phase::Copy, done_bytes: 2, total_bytes: 4, written_bytes: 1 };
/// assert!(progress.done_bytes <= progress.total_bytes);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What it is doing.
    pub phase: Phase,
    /// Bytes of the disk that are done, zeros included.
    pub done_bytes: u64,
    /// Bytes of the disk.
    pub total_bytes: u64,
    /// Bytes of those done that were written as data.
    pub written_bytes: u64,
}

/// What a conversion did with the bytes of the source; the three add up to its size.
///
/// ```
/// let nothing = lacuna::job::Copied::default();
/// assert_eq!(nothing.written_bytes + nothing.zeroed_bytes + nothing.skipped_bytes, 0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Written as data.
    pub written_bytes: u64,
    /// Zeroed by request.
    pub zeroed_bytes: u64,
    /// Left alone, because the target reads right already.
    pub skipped_bytes: u64,
}

impl Copied {
    fn add(&mut self, more: Self) {
        self.written_bytes += more.written_bytes;
        self.zeroed_bytes += more.zeroed_bytes;
        self.skipped_bytes += more.skipped_bytes;
    }

    const fn total(self) -> u64 {
        self.written_bytes + self.zeroed_bytes + self.skipped_bytes
    }
}

/// Copies all of `source` to the start of `target` and makes it durable.
///
/// Dropping the future stops the copy; the target is valid then and holds part of the content.
///
/// # Errors
/// `InvalidRequest` where the target is shorter than the source or cannot compress though asked
/// to; else what reading, writing and flushing give, with a [`CopyFailure`] where it is known. The
/// target is valid then, but incomplete.
///
/// ```
/// use lacuna::job::{self, ConvertOptions, TargetContent};
/// use lacuna::{raw::Raw, storage::MemoryStorage};
///
/// pollster::block_on(async {
///     let source = Raw::create(MemoryStorage::new(), 1 << 40).await?;
///     let target = Raw::create(MemoryStorage::new(), 1 << 40).await?;
///     let options = ConvertOptions { content: TargetContent::Zero, ..Default::default() };
///     let copied = job::convert(&source, &target, &options, &mut |_| ()).await?;
///     assert_eq!(copied.skipped_bytes, 1 << 40);
///     Ok::<_, lacuna::Error>(())
/// }).unwrap();
/// ```
pub async fn convert<A: Layer, B: Target>(
    source: &A,
    target: &B,
    options: &ConvertOptions,
    progress: &mut (dyn FnMut(Progress) + Send),
) -> Result<Copied> {
    let mut rules = rules(source, target, options)?;
    rules.ask_ends(source, target).await?;
    let total_bytes = rules.size_bytes;
    let mut report = |copied: Copied, phase| {
        let (done_bytes, written_bytes) = (copied.total(), copied.written_bytes);
        progress(Progress { phase, done_bytes, total_bytes, written_bytes });
    };
    let mut report_copy = |copied| report(copied, Phase::Copy);
    let copied = pump::run(source, target, &rules, &mut report_copy).await?;
    report(copied, Phase::Flush);
    target.flush().await?;
    Ok(copied)
}

/// Options and what the two ends say, checked against each other.
#[derive(Clone, Copy, Debug)]
struct Rules {
    options: ConvertOptions,
    /// Size of the source.
    size_bytes: u64,
    /// What is compressed as one, where compression is wanted.
    unit_bytes: Option<u64>,
    /// How much is read as data in one go.
    request_bytes: u64,
    /// Whether the source ends where the target ends.
    same_size: bool,
    /// Whether all of the source is known to read as zeros.
    source_is_zero: bool,
}

impl Rules {
    /// Asks both ends what they know of all of their disk (000-15), so that zeros that are there
    /// are neither looked for nor made. Where backing layers are left out, each range counts.
    async fn ask_ends<A: Layer, B: Target>(&mut self, source: &A, target: &B) -> Result<()> {
        let leaves_out = matches!(
            self.options.content,
            TargetContent::Backing { .. } | TargetContent::Beneath { .. }
        );
        if leaves_out || self.writes_everything() {
            return Ok(());
        }
        self.source_is_zero = source.known_zeroes().await?.open;
        let asks = self.options.content == TargetContent::Unknown
            && self.options.known_zeros == KnownZeros::Left;
        let known = if asks { target.known_zeroes().await? } else { KnownZeroes::NOTHING };
        // Zeros of a backing layer are none of the target's own: `create` rules them out.
        if known.open && known.create {
            self.options.content = TargetContent::Zero;
        }
        Ok(())
    }

    /// Says whether zeros go without a request.
    fn zeros_are_there(&self) -> bool {
        self.options.content == TargetContent::Zero && self.options.sparse_bytes > 0
    }

    /// Says whether every byte is to be written, zeros like others.
    const fn writes_everything(&self) -> bool {
        self.options.sparse_bytes == 0
    }
}

fn rules<A: Layer, B: Target>(source: &A, target: &B, options: &ConvertOptions) -> Result<Rules> {
    let (size_bytes, room) = (source.size_bytes(), target.size_bytes());
    if size_bytes > room {
        return Err(Error::invalid(format!(
            "The target holds {room} bytes, fewer than the {size_bytes} of the source"
        )));
    }
    let unit_bytes = match options.encoding {
        Encoding::Plain => None,
        Encoding::Compressed => Some(target.compressed_unit_bytes().ok_or_else(|| {
            Error::invalid("The target cannot store compressed data; qcow2 without a data file can")
        })?),
    };
    Ok(Rules {
        options: *options,
        size_bytes,
        unit_bytes,
        request_bytes: unit_bytes.map_or(REQUEST_BYTES, |unit| unit.max(ENCODE_BYTES)),
        same_size: size_bytes == room,
        source_is_zero: false,
    })
}
