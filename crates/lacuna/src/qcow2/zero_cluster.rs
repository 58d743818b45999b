//! One host cluster of zeros that many guest clusters share: version 2 over a backing layer, where no
//! flag says "zero" and an entry of 0 means the layer below (004-3, 004-14).
//!
//! * Always: two of its references ("pins") are entries beyond the end of the disk, in the last L1
//!   entry, where no guest gets. So its refcount never falls to 1 while an entry without COPIED
//!   points there, whoever writes the image: stock QEMU does not give COPIED back.
//! * Always: the header names the place of the pins before they are there.
//! * Always: the pins are durable before the first guest entry points there. A crash, and the repair of
//!   what it leaked, finds the cluster pinned.
//! * Always: no entry that points there has COPIED, so that every write copies first.
//! * Never: what an image remembers is believed further than what is found there (004-8).
//! * Never with an external data file; encrypted images are not opened.

use super::format::{EntryWidth, L1Entry, L2Entry, Version, ZeroClusterHint};
use super::image::Image;
use super::in_flight::{Token, Touch};
use super::mapping::{DataPlace, shared_entry};
use super::meta::Meta;
use super::need::{Need, Planned, Stop};
use super::options::SharedZeroCluster;
use super::plan_zero::Intent;
use super::resize::{MAX_L1_BYTES, MAX_SIZE_BYTES};
use super::write_back::Refcounting;
use crate::block::is_zero;
use crate::buffer::Hold;
use crate::storage::Storage;
use crate::units::{GuestCluster, GuestOffset, GuestRange, HostCluster, HostOffset, HostRange};
use crate::{Error, Result};

/// No L1 table is made longer than this for pins, unless the disk needs it.
const L1_ENTRIES_FOR_PINS: u64 = 8192;
/// So many slices of a table are searched for room for pins: what a small cache holds at once.
const SLICES_SEARCHED: u64 = 32;
/// A header longer than a sector could be torn by a power cut.
const SECTOR_BYTES: usize = 512;
/// Entries that show a cluster beyond the disk; the next pair lies in front of the one before.
const PINS: u64 = 2;
/// A range that only the making of such a cluster claims.
const MAKING: GuestRange = GuestRange::new(GuestOffset(MAX_SIZE_BYTES), 1);

/// How far the cluster in [`Decoder`](super::mapping::Decoder) can be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Trust {
    /// There is none.
    #[default]
    Nothing,
    /// The image remembers it and its bytes are zeros; its refcount was not looked at.
    Recalled,
    /// Its pins may not be durable yet.
    Pinned,
    /// It may be shared.
    Ready,
}

#[derive(Debug, Default)]
pub(super) struct SharedZero {
    /// Whether zeroed clusters are to share.
    pub(super) is_wanted: bool,
    trust: Trust,
    /// The first pin of the present cluster.
    pin: Option<GuestOffset>,
}

impl Meta {
    /// Returns what zeroing leaves in an entry, where it shares.
    pub(super) fn shared_zeros(&self, intent: Intent) -> Option<L2Entry> {
        let shares = self.takes_zero_references(intent);
        self.decoder.zero_cluster.filter(|_| shares).map(shared_entry)
    }

    /// Says whether zeroing clusters so takes references of a shared cluster.
    pub(super) fn takes_zero_references(&self, intent: Intent) -> bool {
        let reads_zero = match intent {
            Intent::Discard | Intent::ZeroFree | Intent::ZeroKeep => true,
            Intent::Cut | Intent::Forget | Intent::Repeated => false,
        };
        reads_zero && self.has_backing && !self.has_zero_flag()
    }

    /// Takes as many references as the clusters from `start` to `end` need, or as there are: one
    /// change of the refcount. Returns up to where they suffice, and how many they are.
    pub(super) fn take_zero_references(
        &mut self,
        start: GuestOffset,
        end: GuestOffset,
    ) -> Planned<(GuestOffset, u64)> {
        let Some(zeros) = self.decoder.zero_cluster.filter(|_| self.shared_zero.is_ready()) else {
            return Err(Need::ZeroCluster.into());
        };
        let room = self.zero_room(zeros)?;
        let (mut at, mut count) = (start, 0);
        while at < end {
            let is_new = self.entry_to_change(at)? != shared_entry(zeros);
            if is_new && count == room {
                break;
            }
            count += u64::from(is_new);
            at = at + self.geometry().cluster_bytes();
        }
        if at == start {
            return Err(Need::ZeroCluster.into());
        }
        self.refcounts.increase(self.geometry().host_cluster(zeros), count)?;
        Ok((at, count))
    }

    /// Gives references back that were taken and not used.
    pub(super) fn return_zero_references(&mut self, count: u64) -> Planned<()> {
        match self.decoder.zero_cluster.filter(|_| count > 0) {
            Some(zeros) => {
                let cluster = self.geometry().host_cluster(zeros);
                self.refcounts.decrease(cluster, count).map(|_| ())
            }
            None => Ok(()),
        }
    }

    /// Returns how many more entries can point to the cluster (004-3: its refcount is not to overflow).
    fn zero_room(&mut self, zeros: HostOffset) -> Planned<u64> {
        let refcount = self.refcounts.read(self.geometry().host_cluster(zeros))?;
        Ok(self.geometry().refcount_max() - refcount)
    }

    /// A cluster is free: if it was the shared one, it is no longer (004-9).
    pub(super) fn forget_zero_cluster(&mut self, freed: HostCluster) {
        let zeros = self.decoder.zero_cluster;
        if zeros.is_some_and(|zeros| self.geometry().host_cluster(zeros) == freed) {
            self.doubt_zero_cluster();
        }
    }

    /// The map is another one: the cluster is looked for anew.
    pub(super) fn doubt_zero_cluster(&mut self) {
        self.decoder.zero_cluster = None;
        self.shared_zero.trust = Trust::Nothing;
        self.shared_zero.pin = None;
    }

    /// Returns the L1 index of the table with the pins.
    pub(super) fn pin_table(&self) -> Option<usize> {
        self.shared_zero.pin.map(|pin| self.geometry().l1_index(pin) as usize)
    }

    /// Moves the table with the pins to the last entry of an L1 table that was just made longer.
    /// Both entries reach storage with the switch to it.
    pub(super) fn move_pin_table(&mut self) {
        let (Some(from), to) = (self.pin_table(), self.l1.entries.len() - 1) else { return };
        self.l1.entries.swap(from, to);
        let distance = (to - from) as u64 * self.geometry().l2_coverage_bytes();
        self.shared_zero.pin = self.shared_zero.pin.map(|pin| pin + distance);
    }

    /// Returns how long the L1 table of a disk of `entries` should be to have room for pins.
    pub(super) fn l1_entries_with_pins(&self, entries: u64) -> Planned<u64> {
        let per_cluster = self.geometry().cluster_bytes() / 8;
        let least = entries + 1;
        let wanted = least.next_multiple_of(per_cluster).min(least.max(L1_ENTRIES_FOR_PINS));
        let reach = wanted.checked_mul(self.geometry().l2_coverage_bytes());
        match wanted * 8 > MAX_L1_BYTES || reach.is_none_or(|end| end > MAX_SIZE_BYTES) {
            true => Err(Stop::Fail(no_room())),
            false => Ok(wanted),
        }
    }

    /// Believes a remembered cluster whose refcount says that it is shared, or forgets it.
    fn judge_recalled(&mut self) -> Planned<()> {
        let Some(zeros) = self.decoder.zero_cluster else { return Ok(()) };
        if self.shared_zero.trust != Trust::Recalled {
            return Ok(());
        }
        let cluster = self.geometry().host_cluster(zeros);
        match self.refcounts.read(cluster)? {
            0 | 1 => self.forget_zero_cluster(cluster),
            _ => self.shared_zero.trust = Trust::Ready,
        }
        Ok(())
    }

    /// Says whether the present cluster can be shared often enough to go on with it.
    fn has_zero_room(&mut self) -> Planned<bool> {
        match self.decoder.zero_cluster.filter(|_| self.shared_zero.is_ready()) {
            Some(zeros) => Ok(self.zero_room(zeros)? > self.geometry().refcount_max() / 16),
            None => Ok(false),
        }
    }

    /// Finds room for pins, and allocates a cluster for the request `token`.
    fn plan_zero_cluster(&mut self, token: Token) -> Planned<HostOffset> {
        self.place_pins()?;
        let host = self.allocate(1)?;
        self.in_flight.reserve(token, HostRange::new(host, self.geometry().cluster_bytes()));
        Ok(host)
    }

    /// Returns where two pins have room.
    fn place_pins(&mut self) -> Planned<GuestOffset> {
        self.before_metadata_change()?;
        self.own_pin_table()?;
        self.find_pins()?.ok_or_else(|| Stop::Fail(no_room()))
    }

    /// Sees to it that the L1 table has an entry beyond the disk, and that a table is there.
    fn own_pin_table(&mut self) -> Planned<()> {
        let needed = self.geometry().l1_entries_for(self.size_bytes.max(self.grows_to));
        if self.l1.entries.len() as u64 <= needed {
            let entries = self.l1_entries_with_pins(needed)?;
            self.move_l1(entries as usize)?;
        }
        self.own_table(self.last_table_start())
    }

    fn last_table_start(&self) -> GuestOffset {
        let last = self.l1.entries.len() as u64 - 1;
        GuestOffset(last * self.geometry().l2_coverage_bytes())
    }

    /// Finds two neighbouring entries without a mapping, from the end of the last table.
    fn find_pins(&mut self) -> Planned<Option<GuestOffset>> {
        let (start, entries) = (self.last_table_start(), self.geometry().l2_entries());
        let pairs = (entries / 2).min(SLICES_SEARCHED * self.l2.slice_bytes() / 16);
        for pair in 1..=pairs {
            let at = start + ((entries - 2 * pair) << self.geometry().cluster_bits());
            let is_free =
                |entry: Option<L2Entry>| entry.unwrap_or_default() == L2Entry::UNALLOCATED;
            let behind = at + self.geometry().cluster_bytes();
            if is_free(self.entry(at)?) && is_free(self.entry(behind)?) {
                return Ok(Some(at));
            }
        }
        Ok(None)
    }

    /// Pins a cluster of zeros: its refcount becomes 2, and two entries beyond the disk show it. Returns
    /// whether it did: the place may be another by now.
    fn pin(&mut self, token: Token, zeros: HostOffset, pin: GuestOffset) -> Planned<bool> {
        if self.place_pins()? != pin {
            return Ok(false);
        }
        self.refcounts.increase(self.geometry().host_cluster(zeros), 1)?;
        let cluster_bytes = self.geometry().cluster_bytes();
        self.set_entry(pin, shared_entry(zeros))?;
        self.set_entry(pin + cluster_bytes, shared_entry(zeros))?;
        self.in_flight.linked(token, cluster_bytes);
        self.needs_data_sync = true;
        self.decoder.zero_cluster = Some(zeros);
        self.shared_zero.pin = Some(pin);
        self.shared_zero.trust = Trust::Pinned;
        Ok(true)
    }

    /// Returns the guest cluster that a hint means, and where its entry lies: of its table, whatever
    /// place the last one has by now. The hint was durable before the pins, and is never behind them.
    fn place_of_hint(&self, hint: ZeroClusterHint) -> Option<(GuestOffset, HostOffset)> {
        let geometry = self.geometry();
        let last = (self.l1.entries.len() as u64).checked_sub(1)?;
        if last < geometry.l1_entries_for(self.size_bytes) {
            return None;
        }
        let index = hint.cluster.0 % geometry.l2_entries();
        let pin = self.last_table_start() + (index << geometry.cluster_bits());
        let table = self.l1.entries.last().copied().and_then(L1Entry::table)?;
        let entry = table + index * 8;
        (geometry.is_aligned(table.0) && table < self.zero_from).then_some((pin, entry))
    }

    /// Returns the cluster that an entry shares, if it is one that could hold the zeros.
    fn host_of_hint(&self, entry: L2Entry) -> Option<HostRange> {
        let zeros = entry.host()?;
        let range = HostRange::new(zeros, self.geometry().cluster_bytes());
        let is_sound = entry == shared_entry(zeros)
            && self.geometry().is_aligned(zeros.0)
            && zeros < self.zero_from
            && self.structures.check(range, None).is_ok();
        is_sound.then_some(range)
    }
}

impl SharedZero {
    fn is_ready(&self) -> bool {
        self.trust == Trust::Ready
    }
}

fn no_room() -> Error {
    Error::unsupported("There is no room beyond the end of the disk to hold a shared zero cluster")
}

impl<S: Storage> Image<S> {
    /// Takes up the cluster that the image remembers, where what is found there bears it out.
    pub(super) async fn recall_zero_cluster(&self, choice: SharedZeroCluster) {
        let hint = self.0.header.lock().extensions.zero_cluster;
        let found = match hint {
            Some(hint) => self.find_pinned(hint).await,
            None => None,
        };
        let mut meta = self.0.meta.lock();
        let may_share = self.may_share(&meta);
        if let Some((pin, zeros)) = found {
            meta.decoder.zero_cluster = Some(zeros);
            meta.shared_zero.pin = Some(pin);
            meta.shared_zero.trust = Trust::Recalled;
        }
        meta.shared_zero.is_wanted = may_share
            && match choice {
                SharedZeroCluster::AsRemembered => hint.is_some(),
                SharedZeroCluster::Off => false,
                SharedZeroCluster::On => true,
            };
    }

    /// As when the image was opened, after its map became another one.
    pub(super) async fn recall_zero_cluster_again(&self) {
        let choice = match self.shares_zeros() {
            true => SharedZeroCluster::On,
            false => SharedZeroCluster::Off,
        };
        self.recall_zero_cluster(choice).await;
    }

    fn may_share(&self, meta: &Meta) -> bool {
        meta.writable
            && meta.has_backing
            && meta.geometry().version() == Version::V2
            && self.place() == DataPlace::ImageFile
    }

    pub(super) fn shares_zeros(&self) -> bool {
        self.0.meta.lock().shared_zero.is_wanted
    }

    pub(super) fn can_flag_zeros(&self) -> bool {
        self.0.meta.lock().has_zero_flag()
    }

    /// Looks where the hint says, and at the pins that were made before: a crash may have come between a
    /// hint and its pins.
    async fn find_pinned(&self, hint: ZeroClusterHint) -> Option<(GuestOffset, HostOffset)> {
        let older = ZeroClusterHint { cluster: GuestCluster(hint.cluster.0.wrapping_add(PINS)) };
        match self.believe_hint(hint).await {
            Some(found) => Some(found),
            None => self.believe_hint(older).await,
        }
    }

    /// Looks at one entry and one cluster, once. What cannot be read is not believed. An image that has
    /// become version 3 makes no such cluster, and has its pins still.
    async fn believe_hint(&self, hint: ZeroClusterHint) -> Option<(GuestOffset, HostOffset)> {
        let is_wide = self.geometry().entry_width() != EntryWidth::Standard;
        if is_wide || self.place() != DataPlace::ImageFile {
            return None;
        }
        let (pin, place) = self.0.meta.lock().place_of_hint(hint)?;
        let entry = self.load(place, 8, "L2 entry").await.ok()?;
        let entry = L2Entry::at_start(&entry, EntryWidth::Standard);
        let range = self.0.meta.lock().host_of_hint(entry)?;
        let bytes = self.load(range.start, range.len, "zero cluster").await.ok()?;
        is_zero(&bytes).then_some((pin, range.start))
    }

    /// Lets no such cluster be made while the hold lives: what lies beyond the disk is either pinned or
    /// not for pins.
    pub(super) async fn exclude_making(&self) -> Result<Hold> {
        self.enter(Touch::Exclusive, MAKING).await
    }

    /// Sees to it that there is a cluster of zeros with room for more references.
    ///
    /// # Errors
    /// `Unsupported` where no more can be pinned; else as for writes.
    pub(super) async fn ready_zero_cluster(&self) -> Result<()> {
        let begin = |meta: &mut Meta| {
            Ok(meta.in_flight.begin(Touch::Exclusive, MAKING).map_err(Need::Turn)?)
        };
        let token = self.plan(begin).await?;
        let hold = self.hold(token);
        self.plan(Meta::judge_recalled).await?;
        if self.plan(Meta::has_zero_room).await? {
            return Ok(());
        }
        if self.0.meta.lock().shared_zero.is_ready() {
            // References on their way out make room once they are gone.
            self.write_back(Refcounting::Written).await?;
            if self.plan(Meta::has_zero_room).await? {
                return Ok(());
            }
        }
        let is_pinned = self.0.meta.lock().shared_zero.trust == Trust::Pinned;
        if !is_pinned {
            let zeros = self.plan(|meta| meta.plan_zero_cluster(token)).await?;
            let range = HostRange::new(zeros, self.geometry().cluster_bytes());
            let hold = self.write_zero_bytes(range, hold).await?;
            self.remember_and_pin(token, zeros).await?;
            drop(hold);
        }
        self.write_back(Refcounting::Written).await?;
        self.0.meta.lock().shared_zero.trust = Trust::Ready;
        Ok(())
    }

    /// Pins a cluster where the header says so already: pins that no hint names are somebody's state of
    /// a machine to the next run, which may end it.
    async fn remember_and_pin(&self, token: Token, zeros: HostOffset) -> Result<()> {
        loop {
            let pin = self.plan(Meta::place_pins).await?;
            self.remember(pin).await?;
            if self.plan(|meta| meta.pin(token, zeros, pin)).await? {
                return Ok(());
            }
        }
    }

    /// Has the header name the guest cluster of a pin.
    async fn remember(&self, pin: GuestOffset) -> Result<()> {
        let _turn = self.0.turn.take().await;
        let hint = ZeroClusterHint { cluster: self.geometry().guest_cluster(pin) };
        if self.0.header.lock().extensions.zero_cluster == Some(hint) {
            return Ok(());
        }
        self.wait_for_metadata_writes().await;
        // What is in memory may be older than tables that were moved.
        let mut header = super::open::read_header(&self.0.storage).await?;
        header.extensions.zero_cluster = Some(hint);
        match header.encode() {
            Ok(bytes) if bytes.len() <= SECTOR_BYTES => {
                self.write_header_field(HostOffset(0), &bytes).await?;
                self.0.header.lock().extensions.zero_cluster = Some(hint);
                Ok(())
            }
            _ => Err(Error::unsupported(
                "The header has no room within its first sector to remember a shared zero cluster",
            )),
        }
    }
}
