//! Reads what pins an image has, before the first change of them.
//!
//! * Never: a table is taken for one of pins that lies where other metadata lies, or that something
//!   else references too: pins change where they lie.
//! * Bounded: a table counts once, so that no more is read than the file has.

use std::collections::HashSet;

use super::table::pin_l1_range;
use crate::buffer::Hold;
use crate::qcow2::format::{L1Entry, Snapshot};
use crate::qcow2::image::Image;
use crate::qcow2::in_flight::Touch;
use crate::qcow2::meta::{L1Table, Meta};
use crate::qcow2::need::{Need, Planned, Stop};
use crate::qcow2::overlap::Structure;
use crate::qcow2::resize::MAX_SIZE_BYTES;
use crate::qcow2::snapshots;
use crate::qcow2::view::View;
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange, HostOffset, HostRange};
use crate::{Error, Result};

/// A range that only those claim who change pins.
pub(super) const CHANGING: GuestRange = GuestRange::new(GuestOffset(MAX_SIZE_BYTES + 1), 1);
/// How many entries are looked at under one lock.
const ENTRIES_AT_ONCE: u64 = 512;

impl<S: Storage> Image<S> {
    /// Waits until nobody else changes pins, and keeps it so while the hold lives.
    pub(in crate::qcow2) async fn begin_pinning(&self) -> Result<Hold> {
        self.give_way().await;
        let begin = |meta: &mut Meta| {
            meta.before_metadata_change()?;
            if meta.gate.dirty_bit {
                return Err(Need::DirtyBit.into());
            }
            Ok(meta.in_flight.begin(Touch::Map, CHANGING).map_err(Need::Turn)?)
        };
        let token = self.plan(begin).await?;
        let hold = self.hold(token);
        self.load_pins().await?;
        Ok(hold)
    }

    /// Waits until nobody changes pins and moves tables of snapshots, and keeps it so while the hold
    /// lives.
    pub(in crate::qcow2) async fn keep_pins(&self) -> Result<Hold> {
        self.enter(Touch::Map, CHANGING).await
    }

    async fn load_pins(&self) -> Result<()> {
        if self.0.meta.lock().pins.is_loaded {
            return Ok(());
        }
        let header = self.header();
        let (all, table_bytes) = snapshots::read_table(self.storage(), &header).await?;
        let l1 = match all.iter().find(|it| it.is_pin()) {
            Some(pin) => self.read_pin_l1(pin).await?,
            None => L1Table::new(Vec::new(), HostOffset(0)),
        };
        {
            let mut meta = self.0.meta.lock();
            meta.pins.l1 = l1;
            meta.pins.snapshots = all;
            meta.pins.table_range = HostRange::new(header.snapshots.offset, table_bytes);
        }
        let result = self.take_in_pins().await;
        let mut meta = self.0.meta.lock();
        meta.pins.is_loaded = result.is_ok();
        if result.is_err() {
            meta.pins = super::Pins::default();
        }
        result
    }

    async fn read_pin_l1(&self, pin: &Snapshot) -> Result<L1Table> {
        pin.check_l1(&self.geometry())?;
        let range = pin_l1_range(pin).unwrap_or(HostRange::new(HostOffset(0), 0));
        if range.end().0 > self.storage().len().await? {
            return Err(damaged(format!(
                "their L1 table at {} passes the end of the file",
                range.start
            )));
        }
        let bytes = self.load(range.start, range.len, "L1 table of pins").await?;
        Ok(L1Table::new(L1Entry::decode(&bytes), range.start))
    }

    /// Checks the tables and notes what is pinned.
    async fn take_in_pins(&self) -> Result<()> {
        let mut seen = HashSet::new();
        let entries = self.0.meta.lock().pins.l1.entries.clone();
        for (index, entry) in (0..).zip(entries) {
            let Some(table) = entry.table() else { continue };
            if !seen.insert(table) {
                return Err(damaged(format!("their L1 table names {table} twice")));
            }
            self.plan(|meta| meta.take_in_table(table)).await?;
            let (start, end) = self.0.meta.lock().pin_table_range(index);
            let mut at = start;
            while at < end {
                self.plan(|meta| meta.take_in_entries(&mut at, end)).await?;
            }
        }
        Ok(())
    }
}

pub(super) fn damaged(what: String) -> Error {
    Error::corrupt(format!("The pins of shared clusters are damaged: {what}; run check"))
}

impl Meta {
    fn take_in_table(&mut self, table: HostOffset) -> Planned<()> {
        let range = HostRange::new(table, self.geometry().cluster_bytes());
        if !self.geometry().is_aligned(table.0) || table >= self.zero_from {
            return Err(Stop::Fail(damaged(format!("a table cannot lie at {table}"))));
        }
        let refcount = self.refcounts.read(self.geometry().host_cluster(table))?;
        if refcount != 1 || self.structures.check(range, Some(Structure::PinL2)).is_err() {
            return Err(Stop::Fail(damaged(format!("something else uses their table at {table}"))));
        }
        self.structures.add(range, Structure::PinL2);
        Ok(())
    }

    /// Returns the offsets of the pins in one table.
    pub(super) fn pin_table_range(&self, index: u64) -> (GuestOffset, GuestOffset) {
        let coverage = self.geometry().l2_coverage_bytes();
        (GuestOffset(index * coverage), GuestOffset((index + 1) * coverage))
    }

    /// Notes what some entries pin, from `at` on.
    fn take_in_entries(&mut self, at: &mut GuestOffset, end: GuestOffset) -> Planned<()> {
        let step = self.geometry().cluster_bytes();
        let stop = end.min(*at + ENTRIES_AT_ONCE * step);
        while *at < stop {
            let entry = self.entry_in(View::Pins, *at)?.unwrap_or_default();
            let is_aligned = entry.host().is_none_or(|host| self.geometry().is_aligned(host.0));
            if !is_aligned || entry.is_compressed() {
                let text = format!("an entry of theirs cannot be {:#x}", entry.word);
                return Err(Stop::Fail(damaged(text)));
            }
            if let Some(host) = entry.host() {
                let cluster = self.geometry().host_cluster(host);
                self.pins.note(cluster);
            }
            *at = *at + step;
        }
        Ok(())
    }

    /// Moves `at` on over tables that are not there, and drops pins without sharers, some at a time.
    /// Returns how many.
    pub(super) fn drop_unused_pins_from(&mut self, at: &mut GuestOffset) -> Planned<u64> {
        let (step, end) = (self.geometry().cluster_bytes(), self.pins_end());
        let stop = end.min(*at + ENTRIES_AT_ONCE * step);
        let mut dropped = 0;
        while *at < stop {
            if self.table_in(View::Pins, *at)?.is_none() {
                *at = self.pin_table_range(self.geometry().l1_index(*at)).1;
                continue;
            }
            match self.drop_pin_if_unused(*at) {
                Ok(is_gone) => dropped += u64::from(is_gone),
                // What is done stays done: the count must get out.
                Err(Stop::Need(need)) if dropped == 0 => return Err(need.into()),
                Err(Stop::Need(_)) => return Ok(dropped),
                Err(stop) => return Err(stop),
            }
            *at = *at + step;
        }
        Ok(dropped)
    }
}

impl<S: Storage> Image<S> {
    /// Drops the pins of clusters that nothing else references any more. Returns how many clusters
    /// that frees; durable after the next flush.
    ///
    /// # Errors
    /// `ReadOnly` for an image opened read-only; `Corrupt` where pins are damaged; else what reading
    /// and writing metadata give.
    pub async fn drop_unused_pins(&self) -> Result<u64> {
        let _hold = self.begin_pinning().await?;
        self.drop_unused_pins_held().await
    }

    pub(in crate::qcow2) async fn drop_unused_pins_held(&self) -> Result<u64> {
        let (mut at, mut dropped) = (GuestOffset(0), 0);
        while at < self.0.meta.lock().pins_end() {
            dropped += self.plan(|meta| meta.drop_unused_pins_from(&mut at)).await?;
        }
        Ok(dropped)
    }
}
