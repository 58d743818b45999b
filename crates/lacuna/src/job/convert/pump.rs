//! Moves the pieces: reads run ahead, writes follow.
//!
//! * Dropped at any await: requests that were given to the two layers end there or not at all;
//!   nothing else is held.
//! * After the first error no further request is started.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::Poll;

use futures_util::stream::{self, FuturesUnordered};
use futures_util::{Stream, StreamExt, TryStreamExt};

use super::super::compute::compute;
use super::super::yielding::yield_now;
use super::cut::{Action, Cutter, Next, Piece};
use super::sparse::{Run, runs};
use super::units::{self, Form, Unit};
use super::{
    Copied, CopyFailure, CopyStep, KnownZeros, Mover, Rules, Target, TargetContent, Threads,
    WriteOrder,
};
use crate::block::{AllocationDepth, BoxFuture, Extent, Layer, WriteFlags, ZeroFlags, no_status};
use crate::buffer::Buffer;
use crate::qcow2::Encoder;
use crate::storage::HostSource;
use crate::units::{GuestOffset, GuestRange};
use crate::{ErrorKind, Result};

/// A piece and what is at hand of it.
struct Loaded {
    piece: Piece,
    content: Content,
}

enum Content {
    Bytes(Buffer),
    /// The host copies all of it, part by part.
    Host(Vec<(GuestRange, HostSource)>),
    Nothing,
    Units(Vec<Unit>),
}

/// Copies everything; `report` is told what is done.
pub(super) async fn run<A: Layer, B: Target>(
    source: &A,
    target: &B,
    rules: &Rules,
    report: &mut (dyn FnMut(Copied) + Send),
) -> Result<Copied> {
    let in_flight = rules.options.in_flight.max(1);
    let writers = if rules.options.order == WriteOrder::Guest { 1 } else { in_flight };
    let encoder = rules.unit_bytes.and_then(|_| target.encoder());
    let reads = pieces(source, *rules).map_ok(move |piece| {
        Box::pin(load(source, piece, *rules, encoder)) as BoxFuture<'_, Result<Loaded>>
    });
    let mut reads: Pin<&mut (dyn Stream<Item = Result<Loaded>> + Send)> = match rules.options.order
    {
        WriteOrder::Guest => pin!(reads.try_buffered(in_flight)),
        WriteOrder::Any => pin!(reads.try_buffer_unordered(in_flight)),
    };
    let (mut writes, mut copied) = (FuturesUnordered::new(), Copied::default());
    let (mut reading, mut ready) = (true, None);
    report(copied);
    loop {
        if writes.len() < writers
            && let Some(loaded) = ready.take()
        {
            writes.push(store(source, target, loaded, rules));
        }
        let event = poll_fn(|context| {
            if let Poll::Ready(Some(done)) = writes.poll_next_unpin(context) {
                return Poll::Ready(Event::Written(done));
            }
            match reading && ready.is_none() {
                true => reads.poll_next_unpin(context).map(Event::Read),
                false if writes.is_empty() => Poll::Ready(Event::End),
                false => Poll::Pending,
            }
        });
        match event.await {
            Event::End => return Ok(copied),
            Event::Read(None) => reading = false,
            Event::Read(Some(loaded)) => ready = Some(loaded?),
            Event::Written(done) => {
                copied.add(done?);
                report(copied);
                yield_now().await;
            }
        }
    }
}

enum Event {
    End,
    Read(Option<Result<Loaded>>),
    Written(Result<Copied>),
}

/// All pieces of the source, asking for extents as they are needed.
fn pieces<A: Layer>(source: &A, rules: Rules) -> impl Stream<Item = Result<Piece>> + Send {
    stream::try_unfold(Cutter::new(rules), move |mut cutter| async move {
        loop {
            match cutter.next() {
                Next::End => return Ok(None),
                Next::Need(rest) => {
                    let extents = source.extents(rest).await;
                    let failed = |error| CopyFailure::at(CopyStep::Map, rest.start, error);
                    cutter.learn(extents.map_err(failed)?)?;
                }
                Next::Piece(piece) => return Ok(Some((piece, cutter))),
            }
        }
    })
}

async fn load<A: Layer>(
    source: &A,
    piece: Piece,
    rules: Rules,
    encoder: Option<Encoder>,
) -> Result<Loaded> {
    let (start, len) = (piece.range.start, piece.range.len as usize);
    if piece.action == Action::Copy
        && rules.options.mover == Mover::Host
        && encoder.is_none()
        && let Some(parts) = host_parts(source, piece.range).await?
    {
        return Ok(Loaded { piece, content: Content::Host(parts) });
    }
    let bytes = match piece.action {
        Action::Copy => {
            let (result, buffer) = source.read(start, Buffer::new(len)).await;
            result.map_err(|error| CopyFailure::at(CopyStep::Read, start, error))?;
            buffer
        }
        Action::Expand => Buffer::zeroed(len),
        Action::Skip | Action::Zero => return Ok(Loaded { piece, content: Content::Nothing }),
    };
    let content = match encoder {
        Some(encoder) => {
            let work = move || units::encode(bytes, start, &rules, encoder);
            let units = match rules.options.threads {
                Threads::Caller => work(),
                Threads::Cores => compute(work).await,
            };
            Content::Units(units?)
        }
        None => Content::Bytes(bytes),
    };
    Ok(Loaded { piece, content })
}

/// Returns where the host can copy a range from, if it can copy all of it.
async fn host_parts<A: Layer>(
    source: &A,
    range: GuestRange,
) -> Result<Option<Vec<(GuestRange, HostSource)>>> {
    let (mut parts, mut at) = (Vec::new(), range.start);
    while at < range.end() {
        let rest = GuestRange::new(at, range.end() - at);
        let extents = source.extents(rest).await;
        let extents = extents.map_err(|error| CopyFailure::at(CopyStep::Map, at, error))?;
        at = extents.last().ok_or_else(|| no_status(rest))?.range.end();
        for extent in extents {
            match source.host_source(&extent) {
                Some(part) if !extent.status.reads_zero => parts.push((extent.range, part)),
                _ => return Ok(None),
            }
        }
    }
    Ok(Some(parts))
}

/// Has the host copy a part; reads and writes it where the host cannot.
async fn store_by_host<A: Layer, B: Target>(
    source: &A,
    target: &B,
    range: GuestRange,
    part: HostSource,
) -> Result<Copied> {
    let done = Copied { written_bytes: range.len, ..Copied::default() };
    match target.copy_from(range.start, part).await {
        Ok(()) => return Ok(done),
        Err(error) if error.kind() == ErrorKind::Unsupported => {}
        Err(error) => return Err(CopyFailure::at(CopyStep::Write, range.start, error)),
    }
    let (result, bytes) = source.read(range.start, Buffer::new(range.len as usize)).await;
    result.map_err(|error| CopyFailure::at(CopyStep::Read, range.start, error))?;
    let written = target.write(range.start, bytes, WriteFlags::empty()).await.0;
    written.map_err(|error| CopyFailure::at(CopyStep::Write, range.start, error))?;
    Ok(done)
}

/// Brings a piece to the target.
async fn store<A: Layer, B: Target>(
    source: &A,
    target: &B,
    loaded: Loaded,
    rules: &Rules,
) -> Result<Copied> {
    let Loaded { piece: Piece { range, action }, content } = loaded;
    let mut copied = Copied::default();
    match content {
        Content::Nothing if action == Action::Zero => {
            copied.add(zero(target, range, rules).await?);
        }
        Content::Nothing => copied.skipped_bytes += range.len,
        Content::Host(parts) => {
            for (range, part) in parts {
                copied.add(store_by_host(source, target, range, part).await?);
            }
        }
        Content::Bytes(mut bytes) => {
            let mut at = range.start;
            for run in runs(&bytes, at, rules) {
                let rest = bytes.split_off(run.len);
                copied.add(store_run(target, at, run, bytes, rules).await?);
                (at, bytes) = (at + run.len as u64, rest);
            }
        }
        Content::Units(units) => {
            for unit in units {
                copied.add(store_unit(target, unit, rules).await?);
            }
        }
    }
    Ok(copied)
}

async fn store_run<B: Target>(
    target: &B,
    at: GuestOffset,
    run: Run,
    bytes: Buffer,
    rules: &Rules,
) -> Result<Copied> {
    let written_bytes = run.len as u64;
    if run.is_zero {
        return zero(target, GuestRange::new(at, written_bytes), rules).await;
    }
    let written = target.write(at, bytes, WriteFlags::empty()).await.0;
    written.map_err(|error| CopyFailure::at(CopyStep::Write, at, error))?;
    Ok(Copied { written_bytes, ..Copied::default() })
}

async fn store_unit<B: Target>(target: &B, unit: Unit, rules: &Rules) -> Result<Copied> {
    let Unit { at, bytes, form } = unit;
    let written_bytes = bytes.len() as u64;
    let written = match form {
        Form::Encoded(stream) => target.write_encoded(at, bytes, stream).await.0,
        Form::Plain => target.write(at, bytes, WriteFlags::empty()).await.0,
        Form::Zero => return zero(target, GuestRange::new(at, written_bytes), rules).await,
    };
    written.map_err(|error| CopyFailure::at(CopyStep::Write, at, error))?;
    Ok(Copied { written_bytes, ..Copied::default() })
}

/// Makes the range read as zeros, where it does not yet.
///
/// What the target itself knows to be zero is left alone: zeros over nothing would only make
/// tables. Zeros of its backing layer are no reason: one day that may be another.
async fn zero<B: Target>(target: &B, range: GuestRange, rules: &Rules) -> Result<Copied> {
    let mut copied = Copied::default();
    if rules.zeros_are_there() {
        copied.skipped_bytes += range.len;
        return Ok(copied);
    }
    let is_open =
        matches!(rules.options.content, TargetContent::Unknown | TargetContent::Beneath { .. });
    let is_there = |extent: &Extent| {
        is_open
            && rules.options.known_zeros == KnownZeros::Left
            && extent.status.reads_zero
            && extent.status.depth <= AllocationDepth::TOP
    };
    let mut at = range.start;
    while at < range.end() {
        let rest = GuestRange::new(at, range.end() - at);
        let known = target.extents(rest).await?;
        at = known.last().ok_or_else(|| no_status(rest))?.range.end();
        for run in known.chunk_by(|left, right| is_there(left) == is_there(right)) {
            let len = run.iter().map(|extent| extent.range.len).sum();
            let part = GuestRange::new(run[0].range.start, len);
            if is_there(&run[0]) {
                copied.skipped_bytes += len;
            } else {
                let zeroed = target.write_zeroes(part, ZeroFlags::MAY_UNMAP).await;
                zeroed.map_err(|error| CopyFailure::at(CopyStep::Write, part.start, error))?;
                copied.zeroed_bytes += len;
            }
        }
    }
    Ok(copied)
}
