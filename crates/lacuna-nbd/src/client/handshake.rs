//! The client's handshake: asks for one thing after the other, and does without what is refused.
//!
//! * Always: one option at a time; an answer belongs to the option that was asked.
//! * Always bounded: an answer of [`MAX_REPLY_BYTES`], and [`MAX_ANSWERS_BYTES`] of all of them.
//! * Never: goes on in plaintext where TLS is required (CVE-2019-14842), or believes what came in
//!   plaintext after the server agreed to TLS.

use super::export::{DescribedExport, ExportInfo, Facts, ListedExport};
use super::transmission::Transmission;
use super::wish::{Goal, Headers, TlsWish, Wish};
use crate::context::Context;
use crate::gather::Gather;
use crate::wire::{
    ClientFlags, Fields, GREETING_BYTES, Greeting, HandshakeFlags, NO_ZEROES_BYTES,
    OLDSTYLE_REST_BYTES, OPTION_REPLY_BYTES, OldstyleExport, Opening, OptionCode, OptionReply,
};
use crate::{Error, Replies, Result};

/// Longest answer in bytes: a name, a text, and what is around them.
pub(super) const MAX_REPLY_BYTES: u32 = 16 << 10;
/// Most bytes of answers in one handshake.
pub(super) const MAX_ANSWERS_BYTES: u64 = 32 << 20;
/// Size, flags.
const EXPORT_NAME_BYTES: usize = 10;

/// What a driver is to do next.
#[derive(Debug)]
pub enum Event {
    /// The names of the contexts there are. Send the output and close.
    Contexts(Vec<String>),
    /// What the export is like. Send the output and close.
    Described(ExportInfo),
    /// What all exports are like. Send the output and close.
    DescribedAll(Vec<DescribedExport>),
    /// The exports there are. Send the output and close.
    Exports(Vec<ListedExport>),
    /// Send the output, read more, and come again.
    NeedInput,
    /// Throw away what was received, do the TLS handshake as a client, and call
    /// [`Handshake::tls_established`]. Close the connection if it fails.
    StartTls,
    /// What is left of the input, and all that follows, is for this.
    Transmission(Box<Transmission>),
}

/// The client's side of the handshake.
///
/// ```
/// use lacuna_nbd::ExportName;
/// use lacuna_nbd::client::{Event, Handshake, Headers, Wish};
/// let wish = Wish { headers: Headers::Simple, ..Wish::to_use(ExportName::default()) };
/// let mut handshake = Handshake::new(wish);
///
/// let mut input: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";
/// assert!(matches!(handshake.advance(&mut input)?, Event::NeedInput));
/// let asked = handshake.take_output();
/// assert!(asked.starts_with(b"\0\0\0\x03IHAVEOPT\0\0\0\x07"), "flags, then GO");
/// # Ok::<_, lacuna_nbd::Error>(())
/// ```
#[derive(Debug)]
pub struct Handshake {
    pub(super) wish: Wish,
    pub(super) is_tls: bool,
    pub(super) replies: Replies,
    pub(super) has_no_zeroes: bool,
    pub(super) facts: Facts,
    pub(super) contexts: Vec<Context>,
    pub(super) names: Vec<String>,
    pub(super) exports: Vec<ListedExport>,
    /// Those of them that were asked about.
    pub(super) described: Vec<DescribedExport>,
    pub(super) state: State,
    pub(super) output: Vec<u8>,
    gather: Gather,
    answers_bytes: u64,
}

#[derive(Debug)]
pub(super) enum State {
    Greeting,
    /// Waits for an answer to this option.
    Asked(OptionCode),
    /// The answer has data.
    Data(OptionReply),
    /// Waits for what an oldstyle server says of its export, whose size begins so.
    Oldstyle([u8; 2]),
    /// Waits for the answer to `EXPORT_NAME`, which has no header.
    Unheaded,
    Tls,
    Done(Event),
    Over(Error),
}

impl Handshake {
    /// Starts a handshake. The server speaks first.
    #[must_use]
    pub fn new(wish: Wish) -> Self {
        Self {
            wish,
            is_tls: false,
            replies: Replies::Simple,
            has_no_zeroes: false,
            facts: Facts::default(),
            contexts: Vec::new(),
            names: Vec::new(),
            exports: Vec::new(),
            described: Vec::new(),
            state: State::Greeting,
            output: Vec::new(),
            gather: Gather::new(),
            answers_bytes: 0,
        }
    }

    /// Takes what it can off the front of `input` and says what to do next.
    ///
    /// # Errors
    /// `Violation` where the server broke the protocol, `Refused` where it said no, `Unsupported`
    /// where it cannot do what is needed. Send the output and close the connection; the same error
    /// comes again.
    pub fn advance(&mut self, input: &mut &[u8]) -> Result<Event> {
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

    /// Returns what is to be sent to the server, and forgets it.
    #[must_use]
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Goes on under TLS.
    ///
    /// # Panics
    /// If [`Event::StartTls`] was not the last event.
    pub fn tls_established(&mut self) {
        assert!(matches!(self.state, State::Tls), "TLS was not agreed on");
        self.is_tls = true;
        self.gather.clear();
        self.ask_headers();
    }

    fn step(&mut self, input: &mut &[u8]) -> Result<Option<Event>> {
        match &self.state {
            State::Greeting => {
                if !self.gather.fill(input, GREETING_BYTES) {
                    return Ok(Some(Event::NeedInput));
                }
                match Greeting::decode(self.gather.array())? {
                    Opening::Newstyle(greeting) => self.greeted(greeting)?,
                    Opening::Oldstyle { size_front } => self.greeted_by_oldstyle(size_front)?,
                }
            }
            State::Oldstyle(size_front) => {
                let size_front = *size_front;
                if !self.gather.fill(input, OLDSTYLE_REST_BYTES) {
                    return Ok(Some(Event::NeedInput));
                }
                let export = OldstyleExport::decode(size_front, self.gather.array());
                self.facts.export(export.size_bytes, export.flags)?;
                self.begin()?;
            }
            State::Asked(option) => {
                let option = *option;
                if !self.gather.fill(input, OPTION_REPLY_BYTES) {
                    return Ok(Some(Event::NeedInput));
                }
                let reply = OptionReply::decode(self.gather.array())?;
                self.count(option, reply)?;
                self.state = State::Data(reply);
            }
            State::Data(reply) => {
                let reply = *reply;
                let len = usize::try_from(reply.len).unwrap_or(usize::MAX);
                if !self.gather.fill(input, len) {
                    return Ok(Some(Event::NeedInput));
                }
                let data = self.gather.finish();
                self.state = State::Asked(reply.option);
                self.answered(reply.option, reply.kind, &data)?;
            }
            State::Unheaded => {
                let zeroes = if self.has_no_zeroes { 0 } else { NO_ZEROES_BYTES };
                if !self.gather.fill(input, EXPORT_NAME_BYTES.saturating_add(zeroes)) {
                    return Ok(Some(Event::NeedInput));
                }
                let data = self.gather.finish();
                self.chosen(&data)?;
            }
            State::Tls => {
                *input = &[];
                return Ok(Some(Event::StartTls));
            }
            State::Over(error) => return Err(error.clone()),
            State::Done(_) => {
                let over = State::Over(Error::invalid("The handshake is over"));
                let State::Done(event) = std::mem::replace(&mut self.state, over) else {
                    return Ok(None);
                };
                return Ok(Some(event));
            }
        }
        Ok(None)
    }

    /// Answers to the greeting, and asks for the first thing.
    fn greeted(&mut self, greeting: Greeting) -> Result<()> {
        let is_fixed = greeting.flags.contains(HandshakeFlags::FIXED_NEWSTYLE);
        self.has_no_zeroes = greeting.flags.contains(HandshakeFlags::NO_ZEROES);
        let mut flags = ClientFlags::empty();
        flags.set(ClientFlags::FIXED_NEWSTYLE, is_fixed);
        flags.set(ClientFlags::NO_ZEROES, self.has_no_zeroes);
        self.output.extend_from_slice(&flags.bits().to_be_bytes());
        if is_fixed {
            if self.wish.tls == TlsWish::Never {
                self.ask_headers();
            } else {
                self.ask(OptionCode::STARTTLS, &[]);
            }
            return Ok(());
        }
        if self.wish.tls == TlsWish::Required || self.wish.goal != Goal::Use {
            return Err(Error::unsupported(
                "The server knows nothing but names of exports (it is not fixed newstyle): no TLS, \
                 no lists, no descriptions",
            ));
        }
        self.wish.headers = Headers::Simple;
        self.ask_by_name();
        Ok(())
    }

    /// Takes a server that has one disk and no options; what needs an option cannot be had.
    fn greeted_by_oldstyle(&mut self, size_front: [u8; 2]) -> Result<()> {
        let what = match (self.wish.tls, &self.wish.goal, self.wish.export.as_str()) {
            (TlsWish::Required, ..) => "TLS",
            (_, Goal::Use, "") => {
                self.wish.headers = Headers::Simple;
                self.state = State::Oldstyle(size_front);
                return Ok(());
            }
            (_, Goal::Use, _) => "names of exports: its only disk has an empty one",
            _ => "lists, no descriptions",
        };
        Err(Error::unsupported(format!(
            "The server speaks the oldstyle protocol, which has no {what}; a newstyle server is \
             needed"
        )))
    }

    fn count(&mut self, option: OptionCode, reply: OptionReply) -> Result<()> {
        if reply.option != option {
            return Err(Error::violation(format!(
                "The server answers {}, but {option} was asked",
                reply.option
            )));
        }
        let bytes = u64::from(reply.len).saturating_add(OPTION_REPLY_BYTES as u64);
        self.answers_bytes = self.answers_bytes.saturating_add(bytes);
        if reply.len > MAX_REPLY_BYTES || self.answers_bytes > MAX_ANSWERS_BYTES {
            return Err(Error::violation(format!(
                "The server answers {option} with {} bytes; at most {MAX_REPLY_BYTES} each and \
                 {MAX_ANSWERS_BYTES} in all are taken",
                reply.len
            )));
        }
        Ok(())
    }

    /// Takes the answer to `EXPORT_NAME`: u64 size, u16 flags, zeros that nobody looks at.
    fn chosen(&mut self, data: &[u8]) -> Result<()> {
        let mut fields = Fields(data);
        if let Some((size_bytes, flags)) = fields.u64().zip(fields.u16()) {
            self.facts.export(size_bytes, flags)?;
        }
        self.begin()
    }

    /// Enters the transmission phase.
    pub(super) fn begin(&mut self) -> Result<()> {
        let transmission = Transmission::new(self.info()?);
        self.state = State::Done(Event::Transmission(Box::new(transmission)));
        Ok(())
    }

    /// Returns what is known of the export.
    pub(super) fn info(&mut self) -> Result<ExportInfo> {
        let contexts = std::mem::take(&mut self.contexts);
        std::mem::take(&mut self.facts).finish(self.replies, contexts)
    }
}
