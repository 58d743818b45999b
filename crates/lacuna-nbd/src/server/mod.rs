//! The server's side: [`Handshake`] until an export is chosen, [`Transmission`] from then on.
//!
//! * `handshake.rs`: the machine and its states
//! * `haggle.rs`: which option may come now, and what it changes
//! * `options.rs`: what the data of an option says
//! * `outcome.rs`: what a driver's answer turns into; `answers.rs`: how that is sent
//! * `export.rs`: what the driver is asked, and how it answers
//! * `contexts.rs`: which meta contexts a query means
//! * `transmission.rs`: cuts what arrives into requests and payloads
//! * `replies.rs`, `status.rs`: headers and chunks of replies

mod answers;
mod contexts;
mod export;
mod haggle;
mod handshake;
mod options;
mod outcome;
mod replies;
mod status;
mod transmission;

pub use crate::{Command, HeaderBytes, Replies};
pub use export::{Export, ListedExport, Purpose, Question, Refusal};
pub use handshake::{
    Event, Handshake, MAX_HANDSHAKE_BYTES, MAX_OPTION_BYTES, MAX_OPTIONS, TlsMode,
};
pub use replies::{Last, Tag};
pub use status::{MAX_EXTENTS, StatusExtent};
pub use transmission::{Rejection, Request, Transmission, TransmissionEvent, WantedContexts};
