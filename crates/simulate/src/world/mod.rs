//! Runs a scenario: phase after phase on one image, with everything in it judged.
//!
//! * At rest (nothing in flight) the disk, its extents, snapshots and bitmaps are compared with what
//!   guests were told; once the image is closed, refcounts equal references.
//! * After a crash (`crashes.rs`) each byte is one that was durable, or was written later; the image has
//!   leaks at worst.
//! * Work between phases (`chores.rs`) leaves what a guest reads, whatever becomes of it.

mod chores;
mod crashes;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use lacuna::block::{Layer, is_zero};
use lacuna::qcow2::NewBitmap;
use lacuna::qcow2::format::Version;
use lacuna::units::GuestRange;
use pollster::block_on;
use testkit::SparseBytes;
use testkit::sim::{Fault, OperationKind, SimHost};

use crate::cast::Cast;
use crate::clock::Clock;
use crate::files::{self, BELOW, DATA, Files, Leaks, NAMES, Sound, TOP};
use crate::front::Disk;
use crate::guest::Truth;
use crate::history::{Eyes, History};
use crate::jobs::{self, Album};
use crate::scenario::{End, Phase, Scenario};
use crate::scene::{Opening, Scene};
use crate::{Lie, Looks, Tally};

/// More steps than any phase needs: an executor that goes on has found a loop without an end.
const MOST_STEPS: usize = 3_000_000;
/// Longer than any timeout there is.
const MOST_SECONDS: u32 = 30;
/// What an image keeps of tables, by default: its bound.
const CACHE_BYTES: u64 = 32 << 20;

/// Bytes that are compared at once.
const PIECE: usize = 512;

/// A bitmap, and the disk when it was made.
#[derive(Clone)]
struct Marked {
    name: String,
    since: Rc<Vec<u8>>,
}

/// The image, and what is known of it.
pub(crate) struct World {
    scenario: Rc<Scenario>,
    opening: Opening,
    files: Files,
    sound: Sound,
    history: Rc<RefCell<History>>,
    album: Album,
    bitmaps: Vec<Marked>,
    /// Whether leaks are no surprise: something was cut off or made to fail.
    leaks: Leaks,
    /// Whether a storage call was made to fail in some phase.
    has_struck: bool,
    /// Whether a raw data file may differ from the disk: what was lost or failed can be in the one and
    /// not in the other.
    raw_differs: bool,
    clock: Clock,
    tally: Tally,
    looks: Looks,
}

impl World {
    /// Makes the image, and what it stands on.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) fn new(scenario: &Scenario, looks: &Looks, clock: Clock) -> Result<Self, String> {
        let spec = &scenario.image;
        let host = files::calm_host(&vec![SparseBytes::default(); NAMES.len()]);
        let made = block_on(async {
            let mut content = match &spec.below {
                Some(below) => files::make_below(&host, BELOW[0], below).await?,
                None => Vec::new(),
            };
            content.resize(spec.size_bytes as usize, 0);
            files::make_top(&host, spec).await?;
            Ok(content)
        });
        let content = made.map_err(|error: lacuna::Error| format!("Creating: {error}"))?;
        Ok(Self {
            scenario: Rc::new(scenario.clone()),
            opening: Opening { ways: spec.opening },
            files: files::contents(&host),
            sound: Sound::default(),
            history: Rc::new(RefCell::new(History::new(content))),
            album: Album::default(),
            bitmaps: Vec::new(),
            leaks: Leaks::Wrong,
            has_struck: false,
            raw_differs: false,
            clock,
            tally: Tally { runs: 1, ..Tally::default() },
            looks: looks.clone(),
        })
    }

    /// Runs all phases.
    ///
    /// # Errors
    /// What must not be, and in which phase.
    pub(crate) fn run(mut self) -> Result<Tally, String> {
        let scenario = Rc::clone(&self.scenario);
        for (number, phase) in scenario.phases.iter().enumerate() {
            self.phase(phase).map_err(|error| {
                format!("phase {number}, which ends by {:?}: {error}", phase.end)
            })?;
            if let Some(chore) = &phase.chore {
                self.chore(chore)
                    .map_err(|error| format!("after phase {number}, {:?}: {error}", chore.what))?;
            }
        }
        Ok(self.tally)
    }

    fn phase(&mut self, phase: &Phase) -> Result<(), String> {
        let mut scene = Scene::open(self.opening, &self.files, phase.order)?;
        for _ in 0..phase.bitmaps {
            self.add_bitmap(&mut scene)?;
        }
        scene.settle()?;
        self.order_faults(&scene.host, &phase.faults, phase.order);
        let disk = Disk::new(&scene.image, phase.front);
        let truth = Truth::new(&self.history, &scene.host);
        let cast = Cast::new(&disk, &scene.image, &truth, &self.album, self.looks.lie);
        cast.enter(&mut scene.executor, phase);
        self.clock.set_jumps(&phase.jumps);
        scene.executor.attach(Arc::new(self.clock.clone()));
        let is_still = match phase.end {
            End::Crash(steps) => scene.executor.run_for(steps),
            _ => self.run_on(&mut scene),
        };
        self.clock.set_jumps(&[]);
        self.tally.requests += truth.answered();
        self.tally.calls += scene.host.calls().len() as u64;
        self.has_struck |= scene.host.struck();
        cast.first_error()?;
        match phase.end {
            End::Crash(_) => {
                let host = scene.host.clone();
                drop((scene, disk, cast));
                jobs::develop(&self.album, &self.history);
                self.after_crash(&host, phase.order, self.after_crash_now())
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

    /// Runs to the end; where nothing moves any more time goes on, as long as somebody can wait for that.
    fn run_on(&self, scene: &mut Scene<'_>) -> bool {
        let mut is_still = scene.executor.run_for(MOST_STEPS);
        for _ in 0..MOST_SECONDS {
            if !is_still || scene.executor.is_done() {
                break;
            }
            self.clock.advance(Duration::from_secs(1));
            is_still = scene.executor.run_for(MOST_STEPS);
        }
        is_still
    }

    fn order_faults(&self, host: &SimHost, faults: &[Fault], seed: u64) {
        faults.iter().for_each(|fault| host.order(*fault));
        let fault = self.looks.lie.and_then(|lie| fault_of(lie, seed));
        fault.into_iter().for_each(|fault| host.order(fault));
    }

    fn add_bitmap(&mut self, scene: &mut Scene<'_>) -> Result<(), String> {
        if scene.image.geometry().version() == Version::V2 {
            return Ok(());
        }
        let name = format!("changed-{}", self.history.borrow_mut().tick());
        let new = NewBitmap { granularity_bytes: Some(512), ..NewBitmap::new(name.as_str()) };
        scene.run("Adding a bitmap", |image| async move { image.add_bitmap(&new).await })?;
        let since = Rc::new(scene.content()?);
        self.bitmaps.push(Marked { name, since });
        Ok(())
    }

    fn at_rest(&mut self, mut scene: Scene<'_>, disk: &Disk, end: End) -> Result<(), String> {
        let struck = scene.host.struck();
        if struck {
            self.leaks = Leaks::Expected;
        }
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
                return self.opened_again(files::contents(&scene.host), self.after_crash_now());
            }
            Err(error) => return Err(error),
        }
        let now = self.history.borrow_mut().tick();
        self.look(&mut scene, Eyes::Reader(now, now))?;
        match end {
            // What a flush has left is found by somebody else.
            End::Rest => self.opened_again(files::contents(&scene.host), self.after_crash_now()),
            End::Close | End::Crash(_) => {
                self.files = scene.close()?;
                self.assert_sound()
            }
        }
    }

    fn after_crash_now(&self) -> Eyes {
        Eyes::AfterCrash(self.history.borrow_mut().tick())
    }

    // ---- looking ---------------------------------------------------------------------------

    /// Compares all that can be read with what it may be, and takes it over.
    fn look(&mut self, scene: &mut Scene<'_>, eyes: Eyes) -> Result<(), String> {
        let content = scene.content()?;
        self.judge(&content, eyes)?;
        let (image, album) = (scene.image.clone(), Rc::clone(&self.album));
        scene.executor.block_on(async move { jobs::verify(&image, &album).await })?;
        for range in scene.zeros()? {
            let bytes = &content[range.start.0 as usize..range.end().0 as usize];
            if !is_zero(bytes) {
                return Err(format!("Extent {range:x?} is said to be zeros and is not"));
            }
        }
        self.look_at_bitmaps(scene, &content)?;
        self.raw_differs |= self.history.borrow().is_open();
        self.history.borrow_mut().settle(content);
        let cached = scene.image.counts().cached_table_bytes;
        match cached <= CACHE_BYTES {
            true => Ok(()),
            false => Err(format!("{cached} bytes of tables are in memory")),
        }
    }

    fn judge(&self, content: &[u8], eyes: Eyes) -> Result<(), String> {
        self.history.borrow().judge_all(content, eyes)
    }

    /// What a bitmap names covers what changed. Where storage failed, it may be unusable instead.
    fn look_at_bitmaps(&mut self, scene: &mut Scene<'_>, content: &[u8]) -> Result<(), String> {
        for mut marked in std::mem::take(&mut self.bitmaps) {
            // Of what another size cut off, and added, nothing is compared.
            if marked.since.len() != content.len() {
                Rc::make_mut(&mut marked.since).resize(content.len(), 0);
            }
            match scene.dirty(&marked.name) {
                Ok(dirty) => marked.judge(content, &dirty)?,
                Err(_) if self.has_struck => {
                    // As its owner would: it would refuse every other size of the disk.
                    scene.remove_bitmap(&marked.name)?;
                    continue;
                }
                Err(error) => return Err(error),
            }
            self.bitmaps.push(marked);
        }
        Ok(())
    }

    /// Checks the image, and repairs leaks where they are no surprise. A raw data file is the disk.
    fn assert_sound(&mut self) -> Result<(), String> {
        self.sound.assert(&mut self.files[TOP], self.leaks)?;
        self.leaks = Leaks::Wrong;
        self.judge_data_file(&self.files, self.after_crash_now())
    }

    fn judge_data_file(&self, files: &Files, eyes: Eyes) -> Result<(), String> {
        let header = files::header(files)?;
        if !header.has_raw_external_data() || self.raw_differs || self.has_struck {
            return Ok(());
        }
        let content = files[DATA].read_vec(0, header.size_bytes as usize);
        self.judge(&content, eyes).map_err(|error| format!("the raw data file: {error}"))
    }
}

impl Marked {
    /// What is other bytes than when it was made must be named.
    fn judge(&self, content: &[u8], dirty: &[GuestRange]) -> Result<(), String> {
        if content == *self.since {
            return Ok(());
        }
        let len = content.len().min(self.since.len());
        let differs = |at: &usize| content[*at] != self.since[*at];
        // Most of it has not changed.
        let suspects = (0..len).step_by(PIECE).map(|at| at..len.min(at + PIECE));
        let suspects = suspects.filter(|piece| content[piece.clone()] != self.since[piece.clone()]);
        let mut named = vec![false; content.len()];
        for range in dirty {
            let end = range.end().0.min(content.len() as u64);
            named[range.start.0 as usize..end as usize].fill(true);
        }
        let missed = suspects.flatten().find(|at| differs(at) && !named[*at]);
        match missed {
            None => Ok(()),
            Some(at) => Err(format!("Bitmap {} misses the change of byte {at:#x}", self.name)),
        }
    }
}

/// Returns the call that is lost without a word, if one is.
pub(crate) fn fault_of(lie: Lie, seed: u64) -> Option<Fault> {
    match lie {
        Lie::Flushes => Some(Fault::io(OperationKind::Flush, 0).forever().silent()),
        Lie::Shared | Lie::Wire => None,
        Lie::Write => Some(Fault::io(OperationKind::Write, (seed % 20) as usize).silent()),
    }
}

/// Returns the first byte that differs.
fn difference(seen: &[u8], wanted: &[u8]) -> Option<usize> {
    if seen == wanted {
        return None;
    }
    let len = seen.len().min(wanted.len());
    let differs = (0..len).find(|at| seen[*at] != wanted[*at]);
    differs.or_else(|| (seen.len() != wanted.len()).then_some(len))
}
