//! What a layer knows about being all zeros, without looking (000-5), and finding it out (A.1.4).

use super::Layer;
use super::step_aside::step_aside;
use crate::Result;
use crate::buffer::Buffer;
use crate::units::{GuestOffset, GuestRange};

/// A short allocated head is read: raw files often carry one.
const MAX_HEAD_BYTES: u64 = 128 << 10;
/// How many answers about extents are asked for: each tells of thousands of runs.
const MAX_ANSWERS: usize = 4096;

/// When a layer is known to read as zeros everywhere. False says nothing.
///
/// ```
/// assert!(!lacuna::block::KnownZeroes::NOTHING.open);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct KnownZeroes {
    /// A disk of this kind that was just made reads as zeros; this one need not.
    pub create: bool,
    /// What a growth without preallocation adds reads as zeros.
    pub truncate: bool,
    /// The disk reads as zeros now. A write makes this stale.
    pub open: bool,
}

impl KnownZeroes {
    /// Nothing is known.
    pub const NOTHING: Self = Self { create: false, truncate: false, open: false };
}

/// Finds out whether all of a disk reads as zeros: by what is known, then by a walk over its
/// extents, which reads at most a short head.
///
/// True is certain until the next write. False means that it does not, or that finding out would
/// take too long: an answer that is short proves nothing (000-7), the walk goes on behind it, up
/// to a bound. Between answers it lets other futures of the thread run, and it can be dropped
/// there at no loss.
///
/// # Errors
/// What the layer says when asked.
///
/// ```
/// use lacuna::block::is_all_zeroes;
/// use lacuna::{raw::Raw, storage::MemoryStorage};
/// pollster::block_on(async {
///     let disk = Raw::create(MemoryStorage::new(), 1 << 40).await?;
///     assert!(is_all_zeroes(&disk).await?);
///     Ok::<_, lacuna::Error>(())
/// }).unwrap();
/// ```
pub async fn is_all_zeroes<L: Layer>(layer: &L) -> Result<bool> {
    if layer.known_zeroes().await?.open {
        return Ok(true);
    }
    let (mut at, mut head) = (GuestOffset(0), 0);
    let end = layer.whole().end();
    for _ in 0..MAX_ANSWERS {
        if at >= end {
            return reads_zero(layer, head).await;
        }
        for extent in layer.extents(GuestRange::new(at, end - at)).await? {
            if !extent.status.reads_zero {
                head = match at.0 {
                    0 if extent.range.start.0 == 0 && extent.range.len <= MAX_HEAD_BYTES => {
                        extent.range.len
                    }
                    _ => return Ok(false),
                };
            }
            at = extent.range.end();
        }
        step_aside().await;
    }
    Ok(false)
}

async fn reads_zero<L: Layer>(layer: &L, head_bytes: u64) -> Result<bool> {
    if head_bytes == 0 {
        return Ok(true);
    }
    let (result, bytes) = layer.read(GuestOffset(0), Buffer::new(head_bytes as usize)).await;
    result.map(|()| super::is_zero(&bytes))
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;
    use crate::block::WriteFlags;
    use crate::raw::Raw;
    use crate::storage::MemoryStorage;

    #[test]
    fn a_walk_lets_others_run_between_answers() {
        let disk = pollster::block_on(Raw::create(MemoryStorage::new(), 1 << 20)).unwrap();
        // A head that is stored keeps it from being known.
        let head = disk.write(GuestOffset(0), Buffer::zeroed(512), WriteFlags::empty());
        pollster::block_on(head).0.unwrap();
        let mut walk = pin!(is_all_zeroes(&disk));
        let mut context = Context::from_waker(Waker::noop());
        assert!(walk.as_mut().poll(&mut context).is_pending());
        assert!(matches!(walk.as_mut().poll(&mut context), Poll::Ready(Ok(true))));
    }
}
