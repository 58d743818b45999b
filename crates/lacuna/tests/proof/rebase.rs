//! Power cuts at every change of a rebase, and drops at its awaits: whatever is left, what the guest
//! reads is what it read, over the backing file that the image names.

use std::sync::Arc;

use lacuna::block::{DynLayer, Layer, WriteFlags};
use lacuna::buffer::Buffer;
use lacuna::job::{Encoding, Onto, RebaseOptions, rebase};
use lacuna::qcow2::format::Header;
use lacuna::qcow2::{BackingName, Image};
use lacuna::raw::Raw;
use lacuna::storage::MemoryStorage;
use lacuna::units::{GuestOffset, GuestRange};
use testkit::sim::{Pace, SimHost, crash};
use testkit::{DropPoint, Executor, SparseBytes, content, seeds};

use crate::case::{Backing, Case, Files, Kind};
use crate::crash::kinds;
use crate::drive::{assert_safe, is_dirty, whole_content};

/// States per crash point where not all can be looked at.
const STATES: usize = 8;
/// One in this many states is also shown to qemu-img.
const QEMU_SAMPLE: usize = 60;
/// How many crash points before the end are all looked at.
const CHANGE_OF_NAME: usize = 16;
const NEW: &str = "new.raw";

/// The layer to come: shorter than the disk, with data here and there, some of it as in the model.
fn new_layer(kind: &Kind, old: &SparseBytes) -> Arc<dyn DynLayer> {
    let size = kind.size_bytes() * 3 / 4 / 512 * 512;
    let layer = pollster::block_on(Raw::create(MemoryStorage::new(), size)).unwrap();
    let unit = kind.cluster_bytes();
    for index in 0..size / unit {
        let range = GuestRange::new(GuestOffset(index * unit), unit);
        let bytes = match index % 4 {
            0 => old.read_vec(range.start.0, unit as usize),
            1 => content(index, range),
            _ => continue,
        };
        let buffer = Buffer::from(&bytes[..]);
        pollster::block_on(layer.write(range.start, buffer, WriteFlags::empty())).0.unwrap();
    }
    Arc::new(layer)
}

/// Where an image is put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum To {
    New,
    Nothing,
}

struct Scene {
    case: Case,
    old: SparseBytes,
    new: Arc<dyn DynLayer>,
    to: To,
    options: RebaseOptions,
}

impl Scene {
    fn new(kind: &Kind, seed: u64, to: To) -> Self {
        let mut case = kind.build(seed);
        let host = SimHost::without_record(Pace::AtOnce, 1);
        let files = case.on(&host);
        let old = pollster::block_on(async {
            let image = files.open().await.unwrap();
            let cluster = kind.cluster_bytes();
            let range = GuestRange::new(GuestOffset(2 * cluster + 100), cluster);
            let bytes = Buffer::from(&content(77, range)[..]);
            image.write(range.start, bytes, WriteFlags::empty()).await.0.unwrap();
            let old = whole_content(&image).await.unwrap();
            image.close().await.unwrap();
            old
        });
        let mut content = vec![host.content(0)];
        content.extend(case.data.as_ref().map(|_| host.content(1)));
        case = case.with_content(content);
        let compresses = kind.allows_compression() && seed.is_multiple_of(2);
        let encoding = if compresses { Encoding::Compressed } else { Encoding::Plain };
        let options = RebaseOptions { encoding, ..RebaseOptions::default() };
        Self { new: new_layer(kind, &old), case, old, to, options }
    }

    async fn run<S: lacuna::storage::Storage + Clone>(
        &self,
        files: &Files<S>,
    ) -> lacuna::Result<()> {
        let image: Image<S> = files.open().await?;
        let name = BackingName { name: NEW.to_owned(), format: Some("raw".to_owned()) };
        let onto = Onto { layer: &*self.new, name, shared_from: None };
        let onto = (self.to == To::New).then_some(onto);
        rebase(image, onto, &self.options, &mut |_, _| ()).await.map(drop)
    }

    /// Opens what is left over what it names.
    async fn examine(&self, left: &Case, ask_qemu: bool) -> Result<(), String> {
        let named = name_of(left);
        if !is_dirty(left) {
            // QEMU would look for the new file.
            assert_safe(left, ask_qemu && named.as_deref() != Some(NEW)).await?;
        }
        let host = SimHost::without_record(Pace::AtOnce, 1);
        let mut files = left.on(&host);
        files.backing = match named.as_deref() {
            None => None,
            Some(NEW) => Some(Arc::clone(&self.new)),
            Some(_) => left.backing_layer(),
        };
        let image = files.open().await.map_err(|error| format!("Opening: {error}"))?;
        let seen = whole_content(&image).await.map_err(|error| format!("Reading: {error}"))?;
        image.close().await.map_err(|error| format!("Closing: {error}"))?;
        match seen.to_vec() == self.old.to_vec() {
            true => Ok(()),
            false => Err(format!("The disk reads otherwise over {named:?}")),
        }
    }
}

/// What an image names as its backing file.
fn name_of(case: &Case) -> Option<String> {
    let first_cluster = case.image.read_vec(0, case.kind.cluster_bytes() as usize);
    Header::decode(&first_cluster).unwrap().backing_name.map(|name| name.to_string())
}

fn scenes() -> Vec<(Kind, u64, Scene)> {
    let mut scenes = Vec::new();
    for kind in [9, 14].into_iter().flat_map(kinds) {
        let backings = match kind.backing {
            Backing::None if kind.version == 3 => vec![Backing::None, Backing::RawShorter],
            Backing::None => vec![Backing::None, Backing::Qcow2Shorter],
            other => vec![other],
        };
        for backing in backings {
            let kind = Kind { backing, ..kind };
            let is_raw = kind.store == crate::case::Store::RawDataFile;
            for (seed, to) in seeds(1).flat_map(|s| [(s, To::New), (s + 1, To::Nothing)]) {
                if !is_raw {
                    scenes.push((kind, seed, Scene::new(&kind, seed, to)));
                }
            }
        }
    }
    scenes
}

#[test]
fn a_crash_in_a_rebase_leaves_what_the_guest_read() {
    for (kind, seed, scene) in scenes() {
        let host = SimHost::new(Pace::AtOnce, 1);
        let files = scene.case.on(&host);
        host.start_record();
        pollster::block_on(scene.run(&files)).unwrap();
        let (mut count, mut named) = (0, 0);
        let points = crash::points(&host);
        let last = points.len().saturating_sub(CHANGE_OF_NAME);
        let chosen = (0..).zip(&points).filter(|(at, _)| at % 4 == seed as usize % 4 || *at > last);
        for (_, point) in chosen {
            for state in point.states(seed, STATES) {
                count += 1;
                let survivors = state.survivors;
                let left = scene.case.with_content(state.files);
                let result = scene.examine(&left, count % QEMU_SAMPLE == 1);
                if let Err(error) = pollster::block_on(result) {
                    let story = survivors.join("\n  ");
                    panic!("{kind:?}, {:?}, seed {seed}: {error}\n  {story}", scene.to);
                }
                named += usize::from(name_of(&left) != name_of(&scene.case));
            }
        }
        assert!(count > 0, "no crash was tried");
        let changes = scene.case.backing.is_some() || scene.to == To::New;
        assert_eq!(named > 0, changes, "{kind:?}, {:?}: the name", scene.to);
    }
}

#[test]
fn a_rebase_dropped_at_its_awaits_leaves_what_the_guest_read() {
    for (kind, seed, scene) in scenes().into_iter().step_by(3) {
        let mut polls = 1;
        loop {
            let host = SimHost::without_record(Pace::Executor, seed);
            let files = scene.case.on(&host);
            let mut executor = Executor::new(seed);
            executor.attach(Arc::new(host.clone()));
            let task = executor.spawn_until(DropPoint::AfterPoll(polls), scene.run(&files));
            executor.settle().unwrap_or_else(|stalled| panic!("{kind:?}: {stalled}"));
            let ended = task.take();
            let mut content = vec![host.content(0)];
            content.extend(scene.case.data.as_ref().map(|_| host.content(1)));
            let left = scene.case.with_content(content);
            if let Err(error) = pollster::block_on(scene.examine(&left, false)) {
                panic!("{kind:?}, {:?}, seed {seed}, dropped at poll {polls}: {error}", scene.to);
            }
            if let Some(result) = ended {
                result.unwrap();
                break;
            }
            polls += 1 + polls / 8;
        }
        assert!(polls > 8, "{kind:?}: only {polls} awaits were reached");
    }
}

#[test]
fn a_rebase_that_was_cut_short_can_be_run_again() {
    for (kind, seed, scene) in scenes() {
        let host = SimHost::new(Pace::AtOnce, 1);
        let files = scene.case.on(&host);
        host.start_record();
        pollster::block_on(scene.run(&files)).unwrap();
        for point in crash::points(&host).into_iter().step_by(7) {
            let state = point.states(seed, 1).next().unwrap();
            let left = scene.case.with_content(state.files);
            let again = SimHost::without_record(Pace::AtOnce, 1);
            let mut files = left.on(&again);
            match name_of(&left).as_deref() {
                None if left.backing.is_some() => continue,
                Some(NEW) => files.backing = Some(Arc::clone(&scene.new)),
                _ => {}
            }
            pollster::block_on(scene.run(&files)).unwrap();
            let mut content = vec![again.content(0)];
            content.extend(left.data.as_ref().map(|_| again.content(1)));
            let done = left.with_content(content);
            if let Err(error) = pollster::block_on(scene.examine(&done, false)) {
                panic!("{kind:?}, {:?}, seed {seed}: {error}", scene.to);
            }
        }
    }
}

/// `rebase -u`, without a copy: the claim of being all zeros goes before a backing file comes.
#[test]
fn a_crash_in_a_change_of_the_name_never_claims_zero_over_a_backing_file() {
    for bits in [9, 12, 16] {
        let kind = Kind::plain(bits);
        let case = kind.build(2);
        assert_eq!(case.image.read_vec(95, 1), [0b1100], "the image begins with both claims");
        let host = SimHost::new(Pace::AtOnce, 1);
        let files = case.on(&host);
        host.start_record();
        let name = BackingName { name: "x".repeat(300), format: Some("qcow2".to_owned()) };
        let name = if bits == 9 { BackingName { name: "short".to_owned(), ..name } } else { name };
        pollster::block_on(async {
            files.open().await.unwrap().close_onto(Some(name.clone())).await.unwrap();
        });
        let mut seen = Vec::new();
        for point in crash::points(&host) {
            for state in point.states(1, STATES) {
                let image = state.files.into_iter().next().unwrap();
                let header = Header::decode(&image.read_vec(0, 1 << bits)).unwrap();
                let backing = header.backing_name.map(|name| name.to_string());
                let claims = header.features.autoclear.bits();
                assert!(backing.is_none() || claims == 0b1000, "{backing:?} with {claims:#b}");
                assert!(backing.as_ref().is_none_or(|found| *found == name.name), "{backing:?}");
                seen.push(backing.is_some());
            }
        }
        assert!(seen.contains(&true) && seen.contains(&false));
    }
}
