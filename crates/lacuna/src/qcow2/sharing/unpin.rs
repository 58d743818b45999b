//! Takes the pins off an image.
//!
//! | step | what | a crash in it leaves |
//! |---|---|---|
//! | 1 | version 3: the dirty bit; a flush | an image that the next opener checks |
//! | 2 | a snapshot table without the pins; a flush | leaks: one reference of each keeper |
//! | 3 | the image is closed, but for the dirty bit | the same |
//! | 4 | a repair: COPIED where a refcount becomes 1, then the refcounts, then the dirty bit | version 3: the next opener repairs it; version 2: COPIED flags that `check -r all` puts right |

use crate::qcow2::check::{CheckOptions, Repair, check};
use crate::qcow2::format::{IncompatibleFeatures, Version};
use crate::qcow2::image::Image;
use crate::qcow2::meta::Meta;
use crate::qcow2::need::Planned;
use crate::qcow2::write_back::Refcounting;
use crate::storage::Storage;
use crate::units::HostOffset;
use crate::{Error, Result};

impl<S: Storage> Image<S> {
    /// Takes the pins off, frees the clusters that nothing else uses, and closes the image. Durable when
    /// it returns; a guest reads the same.
    ///
    /// What clusters share they go on sharing, and this engine goes on to write such an image rightly.
    /// But where stock QEMU overwrites all sharers but one, its check calls the last one an error, until
    /// `check -r all` or [`repin`](Self::repin). Nothing is lost by that.
    ///
    /// # Errors
    /// `ReadOnly` for an image opened read-only; `Corrupt` where pins are damaged, or something else is
    /// that a check cannot repair; else as for writing metadata and for closing.
    ///
    /// ```
    /// # use lacuna::block::{Layer, WriteFlags};
    /// # use lacuna::buffer::Buffer;
    /// # use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
    /// # use lacuna::storage::MemoryStorage;
    /// # use lacuna::units::{GuestCluster, GuestOffset};
    /// # use std::sync::Arc;
    /// # pollster::block_on(async {
    /// let storage = Arc::new(MemoryStorage::new());
    /// create(&storage, &CreateOptions { size_bytes: 1 << 20, ..Default::default() }).await?;
    /// let open = || Image::open(Parts::alone(Arc::clone(&storage)), OpenOptions::new(Access::ReadWrite));
    /// let image = open().await?;
    /// image.write(GuestOffset(0), Buffer::from(&[7; 2 << 16][..]), WriteFlags::empty()).await.0?;
    /// image.share(&[vec![GuestCluster(0), GuestCluster(1)]]).await?;
    /// assert_eq!(image.pin_facts().await?.unwrap().references, 2);
    /// image.unpin().await?;
    /// assert!(open().await?.snapshots().await?.is_empty());
    /// # Ok::<_, lacuna::Error>(())
    /// # })?;
    /// # Ok::<_, lacuna::Error>(())
    /// ```
    pub async fn unpin(self) -> Result<()> {
        let hold = self.begin_pinning().await?;
        if self.0.meta.lock().pins.l1.entries.is_empty() {
            drop(hold);
            return self.close().await;
        }
        if self.geometry().version() == Version::V3 {
            let _turn = self.0.turn.take().await;
            self.change_features(|bits| bits.incompatible.insert(IncompatibleFeatures::DIRTY))
                .await?;
        }
        self.plan(Meta::leave_pins).await?;
        self.write_back(Refcounting::Written).await?;
        drop(hold);
        self.close_but_for_dirty_bit().await?;
        self.repair(Repair::All).await
    }

    /// Repairs the file of an image that was closed.
    pub(super) async fn repair(&self, repair: Repair) -> Result<()> {
        let report = check(self.storage(), &CheckOptions { repair }, &mut |_| {}).await?;
        match report.is_clean() {
            true => Ok(()),
            false => Err(Error::corrupt(format!(
                "{} errors are left in the image, and {} leaked clusters; run check",
                report.corruptions + report.check_errors,
                report.leaks
            ))),
        }
    }
}

impl Meta {
    /// Has the next write-back switch to a snapshot table without pins. Their tables leak.
    fn leave_pins(&mut self) -> Planned<()> {
        self.before_metadata_change()?;
        let mut snapshots = self.pins.snapshots.clone();
        snapshots.retain(|snapshot| !snapshot.is_pin());
        let at = match self.snapshot_table_clusters(&snapshots)? {
            0 => HostOffset(0),
            clusters => self.allocate(clusters)?,
        };
        self.put_snapshot_table(snapshots, at, None)?;
        self.pins.forget_all();
        Ok(())
    }
}
