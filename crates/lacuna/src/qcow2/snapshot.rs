//! An internal snapshot as a disk of its own, without applying it.
//!
//! * Always: requests go the way of those for the disk, by another map and with the size that the
//!   disk had; tables come from the same cache.
//! * Never: anything of a snapshot is changed.

use std::sync::Arc;

use super::format::{L1Entry, Snapshot, StoredName, Version};
use super::image::Image;
use super::snapshots;
use super::view::{SnapshotMap, View};
use crate::block::{Extent, KnownZeroes, Layer};
use crate::buffer::Buffer;
use crate::storage::{HostSource, Storage, Transfer};
use crate::units::{GuestOffset, GuestRange};
use crate::{Error, ErrorKind, Result};

/// Which snapshot of an image is meant.
///
/// Identifiers are unique in an image; of several snapshots with one name the first in the table
/// counts.
///
/// ```
/// use lacuna::qcow2::SnapshotChoice;
/// use lacuna::qcow2::format::{L1Location, Snapshot};
/// use lacuna::units::HostOffset;
///
/// let l1 = L1Location { offset: HostOffset(0x50000), entries: 1 };
/// let table = [Snapshot::new("1", "2", l1, 512), Snapshot::new("2", "b", l1, 512)];
/// let found = SnapshotChoice::IdOrName("2".into()).find(&table).unwrap();
/// assert_eq!(found.name.as_bytes(), b"b");
/// assert!(SnapshotChoice::Both { id: "1".into(), name: "b".into() }.find(&table).is_none());
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SnapshotChoice {
    /// The one with this identifier and this name.
    Both {
        /// The identifier.
        id: StoredName,
        /// The name.
        name: StoredName,
    },
    /// The one with this identifier.
    Id(StoredName),
    /// The one with this identifier; where there is none, the one with this name. What QEMU's
    /// programs make of a single word.
    IdOrName(StoredName),
    /// The one with this name.
    Name(StoredName),
}

impl SnapshotChoice {
    /// Returns the snapshot of a table that is meant, if it is there.
    #[must_use]
    pub fn find<'a>(&self, snapshots: &'a [Snapshot]) -> Option<&'a Snapshot> {
        let first = |matches: &dyn Fn(&Snapshot) -> bool| snapshots.iter().find(|it| matches(it));
        match self {
            Self::Both { id, name } => first(&|it| it.id == *id && it.name == *name),
            Self::Id(id) => first(&|it| it.id == *id),
            Self::IdOrName(word) => {
                first(&|it| it.id == *word).or_else(|| first(&|it| it.name == *word))
            }
            Self::Name(name) => first(&|it| it.name == *name),
        }
    }
}

impl std::fmt::Display for SnapshotChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Both { id, name } => write!(f, "identifier '{id}' and name '{name}'"),
            Self::Id(id) => write!(f, "identifier '{id}'"),
            Self::IdOrName(word) => write!(f, "identifier or name '{word}'"),
            Self::Name(name) => write!(f, "name '{name}'"),
        }
    }
}

/// The disk of a qcow2 image as it was when a snapshot was made; read-only.
///
/// Cheap to clone; clones are one disk. It stays as it was while the image is written through
/// [`image`](Self::image) or a clone of it. It shares the image's files and its table cache with
/// the bound of that; the L1 table takes up to 32 MiB more, once for all clones. The backing layer
/// is that of the image.
///
/// A contradiction in the snapshot's map fails the request that finds it, and does not close the
/// image to changes.
///
/// ```no_run
/// use lacuna::block::Layer;
/// use lacuna::buffer::Buffer;
/// use lacuna::qcow2::{Access, Image, OpenOptions, Parts, SnapshotChoice};
/// use lacuna::storage::{FileOptions, FileStorage};
/// use lacuna::units::GuestOffset;
///
/// # pollster::block_on(async {
/// let file = FileStorage::open("disk.qcow2", &FileOptions::read_only())?;
/// let image = Image::open(Parts::alone(file), OpenOptions::new(Access::ReadOnly)).await?;
/// let disk = image.snapshot(&SnapshotChoice::Name("before the upgrade".into())).await?;
/// println!("{} bytes, made at {}", disk.size_bytes(), disk.description().created_seconds);
/// let (result, sector) = disk.read(GuestOffset(0), Buffer::new(512)).await;
/// # result?; drop(sector);
/// # Ok::<_, lacuna::Error>(())
/// # });
/// ```
pub struct SnapshotLayer<S: Storage> {
    image: Image<S>,
    of: Arc<Described>,
}

struct Described {
    snapshot: Snapshot,
    map: Arc<SnapshotMap>,
    /// Keeps the snapshot from being deleted.
    _reader: Arc<()>,
}

impl<S: Storage> Clone for SnapshotLayer<S> {
    fn clone(&self) -> Self {
        Self { image: self.image.clone(), of: Arc::clone(&self.of) }
    }
}

impl<S: Storage> std::fmt::Debug for SnapshotLayer<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SnapshotLayer").field("snapshot", &self.of.snapshot).finish_non_exhaustive()
    }
}

impl<S: Storage> Image<S> {
    /// Reads the snapshot table: all snapshots in the order in which they were made.
    ///
    /// # Errors
    /// `Corrupt` where the table cannot be decoded, else what reading gives.
    ///
    /// ```
    /// use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
    /// use lacuna::storage::MemoryStorage;
    /// # pollster::block_on(async {
    /// let storage = MemoryStorage::new();
    /// create(&storage, &CreateOptions { size_bytes: 512, ..Default::default() }).await?;
    /// let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadOnly)).await?;
    /// assert!(image.snapshots().await?.is_empty());
    /// # Ok::<_, lacuna::Error>(())
    /// # })?;
    /// # Ok::<_, lacuna::Error>(())
    /// ```
    pub async fn snapshots(&self) -> Result<Vec<Snapshot>> {
        // Storage does not go by another table meanwhile.
        let _turn = self.0.turn.take().await;
        let header = self.header();
        Ok(snapshots::read_table(&self.0.storage, &header).await?.0)
    }

    /// Returns the disk as it was when a snapshot was made, with the size that it had then.
    ///
    /// # Errors
    /// `NotFound` where there is no such snapshot; `Corrupt` where it cannot be read: its L1 table
    /// lies where none can lie or is too short for its disk, or an image of version 3 does not say
    /// the size of its disk. `Unsupported` with an external data file, which keeps no old content, and for what
    /// [is no snapshot](Snapshot::is_pin).
    pub async fn snapshot(&self, choice: &SnapshotChoice) -> Result<SnapshotLayer<S>> {
        if self.0.header.lock().has_external_data_file() {
            return Err(Error::unsupported(
                "Data lies in an external file, which keeps nothing for snapshots",
            ));
        }
        // Tables get no other place, and no snapshot goes, between a look at them and the note that
        // somebody has them.
        let _tables_stay = self.keep_pins().await?;
        let table = self.snapshots().await?;
        let found = choice.find(&table).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("The image has no snapshot with {choice}"))
        })?;
        if found.is_pin() {
            return Err(Error::unsupported(format!(
                "'{}' is no snapshot of the disk: it holds clusters that parts of the disk share",
                found.name
            )));
        }
        let map = self.load_map(found).await.map_err(|error| {
            error.context(format!("Snapshot '{}' (identifier '{}')", found.name, found.id))
        })?;
        let map = Arc::new(map);
        let _reader = {
            let mut meta = self.0.meta.lock();
            meta.note_snapshot_map(&map);
            meta.readers.note(&found.id)
        };
        let of = Arc::new(Described { snapshot: found.clone(), map, _reader });
        Ok(SnapshotLayer { image: self.clone(), of })
    }

    async fn load_map(&self, snapshot: &Snapshot) -> Result<SnapshotMap> {
        let geometry = self.geometry();
        snapshot.check_l1(&geometry)?;
        let size_bytes = self.size_of(snapshot)?;
        let (needed, there) = (geometry.l1_entries_for(size_bytes), snapshot.l1.entries);
        if needed > u64::from(there) {
            return Err(Error::corrupt(format!(
                "L1 table has {there} entries; a disk of {size_bytes} bytes needs {needed}"
            )));
        }
        let (offset, len) = (snapshot.l1.offset, needed * 8);
        if offset.0 + len > self.0.storage.len().await? {
            return Err(Error::corrupt(format!(
                "L1 table of {len} bytes at {offset} passes the end of the file"
            )));
        }
        let l1 = L1Entry::decode(&self.load(offset, len, "L1 table").await?);
        Ok(SnapshotMap { l1: parking_lot::Mutex::new(l1), size_bytes })
    }

    /// Version 2 need not say it: such an image is never resized while it has snapshots (B.9).
    fn size_of(&self, snapshot: &Snapshot) -> Result<u64> {
        match (snapshot.disk_size_bytes, self.geometry().version()) {
            (Some(size_bytes), _) => Ok(size_bytes / 512 * 512),
            (None, Version::V2) => Ok(self.size()),
            (None, Version::V3) => Err(Error::corrupt(
                "The size of its disk is missing; check -r all would take that of the disk now",
            )),
        }
    }
}

impl<S: Storage> SnapshotLayer<S> {
    /// Returns what the snapshot table says of it.
    #[must_use]
    pub fn description(&self) -> &Snapshot {
        &self.of.snapshot
    }

    /// Returns the image that has the snapshot.
    #[must_use]
    pub const fn image(&self) -> &Image<S> {
        &self.image
    }

    fn view(&self) -> View<'_> {
        View::Snapshot(&self.of.map)
    }
}

impl<S: Storage> Layer for SnapshotLayer<S> {
    fn size_bytes(&self) -> u64 {
        self.of.map.size_bytes
    }

    fn zero_unit_bytes(&self) -> u64 {
        self.image.zero_unit_bytes()
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        let maps_nothing = self.of.map.l1.lock().iter().all(|entry| entry.table().is_none());
        let open = maps_nothing
            && match &self.image.0.backing {
                Some(backing) => backing.known_zeroes_boxed().await?.open,
                None => true,
            };
        Ok(KnownZeroes { open, ..KnownZeroes::NOTHING })
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        self.image.read_guest(self.view(), offset, buffer).await
    }

    fn host_source(&self, extent: &Extent) -> Option<HostSource> {
        self.image.source_of(extent)
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        self.image.extents_of(self.view(), range).await
    }
}
