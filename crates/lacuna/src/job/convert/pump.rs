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

use super::cut::{Action, Cutter, Next, Piece};
use super::sparse::{Run, runs};
use super::{Copied, Rules, Target, WriteOrder};
use crate::Result;
use crate::block::{BoxFuture, Layer, WriteFlags, ZeroFlags};
use crate::buffer::Buffer;
use crate::units::{GuestOffset, GuestRange};

/// A piece whose bytes are at hand where it has any.
struct Loaded {
    piece: Piece,
    bytes: Option<Buffer>,
}

/// Copies everything; `report` is told the bytes that are done.
pub(super) async fn run<A: Layer, B: Target>(
    source: &A,
    target: &B,
    rules: &Rules,
    report: &mut (dyn FnMut(u64) + Send),
) -> Result<Copied> {
    let in_flight = rules.options.in_flight.max(1);
    let writers = if rules.options.order == WriteOrder::Guest { 1 } else { in_flight };
    let reads = pieces(source, *rules)
        .map_ok(move |piece| Box::pin(load(source, piece)) as BoxFuture<'_, Result<Loaded>>);
    let mut reads: Pin<&mut (dyn Stream<Item = Result<Loaded>> + Send)> = match rules.options.order
    {
        WriteOrder::Guest => pin!(reads.try_buffered(in_flight)),
        WriteOrder::Any => pin!(reads.try_buffer_unordered(in_flight)),
    };
    let (mut writes, mut copied) = (FuturesUnordered::new(), Copied::default());
    let (mut reading, mut ready) = (true, None);
    report(0);
    loop {
        if writes.len() < writers
            && let Some(loaded) = ready.take()
        {
            writes.push(store(target, loaded, rules));
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
                report(copied.total());
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
                Next::Need(rest) => cutter.learn(source.extents(rest).await?)?,
                Next::Piece(piece) => return Ok(Some((piece, cutter))),
            }
        }
    })
}

async fn load<A: Layer>(source: &A, piece: Piece) -> Result<Loaded> {
    let len = piece.range.len as usize;
    let bytes = match piece.action {
        Action::Copy => {
            let (result, buffer) = source.read(piece.range.start, Buffer::new(len)).await;
            result?;
            Some(buffer)
        }
        Action::Expand => Some(Buffer::zeroed(len)),
        Action::Skip | Action::Zero => None,
    };
    Ok(Loaded { piece, bytes })
}

/// Brings a piece to the target.
async fn store<B: Target>(target: &B, loaded: Loaded, rules: &Rules) -> Result<Copied> {
    let Loaded { piece: Piece { range, action }, bytes } = loaded;
    let mut copied = Copied::default();
    match (bytes, action) {
        (None, Action::Zero) => copied.add(zero(target, range, rules).await?),
        (None, _) => copied.skipped_bytes += range.len,
        (Some(mut bytes), _) => {
            let mut at = range.start;
            for run in runs(&bytes, at, rules) {
                let rest = bytes.split_off(run.len);
                copied.add(store_run(target, at, run, bytes, rules).await?);
                (at, bytes) = (at + run.len as u64, rest);
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
    match rules.unit_bytes {
        // A rest of the source that is no rest of the target is no unit.
        Some(unit) if written_bytes == unit || rules.same_size => {
            target.write_compressed(at, bytes).await.0?;
        }
        _ => target.write(at, bytes, WriteFlags::empty()).await.0?,
    }
    Ok(Copied { written_bytes, ..Copied::default() })
}

/// Makes the range read as zeros, where it does not yet.
async fn zero<B: Target>(target: &B, range: GuestRange, rules: &Rules) -> Result<Copied> {
    if rules.zeros_are_there() {
        return Ok(Copied { skipped_bytes: range.len, ..Copied::default() });
    }
    target.write_zeroes(range, ZeroFlags::MAY_UNMAP).await?;
    Ok(Copied { zeroed_bytes: range.len, ..Copied::default() })
}
