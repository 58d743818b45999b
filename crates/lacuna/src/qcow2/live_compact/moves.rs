//! Moving clusters while others read and write.
//!
//! | what | who is kept away |
//! |---|---|
//! | a cluster that one entry of the disk shows, in a table of its own | who writes to that guest cluster, until the entry has changed |
//! | a cluster that several entries show, or only snapshots | nobody: such a cluster is never written in place, and if an entry has changed meanwhile it stays |
//! | a cluster that is pinned | as before; its copy is pinned first, durably, so that neither is without a pin while the other is shown |
//! | a table | nobody: its bytes are in memory |
//!
//! * Always: the new place is counted before anything points to it, and goes back if nothing does.
//! * Always: the old place is freed as by a write that copies: a write-back later, and when no request
//!   is left that may read it. So a crash leaves leaks at worst.

use super::super::format::L1Entry;
use super::super::image::Image;
use super::super::in_flight::{Token, Touch};
use super::super::meta::Meta;
use super::super::moved::Moved;
use super::super::need::{Need, Planned};
use super::super::overlap::Structure;
use super::super::pointers::{Owner, Pointer, redirected, weight};
use super::super::quarantine::FreedBy;
use crate::Result;
use crate::buffer::{Buffer, Hold};
use crate::storage::{HostStatus, Storage, ZeroMode};
use crate::units::{GuestOffset, GuestRange, HostCluster, HostOffset, HostRange};

/// What became of something that was to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It is not there any more, or cannot be moved now.
    Gone,
    Moved,
    /// There is no hole below the goal.
    NoRoom,
    /// Others point to it too.
    Shared,
}

/// Where clusters are to go: the lowest holes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Holes {
    /// No hole lies before this cluster.
    pub(super) cursor: u64,
    /// The first cluster that is behind the goal.
    pub(super) goal: u64,
}

impl Holes {
    pub(super) const fn below(goal: u64) -> Self {
        Self { cursor: 0, goal }
    }
}

/// A move that has a place.
#[derive(Clone, Copy, Debug)]
struct Begun {
    token: Token,
    to: HostOffset,
    /// Bytes count; else only the place is kept.
    has_bytes: bool,
}

/// A cluster whose copy is pinned too.
#[derive(Debug)]
pub(super) struct Prepared {
    pointers: Vec<Pointer>,
    from: HostOffset,
    to: HostOffset,
    /// Keeps the old place from being reused for something else.
    _hold: Hold,
}

impl<S: Storage> Image<S> {
    /// Moves a cluster that one entry of the disk shows.
    pub(super) async fn move_single(
        &self,
        guest: GuestOffset,
        from: HostOffset,
        holes: &mut Holes,
    ) -> Result<Outcome> {
        let begun = self.plan(|meta| meta.begin_single(guest, from, holes)).await?;
        self.carry(from, begun, |meta, begun| meta.link_single(guest, from, begun)).await
    }

    /// Moves a cluster that just these entries show.
    pub(super) async fn move_shared(
        &self,
        pointers: &[Pointer],
        from: HostOffset,
        holes: &mut Holes,
    ) -> Result<Outcome> {
        let begun = self.plan(|meta| meta.begin_shared(pointers, from, holes)).await?;
        self.carry(from, begun, |meta, begun| meta.link_shared(pointers, from, begun)).await
    }

    /// Brings the bytes of a move that has begun, and has them shown where they are then.
    async fn carry(
        &self,
        from: HostOffset,
        begun: std::result::Result<Begun, Outcome>,
        link: impl Fn(&mut Meta, Begun) -> Planned<bool>,
    ) -> Result<Outcome> {
        let begun = match begun {
            Ok(begun) => begun,
            Err(outcome) => return Ok(outcome),
        };
        let _hold = self.bring(from, begun).await?;
        let is_linked = self.plan(|meta| link(meta, begun)).await?;
        Ok(if is_linked { Outcome::Moved } else { Outcome::Gone })
    }

    /// Copies a cluster that is pinned, and pins the copy, which is to be durable before an entry of the
    /// disk shows it.
    pub(super) async fn prepare_pinned(
        &self,
        pointers: Vec<Pointer>,
        from: HostOffset,
        holes: &mut Holes,
    ) -> Result<std::result::Result<Prepared, Outcome>> {
        let begun = match self.plan(|meta| meta.begin_shared(&pointers, from, holes)).await? {
            Ok(begun) => begun,
            Err(outcome) => return Ok(Err(outcome)),
        };
        let hold = self.bring(from, begun).await?;
        self.plan(|meta| meta.pin_copy(begun)).await?;
        Ok(Ok(Prepared { pointers, from, to: begun.to, _hold: hold }))
    }

    async fn bring(&self, from: HostOffset, begun: Begun) -> Result<Hold> {
        let hold = self.hold(begun.token);
        match begun.has_bytes {
            true => self.copy_cluster(from, begun.to, hold).await,
            false => Ok(hold),
        }
    }

    /// Copies a cluster; what is a hole stays one.
    async fn copy_cluster(&self, from: HostOffset, to: HostOffset, hold: Hold) -> Result<Hold> {
        let len = self.geometry().cluster_bytes();
        let known = self.0.storage.status_at(HostRange::new(from, len)).await?;
        if known.status == HostStatus::Hole && known.len >= len {
            let (hold, with_driver) = hold.shared();
            let target = HostRange::new(to, len);
            self.0.storage.write_zeroes_at(target, ZeroMode::MayUnmap, with_driver).await?;
            return Ok(hold);
        }
        self.copy_bytes(HostRange::new(from, len), to, hold).await
    }

    pub(super) async fn copy_bytes(
        &self,
        from: HostRange,
        to: HostOffset,
        hold: Hold,
    ) -> Result<Hold> {
        let mut bytes = self.load(from.start, from.len, "what is to move").await?;
        bytes.set_hold(hold);
        let (result, mut bytes): (_, Buffer) = self.0.storage.write_at(to, bytes).await;
        result.map(|()| bytes.take_hold())
    }
}

impl Meta {
    fn begin_single(
        &mut self,
        guest: GuestOffset,
        from: HostOffset,
        holes: &mut Holes,
    ) -> Planned<Result<Begun, Outcome>> {
        let cluster_bytes = self.geometry().cluster_bytes();
        self.before_metadata_change()?;
        let entry = self.entry_to_change(guest)?;
        let is_known = entry.host() == Some(from) && self.owns_table(guest);
        if !is_known || !self.may_move(from) {
            return Ok(Err(Outcome::Gone));
        }
        match self.settled_refcount(self.geometry().host_cluster(from))? {
            Some(1) => {}
            Some(0) | None => return Ok(Err(Outcome::Gone)),
            Some(_) => return Ok(Err(Outcome::Shared)),
        }
        let cluster = GuestRange::new(guest, cluster_bytes);
        if self.in_flight.conflicts(Touch::Exclusive, cluster) {
            return Err(Need::Turn(self.in_flight.wait()).into());
        }
        let has_bytes = match self.geometry().has_subclusters() {
            true => entry.subclusters.has_data(),
            false => !(entry.has_zero_flag() && self.has_zero_flag()),
        };
        self.begin_move(Touch::Exclusive, cluster, has_bytes, holes)
    }

    fn begin_shared(
        &mut self,
        pointers: &[Pointer],
        from: HostOffset,
        holes: &mut Holes,
    ) -> Planned<Result<Begun, Outcome>> {
        let nothing = GuestRange::new(GuestOffset(0), 0);
        self.before_metadata_change()?;
        match self.is_shown_by(from, pointers)? {
            // From here on the cluster is not reused for something else.
            true => self.begin_move(Touch::Read, nothing, true, holes),
            false => Ok(Err(Outcome::Gone)),
        }
    }

    fn begin_move(
        &mut self,
        touch: Touch,
        clusters: GuestRange,
        has_bytes: bool,
        holes: &mut Holes,
    ) -> Planned<Result<Begun, Outcome>> {
        let Some(to) = self.allocate_below(1, holes.goal, &mut holes.cursor)? else {
            return Ok(Err(Outcome::NoRoom));
        };
        let token = self.in_flight.begin(touch, clusters).map_err(Need::Turn)?;
        self.in_flight.reserve(token, HostRange::new(to, self.geometry().cluster_bytes()));
        Ok(Ok(Begun { token, to, has_bytes }))
    }

    fn link_single(&mut self, guest: GuestOffset, from: HostOffset, new: Begun) -> Planned<bool> {
        self.before_metadata_change()?;
        let old = self.entry_to_change(guest)?;
        if old.host() != Some(from) || !self.owns_table(guest) {
            return Ok(false);
        }
        self.prepare_free(old)?;
        let mut entry = old;
        entry.word = redirected(old.word, new.to);
        self.set_entry(guest, entry)?;
        self.in_flight.linked(new.token, self.geometry().cluster_bytes());
        self.free_entry(old, FreedBy::Always)?;
        self.needs_data_sync = true;
        Ok(true)
    }

    fn link_shared(&mut self, pointers: &[Pointer], from: HostOffset, new: Begun) -> Planned<bool> {
        self.before_metadata_change()?;
        self.refcounts.read(self.geometry().host_cluster(new.to))?;
        if !self.is_shown_by(from, pointers)? {
            return Ok(false);
        }
        // The copy has one reference already.
        self.redirect(pointers, from, new.to, weight(pointers) - 1)?;
        self.in_flight.linked(new.token, self.geometry().cluster_bytes());
        self.needs_data_sync = true;
        Ok(true)
    }

    /// Has entries that were just looked at show the copy of a cluster, which gets `more` references.
    /// All is at hand: from here on nothing stops half-way.
    fn redirect(
        &mut self,
        pointers: &[Pointer],
        from: HostOffset,
        to: HostOffset,
        more: u64,
    ) -> Planned<()> {
        self.refcounts.increase(self.geometry().host_cluster(to), more)?;
        self.point(pointers, |word| redirected(word, to))?;
        self.free_times(self.geometry().host_cluster(from), weight(pointers))
    }

    /// Drops so many references of a cluster that something else was shown for.
    pub(in super::super) fn free_times(&mut self, cluster: HostCluster, count: u64) -> Planned<()> {
        for _ in 0..count {
            self.free(cluster, FreedBy::Always)?;
        }
        Ok(())
    }

    fn pin_copy(&mut self, new: Begun) -> Planned<()> {
        self.before_metadata_change()?;
        let at = self.free_pin()?;
        self.set_pin(at, new.to)?;
        self.in_flight.linked(new.token, self.geometry().cluster_bytes());
        self.needs_data_sync = true;
        Ok(())
    }

    /// Has all that show a pinned cluster show its copy, but for the old pin, which goes as those do
    /// that nobody needs.
    pub(super) fn link_pinned(&mut self, new: &Prepared) -> Planned<bool> {
        self.before_metadata_change()?;
        self.refcounts.read(self.geometry().host_cluster(new.to))?;
        if !self.is_shown_by(new.from, &new.pointers)? {
            return Ok(false);
        }
        let is_pin = |pointer: &Pointer| matches!(pointer.table.owner, Owner::Pins(_));
        let others: Vec<Pointer> = new.pointers.iter().filter(|it| !is_pin(it)).copied().collect();
        self.redirect(&others, new.from, new.to, weight(&others))?;
        Ok(true)
    }

    /// Moves a table that only that entry of the active L1 table names.
    pub(super) fn move_table(&mut self, index: usize, holes: &mut Holes) -> Planned<Outcome> {
        let Some(entry) = self.l1.entries.get(index).copied() else { return Ok(Outcome::Gone) };
        let new = match self.begin_table(entry, entry.is_copied(), holes)? {
            Ok(new) => new,
            Err(outcome) => return Ok(outcome),
        };
        let coverage = self.geometry().l2_coverage_bytes();
        self.install_table(GuestOffset(index as u64 * coverage), new);
        self.free_table(entry)
    }

    /// Moves a table of pins.
    pub(super) fn move_pin_table_at(
        &mut self,
        index: usize,
        holes: &mut Holes,
    ) -> Planned<Outcome> {
        let Some(entry) = self.pins.l1.entries.get(index).copied() else {
            return Ok(Outcome::Gone);
        };
        let new = match self.begin_table(entry, true, holes)? {
            Ok(new) => new,
            Err(outcome) => return Ok(outcome),
        };
        self.pins.l1.set(index, L1Entry::new(new));
        let range = HostRange::new(new, self.geometry().cluster_bytes());
        self.structures.add(range, Structure::PinL2);
        self.free_table(entry)
    }

    /// Copies a table to a hole, if it lies behind the goal and nobody else has it.
    fn begin_table(
        &mut self,
        entry: L1Entry,
        is_owned: bool,
        holes: &mut Holes,
    ) -> Planned<Result<HostOffset, Outcome>> {
        self.before_metadata_change()?;
        let Some(old) = entry.table() else { return Ok(Err(Outcome::Gone)) };
        let cluster = self.geometry().host_cluster(old);
        if cluster.0 < holes.goal || !self.geometry().is_aligned(old.0) || old >= self.zero_from {
            return Ok(Err(Outcome::Gone));
        }
        if !is_owned || self.settled_refcount(cluster)? != Some(1) {
            return Ok(Err(Outcome::Shared));
        }
        self.ready_to_copy(old)?;
        let Some(new) = self.allocate_below(1, holes.goal, &mut holes.cursor)? else {
            return Ok(Err(Outcome::NoRoom));
        };
        self.fill_copy(old, new)?;
        Ok(Ok(new))
    }

    fn free_table(&mut self, entry: L1Entry) -> Planned<Outcome> {
        if let Some(old) = entry.table() {
            self.free(self.geometry().host_cluster(old), FreedBy::Always)?;
        }
        Ok(Outcome::Moved)
    }

    /// Moves the active L1 table.
    pub(super) fn move_active_l1(&mut self, holes: &mut Holes) -> Planned<Outcome> {
        self.before_metadata_change()?;
        let old = self.l1.range();
        if old.is_empty() || self.geometry().host_cluster(old.start).0 < holes.goal {
            return Ok(Outcome::Gone);
        }
        let clusters = self.geometry().clusters_for(old.len);
        let Some(new) = self.allocate_below(clusters, holes.goal, &mut 0)? else {
            return Ok(Outcome::NoRoom);
        };
        self.l1.replaced.push(old);
        self.l1.offset = new;
        self.l1.moved = Moved::Unwritten;
        Ok(Outcome::Moved)
    }
}
