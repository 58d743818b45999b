//! Names as an image stores them: bytes, not necessarily text.

use std::borrow::Cow;
use std::fmt;

/// A name from an image: a file name, a format, an identifier. Displayed with control characters
/// escaped, because whoever made the image chose the bytes.
///
/// ```
/// use lacuna::qcow2::format::StoredName;
/// let name = StoredName::from("base\n.img");
/// assert_eq!(name.as_bytes(), b"base\n.img");
/// assert_eq!(name.to_string(), "base\\n.img");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StoredName(Vec<u8>);

impl StoredName {
    /// Makes a name of these bytes.
    #[must_use]
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self(bytes.into())
    }

    /// Returns the bytes as stored.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns the name as text, if it is UTF-8.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        std::str::from_utf8(&self.0).ok()
    }

    /// Returns the name as text for people; what is not UTF-8 becomes U+FFFD.
    #[must_use]
    pub fn to_string_lossy(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.0)
    }

    /// Returns the length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Says whether the name has no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<&str> for StoredName {
    fn from(name: &str) -> Self {
        Self::new(name)
    }
}

impl fmt::Display for StoredName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in self.to_string_lossy().chars() {
            if part.is_control() {
                write!(f, "{}", part.escape_default())?;
            } else {
                write!(f, "{part}")?;
            }
        }
        Ok(())
    }
}
