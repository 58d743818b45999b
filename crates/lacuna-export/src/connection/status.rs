//! Block status: what is known of a range, in each context that was chosen.
//!
//! * Never reads guest bytes.
//! * Bounded: an answer stops after [`MAX_ANSWERS`] of the disk's answers, and the client asks on
//!   from there.

use std::sync::Arc;

use lacuna::block::{AllocationDepth, Extent};
use lacuna::units::GuestRange;
use lacuna::{Error, Result};
use lacuna_nbd::ContextId;
use lacuna_nbd::context::{DIRTY, LayersStatus};
use lacuna_nbd::server::{Last, Replies, Request, StatusExtent};
use lacuna_nbd::wire::{AllocationFlags, CommandFlags};
use smallvec::{SmallVec, smallvec};

use super::execute::{count, guest};
use super::reply::Part;
use crate::facts::{Fact, Layers};
use crate::{DirtyRun, Export, ServedDisk};

/// Answers of the disk that go into one of ours.
const MAX_ANSWERS: usize = 256;
/// Answers after which other requests and connections are looked at.
const ANSWERS_AT_ONCE: usize = 16;
/// Extents after which an answer is long enough.
const ENOUGH_EXTENTS: usize = 16 << 10;
/// Bytes of such an answer in one context.
pub(super) const ENOUGH_BYTES: u64 = (ENOUGH_EXTENTS * size_of::<StatusExtent>()) as u64;

/// The contexts to be answered, in their order.
pub(super) type Wanted = SmallVec<[ContextId; 4]>;

pub(super) async fn answer<D: ServedDisk>(
    export: &Arc<Export<D>>,
    replies: Replies,
    request: &Request,
    wanted: &Wanted,
) -> Result<SmallVec<[Part; 1]>> {
    count(&export.counters.statuses, 1);
    if wanted.is_empty() || request.range.len == 0 {
        return Ok(smallvec![Part::Header(replies.end(request.tag))]);
    }
    let mut text = Vec::new();
    let minimum = export.options().block_sizes.minimum();
    for (nth, id) in wanted.iter().enumerate() {
        let fact = export.fact(*id).ok_or_else(|| Error::invalid("No such context"))?;
        let extents = learn(export.disk(), fact, request).await?;
        let last = if nth + 1 == wanted.len() { Last::Yes } else { Last::No };
        replies.block_status(request, *id, extents, minimum, last, &mut text);
    }
    Ok(smallvec![Part::Text(text)])
}

async fn learn<D: ServedDisk>(
    disk: &D,
    fact: &Fact,
    request: &Request,
) -> Result<Vec<StatusExtent>> {
    let range = guest(request.range);
    let wants_one = request.flags.contains(CommandFlags::REQ_ONE);
    match fact {
        Fact::Allocation => {
            let ask = async |rest| Ok(statuses(&disk.extents(rest).await?, rest, allocation));
            collect(range, wants_one, ask).await
        }
        Fact::Depth => {
            let sizes = disk.level_sizes();
            let ask = async |rest| Ok(depths(&disk.extents(rest).await?, rest, &sizes));
            collect(range, wants_one, ask).await
        }
        Fact::Dirty(bitmap) => {
            let ask = async |rest| Ok(dirty(&disk.dirty(bitmap, rest).await?, rest, DIRTY));
            collect(range, wants_one, ask).await
        }
        Fact::Layers(of) => {
            let ask = async |rest| layers(disk, of, rest).await;
            collect(range, wants_one, ask).await
        }
    }
}

/// Asks until the range is covered, or enough is known: one extent of one status, or many.
async fn collect(
    range: GuestRange,
    wants_one: bool,
    ask: impl AsyncFn(GuestRange) -> Result<Vec<StatusExtent>>,
) -> Result<Vec<StatusExtent>> {
    let mut known: Vec<StatusExtent> = Vec::new();
    let mut rest = range;
    for round in 1..=MAX_ANSWERS {
        for extent in ask(rest).await? {
            rest = GuestRange::new(rest.start + extent.len, rest.len - extent.len);
            match known.last_mut() {
                Some(last) if last.flags == extent.flags => last.len += extent.len,
                _ => known.push(extent),
            }
        }
        if rest.is_empty() || wants_one && known.len() > 1 || known.len() >= ENOUGH_EXTENTS {
            break;
        }
        if round % ANSWERS_AT_ONCE == 0 {
            // Others have their turn.
            tokio::task::yield_now().await;
        }
    }
    Ok(known)
}

/// Says of each extent within `range` what `flags` makes of it.
fn statuses(
    extents: &[Extent],
    range: GuestRange,
    flags: impl Fn(&Extent) -> u64,
) -> Vec<StatusExtent> {
    let within = |extent: &Extent| extent.range.end().min(range.end()) - extent.range.start;
    extents.iter().map(|it| StatusExtent { len: within(it), flags: flags(it) }).collect()
}

/// Hole and zero, each for itself (003-4).
fn allocation(extent: &Extent) -> u64 {
    let mut flags = AllocationFlags::empty();
    flags.set(AllocationFlags::HOLE, extent.status.is_hole);
    flags.set(AllocationFlags::ZERO, extent.status.reads_zero);
    flags.bits().into()
}

/// Says which level supplies the bytes. Behind the end of a short level it is that level, as QEMU
/// has it (A.4.1); elsewhere what no level allocates comes from nowhere.
fn depths(extents: &[Extent], range: GuestRange, sizes: &[u64]) -> Vec<StatusExtent> {
    let mut known = Vec::new();
    for extent in extents {
        let (mut at, end) = (extent.range.start.0, extent.range.end().min(range.end()).0);
        let depth = extent.status.depth;
        while at < end {
            let below = || sizes.iter().enumerate().skip(1);
            let short = below().find(|(_, size)| **size <= at).map_or(0, |(level, _)| level + 1);
            let (flags, next) = match depth {
                AllocationDepth::NOWHERE => {
                    let edge = below().map(|(_, size)| *size).filter(|size| *size > at).min();
                    (short as u64, edge.unwrap_or(end).min(end))
                }
                depth => (depth.0.into(), end),
            };
            known.push(StatusExtent { len: next - at, flags });
            at = next;
        }
    }
    known
}

fn dirty(runs: &[DirtyRun], range: GuestRange, flag: u64) -> Vec<StatusExtent> {
    let within = |run: &DirtyRun| run.range.end().min(range.end()) - run.range.start;
    let flags = |run: &DirtyRun| if run.is_dirty { flag } else { 0 };
    runs.iter().map(|run| StatusExtent { len: within(run), flags: flags(run) }).collect()
}

/// Zero, and for each level whether it allocates the range and whether it is dirty there.
async fn layers<D: ServedDisk>(
    disk: &D,
    of: &Layers,
    range: GuestRange,
) -> Result<Vec<StatusExtent>> {
    let zero = |extent: &Extent| match extent.status.reads_zero {
        true => LayersStatus::default().with_zero().0,
        false => 0,
    };
    let mut known = statuses(&disk.extents(range).await?, range, zero);
    for (level, bitmap) in of.bitmaps.iter().enumerate() {
        let bit = u32::try_from(level).unwrap_or(LayersStatus::LEVELS);
        let allocated = LayersStatus::default().with_allocated(bit).0;
        let here = |extent: &Extent| if extent.status.depth.0 == 1 { allocated } else { 0 };
        known = both(&known, &statuses(&disk.level_extents(level, range).await?, range, here));
        if let Some(bitmap) = bitmap {
            let flag = LayersStatus::default().with_dirty(bit).0;
            known =
                both(&known, &dirty(&disk.level_dirty(level, bitmap, range).await?, range, flag));
        }
    }
    Ok(known)
}

/// Joins what two lists say, as far as both reach.
fn both(one: &[StatusExtent], other: &[StatusExtent]) -> Vec<StatusExtent> {
    let mut joined = Vec::with_capacity(one.len().max(other.len()));
    let (mut left, mut right) = (one.iter().copied(), other.iter().copied());
    let (mut a, mut b) = (left.next(), right.next());
    while let (Some(first), Some(second)) = (a, b) {
        let len = first.len.min(second.len);
        joined.push(StatusExtent { len, flags: first.flags | second.flags });
        let rest = |it: StatusExtent| StatusExtent { len: it.len - len, ..it };
        a = if first.len == len { left.next() } else { Some(rest(first)) };
        b = if second.len == len { right.next() } else { Some(rest(second)) };
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_of_two_lists_hold_where_both_reach() {
        let one = [StatusExtent { len: 4, flags: 1 }, StatusExtent { len: 4, flags: 0 }];
        let other = [StatusExtent { len: 6, flags: 2 }];
        let expected = [StatusExtent { len: 4, flags: 3 }, StatusExtent { len: 2, flags: 2 }];
        assert_eq!(both(&one, &other), expected);
        assert_eq!(both(&other, &one), expected);
    }
}
