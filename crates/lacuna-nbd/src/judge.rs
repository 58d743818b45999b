//! Which requests an export takes, and what it says to the others (C.4, C.7, C.8). Pure.
//!
//! A server judges what it receives, a client what it is about to send: neither trusts the other
//! to do so.

use crate::block_sizes::DEFAULT_MAX_PAYLOAD_BYTES;
use crate::wire::{CommandCode, CommandFlags, ErrorCode, RequestHeader, TransmissionFlags};
use crate::{BlockSizes, ByteRange, Command, Error, Replies, Result};

type Flags = TransmissionFlags;

/// What both sides agreed on.
#[derive(Clone, Debug)]
pub(crate) struct Terms {
    pub(crate) replies: Replies,
    pub(crate) flags: TransmissionFlags,
    pub(crate) size_bytes: u64,
    pub(crate) block_sizes: BlockSizes,
    /// How many meta contexts were chosen.
    pub(crate) contexts: u32,
}

/// Why a request is not taken.
pub(crate) type Reason = (ErrorCode, String);

/// Returns how many bytes of payload follow a header.
///
/// A payload up to the larger of 32 MiB and what was advertised is drained where it is not wanted;
/// more than that is an attack.
pub(crate) fn payload_bytes(terms: &Terms, header: &RequestHeader) -> Result<u64> {
    let is_announced =
        terms.replies == Replies::Extended && header.flags.contains(CommandFlags::PAYLOAD_LEN);
    // An extended write without the flag has its payload all the same, in QEMU's reading too.
    if !is_announced && header.command != CommandCode::WRITE {
        return Ok(0);
    }
    let limit = terms.block_sizes.max_payload().max(DEFAULT_MAX_PAYLOAD_BYTES);
    if header.len > limit.into() {
        return Err(Error::violation(format!(
            "{} announces a payload of {} bytes; at most {limit} are taken",
            header.command, header.len
        )));
    }
    Ok(header.len)
}

/// Says what the request is, or why the export does not take it.
pub(crate) fn judge(terms: &Terms, header: &RequestHeader) -> Result<Command, Reason> {
    let Some(command) = Command::of(header.command) else {
        return invalid(format!("Command {} is not known here", header.command));
    };
    judge_flags(terms, header, command)?;
    judge_offer(terms, command)?;
    judge_range(terms, header, command)?;
    Ok(command)
}

/// Flags that nobody knows, that the command does not have, or that were not offered.
fn judge_flags(terms: &Terms, header: &RequestHeader, command: Command) -> Result<(), Reason> {
    let offered =
        |flag, with| if terms.flags.contains(with) { flag } else { CommandFlags::empty() };
    let is_extended = terms.replies == Replies::Extended;
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
fn judge_offer(terms: &Terms, command: Command) -> Result<(), Reason> {
    let is_change =
        matches!(command, Command::Resize | Command::Trim | Command::Write | Command::WriteZeroes);
    if is_change && terms.flags.contains(Flags::READ_ONLY) {
        return Err((ErrorCode::EPERM, "The export is read-only".into()));
    }
    let needed = match command {
        Command::Read | Command::Write => Flags::empty(),
        Command::Flush => Flags::SEND_FLUSH,
        Command::Trim => Flags::SEND_TRIM,
        Command::Cache => Flags::SEND_CACHE,
        Command::WriteZeroes => Flags::SEND_WRITE_ZEROES,
        Command::Resize => Flags::SEND_RESIZE,
        Command::BlockStatus if terms.contexts == 0 => {
            return invalid("No meta context was chosen for this export".into());
        }
        Command::BlockStatus => Flags::empty(),
    };
    if terms.flags.contains(needed) {
        return Ok(());
    }
    invalid(format!("{} was not offered", command.code()))
}

fn judge_range(terms: &Terms, header: &RequestHeader, command: Command) -> Result<(), Reason> {
    match command {
        // Offset and length mean nothing; nobody insists on zeros.
        Command::Flush => Ok(()),
        Command::Resize => judge_size(header),
        Command::BlockStatus if header.flags.contains(CommandFlags::PAYLOAD_LEN) => {
            judge_context_payload(terms, header)
        }
        Command::BlockStatus => judge_status_range(terms, header),
        Command::Read | Command::Write => {
            judge_payload(terms, header)?;
            judge_bounds(terms, header)
        }
        Command::Cache | Command::Trim | Command::WriteZeroes => judge_bounds(terms, header),
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
fn judge_context_payload(terms: &Terms, header: &RequestHeader) -> Result<(), Reason> {
    let most = (u64::from(terms.contexts)).saturating_mul(4).saturating_add(8);
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
pub(crate) fn judge_status_range(terms: &Terms, header: &RequestHeader) -> Result<(), Reason> {
    if header.len == 0 {
        return invalid("The status of no bytes was asked for".into());
    }
    judge_bounds(terms, header)
}

/// What goes over the wire in one piece has a limit.
fn judge_payload(terms: &Terms, header: &RequestHeader) -> Result<(), Reason> {
    let most = terms.block_sizes.max_payload();
    if header.len <= most.into() {
        return Ok(());
    }
    let is_read = header.command == CommandCode::READ;
    let has_chunks = terms.replies != Replies::Simple;
    let error = if is_read && has_chunks { ErrorCode::EOVERFLOW } else { ErrorCode::EINVAL };
    Err((error, format!("Request has {} bytes; at most {most} go at once", header.len)))
}

fn judge_bounds(terms: &Terms, header: &RequestHeader) -> Result<(), Reason> {
    let range = ByteRange { start: header.offset, len: header.len };
    let sizes = terms.block_sizes;
    if !sizes.is_aligned(range.start) || !sizes.is_aligned(range.len) {
        return invalid(format!(
            "Request for {} bytes at {} is not aligned to {}",
            range.len,
            range.start,
            sizes.minimum()
        ));
    }
    if range.is_within(terms.size_bytes) {
        return Ok(());
    }
    let is_write = matches!(header.command, CommandCode::WRITE | CommandCode::WRITE_ZEROES);
    let error = if is_write { ErrorCode::ENOSPC } else { ErrorCode::EINVAL };
    Err((
        error,
        format!(
            "Request for {} bytes at {} reaches past the end of the export, {}",
            range.len, range.start, terms.size_bytes
        ),
    ))
}

const fn invalid<T>(message: String) -> Result<T, Reason> {
    Err((ErrorCode::EINVAL, message))
}
