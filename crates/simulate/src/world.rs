//! Runs a scenario: phase after phase on one image, with everything in it judged.
//!
//! * At rest (nothing in flight) the disk, its extents, snapshots and bitmaps are compared with what
//!   guests were told; once the image is closed, refcounts equal references.
//! * After a crash each byte is one that was durable, or was written later; the image has leaks at worst.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use lacuna::block::{DynLayer, Layer};
use lacuna::qcow2::check::{CheckOptions, Repair, check};
use lacuna::qcow2::format::{IncompatibleFeatures, Version};
use lacuna::qcow2::{NewBitmap, Shrink, create, read_header};
use lacuna::raw::Raw;
use lacuna::storage::MemoryStorage;
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;
use testkit::sim::crash::{self, CrashState};
use testkit::sim::{Fault, OperationKind, Pace, SimHost};
use testkit::{Random, SparseBytes};

use crate::cast::Cast;
use crate::front::Disk;
use crate::guest::Truth;
use crate::history::{Eyes, Fill, History};
use crate::jobs::{self, Album};
use crate::scenario::{End, Phase, Scenario};
use crate::scene::{Opening, Scene};
use crate::{Lie, Looks, Tally, qemu};

/// More steps than any phase needs: an executor that goes on has found a loop without an end.
const MOST_STEPS: usize = 3_000_000;
/// States of the medium that one crash chooses from.
const STATES: usize = 12;
/// Clusters past the end of a file that a crash can have left with refcounts.
const MOST_LOST: u64 = 1 << 12;
/// What an image keeps of tables, by default: its bound.
const CACHE_BYTES: u64 = 32 << 20;

/// A bitmap, and the disk when it was made.
#[derive(Clone)]
struct Marked {
    name: String,
    since: Vec<u8>,
}

/// The image, and what is known of it.
pub(crate) struct World {
    scenario: Scenario,
    opening: Opening,
    file: SparseBytes,
    history: Rc<RefCell<History>>,
    album: Album,
    bitmaps: Vec<Marked>,
    /// Whether leaks are no surprise: something was cut off or made to fail.
    may_leak: bool,
    /// Whether a storage call was made to fail in some phase.
    has_struck: bool,
    tally: Tally,
    looks: Looks,
}

impl World {
    /// Makes the image.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) fn new(scenario: &Scenario, looks: &Looks) -> Result<Self, String> {
        let spec = &scenario.image;
        let host = SimHost::without_record(Pace::AtOnce, 1);
        let storage = host.add_file(SparseBytes::default());
        let created = block_on(create(&storage, &spec.create_options()));
        created.map_err(|error| format!("Creating: {error}"))?;
        let mut content = vec![0; spec.size_bytes as usize];
        let below_bytes = spec.backing_bytes.map(|len| {
            let range = GuestRange::new(GuestOffset(0), len);
            let bytes = Fill::Pattern { seed: 99, cluster_bytes: 4096 }.bytes(range);
            content[..len as usize].copy_from_slice(&bytes);
            bytes
        });
        let below = below_bytes.as_deref().map(below);
        Ok(Self {
            scenario: scenario.clone(),
            opening: Opening { ways: spec.opening, version: spec.version, below, below_bytes },
            file: host.content(0),
            history: Rc::new(RefCell::new(History::new(content))),
            album: Album::default(),
            bitmaps: Vec::new(),
            may_leak: false,
            has_struck: false,
            tally: Tally { runs: 1, ..Tally::default() },
            looks: looks.clone(),
        })
    }

    /// Runs all phases.
    ///
    /// # Errors
    /// What must not be, and in which phase.
    pub(crate) fn run(mut self) -> Result<Tally, String> {
        for (number, phase) in self.scenario.phases.clone().into_iter().enumerate() {
            let done = self.phase(&phase).and_then(|()| match phase.end {
                End::Resize(size_bytes) => self.resize(size_bytes),
                _ => Ok(()),
            });
            done.map_err(|error| {
                format!("phase {number}, which ends by {:?}: {error}", phase.end)
            })?;
        }
        Ok(self.tally)
    }

    fn phase(&mut self, phase: &Phase) -> Result<(), String> {
        let mut scene = Scene::open(&self.opening, self.file.clone(), phase.order)?;
        for _ in 0..phase.bitmaps {
            self.add_bitmap(&mut scene)?;
        }
        scene.settle()?;
        phase.faults.iter().for_each(|fault| scene.host.order(*fault));
        self.looks.lie.into_iter().for_each(|lie| scene.host.order(fault_of(lie, phase.order)));
        let disk = Disk::new(&scene.image, phase.front);
        let truth = Truth::new(&self.history, &scene.host);
        let cast = Cast::new(&disk, &scene.image, &truth, &self.album);
        cast.enter(&mut scene.executor, phase);
        let steps = if let End::Crash(steps) = phase.end { steps } else { MOST_STEPS };
        let is_still = scene.executor.run_for(steps);
        self.tally.requests += truth.answered();
        self.tally.calls += scene.host.calls().len() as u64;
        self.has_struck |= scene.host.struck();
        cast.first_error()?;
        match phase.end {
            End::Crash(_) => {
                let host = scene.host.clone();
                drop((scene, disk, cast));
                self.after_crash(&host, phase.order)
            }
            _ if !is_still => Err(format!("no end after {MOST_STEPS} steps")),
            end => {
                // Says who waits for ever, if anybody does.
                scene.settle()?;
                scene.host.heal();
                self.at_rest(scene, &disk, end)
            }
        }
    }

    fn is_version_2(&self) -> bool {
        self.scenario.image.version == Version::V2
    }

    fn add_bitmap(&mut self, scene: &mut Scene<'_>) -> Result<(), String> {
        if self.is_version_2() {
            return Ok(());
        }
        let name = format!("changed-{}", self.history.borrow_mut().tick());
        let new = NewBitmap { granularity_bytes: Some(512), ..NewBitmap::new(name.as_str()) };
        scene.run("Adding a bitmap", |image| async move { image.add_bitmap(&new).await })?;
        let since = scene.content()?;
        self.bitmaps.push(Marked { name, since });
        Ok(())
    }

    // ---- at rest ---------------------------------------------------------------------------

    fn at_rest(&mut self, mut scene: Scene<'_>, disk: &Disk, end: End) -> Result<(), String> {
        let struck = scene.host.struck();
        self.may_leak |= struck;
        let asked = self.history.borrow_mut().tick();
        let front = disk.clone();
        let flushed = scene.run("Flushing at rest", |image| async move {
            front.finish().await?;
            image.flush().await
        });
        jobs::develop(&self.album, &self.history);
        match flushed {
            Ok(()) => self.history.borrow_mut().flushed(asked),
            // An image that failed takes no more changes: who goes on opens it again.
            Err(_) if struck && scene.image.failure().is_some() => {
                return self.opened_again(scene.host.content(0));
            }
            Err(error) => return Err(error),
        }
        let now = self.history.borrow_mut().tick();
        self.look(&mut scene, Eyes::Reader(now, now))?;
        match end {
            // What a flush has left is found by somebody else.
            End::Rest => return self.opened_again(scene.host.content(0)),
            End::Close | End::Resize(_) | End::Crash(_) => {}
        }
        self.file = scene.close()?;
        self.assert_sound()
    }

    fn resize(&mut self, size_bytes: u64) -> Result<(), String> {
        let mut scene = Scene::open(&self.opening, self.file.clone(), self.scenario.seed)?;
        let mut wanted = scene.content()?;
        scene.run(
            "Resizing",
            |image| async move { image.resize(size_bytes, Shrink::Allow).await },
        )?;
        wanted.resize(size_bytes as usize, 0);
        let seen = scene.content()?;
        if let Some(at) = difference(&seen, &wanted) {
            return Err(format!("After the change of size byte {at:#x} differs"));
        }
        self.history.borrow_mut().settle(seen);
        for marked in &mut self.bitmaps {
            marked.since.resize(size_bytes as usize, 0);
        }
        self.file = scene.close()?;
        self.assert_sound()
    }

    /// Compares all that can be read with what it may be, and takes it over.
    fn look(&mut self, scene: &mut Scene<'_>, eyes: Eyes) -> Result<(), String> {
        let content = scene.content()?;
        let whole = self.history.borrow().whole();
        self.history.borrow().judge(whole, &content, eyes)?;
        let (image, album) = (scene.image.clone(), Rc::clone(&self.album));
        scene.executor.block_on(async move { jobs::verify(&image, &album).await })?;
        for range in scene.zeros()? {
            let bytes = &content[range.start.0 as usize..range.end().0 as usize];
            if bytes.iter().any(|byte| *byte != 0) {
                return Err(format!("Extent {range:x?} is said to be zeros and is not"));
            }
        }
        self.look_at_bitmaps(scene, &content)?;
        self.history.borrow_mut().settle(content);
        let cached = scene.image.counts().cached_table_bytes;
        match cached <= CACHE_BYTES {
            true => Ok(()),
            false => Err(format!("{cached} bytes of tables are in memory")),
        }
    }

    /// What a bitmap names covers what changed. Where storage failed, it may be unusable instead.
    fn look_at_bitmaps(&mut self, scene: &mut Scene<'_>, content: &[u8]) -> Result<(), String> {
        for marked in std::mem::take(&mut self.bitmaps) {
            match scene.dirty(&marked.name) {
                Ok(dirty) => marked.judge(content, &dirty)?,
                Err(_) if self.has_struck => continue,
                Err(error) => return Err(error),
            }
            self.bitmaps.push(marked);
        }
        Ok(())
    }

    // ---- crashes ---------------------------------------------------------------------------

    fn after_crash(&mut self, host: &SimHost, seed: u64) -> Result<(), String> {
        self.tally.crashes += 1;
        jobs::develop(&self.album, &self.history);
        let mut states: Vec<_> =
            crash::now(host).states(seed, self.looks.states.max(STATES)).collect();
        let last = states.swap_remove(Random::new(seed).index(states.len()));
        for state in states.into_iter().take(self.looks.states.saturating_sub(1)) {
            let mut apart = self.apart();
            apart.left_by_crash(state)?;
            self.tally += apart.tally;
        }
        self.left_by_crash(last)
    }

    fn left_by_crash(&mut self, state: CrashState) -> Result<(), String> {
        self.tally.states += 1;
        let survivors = state.survivors.join("\n    ");
        let told = |error| format!("{error}\n  of what was not flushed there is:\n    {survivors}");
        let [left] = <[SparseBytes; 1]>::try_from(state.files).expect("the host has one file");
        if self.looks.is_for_qemu() {
            self.tally.by_qemu += 1;
            self.shown_to_qemu(&left).map_err(told)?;
        }
        self.opened_again(left).map_err(told)
    }

    /// Returns a world to try something in.
    fn apart(&self) -> Self {
        Self {
            scenario: self.scenario.clone(),
            opening: self.opening.clone(),
            file: SparseBytes::default(),
            history: Rc::new(RefCell::new(self.history.borrow().clone())),
            album: Rc::new(RefCell::new(self.album.borrow().clone())),
            bitmaps: self.bitmaps.clone(),
            tally: Tally::default(),
            looks: self.looks.clone(),
            ..*self
        }
    }

    /// The stock tool finds leaks at worst, and reads what may be there.
    fn shown_to_qemu(&mut self, left: &SparseBytes) -> Result<(), String> {
        let below = self.opening.below_bytes.as_deref();
        let seen = qemu::look(left, below, is_dirty(left)?)
            .map_err(|error| format!("qemu-img: {error}"))?;
        let now = self.history.borrow_mut().tick();
        let whole = self.history.borrow().whole();
        let judged = self.history.borrow().judge(whole, &seen, Eyes::AfterCrash(now));
        judged.map_err(|error| format!("as qemu-img reads it: {error}"))
    }

    /// Opens what was left without a close, and compares it with what may be there.
    fn opened_again(&mut self, left: SparseBytes) -> Result<(), String> {
        self.file = left;
        self.may_leak = true;
        if !is_dirty(&self.file)? {
            self.assert_sound()?;
        }
        let mut scene = Scene::open(&self.opening, self.file.clone(), self.scenario.seed)?;
        let now = self.history.borrow_mut().tick();
        self.look(&mut scene, Eyes::AfterCrash(now))?;
        self.file = scene.close()?;
        self.may_leak = true;
        self.assert_sound()
    }

    /// Checks the file, and repairs leaks where they are no surprise.
    fn assert_sound(&mut self) -> Result<(), String> {
        let host = SimHost::without_record(Pace::AtOnce, 1);
        let storage = host.add_file(self.file.clone());
        let report = block_on(check(&storage, &CheckOptions::default(), &mut |_| {}));
        let report = report.map_err(|error| format!("Checking: {error}"))?;
        let leaks = if self.may_leak { 0 } else { report.leaks };
        if report.corruptions + report.check_errors + leaks > 0 || is_dirty(&self.file)? {
            return Err(format!("The check finds {report:x?}"));
        }
        if self.may_leak {
            // Refcounts of clusters past the end are seen by no check, until the file grows.
            let len = self.file.len();
            let mut longer = self.file.clone();
            longer.set_len(len + (MOST_LOST << self.scenario.image.cluster_bits));
            self.file = repaired(longer)?;
            self.file.set_len(len);
        }
        self.may_leak = false;
        Ok(())
    }
}

impl Marked {
    /// What is other bytes than when it was made must be named.
    fn judge(&self, content: &[u8], dirty: &[GuestRange]) -> Result<(), String> {
        let mut named = vec![false; content.len()];
        for range in dirty {
            let end = range.end().0.min(content.len() as u64);
            named[range.start.0 as usize..end as usize].fill(true);
        }
        let missed = (0..content.len().min(self.since.len()))
            .find(|at| content[*at] != self.since[*at] && !named[*at]);
        match missed {
            None => Ok(()),
            Some(at) => Err(format!("Bitmap {} misses the change of byte {at:#x}", self.name)),
        }
    }
}

/// Returns the call that is lost without a word.
fn fault_of(lie: Lie, seed: u64) -> Fault {
    match lie {
        Lie::Flushes => Fault::io(OperationKind::Flush, 0).forever().silent(),
        Lie::Write => Fault::io(OperationKind::Write, (seed % 20) as usize).silent(),
    }
}

/// Says whether the next opener is to repair it.
fn is_dirty(file: &SparseBytes) -> Result<bool, String> {
    let storage = SimHost::without_record(Pace::AtOnce, 1).add_file(file.clone());
    let header = block_on(read_header(&storage)).map_err(|error| error.to_string())?;
    Ok(header.features.incompatible.contains(IncompatibleFeatures::DIRTY))
}

/// Frees what leaks.
fn repaired(file: SparseBytes) -> Result<SparseBytes, String> {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let storage = host.add_file(file);
    let options = CheckOptions { repair: Repair::Leaks };
    let report = block_on(check(&storage, &options, &mut |_| {}));
    report.map_err(|error| format!("Freeing leaks: {error}"))?;
    Ok(host.content(0))
}

/// Returns the first byte that differs.
fn difference(seen: &[u8], wanted: &[u8]) -> Option<usize> {
    let len = seen.len().min(wanted.len());
    let differs = (0..len).find(|at| seen[*at] != wanted[*at]);
    differs.or_else(|| (seen.len() != wanted.len()).then_some(len))
}

fn below(bytes: &[u8]) -> Arc<dyn DynLayer> {
    let storage = MemoryStorage::from(bytes);
    Arc::new(block_on(Raw::open(storage)).expect("memory can be opened"))
}
