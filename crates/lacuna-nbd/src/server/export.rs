//! What a driver is asked about exports, and what it answers.

use crate::context::Context;
use crate::wire::{InitState, ReplyCode, TransmissionFlags};
use crate::{BlockSizes, ExportName};

/// A question that only the driver can answer: is there such an export, and what is it like?
///
/// ```
/// use lacuna_nbd::server::{Purpose, Question};
/// fn may_open_now(question: &Question) -> bool {
///     // Open late: neither for a list of contexts nor before TLS.
///     question.purpose == Purpose::Use && question.is_tls
/// }
/// # let _ = may_open_now;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The name that the client gave; empty for the default export.
    pub name: ExportName,
    /// What the answer is for.
    pub purpose: Purpose,
    /// Whether the connection is under TLS: some exports may be hidden without.
    pub is_tls: bool,
    /// Whether the answer to [`Export::init_state`] will be sent: it may take work to find out.
    pub wants_init_state: bool,
}

/// What an answer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The client chooses or lists meta contexts; only [`Export::contexts`] matters.
    Contexts,
    /// The client wants to know what the export is like (`INFO`).
    Describe,
    /// The client is about to use the export (`GO`, `EXPORT_NAME`).
    Use,
}

/// An export as the driver describes it for one connection.
///
/// ```
/// use lacuna_nbd::server::Export;
/// use lacuna_nbd::wire::TransmissionFlags;
/// let mut export = Export::new(1 << 30);
/// export.flags = TransmissionFlags::SEND_FLUSH | TransmissionFlags::SEND_FUA;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// The canonical name, where it is not the one that was asked for.
    pub name: Option<ExportName>,
    /// A text for people.
    pub description: Option<String>,
    /// The size in bytes, below 2⁶³. What does not fill a minimum block at the end cannot be
    /// reached.
    pub size_bytes: u64,
    /// What may be asked of it. What depends on the negotiation (`HAS_FLAGS`, `SEND_DF`,
    /// `BLOCK_STATUS_PAYLOAD`) or contradicts itself (changes of something read-only) is corrected.
    pub flags: TransmissionFlags,
    /// A minimum above 1 is insisted on: a client that does not ask for sizes is turned away.
    pub block_sizes: BlockSizes,
    /// What is true right now, found out for this connection.
    pub init_state: InitState,
    /// The meta contexts there are, with ids that are unique, in the order they are listed.
    pub contexts: Vec<Context>,
}

impl Export {
    /// Describes an export of `size_bytes` that can be read and written and nothing else.
    #[must_use]
    pub fn new(size_bytes: u64) -> Self {
        Self {
            name: None,
            description: None,
            size_bytes,
            flags: TransmissionFlags::empty(),
            block_sizes: BlockSizes::default(),
            init_state: InitState::empty(),
            contexts: Vec::new(),
        }
    }
}

/// Why there is no such export for this client.
///
/// ```
/// use lacuna_nbd::server::Refusal;
/// let refusal = Refusal::Policy("This export is for one client at a time".into());
/// # let _ = refusal;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The server may not hand it out, and says why.
    Policy(String),
    /// The server cannot open it, and says why.
    Platform(String),
    /// The server is about to end.
    ShuttingDown,
    /// Not without TLS.
    TlsRequired,
    /// There is none of that name.
    Unknown,
}

impl Refusal {
    /// Returns the answer to the option and its text.
    pub(super) fn reply(&self, name: &ExportName) -> (ReplyCode, String) {
        match self {
            Self::Policy(text) => (ReplyCode::ERR_POLICY, text.clone()),
            Self::Platform(text) => (ReplyCode::ERR_PLATFORM, text.clone()),
            Self::ShuttingDown => (ReplyCode::ERR_SHUTDOWN, "The server is about to end".into()),
            Self::TlsRequired => {
                (ReplyCode::ERR_TLS_REQD, format!("Export {name} is served under TLS only"))
            }
            Self::Unknown => (ReplyCode::ERR_UNKNOWN, format!("There is no export {name}")),
        }
    }
}

/// One line of the list of exports.
///
/// ```
/// use lacuna_nbd::{ExportName, server::ListedExport};
/// let line = ListedExport { name: ExportName::default(), description: "The root disk".into() };
/// # let _ = line;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedExport {
    /// Its name.
    pub name: ExportName,
    /// A text for people; may be empty.
    pub description: String,
}
