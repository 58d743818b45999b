//! What a server says of an export, checked.

use crate::context::Context;
use crate::text::{quoted, text};
use crate::wire::{Fields, InfoType, InitState, TransmissionFlags};
use crate::{BlockSizes, Error, ExportName, Replies, Result};

/// What a server says of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// The size in bytes, below 2⁶³.
    pub size_bytes: u64,
    /// What may be asked.
    pub flags: TransmissionFlags,
    /// What requests keep to; the default where the server does not say.
    pub block_sizes: BlockSizes,
    /// The canonical name, where the server says so.
    pub name: Option<ExportName>,
    /// A text for people, from the server: escape it before it goes to a terminal.
    pub description: Option<String>,
    /// What was true when the connection was made; empty where the server does not say.
    pub init_state: InitState,
    /// The meta contexts that were chosen, in the server's order.
    pub contexts: Vec<Context>,
    /// In which form replies come.
    pub replies: Replies,
}

/// One line of the list of exports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedExport {
    /// Its name.
    pub name: ExportName,
    /// A text for people; may be empty.
    pub description: String,
}

/// One export of a server, as [`Goal::DescribeAll`](super::Goal::DescribeAll) finds it.
///
/// ```
/// use lacuna_nbd::client::DescribedExport;
/// fn size(export: &DescribedExport) -> Option<u64> {
///     export.info.as_ref().map(|info| info.size_bytes)
/// }
/// # let _ = size;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DescribedExport {
    /// Its line in the list.
    pub listed: ListedExport,
    /// What it is like; nothing where the server does not say.
    pub info: Option<ExportInfo>,
    /// The sizes to keep to, where the server names any.
    pub block_sizes: Option<BlockSizes>,
    /// The names of its meta contexts; none where replies cannot carry them.
    pub contexts: Vec<String>,
}

/// Facts as they arrive.
#[derive(Clone, Debug, Default)]
pub(super) struct Facts {
    export: Option<(u64, TransmissionFlags)>,
    block_sizes: Option<BlockSizes>,
    name: Option<ExportName>,
    description: Option<String>,
    init_state: InitState,
}

impl Facts {
    /// Takes the payload of an `NBD_REP_INFO`; kinds that nobody knows are passed over.
    pub(super) fn learn(&mut self, payload: &[u8]) -> Result<()> {
        let mut fields = Fields(payload);
        let wrong = || Error::violation("An information reply has a length that does not fit it");
        let kind = fields.u16().map(InfoType).ok_or_else(wrong)?;
        match kind {
            InfoType::EXPORT => {
                let fact = fields.u64().zip(fields.u16()).ok_or_else(wrong)?;
                self.export(fact.0, fact.1)?;
            }
            InfoType::BLOCK_SIZE => {
                let mut word = || fields.u32().ok_or_else(wrong);
                let sizes = BlockSizes::new(word()?, word()?, word()?);
                let sizes = sizes.map_err(|error| Error::violation(error.to_string()))?;
                self.block_sizes = Some(sizes);
            }
            InfoType::INIT_STATE => {
                let word = fields.u16().ok_or_else(wrong)?;
                self.init_state = InitState::from_bits_truncate(word);
            }
            InfoType::NAME => self.name = Some(listed_name(std::mem::take(&mut fields.0))?),
            InfoType::DESCRIPTION => {
                self.description = Some(listed_text(std::mem::take(&mut fields.0))?);
            }
            _ => return Ok(()),
        }
        if fields.is_empty() { Ok(()) } else { Err(wrong()) }
    }

    /// Takes size and flags, from whichever option.
    pub(super) fn export(&mut self, size_bytes: u64, flags: u16) -> Result<()> {
        // CVE-2023-5215: sizes are signed elsewhere.
        if i64::try_from(size_bytes).is_err() {
            return Err(Error::violation(format!("Export size {size_bytes} is not below 2^63")));
        }
        self.export = Some((size_bytes, TransmissionFlags::from_bits_retain(flags)));
        Ok(())
    }

    /// Returns the sizes that the server named so far.
    pub(super) const fn block_sizes(&self) -> Option<BlockSizes> {
        self.block_sizes
    }

    /// Returns what is known at the end of the handshake.
    pub(super) fn finish(self, replies: Replies, contexts: Vec<Context>) -> Result<ExportInfo> {
        let (size_bytes, flags) = self.export.ok_or_else(|| {
            Error::violation("The server accepts the export without saying how large it is")
        })?;
        Ok(ExportInfo {
            size_bytes,
            flags: offered(flags, replies),
            block_sizes: self.block_sizes.unwrap_or_default(),
            name: self.name,
            description: self.description,
            init_state: self.init_state,
            contexts,
            replies,
        })
    }
}

/// Leaves out what contradicts itself or what was not negotiated.
fn offered(mut flags: TransmissionFlags, replies: Replies) -> TransmissionFlags {
    type Flags = TransmissionFlags;
    if !flags.contains(Flags::HAS_FLAGS) {
        return Flags::empty();
    }
    if replies == Replies::Simple {
        flags.remove(Flags::SEND_DF);
    }
    if replies != Replies::Extended {
        flags.remove(Flags::BLOCK_STATUS_PAYLOAD);
    }
    if !flags.contains(Flags::SEND_WRITE_ZEROES) {
        flags.remove(Flags::SEND_FAST_ZERO);
    }
    flags
}

/// Decodes a line of the list: u32 length, name, the rest is the description.
pub(super) fn listed_export(payload: &[u8]) -> Result<ListedExport> {
    let mut fields = Fields(payload);
    let name = fields.counted().ok_or_else(|| {
        Error::violation("A name in the list of exports reaches past the end of its reply")
    })?;
    Ok(ListedExport { name: listed_name(name)?, description: listed_text(fields.0)? })
}

/// Decodes u32 id, name of a meta context.
pub(super) fn listed_context(payload: &[u8]) -> Result<(u32, String)> {
    let mut fields = Fields(payload);
    let id = fields.u32().ok_or_else(|| Error::violation("A meta context has no id"))?;
    Ok((id, listed_text(fields.0)?))
}

fn listed_name(bytes: &[u8]) -> Result<ExportName> {
    ExportName::decode(bytes).ok_or_else(|| no_text(bytes))
}

fn listed_text(bytes: &[u8]) -> Result<String> {
    text(bytes).map(str::to_owned).ok_or_else(|| no_text(bytes))
}

fn no_text(bytes: &[u8]) -> Error {
    Error::violation(format!(
        "The server sends {} as a text; it should be UTF-8 without NUL, of at most 4096 bytes",
        quoted(bytes)
    ))
}
