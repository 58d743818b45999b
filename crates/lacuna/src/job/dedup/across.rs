//! What several disks hold at the same places, moved to one that they stand on.
//!
//! * A backing file shows through at the same place only: clusters are compared with those of the same
//!   offset in the other disks, byte by byte, and nothing is remembered.
//! * Nothing is changed here but the two disks that are written.
//! * Memory: a window for each disk, and one more.

use super::walk::{Window, window_at, window_bytes};
use crate::block::{ExtentCursor, Layer, WriteFlags, ZeroFlags, is_zero};
use crate::buffer::Buffer;
use crate::job::convert::Target;
use crate::units::{GuestOffset, GuestRange};
use crate::{Error, Result};

/// Writes to `base`, which reads as zeros, each cluster that at least two disks hold at the same place:
/// the content that most of them have there, if it is not zeros. Returns how many bytes that were;
/// durable on return.
///
/// `progress` is told how many bytes of the longest disk lie behind, and how many there are.
///
/// # Errors
/// `InvalidRequest` where the base is shorter than a disk; else what reading and writing give.
///
/// ```
/// use lacuna::block::{Layer, WriteFlags};
/// use lacuna::buffer::Buffer;
/// use lacuna::job::gather_common;
/// use lacuna::{raw::Raw, storage::MemoryStorage, units::GuestOffset};
///
/// pollster::block_on(async {
///     let (first, second) = (disk().await?, disk().await?);
///     for disk in [&first, &second] {
///         let bytes = Buffer::from(&[7; 8192][..]);
///         disk.write(GuestOffset(65536), bytes, WriteFlags::empty()).await.0?;
///     }
///     first.write(GuestOffset(0), Buffer::from(&[1; 4096][..]), WriteFlags::empty()).await.0?;
///     let base = disk().await?;
///     let common = gather_common(&[&first, &second], &base, 4096, &mut |_, _| ()).await?;
///     assert_eq!(common, 8192);
///     Ok::<_, lacuna::Error>(())
/// }).unwrap();
/// # async fn disk() -> lacuna::Result<Raw<MemoryStorage>> {
/// #     Raw::create(MemoryStorage::new(), 1 << 20).await
/// # }
/// ```
pub async fn gather_common<L: Layer, B: Layer>(
    disks: &[&L],
    base: &B,
    cluster_bytes: u64,
    progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<u64> {
    check_cluster(cluster_bytes)?;
    let total = disks.iter().map(|disk| disk.size_bytes()).max().unwrap_or(0);
    if base.size_bytes() < total {
        return Err(Error::invalid("The base is shorter than a disk that is to stand on it"));
    }
    let step = window_bytes(cluster_bytes);
    let mut cursors: Vec<_> = disks.iter().map(|_| ExtentCursor::default()).collect();
    let mut common_bytes = 0;
    for start in (0..total).step_by(step as usize) {
        progress(start, total);
        let mut windows = Vec::new();
        for (disk, cursor) in disks.iter().zip(&mut cursors) {
            windows.extend(window_of(*disk, cursor, start, step).await?);
        }
        windows.retain(|window| !window.parts.is_empty());
        if windows.len() > 1 {
            common_bytes += write_common(&windows, base, start, cluster_bytes).await?;
        }
    }
    base.flush().await?;
    progress(total, total);
    Ok(common_bytes)
}

fn check_cluster(cluster_bytes: u64) -> Result<()> {
    match cluster_bytes.is_power_of_two() && (512..=2 << 20).contains(&cluster_bytes) {
        true => Ok(()),
        false => Err(Error::invalid("A cluster has a power of two from 512 bytes to 2 MiB")),
    }
}

/// Returns the window that starts at `start`, if the disk is long enough to have it.
async fn window_of<L: Layer>(
    disk: &L,
    cursor: &mut ExtentCursor,
    start: u64,
    step: u64,
) -> Result<Option<Window>> {
    let len = disk.size_bytes().saturating_sub(start).min(step);
    match len {
        0 => Ok(None),
        len => {
            let range = GuestRange::new(GuestOffset(start), len);
            window_at(disk, cursor, range, step).await.map(Some)
        }
    }
}

async fn write_common<B: Layer>(
    windows: &[Window],
    base: &B,
    start: u64,
    cluster_bytes: u64,
) -> Result<u64> {
    let size = cluster_bytes as usize;
    let (mut run, mut run_start, mut written) = (Vec::new(), 0, 0);
    let clusters = windows[0].bytes.len() / size;
    for index in 0..=clusters {
        let at = index * size;
        let common = if index < clusters { common_at(windows, at..at + size) } else { None };
        if let Some(bytes) = common {
            if run.is_empty() {
                run_start = at;
            }
            run.extend_from_slice(bytes);
        } else if !run.is_empty() {
            let offset = GuestOffset(start + run_start as u64);
            let room = base.size_bytes() - offset.0;
            run.truncate(room.min(run.len() as u64) as usize);
            written += run.len() as u64;
            base.write(offset, Buffer::from(&run[..]), WriteFlags::empty()).await.0?;
            run.clear();
        }
    }
    Ok(written)
}

/// Returns the content that most windows have there, if at least two do and it is not zeros.
fn common_at(windows: &[Window], at: std::ops::Range<usize>) -> Option<&[u8]> {
    let contents: Vec<&[u8]> = windows.iter().map(|window| &window.bytes[at.clone()]).collect();
    let mut best: Option<(&[u8], usize)> = None;
    for (index, content) in contents.iter().enumerate() {
        let count = contents[index..].iter().filter(|other| *other == content).count();
        if count > best.map_or(1, |(_, most)| most) && !is_zero(content) {
            best = Some((content, count));
        }
    }
    best.map(|(content, _)| content)
}

/// Writes to `overlay`, which shows `base` and nothing of its own, what `disk` holds and the base does
/// not. The overlay then reads as the disk does. Returns how many bytes were written as data; durable
/// on return.
///
/// What the disk stores compressed is stored so again.
///
/// # Errors
/// `InvalidRequest` where the overlay has another size than the disk; else what reading and writing
/// give.
///
/// ```
/// use lacuna::job::write_difference;
/// use lacuna::{raw::Raw, storage::MemoryStorage};
///
/// pollster::block_on(async {
///     let disk = Raw::create(MemoryStorage::new(), 1 << 20).await?;
///     let base = Raw::create(MemoryStorage::new(), 1 << 20).await?;
///     let overlay = Raw::create(MemoryStorage::new(), 1 << 20).await?;
///     let written = write_difference(&disk, &base, &overlay, 4096, &mut |_, _| ()).await?;
///     assert_eq!(written, 0);
///     Ok::<_, lacuna::Error>(())
/// }).unwrap();
/// ```
pub async fn write_difference<L: Layer, B: Layer, T: Target>(
    disk: &L,
    base: &B,
    overlay: &T,
    cluster_bytes: u64,
    progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<u64> {
    check_cluster(cluster_bytes)?;
    let total = disk.size_bytes();
    if overlay.size_bytes() != total {
        return Err(Error::invalid("The overlay has another size than the disk"));
    }
    let step = window_bytes(cluster_bytes);
    let mut cursors = (ExtentCursor::default(), ExtentCursor::default());
    let mut written = 0;
    for start in (0..total).step_by(step as usize) {
        progress(start, total);
        let own = window_of(disk, &mut cursors.0, start, step).await?;
        let below = window_of(base, &mut cursors.1, start, step).await?;
        if let Some(own) = own {
            written += write_window(&own, below.as_ref(), overlay, cluster_bytes).await?;
        }
    }
    overlay.flush().await?;
    progress(total, total);
    Ok(written)
}

async fn write_window<T: Target>(
    own: &Window,
    below: Option<&Window>,
    overlay: &T,
    cluster_bytes: u64,
) -> Result<u64> {
    let below = below.filter(|window| !window.parts.is_empty());
    if own.parts.is_empty() && below.is_none() {
        return Ok(0);
    }
    let (size, mut written) = (cluster_bytes as usize, 0);
    for at in (0..own.range.len as usize).step_by(size) {
        let offset = own.range.start + at as u64;
        let len = size.min(own.range.len as usize - at);
        let content = part(Some(own), at, len);
        if content == part(below, at, len) {
            continue;
        }
        let is_compressed =
            own.parts.iter().any(|part| part.status.is_compressed && part.range.contains(offset));
        match content {
            None => {
                let range = GuestRange::new(offset, len as u64);
                overlay.write_zeroes(range, ZeroFlags::MAY_UNMAP).await?;
                continue;
            }
            Some(bytes) if is_compressed && overlay.encoder().is_some() => {
                overlay.write_compressed(offset, Buffer::from(bytes)).await.0?;
            }
            Some(bytes) => {
                overlay.write(offset, Buffer::from(bytes), WriteFlags::empty()).await.0?;
            }
        }
        written += len as u64;
    }
    Ok(written)
}

/// Returns the bytes of a cluster; nothing where they are zeros.
fn part(window: Option<&Window>, at: usize, len: usize) -> Option<&[u8]> {
    let bytes = window?.bytes.get(at..at + len)?;
    (!is_zero(bytes)).then_some(bytes)
}
