//! A restore point in segments as a disk, read-only: each range comes from the highest point that
//! recorded it.
//!
//! * Always: what is read was checked against its checksum.
//! * Always bounded: indexes of [`INDEXES`] segments and [`FRAMES`] frames are kept in memory.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

use lacuna::block::{AllocationDepth, Extent, ExtentBuilder, ExtentStatus, KnownZeroes, Layer};
use lacuna::buffer::Buffer;
use lacuna::storage::Transfer;
use lacuna::units::{GuestOffset, GuestRange};
use lacuna::{Error, ErrorKind, Result};
use parking_lot::Mutex;

use crate::folder::{Folder, Point};
use crate::place::{Host, OpenAs, Place};
use crate::point::{Content, SegmentFacts};
use crate::segment::{Entry, Kind, Segment};

/// Indexes that are kept, of at most 1.2 MiB each.
const INDEXES: usize = 32;
/// Frames that are kept, of at most 1 MiB each.
const FRAMES: usize = 16;
/// Extents of one answer.
const EXTENTS_AT_ONCE: usize = 1024;

/// A restore point in segments as a read-only disk. Clones are the same disk.
///
/// ```no_run
/// use std::path::Path;
/// use lacuna::block::Layer;
/// use lacuna_backup::{Folder, PointDisk};
///
/// let folder = Folder::open(Path::new("backup"))?;
/// let points = folder.points()?;
/// let disk = PointDisk::open(&folder, &points.chain(points.find(None)?)?)?;
/// println!("{} bytes", disk.size_bytes());
/// # Ok::<_, lacuna::Error>(())
/// ```
pub struct PointDisk<P: Place = Host>(Arc<Inner<P>>);

struct Inner<P: Place> {
    place: P,
    size_bytes: u64,
    /// The highest first.
    levels: Vec<Level>,
    indexes: Recent<(usize, usize), Arc<Segment<P::Storage>>>,
    frames: Recent<(usize, usize, GuestOffset), Arc<Buffer>>,
}

/// What one point holds.
struct Level {
    size_bytes: u64,
    segments: Vec<SegmentFacts>,
    paths: Vec<PathBuf>,
}

/// Where a range comes from.
struct Found {
    range: GuestRange,
    depth: AllocationDepth,
    /// The segment and its entry; nothing where the range reads as zeros.
    stored: Option<(usize, usize, Entry)>,
}

impl<P: Place> Clone for PointDisk<P> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<P: Place> PointDisk<P> {
    /// Opens a point; `chain` is the point and those below, as [`Points::chain`](crate::Points::chain)
    /// gives them. Nothing is read yet.
    ///
    /// # Errors
    /// `InvalidRequest` for points that are no segments.
    pub fn open(folder: &Folder<P>, chain: &[Point]) -> Result<Self> {
        let levels: Result<Vec<Level>> = chain.iter().map(|point| level(folder, point)).collect();
        let levels = levels?;
        let size_bytes = levels.first().map_or(0, |level| level.size_bytes);
        let (indexes, frames) = (Recent::new(INDEXES), Recent::new(FRAMES));
        let place = folder.place().clone();
        Ok(Self(Arc::new(Inner { place, size_bytes, levels, indexes, frames })))
    }

    /// Finds where the bytes at `rest.start` come from, and how far that goes within `rest`.
    async fn find(&self, rest: GuestRange) -> Result<Found> {
        let (at, mut end) = (rest.start, rest.end());
        for (number, level) in self.0.levels.iter().enumerate() {
            if at.0 >= level.size_bytes {
                // That disk ended before, and what grew above it was zeros.
                break;
            }
            end = end.min(GuestOffset(level.size_bytes));
            let index = level.segments.partition_point(|segment| segment.end <= at.0);
            let Some(facts) = level.segments.get(index) else { continue };
            if facts.start > at.0 {
                end = end.min(GuestOffset(facts.start));
                continue;
            }
            let segment = self.segment(number, index).await?;
            match segment.index.at_or_behind(at) {
                Some(entry) if entry.range.contains(at) => {
                    let end = end.min(entry.range.end());
                    let stored = (entry.kind != Kind::Zero).then_some((number, index, *entry));
                    let depth = AllocationDepth(number as u32 + 1);
                    return Ok(Found { range: GuestRange::new(at, end - at), depth, stored });
                }
                Some(entry) => end = end.min(entry.range.start),
                None => end = end.min(GuestOffset(facts.end)),
            }
        }
        let range = GuestRange::new(at, end - at);
        Ok(Found { range, depth: AllocationDepth::NOWHERE, stored: None })
    }

    async fn segment(&self, level: usize, index: usize) -> Result<Arc<Segment<P::Storage>>> {
        if let Some(known) = self.0.indexes.find(&(level, index)) {
            return Ok(known);
        }
        let (path, facts) =
            (&self.0.levels[level].paths[index], &self.0.levels[level].segments[index]);
        let segment = open_segment(&self.0.place, path, facts).await?;
        let segment = Arc::new(segment);
        self.0.indexes.keep((level, index), Arc::clone(&segment));
        Ok(segment)
    }

    async fn frame(&self, level: usize, index: usize, entry: &Entry) -> Result<Arc<Buffer>> {
        let key = (level, index, entry.range.start);
        if let Some(known) = self.0.frames.find(&key) {
            return Ok(known);
        }
        let segment = self.segment(level, index).await?;
        let path = &self.0.levels[level].paths[index];
        let bytes = segment.content(entry).await.map_err(|error| error.context(path.display()))?;
        let bytes = Arc::new(bytes);
        self.0.frames.keep(key, Arc::clone(&bytes));
        Ok(bytes)
    }

    async fn fill(&self, offset: GuestOffset, buffer: &mut Buffer) -> Result<()> {
        let end = offset.0.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.0.size_bytes) {
            let text = format!("{} bytes at {offset} pass the end of the disk", buffer.len());
            return Err(Error::new(ErrorKind::OutOfBounds, text));
        }
        let mut done = 0;
        while done < buffer.len() {
            let rest = GuestRange::new(offset + done as u64, (buffer.len() - done) as u64);
            let found = self.find(rest).await?;
            let place = &mut buffer[done..done + found.range.len as usize];
            match found.stored {
                None => place.fill(0),
                Some((level, index, entry)) => {
                    let frame = self.frame(level, index, &entry).await?;
                    let from = (rest.start - entry.range.start) as usize;
                    place.copy_from_slice(&frame[from..from + place.len()]);
                }
            }
            done += found.range.len as usize;
        }
        Ok(())
    }
}

fn level(folder: &Folder<impl Place>, point: &Point) -> Result<Level> {
    let Content::Segments { segments } = &point.manifest.content else {
        return Err(Error::invalid(format!("Point '{}' is an image", point.name())));
    };
    let paths = (0..segments.len()).map(|number| folder.segment_path(point.name(), number));
    let (size_bytes, segments) = (point.manifest.facts.size, segments.clone());
    Ok(Level { size_bytes, paths: paths.collect(), segments })
}

/// Opens a segment that is to be the one of the manifest.
pub(crate) async fn open_segment<P: Place>(
    place: &P,
    path: &std::path::Path,
    facts: &SegmentFacts,
) -> Result<Segment<P::Storage>> {
    let opened = async { Segment::open(place.open(path, OpenAs::Unchanging)?).await };
    let segment = opened.await.map_err(|error| error.context(path.display()))?;
    let is_it = segment.file_bytes == facts.bytes
        && segment.index.checksum == facts.checksum
        && segment.index.covers == facts.covers();
    match is_it {
        true => Ok(segment),
        false => Err(Error::corrupt(format!(
            "{} is another segment than the manifest has",
            path.display()
        ))),
    }
}

/// The last few of something that is costly to get.
struct Recent<K, V> {
    most: usize,
    kept: Mutex<VecDeque<(K, V)>>,
}

impl<K: PartialEq, V: Clone> Recent<K, V> {
    fn new(most: usize) -> Self {
        Self { most, kept: Mutex::default() }
    }

    fn find(&self, key: &K) -> Option<V> {
        let mut kept = self.kept.lock();
        let index = kept.iter().position(|(known, _)| known == key)?;
        let found = kept.remove(index)?;
        let value = found.1.clone();
        kept.push_back(found);
        Some(value)
    }

    fn keep(&self, key: K, value: V) {
        let mut kept = self.kept.lock();
        while kept.len() >= self.most {
            kept.pop_front();
        }
        kept.push_back((key, value));
    }
}

impl<P: Place> Layer for PointDisk<P> {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes
    }

    fn zero_unit_bytes(&self) -> u64 {
        512
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        Ok(KnownZeroes::NOTHING)
    }

    async fn read(&self, offset: GuestOffset, mut buffer: Buffer) -> Transfer {
        (self.fill(offset, &mut buffer).await, buffer)
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        let end = range.start.checked_add(range.len);
        if end.is_none_or(|end| end.0 > self.0.size_bytes) {
            let text = format!("{} bytes at {} pass the end of the disk", range.len, range.start);
            return Err(Error::new(ErrorKind::OutOfBounds, text));
        }
        let (mut builder, mut at) = (ExtentBuilder::default(), range.start);
        while at < range.end() && builder.len() < EXTENTS_AT_ONCE {
            let found = self.find(GuestRange::new(at, range.end() - at)).await?;
            at = found.range.end();
            builder.push(Extent { range: found.range, status: status(&found) });
        }
        Ok(builder.finish())
    }
}

fn status(found: &Found) -> ExtentStatus {
    let reads_zero = found.stored.is_none();
    let is_compressed = found.stored.is_some_and(|(_, _, entry)| entry.kind == Kind::Zstd);
    ExtentStatus { depth: found.depth, reads_zero, is_hole: reads_zero, is_compressed, host: None }
}
