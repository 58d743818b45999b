//! Words and headers as they stand on the wire: all integers big-endian.
//!
//! * Always: a header that exists was decoded and had the right magic number; codes that nobody
//!   knows keep their value.
//! * Never: a length is believed here. Who reads on decides how much it is worth.

mod code;
mod fields;
mod flags;
#[expect(dead_code, reason = "the client's half is not written yet")]
mod option;
mod reply;
#[expect(dead_code, reason = "the client's half is not written yet")]
mod request;

pub(crate) use fields::Fields;
pub(crate) use option::{CLIENT_FLAGS_BYTES, Greeting, OptionHeader, OptionReply};
pub(crate) use option::{NO_ZEROES_BYTES, OPTION_HEADER_BYTES};
pub(crate) use reply::{ChunkHeader, encode_simple};
pub(crate) use request::{RequestForm, RequestHeader};

pub use code::{ChunkType, CommandCode, ErrorCode, InfoType, OptionCode, ReplyCode};
pub use flags::{
    AllocationFlags, ChunkFlags, ClientFlags, CommandFlags, HandshakeFlags, InitState,
    TransmissionFlags,
};
