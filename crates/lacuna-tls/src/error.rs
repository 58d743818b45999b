//! Why settings cannot be made.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Shorthand for a result with an [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure it is.
///
/// ```
/// assert_ne!(lacuna_tls::ErrorKind::NotFound, lacuna_tls::ErrorKind::Invalid);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A certificate, key or name is wrong.
    Invalid,
    /// A file cannot be read.
    Io,
    /// A file is missing.
    NotFound,
    /// It may be right, and is not known here: an encrypted key, an algorithm.
    Unsupported,
}

/// Why settings cannot be made: a sentence that names the file and what would have been right.
///
/// ```
/// use std::path::{Path, PathBuf};
/// use lacuna_tls::{ErrorKind, ServerTls, VerifyPeer};
/// let error = ServerTls::from_folder(Path::new("/nowhere"), VerifyPeer::On).unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::NotFound);
/// assert!(error.to_string().contains("/nowhere"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
    text: String,
    path: Option<PathBuf>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into(), path: None }
    }

    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, text)
    }

    /// `path: error`, without the number that the standard library adds to the host's words.
    pub(crate) fn reading(path: &Path, error: &io::Error) -> Self {
        let words = error.to_string();
        let end = words.rfind(" (os error").unwrap_or(words.len());
        Self::new(ErrorKind::Io, format!("Reading {}: {}", path.display(), &words[..end]))
    }

    pub(crate) fn missing(path: PathBuf, text: String) -> Self {
        Self { path: Some(path), ..Self::new(ErrorKind::NotFound, text) }
    }

    /// Returns the file that is missing, if that is it.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Returns what kind of failure it is.
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Error {}
