//! The disk that a point is.

use std::sync::Arc;

use super::kept::{Kept, Part, PointStatus, seen};
use super::{Shared, WhenFull};
use crate::block::{Extent, ExtentBuilder, KnownZeroes, Layer, no_status};
use crate::buffer::Buffer;
use crate::storage::Transfer;
use crate::units::{GuestOffset, GuestRange};
use crate::{Error, ErrorKind, Result};

/// Read at a time: what was saved meanwhile is read again.
const PIECE_BYTES: u64 = 1 << 20;
/// Extents after which an answer is long enough.
const EXTENTS_AT_ONCE: usize = 1024;

/// A disk as it was at one moment; made by [`Points::add`](super::Points::add), with an example there. It
/// ends when it is dropped.
///
/// It has the size that the disk had, and refuses changes. As a layer it lies on the disk: what it saved is
/// allocated in itself. When it has ended, or broke, all it is asked is an error.
pub struct Point<L: Layer, T: Layer + 'static> {
    of: Arc<Shared<L, T>>,
    kept: Arc<Kept<T>>,
}

impl<L: Layer, T: Layer + 'static> std::fmt::Debug for Point<L, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Point").field("status", &self.kept.status()).finish_non_exhaustive()
    }
}

impl<L: Layer, T: Layer + 'static> Point<L, T> {
    pub(super) const fn new(of: Arc<Shared<L, T>>, kept: Arc<Kept<T>>) -> Self {
        Self { of, kept }
    }

    /// Returns how it stands.
    ///
    /// ```
    /// # use lacuna::block::{PointOptions, Points};
    /// # use lacuna::{raw::Raw, storage::MemoryStorage};
    /// # pollster::block_on(async {
    /// # let disk = Points::new(Raw::create(MemoryStorage::new(), 4096).await?);
    /// # let saved = Raw::create(MemoryStorage::new(), 4096).await?;
    /// let (point, ()) = disk.add(saved, PointOptions::default(), async { Ok(()) }).await?;
    /// assert_eq!(point.status().saved_bytes, 0);
    /// # Ok::<_, lacuna::Error>(())
    /// # }).unwrap();
    /// ```
    #[must_use]
    pub fn status(&self) -> PointStatus {
        self.kept.status()
    }

    /// Returns what happens when it may save no more.
    #[must_use]
    pub fn when_full(&self) -> WhenFull {
        self.kept.when_full()
    }

    /// Changes how many bytes it may save. Guests that wait for space look again.
    pub fn set_space(&self, space_bytes: u64) {
        self.kept.set_space(space_bytes);
    }

    /// Ends it: nothing is saved for it any more, nobody waits for it, and what was saved is forgotten.
    pub fn end(&self) {
        self.kept.end(Error::new(ErrorKind::NotFound, "The point was removed"));
        self.of.gate.change_points(|all| {
            all.iter().filter(|other| !Arc::ptr_eq(other, &self.kept)).map(Arc::clone).collect()
        });
    }

    fn check(&self, range: GuestRange) -> Result<()> {
        let size = self.kept.size_bytes;
        match range.start.checked_add(range.len) {
            Some(end) if end.0 <= size => Ok(()),
            _ => Err(Error::new(
                ErrorKind::OutOfBounds,
                format!(
                    "{} bytes at {} pass the end of the point at {size:#x}",
                    range.len, range.start
                ),
            )),
        }
    }

    /// Reads the start of a range, all of it saved or not at all; the rest of the buffer comes back.
    async fn read_part(&self, at: GuestOffset, mut rest: Buffer) -> (Result<()>, Buffer, Buffer) {
        loop {
            let asked = GuestRange::new(at, (rest.len() as u64).min(PIECE_BYTES));
            let part = match self.kept.part(asked) {
                Ok(part) => part,
                Err(error) => return refused(error, rest),
            };
            let mut behind = rest.split_off(part.range.len as usize);
            let (result, mut bytes) = match &part.saved {
                Some(saved) => saved.read(at, rest).await,
                None => self.of.below.read(at, rest).await,
            };
            match self.still_holds(&part, part.range) {
                Ok(len) if len == part.range.len => return (result, bytes, behind),
                Ok(len) if len > 0 && result.is_ok() => {
                    behind = Buffer::joined(Some(bytes.split_off(len as usize)), behind);
                    return (result, bytes, behind);
                }
                Ok(_) => rest = Buffer::joined(Some(bytes), behind),
                Err(error) => return (Err(error), bytes, behind),
            }
        }
    }

    /// Returns how far what was learnt of `range`, the start of a part, is of the moment: what was not
    /// saved before, and is not now, nobody has changed. What is saved stays so.
    fn still_holds(&self, part: &Part<T>, range: GuestRange) -> Result<u64> {
        let now = self.kept.part(range)?;
        Ok(match (&part.saved, &now.saved) {
            (Some(_), _) => range.len,
            (None, None) => now.range.len,
            (None, Some(_)) => 0,
        })
    }

    /// Adds what is known of the start of a range; returns how far it goes.
    async fn learn(&self, rest: GuestRange, found: &mut ExtentBuilder) -> Result<GuestOffset> {
        loop {
            let part = self.kept.part(rest)?;
            let told = match &part.saved {
                Some(saved) => saved.extents(part.range).await,
                None => self.of.below.extents(part.range).await,
            };
            let end = match &told {
                Ok(extents) => extents.last().map_or(rest.start, |last| last.range.end()),
                Err(_) => part.range.end(),
            };
            let told_of = GuestRange::new(rest.start, end.min(part.range.end()) - rest.start);
            if told_of.is_empty() {
                return Err(no_status(rest));
            }
            let holds = self.still_holds(&part, told_of)?;
            if holds == 0 || told.is_err() && holds < told_of.len {
                // Saved since: it is known from there.
                continue;
            }
            let holds = GuestRange::new(rest.start, holds);
            for extent in told? {
                if let Some(range) = extent.range.intersection(&holds) {
                    found.push(seen(extent, range, part.saved.is_some()));
                }
            }
            return Ok(holds.end());
        }
    }
}

fn refused(error: Error, mut buffer: Buffer) -> (Result<()>, Buffer, Buffer) {
    let nothing = buffer.split_off(buffer.len());
    (Err(error), buffer, nothing)
}

impl<L: Layer, T: Layer + 'static> Drop for Point<L, T> {
    fn drop(&mut self) {
        self.end();
    }
}

impl<L: Layer, T: Layer + 'static> Layer for Point<L, T> {
    fn size_bytes(&self) -> u64 {
        self.kept.size_bytes
    }

    fn zero_unit_bytes(&self) -> u64 {
        self.of.below.zero_unit_bytes()
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        Ok(KnownZeroes::NOTHING)
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        if let Err(error) = self.check(GuestRange::new(offset, buffer.len() as u64)) {
            return (Err(error), buffer);
        }
        let (mut at, mut rest, mut done) = (offset, buffer, None);
        while !rest.is_empty() {
            let (result, part, behind) = self.read_part(at, rest).await;
            if result.is_err() {
                return (result, Buffer::joined(done, Buffer::joined(Some(part), behind)));
            }
            at = at + part.len() as u64;
            done = Some(Buffer::joined(done, part));
            rest = behind;
        }
        (Ok(()), Buffer::joined(done, rest))
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        self.check(range)?;
        let (mut found, mut at) = (ExtentBuilder::default(), range.start);
        while at < range.end() && found.len() < EXTENTS_AT_ONCE {
            at = self.learn(GuestRange::new(at, range.end() - at), &mut found).await?;
        }
        Ok(found.finish())
    }
}
