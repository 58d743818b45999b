//! Cuts what a client sends into requests and payloads (C.4).
//!
//! * Always: a request that reaches the driver has a known command, flags that go with it, a range
//!   within the export, aligned to its minimum block; one that does not is a [`Rejection`], after
//!   its payload was drained.
//! * Never: a payload is copied here, but for the few bytes that name contexts; the heap is asked
//!   for memory for a request.
//! * A client that breaks the protocol, or announces a payload above all limits, is an error.

use smallvec::SmallVec;

use super::replies::Tag;
use crate::context::Context;
use crate::gather::{Gather, take, take_of};
use crate::judge::{self, Terms};
use crate::wire::{
    CommandCode, CommandFlags, ErrorCode, Fields, RequestForm, RequestHeader, TransmissionFlags,
};
use crate::{
    BlockSizes, ByteRange, Command, ContextId, Cookie, Error, ExportName, Replies, Result,
};

/// A request that the export takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What to answer to.
    pub tag: Tag,
    /// What is asked.
    pub command: Command,
    /// How; only flags that the command has.
    pub flags: CommandFlags,
    /// Where: inside the export, and aligned. Empty ranges are answered with success.
    pub range: ByteRange,
}

/// A request that the export does not take. Its payload is gone; send what
/// [`Replies::rejection`] makes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// What to answer to.
    pub tag: Tag,
    /// The error.
    pub error: ErrorCode,
    /// A text for people.
    pub message: String,
}

/// Which contexts a block status is about.
///
/// ```
/// use lacuna_nbd::ContextId;
/// use lacuna_nbd::server::WantedContexts;
/// assert!(WantedContexts::All.wants(ContextId(7)));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WantedContexts {
    /// All that were chosen.
    All,
    /// Some of those.
    Only(SmallVec<[ContextId; 4]>),
}

impl WantedContexts {
    /// Says whether the context is wanted.
    #[must_use]
    pub fn wants(&self, id: ContextId) -> bool {
        match self {
            Self::All => true,
            Self::Only(ids) => ids.contains(&id),
        }
    }
}

/// What arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TransmissionEvent<'a> {
    /// A block status, one chunk for each wanted context.
    BlockStatus(Request, WantedContexts),
    /// The client says goodbye: finish what is in flight, close. Nothing more is taken.
    Disconnect,
    /// Read more and come again; the input is used up.
    NeedInput,
    /// The next bytes of the payload of the last [`Request`] that writes.
    Payload(&'a [u8]),
    /// Answer with an error.
    Rejected(Rejection),
    /// A request without payload.
    Request(Request),
    /// A write; its `range.len` bytes follow. Take them as [`TransmissionEvent::Payload`], or read
    /// them from elsewhere and tell with [`Transmission::payload_taken`].
    Write(Request),
}

/// The server's side of the transmission phase.
///
/// A driver that receives into one buffer and wants payloads in aligned buffers of its own:
///
/// ```
/// use lacuna_nbd::server::{Transmission, TransmissionEvent};
/// use std::io::{self, Read};
///
/// /// Reads the payload of the write that was announced: first what was received already, then
/// /// the rest straight from the socket.
/// fn payload(
///     transmission: &mut Transmission,
///     input: &mut &[u8],
///     socket: &mut impl Read,
/// ) -> io::Result<Vec<u8>> {
///     let mut buffer = vec![0; transmission.payload_remaining() as usize];
///     let have = buffer.len().min(input.len());
///     let (front, rest) = input.split_at(have);
///     buffer[..have].copy_from_slice(front);
///     *input = rest;
///     socket.read_exact(&mut buffer[have..])?;
///     transmission.payload_taken(buffer.len() as u64);
///     Ok(buffer)
/// }
/// ```
#[derive(Debug)]
pub struct Transmission {
    session: Session,
    state: State,
    gather: Gather,
    is_shutting_down: bool,
}

/// What was agreed on.
#[derive(Clone, Debug)]
pub(super) struct Session {
    pub(super) name: ExportName,
    pub(super) terms: Terms,
    pub(super) contexts: SmallVec<[Context; 4]>,
}

#[derive(Clone, Debug)]
enum State {
    Header,
    Payload {
        remaining: u64,
    },
    /// The payload of a block status, which names contexts.
    Contexts {
        header: RequestHeader,
    },
    Drain {
        remaining: u64,
        rejection: Rejection,
    },
    Disconnected,
    Over(Error),
}

impl Transmission {
    pub(super) const fn new(session: Session) -> Self {
        let gather = Gather::new();
        Self { session, state: State::Header, gather, is_shutting_down: false }
    }

    /// Takes what it can off the front of `input` and says what arrived.
    ///
    /// # Errors
    /// `Violation` where the client broke the protocol: close the connection. The same error comes
    /// again.
    pub fn advance<'a>(&mut self, input: &mut &'a [u8]) -> Result<TransmissionEvent<'a>> {
        let event = self.step(input);
        if let Err(error) = &event {
            self.state = State::Over(error.clone());
        }
        event
    }

    /// Returns how many bytes of a payload are still to be taken; 0 outside of one.
    #[must_use]
    pub const fn payload_remaining(&self) -> u64 {
        match self.state {
            State::Payload { remaining } => remaining,
            _ => 0,
        }
    }

    /// Notes that the driver took `len` bytes of the payload itself.
    ///
    /// # Panics
    /// If that is more than there is.
    pub fn payload_taken(&mut self, len: u64) {
        let remaining = self.payload_remaining().checked_sub(len);
        assert!(remaining.is_some(), "more was taken than the payload has");
        self.pay(remaining.unwrap_or(0));
    }

    /// Returns how replies are written on this connection.
    #[must_use]
    pub const fn replies(&self) -> Replies {
        self.session.terms.replies
    }

    /// Returns the name that the client chose.
    #[must_use]
    pub const fn export_name(&self) -> &ExportName {
        &self.session.name
    }

    /// Returns what the client was told may be asked.
    #[must_use]
    pub const fn flags(&self) -> TransmissionFlags {
        self.session.terms.flags
    }

    /// Returns the sizes that requests keep to.
    #[must_use]
    pub const fn block_sizes(&self) -> BlockSizes {
        self.session.terms.block_sizes
    }

    /// Returns the contexts that were chosen, in the order they are best answered.
    #[must_use]
    pub fn contexts(&self) -> &[Context] {
        &self.session.contexts
    }

    /// Returns the size in bytes that ranges are checked against.
    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.session.terms.size_bytes
    }

    /// Takes a new size: after a `Resize` succeeded, or because somebody else changed it.
    ///
    /// The draft of the extension has no word from the server to the client. A client that wants
    /// to use what others added sends a `Resize` to that size, which then has nothing to do.
    ///
    /// # Panics
    /// If the size is 2⁶³ or more.
    pub fn set_size_bytes(&mut self, size_bytes: u64) {
        assert!(i64::try_from(size_bytes).is_ok(), "an export is smaller than 2^63");
        self.session.terms.size_bytes = size_bytes;
    }

    /// From now on, rejects every request: the server is about to end.
    pub const fn shut_down(&mut self) {
        self.is_shutting_down = true;
    }

    fn step<'a>(&mut self, input: &mut &'a [u8]) -> Result<TransmissionEvent<'a>> {
        match &mut self.state {
            State::Header => self.header(input),
            State::Payload { remaining } => {
                if input.is_empty() {
                    return Ok(TransmissionEvent::NeedInput);
                }
                let mut remaining = *remaining;
                let payload = take_of(input, &mut remaining);
                self.pay(remaining);
                Ok(TransmissionEvent::Payload(payload))
            }
            State::Contexts { header } => {
                let header = *header;
                self.wanted_contexts(header, input)
            }
            State::Drain { remaining, rejection } => {
                take_of(input, remaining);
                if *remaining > 0 {
                    return Ok(TransmissionEvent::NeedInput);
                }
                let rejection = rejection.clone();
                self.state = State::Header;
                Ok(TransmissionEvent::Rejected(rejection))
            }
            State::Disconnected => Ok(TransmissionEvent::Disconnect),
            State::Over(error) => Err(error.clone()),
        }
    }

    fn pay(&mut self, remaining: u64) {
        self.state = if remaining == 0 { State::Header } else { State::Payload { remaining } };
    }

    /// Decodes the next header, where it lies if it lies in one piece.
    fn header<'a>(&mut self, input: &mut &'a [u8]) -> Result<TransmissionEvent<'a>> {
        let form = RequestForm::of(self.replies());
        let len = form.header_bytes();
        let header = if self.gather.as_slice().is_empty() && input.len() >= len {
            RequestHeader::decode(form, take(input, len))?
        } else {
            if !self.gather.fill(input, len) {
                return Ok(TransmissionEvent::NeedInput);
            }
            let header = RequestHeader::decode(form, self.gather.as_slice())?;
            self.gather.clear();
            header
        };
        self.request(header, input)
    }

    fn request<'a>(
        &mut self,
        header: RequestHeader,
        input: &mut &'a [u8],
    ) -> Result<TransmissionEvent<'a>> {
        if header.command == CommandCode::DISC {
            self.state = State::Disconnected;
            return Ok(TransmissionEvent::Disconnect);
        }
        let payload_bytes = judge::payload_bytes(&self.session.terms, &header)?;
        let judged = match self.is_shutting_down {
            true => Err((ErrorCode::ESHUTDOWN, "The server is about to end".to_owned())),
            false => judge::judge(&self.session.terms, &header),
        };
        match judged {
            Err((error, message)) => {
                let rejection = Rejection::new(&header, error, message);
                self.state = State::Drain { remaining: payload_bytes, rejection };
                self.step(input)
            }
            Ok(Command::Write) => {
                self.pay(payload_bytes);
                Ok(TransmissionEvent::Write(Request::new(&header, Command::Write)))
            }
            Ok(Command::BlockStatus) if payload_bytes > 0 => {
                self.state = State::Contexts { header };
                self.step(input)
            }
            Ok(command) => Ok(plain(Request::new(&header, command))),
        }
    }

    /// Collects the payload of a block status and reads the contexts it names.
    fn wanted_contexts<'a>(
        &mut self,
        header: RequestHeader,
        input: &mut &'a [u8],
    ) -> Result<TransmissionEvent<'a>> {
        if !self.gather.fill(input, usize::try_from(header.len).unwrap_or(usize::MAX)) {
            return Ok(TransmissionEvent::NeedInput);
        }
        let wanted = decode_wanted(self.gather.as_slice(), &self.session.contexts);
        self.gather.clear();
        self.state = State::Header;
        let judged = wanted.and_then(|(len, ids)| {
            let header = RequestHeader { len, ..header };
            judge::judge_status_range(&self.session.terms, &header)?;
            Ok((header, ids))
        });
        Ok(match judged {
            Ok((header, ids)) => {
                let request = Request::new(&header, Command::BlockStatus);
                TransmissionEvent::BlockStatus(request, WantedContexts::Only(ids))
            }
            Err((error, message)) => {
                TransmissionEvent::Rejected(Rejection::new(&header, error, message))
            }
        })
    }
}

const fn plain<'a>(request: Request) -> TransmissionEvent<'a> {
    match request.command {
        Command::BlockStatus => TransmissionEvent::BlockStatus(request, WantedContexts::All),
        _ => TransmissionEvent::Request(request),
    }
}

/// Decodes u64 length, n × u32 context id.
fn decode_wanted(
    payload: &[u8],
    contexts: &[Context],
) -> Result<(u64, SmallVec<[ContextId; 4]>), judge::Reason> {
    let reason = |message: String| (ErrorCode::EINVAL, message);
    let mut fields = Fields(payload);
    let len = fields.u64().ok_or_else(|| reason("The length is missing".into()))?;
    let mut ids = SmallVec::new();
    while let Some(id) = fields.u32().map(ContextId) {
        if !contexts.iter().any(|context| context.id == id) {
            return Err(reason(format!("Context {} was not chosen", id.0)));
        }
        if ids.contains(&id) {
            return Err(reason(format!("Context {} is named twice", id.0)));
        }
        ids.push(id);
    }
    Ok((len, ids))
}

impl Request {
    fn new(header: &RequestHeader, command: Command) -> Self {
        Self {
            tag: Tag { cookie: header.cookie, offset: header.offset },
            command,
            // How the length was meant is settled by now.
            flags: header.flags.difference(CommandFlags::PAYLOAD_LEN),
            range: ByteRange { start: header.offset, len: header.len },
        }
    }

    /// Returns what the client calls the request.
    #[must_use]
    pub const fn cookie(&self) -> Cookie {
        self.tag.cookie
    }
}

impl Rejection {
    fn new(header: &RequestHeader, error: ErrorCode, message: String) -> Self {
        let tag = Tag { cookie: header.cookie, offset: header.offset };
        Self { tag, error, message }
    }
}
