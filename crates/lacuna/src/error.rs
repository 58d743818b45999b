//! The one error type: what we were doing, to what and where, and what would have been right.

use std::any::Any;
use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use crate::units::HostOffset;

/// Shorthand for a result with the engine's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Classes of failure that a caller may act on. Few and stable; details ride in the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The host refused or failed an operation.
    Io,
    /// The image contradicts its format.
    Corrupt,
    /// Legal, but not offered here.
    Unsupported,
    /// The request reaches past the end of the disk.
    OutOfBounds,
    /// A named thing does not exist.
    NotFound,
    /// Somebody else uses the image.
    Busy,
    /// A change was asked of something opened read-only.
    ReadOnly,
    /// The host or the format has no room left.
    NoSpace,
    /// The caller's arguments make no sense.
    InvalidRequest,
}

/// What went wrong, with what, and where.
///
/// ```
/// use lacuna::{Error, ErrorKind};
/// let error = Error::corrupt("L1 table offset 0x201 is not a multiple of the cluster size");
/// assert_eq!(error.kind(), ErrorKind::Corrupt);
/// ```
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    message: String,
    source: Option<std::io::Error>,
    /// Where in the image file.
    offset: Option<HostOffset>,
    /// Facts for whoever knows their type.
    detail: Option<Arc<dyn Any + Send + Sync>>,
}

impl Error {
    /// Makes an error of `kind` whose text is `message`: sentence case, no full stop.
    #[must_use]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let (message, source) = (message.into(), None);
        Self(Box::new(Inner { kind, message, source, offset: None, detail: None }))
    }

    /// Makes an [`ErrorKind::Corrupt`] error.
    #[must_use]
    pub fn corrupt(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, message)
    }

    /// Makes an [`ErrorKind::Unsupported`] error.
    #[must_use]
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    /// Makes an [`ErrorKind::InvalidRequest`] error.
    #[must_use]
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidRequest, message)
    }

    /// Wraps a failure of the host, keeping its code; `doing` says what was attempted and where.
    #[must_use]
    pub fn io(source: std::io::Error, doing: impl Into<String>) -> Self {
        let kind = match source.kind() {
            std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                ErrorKind::NoSpace
            }
            std::io::ErrorKind::ReadOnlyFilesystem => ErrorKind::ReadOnly,
            std::io::ErrorKind::Unsupported => ErrorKind::Unsupported,
            _ => ErrorKind::Io,
        };
        let (message, source) = (doing.into(), Some(source));
        Self(Box::new(Inner { kind, message, source, offset: None, detail: None }))
    }

    /// Returns the class of the failure.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Returns the host's error number where the host caused this.
    #[must_use]
    pub fn raw_os_error(&self) -> Option<i32> {
        self.0.source.as_ref().and_then(std::io::Error::raw_os_error)
    }

    /// Returns the text without the host's part.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Adds facts that go with the error wherever it goes.
    pub(crate) fn with_detail(mut self, detail: impl Any + Send + Sync) -> Self {
        self.0.detail = Some(Arc::new(detail));
        self
    }

    /// Returns the facts, where they are of this type.
    pub(crate) fn detail<T: Any>(&self) -> Option<&T> {
        self.0.detail.as_ref().and_then(|detail| detail.downcast_ref())
    }

    /// Returns where in the image file it went wrong, where one place is to blame.
    ///
    /// ```
    /// use lacuna::{Error, units::HostOffset};
    /// let error = Error::corrupt("L2 entry with reserved bits").at(HostOffset(0x50000));
    /// assert_eq!(error.host_offset(), Some(HostOffset(0x50000)));
    /// ```
    #[must_use]
    pub fn host_offset(&self) -> Option<HostOffset> {
        self.0.offset
    }

    /// Says where in the image file it went wrong. Who said so before was nearer and is right.
    #[must_use]
    pub fn at(mut self, offset: HostOffset) -> Self {
        self.0.offset.get_or_insert(offset);
        self
    }

    /// Puts what a caller was doing in front of the text; kind and source stay.
    #[must_use]
    pub fn context(mut self, doing: impl fmt::Display) -> Self {
        self.0.message = format!("{doing}: {}", self.0.message);
        self
    }
}

impl Clone for Error {
    fn clone(&self) -> Self {
        let source = self.0.source.as_ref().map(|source| match source.raw_os_error() {
            Some(code) => std::io::Error::from_raw_os_error(code),
            None => std::io::Error::new(source.kind(), source.to_string()),
        });
        let (message, detail) = (self.0.message.clone(), self.0.detail.clone());
        let Inner { kind, offset, .. } = *self.0;
        Self(Box::new(Inner { kind, message, source, offset, detail }))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0.source {
            Some(source) => write!(f, "{}: {source}", self.0.message),
            None => f.write_str(&self.0.message),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_ref().map(|source| source as _)
    }
}
