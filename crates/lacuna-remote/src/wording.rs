//! What went wrong, in the engine's words.

use std::io;

use lacuna::{Error, ErrorKind};
use lacuna_nbd::client::{Command, Failure};
use lacuna_nbd::{ByteRange, ErrorKind as NbdErrorKind};

/// Says that the peer broke the protocol, or refused.
pub(crate) fn of_protocol(error: &lacuna_nbd::Error) -> Error {
    let kind = match error.kind() {
        NbdErrorKind::Unsupported => ErrorKind::Unsupported,
        NbdErrorKind::InvalidRequest => ErrorKind::InvalidRequest,
        NbdErrorKind::Refused => ErrorKind::NotFound,
        _ => ErrorKind::Io,
    };
    Error::new(kind, error.to_string())
}

/// Says what the server answered to a request.
pub(crate) fn of_failure(failure: &Failure, command: Command, range: ByteRange) -> Error {
    let code = i32::try_from(failure.code.0).unwrap_or(22);
    let said = match failure.message.as_str() {
        "" => String::new(),
        message => format!(" (the server says {message})"),
    };
    Error::io(io::Error::from_raw_os_error(code), format!("{}{said}", doing(command, range)))
}

/// Says what a request does, and where.
pub(crate) fn doing(command: Command, range: ByteRange) -> String {
    let verb = match command {
        Command::BlockStatus => "Asking about",
        Command::Cache => "Prefetching",
        Command::Flush => return "Flushing".into(),
        Command::Read => "Reading",
        Command::Resize => return format!("Resizing to {} bytes", range.start),
        Command::Trim => "Discarding",
        Command::Write => "Writing",
        Command::WriteZeroes => "Zeroing",
    };
    format!("{verb} {} bytes at {:#x}", range.len, range.start)
}

/// Says that a connection ended where it should not.
pub(crate) fn hung_up() -> Error {
    let end = io::Error::from(io::ErrorKind::UnexpectedEof);
    Error::io(io::Error::new(end.kind(), "the server hung up"), "The connection is lost")
}

/// Says that a connection broke.
pub(crate) fn lost(error: io::Error) -> Error {
    match lacuna_tls::explain(&error) {
        Some(text) => Error::new(ErrorKind::Io, text),
        None => Error::io(without_number(&error), "The connection is lost"),
    }
}

/// Takes the host's number off: that of a socket is none of a disk, where "broken pipe" or "connection
/// reset" would depend on who noticed first.
fn without_number(error: &io::Error) -> io::Error {
    let text = error.to_string();
    let words = text.split(" (os error").next().unwrap_or_default().to_owned();
    io::Error::new(error.kind(), words)
}
