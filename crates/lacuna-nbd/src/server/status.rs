//! Chunks of a block status (C.6).
//!
//! * Always: at least one extent, each longer than nothing, in a row from the request's offset;
//!   neighbours differ; only the last may reach past the request, and never past what it was given.
//! * In the 32-bit form a length is cut to a multiple of the alignment below 4 GiB, never wrapped
//!   to 0 (CVE-2025-47711); what was cut off becomes the next extent where the request asks for it.

use super::replies::Last;
use super::transmission::Request;
use crate::wire::{ChunkType, CommandFlags};
use crate::{ContextId, Replies};

/// Most extents of a chunk; the client asks again for the rest.
pub const MAX_EXTENTS: u32 = 128 << 10;
/// What lengths are cut to a multiple of, at least.
const LEAST_ALIGNMENT_BYTES: u32 = 512;

/// An extent: how many bytes have which status. Where it starts follows from those before it.
///
/// ```
/// use lacuna_nbd::server::StatusExtent;
/// use lacuna_nbd::wire::AllocationFlags;
/// let flags = (AllocationFlags::HOLE | AllocationFlags::ZERO).bits().into();
/// let hole = StatusExtent { len: 1 << 40, flags };
/// # let _ = hole;
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// Bytes; empty extents are left out.
    pub len: u64,
    /// What the context says; above 32 bits only where it is [wide](crate::context::StatusWidth).
    pub flags: u64,
}

impl Replies {
    /// Appends the chunk of one context, and takes no more `extents` than it has room for.
    ///
    /// The extents are in order from the request's offset, without gaps, and within the export;
    /// equal neighbours are joined, and `REQ_ONE` is kept.
    ///
    /// ```
    /// use lacuna_nbd::server::{Last, Replies, Request, StatusExtent};
    /// # fn example(request: &Request, id: lacuna_nbd::ContextId) {
    /// let mut output = Vec::new();
    /// let extents = [StatusExtent { len: 65536, flags: 0 }, StatusExtent { len: 65536, flags: 3 }];
    /// Replies::Structured.block_status(request, id, extents, 1, Last::Yes, &mut output);
    /// # }
    /// ```
    ///
    /// # Panics
    /// If replies are simple, there are no extents, or flags do not fit the form.
    pub fn block_status(
        self,
        request: &Request,
        context: ContextId,
        extents: impl IntoIterator<Item = StatusExtent>,
        minimum_block: u32,
        last: Last,
        output: &mut Vec<u8>,
    ) {
        let start = output.len();
        // Written for its length; the right one follows when the payload is known.
        output.extend_from_slice(&self.chunk(request.tag, self.kind(), 0, last));
        let payload = output.len();
        output.extend_from_slice(&context.0.to_be_bytes());
        if self == Self::Extended {
            output.extend_from_slice(&[0; 4]);
        }
        let count = self.extents(request, extents, minimum_block, output);
        assert!(count > 0, "a block status has at least one extent");
        if self == Self::Extended {
            overwrite(output, payload.saturating_add(4), &count.to_be_bytes());
        }
        let len = u32::try_from(output.len().saturating_sub(payload)).unwrap_or(u32::MAX);
        overwrite(output, start, &self.chunk(request.tag, self.kind(), len, last));
    }

    const fn kind(self) -> ChunkType {
        match self {
            Self::Extended => ChunkType::BLOCK_STATUS_EXT,
            Self::Simple | Self::Structured => ChunkType::BLOCK_STATUS,
        }
    }

    fn extents(
        self,
        request: &Request,
        extents: impl IntoIterator<Item = StatusExtent>,
        minimum_block: u32,
        output: &mut Vec<u8>,
    ) -> u32 {
        let wants_one = request.flags.contains(CommandFlags::REQ_ONE);
        let mut rows = Rows {
            replies: self,
            longest: self.longest(minimum_block),
            wanted: request.range.len,
            most: if wants_one { 1 } else { MAX_EXTENTS },
            count: 0,
            output,
        };
        for extent in joined(extents) {
            let most = if wants_one { request.range.len } else { u64::MAX };
            if !rows.push(StatusExtent { len: extent.len.min(most), ..extent }) {
                break;
            }
        }
        rows.count
    }

    fn longest(self, minimum_block: u32) -> u64 {
        let alignment = minimum_block.max(LEAST_ALIGNMENT_BYTES);
        match self {
            Self::Extended => u64::MAX,
            // The alignment is a power of two.
            Self::Simple | Self::Structured => (!alignment.saturating_sub(1)).into(),
        }
    }
}

/// Writes extents until the request is covered or there is no room.
struct Rows<'a> {
    replies: Replies,
    /// Longest extent of the form.
    longest: u64,
    /// How much of the request is not covered yet.
    wanted: u64,
    most: u32,
    count: u32,
    output: &'a mut Vec<u8>,
}

impl Rows<'_> {
    /// Says whether more is wanted.
    fn push(&mut self, mut extent: StatusExtent) -> bool {
        while extent.len > 0 && self.wanted > 0 && self.count < self.most {
            let len = extent.len.min(self.longest);
            self.write(len, extent.flags);
            self.count = self.count.saturating_add(1);
            self.wanted = self.wanted.saturating_sub(len);
            extent.len = extent.len.saturating_sub(len);
        }
        self.wanted > 0 && self.count < self.most
    }

    fn write(&mut self, len: u64, flags: u64) {
        if self.replies == Replies::Extended {
            self.output.extend_from_slice(&len.to_be_bytes());
            self.output.extend_from_slice(&flags.to_be_bytes());
        } else {
            let narrow = u32::try_from(flags);
            assert!(narrow.is_ok(), "a wide context is chosen with extended headers only");
            let len = u32::try_from(len).unwrap_or(u32::MAX);
            self.output.extend_from_slice(&len.to_be_bytes());
            self.output.extend_from_slice(&narrow.unwrap_or(0).to_be_bytes());
        }
    }
}

/// Joins neighbours of equal status and leaves out empty extents.
fn joined(extents: impl IntoIterator<Item = StatusExtent>) -> impl Iterator<Item = StatusExtent> {
    let mut rest = extents.into_iter().filter(|extent| extent.len > 0).peekable();
    std::iter::from_fn(move || {
        let mut extent = rest.next()?;
        while let Some(next) = rest.next_if(|next| next.flags == extent.flags) {
            extent.len = extent.len.saturating_add(next.len);
        }
        Some(extent)
    })
}

fn overwrite(output: &mut [u8], at: usize, bytes: &[u8]) {
    for (place, byte) in output.iter_mut().skip(at).zip(bytes) {
        *place = *byte;
    }
}
