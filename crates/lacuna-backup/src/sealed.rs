//! JSON that carries its own checksum: every byte of the file counts.
//!
//! ```text
//! {"checksum":"<64 digits>","CONTENT":{...}}\n
//! ```
//!
//! * Always: the checksum is that of the bytes of the content, as they stand in the file. What is
//!   around them is compared byte by byte.
//! * Never: more is read than [`MAX_BYTES`].

use std::path::Path;

use lacuna::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::checksum::Checksum;
use crate::place::Place;

/// Longest document that is read: manifests of 64 TiB of data that cannot be compressed are
/// shorter.
const MAX_BYTES: u64 = 256 << 20;

/// A kind of document.
pub(crate) trait Sealed: Serialize + DeserializeOwned {
    /// The member that holds the content.
    const MEMBER: &'static str;

    /// What the serial form cannot say by itself; the text says what is wrong.
    fn check(&self) -> Result<(), String>;
}

/// Returns a document as bytes, and the checksum that they carry.
pub(crate) fn encode<T: Sealed>(content: &T) -> Result<(Vec<u8>, Checksum)> {
    let body = serde_json::to_vec_pretty(content)
        .map_err(|error| Error::invalid(format!("A manifest cannot be written: {error}")))?;
    Ok((seal::<T>(&body), Checksum::of(&body)))
}

/// Puts the checksum of a content in front of it.
pub(crate) fn seal<T: Sealed>(body: &[u8]) -> Vec<u8> {
    let mut bytes = front::<T>(Checksum::of(body)).into_bytes();
    bytes.extend_from_slice(body);
    bytes.extend_from_slice(BACK);
    bytes
}

const BACK: &[u8] = b"}\n";

fn front<T: Sealed>(checksum: Checksum) -> String {
    format!("{{\"checksum\":\"{checksum}\",\"{}\":", T::MEMBER)
}

/// Reads a document from bytes that nobody vouches for.
///
/// # Errors
/// `Corrupt`.
pub(crate) fn decode<T: Sealed>(bytes: &[u8]) -> Result<(T, Checksum)> {
    let front_bytes = front::<T>(Checksum::NONE).len();
    let body = bytes
        .get(front_bytes..)
        .and_then(|rest| rest.strip_suffix(BACK))
        .ok_or_else(|| Error::corrupt(format!("This is no whole \"{}\"", T::MEMBER)))?;
    let checksum = Checksum::of(body);
    if !bytes.starts_with(front::<T>(checksum).as_bytes()) {
        return Err(Error::corrupt(format!(
            "The content has checksum {checksum}, which is not what stands in front of it"
        )));
    }
    let content: T = serde_json::from_slice(body)
        .map_err(|error| Error::corrupt(format!("This is no \"{}\": {error}", T::MEMBER)))?;
    content.check().map_err(Error::corrupt)?;
    Ok((content, checksum))
}

/// Reads a document from a file.
///
/// # Errors
/// `NotFound`; `Corrupt`; else what reading gives.
pub(crate) fn read<T: Sealed>(place: &impl Place, path: &Path) -> Result<(T, Checksum)> {
    let bytes = place.read(path, MAX_BYTES)?;
    decode(&bytes).map_err(|error| error.context(path.display()))
}
