//! Replies of a server, held against the requests they answer (C.5, C.6).
//!
//! * Always: content lies in the request's range, comes once, and is all there before a read
//!   counts as successful; extents are of a context that was asked for, in a row, and keep the
//!   rules of a block status.
//! * Never: a length of the server decides how much memory is taken. Data is handed on as it comes,
//!   extents one by one.

use super::in_flight::{Failure, Pending};
use super::transmission::Transmission;
use crate::context::StatusWidth;
use crate::gather::{take, take_of};
use crate::text::{MAX_TEXT_BYTES, quoted};
use crate::wire::{
    ChunkFlags, ChunkHeader, ChunkType, CommandFlags, ErrorCode, Fields, MAGIC_BYTES, ReplyHeader,
};
use crate::{ByteRange, Command, ContextId, Cookie, Error, Replies, Result};

/// Most extents of a chunk, which the specification recommends.
const MAX_EXTENTS: u32 = 1 << 20;
/// Longest chunk that reports an error, in bytes: code, lengths, text, offset, and some more that
/// a later kind may have.
const MAX_ERROR_BYTES: u32 = 4096 + 64;

/// What arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TransmissionEvent<'a> {
    /// Bytes of a read: `range.len` of them follow, for that place. Take them as
    /// [`TransmissionEvent::Payload`], or read them from elsewhere and tell with
    /// [`Transmission::payload_taken`]. They count once the request is [`Done`](Self::Done).
    Data {
        /// The read.
        cookie: Cookie,
        /// The place.
        range: ByteRange,
    },
    /// A request is answered; its cookie is free.
    Done {
        /// The request.
        cookie: Cookie,
        /// How it went.
        result: Result<(), Box<Failure>>,
    },
    /// A part of a block status; those of one context come in order, without gaps.
    Extent {
        /// The request.
        cookie: Cookie,
        /// Whose status it is.
        context: ContextId,
        /// From where to where; cut at the end of the export.
        range: ByteRange,
        /// The status.
        flags: u64,
    },
    /// A part of a read that is zeros.
    Hole {
        /// The read.
        cookie: Cookie,
        /// The place.
        range: ByteRange,
    },
    /// Read more and come again; the input is used up.
    NeedInput,
    /// The next bytes of the last [`Data`](Self::Data).
    Payload(&'a [u8]),
}

#[derive(Clone, Debug)]
pub(super) enum State {
    Header,
    /// Waits for the part of a chunk that has a fixed length, and for errors as a whole.
    Front(ChunkHeader),
    Payload {
        cookie: Cookie,
        remaining: u64,
        then: Then,
    },
    Extents(Extents),
    Finish(Cookie),
    Over(Error),
}

/// What follows a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    Finish,
    Header,
}

/// A status chunk that is being read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extents {
    cookie: Cookie,
    context: ContextId,
    width: StatusWidth,
    /// How many are left.
    left: u32,
    /// Where the next one starts.
    at: u64,
    then: Then,
}

impl Transmission {
    /// Takes what it can off the front of `input` and says what arrived.
    ///
    /// # Errors
    /// `Violation` where the server broke the protocol: close the connection; what is in flight
    /// has failed. The same error comes again.
    pub fn advance<'a>(&mut self, input: &mut &'a [u8]) -> Result<TransmissionEvent<'a>> {
        loop {
            match self.step(input) {
                Ok(Some(event)) => return Ok(event),
                Ok(None) => {}
                Err(error) => {
                    self.state = State::Over(error.clone());
                    return Err(error);
                }
            }
        }
    }

    /// Returns how many bytes of data are still to be taken; 0 outside of a payload.
    #[must_use]
    pub const fn payload_remaining(&self) -> u64 {
        match self.state {
            State::Payload { remaining, .. } => remaining,
            _ => 0,
        }
    }

    /// Notes that the driver took `len` bytes of the data itself.
    ///
    /// # Panics
    /// If that is more than there is.
    pub fn payload_taken(&mut self, len: u64) {
        let left = self.payload_remaining().checked_sub(len);
        assert!(left.is_some(), "more was taken than the payload has");
        if let State::Payload { cookie, remaining, then } = &mut self.state {
            *remaining = left.unwrap_or(0);
            if *remaining == 0 {
                self.state = then.state(*cookie);
            }
        }
    }

    fn step<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<TransmissionEvent<'a>>> {
        match &mut self.state {
            State::Header => self.header(input),
            State::Front(chunk) => {
                let chunk = *chunk;
                let len = front_bytes(&chunk, self.terms.replies);
                if !self.gather.fill(input, len) {
                    return Ok(Some(TransmissionEvent::NeedInput));
                }
                let front = self.gather.finish();
                self.front(&chunk, &front)
            }
            State::Payload { cookie, remaining, then } => {
                let taken = take_of(input, remaining);
                if *remaining == 0 {
                    self.state = then.state(*cookie);
                }
                let event = if taken.is_empty() {
                    TransmissionEvent::NeedInput
                } else {
                    TransmissionEvent::Payload(taken)
                };
                Ok(Some(event))
            }
            State::Extents(extents) => {
                let extents = *extents;
                self.extent(extents, input)
            }
            State::Finish(cookie) => {
                let cookie = *cookie;
                self.state = State::Header;
                self.finish(cookie).map(Some)
            }
            State::Over(error) => Err(error.clone()),
        }
    }

    /// Decodes the next header, where it lies if it lies in one piece.
    fn header<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<TransmissionEvent<'a>>> {
        let replies = self.terms.replies;
        if self.gather.as_slice().is_empty()
            && let Some(magic) = input.first_chunk()
        {
            let len = ReplyHeader::header_bytes(replies, *magic)?;
            if input.len() >= len {
                let header = ReplyHeader::decode(take(input, len))?;
                return self.reply(header);
            }
        }
        if !self.gather.fill(input, MAGIC_BYTES) {
            return Ok(Some(TransmissionEvent::NeedInput));
        }
        let magic = self.gather.as_slice().first_chunk().copied().unwrap_or_default();
        if !self.gather.fill(input, ReplyHeader::header_bytes(replies, magic)?) {
            return Ok(Some(TransmissionEvent::NeedInput));
        }
        let header = ReplyHeader::decode(self.gather.as_slice())?;
        self.gather.clear();
        self.reply(header)
    }

    fn reply<'a>(&mut self, header: ReplyHeader) -> Result<Option<TransmissionEvent<'a>>> {
        match header {
            ReplyHeader::Simple { cookie, error } => self.simple(cookie, error),
            ReplyHeader::Chunk { chunk, offset } => {
                let pending = self.in_flight.find(chunk.cookie)?;
                if offset.is_some_and(|offset| offset != pending.range.start) {
                    return Err(Error::violation(format!(
                        "Reply repeats offset {}, but the request has {}",
                        offset.unwrap_or(0),
                        pending.range.start
                    )));
                }
                judge_chunk(&chunk, pending, self.terms.replies)?;
                self.state = match chunk.kind {
                    ChunkType::NONE => State::Finish(chunk.cookie),
                    _ => State::Front(chunk),
                };
                Ok(None)
            }
        }
    }

    fn simple<'a>(
        &mut self,
        cookie: Cookie,
        error: Option<ErrorCode>,
    ) -> Result<Option<TransmissionEvent<'a>>> {
        let has_chunks = self.terms.replies.has_chunks();
        let pending = self.in_flight.find(cookie)?;
        let is_read = pending.command == Command::Read;
        if has_chunks && (is_read || pending.command == Command::BlockStatus && error.is_none()) {
            return Err(Error::violation(format!(
                "{} is answered by a simple reply, which it must not be",
                pending.command.code()
            )));
        }
        self.state = State::Finish(cookie);
        if let Some(code) = error {
            pending.fail(Failure { code: code.known(), message: String::new(), offset: None });
        } else if is_read && pending.range.len > 0 {
            let range = pending.range;
            pending.coverage.add(range);
            self.state = State::Payload { cookie, remaining: range.len, then: Then::Finish };
            return Ok(Some(TransmissionEvent::Data { cookie, range }));
        }
        Ok(None)
    }

    /// Takes the front of a chunk.
    fn front<'a>(
        &mut self,
        chunk: &ChunkHeader,
        front: &[u8],
    ) -> Result<Option<TransmissionEvent<'a>>> {
        let (cookie, then) = (chunk.cookie, Then::after(chunk));
        let fields = Fields(front);
        match chunk.kind {
            ChunkType::OFFSET_DATA | ChunkType::OFFSET_HOLE => {
                self.content(chunk, fields, then).map(Some)
            }
            ChunkType::BLOCK_STATUS | ChunkType::BLOCK_STATUS_EXT => {
                self.status(chunk, fields, then)?;
                Ok(None)
            }
            _ => {
                let pending = self.in_flight.find(cookie)?;
                let failure = decode_failure(chunk.kind, fields, pending.range)?;
                pending.fail(failure);
                self.state = then.state(cookie);
                Ok(None)
            }
        }
    }

    /// Takes u64 offset, and u32 size of a hole.
    fn content<'a>(
        &mut self,
        chunk: &ChunkHeader,
        mut fields: Fields<'_>,
        then: Then,
    ) -> Result<TransmissionEvent<'a>> {
        let cookie = chunk.cookie;
        let is_hole = chunk.kind == ChunkType::OFFSET_HOLE;
        let start = fields.u64().unwrap_or(0);
        let len = if is_hole { fields.u32().unwrap_or(0) } else { chunk.len.saturating_sub(8) };
        let range = ByteRange { start, len: len.into() };
        self.in_flight.find(cookie)?.take_content(range)?;
        Ok(if is_hole {
            self.state = then.state(cookie);
            TransmissionEvent::Hole { cookie, range }
        } else {
            self.state = State::Payload { cookie, remaining: range.len, then };
            TransmissionEvent::Data { cookie, range }
        })
    }

    /// Takes u32 context, and in the wide form u32 count.
    fn status(&mut self, chunk: &ChunkHeader, mut fields: Fields<'_>, then: Then) -> Result<()> {
        let context = ContextId(fields.u32().unwrap_or(0));
        let is_wide = chunk.kind == ChunkType::BLOCK_STATUS_EXT;
        let (front, row) = if is_wide { (8, 16) } else { (4, 8) };
        let rows = chunk.len.saturating_sub(front).checked_div(row).unwrap_or(0);
        if is_wide && fields.u32() != Some(rows) {
            return Err(Error::violation(format!(
                "A block status of {} bytes does not have as many extents as it says",
                chunk.len
            )));
        }
        let pending = self.in_flight.find(chunk.cookie)?;
        pending.take_context(context)?;
        let one = pending.flags.contains(CommandFlags::REQ_ONE);
        if rows > MAX_EXTENTS || one && rows != 1 {
            return Err(Error::violation(format!(
                "A block status has {rows} extents; it may have {}",
                if one { 1 } else { MAX_EXTENTS }
            )));
        }
        let at = pending.range.start;
        let known = self.info.contexts.iter().find(|known| known.id == context);
        let width = known.map_or(StatusWidth::Bits32, |known| known.width);
        let cookie = chunk.cookie;
        self.state = State::Extents(Extents { cookie, context, width, left: rows, at, then });
        Ok(())
    }

    /// Takes one extent.
    fn extent<'a>(
        &mut self,
        mut extents: Extents,
        input: &mut &'a [u8],
    ) -> Result<Option<TransmissionEvent<'a>>> {
        if extents.left == 0 {
            self.state = extents.then.state(extents.cookie);
            return Ok(None);
        }
        let is_extended = self.terms.replies == Replies::Extended;
        if !self.gather.fill(input, if is_extended { 16 } else { 8 }) {
            return Ok(Some(TransmissionEvent::NeedInput));
        }
        let (len, flags) = decode_extent(self.gather.as_slice(), is_extended);
        self.gather.clear();
        let pending = self.in_flight.find(extents.cookie)?;
        judge_extent(&extents, pending, len, flags)?;
        // Past the end of the export there is nothing to know.
        let room = self.terms.size_bytes.saturating_sub(extents.at);
        let range = ByteRange { start: extents.at, len: len.min(room) };
        extents.left = extents.left.saturating_sub(1);
        extents.at = extents.at.saturating_add(len);
        self.state = State::Extents(extents);
        let (cookie, context) = (extents.cookie, extents.context);
        Ok(Some(TransmissionEvent::Extent { cookie, context, range, flags }))
    }

    /// Says how a request went, once all is there.
    fn finish<'a>(&mut self, cookie: Cookie) -> Result<TransmissionEvent<'a>> {
        let pending = self.in_flight.remove(cookie)?;
        let is_read = pending.command == Command::Read;
        let result = match pending.failure {
            Some(failure) => Err(failure),
            None if is_read && !pending.coverage.is_all_of(pending.range) => {
                return Err(Error::violation("A read is said to be done, but parts are missing"));
            }
            None if !pending.owed.is_empty() => {
                return Err(Error::violation(
                    "A block status is said to be done, but a context is missing",
                ));
            }
            None => {
                if pending.command == Command::Resize {
                    self.set_size_bytes(pending.range.start);
                }
                Ok(())
            }
        };
        Ok(TransmissionEvent::Done { cookie, result })
    }
}

impl Then {
    const fn after(chunk: &ChunkHeader) -> Self {
        if chunk.flags.contains(ChunkFlags::DONE) { Self::Finish } else { Self::Header }
    }

    const fn state(self, cookie: Cookie) -> State {
        match self {
            Self::Finish => State::Finish(cookie),
            Self::Header => State::Header,
        }
    }
}

impl Pending {
    /// Keeps the first error.
    fn fail(&mut self, failure: Failure) {
        self.failure.get_or_insert_with(|| Box::new(failure));
    }

    /// Notes content of a read.
    fn take_content(&mut self, range: ByteRange) -> Result<()> {
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
    fn take_context(&mut self, context: ContextId) -> Result<()> {
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

/// How much of a chunk is looked at as a whole.
fn front_bytes(chunk: &ChunkHeader, replies: Replies) -> usize {
    match chunk.kind {
        ChunkType::OFFSET_DATA => 8,
        ChunkType::OFFSET_HOLE => 12,
        ChunkType::BLOCK_STATUS | ChunkType::BLOCK_STATUS_EXT => {
            if replies == Replies::Extended {
                8
            } else {
                4
            }
        }
        _ => usize::try_from(chunk.len).unwrap_or(usize::MAX),
    }
}

/// Says whether a chunk of that kind and length may answer the request.
fn judge_chunk(chunk: &ChunkHeader, pending: &Pending, replies: Replies) -> Result<()> {
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
fn decode_failure(kind: ChunkType, mut fields: Fields<'_>, range: ByteRange) -> Result<Failure> {
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

fn decode_extent(row: &[u8], is_extended: bool) -> (u64, u64) {
    let mut fields = Fields(row);
    let mut word = || {
        let word = if is_extended { fields.u64() } else { fields.u32().map(u64::from) };
        word.unwrap_or(0)
    };
    (word(), word())
}

/// Holds an extent against the rules of a block status.
fn judge_extent(extents: &Extents, pending: &Pending, len: u64, flags: u64) -> Result<()> {
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
