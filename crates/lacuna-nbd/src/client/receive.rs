//! Replies of a server, held against the requests they answer (C.5, C.6).
//!
//! * Always: content lies in the request's range, comes once, and is all there before a read
//!   counts as successful; extents are of a context that was asked for, in a row, and keep the
//!   rules of a block status.
//! * Never: a length of the server decides how much memory is taken. Data is handed on as it comes,
//!   extents one by one.

use super::check::{decode_extent, decode_failure, judge_chunk, judge_extent};
use super::in_flight::Failure;
use super::transmission::Transmission;
use crate::context::StatusWidth;
use crate::gather::{take, take_of};
use crate::wire::{
    ChunkFlags, ChunkHeader, ChunkType, CommandFlags, ErrorCode, Fields, MAGIC_BYTES, ReplyHeader,
};
use crate::{ByteRange, Command, ContextId, Cookie, Error, Replies, Result};

/// Most extents of a chunk, which the specification recommends.
const MAX_EXTENTS: u32 = 1 << 20;
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
    pub(super) width: StatusWidth,
    /// How many are left.
    left: u32,
    /// Where the next one starts.
    pub(super) at: u64,
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
                // Where it lies, if it lies in one piece.
                if self.gather.as_slice().is_empty() && input.len() >= len {
                    return self.front(&chunk, take(input, len));
                }
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
            pending.fail(Failure { code: code.known(), message: String::new(), offset: None })?;
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
                pending.fail(failure)?;
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
