//! All layers below the top one, seen as one layer.
//!
//! * Never recursive: a request goes through the levels in a loop, so that the depth of a chain
//!   costs neither stack nor a future per level. Each level is opened as if it ended the chain.
//! * Never read where a level knows to be zero, never asked past the end of a shorter level: what
//!   that one lacks reads as zeros, whatever lies further down.
//! * Always unchanged while open: what one answer says stays true. So that a read does not have to ask
//!   every level again, which level decides is remembered, within a bound (`resolved`).

use parking_lot::Mutex;

use super::disk::Disk;
use super::resolved::{Resolved, Run, Source};
use crate::block::{
    AllocationDepth, BoxFuture, DynLayer, Extent, ExtentBuilder, ExtentCursor, ExtentStatus,
    KnownZeroes, Layer, no_status, step_aside,
};
use crate::buffer::Buffer;
use crate::storage::{HostSource, Storage, Transfer};
use crate::units::{GuestOffset, GuestRange};
use crate::{Error, ErrorKind, Result};

/// How many extents one answer holds at most, so that its memory stays bounded.
const EXTENTS_AT_ONCE: usize = 1024;

/// How much is found out at once of which level decides, at most: it costs a question to each level.
const WINDOW_BYTES: u64 = 2 << 20;

/// How many levels are asked before other futures of the thread have their turn.
const LEVELS_AT_ONCE: usize = 64;

/// The levels below the top one, the highest first; at least one.
pub(super) struct Below<S: Storage> {
    levels: Vec<Disk<S>>,
    resolved: Mutex<Resolved>,
    /// A power of two; a window lies in one piece of the tables of any level.
    window_bytes: u64,
}

impl<S: Storage> Below<S> {
    pub(super) fn new(levels: Vec<Disk<S>>) -> Self {
        let windows = levels.iter().map(one_piece_bytes);
        let window_bytes = windows.fold(WINDOW_BYTES, u64::min);
        Self { levels, resolved: Mutex::default(), window_bytes }
    }

    fn cursors(&self) -> Vec<ExtentCursor> {
        self.levels.iter().map(|_| ExtentCursor::default()).collect()
    }

    /// Goes down from the highest level until one decides what is at `rest.start`.
    async fn find(&self, cursors: &mut [ExtentCursor], rest: GuestRange) -> Result<Extent> {
        let at = rest.start;
        let (mut len, mut above) = (rest.len, ExtentStatus::UNALLOCATED);
        for (level, (disk, cursor)) in self.levels.iter().zip(cursors).enumerate() {
            let there = disk.size_bytes().saturating_sub(at.0);
            if there == 0 {
                break;
            }
            let extent = cursor.at(disk, GuestRange::new(at, rest.len.min(there))).await?;
            len = len.min(extent.range.len);
            if extent.status.depth == AllocationDepth::TOP {
                let status = ExtentStatus { depth: depth(level), ..extent.status };
                return Ok(Extent { range: GuestRange::new(at, len), status });
            }
            above = extent.status;
        }
        let status = ExtentStatus { depth: AllocationDepth::NOWHERE, reads_zero: true, ..above };
        Ok(Extent { range: GuestRange::new(at, len), status })
    }

    /// As [`find`](Self::find), by what is remembered, which only those may ask who do not go on for
    /// long: a walk is served better by long answers of each level.
    async fn look(&self, cursors: &mut [ExtentCursor], rest: GuestRange) -> Result<Extent> {
        let run = self.locate(rest).await?;
        let Source::Level(level) = run.source else { return self.find(cursors, run.range).await };
        let extent = cursors[level].at(&self.levels[level], run.range).await?;
        Ok(Extent { status: ExtentStatus { depth: depth(level), ..extent.status }, ..extent })
    }

    /// Returns which level decides what is at `rest.start`, and how far.
    async fn locate(&self, rest: GuestRange) -> Result<Run> {
        if let Some(run) = self.resolved.lock().at(rest) {
            return Ok(run);
        }
        let start = GuestOffset(rest.start.0 & !(self.window_bytes - 1));
        let len = self.window_bytes.min(self.size_bytes() - start.0);
        let runs = self.resolve(GuestRange::new(start, len)).await?;
        let mut resolved = self.resolved.lock();
        resolved.learn(runs);
        resolved.at(rest).ok_or_else(|| no_status(rest))
    }

    /// Finds out which level decides each byte of a window.
    async fn resolve(&self, window: GuestRange) -> Result<Vec<Run>> {
        let (mut decided, mut open) = (Vec::new(), vec![window]);
        for (level, disk) in self.levels.iter().enumerate() {
            if open.is_empty() {
                break;
            }
            if level % LEVELS_AT_ONCE == LEVELS_AT_ONCE - 1 {
                step_aside().await;
            }
            open = ask(level, disk, open, &mut decided).await?;
        }
        decided.extend(open.into_iter().map(|range| Run { range, source: Source::Nowhere }));
        decided.sort_unstable_by_key(|run| run.range.start);
        Ok(decided)
    }

    async fn fill(&self, run: Run, mut buffer: Buffer) -> Transfer {
        match run.source {
            Source::Level(level) => self.levels[level].read(run.range.start, buffer).await,
            Source::Nowhere => {
                buffer.fill(0);
                (Ok(()), buffer)
            }
        }
    }

    /// Reads what more than one level may decide.
    async fn read_levels(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        let (mut done, mut rest, mut at) = (None, buffer, offset);
        while !rest.is_empty() {
            let run = match self.locate(GuestRange::new(at, rest.len() as u64)).await {
                Ok(run) => run,
                Err(error) => return (Err(error), Buffer::joined(done, rest)),
            };
            let behind = rest.split_off(run.range.len as usize);
            let (result, part) = self.fill(run, rest).await;
            (done, rest, at) = (Some(Buffer::joined(done, part)), behind, run.range.end());
            if let Err(error) = result {
                return (Err(error), Buffer::joined(done, rest));
            }
        }
        (Ok(()), Buffer::joined(done, rest))
    }
}

/// Returns how many bytes of the disk one cached piece of a table is about, at least.
fn one_piece_bytes<S: Storage>(disk: &Disk<S>) -> u64 {
    const WIDEST_ENTRY: u64 = 16;
    let cluster = disk.as_qcow2().map(|image| image.geometry().cluster_bytes());
    cluster.map_or(u64::MAX, |cluster| cluster.min(4096) / WIDEST_ENTRY * cluster)
}

/// Asks a level which of the open ranges it decides; returns those that it does not.
async fn ask<S: Storage>(
    level: usize,
    disk: &Disk<S>,
    open: Vec<GuestRange>,
    decided: &mut Vec<Run>,
) -> Result<Vec<GuestRange>> {
    let (mut left, mut cursor) = (Vec::<GuestRange>::new(), ExtentCursor::default());
    for range in open {
        let there = disk.size_bytes().saturating_sub(range.start.0).min(range.len);
        let end = range.start + there;
        let beyond = GuestRange::new(end, range.len - there);
        if !beyond.is_empty() {
            decided.push(Run { range: beyond, source: Source::Nowhere });
        }
        let mut at = range.start;
        while at < end {
            let rest = GuestRange::new(at, end - at);
            // What a host says of a raw disk may change; that it decides everything does not.
            let (range, decides) = match disk {
                Disk::Raw(_) => (rest, true),
                _ => {
                    let extent = cursor.at(disk, rest).await?;
                    (extent.range, extent.status.depth == AllocationDepth::TOP)
                }
            };
            at = range.end();
            match (decides, left.last_mut()) {
                (true, _) => decided.push(Run { range, source: Source::Level(level) }),
                (false, Some(last)) if last.end() == range.start => last.len += range.len,
                (false, _) => left.push(range),
            }
        }
    }
    Ok(left)
}

/// How deep a level is, seen from the highest one here.
fn depth(level: usize) -> AllocationDepth {
    AllocationDepth(u32::try_from(level + 1).unwrap_or(u32::MAX))
}

impl<S: Storage> Layer for Below<S> {
    fn size_bytes(&self) -> u64 {
        self.levels.first().map_or(0, Layer::size_bytes)
    }

    fn zero_unit_bytes(&self) -> u64 {
        512
    }

    /// Each level knows of itself alone: all must.
    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        for level in &self.levels {
            if !level.known_zeroes().await?.open {
                return Ok(KnownZeroes::NOTHING);
            }
        }
        Ok(KnownZeroes { open: true, ..KnownZeroes::NOTHING })
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        match &self.levels[..] {
            // What it does not hold reads as zeros there.
            [only] => only.read(offset, buffer).await,
            _ => self.read_levels(offset, buffer).await,
        }
    }

    fn host_source(&self, extent: &Extent) -> Option<HostSource> {
        let level = extent.status.depth.0.checked_sub(1)? as usize;
        let status = ExtentStatus { depth: AllocationDepth::TOP, ..extent.status };
        self.levels.get(level)?.host_source(&Extent { status, ..*extent })
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        let mut cursors = self.cursors();
        let (mut builder, mut at) = (ExtentBuilder::default(), range.start);
        let is_short = range.len <= self.window_bytes && self.levels.len() > 1;
        while at < range.end() && builder.len() < EXTENTS_AT_ONCE {
            let rest = GuestRange::new(at, range.end() - at);
            let extent = match is_short {
                true => self.look(&mut cursors, rest).await?,
                false => self.find(&mut cursors, rest).await?,
            };
            at = extent.range.end();
            builder.push(extent);
        }
        Ok(builder.finish())
    }
}

/// What a lower level gets for a backing layer: one without a byte.
pub(super) struct Nothing;

impl DynLayer for Nothing {
    fn size(&self) -> u64 {
        0
    }

    fn read_boxed(&self, offset: GuestOffset, buffer: Buffer) -> BoxFuture<'_, Transfer> {
        let result = match buffer.is_empty() {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::OutOfBounds,
                format!("{} bytes at {offset} pass the end of an empty layer", buffer.len()),
            )),
        };
        Box::pin(std::future::ready((result, buffer)))
    }

    fn host_source_of(&self, _: &Extent) -> Option<HostSource> {
        None
    }

    fn known_zeroes_boxed(&self) -> BoxFuture<'_, Result<KnownZeroes>> {
        Box::pin(std::future::ready(Ok(KnownZeroes { open: true, ..KnownZeroes::NOTHING })))
    }

    fn extents_boxed(&self, _: GuestRange) -> BoxFuture<'_, Result<Vec<Extent>>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }
}
