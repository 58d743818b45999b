//! The power goes: what may be left of the files, and who finds it.

use std::cell::RefCell;
use std::rc::Rc;

use lacuna::chain::Format;
use testkit::Random;
use testkit::sim::SimHost;
use testkit::sim::crash::{self, Crash, Remnant};

use super::World;
use crate::files::{self, Files, Leaks, NAMES, TOP, is_dirty};
use crate::history::Eyes;
use crate::scene::Scene;
use crate::{Tally, qemu};

/// States of the medium that one crash chooses from.
const STATES: usize = 12;

impl World {
    /// Looks at what may be left; goes on with one state of it.
    pub(super) fn after_crash(
        &mut self,
        host: &SimHost,
        seed: u64,
        eyes: Eyes,
    ) -> Result<(), String> {
        self.tally.crashes += 1;
        let most = self.looks.states.max(STATES);
        let crash = crash::now(host);
        let mut remnants = crash.remnants(seed, most);
        let last = remnants.swap_remove(Random::new(seed).index(remnants.len()));
        for remnant in remnants.iter().take(self.looks.states.saturating_sub(1)) {
            let mut apart = self.apart();
            apart.left_by_crash(&crash, remnant, eyes)?;
            self.tally += apart.tally;
            self.sound = apart.sound;
        }
        self.left_by_crash(&crash, &last, eyes)
    }

    fn left_by_crash(
        &mut self,
        crash: &Crash,
        remnant: &Remnant,
        eyes: Eyes,
    ) -> Result<(), String> {
        let mut files = crash.files_left(remnant);
        // What points saved to is of no use any more.
        files.truncate(NAMES.len());
        self.tally.states += 1;
        let told = |error| {
            let survivors = crash.survivors(remnant).join("\n    ");
            format!("{error}\n  of what was not flushed there is:\n    {survivors}")
        };
        if self.looks.is_for_qemu() {
            self.tally.by_qemu += 1;
            self.shown_to_qemu(&files, eyes).map_err(told)?;
        }
        self.judge_data_file(&files, eyes).map_err(told)?;
        self.raw_differs = true;
        self.opened_again(files, eyes).map_err(told)
    }

    /// Returns a world to try something in.
    fn apart(&self) -> Self {
        Self {
            scenario: Rc::clone(&self.scenario),
            files: Files::default(),
            sound: self.sound.clone(),
            history: Rc::new(RefCell::new(self.history.borrow().clone())),
            album: Rc::new(RefCell::new(self.album.borrow().clone())),
            bitmaps: self.bitmaps.clone(),
            clock: self.clock.clone(),
            tally: Tally::default(),
            looks: self.looks.clone(),
            ..*self
        }
    }

    /// The stock tool finds leaks at worst, and reads what may be there.
    fn shown_to_qemu(&self, left: &Files, eyes: Eyes) -> Result<(), String> {
        let seen = qemu::look(left).map_err(|error| format!("qemu-img: {error}"))?;
        let judged = self.judge(&seen, eyes);
        judged.map_err(|error| format!("as qemu-img reads it: {error}"))
    }

    /// Opens what was left without a close, and compares it with what may be there.
    pub(super) fn opened_again(&mut self, left: Files, eyes: Eyes) -> Result<(), String> {
        self.files = left;
        self.assert_below_sound(Leaks::Expected)?;
        if !is_dirty(&self.files[TOP])? {
            self.sound.assert(&mut self.files[TOP], Leaks::Expected)?;
        }
        let mut scene = Scene::open(self.opening, &self.files, self.scenario.seed)?;
        self.look(&mut scene, eyes)?;
        self.files = scene.close()?;
        self.leaks = Leaks::Expected;
        self.assert_sound()
    }

    /// Checks what the image stands on, and repairs leaks where they are no surprise.
    pub(super) fn assert_below_sound(&mut self, leaks: Leaks) -> Result<(), String> {
        for (file, format) in files::all_below(&self.files)? {
            if format == Format::Qcow2 {
                self.assert_sound_below(file, leaks)?;
            }
        }
        Ok(())
    }

    fn assert_sound_below(&mut self, file: usize, leaks: Leaks) -> Result<(), String> {
        if leaks == Leaks::Expected && is_dirty(&self.files[file])? {
            self.files = files::repaired_by_opening(&self.files, file)?;
        }
        let sound = self.sound.assert(&mut self.files[file], leaks);
        sound.map_err(|error| format!("what it stands on: {error}"))
    }
}
