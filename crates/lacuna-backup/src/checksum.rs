//! The checksum of everything that is kept: BLAKE3, which nobody can make two contents agree in.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Bytes of a checksum.
pub(crate) const CHECKSUM_BYTES: usize = 32;

/// The BLAKE3 checksum of some bytes.
///
/// ```
/// use lacuna_backup::Checksum;
/// let checksum = Checksum::of(b"lacuna");
/// assert_eq!(Checksum::from_hex(&checksum.to_string()), Some(checksum));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Checksum(pub(crate) [u8; CHECKSUM_BYTES]);

impl Checksum {
    /// Where there is nothing to be checked.
    pub(crate) const NONE: Self = Self([0; CHECKSUM_BYTES]);

    /// Returns that of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// Returns that of several pieces in a row.
    pub(crate) fn of_pieces(pieces: &[&[u8]]) -> Self {
        let mut hasher = blake3::Hasher::new();
        for piece in pieces {
            hasher.update(piece);
        }
        Self::finished(&hasher)
    }

    pub(crate) fn finished(hasher: &blake3::Hasher) -> Self {
        Self(*hasher.finalize().as_bytes())
    }

    /// Reads 64 hexadecimal digits, small letters only, so that one checksum has one spelling.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        let (digits, []) = text.as_bytes().as_chunks::<2>() else { return None };
        let digits: &[[u8; 2]; CHECKSUM_BYTES] = digits.try_into().ok()?;
        let mut bytes = [0; CHECKSUM_BYTES];
        for (byte, pair) in bytes.iter_mut().zip(digits) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Some(Self(bytes))
    }
}

fn digit(letter: u8) -> Option<u8> {
    match letter {
        b'0'..=b'9' => Some(letter - b'0'),
        b'a'..=b'f' => Some(letter - b'a' + 10),
        _ => None,
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Checksum({self})")
    }
}

impl Serialize for Checksum {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Checksum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let wrong = || de::Error::custom(format!("'{text}' is no checksum of 64 digits"));
        Self::from_hex(&text).ok_or_else(wrong)
    }
}
