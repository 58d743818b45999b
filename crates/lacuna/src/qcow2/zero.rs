//! Zeroing.

use super::clear::{Clearing, cut};
use super::format::Version;
use super::image::Image;
use super::mapping::{DataPlace, Mapping, OnWrite};
use super::options::GuestDiscard;
use super::plan_zero::Intent;
use super::view::View;
use crate::block::{WriteFlags, ZeroFlags, is_zero};
use crate::buffer::{Buffer, Hold};
use crate::storage::{Storage, ZeroMode};
use crate::units::{GuestOffset, GuestRange, HostOffset, HostRange};
use crate::{Error, ErrorKind, Result};

/// Bytes of explicit zeros in flight at once.
const ZERO_BYTES_AT_ONCE: u64 = 2 << 20;

impl<S: Storage> Image<S> {
    pub(super) async fn zero_guest(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        self.0.meta.lock().check_bounds(range)?;
        if range.is_empty() {
            return Ok(());
        }
        let flags = match self.0.discard.guest {
            GuestDiscard::Ignore => flags - ZeroFlags::MAY_UNMAP,
            GuestDiscard::Unmap => flags,
        };
        match self.geometry().version() {
            Version::V2 => self.zero_without_flag(range, flags).await?,
            Version::V3 => self.zero_with_flag(range, flags).await?,
        }
        if flags.contains(ZeroFlags::FUA) { self.flush_all().await } else { Ok(()) }
    }

    /// Makes the range read as zeros whatever may be put below the image one day: nothing of it stays
    /// unallocated.
    pub(crate) async fn zero_for_good(&self, range: GuestRange) -> Result<()> {
        match self.geometry().version() {
            Version::V2 => self.zero_by_bytes(range, ZeroFlags::empty()).await,
            Version::V3 => self.zero_guest(range, ZeroFlags::empty()).await,
        }
    }

    /// Version 2 cannot say "zero": unallocated is zero only where nothing lies below (001-5). Else a
    /// cluster can share one that holds zeros (004-3).
    async fn zero_without_flag(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        if self.0.backing.is_some() {
            // Bytes may be needed, which is found out half-way only.
            let may_fail = flags & (ZeroFlags::FAST | ZeroFlags::MAY_UNMAP) == ZeroFlags::FAST;
            return match self.shares_zeros() && !may_fail {
                true => self.zero_in_units(range, flags).await,
                false => self.zero_by_bytes(range, flags).await,
            };
        }
        let parts = cut(range, self.geometry().cluster_bytes(), self.size());
        for part in [parts.head, parts.tail] {
            if flags.contains(ZeroFlags::FAST) && !part.is_empty() && !self.reads_zero(part).await?
            {
                return Err(slow(part));
            }
        }
        let flags = flags - ZeroFlags::FAST;
        self.zero_part_by_bytes(parts.head, flags).await?;
        drop(self.clear(parts.middle, Intent::Forget).await?);
        self.zero_part_by_bytes(parts.tail, flags).await
    }

    async fn zero_with_flag(&self, range: GuestRange, mut flags: ZeroFlags) -> Result<()> {
        if self.place() == DataPlace::External {
            if flags.contains(ZeroFlags::FAST) {
                self.check_fast(range, flags).await?;
                flags -= ZeroFlags::FAST;
            }
            self.zero_data_file(range, flags).await?;
        }
        self.zero_in_units(range, flags).await
    }

    async fn zero_in_units(&self, range: GuestRange, mut flags: ZeroFlags) -> Result<()> {
        let parts = cut(range, self.geometry().subcluster_bytes(), self.size());
        let is_one = parts.middle.is_empty() && (parts.head.is_empty() || parts.tail.is_empty());
        if flags.contains(ZeroFlags::FAST) && !is_one {
            self.check_fast(range, flags).await?;
            flags -= ZeroFlags::FAST;
        }
        self.zero_part(parts.head, flags).await?;
        if !parts.middle.is_empty() {
            let hold = self.exclude_others(parts.middle).await?;
            self.zero_held(parts.middle, flags, hold).await?;
        }
        self.zero_part(parts.tail, flags).await
    }

    /// Refuses what cannot be done without writing bytes, before anything changes. What comes in between
    /// by another request is written then: late, and whole.
    async fn check_fast(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        let parts = cut(range, self.geometry().subcluster_bytes(), self.size());
        for part in [parts.head, parts.tail] {
            if !part.is_empty() && !self.rest_is_zero(part, flags).await? {
                return Err(slow(part));
            }
        }
        // Compressed clusters have no subclusters.
        let middle = cut(parts.middle, self.geometry().cluster_bytes(), self.size());
        for part in [middle.head, middle.tail] {
            if part.is_empty() {
                continue;
            }
            let run = self.plan(|meta| meta.run(part)).await?;
            if matches!(run.mapping, Mapping::Compressed(_)) {
                return Err(slow(part));
            }
        }
        Ok(())
    }

    /// A raw data file must read as zeros by itself: its bytes go first (D.1-47).
    async fn zero_data_file(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        if !self.0.header.lock().has_raw_external_data() {
            return Ok(());
        }
        let mode = match flags.contains(ZeroFlags::MAY_UNMAP) {
            true => ZeroMode::MayUnmap,
            false => ZeroMode::Allocate,
        };
        let host = HostRange::new(HostOffset(range.start.0), range.len);
        self.plan(|meta| meta.before_change(range)).await?;
        let hold = self.exclude_others(range).await?;
        self.data_storage().write_zeroes_at(host, mode, hold).await
    }

    /// Zeros whole subclusters (or clusters) that `hold` keeps others away from.
    async fn zero_held(&self, range: GuestRange, flags: ZeroFlags, hold: Hold) -> Result<()> {
        let cleared = match flags.contains(ZeroFlags::MAY_UNMAP) {
            true => self.clear_units(range, Intent::ZeroFree, hold).await,
            false if self.can_flag_zeros() => self.clear_units(range, Intent::ZeroKeep, hold).await,
            false => self.clear_what_has_no_place(range, hold).await,
        };
        let refused = match cleared {
            Ok(Clearing { refused, hold, .. }) => {
                // Writing bytes takes the clusters for itself.
                drop(hold);
                refused
            }
            // Nothing more can share the zeros.
            Err(error) if error.kind() == ErrorKind::Unsupported && !self.can_flag_zeros() => {
                vec![range]
            }
            Err(error) => return Err(error),
        };
        for part in refused {
            // The disk may have shrunk meanwhile.
            let len = part.end().0.min(self.size()).saturating_sub(part.start.0);
            self.zero_by_bytes(GuestRange::new(part.start, len), flags).await?;
        }
        Ok(())
    }

    /// Without leave to unmap, what has a cluster of its own keeps it and is refused here.
    async fn clear_what_has_no_place(&self, range: GuestRange, hold: Hold) -> Result<Clearing> {
        let (mut at, mut clearing) = (range.start, Clearing::begin(hold));
        while at < range.end() {
            let rest = GuestRange::new(at, range.end() - at);
            let run = self.plan(|meta| meta.run(rest)).await?;
            let part = GuestRange::new(at, run.len);
            match run.mapping {
                Mapping::Data { on_write: OnWrite::InPlace, .. } => clearing.refused.push(part),
                _ => clearing = self.clear_held(part, Intent::ZeroKeep, clearing).await?,
            }
            at = at + run.len;
        }
        Ok(clearing)
    }

    /// Zeros less than a unit: the whole unit, where the rest of it reads as zeros anyway
    /// (004-5a) or is found to hold zeros (004-5b), else by bytes.
    async fn zero_part(&self, part: GuestRange, flags: ZeroFlags) -> Result<()> {
        if part.is_empty() {
            return Ok(());
        }
        let whole = self.unit_of(part);
        let hold = self.exclude_others(whole).await?;
        if self.rest_is_zero(part, flags).await? {
            return self.zero_held(whole, flags, hold).await;
        }
        drop(hold);
        self.zero_by_bytes(part, flags).await
    }

    /// Returns the unit that has such a part.
    fn unit_of(&self, part: GuestRange) -> GuestRange {
        let unit = self.geometry().subcluster_bytes();
        GuestRange::new(GuestOffset(part.start.0 / unit * unit), unit)
    }

    /// Says whether the rest of the unit of which that is a part is zeros.
    async fn rest_is_zero(&self, part: GuestRange, flags: ZeroFlags) -> Result<bool> {
        let unit = self.unit_of(part);
        let end = unit.end().0.min(self.size());
        let before = GuestRange::new(unit.start, part.start - unit.start);
        let behind = GuestRange::new(part.end(), end.saturating_sub(part.end().0));
        Ok(self.is_zero(before, flags).await? && self.is_zero(behind, flags).await?)
    }

    /// Says whether a part of a unit is known to read as zeros, or does where that may be tried.
    async fn is_zero(&self, part: GuestRange, flags: ZeroFlags) -> Result<bool> {
        if part.is_empty() || self.reads_zero(part).await? {
            return Ok(true);
        }
        if !flags.contains(ZeroFlags::THOROUGH) {
            return Ok(false);
        }
        let (result, bytes) =
            self.read_mapped(View::Active, part.start, Buffer::new(part.len as usize)).await;
        result.map(|()| is_zero(&bytes))
    }

    async fn zero_part_by_bytes(&self, part: GuestRange, flags: ZeroFlags) -> Result<()> {
        if part.is_empty() || self.reads_zero(part).await? {
            return Ok(());
        }
        self.zero_by_bytes(part, flags).await
    }

    pub(super) async fn zero_by_bytes(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        if flags.contains(ZeroFlags::FAST) {
            return Err(slow(range));
        }
        let mut at = range.start;
        while at < range.end() {
            let len = ZERO_BYTES_AT_ONCE.min(range.end() - at);
            let zeros = Buffer::zeroed(len as usize);
            self.write_guest(at, zeros, WriteFlags::empty()).await.0?;
            at = at + len;
        }
        Ok(())
    }
}

fn slow(range: GuestRange) -> Error {
    let GuestRange { start, len } = range;
    Error::unsupported(format!("{len} bytes at {start} cannot be zeroed faster than written"))
}
