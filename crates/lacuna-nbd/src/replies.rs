//! In which form replies are written; [`server`](crate::server) writes them, and
//! [`client`](crate::client) reads them.

/// How replies are written on a connection; negotiated once, then fixed.
///
/// ```
/// use lacuna_nbd::server::{Replies, Tag};
/// use lacuna_nbd::{ByteRange, Cookie};
/// let tag = Tag { cookie: Cookie(0x0102), offset: 4096 };
/// let header = Replies::Simple.success(tag);
/// assert_eq!(&header[..], b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\x01\x02");
/// // 4096 bytes go out behind this.
/// let header = Replies::Structured.whole_read(tag, ByteRange { start: 4096, len: 4096 });
/// assert_eq!(header.len(), 28);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replies {
    /// Chunks with 64-bit headers.
    Extended,
    /// A status, and the bytes of a read.
    Simple,
    /// Chunks for reads, errors and block status.
    Structured,
}

impl Replies {
    /// Says whether replies consist of chunks: holes, parts and errors with a place.
    #[must_use]
    pub fn has_chunks(self) -> bool {
        self != Self::Simple
    }
}
