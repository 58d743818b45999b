//! `demo`: the main job on a real file system, made here, shown before and after.
//!
//! * `files.rs`, `file_system.rs`, `fat.rs` make a file system image of the files at hand
//! * `guest.rs` says what a guest does to its disk over the years
//! * `image.rs` takes qcow2 images through that, and measures them
//! * `proof.rs` lets our read path and, where they are, QEMU's tools compare every byte
//!
//! Needs no privileges and no network; leaves nothing behind unless told to.

mod fat;
mod file_system;
mod files;
mod guest;
mod image;
mod proof;
mod scratch;

use std::path::Path;
use std::time::Instant;

use lacuna::units::{GuestOffset, GuestRange};

use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::output;
use crate::persona::Tool;
use crate::picture::{Content as Kind, Picture, Shape, Terminal, draw};
use crate::verbs::{Example, Meter, Task, Verb};

use self::guest::{Content, STEPS, Step};
use self::image::{Detection, GuestImage, Measured};
use self::scratch::Scratch;

/// The images of the demo.
const NAMES: [&str; 3] = ["plain.qcow2", "detect.qcow2", "reclaimed.qcow2"];

/// The pictures are as low as those of a chain of so many files: all three fit on a screen.
const LANES: usize = 5;

/// Whatever goes wrong ends the demo with its text.
type DemoResult<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// The verb.
pub(crate) const VERB: Verb = Verb {
    name: "demo",
    task: Task::Try,
    summary: "Show the main job; bench: how fast requests are; io: by hand",
    operands: "",
    flags: &[
        Flag::valued('k', "keep", "DIR", "leave the images in this folder").long_only(),
        Flag::valued('p', "progress", "json", "show progress, for programs").long_only(),
    ],
    examples: &[Example { shows: "what zero detection is worth", line: "" }],
    codes: &[],
    run,
};

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    if !parsed.operands.is_empty() {
        return Err(CliError::usage("Expecting no operands"));
    }
    let mut progress = Progress::new(tool, parsed)?;
    let scratch = Scratch::new(parsed.last("keep").map(Path::new));
    let told = scratch.and_then(|scratch| tell(&scratch, &mut progress));
    progress.finish(told.is_ok());
    told.map_err(|error| CliError::new(error.to_string()))?;
    Ok(0)
}

/// Counts the steps. People see what is printed; only programs need it said.
struct Progress {
    meter: Option<Meter>,
    done: u64,
}

impl Progress {
    /// The steps of the guest, the reclaiming, the proofs.
    const STEPS: u64 = STEPS.len() as u64 + 1 + NAMES.len() as u64;

    fn new(tool: &Tool, parsed: &Parsed) -> CliResult<Self> {
        let meter = parsed.has("progress").then(|| Meter::new(tool, parsed, "demo"));
        let meter = meter.transpose()?.map(|meter| meter.counting("steps"));
        Ok(Self { meter, done: 0 })
    }

    fn begin(&mut self, phase: &'static str) {
        if let Some(meter) = &mut self.meter {
            meter.update(phase, self.done, Self::STEPS);
        }
        self.done += 1;
    }

    fn finish(self, succeeded: bool) {
        if let Some(mut meter) = self.meter {
            if succeeded {
                meter.update("end", self.done, Self::STEPS);
            }
            meter.finish(succeeded);
        }
    }
}

fn tell(scratch: &Scratch, progress: &mut Progress) -> DemoResult {
    let start = Instant::now();
    let terminal = Terminal::of_stdout();
    let raw = scratch.path("disk.raw");
    let made = file_system::make(&raw, scratch)?;
    let content = Content::new(std::fs::File::open(&raw)?)?;
    say(&format!(
        "A disk of {}: {} with {} files, {} of it in use.\n\nWhat a guest does with it:\n\n",
        size(file_system::SIZE_BYTES),
        made.kind,
        made.files,
        size(content.live_bytes()),
    ))?;

    let paths = [("plain.qcow2", Detection::Off), ("detect.qcow2", Detection::On)];
    let images = paths.map(|(name, detection)| GuestImage::create(&scratch.path(name), detection));
    let [plain, detecting] = images;
    let (plain, detecting) = (plain?, detecting?);
    live(&content, &plain, &detecting, progress)?;

    let before = plain.measure()?;
    let detected = detecting.measure()?;
    plain.close()?;
    detecting.close()?;
    progress.begin("reclaim");
    // In place; the copy is there to show both.
    std::fs::copy(scratch.path("plain.qcow2"), scratch.path("reclaimed.qcow2"))?;
    let (reclaimed, shared) = image::reclaim(&scratch.path("reclaimed.qcow2"))?;

    say("\nWhere it led:\n")?;
    let maps = [
        ("before: zero detection off", &before),
        ("zero detection on", &detected),
        ("after: reclaim --dedup of the first, in place", &reclaimed),
    ];
    for (title, measured) in maps {
        say(&chapter(title, measured, terminal))?;
    }
    say(&format!(
        "\nThe same disk, {} of {} on the host given back; {shared} clusters share a place.\n\nProof, byte \
         by byte:\n\n",
        size(before.host_bytes.saturating_sub(reclaimed.host_bytes)),
        size(before.host_bytes),
    ))?;
    for name in NAMES {
        progress.begin("proof");
        say(&proof::of(&raw, &scratch.path(name), name)?)?;
    }
    say(&format!("\n{}{:.1} s\n", scratch.farewell(), start.elapsed().as_secs_f64()))
}

/// Takes both images through the guest's life, with a line for each step.
fn live(
    content: &Content,
    plain: &GuestImage,
    detecting: &GuestImage,
    progress: &mut Progress,
) -> DemoResult {
    say(&format!("  {:<34}{:>22}    {:>22}\n", "", "zero detection off", "zero detection on"))?;
    say(&format!(
        "  {:<34}{}    {}\n",
        "",
        columns("file", "on host"),
        columns("file", "on host")
    ))?;
    for step in STEPS {
        progress.begin("guest");
        let [off, on] = [plain.live(content, step)?, detecting.live(content, step)?];
        say(&format!("  {:<34}{}    {}\n", step.story(), sizes(&off), sizes(&on)))?;
        if step == Step::Delete {
            say("    (a deletion without discard is the guest's secret: no image changes)\n")?;
        }
    }
    Ok(())
}

fn columns(first: &str, second: &str) -> String {
    format!("{first:>11}{second:>11}")
}

fn sizes(measured: &Measured) -> String {
    columns(&size(measured.file_bytes), &size(measured.host_bytes))
}

/// Draws an image's disk below its title, with a legend and totals.
fn chapter(title: &str, measured: &Measured, terminal: Terminal) -> String {
    let range = GuestRange::new(GuestOffset(0), file_system::SIZE_BYTES);
    let shape = Shape::new(range.len, LANES, terminal.columns, guest::BLOCK);
    let mut picture = Picture::new(range, 1, shape);
    for extent in &measured.extents {
        picture.add(extent.range, 0, Kind::of(&extent.status));
    }
    let title = format!(
        "\n{title}: file {}, on host {}",
        size(measured.file_bytes),
        size(measured.host_bytes),
    );
    draw(&picture, &[title], terminal)
}

fn size(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn say(text: &str) -> DemoResult {
    output::print(text).map_err(|error| error.text().into())
}
