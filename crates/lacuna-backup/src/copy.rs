//! Moves pieces of a disk into what keeps them: reads run ahead, and are packed on all cores.
//!
//! * Always in guest order, so that what was kept before a cut tells how far a copy came.
//! * Memory: [`CopyOptions::in_flight`] frames, and each packed beside it.
//! * Dropped at any await: what was ended before stays; the rest is made again by the next run.

use std::pin::pin;

use futures_util::{TryStreamExt, stream};
use lacuna::Result;
use lacuna::block::{BoxFuture, Layer};
use lacuna::buffer::Buffer;
use lacuna::job::{compute, yield_now};
use lacuna::units::{GuestOffset, GuestRange};

use crate::changes::Changes;
use crate::cut::{Cutter, Piece};

/// How to copy.
///
/// ```
/// use lacuna_backup::CopyOptions;
/// let hard = CopyOptions { level: 19, ..CopyOptions::default() };
/// assert_eq!(hard.in_flight, 8);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct CopyOptions {
    /// How hard zstd tries, 1 to 22.
    pub level: i32,
    /// How many frames are read and compressed at once; at least 1 is taken.
    pub in_flight: usize,
    /// How much is stored before it is made durable: what a copy that was cut off does again, at most.
    /// Also how long a segment gets.
    pub durable_every_bytes: u64,
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self { level: 3, in_flight: 8, durable_every_bytes: 64 << 20 }
    }
}

/// What keeps pieces of a disk.
pub(crate) trait Keeper: Send {
    /// A piece in the form in which it is kept.
    type Packed: Send + 'static;

    /// Packs what was read at `start`; on any thread.
    fn pack(start: GuestOffset, bytes: Buffer, options: CopyOptions) -> Result<Self::Packed>;

    /// Packs zeros.
    fn zeros(range: GuestRange) -> Self::Packed;

    /// Keeps what lies behind all that it has; returns where that ends.
    fn keep(
        &mut self,
        packed: Self::Packed,
        options: CopyOptions,
    ) -> impl Future<Output = Result<GuestOffset>> + Send;
}

/// Copies what the cutter finds; `report` is told how far that is.
pub(crate) async fn run<L: Layer, C: Changes, K: Keeper>(
    source: &L,
    cutter: Cutter<'_, L, C>,
    keeper: &mut K,
    options: CopyOptions,
    report: &mut (dyn FnMut(GuestOffset) + Send),
) -> Result<()> {
    let pieces = stream::try_unfold(cutter, |mut cutter| async move {
        Ok(cutter.next().await?.map(|piece| (piece, cutter)))
    });
    let packed = pieces.map_ok(move |piece| {
        Box::pin(load::<L, K>(source, piece, options)) as BoxFuture<'_, Result<K::Packed>>
    });
    let mut packed = pin!(packed.try_buffered(options.in_flight.max(1)));
    while let Some(next) = packed.try_next().await? {
        report(keeper.keep(next, options).await?);
        yield_now().await;
    }
    Ok(())
}

async fn load<L: Layer, K: Keeper>(
    source: &L,
    piece: Piece,
    options: CopyOptions,
) -> Result<K::Packed> {
    match piece {
        Piece::Zeros(range) => Ok(K::zeros(range)),
        Piece::Data(range) => {
            let (read, bytes) = source.read(range.start, Buffer::new(range.len as usize)).await;
            read.map_err(|error| error.context(format!("Reading at {}", range.start)))?;
            compute(move || K::pack(range.start, bytes, options)).await
        }
    }
}
