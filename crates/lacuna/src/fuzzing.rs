//! What fuzz targets need that is no part of the public API. No promise is made about it.

use crate::Result;
use crate::qcow2::codec;
use crate::qcow2::format::CompressionType;

/// Fills `output` from the compressed stream at the start of `input`.
///
/// # Errors
/// `Corrupt` where the stream is invalid or ends early.
pub fn decompress(kind: CompressionType, input: &[u8], output: &mut [u8]) -> Result<()> {
    codec::decompress(kind, input, output)
}

/// Compresses `input` into `output`; returns the length, or nothing where it would not be shorter.
///
/// # Errors
/// `Io` where no compression context can be made.
pub fn compress(kind: CompressionType, input: &[u8], output: &mut [u8]) -> Result<Option<usize>> {
    codec::compress(kind, input, output)
}
