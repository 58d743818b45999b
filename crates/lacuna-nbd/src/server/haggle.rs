//! Which option may come now, and what it changes.

use super::handshake::{
    Asked, Event, Handshake, MAX_HANDSHAKE_BYTES, MAX_OPTION_BYTES, MAX_OPTIONS, State, TlsMode,
};
use super::options::{ContextRequest, InfoRequest, wrong_name};
use crate::wire::{
    CLIENT_FLAGS_BYTES, ClientFlags, OPTION_HEADER_BYTES, OptionCode, OptionHeader, ReplyCode,
};
use crate::{Error, ExportName, Replies, Result};

impl Handshake {
    pub(super) fn client_flags(&mut self, input: &mut &[u8]) -> Result<Option<Event>> {
        if !self.gather.fill(input, CLIENT_FLAGS_BYTES) {
            return Ok(Some(Event::NeedInput));
        }
        let word = u32::from_be_bytes(self.gather.array());
        self.client = ClientFlags::from_bits(word).ok_or_else(|| {
            Error::violation(format!("Client flags are {word:#x}; only bits 0 and 1 were offered"))
        })?;
        self.state = State::Header;
        Ok(None)
    }

    pub(super) fn header(&mut self, input: &mut &[u8]) -> Result<Option<Event>> {
        if !self.gather.fill(input, OPTION_HEADER_BYTES) {
            return Ok(Some(Event::NeedInput));
        }
        let header = OptionHeader::decode(self.gather.array())?;
        self.count(header)?;
        self.state = match self.unwanted(header)? {
            Some((reply, message)) => {
                State::Drain { option: header.option, remaining: header.len.into(), reply, message }
            }
            None => State::Data(header),
        };
        Ok(None)
    }

    fn count(&mut self, header: OptionHeader) -> Result<()> {
        self.options = self.options.saturating_add(1);
        self.option_bytes = self.option_bytes.saturating_add(header.len.into());
        if self.options > MAX_OPTIONS {
            return Err(Error::violation(format!(
                "More than {MAX_OPTIONS} options without choosing an export"
            )));
        }
        if self.option_bytes > MAX_HANDSHAKE_BYTES {
            return Err(Error::violation(format!(
                "{} announces {} bytes of data; all options together may have \
                 {MAX_HANDSHAKE_BYTES}",
                header.option, header.len
            )));
        }
        Ok(())
    }

    /// Says how an option is answered whose data does not matter.
    fn unwanted(&self, header: OptionHeader) -> Result<Option<(ReplyCode, String)>> {
        let option = header.option;
        if option == OptionCode::ABORT {
            return Ok(Some((ReplyCode::ACK, String::new())));
        }
        let refused = self.not_now(option);
        if option == OptionCode::EXPORT_NAME {
            return match refused {
                // There is no way to answer this option with an error.
                Some((_, reason)) => Err(Error::refused(reason)),
                None if header.len > MAX_OPTION_BYTES => Err(Error::violation("Name is too long")),
                None => Ok(None),
            };
        }
        if !self.client.contains(ClientFlags::FIXED_NEWSTYLE) {
            return Err(Error::violation(format!(
                "{option} from a client that did not set FIXED_NEWSTYLE"
            )));
        }
        Ok(refused.or_else(|| unwanted_data(header)))
    }

    /// Says why an option is not answered at this point, whatever its data is.
    fn not_now(&self, option: OptionCode) -> Option<(ReplyCode, String)> {
        if self.is_shutting_down {
            return Some((ReplyCode::ERR_SHUTDOWN, "The server is about to end".into()));
        }
        let needs_tls = self.tls == TlsMode::Required && !self.is_tls;
        if needs_tls && option != OptionCode::STARTTLS {
            let message = format!("{option} is answered under TLS only: send NBD_OPT_STARTTLS");
            return Some((ReplyCode::ERR_TLS_REQD, message));
        }
        let refused = match option {
            OptionCode::EXPORT_NAME if self.replies == Replies::Extended => {
                "With extended headers, NBD_OPT_GO chooses the export"
            }
            OptionCode::STARTTLS if self.tls == TlsMode::Off => {
                return Some((ReplyCode::ERR_POLICY, "TLS is not configured".into()));
            }
            OptionCode::STARTTLS if self.is_tls => "TLS is in use",
            OptionCode::STRUCTURED_REPLY if self.replies == Replies::Extended => {
                let message = "Extended headers are in use and have structured replies in them";
                return Some((ReplyCode::ERR_EXT_HEADER_REQD, message.into()));
            }
            OptionCode::STRUCTURED_REPLY if self.replies == Replies::Structured => {
                "Structured replies are in use"
            }
            OptionCode::EXTENDED_HEADERS if self.replies == Replies::Extended => {
                "Extended headers are in use"
            }
            _ => return None,
        };
        Some((ReplyCode::ERR_INVALID, refused.into()))
    }

    pub(super) fn finish_drain(&mut self, option: OptionCode, reply: ReplyCode, message: &str) {
        if option == OptionCode::SET_META_CONTEXT {
            // A selection that fails still replaces the one before.
            self.selection = None;
        }
        let mut answers = self.answers(option);
        if reply == ReplyCode::ACK {
            answers.ack();
            self.state = State::Aborted;
        } else {
            answers.error(reply, message);
            self.state = State::Header;
        }
    }

    pub(super) fn option(&mut self, option: OptionCode, data: &[u8]) -> Result<Option<Event>> {
        match option {
            OptionCode::EXPORT_NAME => {
                let name = ExportName::decode(data);
                let name = name.ok_or_else(|| Error::violation(wrong_name(data)))?;
                self.state = State::Asked(Asked::ExportName(name));
            }
            OptionCode::LIST => self.state = State::Asked(Asked::List),
            OptionCode::STARTTLS => {
                self.answers(option).ack();
                self.state = State::Tls;
            }
            OptionCode::STRUCTURED_REPLY => self.switch(option, Replies::Structured),
            OptionCode::EXTENDED_HEADERS => self.switch(option, Replies::Extended),
            OptionCode::INFO | OptionCode::GO => {
                let request = InfoRequest::decode(data);
                self.ask(option, request.map(|request| Asked::Info(option, request)));
            }
            _ => {
                let request = self.context_request(option, data);
                self.ask(option, request.map(|request| Asked::Contexts(option, request)));
            }
        }
        Ok(None)
    }

    fn switch(&mut self, option: OptionCode, replies: Replies) {
        self.replies = replies;
        self.answers(option).ack();
        self.state = State::Header;
    }

    fn ask(&mut self, option: OptionCode, asked: Result<Asked, String>) {
        self.state = match asked {
            Ok(asked) => State::Asked(asked),
            Err(message) => {
                self.answers(option).error(ReplyCode::ERR_INVALID, &message);
                State::Header
            }
        };
    }

    fn context_request(
        &mut self,
        option: OptionCode,
        data: &[u8],
    ) -> Result<ContextRequest, String> {
        if option == OptionCode::SET_META_CONTEXT {
            self.selection = None;
            if self.replies == Replies::Simple {
                return Err(format!(
                    "{option} needs {} or {} first",
                    OptionCode::STRUCTURED_REPLY,
                    OptionCode::EXTENDED_HEADERS
                ));
            }
        }
        ContextRequest::decode(data)
    }
}

/// Says what is wrong with an option that has more data than it may, or that nobody knows.
fn unwanted_data(header: OptionHeader) -> Option<(ReplyCode, String)> {
    let OptionHeader { option, len } = header;
    match option {
        OptionCode::LIST
        | OptionCode::STARTTLS
        | OptionCode::STRUCTURED_REPLY
        | OptionCode::EXTENDED_HEADERS => (len > 0).then(|| {
            (ReplyCode::ERR_INVALID, format!("{option} has no data, but {len} bytes came with it"))
        }),
        OptionCode::INFO
        | OptionCode::GO
        | OptionCode::LIST_META_CONTEXT
        | OptionCode::SET_META_CONTEXT => (len > MAX_OPTION_BYTES).then(|| {
            let message = format!("{option} has {len} bytes; at most {MAX_OPTION_BYTES} are taken");
            (ReplyCode::ERR_TOO_BIG, message)
        }),
        _ => Some((ReplyCode::ERR_UNSUP, format!("Option {option} is not known here"))),
    }
}
