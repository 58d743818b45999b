//! A guest whose disk loses power, and what its file system makes of that.
//!
//! * Recorded: the disk's storage is recorded while the guest writes and flushes; states of the medium
//!   are made for random moments, with a random part of what was not flushed (`crates/powerloss`).
//! * Killed: `lacuna serve`, or the guest's emulator, ends by `kill -9` at a random moment.
//!
//! Either way `qemu-img check` finds leaks at most, and another boot mounts each disk: the journal is
//! replayed, everything that the guest had flushed and told of is there, and the checker of the file
//! system finds nothing.

mod boot;
mod killed;
mod recorded;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::harness::locate_in;
use crate::run::{awaited, built, built_of, command, run};
use crate::scratch::Scratch;
use crate::{Outcome, setup};

/// The file systems that are tried where none is named.
const FILE_SYSTEMS: [&str; 3] = ["ext4", "xfs", "btrfs"];
/// The size of a guest's disk.
const DISK_BYTES: u64 = 512 << 20;
/// Disks that one boot looks at.
const DISKS: usize = 12;
/// What images of a boot may take.
const NEEDED_BYTES: u64 = 6 << 30;
/// What `qemu-img check` ends with where it found nothing but leaks.
const LEAKS: i32 = 3;

/// A disk that lost power.
struct Loss {
    image: PathBuf,
    /// The last step that the guest told of.
    acked: u64,
    story: String,
}

/// What is asked for.
struct Asked {
    file_systems: Vec<String>,
    rounds: u64,
    steps: u64,
    states: usize,
    seed: u64,
    lies: bool,
}

/// Looks at losses: `[FS...] [--rounds N] [--steps N] [--states N] [--seed N] [--lie 1]`.
pub(crate) fn boot(arguments: &[String]) -> Outcome {
    let (program, rest) = locate_in("guest", "run-guest", arguments)?;
    let asked = read(&rest)?;
    let rack = Rack::new(program)?;
    for file_system in &asked.file_systems {
        for round in 0..asked.rounds {
            let seed = asked.seed + round;
            let losses = recorded::losses(&rack, &asked, file_system, seed)?;
            rack.judge(file_system, seed, losses)?;
            if !asked.lies {
                let losses = killed::losses(&rack, &asked, file_system, seed)?;
                rack.judge(file_system, seed, losses)?;
            }
        }
    }
    Ok(())
}

/// A few losses of one file system.
pub(crate) fn sample() -> Outcome {
    let (program, _) = locate_in("guest", "run-guest", &[])?;
    let rack = Rack::new(program)?;
    let asked = Asked { steps: 12, states: 4, ..read(&[])? };
    let losses = recorded::losses(&rack, &asked, "ext4", asked.seed)?;
    rack.judge("ext4", asked.seed, losses)
}

fn read(words: &[String]) -> Outcome<Asked> {
    let file_systems = FILE_SYSTEMS.map(str::to_owned).to_vec();
    let mut asked =
        Asked { file_systems, rounds: 1, steps: 60, states: DISKS, seed: 1, lies: false };
    let named = words.iter().take_while(|word| !word.starts_with('-')).count();
    if named > 0 {
        asked.file_systems = words[..named].to_vec();
    }
    for pair in words[named..].chunks(2) {
        let number = pair.get(1).and_then(|text| text.parse::<u64>().ok());
        match (pair[0].as_str(), number) {
            ("--rounds", Some(number)) => asked.rounds = number,
            ("--steps", Some(number)) => asked.steps = number,
            ("--states", Some(number)) => asked.states = (number as usize).clamp(1, DISKS),
            ("--seed", Some(number)) => asked.seed = number,
            ("--lie", Some(number)) => asked.lies = number > 0,
            _ => {
                return Err("guest power takes --rounds, --steps, --states, --seed, --lie N".into());
            }
        }
    }
    Ok(asked)
}

/// The programs, and where their files lie.
struct Rack {
    run_guest: PathBuf,
    ours: PathBuf,
    powerloss: PathBuf,
    scratch: Scratch,
}

impl Rack {
    fn new(run_guest: PathBuf) -> Outcome<Self> {
        setup::guest()?;
        run(command(&run_guest.with_file_name("setup").to_string_lossy(), &[]))?;
        let scratch = Scratch::new("power")?;
        scratch.require(NEEDED_BYTES)?;
        let ours = built("dev")?;
        let powerloss = built_of("powerloss", "powerloss", "simulate")?;
        Ok(Self { run_guest, ours, powerloss, scratch })
    }

    fn script(&self, name: &str, text: &str) -> Outcome<String> {
        let path = self.scratch.file(name);
        std::fs::write(&path, text).map_err(|error| format!("cannot write {path}: {error}"))?;
        Ok(path)
    }

    /// Serves images by their places, and waits for the socket.
    fn serve(&self, images: &[&Path], socket: &str) -> Outcome<Served> {
        let exports = images.iter().enumerate();
        let exports = exports.map(|(at, image)| format!("d{at}={}", image.display()));
        let mut server = command(&self.ours.to_string_lossy(), &["serve"]);
        server.args(exports).args(["-f", "qcow2", "-t", "-k", socket, "--discard=unmap"]);
        let started = server.stdin(Stdio::null()).spawn();
        let served = Served(started.map_err(|error| format!("cannot start a server: {error}"))?);
        awaited(socket)?;
        Ok(served)
    }

    /// Has stock `qemu-img` and a guest look at disks that lost power.
    fn judge(&self, file_system: &str, seed: u64, losses: Vec<Loss>) -> Outcome {
        for loss in &losses {
            // Of one that says so, refcounts are for the next opener to put right.
            if !is_dirty(&loss.image)? {
                check(&loss.image, &loss.story)?;
            }
        }
        let images: Vec<&Path> = losses.iter().map(|loss| &*loss.image).collect();
        let socket = self.scratch.file("looked-at");
        let server = self.serve(&images, &socket)?;
        let seen = boot::look(self, file_system, seed, &losses, &socket);
        server.stop()?;
        seen.map_err(|reason| {
            let stories: Vec<&str> = losses.iter().map(|loss| &*loss.story).collect();
            format!("{reason}\n  {}", stories.join("\n  "))
        })?;
        for loss in losses {
            check(&loss.image, &loss.story)?;
            std::fs::remove_file(&loss.image).map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}

/// Reads the dirty bit, which version 2 has not.
fn is_dirty(image: &Path) -> Outcome<bool> {
    let mut header = [0; 80];
    let read = std::fs::File::open(image).and_then(|mut file| file.read_exact(&mut header));
    read.map_err(|error| format!("cannot read {}: {error}", image.display()))?;
    Ok(header[7] == 3 && header[79] & 1 == 1)
}

/// Leaks at most.
fn check(image: &Path, story: &str) -> Outcome {
    let name = image.to_string_lossy();
    let found = command("qemu-img", &["check", "-f", "qcow2", &name]).output();
    let found = found.map_err(|error| format!("cannot start qemu-img: {error}"))?;
    match found.status.code() {
        Some(0 | LEAKS) => Ok(()),
        _ => {
            let said = [found.stdout, found.stderr].concat();
            Err(format!("{story}: {}", String::from_utf8_lossy(&said)))
        }
    }
}

/// A server, which does not outlive us.
struct Served(Child);

impl Served {
    /// Ends it as one does who means well.
    fn stop(mut self) -> Outcome {
        let pid = self.0.id().to_string();
        run(command("kill", &[&pid]))?;
        let status = self.0.wait().map_err(|error| format!("lost a server: {error}"))?;
        if status.success() { Ok(()) } else { Err(format!("the server ended with {status}")) }
    }

    /// Ends it as a power loss of the host's programs does.
    fn kill(mut self) -> Outcome {
        let lost = |error| format!("lost a server: {error}");
        self.0.kill().map_err(lost)?;
        self.0.wait().map_err(lost).map(drop)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended; then there is nothing to be done.
        if self.0.try_wait().is_ok_and(|ended| ended.is_none()) {
            drop(self.0.kill());
            drop(self.0.wait());
        }
    }
}

/// A command of the harness that boots a guest, whose console can be read.
fn guest(rack: &Rack, options: &[&str]) -> Command {
    let mut guest = command(&rack.run_guest.to_string_lossy(), options);
    guest.stdin(Stdio::null()).stdout(Stdio::piped());
    guest
}
