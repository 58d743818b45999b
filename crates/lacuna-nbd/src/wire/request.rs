//! Headers of requests (C.4).
//!
//! | byte | size | field |
//! |---|---|---|
//! | 0 | 4 | magic, which tells compact and extended apart |
//! | 4, 6 | 2, 2 | flags, command |
//! | 8 | 8 | cookie |
//! | 16 | 8 | offset |
//! | 24 | 4 or 8 | length |

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{CommandCode, CommandFlags};
use crate::{Cookie, Error, HeaderBytes, Replies, Result};

const COMPACT: u32 = 0x2560_9513;
const EXTENDED: u32 = 0x21e4_1c71;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawCompact {
    magic: U32,
    flags: U16,
    command: U16,
    cookie: U64,
    offset: U64,
    len: U32,
}
const _: () = assert!(size_of::<RawCompact>() == 28);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawExtended {
    magic: U32,
    flags: U16,
    command: U16,
    cookie: U64,
    offset: U64,
    len: U64,
}
const _: () = assert!(size_of::<RawExtended>() == 32);

/// Which of the two headers a connection uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequestForm {
    Compact,
    Extended,
}

impl RequestForm {
    /// Returns the form that goes with that of the replies.
    pub(crate) const fn of(replies: Replies) -> Self {
        match replies {
            Replies::Extended => Self::Extended,
            Replies::Simple | Replies::Structured => Self::Compact,
        }
    }

    /// Returns the length of a header in bytes.
    pub(crate) const fn header_bytes(self) -> usize {
        match self {
            Self::Compact => size_of::<RawCompact>(),
            Self::Extended => size_of::<RawExtended>(),
        }
    }
}

/// The header of a request, in either form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestHeader {
    pub(crate) flags: CommandFlags,
    pub(crate) command: CommandCode,
    pub(crate) cookie: Cookie,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

impl RequestHeader {
    /// Decodes `bytes`, which are as many as `form` has.
    pub(crate) fn decode(form: RequestForm, bytes: &[u8]) -> Result<Self> {
        let decoded = match form {
            RequestForm::Compact => RawCompact::read_from_bytes(bytes)
                .ok()
                .filter(|raw| raw.magic.get() == COMPACT)
                .map(|raw| {
                    Self::new(raw.flags, raw.command, raw.cookie, raw.offset, raw.len.into())
                }),
            RequestForm::Extended => RawExtended::read_from_bytes(bytes)
                .ok()
                .filter(|raw| raw.magic.get() == EXTENDED)
                .map(|raw| {
                    Self::new(raw.flags, raw.command, raw.cookie, raw.offset, raw.len.get())
                }),
        };
        decoded.ok_or_else(|| wrong_magic(form, bytes))
    }

    /// Encodes the header.
    ///
    /// # Panics
    /// If the length does not fit into the form: whoever built the request checked it.
    pub(crate) fn encode(&self, form: RequestForm) -> HeaderBytes {
        let (flags, command) = (self.flags.bits().into(), self.command.0.into());
        let (cookie, offset) = (self.cookie.0.into(), self.offset.into());
        match form {
            RequestForm::Compact => {
                let len = u32::try_from(self.len);
                assert!(len.is_ok(), "a compact request has a length of 32 bits");
                let len = len.unwrap_or(u32::MAX).into();
                let raw = RawCompact { magic: COMPACT.into(), flags, command, cookie, offset, len };
                HeaderBytes::from(raw.as_bytes())
            }
            RequestForm::Extended => {
                let (magic, len) = (EXTENDED.into(), self.len.into());
                let raw = RawExtended { magic, flags, command, cookie, offset, len };
                HeaderBytes::from(raw.as_bytes())
            }
        }
    }

    fn new(flags: U16, command: U16, cookie: U64, offset: U64, len: u64) -> Self {
        Self {
            flags: CommandFlags::from_bits_retain(flags.get()),
            command: CommandCode(command.get()),
            cookie: Cookie(cookie.get()),
            offset: offset.get(),
            len,
        }
    }
}

fn wrong_magic(form: RequestForm, bytes: &[u8]) -> Error {
    let found = super::Fields(bytes).u32().unwrap_or(0);
    let right = match form {
        RequestForm::Compact => COMPACT,
        RequestForm::Extended => EXTENDED,
    };
    Error::violation(format!("Request begins with {found:#010x}; it should be {right:#010x}"))
}
