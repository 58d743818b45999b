//! The client's side: [`Handshake`] until the server agrees, [`Transmission`] from then on.
//!
//! * `wish.rs`: what the caller wants; `export.rs`: what the server says there is
//! * `handshake.rs`: the machine and its states; `haggle.rs`: what is asked next, and what an
//!   answer means; `survey.rs`: the same, asked about every export of a list
//! * `transmission.rs`: requests out; `receive.rs`: replies in; `check.rs`: what a reply must be;
//!   `in_flight.rs`: what is owed to each request; `coverage.rs`: which bytes of a read are there
//!
//! A server is trusted no more than a client is: every reply is held against the request it
//! answers before a byte of it is handed on.

mod check;
mod coverage;
mod export;
mod haggle;
mod handshake;
mod in_flight;
mod receive;
mod survey;
mod transmission;
mod wish;

pub use export::{DescribedExport, ExportInfo, ListedExport};
pub use handshake::{Event, Handshake};
pub use in_flight::Failure;
pub use receive::TransmissionEvent;
pub use transmission::{Ask, Transmission};
pub use wish::{Goal, Headers, TlsWish, Wish};

pub use crate::{Command, HeaderBytes};
