//! Internal snapshots made, applied and deleted, each by one switch.
//!
//! The story: everybody else waits and storage is brought as far as memory (`quiet`); the maps are
//! walked, their references counted and COPIED flags put right (`walk`, `counts`); what is to be
//! different goes to free clusters, and one write to the header switches to it (`change`).
//!
//! * Always: refcounts are changed block by block in memory, and written once.
//! * Always: a snapshot is found by what the image says now, not by what a caller saw before.
//! * Never: the snapshot that holds pins is applied or deleted here (docs/design/dedup.md).
//! * Never with an external data file, which keeps no old content.

mod change;
mod compare;
mod counts;
mod quiet;
mod walk;

use std::sync::{Arc, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use self::change::{Change, Fields};
use self::walk::{Named, Visit};
use super::format::{
    AutoclearFeatures, L1Entry, L1Location, MAX_SNAPSHOTS, Snapshot, StoredName, Version,
};
use super::image::Image;
use super::meta::Meta;
use super::need::{Need, Planned};
use super::resize::Shrink;
use super::snapshot::SnapshotChoice;
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange};
use crate::{Error, ErrorKind, Result};

/// QEMU cuts longer names off.
const MAX_NAME_BYTES: usize = 255;

impl<S: Storage> Image<S> {
    /// Keeps the disk as it is now as an internal snapshot, with the next free number as identifier.
    /// Returns it. Durable on return; a guest reads the same.
    ///
    /// Other requests wait meanwhile. A crash, a failure or a drop leaves the image as it was or with
    /// the snapshot, and no leak in either case. Names need not be unique. It takes a cluster or more
    /// for the snapshot, and for the time of the change as much as the L2 tables have that were
    /// written since the last snapshot.
    ///
    /// # Errors
    /// `ReadOnly`; `Unsupported` with an external data file; `InvalidRequest` for a name of more than
    /// 255 bytes and where a refcount cannot count one more reference; `NoSpace` where there are
    /// 65536 snapshots; `Corrupt` where a table contradicts itself; before anything changes. Else what
    /// reading and writing give: where the switch itself failed, nobody knows if it happened, and the
    /// image takes no more changes until it is opened again.
    ///
    /// ```
    /// use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
    /// use lacuna::storage::MemoryStorage;
    /// use std::time::SystemTime;
    /// # pollster::block_on(async {
    /// let storage = MemoryStorage::new();
    /// create(&storage, &CreateOptions { size_bytes: 1 << 20, ..Default::default() }).await?;
    /// let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadWrite)).await?;
    /// let made = image.create_snapshot(&"monday".into(), SystemTime::now()).await?;
    /// assert_eq!(made.id.as_bytes(), b"1");
    /// assert_eq!(image.snapshots().await?, [made]);
    /// # image.close().await
    /// # }).unwrap();
    /// ```
    pub async fn create_snapshot(&self, name: &StoredName, made: SystemTime) -> Result<Snapshot> {
        self.check_keeps_history()?;
        if name.len() > MAX_NAME_BYTES {
            return Err(Error::invalid(format!(
                "The name of a snapshot has {} bytes; at most {MAX_NAME_BYTES} are allowed",
                name.len()
            )));
        }
        let mut change = Change::begin(self).await?;
        let made = change.create(name, made).await;
        change.conclude(made).await
    }

    /// Makes the disk what it was when a snapshot was made, of the size that it had then. Returns the
    /// snapshot, which stays. Durable on return; what the disk was before is lost.
    ///
    /// Other requests wait meanwhile. Enabled bitmaps are told of all that differs, and claims of being
    /// zero go. A crash, a failure or a drop leaves the disk as it was or as it is to be; with bitmaps
    /// and another size it may have changed only its size.
    ///
    /// # Errors
    /// `NotFound`; `Unsupported` for what holds shared clusters and is [no snapshot](Snapshot::is_pin),
    /// and for another size of version 2; else as for
    /// [`create_snapshot`](Self::create_snapshot) and, with bitmaps, [`resize`](Self::resize).
    ///
    /// ```
    /// # use lacuna::block::{Layer, WriteFlags};
    /// # use lacuna::buffer::Buffer;
    /// # use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
    /// # use lacuna::storage::MemoryStorage;
    /// # use lacuna::units::GuestOffset;
    /// use lacuna::qcow2::SnapshotChoice;
    /// # use std::time::SystemTime;
    /// # pollster::block_on(async {
    /// # let storage = MemoryStorage::new();
    /// # create(&storage, &CreateOptions { size_bytes: 1 << 20, ..Default::default() }).await?;
    /// # let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadWrite)).await?;
    /// image.create_snapshot(&"empty".into(), SystemTime::now()).await?;
    /// image.write(GuestOffset(0), Buffer::from(&[7; 512][..]), WriteFlags::empty()).await.0?;
    /// image.apply_snapshot(&SnapshotChoice::Name("empty".into())).await?;
    /// let (result, bytes) = image.read(GuestOffset(0), Buffer::new(512)).await;
    /// result?;
    /// assert_eq!(bytes[0], 0);
    /// # image.close().await
    /// # }).unwrap();
    /// ```
    pub async fn apply_snapshot(&self, choice: &SnapshotChoice) -> Result<Snapshot> {
        self.check_keeps_history()?;
        self.resize_for_bitmaps(choice).await?;
        let mut change = loop {
            // Storage knows that bitmaps may miss something, before anything changes.
            self.plan(Meta::expect_change_of_all).await?;
            let change = Change::begin(self).await?;
            if self.0.meta.lock().expect_change_of_all().is_ok() {
                break change;
            }
        };
        let applied = change.apply(choice).await;
        change.conclude(applied).await
    }

    /// Deletes a snapshot, and gives the space back that nothing else uses. Returns what it was.
    /// Durable on return; a guest reads the same.
    ///
    /// Other requests wait meanwhile. A crash, a failure or a drop leaves the snapshot or takes it
    /// whole.
    ///
    /// # Errors
    /// `NotFound`; `Busy` while it is [read](Self::snapshot); `Unsupported` for what holds shared
    /// clusters and is [no snapshot](Snapshot::is_pin); else as for
    /// [`create_snapshot`](Self::create_snapshot).
    ///
    /// ```
    /// # use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, SnapshotChoice, create};
    /// # use lacuna::storage::MemoryStorage;
    /// # use std::time::SystemTime;
    /// # pollster::block_on(async {
    /// # let storage = MemoryStorage::new();
    /// # create(&storage, &CreateOptions { size_bytes: 1 << 20, ..Default::default() }).await?;
    /// # let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadWrite)).await?;
    /// image.create_snapshot(&"monday".into(), SystemTime::now()).await?;
    /// image.delete_snapshot(&SnapshotChoice::Id("1".into())).await?;
    /// assert!(image.snapshots().await?.is_empty());
    /// # image.close().await
    /// # }).unwrap();
    /// ```
    pub async fn delete_snapshot(&self, choice: &SnapshotChoice) -> Result<Snapshot> {
        self.check_keeps_history()?;
        let mut change = Change::begin(self).await?;
        let deleted = change.delete(choice).await;
        change.conclude(deleted).await
    }

    fn check_keeps_history(&self) -> Result<()> {
        self.check_writable()?;
        match self.0.header.lock().has_external_data_file() {
            true => Err(Error::unsupported(
                "Data lies in an external file, which keeps nothing for snapshots",
            )),
            false => Ok(()),
        }
    }

    /// Bitmaps are made longer or shorter by a change of the size, which their tables need.
    async fn resize_for_bitmaps(&self, choice: &SnapshotChoice) -> Result<()> {
        if self.0.header.lock().valid_bitmaps().is_none() {
            return Ok(());
        }
        let all = self.snapshots().await?;
        let size_bytes = find(choice, &all, "applied")?.disk_size_bytes;
        match size_bytes {
            Some(size_bytes) if size_bytes != self.header().size_bytes => {
                self.resize(size_bytes, Shrink::Allow).await
            }
            _ => Ok(()),
        }
    }
}

impl Meta {
    /// Asks for what bitmaps need before any of the disk may change, without a mark in them.
    fn expect_change_of_all(&mut self) -> Planned<()> {
        if self.gate.bitmaps {
            return Err(Need::FirstChange.into());
        }
        match self.bitmaps.may_change(GuestRange::new(GuestOffset(0), self.size_bytes)) {
            true => Ok(()),
            false => Err(Need::BitmapIntent.into()),
        }
    }
}

/// Returns the place of a snapshot that is to be `done`.
fn find<'a>(choice: &SnapshotChoice, all: &'a [Snapshot], done: &str) -> Result<&'a Snapshot> {
    let found = choice.find(all).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("The image has no snapshot with {choice}"))
    })?;
    if found.is_pin() {
        return Err(Error::unsupported(format!(
            "'{}' is no snapshot of the disk and cannot be {done}: it holds clusters that parts of the \
             disk share; `dedup --unpin` takes it off",
            found.name
        )));
    }
    Ok(found)
}

impl<S: Storage> Change<'_, S> {
    /// Switches to what was made ready, or gives it up.
    async fn conclude(self, ready: Result<(Snapshot, Fields)>) -> Result<Snapshot> {
        match ready {
            Ok((snapshot, fields)) => self.finish(fields).await.map(|()| snapshot),
            Err(error) => Err(self.abandon(error).await),
        }
    }

    /// What the header says of the disk stays.
    fn unchanged(&self) -> Fields {
        let dropped_claims = AutoclearFeatures::empty();
        Fields { size_bytes: self.header.size_bytes, dropped_claims }
    }

    async fn create(&mut self, name: &StoredName, made: SystemTime) -> Result<(Snapshot, Fields)> {
        if self.snapshots.len() >= MAX_SNAPSHOTS as usize {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!("The image has {MAX_SNAPSHOTS} snapshots; the format keeps no more"),
            ));
        }
        let tables = self.named(&self.l1, "The L1 table")?;
        self.walk(&tables, Visit::Share).await?;
        self.have_an_entry();
        let offset = self.write_new(L1Entry::encode(&self.new_l1)).await?;
        let l1 = L1Location { offset, entries: self.new_l1.len() as u32 };
        let id = next_id(&self.snapshots);
        let since = made.duration_since(UNIX_EPOCH).unwrap_or_default();
        let snapshot = Snapshot {
            name: name.clone(),
            created_seconds: u32::try_from(since.as_secs()).unwrap_or(u32::MAX),
            created_nanoseconds: since.subsec_nanos(),
            // As QEMU's programs write it.
            instruction_count: Some(0),
            ..Snapshot::new(&id, "", l1, self.header.size_bytes)
        };
        self.snapshots.push(snapshot.clone());
        Ok((snapshot, self.unchanged()))
    }

    async fn apply(&mut self, choice: &SnapshotChoice) -> Result<(Snapshot, Fields)> {
        let snapshot = find(choice, &self.snapshots, "applied")?.clone();
        let size_bytes = self.size_of(&snapshot)?;
        let there = self.read_l1(&snapshot).await?;
        let needed = self.geometry.l1_entries_for(size_bytes);
        if (there.len() as u64) < needed {
            return Err(Error::corrupt(format!(
                "The L1 table of snapshot '{}' has {} entries; its disk of {size_bytes} bytes needs \
                 {needed}",
                snapshot.name,
                there.len()
            )));
        }
        self.mark_differences(&self.l1, &there, size_bytes).await?;
        let mut old = self.named(&self.l1, "The L1 table")?;
        let mut new = self.named(&there, "The L1 table of the snapshot")?;
        // What both have at one place keeps its references, and cannot have COPIED.
        let is_same = |index: usize| {
            let entry = |l1: &[L1Entry]| l1.get(index).and_then(|entry| entry.table());
            entry(&self.l1) == entry(&there)
        };
        old.retain(|named| !is_same(named.index));
        new.retain(|named| !is_same(named.index));
        self.new_l1 = there.iter().map(|entry| entry.with_copied(false)).collect();
        self.have_an_entry();
        self.walk(&old, Visit::Drop).await?;
        self.walk(&new, Visit::Show).await?;
        let dropped_claims = AutoclearFeatures::ZERO_CLAIMS;
        Ok((snapshot, Fields { size_bytes, dropped_claims }))
    }

    async fn delete(&mut self, choice: &SnapshotChoice) -> Result<(Snapshot, Fields)> {
        let snapshot = find(choice, &self.snapshots, "deleted")?.clone();
        if self.image.0.meta.lock().readers.are_of(&snapshot.id) {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("Snapshot '{}' is being read and cannot be deleted", snapshot.name),
            ));
        }
        let at = self.snapshots.iter().position(|it| *it == snapshot);
        self.snapshots.remove(at.unwrap_or_default());
        let gone = self.read_l1(&snapshot).await?;
        let mut gone = self.named(&gone, "The L1 table of the snapshot")?;
        let mut own = self.named(&self.l1, "The L1 table")?;
        let inherited = self.inherited(&gone).await?;
        // In order of the L1 table all of them.
        let is_inherited =
            |named: &Named| inherited.binary_search_by_key(&named.index, |it| it.index).is_ok();
        gone.retain(|named| !is_inherited(named));
        own.retain(|named| !is_inherited(named));
        self.walk(&gone, Visit::Drop).await?;
        // What they show twice, the disk goes on to show twice: no later table changes what is said here.
        self.walk(&inherited, Visit::Inherit).await?;
        self.drop_range(snapshot.l1.range()).await?;
        let own = self.with_references(own, 1).await?;
        self.walk(&own, Visit::Own).await?;
        Ok((snapshot, self.unchanged()))
    }

    /// Returns the tables that nobody has but the disk and the snapshot that goes, at one place.
    async fn inherited(&mut self, gone: &[Named]) -> Result<Vec<Named>> {
        let is_here = |named: &&Named| {
            self.l1.get(named.index).and_then(|it| it.table()) == Some(named.table)
        };
        let shared = gone.iter().filter(is_here).copied().collect();
        self.with_references(shared, 2).await
    }

    /// Returns the tables that have so many references.
    async fn with_references(&mut self, tables: Vec<Named>, count: u64) -> Result<Vec<Named>> {
        let mut found = Vec::new();
        for named in tables {
            if self.refcount(named.table).await? == count {
                found.push(named);
            }
        }
        Ok(found)
    }

    /// A table that takes a cluster has an entry: nothing else counts it as used.
    fn have_an_entry(&mut self) {
        if self.new_l1.is_empty() {
            self.new_l1.push(L1Entry::UNALLOCATED);
        }
    }

    /// Returns the size of the disk that a snapshot is of.
    fn size_of(&self, snapshot: &Snapshot) -> Result<u64> {
        let now = self.header.size_bytes;
        match (snapshot.disk_size_bytes, self.geometry.version()) {
            (Some(size), _) if !size.is_multiple_of(512) && size != now => {
                Err(Error::corrupt(format!(
                    "The disk of snapshot '{}' has {size} bytes, no whole sectors",
                    snapshot.name
                )))
            }
            (Some(size), Version::V2) if size != now => Err(Error::unsupported(format!(
                "The disk of snapshot '{}' has {size} bytes; that of a version 2 image with snapshots \
                 cannot be resized",
                snapshot.name
            ))),
            (Some(size), _) => Ok(size),
            (None, Version::V2) => Ok(now),
            (None, Version::V3) => Err(Error::corrupt(format!(
                "The size of the disk of snapshot '{}' is missing; check -r all would take that of the \
                 disk now",
                snapshot.name
            ))),
        }
    }

    async fn read_l1(&self, snapshot: &Snapshot) -> Result<Vec<L1Entry>> {
        snapshot.check_l1(&self.geometry)?;
        let range = snapshot.l1.range();
        if range.end().0 > self.file_bytes {
            return Err(Error::corrupt(format!(
                "The L1 table of snapshot '{}' at {} passes the end of the file",
                snapshot.name, range.start
            )));
        }
        let bytes = self.image.load(range.start, range.len, "L1 table of a snapshot").await?;
        Ok(L1Entry::decode(&bytes))
    }
}

/// Returns an identifier that no snapshot has: a number larger than all there are.
fn next_id(snapshots: &[Snapshot]) -> String {
    let numbers = snapshots.iter().map(|snapshot| leading_number(snapshot.id.as_bytes()));
    let mut id = numbers.max().unwrap_or(0).saturating_add(1);
    while snapshots.iter().any(|it| it.id.as_bytes() == id.to_string().as_bytes()) {
        id = id.wrapping_add(1);
    }
    id.to_string()
}

fn leading_number(id: &[u8]) -> u64 {
    let digits = id.iter().take_while(|byte| byte.is_ascii_digit());
    digits.fold(0, |number: u64, digit| {
        number.saturating_mul(10).saturating_add(u64::from(digit - b'0'))
    })
}

/// Snapshots that somebody reads, by their identifiers: their tables may move.
#[derive(Debug, Default)]
pub(super) struct Readers(Vec<(StoredName, Weak<()>)>);

impl Readers {
    /// Takes note of one who reads a snapshot, until what is returned is dropped.
    pub(super) fn note(&mut self, id: &StoredName) -> Arc<()> {
        self.0.retain(|(_, reader)| reader.strong_count() > 0);
        let reader = Arc::new(());
        self.0.push((id.clone(), Arc::downgrade(&reader)));
        reader
    }

    fn are_of(&self, id: &StoredName) -> bool {
        self.0.iter().any(|(of, reader)| of == id && reader.strong_count() > 0)
    }
}
