//! Texts on the wire: UTF-8 without NUL, at most 4096 bytes (C.8).
//!
//! * Always: what a peer sent is quoted short and escaped before it goes into a message, so that a
//!   message never exceeds the limit (CVE-2020-10761) nor steers a terminal.

use std::fmt::{self, Write as _};

/// Longest text on the wire in bytes.
pub const MAX_TEXT_BYTES: usize = 4096;
/// How much of a peer's text goes into a message of ours.
const QUOTED_CHARACTERS: usize = 80;

/// The name of an export as a peer gave it; empty for the default export.
///
/// ```
/// use lacuna_nbd::ExportName;
/// assert_eq!(ExportName::new("disk").unwrap().as_str(), "disk");
/// assert!(ExportName::new("a\0b").is_none());
/// assert!(ExportName::new(&"x".repeat(4097)).is_none());
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct ExportName(String);

impl ExportName {
    /// Takes a name that keeps the limits of the protocol: no NUL, at most 4096 bytes.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        Self::decode(name.as_bytes())
    }

    /// Returns the name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        text(bytes).map(|name| Self(name.to_owned()))
    }
}

impl fmt::Display for ExportName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&quoted(self.0.as_bytes()))
    }
}

/// Returns a text from the wire if it is one.
pub(crate) fn text(bytes: &[u8]) -> Option<&str> {
    let is_fine = bytes.len() <= MAX_TEXT_BYTES && !bytes.contains(&0);
    std::str::from_utf8(bytes).ok().filter(|_| is_fine)
}

/// Returns a peer's text in quotes, escaped, and cut where it is long.
pub(crate) fn quoted(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut quoted = String::from("'");
    for character in text.chars().take(QUOTED_CHARACTERS) {
        match character {
            '\'' | '"' => quoted.push(character),
            _ => quoted.extend(character.escape_debug()),
        }
    }
    if text.chars().nth(QUOTED_CHARACTERS).is_some() {
        let _infallible = write!(quoted, "... ({} bytes)", bytes.len());
    }
    quoted.push('\'');
    quoted
}

/// Returns as much of a message of ours as may be sent.
pub(crate) fn truncated(message: &str) -> &str {
    let end = message.floor_char_boundary(MAX_TEXT_BYTES);
    message.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_and_strange_texts_are_quoted_short() {
        assert_eq!(quoted(b"disk"), "'disk'");
        assert_eq!(quoted(b"\x1b[2J\xff"), "'\\u{1b}[2J\u{fffd}'");
        let long = quoted(&[b'n'; 4096]);
        assert!(long.len() < 120 && long.ends_with("... (4096 bytes)'"), "{long}");
    }

    #[test]
    fn messages_are_cut_between_characters() {
        let message = "ä".repeat(3000);
        assert_eq!(truncated(&message).len(), 4096);
        let message = format!("a{message}");
        assert_eq!(truncated(&message).len(), 4095);
    }
}
