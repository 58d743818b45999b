//! Makes, removes, clears, enables and disables bitmaps, while the image is in use.

use std::collections::HashSet;

use super::super::format::{BitmapEntry, BitmapFlags, BitmapTableEntry, Geometry, StoredName};
use super::super::image::Image;
use super::directory::AtRest;
use super::size::{Measure, ranges_of};
use crate::storage::Storage;
use crate::units::{HostOffset, HostRange};
use crate::{Error, ErrorKind, Result};

/// Bytes that a bit of a new bitmap stands for, at least and at most, where nobody says it.
const USUAL_GRANULARITY: (u64, u64) = (4 << 10, 64 << 10);
/// What the format allows (B.10).
const GRANULARITY: (u64, u64) = (512, 2 << 30);

/// A bitmap to be made: of everything that changes from then on.
///
/// ```
/// use lacuna::qcow2::NewBitmap;
/// let bitmap = NewBitmap { granularity_bytes: Some(1 << 20), ..NewBitmap::new("since-monday") };
/// assert!(bitmap.is_enabled);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewBitmap {
    /// What to call it: 1 to 1023 bytes, and no other bitmap of the image is called so.
    pub name: StoredName,
    /// The guest bytes that one bit stands for: a power of two, 512 to 2 GiB. By default the
    /// cluster size, but 4 KiB to 64 KiB, as QEMU has it.
    pub granularity_bytes: Option<u64>,
    /// Whether it records what changes from now on.
    pub is_enabled: bool,
}

impl NewBitmap {
    /// Describes an enabled bitmap of the usual granularity.
    #[must_use]
    pub fn new(name: impl Into<StoredName>) -> Self {
        Self { name: name.into(), granularity_bytes: None, is_enabled: true }
    }
}

impl<S: Storage> Image<S> {
    /// Makes a bitmap in which nothing has changed yet. Durable on return: what is acknowledged
    /// after that is recorded, what was acknowledged before is not.
    ///
    /// # Errors
    /// `InvalidRequest` for a name that is taken, empty or too long, and for a granularity that is
    /// none; `Unsupported` for version 2; `NoSpace` where a bitmap of that granularity would be too
    /// large; `ReadOnly`; else what reading and writing give. There is no new bitmap then.
    ///
    /// ```
    /// use lacuna::block::{Layer, WriteFlags};
    /// use lacuna::buffer::Buffer;
    /// use lacuna::qcow2::{Access, CreateOptions, Image, NewBitmap, OpenOptions, Parts, create};
    /// use lacuna::storage::MemoryStorage;
    /// use lacuna::units::GuestOffset;
    ///
    /// pollster::block_on(async {
    ///     let storage = MemoryStorage::new();
    ///     create(&storage, &CreateOptions { size_bytes: 1 << 30, ..Default::default() }).await?;
    ///     let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadWrite)).await?;
    ///     image.add_bitmap(&NewBitmap::new("since-monday")).await?;
    ///     image.write(GuestOffset(1 << 20), Buffer::from(&[7; 512][..]), WriteFlags::empty()).await.0?;
    ///     let mut changed = image.bitmap(&"since-monday".into()).await?.ranges();
    ///     let first = changed.next().await?.unwrap();
    ///     assert_eq!((first.start.0, first.len), (1 << 20, 64 << 10));
    ///     image.close().await
    /// }).unwrap();
    /// ```
    pub async fn add_bitmap(&self, new: &NewBitmap) -> Result<()> {
        let mut rest = self.bitmaps_at_rest().await?;
        rest.add(new).await?;
        let entries = std::mem::take(&mut rest.entries);
        rest.replace(&entries, Vec::new()).await
    }

    /// Removes a bitmap, usable or not; of several of one name the last. Durable on return.
    ///
    /// # Errors
    /// `NotFound`; `ReadOnly`; else what reading and writing give.
    ///
    /// ```no_run
    /// # async fn example<S: lacuna::storage::Storage>(
    /// #     image: &lacuna::qcow2::Image<S>,
    /// # ) -> lacuna::Result<()> {
    /// image.remove_bitmap(&"since-monday".into()).await
    /// # }
    /// ```
    pub async fn remove_bitmap(&self, name: &StoredName) -> Result<()> {
        let mut rest = self.bitmaps_at_rest().await?;
        let gone = rest.index_of(name)?;
        let entry = rest.entries.remove(gone);
        // What a broken bitmap names may be anybody's; a check finds what it leaves behind.
        let dropped = self.bitmap_ranges(&entry).await.unwrap_or_default();
        let entries = std::mem::take(&mut rest.entries);
        rest.replace(&entries, dropped).await
    }

    /// Has a bitmap say that nothing has changed. Durable on return: what is acknowledged after
    /// that is recorded, if the bitmap is enabled.
    ///
    /// # Errors
    /// As [`bitmap`](Self::bitmap); `ReadOnly`; what writing gives.
    ///
    /// ```no_run
    /// # async fn example<S: lacuna::storage::Storage>(
    /// #     image: &lacuna::qcow2::Image<S>,
    /// # ) -> lacuna::Result<()> {
    /// image.clear_bitmap(&"since-monday".into()).await
    /// # }
    /// ```
    pub async fn clear_bitmap(&self, name: &StoredName) -> Result<()> {
        let rest = self.bitmaps_at_rest().await?;
        let index = rest.usable(name)?;
        let entries = rest.entries[index].table_entries as usize;
        rest.store(index, &vec![BitmapTableEntry::default(); entries]).await
    }

    /// Has a bitmap record what changes from now on, or not any more. Durable on return.
    ///
    /// # Errors
    /// As [`bitmap`](Self::bitmap); `ReadOnly`; what writing gives.
    ///
    /// ```no_run
    /// # async fn example<S: lacuna::storage::Storage>(
    /// #     image: &lacuna::qcow2::Image<S>,
    /// # ) -> lacuna::Result<()> {
    /// image.enable_bitmap(&"since-monday".into(), false).await
    /// # }
    /// ```
    pub async fn enable_bitmap(&self, name: &StoredName, is_enabled: bool) -> Result<()> {
        let mut rest = self.bitmaps_at_rest().await?;
        let index = rest.usable(name)?;
        let before = rest.entries[index].flags;
        rest.entries[index].flags.set(BitmapFlags::AUTO, is_enabled);
        if rest.entries[index].flags == before {
            return Ok(());
        }
        let entries = std::mem::take(&mut rest.entries);
        rest.replace(&entries, Vec::new()).await
    }

    /// Describes a bitmap that was not written yet.
    fn entry_of(&self, new: &NewBitmap) -> Result<BitmapEntry> {
        if new.name.is_empty() {
            return Err(Error::invalid("Bitmap name cannot be empty"));
        }
        let (least, most) = USUAL_GRANULARITY;
        let usual = self.geometry().cluster_bytes().clamp(least, most);
        let granularity = new.granularity_bytes.unwrap_or(usual);
        let (least, most) = GRANULARITY;
        if !granularity.is_power_of_two() || !(least..=most).contains(&granularity) {
            return Err(Error::invalid(format!(
                "Granularity is {granularity} bytes; a power of two from {least} to {most} would be right"
            )));
        }
        let bits = granularity.trailing_zeros() as u8;
        let mut entry = BitmapEntry::new("", HostOffset(self.geometry().cluster_bytes()), 1, bits);
        entry.name = new.name.clone();
        entry.flags.set(BitmapFlags::AUTO, new.is_enabled);
        let size_bytes = self.0.meta.lock().size_bytes;
        let chunks = Measure::of(&entry, &self.geometry()).chunks(size_bytes);
        entry.table_entries = u32::try_from(chunks).unwrap_or(u32::MAX);
        // Of these fields, only those can be wrong that the caller gave.
        entry
            .check(&self.geometry(), size_bytes)
            .map_err(|error| Error::new(ErrorKind::InvalidRequest, error.to_string()))?;
        Ok(entry)
    }

    /// Returns what a bitmap takes in the file.
    pub(super) async fn bitmap_ranges(&self, entry: &BitmapEntry) -> Result<Vec<HostRange>> {
        let size_bytes = self.0.meta.lock().size_bytes;
        entry.check(&self.geometry(), size_bytes)?;
        let table = self.checked_table(entry).await?;
        Ok(ranges_of(entry, &table, &self.geometry()))
    }
}

impl<S: Storage> AtRest<'_, S> {
    /// Finds a bitmap by its name: the last, for an earlier one of the same name is the sound one.
    pub(super) fn index_of(&self, name: &StoredName) -> Result<usize> {
        let found = self.entries.iter().rposition(|entry| entry.name == *name);
        found.ok_or_else(|| self.image.no_bitmap(name))
    }

    /// Finds a bitmap whose content can be believed.
    pub(super) fn usable(&self, name: &StoredName) -> Result<usize> {
        let first = self.entries.iter().position(|entry| entry.name == *name);
        let index = first.ok_or_else(|| self.image.no_bitmap(name))?;
        let entry = &self.entries[index];
        if entry.flags.contains(BitmapFlags::IN_USE) {
            return Err(super::super::dirty::left_in_use(name));
        }
        entry.check(&self.image.geometry(), self.image.0.meta.lock().size_bytes)?;
        Ok(index)
    }

    /// Adds a bitmap in which nothing has changed, to be named by the next directory.
    pub(super) async fn add(&mut self, new: &NewBitmap) -> Result<()> {
        if self.index_of(&new.name).is_ok() {
            return Err(Error::invalid(format!("Bitmap already exists: {}", new.name)));
        }
        let entry = self.image.entry_of(new)?;
        let table = vec![BitmapTableEntry::default(); entry.table_entries as usize];
        self.entries.push(self.image.write_table(&entry, &table).await?);
        Ok(())
    }

    /// Gives a bitmap another table, whose data lies in new clusters; gives the old ones back.
    pub(super) async fn store(mut self, index: usize, table: &[BitmapTableEntry]) -> Result<()> {
        let dropped = self.change_table(index, table).await?;
        let entries = std::mem::take(&mut self.entries);
        self.replace(&entries, dropped).await
    }

    /// Has the next directory name another table of a bitmap; returns what only the old one named.
    pub(super) async fn change_table(
        &mut self,
        index: usize,
        table: &[BitmapTableEntry],
    ) -> Result<Vec<HostRange>> {
        let old = &self.entries[index];
        let before = self.image.bitmap_ranges(old).await?;
        let dropped = no_longer_named(before, old, table, &self.image.geometry());
        self.entries[index] = self.image.write_table(old, table).await?;
        Ok(dropped)
    }
}

/// Returns what of the places of a bitmap another table, at another place, does not name.
pub(super) fn no_longer_named(
    before: Vec<HostRange>,
    old: &BitmapEntry,
    table: &[BitmapTableEntry],
    geometry: &Geometry,
) -> Vec<HostRange> {
    let kept: HashSet<HostRange> = ranges_of(old, table, geometry).into_iter().collect();
    let is_gone = |range: &HostRange| range.start == old.table_offset || !kept.contains(range);
    before.into_iter().filter(is_gone).collect()
}
