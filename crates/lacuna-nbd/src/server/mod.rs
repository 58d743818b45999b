//! The server's side: [`Handshake`] until an export is chosen, [`Transmission`] from then on.
//!
//! * `handshake.rs`: the machine and its states
//! * `haggle.rs`: which option may come now, and what it changes
//! * `options.rs`: what the data of an option says
//! * `outcome.rs`: what a driver's answer turns into; `answers.rs`: how that is sent
//! * `export.rs`: what the driver is asked, and how it answers
//! * `contexts.rs`: which meta contexts a query means
//! * `transmission.rs`: cuts what arrives into requests and payloads
//! * `judge.rs`: which requests an export takes, and what it says to the others
//! * `replies.rs`, `status.rs`: headers and chunks of replies

mod answers;
mod contexts;
mod export;
mod haggle;
mod handshake;
mod judge;
mod options;
mod outcome;
mod replies;
mod status;
mod transmission;

pub use export::{Export, ListedExport, Purpose, Question, Refusal};
pub use handshake::{
    Event, Handshake, MAX_HANDSHAKE_BYTES, MAX_OPTION_BYTES, MAX_OPTIONS, TlsMode,
};
pub use replies::{HeaderBytes, Last, Replies, Tag};
pub use status::{MAX_EXTENTS, StatusExtent};
pub use transmission::{
    Command, Rejection, Request, Transmission, TransmissionEvent, WantedContexts,
};
