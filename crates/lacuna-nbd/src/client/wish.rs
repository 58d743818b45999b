//! What a caller wants of a server.

use crate::ExportName;

/// What a handshake is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Learn what the export is like, and leave.
    Describe,
    /// Learn which exports there are, what each is like and which meta contexts it has, and leave.
    DescribeAll,
    /// Learn which meta contexts there are, and leave: those that match the queries, or all of them
    /// if there are none. A query that ends in a colon matches what begins with it.
    ListContexts(Vec<String>),
    /// Learn which exports there are, and leave.
    ListExports,
    /// Use the export.
    Use,
}

/// Whether to turn to TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsWish {
    /// If the server wants to. Whoever is in between can make it look as if it did not.
    IfOffered,
    /// No.
    Never,
    /// Fail rather than go on without.
    Required,
}

/// The best form of headers and replies to ask for; what a server does not know is done without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Headers {
    /// 64-bit headers, or structured replies.
    Extended,
    /// As it was at first: no holes, no block status.
    Simple,
    /// Replies in chunks.
    Structured,
}

/// What a caller wants of a server.
///
/// ```
/// use lacuna_nbd::ExportName;
/// use lacuna_nbd::client::{TlsWish, Wish};
/// use lacuna_nbd::context::BASE_ALLOCATION;
/// let wish = Wish {
///     contexts: vec![BASE_ALLOCATION.into()],
///     tls: TlsWish::Required,
///     ..Wish::to_use(ExportName::new("disk").unwrap())
/// };
/// # let _ = wish;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// The export; empty for the default one.
    pub export: ExportName,
    /// What for.
    pub goal: Goal,
    /// Whether under TLS.
    pub tls: TlsWish,
    /// With which headers.
    pub headers: Headers,
    /// The names of the meta contexts to choose; the server may have fewer.
    pub contexts: Vec<String>,
}

impl Wish {
    /// Wants to use an export with the best headers, without TLS and without block status.
    #[must_use]
    pub const fn to_use(export: ExportName) -> Self {
        Self {
            export,
            goal: Goal::Use,
            tls: TlsWish::Never,
            headers: Headers::Extended,
            contexts: Vec::new(),
        }
    }
}
