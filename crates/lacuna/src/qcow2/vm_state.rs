//! The state of a virtual machine: bytes that the disk's map shows behind the disk, and no guest sees.
//!
//! * Always: it begins at the first guest offset whose L2 table holds nothing of the disk.
//! * Never: bitmaps hear of it, or the backing layer has a part in it: those are about the disk.
//! * A snapshot takes with it what is there when it is made. Another size of the disk ends it.

use super::clear::Clearing;
use super::image::Image;
use super::mapping::DataPlace;
use super::meta::Meta;
use super::need::{Planned, Stop};
use super::plan_zero::Intent;
use super::resize::{MAX_L1_BYTES, MAX_SIZE_BYTES};
use super::view::View;
use crate::buffer::Buffer;
use crate::storage::{Storage, Transfer};
use crate::units::{GuestOffset, GuestRange};
use crate::{Error, ErrorKind, Result};

/// What of the disk's own map a write goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Region {
    Disk,
    VmState,
}

impl Region {
    pub(super) const fn view(self) -> View<'static> {
        match self {
            Self::Disk => View::Active,
            Self::VmState => View::VmState,
        }
    }
}

impl<S: Storage> Image<S> {
    /// Returns how many bytes at `position` of the state of a virtual machine are read; zeros where
    /// nothing was written.
    ///
    /// # Errors
    /// `Unsupported` with an external data file, `OutOfBounds` where the format cannot map so much; else
    /// as for reads of the disk.
    ///
    /// ```
    /// use lacuna::buffer::Buffer;
    /// use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
    /// use lacuna::storage::MemoryStorage;
    /// # pollster::block_on(async {
    /// let storage = MemoryStorage::new();
    /// create(&storage, &CreateOptions { size_bytes: 1 << 20, ..Default::default() }).await?;
    /// let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadWrite)).await?;
    /// image.write_vm_state(4096, Buffer::from(&[7; 512][..])).await.0?;
    /// let (result, bytes) = image.read_vm_state(4000, Buffer::new(200)).await;
    /// result?;
    /// assert_eq!((bytes[95], bytes[96]), (0, 7));
    /// # image.close().await
    /// # }).unwrap();
    /// ```
    pub async fn read_vm_state(&self, position: u64, buffer: Buffer) -> Transfer {
        match self.vm_state_range(position, buffer.len()) {
            Ok(range) => self.read_guest(View::VmState, range.start, buffer).await,
            Err(error) => (Err(error), buffer),
        }
    }

    /// Writes at `position` of the state of a virtual machine, as QEMU does before it makes a snapshot.
    /// Durable after the next flush.
    ///
    /// # Errors
    /// As for [`read_vm_state`](Self::read_vm_state), and `Unsupported` where what shared clusters are
    /// pinned by is in the way; else as for writes to the disk.
    pub async fn write_vm_state(&self, position: u64, buffer: Buffer) -> Transfer {
        match self.vm_state_range(position, buffer.len()) {
            Ok(range) => self.write_pieces(Region::VmState, range.start, buffer).await,
            Err(error) => (Err(error), buffer),
        }
    }

    /// Gives up what is mapped behind the disk, the state of a machine or what a growth that failed left:
    /// with another size of the disk it would lie elsewhere, or in the disk, or leak with its table.
    pub(super) async fn drop_behind_disk(&self) -> Result<()> {
        // A table that is there for pins, and has none yet, is no part of it.
        let _nothing_is_made = self.exclude_making().await?;
        let Some(range) = self.0.meta.lock().tables_behind_disk() else { return Ok(()) };
        let hold = self.exclude_others(range).await?;
        let cleared = self.clear_held(range, Intent::Cut, Clearing::begin(hold)).await?;
        self.plan(|meta| meta.drop_tables(meta.size_bytes)).await?;
        drop(cleared);
        // Before the size, or a crash in between would leave it in the disk.
        self.flush_all().await
    }

    fn vm_state_range(&self, position: u64, len: usize) -> Result<GuestRange> {
        let meta = self.0.meta.lock();
        if meta.decoder.place == DataPlace::External {
            return Err(Error::unsupported(
                "Data lies in an external file, which has no place for the state of a machine",
            ));
        }
        let (start, len) = (meta.vm_state_start(), len as u64);
        let end = position.checked_add(len).and_then(|end| start.0.checked_add(end));
        match end {
            Some(end) if meta.can_map(end) => Ok(GuestRange::new(start + position, len)),
            _ => Err(Error::new(
                ErrorKind::OutOfBounds,
                format!("{len} bytes at {position} of the state of a machine cannot be mapped"),
            )),
        }
    }
}

impl Meta {
    fn vm_state_start(&self) -> GuestOffset {
        let coverage = self.geometry().l2_coverage_bytes();
        GuestOffset(self.size_bytes.div_ceil(coverage) * coverage)
    }

    /// Returns what of the map lies behind the disk, from its last cluster on, if there is a table in it.
    fn tables_behind_disk(&self) -> Option<GuestRange> {
        let coverage = self.geometry().l2_coverage_bytes();
        let start = self.size_bytes.next_multiple_of(self.geometry().cluster_bytes());
        let end = self.pin_table().unwrap_or(self.l1.entries.len());
        let tables = self.l1.entries.get((start / coverage) as usize..end)?;
        let is_used = tables.iter().any(|entry| entry.table().is_some());
        is_used.then(|| GuestRange::new(GuestOffset(start), end as u64 * coverage - start))
    }

    fn can_map(&self, end: u64) -> bool {
        end <= MAX_SIZE_BYTES && self.geometry().l1_entries_for(end) * 8 <= MAX_L1_BYTES
    }

    /// Refuses what lies outside of a region, and asks for what must come before a change in there.
    pub(super) fn before_write(&mut self, region: Region, range: GuestRange) -> Planned<()> {
        match region {
            Region::Disk => {
                self.check_bounds(range)?;
                self.before_change(range)
            }
            Region::VmState => {
                self.before_metadata_change()?;
                let needed = self.geometry().l1_entries_for(range.end().0);
                match self.pin_table() {
                    Some(last) if needed > last as u64 => Err(Stop::Fail(Error::unsupported(
                        "The place of the state of a machine has what shared clusters are pinned \
                         by; `dedup --unpin` takes that off",
                    ))),
                    _ => self.grow_l1(range.end().0),
                }
            }
        }
    }
}
