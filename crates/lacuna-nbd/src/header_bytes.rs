//! A header that is sent in front of data.

use smallvec::SmallVec;

/// Encoded bytes of a header, without the heap.
///
/// ```
/// use lacuna_nbd::HeaderBytes;
/// assert_eq!(HeaderBytes::from(&b"abc"[..]).len(), 3);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderBytes(SmallVec<[u8; 64]>);

impl HeaderBytes {
    pub(crate) fn push(&mut self, part: &[u8]) {
        self.0.extend_from_slice(part);
    }
}

impl From<&[u8]> for HeaderBytes {
    fn from(bytes: &[u8]) -> Self {
        Self(SmallVec::from_slice(bytes))
    }
}

impl std::ops::Deref for HeaderBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl AsRef<[u8]> for HeaderBytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}
