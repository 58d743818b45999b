//! Makes bitmaps usable again that a crash, or damage, has left unusable.
//!
//! A bitmap that was left in use may miss changes. What never misses one names everything: so it is
//! repaired, and the next backup by it is a full one.
//!
//! * Always: an entry is marked in use before its table changes, so that nobody trusts it half-way.
//! * Never: a cluster is allocated or freed; a check finds what is left behind.

use std::collections::HashSet;

use super::super::format::{
    BitmapCluster, BitmapEntry, BitmapFlags, BitmapTableEntry, BitmapsExtension, Header, StoredName,
};
use super::super::header_change::change_header;
use super::store::table_bytes;
use super::{FLAGS_AT, directory};
use crate::buffer::Buffer;
use crate::storage::Storage;
use crate::units::HostOffset;
use crate::{ErrorKind, Result};

/// What a repair of bitmaps found and did.
///
/// ```
/// assert!(!lacuna::qcow2::BitmapRepairs::default().changed_anything());
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BitmapRepairs {
    /// All bitmaps were out of date, since somebody had changed the disk who knew none: they are
    /// gone.
    pub outdated: bool,
    /// Entries of the directory that could not be read, with all behind them: they are gone.
    pub lost_entries: u32,
    /// They had been left in use, and name the whole disk now.
    pub all_dirty: Vec<StoredName>,
    /// They cannot be used, and stay so: removing them is all that helps.
    pub broken: Vec<StoredName>,
}

impl BitmapRepairs {
    /// Says whether the image is another one than before; clusters may have leaked then.
    #[must_use]
    pub fn changed_anything(&self) -> bool {
        *self != Self::default()
    }
}

/// Makes the bitmaps of an image usable again, as far as that can be. Nobody else may use the
/// image. Durable on return.
///
/// Bitmaps that were left in use name the whole disk afterwards. Clusters of bits that nothing
/// names any more leak, until a check frees them.
///
/// # Errors
/// What reading and writing give, and what [`read_header`](crate::qcow2::read_header) does.
///
/// ```
/// use lacuna::qcow2::{CreateOptions, create, repair_bitmaps};
/// use lacuna::storage::MemoryStorage;
/// let storage = MemoryStorage::new();
/// pollster::block_on(create(&storage, &CreateOptions { size_bytes: 512, ..Default::default() }))?;
/// assert!(!pollster::block_on(repair_bitmaps(&storage))?.changed_anything());
/// # Ok::<_, lacuna::Error>(())
/// ```
pub async fn repair_bitmaps<S: Storage>(storage: &S) -> Result<BitmapRepairs> {
    let mut repairs = BitmapRepairs::default();
    let header = super::super::read_header(storage).await?;
    let Some(extension) = header.extensions.bitmaps else { return Ok(repairs) };
    if header.valid_bitmaps().is_none() {
        repairs.outdated = true;
        set_directory(storage, None).await?;
        return Ok(repairs);
    }
    let header = match directory(storage, &header).await {
        Ok(_) => header,
        Err(_) => {
            let kept = readable_part(storage, extension).await?;
            repairs.lost_entries = extension.count - kept.map_or(0, |kept| kept.count);
            set_directory(storage, kept).await?
        }
    };
    let mut names = HashSet::new();
    for (at, entry) in directory(storage, &header).await? {
        let is_second = !names.insert(entry.name.clone());
        let table = sound_table(storage, &header, &entry).await?;
        let table = table.filter(|_| !is_second);
        repair_entry(storage, (at, entry), table, &mut repairs).await?;
    }
    Ok(repairs)
}

async fn repair_entry<S: Storage>(
    storage: &S,
    (at, entry): (HostOffset, BitmapEntry),
    sound: Option<Vec<BitmapTableEntry>>,
    repairs: &mut BitmapRepairs,
) -> Result<()> {
    match sound {
        Some(table) if entry.flags.contains(BitmapFlags::IN_USE) => {
            name_everything(storage, at, &entry, table).await?;
            repairs.all_dirty.push(entry.name);
        }
        Some(_) => {}
        None => {
            // Nobody follows it from here on, and the image can be opened.
            write_flags(storage, at, entry.flags | BitmapFlags::IN_USE).await?;
            repairs.broken.push(entry.name);
        }
    }
    Ok(())
}

/// Has the header name other bitmaps, or none.
async fn set_directory<S: Storage>(
    storage: &S,
    directory: Option<BitmapsExtension>,
) -> Result<Header> {
    change_header(storage, |header| {
        header.name_bitmaps(directory);
        Ok(())
    })
    .await
}

/// Returns what of a directory can be read: entries up to the first that cannot.
async fn readable_part<S: Storage>(
    storage: &S,
    extension: BitmapsExtension,
) -> Result<Option<BitmapsExtension>> {
    let in_file = storage.len().await?.saturating_sub(extension.directory_offset.0);
    let bytes = Buffer::new(extension.directory_bytes.min(in_file) as usize);
    let (result, bytes) = storage.read_at(extension.directory_offset, bytes).await;
    result.map_err(|error| error.context("Reading the bitmap directory"))?;
    let (count, directory_bytes) = BitmapEntry::readable(&bytes, extension.count);
    Ok((count > 0).then_some(BitmapsExtension { count, directory_bytes, ..extension }))
}

/// Returns the table of a bitmap in which everything is as it must be.
async fn sound_table<S: Storage>(
    storage: &S,
    header: &Header,
    entry: &BitmapEntry,
) -> Result<Option<Vec<BitmapTableEntry>>> {
    let settled = BitmapEntry { flags: entry.flags - BitmapFlags::IN_USE, ..entry.clone() };
    if settled.check(&header.geometry, header.size_bytes).is_err() {
        return Ok(None);
    }
    let file_bytes = storage.len().await?;
    let table_bytes = u64::from(entry.table_entries) * 8;
    if entry.table_offset.0.saturating_add(table_bytes) > file_bytes {
        return Ok(None);
    }
    let buffer = Buffer::new(table_bytes as usize);
    let (result, bytes) = storage.read_at(entry.table_offset, buffer).await;
    match result {
        Err(error) if error.kind() == ErrorKind::OutOfBounds => return Ok(None),
        result => result?,
    }
    let words = bytes.as_chunks::<8>().0.iter();
    let table: Vec<_> = words.map(|word| BitmapTableEntry(u64::from_be_bytes(*word))).collect();
    let is_sound = |entry: &BitmapTableEntry| entry.is_sound(&header.geometry, file_bytes);
    Ok(table.iter().all(is_sound).then_some(table))
}

/// Has a bitmap that is marked in use name the whole disk, and takes the mark off.
async fn name_everything<S: Storage>(
    storage: &S,
    at: HostOffset,
    entry: &BitmapEntry,
    mut table: Vec<BitmapTableEntry>,
) -> Result<()> {
    table.fill(BitmapTableEntry::new(BitmapCluster::AllOnes));
    storage.write_at(entry.table_offset, Buffer::from(&table_bytes(&table)[..])).await.0?;
    storage.flush().await?;
    write_flags(storage, at, entry.flags - BitmapFlags::IN_USE).await
}

async fn write_flags<S: Storage>(storage: &S, at: HostOffset, flags: BitmapFlags) -> Result<()> {
    let bytes = Buffer::from(&flags.bits().to_be_bytes()[..]);
    storage.write_at(at + FLAGS_AT, bytes).await.0?;
    storage.flush().await
}
