//! Every export of a server, one after the other, on one connection.

use super::export::{DescribedExport, Facts, ListedExport};
use super::haggle::{context_data, info_data};
use super::handshake::{Event, Handshake};
use crate::wire::OptionCode;
use crate::{Replies, Result};

impl Handshake {
    /// Goes on after `option` was acknowledged: from the list to each export, from what an export
    /// is like to its contexts.
    pub(super) fn surveyed(&mut self, option: OptionCode) -> Result<()> {
        match option {
            OptionCode::INFO => {
                let block_sizes = self.facts.block_sizes();
                let info = self.info()?;
                if let Some(export) = self.described.last_mut() {
                    (export.info, export.block_sizes) = (Some(info), block_sizes);
                }
                self.ask_contexts_of_export();
            }
            OptionCode::LIST_META_CONTEXT => {
                let names = std::mem::take(&mut self.names);
                if let Some(export) = self.described.last_mut() {
                    export.contexts = names;
                }
                self.ask_next_export();
            }
            // The list is there; taken from its end later on.
            _ => {
                self.exports.reverse();
                self.ask_next_export();
            }
        }
        Ok(())
    }

    /// Goes on after the server would not answer about one export: it may have gone meanwhile.
    pub(super) fn passed_over(&mut self, option: OptionCode) {
        self.facts = Facts::default();
        self.names.clear();
        match option {
            OptionCode::INFO => self.ask_contexts_of_export(),
            _ => self.ask_next_export(),
        }
    }

    fn ask_next_export(&mut self) {
        let Some(listed) = self.exports.pop() else {
            let described = std::mem::take(&mut self.described);
            return self.leave(Event::DescribedAll(described));
        };
        self.ask(OptionCode::INFO, &[&info_data(&listed.name)]);
        self.described.push(unknown(listed));
    }

    fn ask_contexts_of_export(&mut self) {
        match self.described.last() {
            Some(export) if export.info.is_some() && self.replies != Replies::Simple => {
                let data = context_data(&export.listed.name, &[]);
                self.ask(OptionCode::LIST_META_CONTEXT, &[&data]);
            }
            _ => self.ask_next_export(),
        }
    }
}

const fn unknown(listed: ListedExport) -> DescribedExport {
    DescribedExport { listed, info: None, block_sizes: None, contexts: Vec::new() }
}
