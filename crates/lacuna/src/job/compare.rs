//! Says whether two disks read the same, and where they first do not.
//!
//! * Never reads a range that both sides know to be zero, and reads only the other side where one
//!   of them knows.
//! * Where one disk is longer, its tail must read as zeros to count as the same.
//! * Memory: two buffers of [`REQUEST_BYTES`].

use futures_util::future::join;

use crate::block::{AllocationDepth, ExtentCursor, ExtentStatus, Layer, first_nonzero};
use crate::buffer::Buffer;
use crate::units::{GuestOffset, GuestRange};
use crate::{Error, Result};

/// How many bytes of each disk are looked at in one go.
const REQUEST_BYTES: u64 = 2 << 20;

/// What the disks are called in errors.
const FIRST: &str = "first";
const SECOND: &str = "second";

/// What counts as the same.
///
/// ```
/// assert_ne!(lacuna::job::Strictness::Content, lacuna::job::Strictness::Allocation);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strictness {
    /// What a guest reads, a zero tail of the longer disk aside.
    #[default]
    Content,
    /// Also the size, and for every range whether it is allocated, compressed or known to be zero.
    Allocation,
}

/// How to compare.
///
/// ```
/// use lacuna::job::{CompareOptions, Strictness};
/// assert_eq!(CompareOptions::default().strictness, Strictness::Content);
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct CompareOptions {
    /// What counts as the same.
    pub strictness: Strictness,
}

/// The first thing in which two disks differ.
///
/// ```
/// use lacuna::job::Difference;
/// use lacuna::units::GuestOffset;
/// assert_eq!(Difference::Content(GuestOffset(513)).sector(), Some(GuestOffset(512)));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// The sizes differ, and the comparison is strict.
    Size,
    /// The bytes differ; the offset of the first such byte.
    Content(GuestOffset),
    /// The allocation differs; the offset where that begins.
    Allocation(GuestOffset),
}

impl Difference {
    /// Returns the start of the 512-byte sector in which the disks differ (what QEMU reports).
    #[must_use]
    pub const fn sector(self) -> Option<GuestOffset> {
        match self {
            Self::Size => None,
            Self::Content(at) | Self::Allocation(at) => Some(GuestOffset(at.0 / 512 * 512)),
        }
    }
}

/// What a comparison found.
///
/// ```
/// use lacuna::job::Comparison;
/// let same = Comparison { difference: None, sizes_differ: true };
/// assert!(same.is_identical());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// The first difference in guest order.
    pub difference: Option<Difference>,
    /// One disk is longer than the other.
    pub sizes_differ: bool,
}

impl Comparison {
    /// Says whether nothing differs that counts.
    #[must_use]
    pub const fn is_identical(&self) -> bool {
        self.difference.is_none()
    }
}

/// Compares two disks up to the first difference.
///
/// `progress` is told how many bytes are done, of the larger size.
///
/// # Errors
/// What reading and asking for extents give.
///
/// ```
/// use lacuna::job::{self, CompareOptions};
/// use lacuna::{raw::Raw, storage::MemoryStorage};
///
/// pollster::block_on(async {
///     let short = Raw::create(MemoryStorage::new(), 4096).await?;
///     let long = Raw::create(MemoryStorage::new(), 1 << 40).await?;
///     let found = job::compare(&short, &long, CompareOptions::default(), &mut |_, _| ()).await?;
///     assert!(found.is_identical() && found.sizes_differ);
///     Ok::<_, lacuna::Error>(())
/// }).unwrap();
/// ```
pub async fn compare<A: Layer, B: Layer>(
    first: &A,
    second: &B,
    options: CompareOptions,
    progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<Comparison> {
    let sizes = (first.size_bytes(), second.size_bytes());
    let sizes_differ = sizes.0 != sizes.1;
    let (common, longest) = (sizes.0.min(sizes.1), sizes.0.max(sizes.1));
    if sizes_differ && options.strictness == Strictness::Allocation {
        return Ok(Comparison { difference: Some(Difference::Size), sizes_differ });
    }
    let mut report = |done: u64| progress(done, longest);
    let mut difference = common_part(first, second, common, options, &mut report).await?;
    if difference.is_none() {
        difference = match sizes.0 > sizes.1 {
            true => tail((first, FIRST), common, &mut report).await?,
            false => tail((second, SECOND), common, &mut report).await?,
        };
    }
    Ok(Comparison { difference, sizes_differ })
}

/// Compares what both disks have.
async fn common_part<A: Layer, B: Layer>(
    first: &A,
    second: &B,
    common: u64,
    options: CompareOptions,
    report: &mut (dyn FnMut(u64) + Send),
) -> Result<Option<Difference>> {
    let mut cursors = (ExtentCursor::default(), ExtentCursor::default());
    let mut at = GuestOffset(0);
    while at.0 < common {
        report(at.0);
        let rest = GuestRange::new(at, common - at.0);
        let statuses = (
            cursors.0.at(first, rest).await.map_err(unasked(FIRST))?,
            cursors.1.at(second, rest).await.map_err(unasked(SECOND))?,
        );
        let same = statuses.0.range.len.min(statuses.1.range.len);
        let (left, right) = (statuses.0.status, statuses.1.status);
        if options.strictness == Strictness::Allocation && facts(left) != facts(right) {
            return Ok(Some(Difference::Allocation(at)));
        }
        let range = GuestRange::new(at, same);
        let differs = match (left.reads_zero, right.reads_zero) {
            (true, true) => None,
            (true, false) => nonzero((second, SECOND), range, report).await?,
            (false, true) => nonzero((first, FIRST), range, report).await?,
            (false, false) => bytes(first, second, range, report).await?,
        };
        if let Some(offset) = differs {
            return Ok(Some(Difference::Content(offset)));
        }
        at = range.end();
    }
    Ok(None)
}

/// Looks for something in the tail that only `longer` has.
async fn tail<L: Layer>(
    longer: (&L, &str),
    from: u64,
    report: &mut (dyn FnMut(u64) + Send),
) -> Result<Option<Difference>> {
    let mut cursor = ExtentCursor::default();
    let (mut at, end) = (GuestOffset(from), longer.0.size_bytes());
    while at.0 < end {
        report(at.0);
        let rest = GuestRange::new(at, end - at.0);
        let extent = cursor.at(longer.0, rest).await.map_err(unasked(longer.1))?;
        if !extent.status.reads_zero
            && let Some(offset) = nonzero(longer, extent.range, report).await?
        {
            return Ok(Some(Difference::Content(offset)));
        }
        at = extent.range.end();
    }
    report(end);
    Ok(None)
}

/// What a strict comparison looks at; where the bytes lie in the host is nobody's business.
fn facts(status: ExtentStatus) -> (bool, bool, bool) {
    (status.depth != AllocationDepth::NOWHERE, status.reads_zero, status.is_compressed)
}

fn steps(range: GuestRange) -> impl Iterator<Item = GuestRange> + Send {
    (0..range.len.div_ceil(REQUEST_BYTES)).map(move |index| {
        let skipped = index * REQUEST_BYTES;
        GuestRange::new(range.start + skipped, (range.len - skipped).min(REQUEST_BYTES))
    })
}

/// Finds the first byte in `range` that is not zero.
async fn nonzero<L: Layer>(
    (layer, which): (&L, &str),
    range: GuestRange,
    report: &mut (dyn FnMut(u64) + Send),
) -> Result<Option<GuestOffset>> {
    for step in steps(range) {
        report(step.start.0);
        let content = read(layer, which, step).await?;
        if let Some(place) = first_nonzero(&content) {
            return Ok(Some(step.start + place as u64));
        }
    }
    Ok(None)
}

/// Finds the first byte in `range` that differs.
async fn bytes<A: Layer, B: Layer>(
    first: &A,
    second: &B,
    range: GuestRange,
    report: &mut (dyn FnMut(u64) + Send),
) -> Result<Option<GuestOffset>> {
    for step in steps(range) {
        report(step.start.0);
        let both = join(read(first, FIRST, step), read(second, SECOND, step)).await;
        let (left, right) = (both.0?, both.1?);
        if *left != *right {
            let place = left.iter().zip(&*right).position(|(left, right)| left != right);
            return Ok(place.map(|place| step.start + place as u64));
        }
    }
    Ok(None)
}

async fn read<L: Layer>(layer: &L, which: &str, step: GuestRange) -> Result<Buffer> {
    let (result, buffer) = layer.read(step.start, Buffer::new(step.len as usize)).await;
    let at = step.start.0;
    result
        .map(|()| buffer)
        .map_err(|error| error.context(format!("Reading the {which} disk at offset {at}")))
}

/// Says of which disk the extents cannot be told.
fn unasked(which: &str) -> impl Fn(Error) -> Error + '_ {
    move |error| error.context(format!("Asking the {which} disk for its extents"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::WriteFlags;
    use crate::raw::Raw;
    use crate::storage::MemoryStorage;
    use pollster::block_on;

    fn disk(size: u64, writes: &[(u64, &[u8])]) -> Raw<MemoryStorage> {
        let disk = block_on(Raw::create(MemoryStorage::new(), size)).unwrap();
        for (offset, bytes) in writes {
            let buffer = Buffer::from(*bytes);
            block_on(disk.write(GuestOffset(*offset), buffer, WriteFlags::empty())).0.unwrap();
        }
        disk
    }

    fn found(
        first: &Raw<MemoryStorage>,
        second: &Raw<MemoryStorage>,
        strictness: Strictness,
    ) -> Comparison {
        block_on(compare(first, second, CompareOptions { strictness }, &mut |_, _| ())).unwrap()
    }

    #[test]
    fn written_zeros_equal_a_hole_unless_strict() {
        let (hole, zeros) = (disk(1 << 20, &[]), disk(1 << 20, &[(8192, &[0; 4096])]));
        assert!(found(&hole, &zeros, Strictness::Content).is_identical());
        let strict = found(&hole, &zeros, Strictness::Allocation);
        assert_eq!(strict.difference, Some(Difference::Allocation(GuestOffset(8192))));
    }

    #[test]
    fn the_first_differing_byte_is_named() {
        let far = 5 << 20;
        let first = disk(8 << 20, &[(far, b"abcdef")]);
        let second = disk(8 << 20, &[(far, b"abcdeX")]);
        let offset = GuestOffset(far + 5);
        for (left, right) in [(&first, &second), (&second, &first)] {
            let found = found(left, right, Strictness::Content);
            assert_eq!(found.difference, Some(Difference::Content(offset)));
        }
        let empty = disk(8 << 20, &[]);
        for (left, right) in [(&first, &empty), (&empty, &first)] {
            let found = found(left, right, Strictness::Content);
            assert_eq!(found.difference, Some(Difference::Content(GuestOffset(far))));
        }
    }

    #[test]
    fn a_longer_disk_may_only_add_zeros() {
        let short = disk(1 << 20, &[(0, b"same")]);
        let zeros = disk(1 << 40, &[(0, b"same"), (2 << 20, &[0; 512])]);
        let data = disk(1 << 40, &[(0, b"same"), (3 << 30, b"more")]);
        let same = found(&short, &zeros, Strictness::Content);
        assert!(same.is_identical() && same.sizes_differ);
        let differs = found(&data, &short, Strictness::Content);
        assert_eq!(differs.difference, Some(Difference::Content(GuestOffset(3 << 30))));
        let strict = found(&short, &zeros, Strictness::Allocation);
        assert_eq!(strict.difference, Some(Difference::Size));
    }

    #[test]
    fn progress_rises_to_the_larger_size() {
        let (short, long) = (disk(1 << 20, &[(0, &[1; 4096])]), disk(4 << 20, &[(0, &[1; 4096])]));
        let mut seen = Vec::new();
        block_on(compare(&short, &long, CompareOptions::default(), &mut |done, all| {
            seen.push((done, all));
        }))
        .unwrap();
        assert!(seen.is_sorted() && seen.iter().all(|(_, all)| *all == 4 << 20), "{seen:?}");
        assert_eq!(seen.last(), Some(&(4 << 20, 4 << 20)));
    }
}
