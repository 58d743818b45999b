//! Clusters that are allocated before anything is written to them, as a disk grows.
//!
//! What lies beyond the end of the disk is nobody's yet, so that clusters can be mapped there
//! piece by piece while the disk is in use; the larger size comes last. Left half-way, it leaves
//! clusters that are mapped and read as zeros, beyond the end.
//!
//! * Always: what a new cluster holds reads as zeros before it is mapped, also where the host
//!   cluster was in use before.
//! * Placement: mapped clusters and tables in the order of the disk, as writes would place them;
//!   where the host reserves space or places are to be kept, all tables come first and then one
//!   run of data (002-7).

use super::format::{L2Entry, SubclusterBitmap, Version};
use super::image::Image;
use super::in_flight::{Token, Touch};
use super::mapping::DataPlace;
use super::meta::Meta;
use super::need::{Need, Planned};
use crate::Result;
use crate::block::Preallocation;
use crate::buffer::Hold;
use crate::storage::{Storage, ZeroMode, reserve};
use crate::units::{GuestOffset, GuestRange, HostOffset, HostRange};

/// Most bytes that are allocated in one step, so that a step's refcounts fit into memory.
const MAX_PIECE_BYTES: u64 = 1 << 30;

/// What new entries show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shown {
    /// The host cluster; with subclusters what lies below, which must be nothing.
    Host,
    /// The host cluster, and nothing of what lies below.
    HostAlone,
    /// Zeros, whatever the host cluster holds.
    Zeros,
}

impl Shown {
    fn entry(self, meta: &Meta, host: HostOffset) -> L2Entry {
        let entry = L2Entry::standard(host);
        match (self, meta.geometry().has_subclusters()) {
            (Self::Host, _) | (Self::HostAlone, false) => entry,
            (Self::HostAlone, true) => entry.with_subclusters(SubclusterBitmap::ALL_DATA),
            (Self::Zeros, true) => entry.with_subclusters(SubclusterBitmap::ALL_ZERO),
            (Self::Zeros, false) => entry.with_zero_flag(),
        }
    }
}

/// Where new data clusters lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lining {
    /// As if they were written, with tables between them.
    AsWritten,
    /// Behind all tables.
    OneRun,
}

/// A run of guest clusters on its way to be mapped.
struct Piece {
    token: Token,
    guest: GuestRange,
    host: HostRange,
    /// At and beyond this offset nothing was ever written.
    clean_from: HostOffset,
}

impl<S: Storage> Image<S> {
    /// Maps the clusters from the first one that begins at or behind `old` up to `new`, both
    /// beyond what the disk has.
    pub(super) async fn preallocate(&self, old: u64, new: u64, mode: Preallocation) -> Result<()> {
        let cluster_bytes = self.geometry().cluster_bytes();
        let (start, end) =
            (old.next_multiple_of(cluster_bytes), new.next_multiple_of(cluster_bytes));
        let range = GuestRange::new(GuestOffset(start), end.saturating_sub(start));
        let shown = self.shown(old, mode);
        let mut behind = None;
        let lining = self.lining(mode);
        if lining == Lining::OneRun {
            self.make_tables(range).await?;
            behind = Some(self.plan(|meta| meta.prepare_run(range.len)).await?);
        }
        let mut at = range.start;
        while at < range.end() {
            let rest = GuestRange::new(at, range.end() - at);
            let len = self.plan(|meta| meta.mapped(rest)).await?;
            if len > 0 {
                at = at + len;
                continue;
            }
            let piece = self.plan(|meta| meta.plan_piece(rest, lining, behind)).await?;
            at = piece.guest.end();
            behind = Some(piece.host.end());
            self.allocate_piece(&piece, mode, shown).await?;
        }
        Ok(())
    }

    fn lining(&self, mode: Preallocation) -> Lining {
        let in_file = self.place() == DataPlace::ImageFile;
        let in_one = mode >= Preallocation::Falloc || self.0.header.lock().keeps_mapping();
        if in_file && in_one { Lining::OneRun } else { Lining::AsWritten }
    }

    /// What the backing layer has behind the old end must not come to light.
    fn shown(&self, old: u64, mode: Preallocation) -> Shown {
        let hidden = self.0.backing.as_ref().is_some_and(|backing| backing.size() > old);
        let has_flag = self.geometry().version() == Version::V3;
        let host_is_zero = mode >= Preallocation::Falloc && self.place() == DataPlace::ImageFile;
        match hidden {
            false => Shown::Host,
            true if host_is_zero || !has_flag => Shown::HostAlone,
            true => Shown::Zeros,
        }
    }

    async fn make_tables(&self, range: GuestRange) -> Result<()> {
        let step = self.geometry().l2_coverage_bytes();
        for start in (range.start.0..range.end().0).step_by(step as usize) {
            self.plan(|meta| {
                meta.before_metadata_change()?;
                meta.own_table(GuestOffset(start))
            })
            .await?;
        }
        Ok(())
    }

    async fn allocate_piece(&self, piece: &Piece, mode: Preallocation, shown: Shown) -> Result<()> {
        let mut hold = self.hold(piece.token);
        if self.place() == DataPlace::ImageFile {
            hold = self.make_piece_zero(piece, mode, hold).await?;
        }
        self.plan(|meta| meta.link_piece(piece, shown)).await?;
        drop(hold);
        Ok(())
    }

    /// Makes host clusters read as zeros, as firmly reserved as asked for, within the file.
    async fn make_piece_zero(
        &self,
        piece: &Piece,
        mode: Preallocation,
        hold: Hold,
    ) -> Result<Hold> {
        let storage = &self.0.storage;
        let zero_mode = match mode {
            Preallocation::Full => {
                return reserve(storage, piece.host, mode.of_data(), hold).await;
            }
            Preallocation::Falloc => ZeroMode::Allocate,
            _ => ZeroMode::MayUnmap,
        };
        let used = piece.clean_from.0.clamp(piece.host.start.0, piece.host.end().0);
        // Holes are made by zeroing, too: a file that is only extended could be cut by a call
        // that was dropped.
        let zeroed = match mode {
            Preallocation::Falloc => used,
            _ => piece.host.end().0,
        };
        let part = |from, to| HostRange::new(HostOffset(from), to - from);
        let (hold, with_driver) = hold.shared();
        let stale = part(piece.host.start.0, zeroed);
        if !stale.is_empty() {
            storage.write_zeroes_at(stale, zero_mode, with_driver).await?;
        }
        reserve(storage, part(zeroed, piece.host.end().0), mode.of_data(), hold).await
    }
}

impl Meta {
    /// Returns how many bytes at the start of a range of whole clusters are mapped already, as
    /// after a growth that was left half-way.
    fn mapped(&mut self, range: GuestRange) -> Planned<u64> {
        let cluster_bytes = self.geometry().cluster_bytes();
        let slice_end = self.slice_end(range.start).0.min(range.end().0);
        let mut at = range.start;
        while at.0 < slice_end && self.entry_to_change(at)? != L2Entry::UNALLOCATED {
            at = at + cluster_bytes;
        }
        Ok(at - range.start)
    }

    /// Makes the refcount blocks for `len` bytes at the end of the file, so that none comes to lie
    /// between them, and returns where they may begin.
    fn prepare_run(&mut self, len: u64) -> Planned<HostOffset> {
        self.before_metadata_change()?;
        let start = self.refcounts.cover_behind_end(len >> self.geometry().cluster_bits())?;
        self.note_allocated(HostRange::new(start, 0))?;
        Ok(start)
    }

    /// Chooses host clusters for the first run of clusters that are not mapped.
    fn plan_piece(
        &mut self,
        range: GuestRange,
        lining: Lining,
        behind: Option<HostOffset>,
    ) -> Planned<Piece> {
        self.before_metadata_change()?;
        self.own_table(range.start)?;
        let len = self.unmapped(range)?;
        if self.in_flight.conflicts(Touch::Exclusive, GuestRange::new(range.start, len)) {
            return Err(Need::Turn(self.in_flight.wait()).into());
        }
        let clean_from = self.zero_from;
        let clusters = len >> self.geometry().cluster_bits();
        let (start, clusters) = match self.decoder.place {
            DataPlace::External => (HostOffset(range.start.0), clusters),
            DataPlace::ImageFile => {
                let found = match behind {
                    Some(at) if lining == Lining::OneRun => self.allocate_at(at, clusters)?,
                    _ => self.allocate_behind(clusters, behind)?,
                };
                (found.start, found.clusters)
            }
        };
        let len = clusters << self.geometry().cluster_bits();
        let guest = GuestRange::new(range.start, len);
        let host = HostRange::new(start, len);
        let token = self.in_flight.begin(Touch::Exclusive, guest).map_err(Need::Turn)?;
        if self.decoder.place == DataPlace::ImageFile {
            self.in_flight.reserve(token, host);
        }
        Ok(Piece { token, guest, host, clean_from })
    }

    fn unmapped(&mut self, range: GuestRange) -> Planned<u64> {
        let cluster_bytes = self.geometry().cluster_bytes();
        let most = range.start.0 + MAX_PIECE_BYTES.max(cluster_bytes);
        let end = self.slice_end(range.start).0.min(range.end().0).min(most);
        let mut at = range.start;
        while at.0 < end && self.entry_to_change(at)? == L2Entry::UNALLOCATED {
            at = at + cluster_bytes;
        }
        Ok(at - range.start)
    }

    fn link_piece(&mut self, piece: &Piece, shown: Shown) -> Planned<()> {
        self.before_mapping(shown.entry(self, piece.host.start))?;
        self.own_table(piece.guest.start)?;
        self.entry_to_change(piece.guest.start)?;
        let cluster_bytes = self.geometry().cluster_bytes();
        for at in (0..piece.guest.len).step_by(cluster_bytes as usize) {
            let entry = shown.entry(self, piece.host.start + at);
            self.set_entry(piece.guest.start + at, entry)?;
        }
        self.in_flight.linked(piece.token, u64::MAX);
        // The file's length, and zeros that were written, come before what points to them.
        self.needs_data_sync = true;
        Ok(())
    }
}
