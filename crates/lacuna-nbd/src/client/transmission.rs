//! Requests of a client: judged before they are sent, remembered until they are answered.

use smallvec::SmallVec;

use super::export::ExportInfo;
use super::in_flight::{InFlight, Pending};
use super::receive::State;
use crate::gather::Gather;
use crate::judge::{self, Terms};
use crate::wire::{CommandCode, CommandFlags, RequestForm, RequestHeader, TransmissionFlags};
use crate::{ByteRange, Command, ContextId, Cookie, Error, HeaderBytes, Result};

/// A request, as the caller means it.
///
/// ```
/// use lacuna_nbd::client::{Ask, Command};
/// use lacuna_nbd::wire::CommandFlags;
/// use lacuna_nbd::ByteRange;
/// let ask = Ask::new(Command::WriteZeroes, ByteRange { start: 0, len: 1 << 20 })
///     .with(CommandFlags::FUA);
/// # let _ = ask;
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// What.
    pub command: Command,
    /// How; `PAYLOAD_LEN` is set where it belongs.
    pub flags: CommandFlags,
    /// Where. A flush has none; the start is the new size for a resize.
    pub range: ByteRange,
    /// For a block status: the contexts to ask about, if not all that were chosen.
    pub contexts: Option<&'a [ContextId]>,
}

impl Ask<'_> {
    /// Asks without flags.
    #[must_use]
    pub const fn new(command: Command, range: ByteRange) -> Self {
        Self { command, flags: CommandFlags::empty(), range, contexts: None }
    }

    /// Adds flags.
    #[must_use]
    pub fn with(self, flags: CommandFlags) -> Self {
        Self { flags: self.flags | flags, ..self }
    }
}

/// The client's side of the transmission phase.
///
/// Requests are encoded by [`request`](Self::request) and sent by the caller, any number before the
/// first reply; replies come from `advance` in the server's order.
#[derive(Debug)]
pub struct Transmission {
    pub(super) info: ExportInfo,
    pub(super) terms: Terms,
    pub(super) in_flight: InFlight,
    pub(super) state: State,
    pub(super) gather: Gather,
}

impl Transmission {
    pub(super) fn new(info: ExportInfo) -> Self {
        let terms = Terms {
            replies: info.replies,
            flags: info.flags,
            size_bytes: info.size_bytes,
            block_sizes: info.block_sizes,
            contexts: u32::try_from(info.contexts.len()).unwrap_or(u32::MAX),
        };
        let (in_flight, gather) = (InFlight::default(), Gather::new());
        Self { info, terms, in_flight, state: State::Header, gather }
    }

    /// Returns what the server said of the export. The size is the one to keep to.
    #[must_use]
    pub const fn info(&self) -> &ExportInfo {
        &self.info
    }

    /// Returns how many requests wait for their replies. If the connection ends while it is not 0,
    /// those have failed.
    #[must_use]
    pub const fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Encodes a request and remembers it; its reply will carry the cookie. Send the header, and
    /// for a write the bytes behind it.
    ///
    /// ```
    /// # use lacuna_nbd::client::{Ask, Command, Transmission};
    /// # use lacuna_nbd::{ByteRange, Result};
    /// fn read(transmission: &mut Transmission, socket: &mut Vec<u8>) -> Result<()> {
    ///     let range = ByteRange { start: 4096, len: 512 };
    ///     let (_cookie, header) = transmission.request(&Ask::new(Command::Read, range))?;
    ///     socket.extend_from_slice(&header);
    ///     Ok(())
    /// }
    /// ```
    ///
    /// # Errors
    /// `InvalidRequest` for what the server did not offer, or would have to reject.
    pub fn request(&mut self, ask: &Ask<'_>) -> Result<(Cookie, HeaderBytes)> {
        let form = RequestForm::of(self.terms.replies);
        let payload = self.wanted(ask)?;
        let mut header = RequestHeader {
            flags: ask.flags.difference(CommandFlags::PAYLOAD_LEN),
            command: ask.command.code(),
            cookie: Cookie(0),
            offset: ask.range.start,
            len: ask.range.len,
        };
        judge::judge(&self.terms, &header).map_err(|(_, message)| Error::invalid(message))?;
        if form == RequestForm::Compact && u32::try_from(header.len).is_err() {
            return Err(Error::invalid(format!(
                "Request for {} bytes; without extended headers it is at most 2^32 - 1",
                header.len
            )));
        }
        header.cookie = self.in_flight.insert(self.pending(ask));
        if form == RequestForm::Extended && ask.command == Command::Write {
            header.flags |= CommandFlags::PAYLOAD_LEN;
        }
        if let Some(payload) = &payload {
            header.flags |= CommandFlags::PAYLOAD_LEN;
            header.len = payload.len() as u64;
        }
        let mut bytes = header.encode(form);
        bytes.push(payload.as_deref().unwrap_or_default());
        Ok((header.cookie, bytes))
    }

    /// Encodes the goodbye. Nothing may be asked after it; replies that are due still come.
    #[must_use]
    pub fn disconnect(&self) -> HeaderBytes {
        let header = RequestHeader {
            flags: CommandFlags::empty(),
            command: CommandCode::DISC,
            cookie: Cookie(0),
            offset: 0,
            len: 0,
        };
        header.encode(RequestForm::of(self.terms.replies))
    }

    /// Takes another size, which somebody else gave the export.
    pub fn set_size_bytes(&mut self, size_bytes: u64) {
        self.terms.size_bytes = size_bytes;
        self.info.size_bytes = size_bytes;
    }

    /// Builds the payload of a block status that names contexts: u64 length, n × u32.
    fn wanted(&self, ask: &Ask<'_>) -> Result<Option<SmallVec<[u8; 32]>>> {
        let Some(wanted) = ask.contexts else { return Ok(None) };
        let can_name = self.terms.flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD);
        let is_known = |id: &ContextId| self.info.contexts.iter().any(|context| context.id == *id);
        let is_once = |id: &ContextId| wanted.iter().filter(|other| *other == id).count() == 1;
        if ask.command != Command::BlockStatus || !can_name {
            return Err(Error::invalid("Contexts cannot be named in this request"));
        }
        if wanted.is_empty() || !wanted.iter().all(|id| is_known(id) && is_once(id)) {
            return Err(Error::invalid(
                "A block status names contexts that were chosen, each once",
            ));
        }
        let mut payload = SmallVec::from_slice(&ask.range.len.to_be_bytes());
        payload.extend(wanted.iter().flat_map(|id| id.0.to_be_bytes()));
        Ok(Some(payload))
    }

    fn pending(&self, ask: &Ask<'_>) -> Pending {
        let chosen = || self.info.contexts.iter().map(|context| context.id);
        let owed = match (ask.command, ask.contexts) {
            (Command::BlockStatus, Some(wanted)) => SmallVec::from_slice(wanted),
            (Command::BlockStatus, None) => chosen().collect(),
            _ => SmallVec::new(),
        };
        Pending {
            command: ask.command,
            flags: ask.flags,
            range: ask.range,
            coverage: super::coverage::Coverage::default(),
            has_content: false,
            owed,
            failure: None,
            failures: 0,
        }
    }
}
