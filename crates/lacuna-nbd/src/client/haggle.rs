//! What is asked next, and what an answer means.
//!
//! Order: TLS first, since it makes the server forget everything; then the best headers, contexts,
//! and the goal.

use super::export::{listed_context, listed_export};
use super::handshake::{Event, Handshake, State};
use super::wish::{Goal, Headers, TlsWish};
use crate::context::Context;
use crate::text::quoted;
use crate::wire::{InfoType, OptionCode, OptionHeader, ReplyCode};
use crate::{ContextId, Error, ExportName, Replies, Result};

/// What is always asked about an export. Servers ignore what they do not know.
const WANTED: [InfoType; 4] =
    [InfoType::BLOCK_SIZE, InfoType::NAME, InfoType::DESCRIPTION, InfoType::INIT_STATE];

impl Handshake {
    /// Sends an option and waits for its answer.
    pub(super) fn ask(&mut self, option: OptionCode, parts: &[&[u8]]) {
        let len = parts.iter().fold(0_usize, |len, part| len.saturating_add(part.len()));
        let header = OptionHeader { option, len: u32::try_from(len).unwrap_or(u32::MAX) };
        self.output.extend_from_slice(&header.encode());
        for part in parts {
            self.output.extend_from_slice(part);
        }
        self.state = State::Asked(option);
    }

    pub(super) fn ask_headers(&mut self) {
        match self.wish.headers {
            Headers::Extended => self.ask(OptionCode::EXTENDED_HEADERS, &[]),
            Headers::Structured => self.ask(OptionCode::STRUCTURED_REPLY, &[]),
            Headers::Simple => self.ask_contexts(),
        }
    }

    fn ask_contexts(&mut self) {
        let is_about_one = matches!(self.wish.goal, Goal::Describe | Goal::Use);
        if self.wish.contexts.is_empty() || self.replies == Replies::Simple || !is_about_one {
            return self.ask_goal();
        }
        let data = context_data(&self.wish.export, &self.wish.contexts);
        self.ask(OptionCode::SET_META_CONTEXT, &[&data]);
    }

    fn ask_goal(&mut self) {
        match &self.wish.goal {
            Goal::Use => self.ask(OptionCode::GO, &[&info_data(&self.wish.export)]),
            Goal::Describe => self.ask(OptionCode::INFO, &[&info_data(&self.wish.export)]),
            Goal::ListExports | Goal::DescribeAll => self.ask(OptionCode::LIST, &[]),
            Goal::ListContexts(queries) => {
                let data = context_data(&self.wish.export, queries);
                self.ask(OptionCode::LIST_META_CONTEXT, &[&data]);
            }
        }
    }

    /// Falls back to the oldest way, which has no errors.
    pub(super) fn ask_by_name(&mut self) {
        let name = self.wish.export.as_str().to_owned();
        self.ask(OptionCode::EXPORT_NAME, &[name.as_bytes()]);
        self.state = State::Unheaded;
    }

    /// Takes one answer to `option`.
    pub(super) fn answered(
        &mut self,
        option: OptionCode,
        kind: ReplyCode,
        data: &[u8],
    ) -> Result<()> {
        match (option, kind) {
            (_, error) if error.is_error() => self.refused(option, error, data),
            (_, ReplyCode::ACK) if !data.is_empty() => Err(Error::violation(format!(
                "The server acknowledges {option} with {} bytes of data; there should be none",
                data.len()
            ))),
            (_, ReplyCode::ACK) => self.acknowledged(option),
            (OptionCode::LIST, ReplyCode::SERVER) => {
                self.exports.push(listed_export(data)?);
                Ok(())
            }
            (OptionCode::INFO | OptionCode::GO, ReplyCode::INFO) => self.facts.learn(data),
            (OptionCode::SET_META_CONTEXT, ReplyCode::META_CONTEXT) => self.context(data),
            (OptionCode::LIST_META_CONTEXT, ReplyCode::META_CONTEXT) => {
                self.names.push(listed_context(data)?.1);
                Ok(())
            }
            _ => Err(Error::violation(format!("The server answers {option} with {kind}"))),
        }
    }

    fn acknowledged(&mut self, option: OptionCode) -> Result<()> {
        match option {
            OptionCode::STARTTLS => self.state = State::Tls,
            OptionCode::EXTENDED_HEADERS => {
                self.replies = Replies::Extended;
                self.ask_contexts();
            }
            OptionCode::STRUCTURED_REPLY => {
                self.replies = Replies::Structured;
                self.ask_contexts();
            }
            OptionCode::SET_META_CONTEXT => self.ask_goal(),
            OptionCode::GO => return self.begin(),
            _ if self.wish.goal == Goal::DescribeAll => return self.surveyed(option),
            OptionCode::INFO => {
                let info = self.info()?;
                self.leave(Event::Described(info));
            }
            OptionCode::LIST => {
                let exports = std::mem::take(&mut self.exports);
                self.leave(Event::Exports(exports));
            }
            _ => {
                let names = std::mem::take(&mut self.names);
                self.leave(Event::Contexts(names));
            }
        }
        Ok(())
    }

    /// Says goodbye.
    pub(super) fn leave(&mut self, event: Event) {
        self.ask(OptionCode::ABORT, &[]);
        self.state = State::Done(event);
    }

    /// Takes one context that the server chose.
    fn context(&mut self, data: &[u8]) -> Result<()> {
        let (id, name) = listed_context(data)?;
        let id = ContextId(id);
        let is_known = self.contexts.iter().any(|other| other.id == id || other.name == name);
        if !self.wish.contexts.contains(&name) || is_known {
            return Err(Error::violation(format!(
                "The server chooses meta context {} with id {}, which was not asked for or is \
                 there already",
                quoted(name.as_bytes()),
                id.0
            )));
        }
        self.contexts.push(Context::new(name, id));
        Ok(())
    }

    /// Does without what was refused, if that can be done without.
    fn refused(&mut self, option: OptionCode, kind: ReplyCode, data: &[u8]) -> Result<()> {
        let needs_tls = kind == ReplyCode::ERR_TLS_REQD;
        match option {
            OptionCode::STARTTLS if self.wish.tls == TlsWish::IfOffered && !needs_tls => {
                self.ask_headers();
            }
            OptionCode::EXTENDED_HEADERS if !needs_tls => {
                self.ask(OptionCode::STRUCTURED_REPLY, &[]);
            }
            OptionCode::STRUCTURED_REPLY if !needs_tls => self.ask_contexts(),
            OptionCode::SET_META_CONTEXT if !needs_tls => {
                // What was sent before the error does not count.
                self.contexts.clear();
                self.ask_goal();
            }
            OptionCode::GO if kind == ReplyCode::ERR_UNSUP => {
                if self.replies == Replies::Extended {
                    return Err(Error::violation(format!(
                        "The server knows {} but not {option}",
                        OptionCode::EXTENDED_HEADERS
                    )));
                }
                self.facts = super::export::Facts::default();
                self.ask_by_name();
            }
            OptionCode::INFO | OptionCode::LIST_META_CONTEXT
                if self.wish.goal == Goal::DescribeAll && !needs_tls =>
            {
                self.passed_over(option);
            }
            _ => return Err(self.give_up(option, kind, data)),
        }
        Ok(())
    }

    fn give_up(&mut self, option: OptionCode, kind: ReplyCode, data: &[u8]) -> Error {
        self.ask(OptionCode::ABORT, &[]);
        let mut message = match option {
            OptionCode::STARTTLS => "The server does not turn to TLS".to_owned(),
            OptionCode::LIST => "The server does not list its exports".to_owned(),
            _ => format!("The server refuses {option} for export {}", self.wish.export),
        };
        message.push_str(match kind {
            ReplyCode::ERR_UNKNOWN => ": there is no such export",
            ReplyCode::ERR_TLS_REQD => ": it wants TLS (nbds:// or nbds+unix://)",
            ReplyCode::ERR_POLICY => ": it may not",
            ReplyCode::ERR_SHUTDOWN => ": it is about to end",
            ReplyCode::ERR_UNSUP => ": it does not know the option",
            _ => "",
        });
        if !data.is_empty() {
            message.push_str("; it says ");
            message.push_str(&quoted(data));
        }
        if kind == ReplyCode::ERR_UNSUP {
            return Error::unsupported(message);
        }
        Error::refused(message)
    }
}

/// u32 length, name, u16 count, kinds of information.
pub(super) fn info_data(export: &ExportName) -> Vec<u8> {
    let mut data = Vec::new();
    push_counted(&mut data, export.as_str().as_bytes());
    // Four kinds of information.
    data.extend_from_slice(&[0, 4]);
    data.extend(WANTED.iter().flat_map(|kind| kind.0.to_be_bytes()));
    data
}

/// u32 length, name, u32 count, queries.
pub(super) fn context_data(export: &ExportName, queries: &[String]) -> Vec<u8> {
    let mut data = Vec::new();
    push_counted(&mut data, export.as_str().as_bytes());
    let count = u32::try_from(queries.len()).unwrap_or(u32::MAX);
    data.extend_from_slice(&count.to_be_bytes());
    for query in queries {
        push_counted(&mut data, query.as_bytes());
    }
    data
}

fn push_counted(data: &mut Vec<u8>, text: &[u8]) {
    let len = u32::try_from(text.len()).unwrap_or(u32::MAX);
    data.extend_from_slice(&len.to_be_bytes());
    data.extend_from_slice(text);
}
