//! Zero writes found on the write path, and handed down as zero ranges (thread 004, A.5.2).
//!
//! * Always byte-exact: what is handed down as zeros was zeros, what was not is written.
//! * Never: bytes are written for zeros that less than a unit of a request ends with, where the rest
//!   of that unit reads as zeros too (004-5a).
//! * Never: a request is torn for less than a unit otherwise.

use super::{DiscardMode, Extent, KnownZeroes, Layer, WriteFlags, ZeroFlags, is_zero};
use crate::buffer::Buffer;
use crate::storage::{HostSource, Transfer};
use crate::units::{GuestOffset, GuestRange};
use crate::{Error, ErrorKind, Result};

/// How hard zeros are looked for (QEMU: `detect-zeroes`; 004-7).
///
/// ```
/// assert!(lacuna::block::ZeroDetection::On > lacuna::block::ZeroDetection::Off);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ZeroDetection {
    /// Not at all.
    #[default]
    Off,
    /// Whole units of zeros become zero ranges that keep their space.
    On,
    /// The same, and their space may be given back.
    Unmap,
    /// The same, and where less than a unit is zeros, the rest of the unit is read to learn
    /// whether all of it is (004-5b).
    Thorough,
}

impl ZeroDetection {
    fn flags(self) -> ZeroFlags {
        match self {
            Self::Off | Self::On => ZeroFlags::empty(),
            Self::Unmap => ZeroFlags::MAY_UNMAP,
            Self::Thorough => ZeroFlags::MAY_UNMAP | ZeroFlags::THOROUGH,
        }
    }
}

/// A layer that turns writes of zeros into zero ranges.
///
/// Unlike QEMU it looks at every unit of a request, not only at requests that are all zeros. A
/// unit is what the layer below can make zero without writing bytes.
///
/// ```
/// use lacuna::block::{DetectZeroes, Layer, WriteFlags, ZeroDetection};
/// use lacuna::buffer::Buffer;
/// use lacuna::{raw::Raw, storage::MemoryStorage, units::GuestOffset};
///
/// pollster::block_on(async {
///     let disk = Raw::create(MemoryStorage::new(), 1 << 20).await?;
///     let disk = DetectZeroes::new(disk, ZeroDetection::Unmap);
///     disk.write(GuestOffset(0), Buffer::zeroed(65536), WriteFlags::empty()).await.0?;
///     assert!(disk.extents(disk.whole()).await?[0].status.is_hole);
///     Ok::<_, lacuna::Error>(())
/// }).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct DetectZeroes<L> {
    below: L,
    level: ZeroDetection,
}

impl<L: Layer> DetectZeroes<L> {
    /// Puts the detection on top of `below`.
    pub const fn new(below: L, level: ZeroDetection) -> Self {
        Self { below, level }
    }

    /// Returns the layer below.
    pub const fn below(&self) -> &L {
        &self.below
    }

    /// Returns how hard zeros are looked for.
    pub const fn level(&self) -> ZeroDetection {
        self.level
    }

    /// Gives the layer below back.
    pub fn into_below(self) -> L {
        self.below
    }

    async fn write_runs(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        let unit = self.below.zero_unit_bytes();
        let (mut at, mut rest, mut done) = (offset, buffer, None);
        while !rest.is_empty() {
            let run = leading_run(&rest, at.0 % unit, unit);
            let behind = rest.split_off(run.len);
            let (result, part) = self.write_run(at, rest, run.is_zero).await;
            at = at + run.len as u64;
            rest = behind;
            done = Some(Buffer::joined(done, part));
            if let Err(error) = result {
                return (Err(error), Buffer::joined(done, rest));
            }
        }
        (Ok(()), Buffer::joined(done, rest))
    }

    async fn write_run(&self, at: GuestOffset, bytes: Buffer, is_zero: bool) -> Transfer {
        if !is_zero {
            return self.write_data(at, bytes).await;
        }
        let range = GuestRange::new(at, bytes.len() as u64);
        (self.below.write_zeroes(range, self.level.flags()).await, bytes)
    }

    /// Writes what is not all zeros, but for ends in units that are zero already, or become so.
    async fn write_data(&self, at: GuestOffset, mut bytes: Buffer) -> Transfer {
        let ends = zero_ends(&bytes, at.0, self.below.zero_unit_bytes());
        let tail_start = at + (bytes.len() - ends.tail) as u64;
        let zeroed = match self.zero_end(GuestRange::new(at, ends.head as u64)).await {
            Ok(head) => match self.zero_end(GuestRange::new(tail_start, ends.tail as u64)).await {
                Ok(tail) => Ends { head: head as usize, tail: tail as usize },
                Err(error) => return (Err(error), bytes),
            },
            Err(error) => return (Err(error), bytes),
        };
        let tail = bytes.split_off(bytes.len() - zeroed.tail);
        let middle = bytes.split_off(zeroed.head);
        let (result, middle) =
            self.below.write(at + zeroed.head as u64, middle, WriteFlags::empty()).await;
        bytes.unsplit(middle);
        bytes.unsplit(tail);
        (result, bytes)
    }

    /// Returns how much of a part of a unit became zeros without a byte being written: all or
    /// nothing.
    async fn zero_end(&self, part: GuestRange) -> Result<u64> {
        if part.is_empty() {
            return Ok(0);
        }
        match self.below.write_zeroes(part, self.level.flags() | ZeroFlags::FAST).await {
            Ok(()) => Ok(part.len),
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// Says whether these bytes would be handed down as zeros.
    pub(crate) fn finds_zeros(&self, bytes: &[u8]) -> bool {
        self.level != ZeroDetection::Off && is_zero(bytes)
    }
}

/// Zeros at the ends of a request, less than a unit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Ends {
    head: usize,
    tail: usize,
}

/// Finds the parts of units at the ends of data that are all zeros, in units that the data does
/// not fill.
fn zero_ends(bytes: &[u8], at: u64, unit: u64) -> Ends {
    let len = bytes.len();
    let head = (at.next_multiple_of(unit) - at) as usize;
    let tail = ((at + len as u64) % unit) as usize;
    let zeros = |len: usize, part: Option<&[u8]>| if part.is_some_and(is_zero) { len } else { 0 };
    Ends {
        head: zeros(head, bytes.get(..head).filter(|_| head < len)),
        tail: zeros(tail, len.checked_sub(tail).filter(|from| *from > 0).map(|it| &bytes[it..])),
    }
}

/// Bytes that are handed down together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    len: usize,
    is_zero: bool,
}

/// Returns the leading run of `bytes`, which begin `phase` bytes into a unit.
///
/// Parts of units at the ends go with their neighbours: a few zeros beside data are data.
fn leading_run(bytes: &[u8], phase: u64, unit: u64) -> Run {
    let first = ((unit - phase) as usize).min(bytes.len());
    let mut run = Run { len: first, is_zero: is_zero(&bytes[..first]) };
    let mut is_part = phase > 0;
    while run.len < bytes.len() {
        let len = (unit as usize).min(bytes.len() - run.len);
        let next_is_zero = is_zero(&bytes[run.len..run.len + len]);
        let joins = match (run.is_zero, next_is_zero) {
            (true, false) => is_part,
            (false, true) => len < unit as usize,
            _ => true,
        };
        if !joins {
            break;
        }
        run = Run { len: run.len + len, is_zero: run.is_zero && next_is_zero };
        is_part = false;
    }
    run
}

impl<L: Layer> Layer for DetectZeroes<L> {
    fn size_bytes(&self) -> u64 {
        self.below.size_bytes()
    }

    fn is_read_only(&self) -> bool {
        self.below.is_read_only()
    }

    fn zero_unit_bytes(&self) -> u64 {
        self.below.zero_unit_bytes()
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        self.below.known_zeroes().await
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        self.below.read(offset, buffer).await
    }

    async fn write(&self, offset: GuestOffset, buffer: Buffer, flags: WriteFlags) -> Transfer {
        if self.level == ZeroDetection::Off {
            return self.below.write(offset, buffer, flags).await;
        }
        let (result, buffer) = Box::pin(self.write_runs(offset, buffer)).await;
        if result.is_ok() && flags.contains(WriteFlags::FUA) {
            return (self.below.flush().await, buffer);
        }
        (result, buffer)
    }

    fn host_source(&self, extent: &Extent) -> Option<HostSource> {
        self.below.host_source(extent)
    }

    async fn copy_from(&self, offset: GuestOffset, source: HostSource) -> Result<()> {
        match self.level {
            ZeroDetection::Off => self.below.copy_from(offset, source).await,
            _ => Err(Error::unsupported("What the host copies cannot be searched for zeros")),
        }
    }

    async fn write_zeroes(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        self.below.write_zeroes(range, flags).await
    }

    async fn discard(&self, range: GuestRange, mode: DiscardMode) -> Result<()> {
        self.below.discard(range, mode).await
    }

    async fn flush(&self) -> Result<()> {
        self.below.flush().await
    }

    async fn settled(&self) {
        self.below.settled().await;
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        self.below.extents(range).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cuts bytes given as one letter for each quarter of a unit: `0` zeros, anything else data.
    fn runs(picture: &str, phase_quarters: u64) -> Vec<(usize, bool)> {
        const QUARTER: usize = 128;
        let bytes: Vec<u8> = picture.bytes().flat_map(|letter| [letter - b'0'; QUARTER]).collect();
        let (mut at, mut found) = (0, Vec::new());
        while at < bytes.len() {
            let phase = (phase_quarters * QUARTER as u64 + at as u64) % 512;
            let run = leading_run(&bytes[at..], phase, 512);
            found.push((run.len / QUARTER, run.is_zero));
            at += run.len;
        }
        found
    }

    #[test]
    fn whole_units_of_zeros_are_found_between_data() {
        assert_eq!(runs("1111000011110000", 0), [(4, false), (4, true), (4, false), (4, true)]);
        assert_eq!(runs("0000000011110000", 0), [(8, true), (4, false), (4, true)]);
    }

    #[test]
    fn a_unit_with_one_byte_of_data_is_data() {
        assert_eq!(runs("00001000", 0), [(4, true), (4, false)]);
    }

    #[test]
    fn parts_of_units_go_with_their_neighbours() {
        // Starts three quarters into a unit.
        assert_eq!(runs("011110000", 3), [(5, false), (4, true)]);
        assert_eq!(runs("000001111", 3), [(5, true), (4, false)]);
        assert_eq!(runs("11110", 0), [(5, false)]);
        assert_eq!(runs("00000", 0), [(5, true)]);
        assert_eq!(runs("100000", 3), [(1, false), (5, true)]);
    }

    #[test]
    fn zeros_at_the_ends_are_found_in_units_of_their_own() {
        let ends = |picture: &str, phase_quarters: u64| {
            let bytes: Vec<u8> = picture.bytes().flat_map(|letter| [letter - b'0'; 128]).collect();
            let found = zero_ends(&bytes, phase_quarters * 128, 512);
            (found.head / 128, found.tail / 128)
        };
        assert_eq!(ends("0111100", 3), (1, 2));
        assert_eq!(ends("1111100", 0), (0, 0));
        assert_eq!(ends("11110", 0), (0, 1));
        // All in one unit: nothing of it is an end.
        assert_eq!(ends("011", 1), (0, 0));
        assert_eq!(ends("0110", 0), (0, 0));
    }

    #[test]
    fn a_short_request_of_zeros_is_one_run() {
        assert_eq!(runs("0", 1), [(1, true)]);
        assert_eq!(runs("00", 3), [(2, true)]);
        assert_eq!(runs("01", 3), [(2, false)]);
    }
}
