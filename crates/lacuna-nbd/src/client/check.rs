//! What a server's reply must be, to be an answer to a request (C.5, C.6).

use super::in_flight::{Failure, Pending};
use super::receive::Extents;
use crate::context::StatusWidth;
use crate::text::{MAX_TEXT_BYTES, quoted};
use crate::wire::{ChunkFlags, ChunkHeader, ChunkType, CommandFlags, ErrorCode, Fields};
use crate::{ByteRange, Command, ContextId, Error, Replies, Result};

/// Longest chunk that reports an error, in bytes: code, lengths, text, offset, and some more that
/// a later kind may have.
const MAX_ERROR_BYTES: u32 = 4096 + 64;
/// Most errors of one request: a read of 32 MiB may have one for each of its pages.
const MAX_FAILURES: u32 = 8192;

impl Pending {
    /// Keeps the first error.
    pub(super) fn fail(&mut self, failure: Failure) -> Result<()> {
        self.failure.get_or_insert_with(|| Box::new(failure));
        self.failures = self.failures.saturating_add(1);
        match self.failures <= MAX_FAILURES {
            true => Ok(()),
            false => Err(Error::violation(format!(
                "A request is answered by more than {MAX_FAILURES} errors"
            ))),
        }
    }

    /// Notes content of a read.
    pub(super) fn take_content(&mut self, range: ByteRange) -> Result<()> {
        let is_fine = range.len > 0 && self.range.contains(range);
        if !is_fine {
            return Err(Error::violation(format!(
                "A read of {} bytes at {} is answered with {} bytes at {}",
                self.range.len, self.range.start, range.len, range.start
            )));
        }
        if self.has_content && self.flags.contains(CommandFlags::DF) {
            return Err(Error::violation("A read in one piece is answered in several"));
        }
        self.has_content = true;
        if self.coverage.add(range) {
            return Ok(());
        }
        Err(Error::violation(format!(
            "{} bytes at {} come twice, or there are too many gaps between parts",
            range.len, range.start
        )))
    }

    /// Notes a chunk of a block status.
    pub(super) fn take_context(&mut self, context: ContextId) -> Result<()> {
        let at = self.owed.iter().position(|owed| *owed == context).ok_or_else(|| {
            Error::violation(format!(
                "Block status of context {}, which was not asked for or came before",
                context.0
            ))
        })?;
        self.owed.remove(at);
        Ok(())
    }
}

/// Says whether a chunk of that kind and length may answer the request.
pub(super) fn judge_chunk(chunk: &ChunkHeader, pending: &Pending, replies: Replies) -> Result<()> {
    let is_read = pending.command == Command::Read;
    let is_status = pending.command == Command::BlockStatus;
    let is_extended = replies == Replies::Extended;
    let has_rows = |front: u32, row: u32| {
        let rows = chunk.len.checked_sub(front).filter(|rows| *rows > 0);
        rows.and_then(|rows| rows.checked_rem(row)) == Some(0)
    };
    let (may_come, has_length) = match chunk.kind {
        ChunkType::NONE => (chunk.flags.contains(ChunkFlags::DONE), chunk.len == 0),
        ChunkType::OFFSET_DATA => (is_read, chunk.len > 8),
        ChunkType::OFFSET_HOLE => (is_read, chunk.len == 12),
        ChunkType::BLOCK_STATUS => (is_status && !is_extended, has_rows(4, 8)),
        ChunkType::BLOCK_STATUS_EXT => (is_status && is_extended, has_rows(8, 16)),
        kind => (kind.is_error(), (6..=MAX_ERROR_BYTES).contains(&chunk.len)),
    };
    if may_come && has_length {
        return Ok(());
    }
    Err(Error::violation(format!(
        "{} is answered by a chunk {} with flags {:#x} and {} bytes, which does not fit",
        pending.command.code(),
        chunk.kind,
        chunk.flags.bits(),
        chunk.len
    )))
}

/// Decodes u32 error, u16 length, text, and u64 offset where the kind has one.
pub(super) fn decode_failure(
    kind: ChunkType,
    mut fields: Fields<'_>,
    range: ByteRange,
) -> Result<Failure> {
    let wrong = || Error::violation("An error has a text that reaches past its end, or no number");
    let code = fields.u32().map(ErrorCode).filter(|code| code.0 != 0).ok_or_else(wrong)?;
    let len = usize::from(fields.u16().ok_or_else(wrong)?);
    let text = fields.bytes(len).filter(|_| len <= MAX_TEXT_BYTES).ok_or_else(wrong)?;
    let offset = match kind {
        ChunkType::ERROR_OFFSET => {
            let offset = fields.u64().ok_or_else(wrong)?;
            let is_inside = range.contains(ByteRange { start: offset, len: 1 });
            Some(offset).filter(|_| is_inside).map(Some).ok_or_else(|| {
                Error::violation(format!(
                    "An error is said to be at {offset}, outside of its request"
                ))
            })?
        }
        _ => None,
    };
    let is_known = matches!(kind, ChunkType::ERROR | ChunkType::ERROR_OFFSET);
    if is_known && !fields.is_empty() {
        return Err(Error::violation("An error has bytes behind its end"));
    }
    let message = if text.is_empty() { String::new() } else { quoted(text) };
    Ok(Failure { code: code.known(), message, offset })
}

pub(super) fn decode_extent(row: &[u8], is_extended: bool) -> (u64, u64) {
    let mut fields = Fields(row);
    let mut word = || {
        let word = if is_extended { fields.u64() } else { fields.u32().map(u64::from) };
        word.unwrap_or(0)
    };
    (word(), word())
}

/// Holds an extent against the rules of a block status.
pub(super) fn judge_extent(
    extents: &Extents,
    pending: &Pending,
    len: u64,
    flags: u64,
) -> Result<()> {
    let before = extents.at.saturating_sub(pending.range.start);
    let one = pending.flags.contains(CommandFlags::REQ_ONE);
    let wrong = if len == 0 {
        "is empty"
    } else if one && len > pending.range.len {
        "is longer than the request, which wants no more"
    } else if extents.at.checked_add(len).is_none() {
        "ends past 2^64"
    } else if before >= pending.range.len {
        "begins where the request has ended"
    } else if extents.width == StatusWidth::Bits32 && u32::try_from(flags).is_err() {
        "has flags above 32 bits, which its context does not"
    } else {
        return Ok(());
    };
    Err(Error::violation(format!("An extent of {len} bytes at {} {wrong}", extents.at)))
}
