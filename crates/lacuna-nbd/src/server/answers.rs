//! What is sent back to an option.

use crate::context::Context;
use crate::server::options::InfoRequest;
use crate::server::{Export, ListedExport};
use crate::text::truncated;
use crate::wire::{InfoType, InitState, OptionCode, OptionReply, ReplyCode, TransmissionFlags};

/// Collects answers to one option.
#[derive(Debug)]
pub(super) struct Answers<'a> {
    pub(super) option: OptionCode,
    pub(super) output: &'a mut Vec<u8>,
}

impl Answers<'_> {
    pub(super) fn ack(&mut self) {
        self.reply(ReplyCode::ACK, &[]);
    }

    /// Sends an error with a text for people.
    pub(super) fn error(&mut self, kind: ReplyCode, message: &str) {
        self.reply(kind, &[truncated(message).as_bytes()]);
    }

    pub(super) fn export(&mut self, export: &ListedExport) {
        let name = export.name.as_str().as_bytes();
        let description = truncated(&export.description).as_bytes();
        self.reply(ReplyCode::SERVER, &[&u32_len(name).to_be_bytes(), name, description]);
    }

    pub(super) fn context(&mut self, context: &Context, id: u32) {
        self.reply(ReplyCode::META_CONTEXT, &[&id.to_be_bytes(), context.name.as_bytes()]);
    }

    /// Sends all that was asked for, and the sizes anyway, as QEMU does; no acknowledgement.
    pub(super) fn infos(
        &mut self,
        request: &InfoRequest,
        export: &Export,
        flags: TransmissionFlags,
    ) {
        if request.wants(InfoType::NAME) {
            let name = export.name.as_ref().unwrap_or(&request.name);
            self.info(InfoType::NAME, &[name.as_str().as_bytes()]);
        }
        if let Some(text) = &export.description
            && request.wants(InfoType::DESCRIPTION)
        {
            self.info(InfoType::DESCRIPTION, &[truncated(text).as_bytes()]);
        }
        self.block_sizes(export);
        if request.wants(InfoType::INIT_STATE) {
            self.init_state(export.init_state);
        }
        let (size, flags) = (export.size_bytes.to_be_bytes(), flags.bits().to_be_bytes());
        self.info(InfoType::EXPORT, &[&size, &flags]);
    }

    pub(super) fn block_sizes(&mut self, export: &Export) {
        let sizes = export.block_sizes;
        let words = [sizes.minimum(), sizes.preferred(), sizes.max_payload()].map(u32::to_be_bytes);
        self.info(InfoType::BLOCK_SIZE, &[words.as_flattened()]);
    }

    fn init_state(&mut self, state: InitState) {
        self.info(InfoType::INIT_STATE, &[&state.bits().to_be_bytes()]);
    }

    fn info(&mut self, info: InfoType, parts: &[&[u8]]) {
        let kind = info.0.to_be_bytes();
        let mut all: smallvec::SmallVec<[&[u8]; 4]> = smallvec::smallvec![&kind[..]];
        all.extend_from_slice(parts);
        self.reply(ReplyCode::INFO, &all);
    }

    fn reply(&mut self, kind: ReplyCode, parts: &[&[u8]]) {
        let len = parts.iter().fold(0, |len, part| u32_len(part).saturating_add(len));
        let header = OptionReply { option: self.option, kind, len };
        self.output.extend_from_slice(&header.encode());
        for part in parts {
            self.output.extend_from_slice(part);
        }
    }
}

/// The length of a text of ours, which is far below 4 GiB.
fn u32_len(part: &[u8]) -> u32 {
    u32::try_from(part.len()).unwrap_or(u32::MAX)
}
