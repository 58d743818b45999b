//! Snapshots and bitmaps, made, edited and removed by choices between what a guest asks.
//!
//! * Always: a snapshot reads as the disk did, and a bitmap names what differs from when it was made or cleared.
//! * Always: what is refused changes nothing.

use std::collections::BTreeMap;
use std::time::{Duration, UNIX_EPOCH};

use lacuna::Result;
use lacuna::block::Layer;
use lacuna::buffer::Buffer;
use lacuna::qcow2::check::Repair;
use lacuna::qcow2::format::Version;
use lacuna::qcow2::{Access, Image, NewBitmap, SnapshotChoice};
use lacuna::storage::Storage;
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;

use super::choices::Choices;
use super::images::{
    GROWTH, Memory, OPERATIONS, ask, assert_length, memory, model, open, perform, report,
};
use super::recipe::{BITMAPS, Recipe, operation};
use crate::{ModelDisk, Operation};

const SNAPSHOTS: [&str; 4] = ["one", "two", "three", "four"];

/// What is asked of an image besides what its guest asks.
#[derive(Clone, Copy, Debug)]
enum Edit {
    Snapshot(&'static str),
    Apply(&'static str),
    Delete(&'static str),
    Add(&'static str, u64),
    Remove(&'static str),
    Clear(&'static str),
    Enable(&'static str, bool),
    Merge { into: &'static str, from: &'static str },
}

impl Edit {
    fn choose(choices: &mut Choices<'_>) -> Self {
        let kind = choices.byte() % 8;
        let snapshot = *choices.pick(&SNAPSHOTS);
        let (bitmap, other) = (*choices.pick(&BITMAPS), *choices.pick(&BITMAPS));
        match kind {
            0 => Self::Snapshot(snapshot),
            1 => Self::Apply(snapshot),
            2 => Self::Delete(snapshot),
            3 => Self::Add(bitmap, 512 << choices.below(4)),
            4 => Self::Remove(bitmap),
            5 => Self::Clear(bitmap),
            6 => Self::Enable(bitmap, choices.one_in(2)),
            _ => Self::Merge { into: bitmap, from: other },
        }
    }

    async fn perform<S: Storage>(self, image: &Image<S>) -> Result<()> {
        match self {
            Self::Snapshot(name) => {
                let made = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
                image.create_snapshot(&name.into(), made).await.map(drop)
            }
            Self::Apply(name) => {
                image.apply_snapshot(&SnapshotChoice::Name(name.into())).await.map(drop)
            }
            Self::Delete(name) => {
                image.delete_snapshot(&SnapshotChoice::Name(name.into())).await.map(drop)
            }
            Self::Add(name, bytes) => {
                let new = NewBitmap { granularity_bytes: Some(bytes), ..NewBitmap::new(name) };
                image.add_bitmap(&new).await
            }
            Self::Remove(name) => image.remove_bitmap(&name.into()).await,
            Self::Clear(name) => image.clear_bitmap(&name.into()).await,
            Self::Enable(name, is_enabled) => image.enable_bitmap(&name.into(), is_enabled).await,
            Self::Merge { into, from } => {
                let from = image.bitmap(&from.into()).await?;
                image.merge_bitmap(&into.into(), &from).await
            }
        }
    }
}

/// What a bitmap has to name: whatever differs between two contents of the disk.
#[derive(Clone, Debug)]
struct Tracked {
    /// Since when it is enabled.
    since: Option<Vec<u8>>,
    /// Which bytes had changed until then.
    changed: Vec<bool>,
}

impl Tracked {
    fn new(now: &[u8], is_enabled: bool) -> Self {
        Self { since: is_enabled.then(|| now.to_vec()), changed: vec![false; now.len()] }
    }

    /// Counts until now.
    fn turn(&mut self, now: &[u8]) {
        let Some(since) = &mut self.since else { return };
        for (at, changed) in self.changed.iter_mut().enumerate() {
            *changed |= since[at] != now[at];
        }
        since.copy_from_slice(now);
    }

    fn judge(&self, named: &[bool]) {
        let missed = self.changed.iter().zip(named).position(|(changed, named)| *changed && !named);
        assert_eq!(missed, None, "a byte that has changed is not named");
    }
}

/// The image, and what it is to hold.
struct Kept {
    recipe: Recipe,
    image: Image<Memory>,
    disk: ModelDisk,
    snapshots: BTreeMap<&'static str, Vec<u8>>,
    bitmaps: BTreeMap<&'static str, Tracked>,
}

impl Kept {
    fn new(recipe: Recipe, storage: &Memory) -> Self {
        let image = open(storage, Access::ReadWrite).expect("a valid image opens");
        let disk = model(&recipe);
        let made = block_on(image.snapshots()).expect("a valid image tells its snapshots");
        let names = SNAPSHOTS.into_iter().take(made.len());
        let snapshots = names.map(|name| (name, disk.content().to_vec())).collect();
        let made = block_on(image.bitmaps()).expect("a valid image tells its bitmaps");
        let names = BITMAPS.into_iter().take(made.len());
        let now = disk.content().to_vec();
        let bitmaps = names.map(|name| (name, Tracked::new(&now, true))).collect();
        Self { recipe, image, disk, snapshots, bitmaps }
    }

    fn now(&self) -> Vec<u8> {
        self.disk.content().to_vec()
    }

    fn guest(&mut self, next: &Operation) {
        ask(&self.image, &mut self.disk, next);
        if matches!(next, Operation::Resize { .. }) {
            self.has_another_size();
        }
    }

    /// Of what was cut off, or added, bitmaps are not asked.
    fn has_another_size(&mut self) {
        let now = self.now();
        for tracked in self.bitmaps.values_mut() {
            *tracked = Tracked::new(&now, tracked.since.is_some());
        }
    }

    fn edit(&mut self, edit: Edit) {
        // There may be several of one name, which here tells them apart.
        if matches!(edit, Edit::Snapshot(name) if self.snapshots.contains_key(name)) {
            return;
        }
        let done = block_on(edit.perform(&self.image));
        assert!(done.is_ok() || self.may_refuse(edit), "{edit:?}: {done:?}");
        if done.is_ok() {
            self.edited(edit);
        }
    }

    /// Refcounts that cannot count one more owner refuse snapshots, and version 2 bitmaps, and a snapshot
    /// that would give the disk another size.
    fn may_refuse(&self, edit: Edit) -> bool {
        let is_two = self.image.geometry().version() == Version::V2;
        let is_narrow = self.image.geometry().refcount_order() < 3;
        match edit {
            Edit::Snapshot(_) => is_narrow,
            Edit::Apply(name) => is_narrow || !self.snapshots.contains_key(name),
            Edit::Delete(name) => !self.snapshots.contains_key(name),
            Edit::Add(name, _) => is_two || self.bitmaps.contains_key(name),
            Edit::Remove(name) | Edit::Clear(name) | Edit::Enable(name, _) => {
                !self.bitmaps.contains_key(name)
            }
            Edit::Merge { into, from } => {
                into == from || ![into, from].iter().all(|name| self.bitmaps.contains_key(name))
            }
        }
    }

    fn edited(&mut self, edit: Edit) {
        let now = self.now();
        match edit {
            Edit::Snapshot(name) => drop(self.snapshots.insert(name, now)),
            Edit::Apply(name) => self.applied(name),
            Edit::Delete(name) => drop(self.snapshots.remove(name)),
            Edit::Add(name, _) | Edit::Clear(name) => {
                let is_off = self.bitmaps.get(name).is_some_and(|it| it.since.is_none());
                self.bitmaps.insert(name, Tracked::new(&now, !is_off));
            }
            Edit::Remove(name) => drop(self.bitmaps.remove(name)),
            Edit::Enable(name, is_enabled) => {
                let tracked = self.bitmaps.get_mut(name).expect("it was found");
                tracked.turn(&now);
                tracked.since = is_enabled.then_some(now);
            }
            Edit::Merge { into, from } => {
                let mut of = self.bitmaps[from].clone();
                of.turn(&now);
                let into = self.bitmaps.get_mut(into).expect("it was found");
                into.changed.iter_mut().zip(of.changed).for_each(|(to, from)| *to |= from);
            }
        }
    }

    fn applied(&mut self, name: &str) {
        let bytes = self.snapshots[name].clone();
        let size_bytes = bytes.len() as u64;
        let is_other = size_bytes != self.disk.size_bytes();
        if is_other {
            self.disk.apply(&Operation::Resize { size_bytes });
        }
        self.disk.adopt(GuestRange::new(GuestOffset(0), size_bytes), &bytes);
        if is_other {
            self.has_another_size();
        }
    }

    fn reopen(&mut self, storage: &Memory, access: Access) {
        block_on(self.image.clone().close()).expect("nothing keeps it from closing");
        self.image = open(storage, access).expect("what was closed opens");
    }

    fn verify(&mut self) {
        block_on(self.disk.verify(&self.image)).unwrap_or_else(|wrong| panic!("{wrong}"));
        let now = self.now();
        let there = block_on(self.image.snapshots()).expect("they can be listed");
        assert_eq!(there.len(), self.snapshots.len());
        for (name, bytes) in &self.snapshots {
            let choice = SnapshotChoice::Name((*name).into());
            let layer = block_on(self.image.snapshot(&choice)).expect("it is there");
            let (result, seen) = block_on(layer.read(GuestOffset(0), Buffer::new(bytes.len())));
            assert!(result.is_ok() && seen[..] == bytes[..], "snapshot {name} reads otherwise");
        }
        for (name, tracked) in &mut self.bitmaps {
            let named = named(&self.image, name, now.len());
            tracked.turn(&now);
            tracked.judge(&named);
        }
    }
}

/// Which bytes a bitmap names.
fn named(image: &Image<Memory>, name: &str, len: usize) -> Vec<bool> {
    let mut named = vec![false; len];
    block_on(async {
        let mut ranges = image.bitmap(&name.into()).await?.ranges();
        while let Some(range) = ranges.next().await? {
            named[range.start.0 as usize..(range.end().0 as usize).min(len)].fill(true);
        }
        Ok::<_, lacuna::Error>(())
    })
    .unwrap_or_else(|error| panic!("bitmap {name}: {error}"));
    named
}

/// Takes choices of an image, of what its guest asks, and of edits of snapshots and bitmaps.
///
/// # Panics
/// If anything reads otherwise, a bitmap misses a change, or the image is not sound in the end.
pub fn history(data: &[u8]) {
    let mut choices = Choices::new(data);
    let recipe = Recipe::choose(&mut choices);
    let storage = memory(&recipe.file);
    let mut kept = Kept::new(recipe, &storage);
    for _ in 0..OPERATIONS {
        if choices.is_over() {
            break;
        }
        if choices.one_in(2) {
            kept.edit(Edit::choose(&mut choices));
            continue;
        }
        let next = operation(&mut choices, kept.disk.size_bytes(), kept.recipe.cluster_bytes);
        match next {
            Operation::Reopen => kept.reopen(&storage, Access::ReadWrite),
            next => kept.guest(&next),
        }
    }
    kept.verify();
    kept.reopen(&storage, Access::ReadOnly);
    kept.verify();
    let report = report(&storage, Repair::None).expect("nothing keeps it from being checked");
    assert!(report.is_clean(), "{report:?}");
}

/// As [`history`], on an image with damage: whatever it comes to, it ends, and the file stays within bounds.
///
/// # Panics
/// If the file grows without a reason.
pub fn damaged_history(data: &[u8]) {
    let mut choices = Choices::new(data);
    let recipe = Recipe::choose(&mut choices);
    let mut file = recipe.file.clone();
    recipe.damage(&mut file, &mut choices);
    let storage = memory(&file);
    let Ok(image) = open(&storage, Access::ReadWrite) else { return };
    let mut most = file.len() as u64 + recipe.growth();
    for _ in 0..OPERATIONS {
        if choices.is_over() {
            break;
        }
        if choices.one_in(2) {
            // Tables may be written anew each time.
            most += GROWTH;
            drop(block_on(Edit::choose(&mut choices).perform(&image)));
            continue;
        }
        let size_bytes = image.size_bytes().min(1 << 40);
        let next = operation(&mut choices, size_bytes, recipe.cluster_bytes);
        most += next.range().map_or(0, |range| 2 * (range.len + 2 * recipe.cluster_bytes));
        drop(perform(&image, &next));
    }
    drop(block_on(image.close()));
    assert_length(&storage, most);
}
