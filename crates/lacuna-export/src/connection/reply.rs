//! What answers a request.

use lacuna::buffer::Buffer;
use lacuna_nbd::server::HeaderBytes;
use smallvec::SmallVec;

/// A part of what goes out: a header or a text, and bytes that belong behind it.
#[derive(Debug)]
pub(super) enum Part {
    Header(HeaderBytes),
    HeaderAndData(HeaderBytes, Buffer),
    Text(Vec<u8>),
}

impl Part {
    /// Returns the two pieces of memory, the second maybe empty.
    pub(super) fn pieces(&self) -> [&[u8]; 2] {
        match self {
            Self::Header(header) => [header, &[]],
            Self::HeaderAndData(header, data) => [header, data],
            Self::Text(text) => [text, &[]],
        }
    }

    pub(super) fn len(&self) -> usize {
        self.pieces().iter().map(|piece| piece.len()).sum()
    }

    /// Returns how much memory it takes: a byte that was read takes a page.
    pub(super) fn memory_bytes(&self) -> u64 {
        let apart = match self {
            Self::Header(_) => 0,
            Self::HeaderAndData(_, data) => data.block_bytes(),
            Self::Text(text) => text.capacity(),
        };
        (size_of::<Self>() + apart) as u64
    }
}

/// The whole answer to one request.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) parts: SmallVec<[Part; 1]>,
    /// What the request counted against the limits, in bytes.
    pub(super) weight: u64,
}
