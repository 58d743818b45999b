//! The NBD protocol, without I/O: bytes in, events and bytes out.
//!
//! A driver owns the socket. It hands what it received to a machine, does what the event says, and
//! sends what the machine wants sent. Nothing here blocks, waits, or knows a clock; so a machine is
//! tested with byte strings, driven by any runtime, and attacked by a fuzzer.
//!
//! # Server
//!
//! ```text
//!            Handshake                                         Transmission
//!
//!  greeting ──▶ client flags ──▶ option header ◀─────────┐     header ──▶ Request ─┐
//!                                │   │   │               │       ▲                 │ reply by
//!         unwanted: drain ◀──────┘   │   └─▶ data        │       ├──▶ Write        │ Replies
//!              │                     │        │          │       │     │ payload   │
//!              └──▶ error reply ─────┼────────┼──────────┤       │     ▼           ▼
//!                                    │        ▼          │       │   Payload ──▶ (driver)
//!     ABORT ──▶ Aborted              │   FindExport,     │       │
//!     STARTTLS ──▶ StartTls,         │   ListExports ────┤       ├──▶ BlockStatus
//!       tls_established forgets all ─┘        │ answer_* │       │
//!                                             ▼          │       └──▶ drain ──▶ Rejected
//!                              GO, EXPORT_NAME: Transmission
//! ```
//!
//! * Always: whatever way a stream is cut into pieces, the same events come out.
//! * Always: a length is compared with a limit before memory or time is spent on it.
//! * Never: a client can make a machine panic, or grow it past its stated bounds: 64 KiB for an
//!   option, 4 bytes for each context that was chosen, 32 bytes for a header.
//!
//! The whole of a small server is `examples/serve_zeros.rs`. A conversation in short:
//!
//! ```
//! use lacuna_nbd::server::{Event, Export, Handshake, TlsMode, TransmissionEvent};
//!
//! let mut handshake = Handshake::new(TlsMode::Off);
//! // Client flags, then GO for the default export, asking for no information.
//! let go = b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0";
//! // And a read of 512 bytes at 4096 with cookie 7.
//! let read = b"\x25\x60\x95\x13\0\0\0\0\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\x10\0\0\0\x02\0";
//! let received = [&go[..], &read[..]].concat();
//! let mut input = &received[..];
//!
//! let mut transmission = loop {
//!     match handshake.advance(&mut input)? {
//!         Event::FindExport(_) => handshake.answer_export(Ok(Export::new(1 << 20))),
//!         Event::Transmission(transmission) => break transmission,
//!         event => panic!("{event:?}"),
//!     }
//! };
//! let sent = handshake.take_output();
//! assert!(sent.starts_with(b"NBDMAGICIHAVEOPT"));
//!
//! let TransmissionEvent::Request(request) = transmission.advance(&mut input)? else { panic!() };
//! assert_eq!((request.range.start, request.range.len), (4096, 512));
//! // The header goes out in front of the bytes, which nobody copies.
//! let header = transmission.replies().whole_read(request.tag, request.range);
//! assert_eq!(header.len(), 16);
//! # Ok::<_, lacuna_nbd::Error>(())
//! ```
//!
//! # Where the specifications leave a choice
//!
//! * Facts that `GO` states are those of that moment, even right after an `INFO` that stated others:
//!   a disk that grew or was written to in between is not lied about.
//! * A read above the largest payload fails with `EOVERFLOW` where replies have chunks, and with
//!   `EINVAL` otherwise; a write past the end fails with `ENOSPC`.
//! * `RESIZE` follows the branch `extension-resize` of the specification, with the numbers that
//!   the main document reserves: transmission flag bit 9, command 8. The offset is the new size;
//!   the length is 0, on which we insist. The draft has no message from the server, so a client
//!   learns of somebody else's resize by asking for that size itself.
//! * `NBD_INFO_INIT_STATE` and `x-lacuna:layers` are private: see [`wire::InfoType::INIT_STATE`]
//!   and [`context::LayersStatus`].

#![forbid(unsafe_code)]
#![deny(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod block_sizes;
pub mod client;
mod command;
pub mod context;
mod error;
mod gather;
mod header_bytes;
mod judge;
mod replies;
pub mod server;
mod text;
mod units;
mod uri;
pub mod wire;

pub use block_sizes::{BlockSizes, DEFAULT_MAX_PAYLOAD_BYTES};
pub use command::Command;
pub use error::{Error, ErrorKind, Result};
pub use header_bytes::HeaderBytes;
pub use replies::Replies;
pub use text::{ExportName, MAX_TEXT_BYTES};
pub use units::{ByteRange, ContextId, Cookie};
pub use uri::{Address, DEFAULT_PORT, TlsKind, TlsParameters, Uri};
