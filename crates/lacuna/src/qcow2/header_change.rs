//! Replaces the header, its extensions and the backing file name, whole.
//!
//! Storage tears between sectors, and mostly these take two or more. So that a crash shows the old
//! ones or the new ones, the switch is always one sector:
//!
//! | step | what is written | what a reader finds from then on |
//! |---|---|---|
//! | 1 | the new extensions and the new name, in free room of the first cluster | the old ones |
//! | 2 | the first sector: it names that room | the new ones |
//! | 3 | all sectors but the first, as they are to be | the same |
//! | 4 | the first sector, as it is to be | the same, where QEMU would put them |
//! | 5 | zeros over the room of step 1 | the same |
//!
//! * Always: a flush between two steps. What fits into one sector is one write.
//! * Always: the free room is where the old header shows nothing, whatever failed changes left there.
//! * In version 3 the header's own length moves the extensions: in between, what was there before
//!   counts as fields of a later version, which readers pass over, and which the next change here drops:
//!   the first sector ends in zeros then. In version 2 only the name can
//!   move, which is enough as long as its extensions end in the first sector.
//! * Not always: where the first cluster has no room for both (clusters of 1 or 2 KiB and a long
//!   name), or version 2 has extensions without end, the sectors are written at once.

use super::format::{Features, Header, Placed, SECTOR, shown_parts};
use crate::Result;
use crate::buffer::Buffer;
use crate::storage::Storage;
use crate::units::HostOffset;

/// One write; each is flushed before the next.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Step {
    /// Where in the first cluster.
    pub(super) at: usize,
    pub(super) bytes: Vec<u8>,
}

/// Changes the header in `storage`, durably, and returns the new one. Nobody else may be writing to
/// the first cluster.
///
/// # Errors
/// What `change` says, `NoSpace` where the first cluster is too small, `Corrupt` where fields are
/// outside of their limits, all before anything is written; else what storage says.
pub(super) async fn change_header<S: Storage>(
    storage: &S,
    change: impl FnOnce(&mut Header) -> Result<()>,
) -> Result<Header> {
    // What a change that was dropped has written is what this one begins with.
    storage.flush().await?;
    let (header, steps) = plan(storage, change).await?;
    for step in steps {
        let bytes = Buffer::from(&step.bytes[..]);
        storage.write_at(HostOffset(step.at as u64), bytes).await.0?;
        storage.flush().await?;
    }
    Ok(header)
}

/// Writes the feature words of an image that nobody else writes to, durably. What was written before is
/// as durable as they are. Returns how many bytes that took.
pub(super) async fn write_features<S: Storage>(storage: &S, features: &Features) -> Result<u64> {
    storage.flush().await?;
    let (at, bytes) = features.header_update();
    storage.write_at(at, Buffer::from(&bytes[..])).await.0?;
    storage.flush().await?;
    Ok(bytes.len() as u64)
}

/// Plans a change of the header in `storage`: returns the new one, and what is to be written, each
/// flushed before the next.
pub(super) async fn plan<S: Storage>(
    storage: &S,
    change: impl FnOnce(&mut Header) -> Result<()>,
) -> Result<(Header, Vec<Step>)> {
    let mut header = super::read_header(storage).await?;
    let cluster_bytes = header.geometry.cluster_bytes() as usize;
    let (result, old) = storage.read_at(HostOffset(0), Buffer::new(cluster_bytes)).await;
    result?;
    change(&mut header)?;
    let steps = steps(&old, &header.encode_placed()?);
    Ok((header, steps))
}

/// Plans the way from the first cluster `old` to `new`.
fn steps(old: &[u8], new: &Placed) -> Vec<Step> {
    let used = old.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    let mut whole = new.bytes.clone();
    whole.resize(sectors(whole.len()), 0);
    if old.get(..whole.len()) == Some(&whole[..]) && used <= whole.len() {
        return Vec::new();
    }
    let (first, rest) = whole.split_at(SECTOR);
    let last = Step { at: 0, bytes: first.to_vec() };
    let mut steps = Vec::new();
    let mut end = used;
    if !rest.is_empty() {
        match detour(old, new) {
            Some((away, switch)) => {
                end = end.max(away.at + away.bytes.len());
                steps.extend([away, switch]);
                steps.push(Step { at: SECTOR, bytes: rest.to_vec() });
                steps.push(last);
            }
            None => steps.push(Step { at: 0, bytes: whole.clone() }),
        }
    } else {
        steps.push(last);
    }
    if end > whole.len() {
        steps.push(Step { at: whole.len(), bytes: vec![0; end - whole.len()] });
    }
    steps
}

/// Puts what can move where neither `old` shows anything nor the new header will be, if it fits there,
/// and says what the first sector is meanwhile.
fn detour(old: &[u8], new: &Placed) -> Option<(Step, Step)> {
    let away = match new.name_at <= SECTOR {
        true => new.name(),
        // The sector ends in zeros, by which the detour is known.
        false if new.has_length() && new.extensions_at + 8 <= SECTOR => new.tail(),
        false => return None,
    };
    let room = free_room(old, new.bytes.len(), away.len())?;
    let at = u32::try_from(room).ok()?;
    let first = if new.name_at <= SECTOR { new.with_name_at(at) } else { new.with_tail_at(at) };
    Some((Step { at: room, bytes: away.to_vec() }, Step { at: 0, bytes: first }))
}

/// Finds `len` bytes of whole sectors behind the first `taken` bytes, of which the header of `old` shows
/// nothing: a change that failed half-way may have left anything there.
fn free_room(old: &[u8], taken: usize, len: usize) -> Option<usize> {
    // It was read as a header just before.
    let shown = shown_parts(old).ok()?;
    let mut rooms = (sectors(taken)..=old.len().checked_sub(len)?).step_by(SECTOR);
    rooms.find(|room| {
        let end = room + sectors(len);
        shown.iter().all(|part| part.is_empty() || part.end <= *room || end <= part.start)
    })
}

fn sectors(bytes: usize) -> usize {
    bytes.next_multiple_of(SECTOR)
}

#[cfg(test)]
mod tests {
    use super::super::format::{
        EntryWidth, Geometry, RefcountTableLocation, StoredName, UnknownExtension, Version,
    };
    use super::*;

    fn header(version: Version, cluster_bits: u32, name: &str, format: Option<&str>) -> Header {
        let geometry = Geometry::new(version, cluster_bits, 4, EntryWidth::Standard).unwrap();
        let mut header = Header::new(geometry, 0);
        let offset = HostOffset(geometry.cluster_bytes());
        header.refcount_table = RefcountTableLocation { offset, clusters: 1 };
        header.backing_name = (!name.is_empty()).then(|| StoredName::from(name));
        header.extensions.backing_format = format.map(StoredName::from);
        header
    }

    fn cluster(header: &Header) -> Vec<u8> {
        let mut bytes = header.encode().unwrap();
        bytes.resize(header.geometry.cluster_bytes() as usize, 0);
        bytes
    }

    /// What of a header counts.
    fn told(header: &Header) -> (Option<StoredName>, Header) {
        let mut rest = Header { backing_name: None, ..header.clone() };
        rest.extensions.feature_names.clear();
        (header.backing_name.clone(), rest)
    }

    /// Applies the steps, tears each at every sector, and looks at all there is.
    fn go(old: &Header, new: &Header) {
        go_from(cluster(old), &told(old), new);
    }

    fn go_from(mut now: Vec<u8>, old: &(Option<StoredName>, Header), new: &Header) {
        let plan = steps(&now, &new.encode_placed().unwrap());
        let right = [old.clone(), told(new)];
        for (number, step) in plan.iter().enumerate() {
            for torn in torn(&now, step) {
                let found = Header::decode(&torn).unwrap_or_else(|error| {
                    panic!("step {number} of {plan:?}: {error}");
                });
                assert!(right.contains(&told(&found)), "step {number}: {found:?}");
            }
            now[step.at..step.at + step.bytes.len()].copy_from_slice(&step.bytes);
        }
        assert_eq!(now, cluster(new));
    }

    /// All subsets of up to 8 sectors of a step.
    fn torn(now: &[u8], step: &Step) -> Vec<Vec<u8>> {
        let count = step.bytes.len().div_ceil(SECTOR);
        let subsets = 0..1_u32 << count.min(8);
        let states = subsets.map(|subset| {
            let mut state = now.to_vec();
            for (index, part) in step.bytes.chunks(SECTOR).enumerate() {
                if subset >> (index % 8) & 1 == 1 {
                    let at = step.at + index * SECTOR;
                    state[at..at + part.len()].copy_from_slice(part);
                }
            }
            state
        });
        states.collect()
    }

    #[test]
    fn every_torn_step_shows_the_old_or_the_new_header() {
        let long = "x".repeat(1000);
        let names = [("", None), ("a", Some("raw")), (&*long, Some("qcow2")), ("b", None)];
        for (from, to) in [(2, 2), (2, 3), (3, 2), (3, 3)] {
            let version = |number| if number == 2 { Version::V2 } else { Version::V3 };
            for old in names {
                for new in names {
                    let before = header(version(from), 16, old.0, old.1);
                    let after = header(version(to), 16, new.0, new.1);
                    go(&before, &after);
                }
            }
        }
    }

    #[test]
    fn small_clusters_and_fields_of_later_versions_survive() {
        let short = "x".repeat(300);
        for bits in [9, 12, 16] {
            let mut before = header(Version::V3, bits, "a", Some("raw"));
            before.unknown_fields = vec![7; 16];
            before.extensions.unknown = vec![UnknownExtension { magic: 0x1234, data: vec![5; 9] }];
            let mut after = before.clone();
            after.backing_name = Some(StoredName::from(&*short));
            if after.encode().is_ok() {
                go(&before, &after);
                go(&after, &before);
            }
        }
    }

    /// A power cut at any moment of a change leaves a header that can be changed as safely again.
    #[test]
    fn a_change_after_a_torn_one_is_torn_as_safely() {
        let mut after = header(Version::V3, 14, "below", Some("qcow2"));
        after.unknown_fields = vec![7; 16];
        after.extensions.unknown = vec![UnknownExtension { magic: 0x1234, data: vec![5; 600] }];
        let before = Header { backing_name: None, ..after.clone() };
        let mut now = cluster(&before);
        for step in steps(&now, &after.encode_placed().unwrap()) {
            now[step.at..step.at + step.bytes.len()].copy_from_slice(&step.bytes);
            let found = told(&Header::decode(&now).unwrap());
            for next in [&before, &after] {
                go_from(now.clone(), &found, next);
            }
        }
    }

    /// However often writes failed half-way before, there is room for the next try.
    #[test]
    fn what_failed_changes_left_takes_no_room() {
        let mut after = header(Version::V3, 12, "below", Some("qcow2"));
        after.extensions.unknown = vec![UnknownExtension { magic: 0x1234, data: vec![5; 378] }];
        let new = after.encode_placed().unwrap();
        let mut now = cluster(&header(Version::V3, 12, "below", None));
        let first = steps(&now, &new);
        for _ in 0..20 {
            let plan = steps(&now, &new);
            assert_eq!(plan.len(), first.len(), "{plan:?}");
            let away = &plan[0];
            assert!(away.at >= SECTOR, "{plan:?}");
            now[away.at..away.at + away.bytes.len()].copy_from_slice(&away.bytes);
        }
        go_from(now, &told(&header(Version::V3, 12, "below", None)), &after);
    }

    #[test]
    fn what_is_so_already_is_not_written() {
        let header = header(Version::V3, 16, "a", Some("raw"));
        assert_eq!(steps(&cluster(&header), &header.encode_placed().unwrap()), []);
    }
}
