//! A write that takes no cluster, since others share one with the same bytes already.
//!
//! * Always: what is shared has its pin in storage before, as an entry of the disk shows it: only a
//!   reference more is taken, and written back before the entry is, like any other.
//! * Unless the image is one that nobody relies on yet: there what is written first is pinned where it
//!   lies ([`keep_in_place`](Image::keep_in_place)), and storage has all of it after the next flush.
//! * Always: the shared bytes are compared with those to write while the reference is held. Nobody
//!   writes in place to what has more than one.

use super::keeper::{Keeper, Standing};
use crate::Result;
use crate::qcow2::image::Image;
use crate::qcow2::meta::Meta;
use crate::qcow2::need::Planned;
use crate::qcow2::quarantine::FreedBy;
use crate::storage::Storage;
use crate::units::{GuestCluster, GuestOffset, GuestRange};

impl<S: Storage> Image<S> {
    /// Writes a whole cluster of `bytes` by having it show what `like` shows, if that is shared and
    /// pinned, or compressed, and holds these bytes. Says whether it did; else nothing changed.
    ///
    /// Durable after the next flush, as other writes.
    pub(crate) async fn write_shared(
        &self,
        guest: GuestCluster,
        bytes: &[u8],
        like: GuestCluster,
    ) -> Result<bool> {
        self.give_way().await;
        let geometry = self.geometry();
        let (guest, like) = (geometry.guest_offset(guest), geometry.guest_offset(like));
        let range = GuestRange::new(guest, geometry.cluster_bytes());
        if bytes.len() as u64 != range.len || self.why_not_share().is_some() {
            return Ok(false);
        }
        let mut keeper = Keeper::new(self);
        keeper.members = vec![guest];
        if !self.plan(|meta| take_as(meta, &mut keeper, like)).await?
            || self.read_keeper(&keeper).await?[..] != *bytes
        {
            return Ok(false);
        }
        let hold = self.exclude_others(range).await?;
        self.plan(|meta| keeper.show(meta, range)).await?;
        drop(hold);
        Ok(true)
    }
}

impl<S: Storage> Image<S> {
    /// Has a cluster of its own be one that others may share, where it lies: pinned, and without COPIED.
    /// Returns how many it made so, none where somebody did before; nothing where it cannot be shared.
    ///
    /// Only for an image that is not complete yet: a crash before the next flush may leave entries that
    /// share it beside one that still has COPIED.
    ///
    /// # Errors
    /// As [`share`](Self::share).
    pub(crate) async fn keep_in_place(&self, guest: GuestCluster) -> Result<Option<u64>> {
        let geometry = self.geometry();
        let range = GuestRange::new(geometry.guest_offset(guest), geometry.cluster_bytes());
        if range.end().0 > self.size() || self.why_not_share().is_some() {
            return Ok(None);
        }
        let pins_stay = self.begin_pinning().await?;
        let hold = self.exclude_others(range).await?;
        let is_kept = self.plan(|meta| meta.keep_in_place(range.start)).await?;
        drop((hold, pins_stay));
        Ok(is_kept)
    }
}

impl Meta {
    fn keep_in_place(&mut self, guest: GuestOffset) -> Planned<Option<u64>> {
        self.before_metadata_change()?;
        match self.standing(guest)? {
            Standing::Single if self.owns_table(guest) => {}
            Standing::Shared(_) | Standing::Compressed(_) => return Ok(Some(0)),
            Standing::Single | Standing::Other => return Ok(None),
        }
        let Some(host) = self.entry_to_change(guest)?.host() else { return Ok(None) };
        let cluster = self.geometry().host_cluster(host);
        self.refcounts.read(cluster)?;
        let at = self.free_pin()?;
        // Both entries and the count are at hand: from here on nothing stops half-way.
        self.entry_to_change(guest)?;
        self.refcounts.increase(cluster, 1)?;
        self.set_pin(at, host)?;
        self.set_entry(guest, self.sharing_entry(host))?;
        self.needs_data_sync = true;
        Ok(Some(1))
    }
}

/// Takes a reference of what `like` shows; says whether there is one.
fn take_as<S: Storage>(
    meta: &mut Meta,
    keeper: &mut Keeper<'_, S>,
    like: GuestOffset,
) -> Planned<bool> {
    let range = GuestRange::new(like, meta.geometry().cluster_bytes());
    if range.end().0 > meta.size_bytes {
        return Ok(false);
    }
    let has_pin = match meta.standing(like)? {
        Standing::Compressed(_) => true,
        Standing::Shared(host) => meta.pins.holds(meta.geometry().host_cluster(host)),
        Standing::Other | Standing::Single => false,
    };
    if !has_pin {
        return Ok(false);
    }
    let entry = meta.entry_to_change(like)?;
    Ok(keeper.take(meta, entry)?.is_empty())
}

impl<S: Storage> Keeper<'_, S> {
    /// Has a whole cluster show it, whatever it was before.
    fn show(&mut self, meta: &mut Meta, range: GuestRange) -> Planned<()> {
        meta.check_bounds(range)?;
        meta.before_change(range)?;
        meta.before_data()?;
        meta.own_table(range.start)?;
        let old = meta.entry_to_change(range.start)?;
        meta.prepare_free(old)?;
        meta.set_entry(range.start, self.entry)?;
        self.use_one();
        meta.free_entry(old, FreedBy::CopyOnWrite)?;
        Ok(())
    }
}
