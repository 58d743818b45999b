//! Which requests an export takes, and what it says to the others (C.4, C.7, C.8). Pure.

use super::replies::Replies;
use super::transmission::{Command, Session};
use crate::block_sizes::DEFAULT_MAX_PAYLOAD_BYTES;
use crate::wire::{CommandCode, CommandFlags, ErrorCode, RequestHeader, TransmissionFlags};
use crate::{ByteRange, Error, Result};

type Flags = TransmissionFlags;

/// Why a request is not taken.
pub(super) type Reason = (ErrorCode, String);

/// Returns how many bytes of payload follow a header.
///
/// A payload up to the larger of 32 MiB and what was advertised is drained where it is not wanted;
/// more than that is an attack.
pub(super) fn payload_bytes(session: &Session, header: &RequestHeader) -> Result<u64> {
    let is_announced =
        session.replies == Replies::Extended && header.flags.contains(CommandFlags::PAYLOAD_LEN);
    // An extended write without the flag has its payload all the same, in QEMU's reading too.
    if !is_announced && header.command != CommandCode::WRITE {
        return Ok(0);
    }
    let limit = session.block_sizes.max_payload().max(DEFAULT_MAX_PAYLOAD_BYTES);
    if header.len > limit.into() {
        return Err(Error::violation(format!(
            "{} announces a payload of {} bytes; at most {limit} are taken",
            header.command, header.len
        )));
    }
    Ok(header.len)
}

/// Says what the request is, or why the export does not take it.
pub(super) fn judge(session: &Session, header: &RequestHeader) -> Result<Command, Reason> {
    let command = command(header)?;
    judge_flags(session, header, command)?;
    judge_offer(session, command)?;
    judge_range(session, header, command)?;
    Ok(command)
}

fn command(header: &RequestHeader) -> Result<Command, Reason> {
    Ok(match header.command {
        CommandCode::READ => Command::Read,
        CommandCode::WRITE => Command::Write,
        CommandCode::FLUSH => Command::Flush,
        CommandCode::TRIM => Command::Trim,
        CommandCode::CACHE => Command::Cache,
        CommandCode::WRITE_ZEROES => Command::WriteZeroes,
        CommandCode::BLOCK_STATUS => Command::BlockStatus,
        CommandCode::RESIZE => Command::Resize,
        unknown => return invalid(format!("Command {unknown} is not known here")),
    })
}

/// Flags that nobody knows, that the command does not have, or that were not offered.
fn judge_flags(session: &Session, header: &RequestHeader, command: Command) -> Result<(), Reason> {
    let offered =
        |flag, with| if session.flags.contains(with) { flag } else { CommandFlags::empty() };
    let is_extended = session.replies == Replies::Extended;
    let payload = if is_extended { CommandFlags::PAYLOAD_LEN } else { CommandFlags::empty() };
    let own = match command {
        Command::Read => offered(CommandFlags::DF, Flags::SEND_DF),
        Command::Write => payload,
        Command::WriteZeroes => {
            CommandFlags::NO_HOLE | offered(CommandFlags::FAST_ZERO, Flags::SEND_FAST_ZERO)
        }
        Command::BlockStatus => {
            CommandFlags::REQ_ONE | offered(CommandFlags::PAYLOAD_LEN, Flags::BLOCK_STATUS_PAYLOAD)
        }
        Command::Cache | Command::Flush | Command::Resize | Command::Trim => CommandFlags::empty(),
    };
    let right = own | offered(CommandFlags::FUA, Flags::SEND_FUA);
    if right.contains(header.flags) {
        return Ok(());
    }
    invalid(format!(
        "{} has flags {:#x}; here it may have {:#x}",
        header.command,
        header.flags.bits(),
        right.bits()
    ))
}

/// Commands that were not offered, and changes of what is read-only.
fn judge_offer(session: &Session, command: Command) -> Result<(), Reason> {
    let is_change =
        matches!(command, Command::Resize | Command::Trim | Command::Write | Command::WriteZeroes);
    if is_change && session.flags.contains(Flags::READ_ONLY) {
        return Err((ErrorCode::EPERM, "The export is read-only".into()));
    }
    let (is_offered, name) = match command {
        Command::Read | Command::Write => (true, CommandCode::READ),
        Command::Flush => (session.flags.contains(Flags::SEND_FLUSH), CommandCode::FLUSH),
        Command::Trim => (session.flags.contains(Flags::SEND_TRIM), CommandCode::TRIM),
        Command::Cache => (session.flags.contains(Flags::SEND_CACHE), CommandCode::CACHE),
        Command::WriteZeroes => {
            (session.flags.contains(Flags::SEND_WRITE_ZEROES), CommandCode::WRITE_ZEROES)
        }
        Command::Resize => (session.flags.contains(Flags::SEND_RESIZE), CommandCode::RESIZE),
        Command::BlockStatus => (!session.contexts.is_empty(), CommandCode::BLOCK_STATUS),
    };
    match (is_offered, command) {
        (true, _) => Ok(()),
        (false, Command::BlockStatus) => {
            invalid("No meta context was chosen for this export".into())
        }
        (false, _) => invalid(format!("{name} was not offered")),
    }
}

fn judge_range(session: &Session, header: &RequestHeader, command: Command) -> Result<(), Reason> {
    match command {
        // Offset and length mean nothing; nobody insists on zeros.
        Command::Flush => Ok(()),
        Command::Resize => judge_size(header),
        Command::BlockStatus if header.flags.contains(CommandFlags::PAYLOAD_LEN) => {
            judge_context_payload(session, header)
        }
        Command::BlockStatus => judge_status_range(session, header),
        Command::Read | Command::Write => {
            judge_payload(session, header)?;
            judge_bounds(session, header)
        }
        Command::Cache | Command::Trim | Command::WriteZeroes => judge_bounds(session, header),
    }
}

/// The draft leaves the length open; a later one may fill it.
fn judge_size(header: &RequestHeader) -> Result<(), Reason> {
    if header.len != 0 {
        return invalid(format!("A resize has length {}; it should be 0", header.len));
    }
    if i64::try_from(header.offset).is_err() {
        return invalid(format!("New size {} is not below 2^63", header.offset));
    }
    Ok(())
}

/// The payload is u64 length, n × u32 context; no context is named twice, so it has a limit.
fn judge_context_payload(session: &Session, header: &RequestHeader) -> Result<(), Reason> {
    let most = (session.contexts.len() as u64).saturating_mul(4).saturating_add(8);
    let has_whole_ids = header.len.checked_rem(4) == Some(0);
    if header.len < 8 || header.len > most || !has_whole_ids {
        return invalid(format!(
            "A block status has a payload of {} bytes; it should be a length of 8 bytes and 4 \
             bytes for each context, at most {most}",
            header.len
        ));
    }
    Ok(())
}

/// Judges a block status whose length is that of a range.
pub(super) fn judge_status_range(session: &Session, header: &RequestHeader) -> Result<(), Reason> {
    if header.len == 0 {
        return invalid("The status of no bytes was asked for".into());
    }
    judge_bounds(session, header)
}

/// What goes over the wire in one piece has a limit.
fn judge_payload(session: &Session, header: &RequestHeader) -> Result<(), Reason> {
    let most = session.block_sizes.max_payload();
    if header.len <= most.into() {
        return Ok(());
    }
    let is_read = header.command == CommandCode::READ;
    let has_chunks = session.replies != Replies::Simple;
    let error = if is_read && has_chunks { ErrorCode::EOVERFLOW } else { ErrorCode::EINVAL };
    Err((error, format!("Request has {} bytes; at most {most} go at once", header.len)))
}

fn judge_bounds(session: &Session, header: &RequestHeader) -> Result<(), Reason> {
    let range = ByteRange { start: header.offset, len: header.len };
    let sizes = session.block_sizes;
    if !sizes.is_aligned(range.start) || !sizes.is_aligned(range.len) {
        return invalid(format!(
            "Request for {} bytes at {} is not aligned to {}",
            range.len,
            range.start,
            sizes.minimum()
        ));
    }
    if range.is_within(session.size_bytes) {
        return Ok(());
    }
    let is_write = matches!(header.command, CommandCode::WRITE | CommandCode::WRITE_ZEROES);
    let error = if is_write { ErrorCode::ENOSPC } else { ErrorCode::EINVAL };
    Err((
        error,
        format!(
            "Request for {} bytes at {} reaches past the end of the export, {}",
            range.len, range.start, session.size_bytes
        ),
    ))
}

const fn invalid<T>(message: String) -> Result<T, Reason> {
    Err((ErrorCode::EINVAL, message))
}
