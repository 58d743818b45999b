//! What a request does to the disk, and what is said about it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lacuna::block::{DiscardMode, Extent, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::units::{GuestOffset, GuestRange};
use lacuna::{Error, ErrorKind, Result};
use lacuna_nbd::ByteRange;
use lacuna_nbd::server::{Command, Last, Replies, Request};
use lacuna_nbd::wire::{CommandFlags, ErrorCode};
use smallvec::{SmallVec, smallvec};

use super::reply::{Part, Reply};
use super::status::{self, Wanted};
use crate::{Export, ServedDisk};

/// From this length on a read asks first what is zeros, and sends no bytes for those.
const HOLES_FROM_BYTES: u64 = 32 << 10;
/// `CACHE` reads in pieces of this size.
const CACHE_PIECE_BYTES: u64 = 1 << 20;

/// A request with what it needs.
#[derive(Debug)]
pub(super) enum Job {
    Plain(Request),
    Status(Request, Wanted),
    Write(Request, Buffer),
}

impl Job {
    const fn request(&self) -> &Request {
        match self {
            Self::Plain(request) | Self::Status(request, _) | Self::Write(request, _) => request,
        }
    }

    /// Returns how many bytes of memory it takes, or may take.
    pub(super) fn weight(&self) -> u64 {
        match self {
            Self::Plain(request) if request.command == Command::Read => request.range.len,
            Self::Plain(_) => 0,
            Self::Status(_, wanted) => wanted.len() as u64 * status::ENOUGH_BYTES,
            Self::Write(_, payload) => payload.len() as u64,
        }
    }
}

type Parts = SmallVec<[Part; 1]>;

/// Does a request. An error is an answer as well.
///
/// All but reads and writes is boxed: this future is made and moved for each request, and should be
/// small.
pub(super) async fn execute<D: ServedDisk>(
    export: Arc<Export<D>>,
    replies: Replies,
    job: Job,
) -> Reply {
    let (request, weight) = (*job.request(), job.weight());
    let result = match job {
        Job::Status(request, wanted) => {
            Box::pin(status::answer(&export, replies, &request, &wanted)).await
        }
        Job::Write(request, payload) => write(&export, replies, &request, payload).await,
        Job::Plain(request) if request.command == Command::Read => {
            read(&export, replies, &request).await
        }
        Job::Plain(request) => {
            let done = Box::pin(change(&export, &request)).await;
            done.map(|()| smallvec![Part::Header(replies.success(request.tag))])
        }
    };
    let parts = result.unwrap_or_else(|error| {
        count(&export.counters.errors, 1);
        let mut text = Vec::new();
        replies.error(request.tag, code(&error, request.flags), &error.to_string(), &mut text);
        smallvec![Part::Text(text)]
    });
    Reply { parts, weight }
}

pub(super) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

pub(super) const fn guest(range: ByteRange) -> GuestRange {
    GuestRange::new(GuestOffset(range.start), range.len)
}

/// Says an error of the engine in the protocol's words (C.7). What cannot be done is told so only
/// to who asked for it to be fast: others could not go on from there.
fn code(error: &Error, flags: CommandFlags) -> ErrorCode {
    match error.kind() {
        ErrorKind::Unsupported if !flags.contains(CommandFlags::FAST_ZERO) => ErrorCode::EINVAL,
        ErrorKind::InvalidRequest | ErrorKind::OutOfBounds => ErrorCode::EINVAL,
        ErrorKind::NoSpace => ErrorCode::ENOSPC,
        ErrorKind::ReadOnly => ErrorCode::EPERM,
        ErrorKind::Unsupported => ErrorCode::ENOTSUP,
        _ => ErrorCode::EIO,
    }
}

async fn write<D: ServedDisk>(
    export: &Export<D>,
    replies: Replies,
    request: &Request,
    payload: Buffer,
) -> Result<Parts> {
    let fua = request.flags.contains(CommandFlags::FUA);
    let flags = if fua { WriteFlags::FUA } else { WriteFlags::empty() };
    let len = payload.len() as u64;
    export.disk().write(GuestOffset(request.range.start), payload, flags).await.0?;
    count(&export.counters.writes, 1);
    count(&export.counters.written_bytes, len);
    Ok(smallvec![Part::Header(replies.success(request.tag))])
}

/// Does what has neither payload nor data.
async fn change<D: ServedDisk>(export: &Export<D>, request: &Request) -> Result<()> {
    let (disk, range) = (export.disk(), guest(request.range));
    match request.command {
        Command::Cache => cache(disk, range).await,
        Command::Flush => {
            count(&export.counters.flushes, 1);
            disk.flush().await
        }
        Command::Resize => disk.resize(request.range.start).await,
        Command::Trim => {
            count(&export.counters.zeroes, 1);
            disk.discard(range, DiscardMode::Guest).await?;
            match request.flags.contains(CommandFlags::FUA) {
                true => disk.flush().await,
                false => Ok(()),
            }
        }
        Command::WriteZeroes => {
            count(&export.counters.zeroes, 1);
            disk.write_zeroes(range, zero_flags(request.flags)).await
        }
        Command::BlockStatus | Command::Read | Command::Write => {
            Err(Error::invalid("This command has a reply of its own"))
        }
    }
}

fn zero_flags(flags: CommandFlags) -> ZeroFlags {
    let mut zero = ZeroFlags::empty();
    zero.set(ZeroFlags::FUA, flags.contains(CommandFlags::FUA));
    zero.set(ZeroFlags::MAY_UNMAP, !flags.contains(CommandFlags::NO_HOLE));
    zero.set(ZeroFlags::FAST, flags.contains(CommandFlags::FAST_ZERO));
    zero
}

/// Reads so that the host has it at hand; what is known to be zeros is at hand already.
async fn cache<D: ServedDisk>(disk: &D, range: GuestRange) -> Result<()> {
    let mut rest = range;
    while !rest.is_empty() {
        for extent in disk.extents(rest).await? {
            rest = behind(rest, &extent);
            let mut at = extent.range.start;
            while !extent.status.reads_zero && at < extent.range.end() {
                let len = (extent.range.end() - at).min(CACHE_PIECE_BYTES);
                disk.read(at, Buffer::new(len as usize)).await.0?;
                at = at + len;
                // What the host has at hand already is read without a wait.
                tokio::task::yield_now().await;
            }
        }
    }
    Ok(())
}

/// Returns what of a range lies behind an extent.
pub(super) fn behind(range: GuestRange, extent: &Extent) -> GuestRange {
    let end = extent.range.end().min(range.end());
    GuestRange::new(end, range.end() - end)
}

async fn read<D: ServedDisk>(
    export: &Export<D>,
    replies: Replies,
    request: &Request,
) -> Result<Parts> {
    count(&export.counters.reads, 1);
    count(&export.counters.read_bytes, request.range.len);
    let in_parts = replies.has_chunks()
        && request.range.len >= HOLES_FROM_BYTES
        && !request.flags.contains(CommandFlags::DF);
    if in_parts {
        return Box::pin(read_in_parts(export.disk(), replies, request)).await;
    }
    let range = request.range;
    if range.len == 0 {
        return Ok(smallvec![Part::Header(replies.whole_read(request.tag, range))]);
    }
    let data = bytes_of(export.disk(), guest(range)).await?;
    Ok(smallvec![Part::HeaderAndData(replies.whole_read(request.tag, range), data)])
}

async fn bytes_of<D: ServedDisk>(disk: &D, range: GuestRange) -> Result<Buffer> {
    let (result, data) = disk.read(range.start, Buffer::new(range.len as usize)).await;
    result.map(|()| data)
}

/// Reads what is not known to be zeros; a reader gets each byte once.
async fn read_in_parts<D: ServedDisk>(
    disk: &D,
    replies: Replies,
    request: &Request,
) -> Result<Parts> {
    let mut parts = Parts::new();
    let mut rest = guest(request.range);
    while !rest.is_empty() {
        let extents = disk.extents(rest).await?;
        for (range, reads_zero) in by_zero(&extents, rest) {
            rest = GuestRange::new(range.end(), rest.end() - range.end());
            let last = if rest.is_empty() { Last::Yes } else { Last::No };
            let part = ByteRange { start: range.start.0, len: range.len };
            parts.push(if reads_zero {
                Part::Header(replies.hole(request.tag, part, last))
            } else {
                let data = bytes_of(disk, range).await?;
                Part::HeaderAndData(replies.data(request.tag, part, last), data)
            });
        }
    }
    Ok(parts)
}

/// Joins extents within `range` that do not differ in whether they read as zeros.
fn by_zero(extents: &[Extent], range: GuestRange) -> Vec<(GuestRange, bool)> {
    let mut joined: Vec<(GuestRange, bool)> = Vec::new();
    for extent in extents {
        let end = extent.range.end().min(range.end());
        let part = GuestRange::new(extent.range.start, end - extent.range.start);
        match joined.last_mut() {
            Some((last, zero)) if *zero == extent.status.reads_zero => last.len += part.len,
            _ => joined.push((part, extent.status.reads_zero)),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};

    use lacuna::block::Layer;
    use lacuna::raw::Raw;
    use lacuna::storage::MemoryStorage;
    use lacuna_nbd::server::Tag;
    use lacuna_nbd::{ContextId, Cookie};
    use pollster::block_on;

    use super::*;
    use crate::Plain;

    #[test]
    fn a_status_weighs_what_its_answer_may_take_in_each_context() {
        let request = Request {
            tag: Tag { cookie: Cookie(1), offset: 0 },
            command: Command::BlockStatus,
            flags: CommandFlags::empty(),
            range: ByteRange { start: 0, len: 1 << 40 },
        };
        let weight =
            |contexts: u32| Job::Status(request, (0..contexts).map(ContextId).collect()).weight();
        assert_eq!((weight(0), weight(1), weight(3)), (0, 256 << 10, 768 << 10));
    }

    #[test]
    fn a_long_cache_lets_others_run_between_its_pieces() {
        let disk = block_on(Raw::create(MemoryStorage::new(), 8 * CACHE_PIECE_BYTES)).unwrap();
        let data = Buffer::from(&[7; 8 * CACHE_PIECE_BYTES as usize][..]);
        let disk = Plain(disk);
        block_on(disk.write(GuestOffset(0), data, WriteFlags::empty())).0.unwrap();
        let (mut work, mut turns) = (pin!(cache(&disk, disk.whole())), 0);
        let mut context = Context::from_waker(Waker::noop());
        while work.as_mut().poll(&mut context).is_pending() {
            turns += 1;
        }
        assert_eq!(turns, 8);
    }
}
