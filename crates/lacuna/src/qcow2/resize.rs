//! Changing the size of the disk.

use std::sync::Arc;

use super::clear::Clearing;
use super::format::{L1Entry, Version};
use super::image::{CUT, Image};
use super::meta::Meta;
use super::moved::Moved;
use super::need::{Need, Planned};
use super::plan_zero::Intent;
use super::quarantine::FreedBy;
use super::refcounts::BlockLook;
use super::write_back::Refcounting;
use crate::block::{Preallocation, ZeroFlags};
use crate::buffer::{Hold, Release};
use crate::storage::{Storage, ZeroMode, reserve};
use crate::units::{GuestOffset, GuestRange, HostOffset, HostRange};
use crate::{Error, ErrorKind, Result};

/// Most bytes an active L1 table may have (B.1).
pub(super) const MAX_L1_BYTES: u64 = 32 << 20;

/// Beyond every disk there can be; clusters up to here can be counted.
pub(super) const MAX_SIZE_BYTES: u64 = 1 << 62;

/// Whether guest bytes may be cut off.
///
/// ```
/// assert_ne!(lacuna::qcow2::Shrink::Refuse, lacuna::qcow2::Shrink::Allow);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shrink {
    /// What lies beyond the new end is lost.
    Allow,
    /// A smaller size is an error.
    Refuse,
}

impl<S: Storage> Image<S> {
    /// Changes the size of the disk to `size_bytes`, a multiple of 512. Durable on return.
    ///
    /// What is added reads as zeros, whatever lies in a longer backing file. When shrinking, the
    /// file is cut behind its last used cluster.
    ///
    /// # Errors
    /// `InvalidRequest` for sizes that are not whole sectors or shrink without leave;
    /// `Unsupported` for version 2 with snapshots, and where a bitmap is of an unknown kind;
    /// `NoSpace` where the format cannot map so much.
    pub async fn resize(&self, size_bytes: u64, shrink: Shrink) -> Result<()> {
        let _edits = self.0.bitmap_edits.take().await;
        let old = self.size();
        self.check_resize(old, size_bytes, shrink)?;
        self.check_snapshots().await?;
        self.check_bitmaps(old, size_bytes).await?;
        match size_bytes.cmp(&old) {
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => {
                self.grow_from(old, size_bytes, Preallocation::Off).await
            }
            std::cmp::Ordering::Less => self.shrink(old, size_bytes).await,
        }
    }

    fn check_resize(&self, old: u64, new: u64, shrink: Shrink) -> Result<()> {
        let header = self.0.header.lock();
        if !new.is_multiple_of(512) {
            return Err(Error::invalid(format!("New size {new} is not a multiple of 512")));
        }
        if new < old && shrink == Shrink::Refuse {
            return Err(Error::invalid(format!(
                "Shrinking from {old} to {new} bytes loses data; allow it explicitly"
            )));
        }
        let entries = header.geometry.l1_entries_for(new);
        if entries * 8 > MAX_L1_BYTES {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "{new} bytes need an L1 table of more than {MAX_L1_BYTES} bytes at this cluster size"
                ),
            ));
        }
        Ok(())
    }

    /// Pins are no snapshot of the disk: they have no size that could be wrong afterwards.
    async fn check_snapshots(&self) -> Result<()> {
        let may_have = {
            let header = self.0.header.lock();
            header.geometry.version() == Version::V2 && header.snapshots.count > 0
        };
        match may_have && self.has_real_snapshots().await? {
            true => Err(Error::unsupported(
                "A version 2 image with internal snapshots cannot be resized: its snapshots do not record their size",
            )),
            false => Ok(()),
        }
    }

    /// Makes the disk larger, to `size_bytes`, with what is added preallocated. Durable on return.
    ///
    /// What is added reads as zeros, whatever lies in a longer backing file. With a raw external
    /// data file it is mapped in any case. Dropped or failed half-way, it leaves the old size, and
    /// maybe some of the space taken.
    ///
    /// # Errors
    /// As for [`resize`](Self::resize); `InvalidRequest` where the disk would not grow.
    ///
    /// ```
    /// use lacuna::block::{Layer, Preallocation};
    /// use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
    /// use lacuna::storage::MemoryStorage;
    ///
    /// pollster::block_on(async {
    ///     let storage = MemoryStorage::new();
    ///     create(&storage, &CreateOptions { size_bytes: 1 << 20, ..Default::default() }).await?;
    ///     let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadWrite)).await?;
    ///     image.grow(2 << 20, Preallocation::Metadata).await?;
    ///     assert_eq!(image.size_bytes(), 2 << 20);
    ///     image.close().await
    /// }).unwrap();
    /// ```
    pub async fn grow(&self, size_bytes: u64, preallocation: Preallocation) -> Result<()> {
        let _edits = self.0.bitmap_edits.take().await;
        let old = self.size();
        if size_bytes <= old {
            return Err(Error::invalid(format!(
                "The disk has {old} bytes; growing it to {size_bytes} is no growth"
            )));
        }
        self.check_resize(old, size_bytes, Shrink::Refuse)?;
        self.check_snapshots().await?;
        self.check_bitmaps(old, size_bytes).await?;
        self.grow_from(old, size_bytes, preallocation).await
    }

    async fn grow_from(&self, old: u64, new: u64, mode: Preallocation) -> Result<()> {
        let raw = self.0.header.lock().has_raw_external_data();
        let mode = mode.max(if raw { Preallocation::Metadata } else { Preallocation::Off });
        self.drop_behind_disk().await?;
        // A disk that was cut and grows again has changed there, so bitmaps are told.
        let added = GuestRange::new(GuestOffset(old), new - old);
        self.plan(|meta| meta.before_change(added)).await?;
        self.grow_data_file(old, new, mode).await?;
        let mut back = SizeBackOnDrop { image: self, old: Some(old) };
        self.plan(|meta| {
            meta.before_change(added)?;
            meta.grow_l1(new)?;
            meta.grows_to = new;
            Ok(())
        })
        .await?;
        match mode {
            Preallocation::Off => self.clear_added(old, new).await?,
            mode => self.preallocate_added(old, new, mode).await?,
        }
        self.resize_bitmaps(old, new).await?;
        self.commit_size(new).await?;
        back.old = None;
        Ok(())
    }

    async fn grow_data_file(&self, old: u64, new: u64, mode: Preallocation) -> Result<()> {
        let Some(data) = &self.0.data else { return Ok(()) };
        let mut hold = self.exclude_behind(old).await?;
        let len = data.len().await?;
        if mode != Preallocation::Off && len > old {
            // What the file has behind the disk must not come to light.
            let stale = HostRange::new(HostOffset(old), len.min(new) - old);
            let riding;
            (hold, riding) = hold.shared();
            data.write_zeroes_at(stale, ZeroMode::MayUnmap, riding).await?;
        }
        if mode >= Preallocation::Falloc {
            let added = HostRange::new(HostOffset(old), new - old);
            hold = reserve(data, added, mode.of_data(), hold).await?;
        }
        data.set_len(new, hold).await
    }

    /// Shows the larger disk, and zeroes what the old end hid: the rest of its last cluster, and
    /// what a longer backing layer has (D.1-49).
    async fn clear_added(&self, old: u64, new: u64) -> Result<()> {
        self.0.meta.lock().size_bytes = new;
        let hidden = self.0.backing.as_ref().map_or(0, |backing| backing.size());
        let cluster_end = old.next_multiple_of(self.geometry().cluster_bytes());
        let like_qemu = self.0.meta.lock().refcounts.follows_the_last();
        let end = match hidden > old && like_qemu {
            // QEMU leaves nothing to what the backing layer may become.
            true => new,
            false => hidden.max(cluster_end).min(new),
        };
        if end <= old {
            return Ok(());
        }
        let range = GuestRange::new(GuestOffset(old), end - old);
        if hidden > old || !self.reads_zero(range).await? {
            self.zero_guest(range, ZeroFlags::MAY_UNMAP).await?;
        }
        // Also what reads as zeros may do so in memory only as yet. A crash must not leave the larger disk without these zeros.
        self.flush_all().await
    }

    /// As [`clear_added`](Self::clear_added), with space for all that is added.
    async fn preallocate_added(&self, old: u64, new: u64, mode: Preallocation) -> Result<()> {
        let cluster_end = old.next_multiple_of(self.geometry().cluster_bytes()).min(new);
        self.0.meta.lock().size_bytes = cluster_end;
        let rest = GuestRange::new(GuestOffset(old), cluster_end - old);
        self.zero_by_bytes(rest, ZeroFlags::empty()).await?;
        self.preallocate(old, new, mode).await?;
        self.flush_all().await?;
        self.0.meta.lock().size_bytes = new;
        Ok(())
    }

    async fn shrink(&self, old: u64, new: u64) -> Result<()> {
        self.drop_behind_disk().await?;
        let cluster_bytes = self.geometry().cluster_bytes();
        let from = new.next_multiple_of(cluster_bytes);
        let to = old.next_multiple_of(cluster_bytes);
        let cut = GuestRange::new(GuestOffset(from), to - from);
        // Kept until the size is the new one, or a write could get in between.
        let hold = self.exclude_others(cut).await?;
        let cleared = self.clear_held(cut, Intent::Cut, Clearing::begin(hold)).await?;
        let mut back = SizeBackOnDrop { image: self, old: Some(old) };
        self.plan(|meta| {
            meta.drop_tables(new)?;
            meta.size_bytes = new;
            Ok(())
        })
        .await?;
        drop(cleared);
        // Were the smaller size there first, a later growth would show the old clusters again.
        self.flush_all().await?;
        self.commit_size(new).await?;
        back.old = None;
        self.0.meta.lock().bitmaps.cut_at(new);
        self.resize_bitmaps(old, new).await?;
        self.write_back(Refcounting::Written).await?;
        if let Some(data) = &self.0.data {
            let hold = self.exclude_behind(new).await?;
            data.set_len(new, hold).await?;
        }
        self.cut_file(0).await?;
        Ok(())
    }

    async fn commit_size(&self, size_bytes: u64) -> Result<()> {
        self.0.meta.lock().size_dirty = true;
        self.flush_all().await?;
        let mut header = self.0.header.lock();
        header.size_bytes = size_bytes;
        Ok(())
    }

    /// Shortens the file to the end of its last used cluster, and gives up refcount blocks from the one
    /// of that index on that count nothing. Returns by how many bytes it is shorter.
    pub(super) async fn cut_file(&self, first_block: u64) -> Result<u64> {
        let pause = self.pause().await?;
        self.drop_empty_blocks(first_block).await?;
        let end = self.find_end().await?;
        let len = self.0.storage.len().await?;
        if len <= end.0 {
            return Ok(0);
        }
        // Dropped half-way, the driver may still cut: the pause lasts until it has.
        let (pause, riding) = pause.shared();
        self.0.storage.set_len(end.0, riding).await?;
        let mut meta = self.0.meta.lock();
        meta.zero_from = meta.zero_from.min(end);
        drop(meta);
        drop(pause);
        Ok(len - end.0)
    }

    /// Lets nothing be allocated while the hold lives.
    pub(super) async fn pause(&self) -> Result<Hold> {
        self.plan(Meta::pause).await?;
        Ok(Hold::new(Arc::clone(&self.0) as Arc<dyn Release>, CUT))
    }

    /// Gives up refcount blocks that count nothing any more, as QEMU does when it shrinks an image.
    /// Only while nothing is allocated.
    async fn drop_empty_blocks(&self, first: u64) -> Result<()> {
        let indices = self.0.meta.lock().refcounts.block_indices();
        loop {
            let mut dropped_any = false;
            for index in indices.iter().filter(|index| **index >= first) {
                let mut look = BlockLook::default();
                dropped_any |= self.plan(|meta| meta.drop_empty_block(*index, &mut look)).await?;
            }
            self.write_back(Refcounting::Written).await?;
            // What counted one that is gone may count nothing now.
            if !dropped_any {
                return Ok(());
            }
        }
    }

    /// Finds the end of the last used cluster, where the file is to be cut.
    async fn find_end(&self) -> Result<HostOffset> {
        let mut end = self.0.meta.lock().refcounts.counted_end();
        self.plan(|meta| meta.refcounts.lower_to_used(&mut end)).await?;
        let end = self.geometry().host_offset(end);
        self.0.meta.lock().refcounts.cut_at(end);
        Ok(end)
    }

    /// Lets no guest byte from `offset` on be changed while the hold lives, now or when the disk is
    /// larger: it rides with what is done to the end of the data file, dropped or not.
    async fn exclude_behind(&self, offset: u64) -> Result<Hold> {
        let rest = MAX_SIZE_BYTES.saturating_sub(offset);
        self.exclude_others(GuestRange::new(GuestOffset(offset), rest)).await
    }
}

/// Takes the size back where a change of it is dropped or fails before it is durable: what a
/// growth adds may not be zeroed yet, and memory must not know a size that storage does not.
struct SizeBackOnDrop<'a, S: Storage> {
    image: &'a Image<S>,
    old: Option<u64>,
}

impl<S: Storage> Drop for SizeBackOnDrop<'_, S> {
    fn drop(&mut self) {
        let mut meta = self.image.0.meta.lock();
        meta.grows_to = 0;
        if let Some(old) = self.old {
            meta.size_bytes = old;
            // The new size may be on its way to storage.
            meta.size_dirty = true;
        }
    }
}

impl Meta {
    /// Makes the L1 table long enough for a disk of `size_bytes`, at a new place where need be.
    pub(super) fn grow_l1(&mut self, size_bytes: u64) -> Planned<()> {
        let needed = self.geometry().l1_entries_for(size_bytes);
        let entries = match self.pin_table() {
            None => needed,
            // The last entry is not for the disk.
            Some(last) if needed <= last as u64 => return Ok(()),
            Some(_) => self.l1_entries_with_pins(needed)?,
        };
        if entries <= self.l1.entries.len() as u64 {
            return Ok(());
        }
        self.move_l1(entries as usize)
    }

    /// Makes the L1 table longer, at a new place.
    pub(super) fn move_l1(&mut self, entries: usize) -> Planned<()> {
        let clusters = self.geometry().clusters_for(entries as u64 * 8);
        let new = self.allocate(clusters)?;
        let old = self.l1.range();
        self.l1.replaced.extend((!old.is_empty()).then_some(old));
        self.l1.entries.resize(entries, L1Entry::UNALLOCATED);
        self.move_pin_table();
        self.l1.offset = new;
        self.l1.moved = Moved::Unwritten;
        Ok(())
    }

    /// Frees the L2 tables that lie wholly beyond `size_bytes`; their entries are clear already.
    pub(super) fn drop_tables(&mut self, size_bytes: u64) -> Planned<()> {
        // Bitmaps were told when the clusters went.
        self.before_metadata_change()?;
        let first = self.geometry().l1_entries_for(size_bytes) as usize;
        let pins = self.pin_table();
        for index in (first..self.l1.entries.len()).filter(|index| Some(*index) != pins) {
            let Some(table) = self.l1.entries[index].table() else { continue };
            self.free(self.geometry().host_cluster(table), FreedBy::Always)?;
            self.l1.set(index, L1Entry::UNALLOCATED);
            let range = HostRange::new(table, self.geometry().cluster_bytes());
            self.structures.remove(range);
            self.l2.forget(table);
        }
        Ok(())
    }

    fn pause(&mut self) -> Planned<()> {
        if self.paused {
            return Err(Need::Turn(self.in_flight.wait()).into());
        }
        self.paused = true;
        Ok(())
    }

    /// Says whether there was such a block.
    fn drop_empty_block(&mut self, index: u64, look: &mut BlockLook) -> Planned<bool> {
        let dropped = self.refcounts.drop_empty_block(index, look)?;
        if let Some(block) = dropped.as_ref().filter(|block| !block.is_counted) {
            self.structures.remove_cluster(block.cluster);
        }
        Ok(dropped.is_some())
    }

    /// Lets changes go on again.
    pub(super) fn resume(&mut self) {
        self.paused = false;
        self.in_flight.wake_all();
    }
}
