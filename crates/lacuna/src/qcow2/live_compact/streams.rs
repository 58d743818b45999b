//! Moving compressed streams: one behind the other, across borders of neighbouring clusters.
//!
//! * Always: a stream begins at the same byte of a sector as before, since only whole sectors of it are
//!   known; so it gets no longer however often it moves.
//! * Always: a cluster that is being filled has a reference of its own, until the next one is begun.
//! * Its entries say nothing of in-place writes, so that it does no harm where one was missed: that one
//!   shows the old place, and has its reference.

use super::super::format::{CompressedRun, Geometry, L2Entry};
use super::super::image::Image;
use super::super::in_flight::{Token, Touch};
use super::super::meta::Meta;
use super::super::need::{Need, Planned};
use super::super::pointers::{MOST_POINTERS, Pointer, weight};
use super::moves::{Holes, Outcome};
use super::walk::{Walk, Walked};
use crate::Result;
use crate::buffer::Hold;
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange, HostCluster, HostOffset, HostRange};

const SECTOR_BYTES: u64 = 512;
/// Narrower refcounts have no room for the reference of a cluster that is being filled.
const LEAST_REFCOUNT_MAX: u64 = 15;

/// Streams that are to move, and where to.
pub(super) struct Streams {
    holes: Holes,
    /// The word of their entries and the entries; the last one is the first to move.
    rest: Vec<(u64, Vec<Pointer>)>,
    room: Option<Room>,
}

/// Clusters that are being filled.
struct Room {
    at: HostOffset,
    end: HostOffset,
    token: Token,
    /// Keeps its clusters.
    _hold: Hold,
}

/// A stream that has a place.
#[derive(Clone, Copy, Debug)]
struct Begun {
    from: HostRange,
    to: HostOffset,
    token: Token,
}

impl Streams {
    pub(super) fn new(walk: Walk, geometry: &Geometry) -> Self {
        let holes = walk.holes;
        let mut rest = walk.into_streams();
        rest.retain(|(_, pointers)| pointers.len() <= MOST_POINTERS);
        if geometry.refcount_max() < LEAST_REFCOUNT_MAX {
            rest.clear();
        }
        rest.sort_unstable_by_key(|(word, _)| {
            let start = range_of(*word, geometry).map(|range| range.start);
            std::cmp::Reverse(start)
        });
        Self { holes, rest, room: None }
    }

    pub(super) const fn goal(&self) -> u64 {
        self.holes.goal
    }
}

fn range_of(word: u64, geometry: &Geometry) -> Option<HostRange> {
    let entry = L2Entry { word, ..L2Entry::default() };
    entry.compressed_run(geometry).map(CompressedRun::range)
}

impl<S: Storage> Image<S> {
    /// Moves streams of about so many bytes.
    pub(super) async fn move_streams(
        &self,
        streams: &mut Streams,
        slice_bytes: u64,
    ) -> Result<Walked> {
        let mut done = Walked::default();
        while done.read_bytes < slice_bytes {
            let Some((word, pointers)) = streams.rest.pop() else {
                done.is_over = true;
                break;
            };
            match self.move_stream(streams, word, &pointers).await? {
                Ok(bytes) => {
                    done.read_bytes += bytes;
                    done.moved_bytes += bytes;
                }
                Err(Outcome::NoRoom) => streams.rest.clear(),
                Err(_) => {}
            }
        }
        if done.is_over {
            streams.room = None;
        }
        Ok(done)
    }

    /// Moves a stream; returns how long it is.
    async fn move_stream(
        &self,
        streams: &mut Streams,
        word: u64,
        pointers: &[Pointer],
    ) -> Result<std::result::Result<u64, Outcome>> {
        let Some(from) = range_of(word, &self.geometry()) else { return Ok(Err(Outcome::Gone)) };
        if !self.make_room(streams, from).await? {
            return Ok(Err(Outcome::NoRoom));
        }
        let Some(room) = &mut streams.room else { return Ok(Err(Outcome::NoRoom)) };
        let to = room.place_for(from);
        let begun = self.plan(|meta| meta.begin_stream(word, pointers, from, to)).await?;
        let Some(begun) = begun else { return Ok(Err(Outcome::Gone)) };
        let hold = self.copy_bytes(begun.from, begun.to, self.hold(begun.token)).await?;
        let is_linked = self.plan(|meta| meta.link_moved_stream(word, pointers, begun)).await?;
        drop(hold);
        if is_linked {
            room.at = to + from.len;
        }
        Ok(if is_linked { Ok(from.len) } else { Err(Outcome::Gone) })
    }

    /// Sees to it that a stream has room. False where there is no hole.
    async fn make_room(&self, streams: &mut Streams, from: HostRange) -> Result<bool> {
        let holes = &mut streams.holes;
        while let Some(room) = &mut streams.room {
            if room.place_for(from).0 + from.len <= room.end.0 {
                return Ok(true);
            }
            let (end, token) = (room.end, room.token);
            if !self.plan(|meta| meta.extend_room(end, token, holes)).await? {
                break;
            }
            room.end = end + self.geometry().cluster_bytes();
        }
        streams.room = None;
        let needed = from.start.0 % SECTOR_BYTES + from.len;
        let clusters = self.geometry().clusters_for(needed);
        let Some((at, token)) = self.plan(|meta| meta.begin_room(clusters, holes)).await? else {
            return Ok(false);
        };
        let end = at + clusters * self.geometry().cluster_bytes();
        streams.room = Some(Room { at, end, token, _hold: self.hold(token) });
        Ok(true)
    }
}

impl Room {
    /// Returns the next byte that lies in its sector as the stream's first one does.
    const fn place_for(&self, from: HostRange) -> HostOffset {
        let (at, within) = (self.at.0, from.start.0 % SECTOR_BYTES);
        HostOffset(at + (within + SECTOR_BYTES - at % SECTOR_BYTES) % SECTOR_BYTES)
    }
}

impl Meta {
    fn begin_room(
        &mut self,
        clusters: u64,
        holes: &mut Holes,
    ) -> Planned<Option<(HostOffset, Token)>> {
        let nothing = GuestRange::new(GuestOffset(0), 0);
        self.before_metadata_change()?;
        let mut cursor = holes.cursor;
        let Some(at) = self.allocate_below(clusters, holes.goal, &mut cursor)? else {
            return Ok(None);
        };
        if clusters == 1 {
            holes.cursor = cursor;
        }
        let token = self.in_flight.begin(Touch::Map, nothing).map_err(Need::Turn)?;
        let len = clusters * self.geometry().cluster_bytes();
        self.in_flight.reserve(token, HostRange::new(at, len));
        Ok(Some((at, token)))
    }

    /// Adds the next cluster to a room, if it is a hole.
    fn extend_room(&mut self, end: HostOffset, token: Token, holes: &Holes) -> Planned<bool> {
        self.before_metadata_change()?;
        let mut next = self.geometry().host_cluster(end).0;
        let limit = holes.goal.min(next + 1);
        let Some(at) = self.allocate_below(1, limit, &mut next)? else { return Ok(false) };
        let range = HostRange::new(at, self.geometry().cluster_bytes());
        self.in_flight.reserve(token, range);
        Ok(true)
    }

    fn begin_stream(
        &mut self,
        word: u64,
        pointers: &[Pointer],
        from: HostRange,
        to: HostOffset,
    ) -> Planned<Option<Begun>> {
        let nothing = GuestRange::new(GuestOffset(0), 0);
        self.before_metadata_change()?;
        let is_apart = self.structures.check(from, None).is_ok() && from.start < self.zero_from;
        if !is_apart || !self.all_show(pointers, |_, entry| entry.word == word)? {
            return Ok(None);
        }
        // From here on its place is not reused for something else.
        let token = self.in_flight.begin(Touch::Read, nothing).map_err(Need::Turn)?;
        Ok(Some(Begun { from, to, token }))
    }

    fn link_moved_stream(
        &mut self,
        word: u64,
        pointers: &[Pointer],
        begun: Begun,
    ) -> Planned<bool> {
        self.before_metadata_change()?;
        let run = CompressedRun::new(begun.to, begun.from.len);
        let new = L2Entry::compressed(run, self.geometry());
        let old = L2Entry { word, ..L2Entry::default() };
        let (targets, sources) = (self.references(new), self.references(old));
        let count = weight(pointers);
        for cluster in &targets {
            let most = self.geometry().refcount_max();
            if self.refcounts.read(*cluster)?.saturating_add(count) > most {
                return Ok(false);
            }
        }
        if !self.are_enough(&sources, count)?
            || !self.all_show(pointers, |_, entry| entry.word == word)?
        {
            return Ok(false);
        }
        // All is at hand: from here on nothing stops half-way.
        for cluster in targets {
            self.refcounts.increase(cluster, count)?;
        }
        self.point(pointers, |_| new.word)?;
        for cluster in sources {
            self.free_times(cluster, count)?;
        }
        self.needs_data_sync = true;
        Ok(true)
    }

    /// Says whether clusters have so many references that are not about to go.
    fn are_enough(&mut self, clusters: &[HostCluster], count: u64) -> Planned<bool> {
        for cluster in clusters {
            let refcount = self.refcounts.read(*cluster)?;
            if refcount.saturating_sub(self.quarantine.pending(*cluster)) < count {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
