//! Bitmaps are made, merged, cleared, switched and removed: beside a model, in turns with QEMU,
//! through power cuts, and dropped at awaits.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use lacuna::block::{Layer, WriteFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::format::StoredName;
use lacuna::qcow2::{Access, Image, NewBitmap, OpenOptions, Parts, repair_bitmaps};
use lacuna::storage::{FileOptions, FileStorage, Storage};
use lacuna::units::{GuestOffset, GuestRange};
use testkit::foreign::{QEMU_IMG, qemu_img_check, qemu_io};
use testkit::sim::{Pace, SimHost, SimStorage, crash};
use testkit::{DropPoint, Executor, Random, SparseBytes, seeds};

use crate::case::{Case, Kind};
use crate::drive::{assert_safe, is_dirty, whole_content};

/// Steps of a run.
const STEPS: usize = 60;
/// Names that bitmaps have.
const NAMES: [&str; 3] = ["a", "b", "c"];
/// Names of those that are frozen together.
const TOGETHER: [&[&str]; 3] = [&["a"], &["b"], &["a", "c"]];
/// States per crash point.
const STATES: usize = 6;

/// A bitmap as it must be: which grains it names.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Model {
    granularity: u64,
    is_enabled: bool,
    grains: BTreeSet<u64>,
}

impl Model {
    fn mark(&mut self, range: GuestRange) {
        if !range.is_empty() {
            let last = (range.end().0 - 1) / self.granularity;
            self.grains.extend(range.start.0 / self.granularity..=last);
        }
    }

    fn ranges(&self, size: u64) -> Vec<GuestRange> {
        let mut ranges: Vec<GuestRange> = Vec::new();
        for grain in &self.grains {
            let start = grain * self.granularity;
            let len = self.granularity.min(size - start);
            match ranges.last_mut() {
                Some(last) if last.end().0 == start => last.len += len,
                _ => ranges.push(GuestRange::new(GuestOffset(start), len)),
            }
        }
        ranges
    }
}

type Models = BTreeMap<&'static str, Model>;

/// What is asked for.
#[derive(Clone, Debug)]
enum Edit {
    Add {
        name: &'static str,
        granularity: u64,
        is_enabled: bool,
    },
    Remove(&'static str),
    Clear(&'static str),
    Enable(&'static str, bool),
    Merge {
        into: &'static str,
        from: &'static str,
    },
    /// Freezes them and finishes: they name what changed since, which is nothing.
    Renew(&'static [&'static str]),
    Write(GuestRange),
}

impl Edit {
    fn random(random: &mut Random, kind: &Kind) -> Self {
        let mut name = || NAMES[random.below(3) as usize];
        let (name, other) = (name(), name());
        match random.below(9) {
            0 | 1 => {
                let granularity = 512 << random.below(8);
                Self::Add { name, granularity, is_enabled: !random.one_in(4) }
            }
            2 if random.one_in(2) => Self::Remove(name),
            3 if random.one_in(2) => Self::Clear(name),
            4 => Self::Enable(name, random.one_in(2)),
            5 => Self::Merge { into: name, from: other },
            6 => Self::Renew(TOGETHER[random.index(TOGETHER.len())]),
            _ => {
                let start = random.below(kind.size_bytes() / 512) * 512;
                let rest = (kind.size_bytes() - start) / 512;
                let len = (1 + random.below(rest.min(40))) * 512;
                Self::Write(GuestRange::new(GuestOffset(start), len))
            }
        }
    }

    /// Does it to the model; says whether it can be done.
    fn model(&self, models: &mut Models) -> bool {
        match self {
            Self::Add { name, granularity, is_enabled } => {
                let (granularity, is_enabled) = (*granularity, *is_enabled);
                let new = Model { granularity, is_enabled, grains: BTreeSet::new() };
                let is_new = !models.contains_key(name);
                is_new && models.insert(name, new).is_none()
            }
            Self::Remove(name) => models.remove(name).is_some(),
            Self::Clear(name) => models.get_mut(name).map(|it| it.grains.clear()).is_some(),
            Self::Enable(name, on) => models.get_mut(name).map(|it| it.is_enabled = *on).is_some(),
            Self::Merge { into, from } => {
                let Some(from) = models.get(from).cloned() else { return false };
                let Some(into) = models.get_mut(into) else { return false };
                let len = from.granularity;
                let named = from.grains.iter().map(|grain| GuestOffset(grain * len));
                named.for_each(|start| into.mark(GuestRange::new(start, len)));
                true
            }
            Self::Renew(names) => {
                let can = |name| models.get(name).is_some_and(|it: &Model| it.is_enabled);
                let can = names.iter().all(|name| can(*name));
                let renewed = models.iter_mut().filter(|(name, _)| can && names.contains(name));
                renewed.for_each(|(_, it)| it.grains.clear());
                can
            }
            Self::Write(range) => {
                models.values_mut().filter(|it| it.is_enabled).for_each(|it| it.mark(*range));
                true
            }
        }
    }

    async fn ours<S: Storage>(&self, image: &Image<S>) -> lacuna::Result<()> {
        match self {
            Self::Add { name, granularity, is_enabled } => {
                let granularity_bytes = Some(*granularity);
                let new = NewBitmap { granularity_bytes, ..NewBitmap::new(*name) };
                image.add_bitmap(&NewBitmap { is_enabled: *is_enabled, ..new }).await
            }
            Self::Remove(name) => image.remove_bitmap(&(*name).into()).await,
            Self::Clear(name) => image.clear_bitmap(&(*name).into()).await,
            Self::Enable(name, on) => image.enable_bitmap(&(*name).into(), *on).await,
            Self::Merge { into, from } => {
                let from = image.bitmap(&(*from).into()).await?;
                image.merge_bitmap(&(*into).into(), &from).await
            }
            Self::Renew(names) => {
                let names: Vec<_> = names.iter().map(|name| (*name).into()).collect();
                image.freeze_bitmaps(&names, &[]).await?.finish().await
            }
            Self::Write(range) => {
                let bytes = Buffer::from(&vec![9; range.len as usize][..]);
                image.write(range.start, bytes, WriteFlags::empty()).await.0
            }
        }
    }

    /// Has QEMU do it, to a file.
    fn stock(&self, path: &Path) -> bool {
        let file = path.to_str().unwrap();
        let run = |words: &[&str]| QEMU_IMG.run([&["bitmap"], words].concat()).code == 0;
        match self {
            Self::Add { name, granularity, is_enabled } => {
                let granularity = granularity.to_string();
                let state = if *is_enabled { "--enable" } else { "--disable" };
                run(&["--add", state, "-g", &granularity, file, name])
            }
            Self::Remove(name) => run(&["--remove", file, name]),
            Self::Clear(name) => run(&["--clear", file, name]),
            Self::Enable(name, on) => {
                run(&[if *on { "--enable" } else { "--disable" }, file, name])
            }
            Self::Merge { into, from } => run(&["--merge", from, file, into]),
            // Stock tools have no word for it.
            Self::Renew(_) => pollster::block_on(async {
                let image = open(path, Access::ReadWrite);
                let did = self.ours(&image).await;
                image.close().await.unwrap();
                did.is_ok()
            }),
            Self::Write(range) => {
                qemu_io(path, [format!("write -q -P 9 {} {}", range.start.0, range.len)]);
                true
            }
        }
    }
}

fn open(path: &Path, access: Access) -> Image<FileStorage> {
    let options = match access {
        Access::ReadOnly => FileOptions::read_only(),
        Access::ReadWrite => FileOptions::read_write(),
    };
    let file = FileStorage::open(path, &options).unwrap();
    pollster::block_on(Image::open(Parts::alone(file), OpenOptions::new(access))).unwrap()
}

/// Reads all bitmaps, as a model has them.
async fn seen<S: Storage>(
    image: &Image<S>,
) -> lacuna::Result<BTreeMap<String, (bool, Vec<GuestRange>)>> {
    let mut all = BTreeMap::new();
    for facts in image.bitmaps().await? {
        let mut ranges = image.bitmap(&facts.name).await?.ranges();
        let mut list = Vec::new();
        while let Some(range) = ranges.next().await? {
            list.push(range);
        }
        all.insert(facts.name.to_string(), (facts.is_enabled, list));
    }
    Ok(all)
}

fn expected(models: &Models, size: u64) -> BTreeMap<String, (bool, Vec<GuestRange>)> {
    let of = |(name, model): (&&str, &Model)| {
        ((*name).to_owned(), (model.is_enabled, model.ranges(size)))
    };
    models.iter().map(of).collect()
}

#[test]
fn edits_in_turns_with_stock_tools_do_what_the_model_does() {
    for seed in seeds(3) {
        for kind in [Kind::plain(9), Kind::plain(12), Kind::plain(16)] {
            let (mut random, mut models) = (Random::new(seed), Models::new());
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("a.qcow2");
            kind.build(1).image.save(&path);
            for step in 0..STEPS {
                let edit = Edit::random(&mut random, &kind);
                let story = format!("LACUNA_SEED={seed}, {kind:?}, step {step}: {edit:?}");
                let can = edit.model(&mut models);
                let did = match random.one_in(2) {
                    true => edit.stock(&path),
                    false => pollster::block_on(async {
                        let image = open(&path, Access::ReadWrite);
                        let did = edit.ours(&image).await;
                        // What is open says the same as what is stored.
                        assert_eq!(
                            seen(&image).await.unwrap(),
                            expected(&models, kind.size_bytes()),
                            "{story}"
                        );
                        image.close().await.unwrap();
                        did.is_ok()
                    }),
                };
                assert_eq!(did, can, "{story}");
                let all = pollster::block_on(seen(&open(&path, Access::ReadOnly))).unwrap();
                assert_eq!(all, expected(&models, kind.size_bytes()), "{story}");
                if step % 8 == 0 {
                    assert!(qemu_img_check(&path).is_clean(), "{story}");
                }
            }
            assert!(qemu_img_check(&path).is_clean());
        }
    }
}

/// An image with two bitmaps that name something, and what they are.
fn two_bitmaps(kind: Kind) -> (Case, Models) {
    let case = kind.build(1);
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let mut models = Models::new();
    let write = |cluster: u64| {
        let start = GuestOffset(cluster * kind.cluster_bytes());
        Edit::Write(GuestRange::new(start, 3 * kind.cluster_bytes()))
    };
    let edits = [
        Edit::Add { name: "a", granularity: 1024, is_enabled: true },
        write(2),
        Edit::Add { name: "b", granularity: 4096, is_enabled: true },
        write(9),
    ];
    pollster::block_on(async {
        let image = case.on(&host).open().await.unwrap();
        for edit in &edits {
            assert!(edit.model(&mut models));
            edit.ours(&image).await.unwrap();
        }
        image.close().await.unwrap();
    });
    (case.with_content(vec![host.content(0)]), models)
}

/// Edits that are crashed and dropped.
const EDITS: [Edit; 9] = [
    Edit::Add { name: "c", granularity: 512, is_enabled: true },
    Edit::Remove("a"),
    Edit::Remove("b"),
    Edit::Clear("a"),
    Edit::Enable("b", false),
    Edit::Merge { into: "a", from: "b" },
    Edit::Merge { into: "b", from: "a" },
    Edit::Renew(&["a"]),
    Edit::Renew(&["b", "a"]),
];

/// Checks that a state has the bitmaps from before or from after.
async fn examine(
    left: &Case,
    right: &[&Models],
    guest: &SparseBytes,
    ask: bool,
) -> Result<(), String> {
    if !is_dirty(left) {
        assert_safe(left, ask).await?;
    }
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let image = left.on(&host).open().await.map_err(|error| format!("Opening: {error}"))?;
    let found = seen(&image).await.map_err(|error| format!("Bitmaps: {error}"))?;
    let size = left.kind.size_bytes();
    if !right.iter().any(|models| expected(models, size) == found) {
        return Err(format!("neither the old bitmaps nor the new: {found:?}"));
    }
    let content = whole_content(&image).await.map_err(|error| format!("Reading: {error}"))?;
    match content.to_vec() == guest.to_vec() {
        true => Ok(()),
        false => Err("the disk reads otherwise".to_owned()),
    }
}

async fn edit_and_close(case: &Case, host: &SimHost, edit: &Edit) -> lacuna::Result<SparseBytes> {
    let image = case.on(host).open().await?;
    edit.ours(&image).await?;
    let guest = whole_content(&image).await?;
    image.close().await?;
    Ok(guest)
}

#[test]
fn a_crash_in_an_edit_leaves_the_bitmaps_from_before_or_after() {
    for kind in [Kind::plain(9), Kind::plain(12), Kind { lazy: true, ..Kind::plain(16) }] {
        let (case, before) = two_bitmaps(kind);
        for edit in &EDITS {
            let mut after = before.clone();
            assert!(edit.model(&mut after));
            let host = SimHost::new(Pace::AtOnce, 1);
            let guest = pollster::block_on(edit_and_close(&case, &host, edit)).unwrap();
            let mut count = 0;
            for point in crash::points(&host) {
                for state in point.states(7, STATES) {
                    count += 1;
                    let story = format!("{kind:?}, {edit:?}, after {}", point.event);
                    let left = case.with_content(state.files);
                    let right = [&before, &after];
                    let examined =
                        pollster::block_on(examine(&left, &right, &guest, count % 50 == 1));
                    examined.unwrap_or_else(|error| panic!("{story}: {error}"));
                }
            }
            assert!(count > 10, "{edit:?}: only {count} states");
        }
    }
}

#[test]
fn an_edit_dropped_at_its_awaits_leaves_the_bitmaps_from_before_or_after() {
    let (case, before) = two_bitmaps(Kind::plain(12));
    for edit in &EDITS {
        let mut after = before.clone();
        assert!(edit.model(&mut after));
        let mut polls = 1;
        loop {
            let host = SimHost::without_record(Pace::Executor, 1);
            let files = case.on(&host);
            let mut executor = Executor::new(1);
            executor.attach(Arc::new(host.clone()));
            let opening = executor.spawn_until(DropPoint::Never, async move { files.open().await });
            executor.settle().unwrap();
            let image = opening.take().unwrap().unwrap();
            let (edited, wish) = (image.clone(), edit.clone());
            let task = executor
                .spawn_until(DropPoint::AfterPoll(polls), async move { wish.ours(&edited).await });
            executor.settle().unwrap();
            let is_over = task.take().is_some();
            // The image goes on: what changes now must be in every bitmap that is enabled.
            let later = executor.spawn_until(DropPoint::Never, going_on(image));
            executor.settle().unwrap();
            let found = later.take().unwrap().unwrap();
            let mut right = [before.clone(), after.clone()];
            right.iter_mut().for_each(|models| assert!(LATER.model(models)));
            let size = case.kind.size_bytes();
            assert!(
                right.iter().any(|models| expected(models, size) == found),
                "{edit:?}, dropped at {polls}: {found:?}"
            );
            let left = case.with_content(vec![host.content(0)]);
            let story = format!("{edit:?}, dropped at {polls}");
            pollster::block_on(assert_safe(&left, true))
                .unwrap_or_else(|error| panic!("{story}: {error}"));
            if is_over {
                break;
            }
            polls += 1 + polls / 8;
        }
        assert!(polls > 4, "{edit:?}: only {polls} awaits");
    }
}

const LATER: Edit = Edit::Write(GuestRange::new(GuestOffset(60 << 10), 1024));

async fn going_on(
    image: Image<SimStorage>,
) -> lacuna::Result<BTreeMap<String, (bool, Vec<GuestRange>)>> {
    LATER.ours(&image).await?;
    let open = seen(&image).await?;
    image.close().await?;
    Ok(open)
}

#[test]
fn a_bitmap_left_in_use_names_everything_once_it_is_repaired() {
    let (case, _) = two_bitmaps(Kind::plain(12));
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let name = StoredName::from("a");
    pollster::block_on(async {
        let mut files = case.on(&host);
        // As after a crash of QEMU.
        files.options = files.options.bitmap_intents(false);
        let image = files.open().await.unwrap();
        LATER.ours(&image).await.unwrap();
        drop(image);
        let storage = host.open_file(0);
        let image = files.open().await.unwrap();
        let error = image.bitmap(&name).await.err().unwrap();
        assert!(error.to_string().contains("in use"), "{error}");
        drop(image);
        let repairs = repair_bitmaps(&storage).await.unwrap();
        assert_eq!(repairs.all_dirty.len(), 2, "{repairs:?}");
        let image = files.open().await.unwrap();
        let all = image.bitmap(&name).await.unwrap().ranges().next().await.unwrap().unwrap();
        assert_eq!((all.start.0, all.len), (0, case.kind.size_bytes()));
        assert!(!repair_bitmaps(&storage).await.unwrap().changed_anything());
    });
}
