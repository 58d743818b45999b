//! Emptying an image whose backing layer reads the same by now.
//!
//! * Always: pointers go before refcounts, and both before the file is cut; a crash in between leaves
//!   clusters that the image still names, or leaks.
//! * Never: a snapshot loses a cluster, or a bitmap is told of a change: guests see none.

use super::clear::Clearing;
use super::image::Image;
use super::plan_zero::Intent;
use super::write_back::Refcounting;
use crate::Result;
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange};

impl<S: Storage> Image<S> {
    /// Gives up all that the image holds of its disk, and the space of it: afterwards the backing
    /// layer shows everywhere, or zeros where there is none. Snapshots and bitmaps stay. Durable when
    /// it returns; dropped or cut short, some of the disk is given up.
    ///
    /// For an image whose content came into its backing layer: what a guest reads is the same, so
    /// that bitmaps do not note a change.
    ///
    /// # Errors
    /// `ReadOnly`, and what reading tables, writing and flushing give.
    ///
    /// ```
    /// use lacuna::block::{Layer, WriteFlags};
    /// use lacuna::buffer::Buffer;
    /// use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
    /// use lacuna::storage::{MemoryStorage, Storage};
    /// use lacuna::units::GuestOffset;
    ///
    /// pollster::block_on(async {
    ///     let storage = MemoryStorage::new();
    ///     create(&storage, &CreateOptions { size_bytes: 1 << 30, ..Default::default() }).await?;
    ///     let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadWrite)).await?;
    ///     image.write(GuestOffset(0), Buffer::zeroed(1 << 20), WriteFlags::empty()).await.0?;
    ///     image.make_empty().await?;
    ///     assert_eq!(image.storage().len().await?, 4 << 16);
    ///     image.close().await
    /// }).unwrap();
    /// ```
    pub async fn make_empty(&self) -> Result<()> {
        self.check_writable()?;
        // Tables are dropped whole below, with whatever lies beyond the disk.
        self.drop_behind_disk().await?;
        let clusters = self.size().next_multiple_of(self.geometry().cluster_bytes());
        let all = GuestRange::new(GuestOffset(0), clusters);
        let hold = self.exclude_others(all).await?;
        let cleared = self.clear_held(all, Intent::Repeated, Clearing::begin(hold)).await?;
        self.plan(|meta| meta.drop_tables(0)).await?;
        self.discard_in_data_file(all, cleared.hold).await?;
        self.flush_all().await?;
        self.write_back(Refcounting::Written).await?;
        self.cut_file(0).await?;
        self.claim_empty().await
    }
}
