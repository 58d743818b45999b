//! What a restore point is called, which is also what its files are called.

use std::fmt;

use lacuna::{Error, Result};
use serde::{Deserialize, Serialize};

/// What the file is called that marks a folder of a backup; no point may be called so.
pub(crate) const RESERVED: &str = "lacuna-backup";
/// Longest name, in bytes.
const MAX_BYTES: usize = 64;

/// The name of a restore point: 1 to 64 letters, digits, `-` and `_`, the first no `-`, and not
/// `lacuna-backup`. So it names a file of its folder and never one elsewhere.
///
/// ```
/// use lacuna_backup::PointName;
/// assert!(PointName::new("monday").is_ok());
/// assert!(PointName::new("../monday").is_err());
/// ```
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PointName(String);

impl PointName {
    /// Takes a name.
    ///
    /// # Errors
    /// `InvalidRequest` for one that is none.
    pub fn new(name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        let is_fine = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_".contains(byte);
        match name.as_bytes() {
            [] | [b'-', ..] => Err(wrong(&name)),
            _ if name == RESERVED => Err(wrong(&name)),
            bytes if bytes.len() > MAX_BYTES || !bytes.iter().all(is_fine) => Err(wrong(&name)),
            _ => Ok(Self(name)),
        }
    }

    /// Returns it as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn wrong(name: &str) -> Error {
    let name: String = name.chars().take(MAX_BYTES).collect();
    Error::invalid(format!(
        "'{}' is no name of a restore point: 1 to {MAX_BYTES} letters, digits, '-' and '_' would be right",
        name.escape_debug()
    ))
}

impl TryFrom<String> for PointName {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        Self::new(name)
    }
}

impl From<PointName> for String {
    fn from(name: PointName) -> Self {
        name.0
    }
}

impl fmt::Display for PointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::PointName;

    #[test]
    fn a_name_never_leads_out_of_its_folder_or_to_what_marks_it() {
        for name in ["", "-a", "a/b", "..", ".", "a.b", "a b", "\0", "ä", "lacuna-backup"] {
            assert!(PointName::new(name).is_err(), "{name:?}");
        }
        assert!(PointName::new("a".repeat(65)).is_err());
        for name in ["a", "2026-11-27T061822Z-2", "_", &"a".repeat(64)] {
            assert_eq!(PointName::new(name).unwrap().as_str(), name);
        }
    }
}
