//! Reads what a disk itself holds as data, window by window.
//!
//! * Only what the top layer's map calls data is read; the rest of a window is zeros.
//! * Memory: [`IN_FLIGHT`] windows, and one answer of extents.

use futures_util::{Stream, StreamExt, stream};

use crate::block::{Extent, ExtentCursor, Layer};
use crate::buffer::Buffer;
use crate::units::GuestRange;
use crate::{Error, ErrorKind, Result};

/// The least size of a window: large enough for disks that turn.
const WINDOW_BYTES: u64 = 1 << 20;
/// Windows that are read at the same time.
const IN_FLIGHT: usize = 4;

/// Returns the size of a window that is whole units.
pub(super) fn window_bytes(unit_bytes: u64) -> u64 {
    WINDOW_BYTES.max(unit_bytes)
}

/// A part of a disk, with its bytes.
pub(super) struct Window {
    /// Aligned to the size of a window, and cut at the end of the disk.
    pub(super) range: GuestRange,
    /// As long as a window, also where the disk ends before.
    pub(super) bytes: Buffer,
    /// What of it is data, in guest order.
    pub(super) parts: Vec<Extent>,
}

/// Returns the windows of `range`, a part of a disk that begins with a window, in guest order; those
/// without data have no bytes.
///
/// `unit_bytes`, a power of two, divides the size of a window.
pub(super) fn windows<L: Layer>(
    layer: &L,
    range: GuestRange,
    unit_bytes: u64,
) -> impl Stream<Item = Result<Window>> + Send + '_ {
    let step = window_bytes(unit_bytes);
    let start = (range.start, ExtentCursor::default());
    let ranges = stream::try_unfold(start, move |(at, mut cursor)| async move {
        // The disk may have shrunk meanwhile.
        let left = range.end().0.min(layer.size_bytes()).saturating_sub(at.0);
        if left == 0 {
            return Ok(None);
        }
        let rest = GuestRange::new(at, left);
        match next(layer, &mut cursor, rest, step).await {
            Err(error) if was_cut(layer, rest, &error) => Ok(None),
            found => found.map(|(range, parts)| Some(((range, parts), (range.end(), cursor)))),
        }
    });
    ranges
        .map(move |found| async move {
            let (range, parts) = found?;
            let nothing = Buffer::new(0);
            if parts.is_empty() {
                return Ok(Window { range, bytes: nothing, parts });
            }
            match read(layer, range, &parts, step).await {
                Err(error) if was_cut(layer, range, &error) => {
                    Ok(Window { range, bytes: nothing, parts: Vec::new() })
                }
                bytes => Ok(Window { range, bytes: bytes?, parts }),
            }
        })
        .buffered(IN_FLIGHT)
}

/// Says whether an error is of a disk that has become shorter than what was asked about.
fn was_cut<L: Layer>(layer: &L, asked: GuestRange, error: &Error) -> bool {
    error.kind() == ErrorKind::OutOfBounds && layer.size_bytes() < asked.end().0
}

/// Finds what comes next: as many whole windows without data as are known of, or one with its data.
async fn next<L: Layer>(
    layer: &L,
    cursor: &mut ExtentCursor,
    rest: GuestRange,
    step: u64,
) -> Result<(GuestRange, Vec<Extent>)> {
    let first = cursor.at(layer, rest).await?;
    let known_to = match first.range.end() == rest.end() {
        true => rest.end().0,
        false => first.range.end().0 / step * step,
    };
    if !first.is_own_data() && known_to > rest.start.0 {
        return Ok((GuestRange::new(rest.start, known_to - rest.start.0), Vec::new()));
    }
    let window = GuestRange::new(rest.start, rest.len.min(step - rest.start.0 % step));
    Ok((window, parts_of(layer, cursor, window).await?))
}

/// Finds what of a range is data.
async fn parts_of<L: Layer>(
    layer: &L,
    cursor: &mut ExtentCursor,
    range: GuestRange,
) -> Result<Vec<Extent>> {
    let (mut parts, mut at) = (Vec::new(), range.start);
    while at < range.end() {
        let found = cursor.at(layer, GuestRange::new(at, range.end() - at)).await?;
        at = found.range.end();
        parts.extend(found.is_own_data().then_some(found));
    }
    Ok(parts)
}

/// Returns one window, of `step` bytes or cut at the end of the disk, with its bytes if it has data.
pub(super) async fn window_at<L: Layer>(
    layer: &L,
    cursor: &mut ExtentCursor,
    range: GuestRange,
    step: u64,
) -> Result<Window> {
    // The whole rest is asked about, so that one answer serves many windows.
    let rest = GuestRange::new(range.start, layer.size_bytes().saturating_sub(range.start.0));
    cursor.at(layer, rest).await?;
    let parts = parts_of(layer, cursor, range).await?;
    let bytes = match parts.is_empty() {
        true => Buffer::new(0),
        false => read(layer, range, &parts, step).await?,
    };
    Ok(Window { range, bytes, parts })
}

async fn read<L: Layer>(
    layer: &L,
    range: GuestRange,
    parts: &[Extent],
    step: u64,
) -> Result<Buffer> {
    if let [part] = parts
        && part.range.len == step
    {
        return read_part(layer, range).await;
    }
    let mut bytes = Buffer::zeroed(step as usize);
    for part in parts {
        let content = read_part(layer, part.range).await?;
        let start = (part.range.start - range.start) as usize;
        bytes[start..start + content.len()].copy_from_slice(&content);
    }
    Ok(bytes)
}

async fn read_part<L: Layer>(layer: &L, range: GuestRange) -> Result<Buffer> {
    let (result, bytes) = layer.read(range.start, Buffer::new(range.len as usize)).await;
    result.map_err(|error| error.context(format!("Reading at guest offset {}", range.start)))?;
    Ok(bytes)
}
