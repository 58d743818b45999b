//! Discarding.

use super::clear::cut;
use super::format::Version;
use super::image::Image;
use super::mapping::DataPlace;
use super::options::{DiscardUnit, GuestDiscard};
use super::plan_zero::Intent;
use crate::block::DiscardMode;
use crate::buffer::Hold;
use crate::storage::{Capability, Storage};
use crate::units::{GuestRange, HostOffset, HostRange};
use crate::{ErrorKind, Result};

impl<S: Storage> Image<S> {
    pub(super) async fn discard_guest(&self, range: GuestRange, mode: DiscardMode) -> Result<()> {
        self.0.meta.lock().check_bounds(range)?;
        let intent = match (mode, self.geometry().version()) {
            (DiscardMode::Full, _) => {
                let clusters = cut(range, self.geometry().cluster_bytes(), self.size()).middle;
                let hold = self.clear(clusters, Intent::Cut).await?;
                return self.discard_in_data_file(clusters, hold).await;
            }
            (DiscardMode::Guest, _) if self.0.discard.guest == GuestDiscard::Ignore => {
                return Ok(());
            }
            // Old data would show through from below, and no flag can hide it (D.1-7).
            (DiscardMode::Guest, Version::V2) if self.0.backing.is_some() => {
                return self.discard_by_sharing(range).await;
            }
            (DiscardMode::Guest, _) => Intent::Discard,
        };
        let discard_unit = self.0.meta.lock().discard_unit;
        let unit = match discard_unit {
            DiscardUnit::Cluster => self.geometry().cluster_bytes(),
            DiscardUnit::Subcluster => self.geometry().subcluster_bytes(),
        };
        let units = cut(range, unit, self.size()).middle;
        if units.is_empty() {
            return Ok(());
        }
        let hold = self.exclude_others(units).await?;
        if self.0.header.lock().has_raw_external_data() {
            return self.discard_of_raw_file(units, intent, hold).await;
        }
        // Compressed clusters have no parts that could be freed: those keep their content.
        let cleared = self.clear_units(units, intent, hold).await?;
        self.discard_in_data_file(units, cleared.hold).await
    }

    /// What the map says is true of a raw data file by itself, at any time: its bytes go first, and where
    /// they may not go the wish is not heard.
    async fn discard_of_raw_file(
        &self,
        units: GuestRange,
        intent: Intent,
        hold: Hold,
    ) -> Result<()> {
        if !self.0.discard.request || !self.can_punch_data_file() {
            return Ok(());
        }
        self.plan(|meta| meta.before_change(units)).await?;
        let (hold, riding) = hold.shared();
        self.punch_data_file(units, riding).await?;
        self.clear_units(units, intent, hold).await.map(drop)
    }

    /// Whole clusters come to share the cluster of zeros, where they may and while that can be had.
    async fn discard_by_sharing(&self, range: GuestRange) -> Result<()> {
        let clusters = cut(range, self.geometry().cluster_bytes(), self.size()).middle;
        if !self.shares_zeros() || clusters.is_empty() {
            return Ok(());
        }
        let hold = self.exclude_others(clusters).await?;
        match self.clear_units(clusters, Intent::Discard, hold).await {
            Err(error) if error.kind() != ErrorKind::Unsupported => Err(error),
            _ => Ok(()),
        }
    }

    /// The data file's space goes back once the map no longer shows it; until then `hold` keeps
    /// writers away, whose bytes would go with it.
    pub(super) async fn discard_in_data_file(&self, range: GuestRange, hold: Hold) -> Result<()> {
        if self.place() == DataPlace::ImageFile || range.is_empty() || !self.0.discard.request {
            return Ok(());
        }
        self.flush_all().await?;
        match self.can_punch_data_file() {
            true => self.punch_data_file(range, hold).await,
            false => Ok(()),
        }
    }

    fn can_punch_data_file(&self) -> bool {
        self.data_storage().capabilities().punch_hole != Capability::Unsupported
    }

    async fn punch_data_file(&self, range: GuestRange, hold: Hold) -> Result<()> {
        let end = range.end().0.min(self.size());
        let host = HostRange::new(HostOffset(range.start.0), end - range.start.0);
        self.data_storage().punch_hole_at(host, hold).await
    }
}
