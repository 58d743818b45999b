//! Snapshots are made, applied and deleted while others use the image: in turn with writers that never
//! stop, and between the steps of a compaction.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::SystemTime;

use lacuna::block::{Layer, WriteFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::{Image, LiveCompactOptions, LiveCompaction, NewBitmap, SnapshotChoice};
use lacuna::units::GuestOffset;
use testkit::sim::{Pace, SimHost, SimStorage};
use testkit::{Executor, Random, seeds};

use crate::case::{Case, Kind};
use crate::compacting::{With, build, view, with_all};
use crate::drive::{assert_safe, own_check, whole_content};

const WRITERS: usize = 24;
/// Writes that a writer may finish once somebody waits: the one under way, and one that had begun
/// to.
const MOST_AFTERWARDS: usize = 2;
/// A writer ends at last, so that who has waited all the time says so.
const MOST_WRITES: usize = 500;

/// Whether those who wait are served, and what each writer did since they wait.
#[derive(Default)]
struct Turn {
    waits: Cell<bool>,
    is_over: Cell<bool>,
    since: RefCell<[usize; WRITERS]>,
}

async fn write_on(image: Image<SimStorage>, turn: Rc<Turn>, writer: usize, mut random: Random) {
    for _ in 0..MOST_WRITES {
        if turn.is_over.get() {
            break;
        }
        let start = random.below(image.size_bytes() / 512 - 16) * 512;
        let bytes = vec![1 + writer as u8; 512 * (1 + random.below(16) as usize)];
        let write = image.write(GuestOffset(start), Buffer::from(&bytes[..]), WriteFlags::empty());
        write.await.0.unwrap();
        if turn.waits.get() {
            turn.since.borrow_mut()[writer] += 1;
        }
    }
}

/// Waits for its turn, again and again, in each of the ways that need a moment without requests.
async fn take_turns(image: Image<SimStorage>, turn: Rc<Turn>) {
    let name = "one".into();
    for round in 0..6 {
        turn.since.replace([0; WRITERS]);
        turn.waits.set(true);
        match round % 3 {
            0 => drop(image.create_snapshot(&name, SystemTime::now()).await.unwrap()),
            1 => {
                let choice = SnapshotChoice::Name(name.clone());
                image.delete_snapshot(&choice).await.unwrap();
            }
            _ => image.add_bitmap(&NewBitmap::new(format!("b{round}").as_str())).await.unwrap(),
        }
        turn.waits.set(false);
        let since = *turn.since.borrow();
        assert!(since.iter().all(|writes| *writes <= MOST_AFTERWARDS), "{round}: {since:?}");
    }
    turn.is_over.set(true);
}

#[test]
fn who_needs_a_moment_without_requests_gets_it_however_many_there_are() {
    for seed in seeds(6) {
        for kind in [Kind::plain(9), Kind::plain(12)] {
            println!("LACUNA_SEED={seed}, {kind:?}");
            let case = kind.build(seed);
            let host = SimHost::without_record(Pace::Executor, seed);
            let files = case.on(&host);
            let mut executor = Executor::new(seed);
            executor.attach(Arc::new(host.clone()));
            let image = executor.block_on(async move { files.open().await }).unwrap();
            let (turn, mut random) = (Rc::new(Turn::default()), Random::new(seed));
            for writer in 0..WRITERS {
                let (image, turn) = (image.clone(), Rc::clone(&turn));
                executor.spawn(write_on(image, turn, writer, random.split()));
            }
            executor.spawn(take_turns(image.clone(), turn));
            executor.run().unwrap_or_else(|stalled| panic!("{stalled}"));
            executor.block_on(async move { image.close().await }).unwrap();
            let left = case.with_content(vec![host.content(0)]);
            pollster::block_on(assert_safe(&left, true)).unwrap();
        }
    }
}

/// What the disk and its snapshots hold.
struct Known {
    active: Vec<u8>,
    snapshots: BTreeMap<String, Vec<u8>>,
    made: usize,
}

impl Known {
    /// Makes, deletes or applies one, or writes.
    async fn change(
        &mut self,
        image: &Image<SimStorage>,
        random: &mut Random,
    ) -> lacuna::Result<()> {
        let chosen = random.below(4);
        let names: Vec<String> = self.snapshots.keys().cloned().collect();
        let some = (!names.is_empty()).then(|| random.pick(&names).clone());
        match (chosen, some) {
            (0, _) => {
                self.made += 1;
                let name = format!("new{}", self.made);
                image.create_snapshot(&name.as_str().into(), SystemTime::now()).await?;
                self.snapshots.insert(name, self.active.clone());
            }
            (1, Some(name)) => {
                let choice = SnapshotChoice::Name(name.as_str().into());
                image.delete_snapshot(&choice).await?;
                self.snapshots.remove(&name);
            }
            (2, Some(name)) if self.snapshots[&name].len() == self.active.len() => {
                let choice = SnapshotChoice::Name(name.as_str().into());
                image.apply_snapshot(&choice).await?;
                self.active.clone_from(&self.snapshots[&name]);
            }
            _ => {
                let start = random.below(self.active.len() as u64 / 512) as usize * 512;
                let byte = random.next() as u8;
                self.active[start..start + 512].fill(byte);
                let bytes = Buffer::from(&[byte; 512][..]);
                image.write(GuestOffset(start as u64), bytes, WriteFlags::empty()).await.0?;
            }
        }
        Ok(())
    }
}

async fn compact_beside(case: &Case, seed: u64) -> lacuna::Result<(Case, Known)> {
    let host = SimHost::without_record(Pace::AtOnce, seed);
    let image = case.on(&host).open().await?;
    let mut random = Random::new(seed);
    let snapshots = view(case).await?.snapshots.into_iter().collect();
    let active = whole_content(&image).await?.to_vec();
    let mut known = Known { active, snapshots, made: 0 };
    let slice_bytes = 5 * case.kind.cluster_bytes();
    let options = LiveCompactOptions { slice_bytes, memory_bytes: 20_000 };
    let mut compaction = LiveCompaction::new(&image, options)?;
    let mut changes = 40;
    while compaction.step().await?.is_some() {
        if changes > 0 && random.one_in(2) {
            changes -= 1;
            known.change(&image, &mut random).await?;
        }
    }
    assert!(whole_content(&image).await?.to_vec() == known.active);
    image.close().await?;
    Ok((case.with_content(vec![host.content(0)]), known))
}

#[test]
fn snapshots_change_between_the_steps_of_a_compaction_and_nothing_reads_otherwise() {
    let plain = Kind::plain(9);
    let extended = Kind { extended: true, ..Kind::plain(14) };
    let kinds = [plain, Kind { version: 2, ..plain }, Kind { lazy: true, ..plain }, extended];
    for seed in seeds(6) {
        for kind in kinds {
            let story = format!("LACUNA_SEED={seed}, {kind:?}");
            let case = build(&kind, With { bitmaps: false, ..with_all(&kind) }, seed);
            let run = pollster::block_on(compact_beside(&case, seed));
            let (after, known) = run.unwrap_or_else(|error| panic!("{story}: {error}"));
            let report = pollster::block_on(own_check(&after));
            assert!(report.is_clean(), "{story}: {report:x?}");
            pollster::block_on(assert_safe(&after, true))
                .unwrap_or_else(|error| panic!("{story}: {error}"));
            let seen = pollster::block_on(view(&after)).unwrap();
            let names: Vec<&String> = seen.snapshots.iter().map(|(name, _)| name).collect();
            assert_eq!(names.len(), known.snapshots.len(), "{story}: {names:?}");
            for (name, content) in &seen.snapshots {
                assert!(known.snapshots[name] == *content, "{story}: '{name}' reads otherwise");
            }
        }
    }
}
