//! Headers of the handshake (C.2).
//!
//! | message | bytes | fields |
//! |---|---|---|
//! | greeting | 18 | u64 `NBDMAGIC`, u64 `IHAVEOPT`, u16 handshake flags |
//! | oldstyle greeting | 152 | u64 `NBDMAGIC`, u64 magic, u64 size, u16 reserved, u16 flags, 124 zeros |
//! | option | 16 | u64 `IHAVEOPT`, u32 option, u32 length of the data behind it |
//! | reply | 20 | u64 magic, u32 option, u32 kind of reply, u32 length of the data behind it |

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{HandshakeFlags, OptionCode, ReplyCode};
use crate::{Error, Result};

/// `NBDMAGIC`: the first bytes from any server.
const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: the second of a newstyle server, and the first of every option.
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// What an oldstyle server sends instead.
const OLDSTYLE: u64 = 0x0000_4202_8186_1253;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;

pub(crate) const GREETING_BYTES: usize = size_of::<RawGreeting>();
pub(crate) const CLIENT_FLAGS_BYTES: usize = 4;
pub(crate) const OPTION_HEADER_BYTES: usize = size_of::<RawOption>();
pub(crate) const OPTION_REPLY_BYTES: usize = size_of::<RawReply>();
/// Zeros behind the answer to `EXPORT_NAME`, unless they were negotiated away.
pub(crate) const NO_ZEROES_BYTES: usize = 124;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawGreeting {
    magic: U64,
    style: U64,
    flags: U16,
}
const _: () = assert!(GREETING_BYTES == 18);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawOption {
    magic: U64,
    option: U32,
    len: U32,
}
const _: () = assert!(OPTION_HEADER_BYTES == 16);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawReply {
    magic: U64,
    option: U32,
    kind: U32,
    len: U32,
}
const _: () = assert!(OPTION_REPLY_BYTES == 20);

/// The first message of a newstyle server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Greeting {
    pub(crate) flags: HandshakeFlags,
}

impl Greeting {
    pub(crate) fn encode(self) -> [u8; GREETING_BYTES] {
        zerocopy::transmute!(RawGreeting {
            magic: NBDMAGIC.into(),
            style: IHAVEOPT.into(),
            flags: self.flags.bits().into(),
        })
    }

    /// Decodes the first bytes of a server.
    pub(crate) fn decode(bytes: [u8; GREETING_BYTES]) -> Result<Opening> {
        let raw: RawGreeting = zerocopy::transmute!(bytes);
        if raw.magic.get() != NBDMAGIC {
            return Err(Error::violation(format!(
                "Greeting begins with {:#018x}, not with NBDMAGIC: this is no NBD server",
                raw.magic
            )));
        }
        match raw.style.get() {
            IHAVEOPT => {
                let flags = HandshakeFlags::from_bits_retain(raw.flags.get());
                Ok(Opening::Newstyle(Self { flags }))
            }
            OLDSTYLE => Ok(Opening::Oldstyle { size_front: raw.flags.get().to_be_bytes() }),
            other => Err(Error::violation(format!(
                "Greeting goes on with {other:#018x}; a newstyle server sends IHAVEOPT"
            ))),
        }
    }
}

/// The first message of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opening {
    Newstyle(Greeting),
    /// One without options. [`OLDSTYLE_REST_BYTES`] follow.
    Oldstyle {
        /// The first bytes of the size, which stand where others have flags.
        size_front: [u8; 2],
    },
}

/// What an oldstyle server says of its only export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OldstyleExport {
    pub(crate) size_bytes: u64,
    pub(crate) flags: u16,
}

/// What follows behind the first bytes of an oldstyle server: the rest of the size, 2 bytes that
/// are reserved, flags, zeros.
pub(crate) const OLDSTYLE_REST_BYTES: usize = 6 + 2 + 2 + NO_ZEROES_BYTES;

impl OldstyleExport {
    /// Decodes what follows behind the first two bytes of the size. Zeros are not looked at.
    pub(crate) const fn decode(front: [u8; 2], rest: [u8; OLDSTYLE_REST_BYTES]) -> Self {
        let ([a, b], [c, d, e, f, g, h, _, _, flags @ ..]) = (front, rest);
        let [high, low, ..] = flags;
        Self {
            size_bytes: u64::from_be_bytes([a, b, c, d, e, f, g, h]),
            flags: u16::from_be_bytes([high, low]),
        }
    }
}

/// The header of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OptionHeader {
    pub(crate) option: OptionCode,
    pub(crate) len: u32,
}

impl OptionHeader {
    pub(crate) fn encode(self) -> [u8; OPTION_HEADER_BYTES] {
        zerocopy::transmute!(RawOption {
            magic: IHAVEOPT.into(),
            option: self.option.0.into(),
            len: self.len.into(),
        })
    }

    pub(crate) fn decode(bytes: [u8; OPTION_HEADER_BYTES]) -> Result<Self> {
        let raw: RawOption = zerocopy::transmute!(bytes);
        if raw.magic.get() != IHAVEOPT {
            return Err(Error::violation(format!(
                "Option begins with {:#018x}, not with IHAVEOPT",
                raw.magic
            )));
        }
        Ok(Self { option: OptionCode(raw.option.get()), len: raw.len.get() })
    }
}

/// The header of an answer to an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OptionReply {
    pub(crate) option: OptionCode,
    pub(crate) kind: ReplyCode,
    pub(crate) len: u32,
}

impl OptionReply {
    pub(crate) fn encode(self) -> [u8; OPTION_REPLY_BYTES] {
        zerocopy::transmute!(RawReply {
            magic: OPTION_REPLY.into(),
            option: self.option.0.into(),
            kind: self.kind.0.into(),
            len: self.len.into(),
        })
    }

    pub(crate) fn decode(bytes: [u8; OPTION_REPLY_BYTES]) -> Result<Self> {
        let raw: RawReply = zerocopy::transmute!(bytes);
        if raw.magic.get() != OPTION_REPLY {
            return Err(Error::violation(format!(
                "Option reply begins with {:#018x}; it should be {OPTION_REPLY:#018x}",
                raw.magic
            )));
        }
        Ok(Self {
            option: OptionCode(raw.option.get()),
            kind: ReplyCode(raw.kind.get()),
            len: raw.len.get(),
        })
    }
}
