//! Before a downgrade: version 2 has no zero flag.
//!
//! A cluster that reads as zeros becomes an unallocated one where nothing lies below and no place is
//! reserved for it, else one that holds zeros.

use super::beyond_version_2;
use crate::block::{Layer, ZeroFlags};
use crate::qcow2::format::{Header, Snapshot};
use crate::qcow2::image::Image;
use crate::qcow2::mapping::Mapping;
use crate::qcow2::plan_zero::Intent;
use crate::qcow2::snapshots;
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange, HostOffset};
use crate::{Error, Result};

/// How many bytes are written in one go.
const BYTES_AT_ONCE: u64 = 2 << 20;

impl<S: Storage> Image<S> {
    /// Refuses what version 2 could not hold.
    pub(super) async fn check_downgrade(&self, header: &Header) -> Result<()> {
        let features = beyond_version_2(header);
        if !features.is_empty() {
            return Err(Error::unsupported(format!(
                "Version 2 lacks what the image has: {features:?}"
            )));
        }
        if header.extensions.bitmaps.is_some() {
            return Err(Error::unsupported("Version 2 cannot keep the bitmaps that the image has"));
        }
        let (all, _) = snapshots::read_table(self.storage(), header).await?;
        all.iter().try_for_each(|snapshot| self.check_snapshot(snapshot, header))
    }

    fn check_snapshot(&self, snapshot: &Snapshot, header: &Header) -> Result<()> {
        snapshot.check_l1(&header.geometry)?;
        let size = snapshot.disk_size_bytes.unwrap_or(header.size_bytes);
        let is_other = size != self.size_bytes() && !snapshot.is_pin();
        if is_other || u32::try_from(snapshot.vm_state_bytes).is_err() {
            return Err(Error::unsupported(format!(
                "Version 2 cannot say that snapshot {} has another size than the disk, or so large \
                 a VM state",
                snapshot.name
            )));
        }
        Ok(())
    }

    /// Replaces all zero flags of the active map.
    pub(super) async fn expand_zeros(
        &self,
        progress: &mut (dyn FnMut(u64, u64) + Send),
    ) -> Result<()> {
        let (mut at, end) = (GuestOffset(0), self.whole().end());
        while at < end {
            progress(at.0, end.0);
            let rest = GuestRange::new(at, end - at);
            let run = self.plan(|meta| meta.run(rest)).await?;
            let len = match run.mapping {
                Mapping::Zero { reserved } => self.expand(at, run.len, reserved).await?,
                _ => run.len,
            };
            at = at + len;
        }
        progress(end.0, end.0);
        Ok(())
    }

    /// Replaces the zero flags at the start of a run; returns how many bytes are done.
    async fn expand(
        &self,
        start: GuestOffset,
        len: u64,
        reserved: Option<HostOffset>,
    ) -> Result<u64> {
        if reserved.is_none() && self.0.backing.is_none() {
            let clusters = self.geometry().cover_clusters(GuestRange::new(start, len));
            drop(self.clear(clusters, Intent::Forget).await?);
            return Ok(len);
        }
        let len = len.min(BYTES_AT_ONCE);
        self.zero_by_bytes(GuestRange::new(start, len), ZeroFlags::empty()).await?;
        Ok(len)
    }
}
