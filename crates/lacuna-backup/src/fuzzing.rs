//! What fuzz targets need that is no part of the public API. No promise is made about it.
//!
//! Checksums keep accidents out, not malice: whoever makes a file makes its checksums too. So these
//! set them right before they read.

use lacuna::storage::MemoryStorage;
use pollster::block_on;

use crate::checksum::{CHECKSUM_BYTES, Checksum};
use crate::point::{Begun, Manifest};
use crate::sealed::{self, Sealed};
use crate::segment::{Footer, HEADER_BYTES, Kind, Segment, TAIL_BYTES};

/// Takes bytes for the content of a manifest, and of what a point was begun as.
///
/// # Panics
/// If what decodes is not written as something that decodes to the same.
pub fn manifest(content: &[u8]) {
    decodes_to_the_same::<Manifest>(content);
    decodes_to_the_same::<Begun>(content);
}

fn decodes_to_the_same<T: Sealed + PartialEq + std::fmt::Debug>(content: &[u8]) {
    let Ok((decoded, _)) = sealed::decode::<T>(&sealed::seal::<T>(content)) else { return };
    let (bytes, checksum) = sealed::encode(&decoded).expect("it was decoded");
    assert_eq!(sealed::decode::<T>(&bytes).expect("it was encoded"), (decoded, checksum));
}

/// Takes bytes for a segment: reads its index, and every frame.
pub fn segment(file: &[u8]) {
    let mut file = file.to_vec();
    set_index_right(&mut file);
    let Ok(segment) = block_on(Segment::open(MemoryStorage::from(&file[..]))) else { return };
    for entry in segment.index.entries.iter().filter(|entry| entry.kind != Kind::Zero) {
        let stored = entry.stored.start.0 as usize..entry.stored.end().0 as usize;
        let mut entry = *entry;
        entry.checksum = Checksum::of(&file[stored]);
        if let Ok(bytes) = block_on(segment.content(&entry)) {
            assert_eq!(bytes.len() as u64, entry.range.len, "all of a frame, or none");
        }
    }
}

fn set_index_right(file: &mut [u8]) {
    let Some((front, tail)) = file.split_last_chunk::<TAIL_BYTES>() else { return };
    let Ok(footer) = Footer::decode(tail) else { return };
    let Some(index) = front.len().checked_sub(footer.index_bytes()) else { return };
    let Some(header) = front.get(..HEADER_BYTES) else { return };
    let head = &tail[..TAIL_BYTES - CHECKSUM_BYTES];
    let checksum = Checksum::of_pieces(&[header, &front[index..], head]);
    let at = file.len() - CHECKSUM_BYTES;
    file[at..].copy_from_slice(&checksum.0);
}
