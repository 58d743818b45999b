//! Small changes of what is in the file, in units that storage does not tear.

use crate::buffer::Buffer;
use crate::storage::Storage;
use crate::units::HostOffset;
use crate::{Error, Result};

/// What storage does not tear.
const SECTOR: usize = 512;

/// Writes the sectors in which `new` differs from `old`; returns how many bytes those are.
pub(super) async fn write_changes<S: Storage>(
    storage: &S,
    at: HostOffset,
    old: &[u8],
    new: &[u8],
) -> Result<u64> {
    let mut written = 0;
    let mut from = None;
    let sectors = old.chunks(SECTOR).zip(new.chunks(SECTOR));
    let changed: Vec<bool> = sectors.map(|(old, new)| old != new).collect();
    for index in 0..=changed.len() {
        match (from, changed.get(index).copied().unwrap_or(false)) {
            (None, true) => from = Some(index),
            (Some(first), false) => {
                let range = first * SECTOR..(index * SECTOR).min(new.len());
                let part = &new[range.clone()];
                storage.write_at(at + range.start as u64, Buffer::from(part)).await.0?;
                written += part.len() as u64;
                from = None;
            }
            _ => {}
        }
    }
    Ok(written)
}

/// A word that is to be another one, as far as `mask` goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Word {
    pub(super) at: HostOffset,
    pub(super) old: u64,
    pub(super) new: u64,
    pub(super) mask: u64,
}

/// Changes words, which are sorted by place. Returns how many bytes were written.
///
/// # Errors
/// `Corrupt` where a word is not what it was: somebody else writes to the image.
pub(super) async fn write_words<S: Storage>(storage: &S, words: &[Word]) -> Result<u64> {
    const WINDOW: u64 = 64 << 10;
    let mut written = 0;
    for part in words.chunk_by(|a, b| a.at.0 / WINDOW == b.at.0 / WINDOW) {
        let (first, last) = (part[0].at.0, part[part.len() - 1].at.0);
        let start = HostOffset(first / SECTOR as u64 * SECTOR as u64);
        let len = (last + 8).next_multiple_of(SECTOR as u64) - start.0;
        let (result, old) = storage.read_at(start, Buffer::new(len as usize)).await;
        result?;
        let mut new = old.to_vec();
        for word in part {
            apply(word, &mut new[(word.at - start) as usize..][..8])?;
        }
        written += write_changes(storage, start, &old, &new).await?;
    }
    Ok(written)
}

fn apply(word: &Word, place: &mut [u8]) -> Result<()> {
    let now = place.iter().fold(0, |number: u64, byte| number << 8 | u64::from(*byte));
    if now & word.mask != word.old {
        return Err(Error::corrupt(format!(
            "The pointer at {} is {now:#x}, not one to {:#x}: somebody else writes to the image",
            word.at, word.old
        )));
    }
    place.copy_from_slice(&((now & !word.mask) | word.new).to_be_bytes());
    Ok(())
}
