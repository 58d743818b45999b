//! Headers of replies (C.5).
//!
//! | form | bytes | fields |
//! |---|---|---|
//! | simple | 16 | u32 magic, u32 error, u64 cookie; a read that succeeded has its bytes behind |
//! | structured | 20 | u32 magic, u16 flags, u16 type, u64 cookie, u32 length |
//! | extended | 32 | u32 magic, u16 flags, u16 type, u64 cookie, u64 offset of the request, u64 length |

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{ChunkFlags, ChunkType, ErrorCode, Fields};
use crate::{Cookie, Error, Replies, Result};

const SIMPLE: u32 = 0x6744_6698;
const STRUCTURED: u32 = 0x668e_33ef;
const EXTENDED: u32 = 0x6e8a_278c;

pub(crate) const SIMPLE_REPLY_BYTES: usize = size_of::<RawSimple>();
pub(crate) const STRUCTURED_REPLY_BYTES: usize = size_of::<RawStructured>();
pub(crate) const EXTENDED_REPLY_BYTES: usize = size_of::<RawExtended>();

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSimple {
    magic: U32,
    error: U32,
    cookie: U64,
}
const _: () = assert!(SIMPLE_REPLY_BYTES == 16);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawStructured {
    magic: U32,
    flags: U16,
    kind: U16,
    cookie: U64,
    len: U32,
}
const _: () = assert!(STRUCTURED_REPLY_BYTES == 20);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawExtended {
    magic: U32,
    flags: U16,
    kind: U16,
    cookie: U64,
    offset: U64,
    len: U64,
}
const _: () = assert!(EXTENDED_REPLY_BYTES == 32);

/// Returns a simple reply.
pub(crate) fn encode_simple(cookie: Cookie, error: Option<ErrorCode>) -> [u8; SIMPLE_REPLY_BYTES] {
    zerocopy::transmute!(RawSimple {
        magic: SIMPLE.into(),
        error: error.map_or(0, |code| code.0).into(),
        cookie: cookie.0.into(),
    })
}

/// The header of a chunk, in either form that has chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChunkHeader {
    pub(crate) flags: ChunkFlags,
    pub(crate) kind: ChunkType,
    pub(crate) cookie: Cookie,
    /// Bytes of the payload.
    pub(crate) len: u32,
}

impl ChunkHeader {
    pub(crate) fn encode_structured(&self) -> [u8; STRUCTURED_REPLY_BYTES] {
        zerocopy::transmute!(RawStructured {
            magic: STRUCTURED.into(),
            flags: self.flags.bits().into(),
            kind: self.kind.0.into(),
            cookie: self.cookie.0.into(),
            len: self.len.into(),
        })
    }

    /// `offset` is the request's.
    pub(crate) fn encode_extended(&self, offset: u64) -> [u8; EXTENDED_REPLY_BYTES] {
        zerocopy::transmute!(RawExtended {
            magic: EXTENDED.into(),
            flags: self.flags.bits().into(),
            kind: self.kind.0.into(),
            cookie: self.cookie.0.into(),
            offset: offset.into(),
            len: u64::from(self.len).into(),
        })
    }
}

/// A header that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReplyHeader {
    Simple { cookie: Cookie, error: Option<ErrorCode> },
    Chunk { chunk: ChunkHeader, offset: Option<u64> },
}

/// Bytes of the magic number, which says how long a header is.
pub(crate) const MAGIC_BYTES: usize = 4;

impl ReplyHeader {
    /// Returns the length in bytes of the header that begins with `magic`.
    pub(crate) fn header_bytes(replies: Replies, magic: [u8; MAGIC_BYTES]) -> Result<usize> {
        match (u32::from_be_bytes(magic), replies) {
            (SIMPLE, Replies::Simple | Replies::Structured) => Ok(SIMPLE_REPLY_BYTES),
            (STRUCTURED, Replies::Structured) => Ok(STRUCTURED_REPLY_BYTES),
            (EXTENDED, Replies::Extended) => Ok(EXTENDED_REPLY_BYTES),
            (found, _) => Err(Error::violation(format!(
                "Reply begins with {found:#010x}, which is not what was negotiated ({replies:?})"
            ))),
        }
    }

    /// Decodes a header of that length.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        Self::fields(bytes).ok_or_else(|| Error::violation("Reply is longer than 4 GiB"))
    }

    fn fields(bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let magic = fields.u32()?;
        if magic == SIMPLE {
            let error = Some(ErrorCode(fields.u32()?)).filter(|error| error.0 != 0);
            return Some(Self::Simple { error, cookie: Cookie(fields.u64()?) });
        }
        let flags = ChunkFlags::from_bits_retain(fields.u16()?);
        let kind = ChunkType(fields.u16()?);
        let cookie = Cookie(fields.u64()?);
        let (offset, len) = if magic == EXTENDED {
            (Some(fields.u64()?), u32::try_from(fields.u64()?).ok()?)
        } else {
            (None, fields.u32()?)
        };
        Some(Self::Chunk { chunk: ChunkHeader { flags, kind, cookie, len }, offset })
    }
}
