//! Words and headers as they stand on the wire: all integers big-endian.
//!
//! * Always: a header that exists was decoded and had the right magic number; codes that nobody
//!   knows keep their value.
//! * Never: a length is believed here. Who reads on decides how much it is worth.

mod code;
mod fields;
mod flags;
mod option;
mod reply;
mod request;

pub(crate) use fields::Fields;
pub(crate) use option::{
    CLIENT_FLAGS_BYTES, GREETING_BYTES, Greeting, NO_ZEROES_BYTES, OLDSTYLE_REST_BYTES,
    OPTION_HEADER_BYTES, OPTION_REPLY_BYTES, OldstyleExport, Opening, OptionHeader, OptionReply,
};
pub(crate) use reply::{ChunkHeader, MAGIC_BYTES, ReplyHeader, encode_simple};
pub(crate) use request::{RequestForm, RequestHeader};

pub use code::{ChunkType, CommandCode, ErrorCode, InfoType, OptionCode, ReplyCode};
pub use flags::{
    AllocationFlags, ChunkFlags, ClientFlags, CommandFlags, HandshakeFlags, InitState,
    TransmissionFlags,
};
