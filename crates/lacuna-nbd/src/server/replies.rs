//! Headers and chunks of replies (C.5).
//!
//! What carries data is a header in a small value of its own, so that data goes out beside it by
//! vectored I/O and is never copied. What carries text or extents is appended to a buffer.
//!
//! * Always: with extended headers, every reply is an extended chunk; with structured replies, a
//!   read and an error is a chunk, and success without data is a simple reply.
//! * Never: the last data chunk of a reply is marked so before its bytes are at hand, since it
//!   could not fail any more: read first, then build the header.

use super::Rejection;
use crate::text::truncated;
use crate::wire::{ChunkFlags, ChunkHeader, ChunkType, ErrorCode, encode_simple};
use crate::{ByteRange, Cookie, HeaderBytes, Replies};

/// What a reply carries to be matched with its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// The request's name.
    pub cookie: Cookie,
    /// The request's offset, which extended replies repeat.
    pub offset: u64,
}

/// Whether a chunk is the last of its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Last {
    /// More chunks follow.
    No,
    /// The reply ends.
    Yes,
}

impl Replies {
    /// Returns the whole reply to a request that succeeded and has no data: anything but a read
    /// that found bytes, and a block status.
    #[must_use]
    pub fn success(self, tag: Tag) -> HeaderBytes {
        match self {
            Self::Extended => self.end(tag),
            Self::Simple | Self::Structured => simple(tag, None),
        }
    }

    /// Returns the header of a read that succeeded as a whole; the bytes of `range`, which is the
    /// request's, go out behind it, and the reply is complete.
    ///
    /// # Panics
    /// If the range has 4 GiB or more, which no request has.
    #[must_use]
    pub fn whole_read(self, tag: Tag, range: ByteRange) -> HeaderBytes {
        match self {
            Self::Simple => simple(tag, None),
            _ if range.len == 0 => self.end(tag),
            _ => self.data(tag, range, Last::Yes),
        }
    }

    /// Returns the header of a chunk of a read; the bytes of `range` go out behind it.
    ///
    /// # Panics
    /// If replies are simple, or the range is empty or has 4 GiB or more.
    #[must_use]
    pub fn data(self, tag: Tag, range: ByteRange, last: Last) -> HeaderBytes {
        assert!(range.len > 0, "a chunk describes at least one byte");
        let len = range.len.checked_add(8).and_then(|len| u32::try_from(len).ok());
        assert!(len.is_some(), "a chunk has less than 4 GiB");
        let mut bytes = self.chunk(tag, ChunkType::OFFSET_DATA, len.unwrap_or(0), last);
        bytes.push(&range.start.to_be_bytes());
        bytes
    }

    /// Returns a chunk that says that a range of a read is zeros.
    ///
    /// # Panics
    /// If replies are simple, or the range is empty or has 4 GiB or more.
    #[must_use]
    pub fn hole(self, tag: Tag, range: ByteRange, last: Last) -> HeaderBytes {
        let len = u32::try_from(range.len).ok().filter(|len| *len > 0);
        assert!(len.is_some(), "a hole has at least one byte and less than 4 GiB");
        let mut bytes = self.chunk(tag, ChunkType::OFFSET_HOLE, 12, last);
        bytes.push(&range.start.to_be_bytes());
        bytes.push(&len.unwrap_or(0).to_be_bytes());
        bytes
    }

    /// Returns a chunk that does nothing but end a reply.
    ///
    /// # Panics
    /// If replies are simple.
    #[must_use]
    pub fn end(self, tag: Tag) -> HeaderBytes {
        self.chunk(tag, ChunkType::NONE, 0, Last::Yes)
    }

    /// Appends the whole reply to a request that failed, or the end of one that failed on the way.
    ///
    /// The text is cut at 4096 bytes; simple replies have none.
    pub fn error(self, tag: Tag, error: ErrorCode, message: &str, output: &mut Vec<u8>) {
        if self == Self::Simple {
            output.extend_from_slice(&simple(tag, Some(error)));
        } else {
            self.error_chunk(tag, ChunkType::ERROR, (error, message), &[], Last::Yes, output);
        }
    }

    /// Appends a chunk that says where a request failed.
    ///
    /// # Panics
    /// If replies are simple.
    pub fn error_at(
        self,
        tag: Tag,
        error: (ErrorCode, &str),
        offset: u64,
        last: Last,
        output: &mut Vec<u8>,
    ) {
        let place = offset.to_be_bytes();
        self.error_chunk(tag, ChunkType::ERROR_OFFSET, error, &place, last, output);
    }

    /// Appends the reply to a request that was not taken.
    pub fn rejection(self, rejection: &Rejection, output: &mut Vec<u8>) {
        self.error(rejection.tag, rejection.error, &rejection.message, output);
    }

    /// Returns the header of a chunk with `len` bytes of payload.
    pub(super) fn chunk(self, tag: Tag, kind: ChunkType, len: u32, last: Last) -> HeaderBytes {
        assert!(self != Self::Simple, "simple replies have no chunks");
        let flags = match last {
            Last::No => ChunkFlags::empty(),
            Last::Yes => ChunkFlags::DONE,
        };
        let header = ChunkHeader { flags, kind, cookie: tag.cookie, len };
        if self == Self::Extended {
            HeaderBytes::from(&header.encode_extended(tag.offset)[..])
        } else {
            HeaderBytes::from(&header.encode_structured()[..])
        }
    }

    fn error_chunk(
        self,
        tag: Tag,
        kind: ChunkType,
        (error, message): (ErrorCode, &str),
        behind: &[u8],
        last: Last,
        output: &mut Vec<u8>,
    ) {
        assert!(error.0 != 0, "an error has a number");
        let message = truncated(message).as_bytes();
        // At most 4096, so that it always fits.
        let message_bytes = u16::try_from(message.len()).unwrap_or(u16::MAX);
        let behind_bytes = u32::try_from(behind.len()).unwrap_or(u32::MAX);
        let len = u32::from(message_bytes).saturating_add(6).saturating_add(behind_bytes);
        output.extend_from_slice(&self.chunk(tag, kind, len, last));
        output.extend_from_slice(&error.0.to_be_bytes());
        output.extend_from_slice(&message_bytes.to_be_bytes());
        output.extend_from_slice(message);
        output.extend_from_slice(behind);
    }
}

fn simple(tag: Tag, error: Option<ErrorCode>) -> HeaderBytes {
    HeaderBytes::from(&encode_simple(tag.cookie, error)[..])
}
