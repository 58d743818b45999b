//! Option haggling (C.2): a machine that reads options and writes answers.
//!
//! * Always: takes exactly the bytes of one option, so that nothing of what a client sends early
//!   stays here; one answer per option; the data of an option that is not wanted is drained.
//! * Always bounded: [`MAX_OPTIONS`], [`MAX_OPTION_BYTES`] of data that is kept, and
//!   [`MAX_HANDSHAKE_BYTES`] of data in all (CVE-2017-15119).
//! * At `STARTTLS` everything that was negotiated is forgotten, and the plaintext that came with it
//!   is thrown away (CVE-2021-3716).

use smallvec::SmallVec;

use super::answers::Answers;
use super::export::{Export, ListedExport, Purpose, Question, Refusal};
use super::options::{ContextRequest, InfoRequest};
use super::transmission::Transmission;
use crate::context::Context;
use crate::gather::{Gather, take_of};
use crate::wire::ReplyCode;
use crate::wire::{ClientFlags, Greeting, HandshakeFlags, InfoType, OptionCode, OptionHeader};
use crate::{Error, ExportName, Replies, Result};

/// Most options of one handshake.
pub const MAX_OPTIONS: u32 = 1024;
/// Most data of an option that is looked at, in bytes; longer data is drained.
pub const MAX_OPTION_BYTES: u32 = 64 << 10;
/// Most data of all options of one handshake together, in bytes.
pub const MAX_HANDSHAKE_BYTES: u64 = 32 << 20;

/// Whether a connection may or must turn to TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMode {
    /// It may; the driver may hide exports from those that have not.
    Allowed,
    /// It cannot.
    Off,
    /// It must: nothing else is answered before.
    Required,
}

/// What a driver is to do next.
#[derive(Debug)]
pub enum Event {
    /// The client is done. Send the output and close.
    Aborted,
    /// Say what there is: [`Handshake::answer_export`].
    FindExport(Question),
    /// Say what there is: [`Handshake::answer_list`].
    ListExports,
    /// Send the output, read more, and come again.
    NeedInput,
    /// Send the output, throw away what was received, do the TLS handshake as a server, and call
    /// [`Handshake::tls_established`]. Close the connection if it fails.
    StartTls,
    /// Send the output; what is left of the input, and all that follows, is for this.
    Transmission(Box<Transmission>),
}

/// The server's side of the handshake.
///
/// ```
/// use lacuna_nbd::server::{Event, Export, Handshake, TlsMode};
/// let mut handshake = Handshake::new(TlsMode::Off);
/// assert_eq!(&handshake.take_output()[..8], b"NBDMAGIC");
///
/// // What a client sends: its flags, then EXPORT_NAME with the name "disk".
/// let mut input: &[u8] = b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x04disk";
/// let Event::FindExport(question) = handshake.advance(&mut input)? else { panic!() };
/// assert_eq!(question.name.as_str(), "disk");
/// handshake.answer_export(Ok(Export::new(1 << 20)));
/// let Event::Transmission(transmission) = handshake.advance(&mut input)? else { panic!() };
/// assert_eq!(handshake.take_output(), [0, 0, 0, 0, 0, 16, 0, 0, 0, 1]);
/// assert_eq!(transmission.size_bytes(), 1 << 20);
/// # Ok::<_, lacuna_nbd::Error>(())
/// ```
#[derive(Debug)]
pub struct Handshake {
    pub(super) tls: TlsMode,
    pub(super) is_tls: bool,
    pub(super) client: ClientFlags,
    pub(super) replies: Replies,
    /// The contexts chosen last, and for which name; replaced as a whole.
    pub(super) selection: Option<Selection>,
    pub(super) state: State,
    pub(super) gather: Gather,
    pub(super) output: Vec<u8>,
    pub(super) options: u32,
    pub(super) option_bytes: u64,
    pub(super) is_shutting_down: bool,
}

#[derive(Debug)]
pub(super) struct Selection {
    pub(super) name: ExportName,
    pub(super) contexts: SmallVec<[Context; 4]>,
}

#[derive(Debug)]
pub(super) enum State {
    ClientFlags,
    Header,
    Data(OptionHeader),
    Drain {
        option: OptionCode,
        remaining: u64,
        reply: ReplyCode,
        message: String,
    },
    /// A question is open.
    Asked(Asked),
    Tls,
    Ready(Box<Transmission>),
    Aborted,
    Over(Error),
}

#[derive(Clone, Debug)]
pub(super) enum Asked {
    List,
    ExportName(ExportName),
    Info(OptionCode, InfoRequest),
    Contexts(OptionCode, ContextRequest),
}

impl Handshake {
    /// Starts a handshake: the greeting is in the output.
    #[must_use]
    pub fn new(tls: TlsMode) -> Self {
        let flags = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
        Self {
            tls,
            is_tls: false,
            client: ClientFlags::empty(),
            replies: Replies::Simple,
            selection: None,
            state: State::ClientFlags,
            gather: Gather::default(),
            output: Greeting { flags }.encode().to_vec(),
            options: 0,
            option_bytes: 0,
            is_shutting_down: false,
        }
    }

    /// Takes what it can off the front of `input` and says what to do next.
    ///
    /// While a question is open it takes nothing and asks again.
    ///
    /// # Errors
    /// `Violation` where the client broke the protocol or a limit, `Refused` where it must be told
    /// no and there is no way to. Send the output and close the connection; the same error comes
    /// again.
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

    /// Returns what is to be sent to the client, and forgets it.
    #[must_use]
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Says whether the connection is under TLS.
    #[must_use]
    pub const fn is_tls(&self) -> bool {
        self.is_tls
    }

    /// From now on, answers every option but `ABORT` that the server is about to end.
    pub const fn shut_down(&mut self) {
        self.is_shutting_down = true;
    }

    /// Answers [`Event::ListExports`].
    ///
    /// # Panics
    /// If that was not asked.
    pub fn answer_list(&mut self, exports: &[ListedExport]) {
        assert!(matches!(self.state, State::Asked(Asked::List)), "no list was asked for");
        let mut answers = self.answers(OptionCode::LIST);
        for export in exports {
            answers.export(export);
        }
        answers.ack();
        self.state = State::Header;
    }

    /// Answers [`Event::FindExport`].
    ///
    /// # Panics
    /// If that was not asked, or the export's size is 2⁶³ or more.
    pub fn answer_export(&mut self, answer: Result<Export, Refusal>) {
        let State::Asked(asked) = std::mem::replace(&mut self.state, State::Header) else {
            panic!("no export was asked for");
        };
        if let Ok(export) = &answer {
            assert!(i64::try_from(export.size_bytes).is_ok(), "an export is smaller than 2^63");
        }
        match asked {
            Asked::List => panic!("a list was asked for"),
            Asked::ExportName(name) => self.choose_unanswered(name, answer),
            Asked::Info(option, request) => self.describe(option, &request, answer),
            Asked::Contexts(option, request) => self.find_contexts(option, request, answer),
        }
    }

    /// Goes on under TLS: all that was negotiated before is forgotten.
    ///
    /// # Panics
    /// If [`Event::StartTls`] was not the last event.
    pub fn tls_established(&mut self) {
        assert!(matches!(self.state, State::Tls), "TLS was not asked for");
        self.is_tls = true;
        self.replies = Replies::Simple;
        self.selection = None;
        self.gather.clear();
        self.state = State::Header;
    }

    fn step(&mut self, input: &mut &[u8]) -> Result<Option<Event>> {
        match &mut self.state {
            State::ClientFlags => self.client_flags(input),
            State::Header => self.header(input),
            State::Data(header) => {
                let header = *header;
                let len = usize::try_from(header.len).unwrap_or(usize::MAX);
                if !self.gather.fill(input, len) {
                    return Ok(Some(Event::NeedInput));
                }
                let data = self.gather.finish();
                self.option(header.option, &data)
            }
            State::Drain { option, remaining, reply, message } => {
                take_of(input, remaining);
                if *remaining > 0 {
                    return Ok(Some(Event::NeedInput));
                }
                let (option, reply, message) = (*option, *reply, std::mem::take(message));
                self.finish_drain(option, reply, &message);
                Ok(None)
            }
            State::Asked(asked) => Ok(Some(asked.clone().event(self.is_tls))),
            State::Tls => {
                // Whatever came with the option was sent in plaintext, maybe by somebody else.
                *input = &[];
                Ok(Some(Event::StartTls))
            }
            State::Aborted => Ok(Some(Event::Aborted)),
            State::Over(error) => Err(error.clone()),
            State::Ready(_) => {
                let over = State::Over(Error::invalid("The handshake is over"));
                let State::Ready(ready) = std::mem::replace(&mut self.state, over) else {
                    return Ok(None);
                };
                Ok(Some(Event::Transmission(ready)))
            }
        }
    }

    pub(super) fn answers(&mut self, option: OptionCode) -> Answers<'_> {
        Answers { option, output: &mut self.output }
    }
}

impl Asked {
    fn event(self, is_tls: bool) -> Event {
        let (name, purpose, wants_init_state) = match self {
            Self::List => return Event::ListExports,
            Self::ExportName(name) => (name, Purpose::Use, false),
            Self::Contexts(_, request) => (request.name, Purpose::Contexts, false),
            Self::Info(option, request) => {
                let wants = request.wants(InfoType::INIT_STATE);
                let is_use = option == OptionCode::GO;
                let purpose = if is_use { Purpose::Use } else { Purpose::Describe };
                (request.name, purpose, wants)
            }
        };
        Event::FindExport(Question { name, purpose, is_tls, wants_init_state })
    }
}
