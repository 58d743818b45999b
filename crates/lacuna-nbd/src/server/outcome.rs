//! What a driver's answer about an export turns into.

use smallvec::SmallVec;

use super::answers::Answers;
use super::contexts;
use super::export::{Export, Refusal};
use super::handshake::{Handshake, Selection, State};
use super::options::{ContextRequest, InfoRequest};
use super::transmission::{Session, Transmission};
use crate::context::{Context, StatusWidth};
use crate::judge::Terms;
use crate::wire::{
    ClientFlags, InfoType, NO_ZEROES_BYTES, OptionCode, ReplyCode, TransmissionFlags,
};
use crate::{Error, ExportName, Replies};

impl Handshake {
    /// Finishes `EXPORT_NAME`, which cannot be answered with an error.
    pub(super) fn choose_unanswered(&mut self, name: ExportName, answer: Result<Export, Refusal>) {
        let export = match answer {
            Ok(export) if export.block_sizes.minimum() > 1 => {
                self.state = State::Over(Error::refused(format!(
                    "Export {name} has blocks of {} bytes, and {} cannot say so",
                    export.block_sizes.minimum(),
                    OptionCode::EXPORT_NAME
                )));
                return;
            }
            Ok(export) => export,
            Err(refusal) => {
                self.state = State::Over(Error::refused(refusal.reply(&name).1));
                return;
            }
        };
        let contexts = self.selected(&name, &export);
        let flags = self.flags(&export, !contexts.is_empty());
        self.output.extend_from_slice(&export.size_bytes.to_be_bytes());
        self.output.extend_from_slice(&flags.bits().to_be_bytes());
        if !self.client.contains(ClientFlags::NO_ZEROES) {
            self.output.extend_from_slice(&[0; NO_ZEROES_BYTES]);
        }
        self.begin(name, &export, flags, contexts);
    }

    /// Finishes `INFO` and `GO`.
    pub(super) fn describe(
        &mut self,
        option: OptionCode,
        request: &InfoRequest,
        answer: Result<Export, Refusal>,
    ) {
        let export = match answer {
            Ok(export) => export,
            Err(refusal) => {
                let (kind, message) = refusal.reply(&request.name);
                self.answers(option).error(kind, &message);
                return;
            }
        };
        if export.block_sizes.minimum() > 1 && !request.wants(InfoType::BLOCK_SIZE) {
            let mut answers = self.answers(option);
            answers.block_sizes(&export);
            let message = "This export has a minimum block size: ask for NBD_INFO_BLOCK_SIZE";
            answers.error(ReplyCode::ERR_BLOCK_SIZE_REQD, message);
            return;
        }
        let contexts = self.selected(&request.name, &export);
        let flags = self.flags(&export, !contexts.is_empty() || option == OptionCode::INFO);
        let mut answers = self.answers(option);
        answers.infos(request, &export, flags);
        answers.ack();
        if option == OptionCode::GO {
            self.begin(request.name.clone(), &export, flags, contexts);
        }
    }

    /// Finishes the options about meta contexts.
    pub(super) fn find_contexts(
        &mut self,
        option: OptionCode,
        request: ContextRequest,
        answer: Result<Export, Refusal>,
    ) {
        let export = match answer {
            Ok(export) => export,
            Err(refusal) => {
                let (kind, message) = refusal.reply(&request.name);
                self.answers(option).error(kind, &message);
                return;
            }
        };
        let width = match self.replies {
            Replies::Extended => StatusWidth::Bits64,
            Replies::Simple | Replies::Structured => StatusWidth::Bits32,
        };
        let mut answers = Answers { option, output: &mut self.output };
        if option == OptionCode::LIST_META_CONTEXT {
            let queries = (request.count > 0).then_some(&request.queries[..]);
            for context in contexts::listed(&export.contexts, queries, width) {
                answers.context(context, 0);
            }
        } else {
            let chosen = contexts::chosen(&export.contexts, &request.queries, width).cloned();
            let contexts: SmallVec<[Context; 4]> = chosen.collect();
            for context in &contexts {
                answers.context(context, context.id.0);
            }
            self.selection = Some(Selection { name: request.name, contexts });
        }
        Answers { option, output: &mut self.output }.ack();
    }

    /// Returns the contexts that were chosen for this export and are still there.
    fn selected(&self, name: &ExportName, export: &Export) -> SmallVec<[Context; 4]> {
        let selection = self.selection.as_ref().filter(|selection| selection.name == *name);
        let contexts = selection.map(|selection| &selection.contexts[..]).unwrap_or_default();
        contexts.iter().filter(|context| export.contexts.contains(context)).cloned().collect()
    }

    /// Returns what the client is told, which depends on what was negotiated.
    fn flags(&self, export: &Export, has_contexts: bool) -> TransmissionFlags {
        type Flags = TransmissionFlags;
        let mut flags = export.flags | Flags::HAS_FLAGS;
        flags.set(Flags::SEND_DF, self.replies != Replies::Simple);
        let is_extended = self.replies == Replies::Extended;
        flags.set(Flags::BLOCK_STATUS_PAYLOAD, is_extended && has_contexts);
        if flags.contains(Flags::READ_ONLY) {
            flags.remove(Flags::SEND_TRIM | Flags::SEND_WRITE_ZEROES | Flags::SEND_RESIZE);
        }
        if !flags.contains(Flags::SEND_WRITE_ZEROES) {
            flags.remove(Flags::SEND_FAST_ZERO);
        }
        flags
    }

    fn begin(
        &mut self,
        name: ExportName,
        export: &Export,
        flags: TransmissionFlags,
        contexts: SmallVec<[Context; 4]>,
    ) {
        let terms = Terms {
            replies: self.replies,
            flags,
            size_bytes: export.size_bytes,
            block_sizes: export.block_sizes,
            contexts: u32::try_from(contexts.len()).unwrap_or(u32::MAX),
        };
        let session = Session { name, terms, contexts };
        self.state = State::Ready(Box::new(Transmission::new(session)));
    }
}
