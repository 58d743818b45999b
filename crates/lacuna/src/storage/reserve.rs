//! Space set aside before it is needed.
//!
//! * Never: more than one bounded buffer in memory, however large the range.
//! * Always: may be dropped at any await; part of the range is reserved then.

use super::{Capability, Storage};
use crate::buffer::{Buffer, Hold};
use crate::units::{HostOffset, HostRange};
use crate::{ErrorKind, Result};

/// Zeros written at once.
const PIECE_BYTES: u64 = 1 << 20;

/// How firmly space is set aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reserve {
    /// Not at all: the object only becomes as long as the range says.
    Hole,
    /// The host promises the space; no byte is written where it can do that.
    Promised,
    /// Zeros are written, so that not even the host's own metadata must change later.
    Written,
}

/// Sets space aside for a range that reads as zeros, which it still does afterwards; extends a
/// shorter object. `hold` stays with whatever may still be written, and comes back in the end.
pub(crate) async fn reserve<S: Storage>(
    storage: &S,
    range: HostRange,
    how: Reserve,
    hold: Hold,
) -> Result<Hold> {
    if range.is_empty() {
        return Ok(hold);
    }
    match how {
        Reserve::Hole => extend(storage, range.end(), hold).await,
        Reserve::Written => write_zeros(storage, range, hold).await,
        Reserve::Promised => match storage.allocate_at(range).await {
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                write_zeros(storage, range, hold).await
            }
            done => done.map(|()| hold).map_err(|error| error.context("Reserving space")),
        },
    }
}

/// Makes an object at least as long as `end` says; one of fixed length is as long as it is.
async fn extend<S: Storage>(storage: &S, end: HostOffset, hold: Hold) -> Result<Hold> {
    let fixed = storage.capabilities().set_len == Capability::Unsupported;
    if fixed || storage.len().await? >= end.0 {
        return Ok(hold);
    }
    let (hold, riding) = hold.shared();
    storage.set_len(end.0, riding).await?;
    Ok(hold)
}

async fn write_zeros<S: Storage>(storage: &S, range: HostRange, mut hold: Hold) -> Result<Hold> {
    let end = range.end();
    let (mut at, mut zeros) = (range.start, Buffer::new(0));
    while at < end {
        let piece = (end - at).min(PIECE_BYTES - at.0 % PIECE_BYTES);
        if zeros.len() as u64 != piece {
            zeros = Buffer::zeroed(piece as usize);
        }
        zeros.set_hold(hold);
        let result;
        (result, zeros) = storage.write_at(at, zeros).await;
        hold = zeros.take_hold();
        result.map_err(|error| error.context("Writing zeros to reserve space"))?;
        at = HostOffset(at.0 + piece);
    }
    Ok(hold)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{HostStatus, MemoryStorage};
    use pollster::block_on;

    #[test]
    fn what_is_written_is_allocated_and_reads_as_zeros() {
        let storage = MemoryStorage::from(&[7; 100][..]);
        let range = HostRange::new(HostOffset(100), (5 << 20) + 17);
        drop(block_on(reserve(&storage, range, Reserve::Written, Hold::none())).unwrap());
        assert_eq!(block_on(storage.len()).unwrap(), range.end().0);
        let bytes = storage.to_vec();
        assert!(bytes[..100].iter().all(|byte| *byte == 7));
        assert!(bytes[100..].iter().all(|byte| *byte == 0));
        let status = block_on(storage.status_at(HostRange::new(HostOffset(1 << 20), 4096)));
        assert_eq!(status.unwrap().status, HostStatus::Data);
    }
}
