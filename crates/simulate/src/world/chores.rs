//! Work on the image between phases.

use lacuna::chain::Format;
use pollster::block_on;

use super::{MOST_STEPS, World, difference};
use crate::files::{self, Files, Leaks};
use crate::scenario::{BelowSpec, Chore, ChoreKind};
use crate::scene::{Scene, stage};
use crate::workplace::{Ending, Workplace, delete_snapshots};

impl World {
    pub(super) fn chore(&mut self, chore: &Chore) -> Result<(), String> {
        let below = files::all_below(&self.files)?;
        let what = chore.what.clone().in_chain(1 + below.len());
        if !matches!(what, ChoreKind::Amend(_) | ChoreKind::Compact | ChoreKind::Resize(_)) {
            self.delete_snapshots()?;
        }
        if let ChoreKind::Rebase(Some(spec)) = &what {
            self.make_below(files::other_below(&below), spec)?;
        }
        let (host, mut executor) = stage(&self.files, chore.order);
        self.order_faults(&host, &chore.faults, chore.order);
        let (opening, lie) = (self.opening, self.looks.lie);
        let place = Workplace { host: host.clone(), opening, below: below.clone(), lie };
        let work = executor.spawn(place.perform(what.clone()));
        let is_still = executor.run_for(chore.crash.unwrap_or(MOST_STEPS));
        let struck = host.struck();
        self.has_struck |= struck;
        let content = self.history.borrow().settled().to_vec();
        let size = match what {
            ChoreKind::Resize(bytes) => Some(self.history.borrow_mut().begin_resize(bytes)),
            _ => None,
        };
        if chore.crash.is_some() {
            drop(executor);
            return self.after_crash(&host, chore.order, self.after_crash_now());
        }
        if !is_still {
            return Err(format!("no end after {MOST_STEPS} steps"));
        }
        executor.settle().map_err(|stalled| stalled.to_string())?;
        self.tally.chores += 1;
        let left = files::contents(&host);
        match work.take().ok_or("the work was dropped")? {
            Ok(Ending::Done) => {
                let committed = match what {
                    ChoreKind::Commit => below.first(),
                    ChoreKind::CommitThrough => below.get(1),
                    _ => None,
                };
                committed.map_or(Ok(()), |disk| has_gone_down(*disk, &left, &content))?;
                size.into_iter().for_each(|size| self.history.borrow_mut().resized(size));
                self.closed_again(left, struck)
            }
            Ok(Ending::Declined) => {
                self.tally.declined += 1;
                size.into_iter().for_each(|size| self.history.borrow_mut().keep_size(size));
                self.closed_again(left, struck)
            }
            Err(_) if struck => self.opened_again(left, self.after_crash_now()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Looks at an image that was left as it should be.
    fn closed_again(&mut self, left: Files, struck: bool) -> Result<(), String> {
        self.leaks = if struck { Leaks::Expected } else { Leaks::Wrong };
        self.files = left;
        self.assert_below_sound(self.leaks)?;
        self.sound.assert(&mut self.files[files::TOP], self.leaks)?;
        let mut scene = Scene::open(self.opening, &self.files, self.scenario.seed)?;
        self.look(&mut scene, self.after_crash_now())?;
        self.files = scene.close()?;
        self.assert_sound()
    }

    fn make_below(&mut self, file: usize, spec: &BelowSpec) -> Result<(), String> {
        self.files[file] = testkit::SparseBytes::default();
        let host = files::calm_host(&self.files);
        let made = block_on(files::make_below(&host, file, spec));
        made.map_err(|error| format!("Making another disk: {error}"))?;
        self.files = files::contents(&host);
        Ok(())
    }

    fn delete_snapshots(&mut self) -> Result<(), String> {
        if self.album.take().is_empty() {
            return Ok(());
        }
        let mut scene = Scene::open(self.opening, &self.files, self.scenario.seed)?;
        scene.run("Deleting snapshots", delete_snapshots)?;
        self.files = scene.close()?;
        self.assert_sound()
    }
}

/// After a commit the disk that it went into is what the image was.
fn has_gone_down(
    (file, format): (usize, Format),
    left: &Files,
    content: &[u8],
) -> Result<(), String> {
    let host = files::calm_host(left);
    let seen = block_on(async {
        let chain = files::open_to_read(host, file, format).await?;
        files::whole(chain.disk()).await
    });
    let seen = seen.map_err(|error| format!("Reading what it stands on: {error}"))?;
    match seen.get(..content.len()).and_then(|seen| difference(seen, content)) {
        None if seen.len() >= content.len() => Ok(()),
        at => Err(format!("What it stands on is other than the image was, at {at:x?}")),
    }
}
