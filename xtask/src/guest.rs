//! Boots a guest on a disk that we serve, and looks at what is left of the image's file.
//!
//! The guest makes a file system, writes, deletes, trims, checks and verifies; the harness that
//! boots it has stock `qemu-img` check the image afterwards. What we add: the file on the host must
//! have shrunk from its largest, by most of what was deleted.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::harness::locate_in;
use crate::looks::allocated;
use crate::run::{built, command, run};
use crate::{Outcome, power, setup, vsock};

/// The file systems that are tried where none is named.
const FILE_SYSTEMS: [&str; 3] = ["ext4", "btrfs", "xfs"];
/// No file system: a guest that serves itself.
const VSOCK: &str = "vsock";
/// A guest whose disk loses power.
const POWER: &str = "power";
/// What the file must have given back: the guest deletes 20 MiB of 40.
const GIVEN_BACK_BYTES: u64 = 16 << 20;
/// How often the file is looked at.
const PERIOD: Duration = Duration::from_millis(20);

/// Boots a guest for each of `file_systems`, or for all that are known.
pub(crate) fn boot(arguments: &[String]) -> Outcome {
    if arguments.iter().any(|word| word == VSOCK) {
        return vsock::boot(arguments);
    }
    if let Some(at) = arguments.iter().position(|word| word == POWER) {
        return power::boot(&[&arguments[..at], &arguments[at + 1..]].concat());
    }
    let (program, mut file_systems) = locate_in("guest", "nbd.sh", arguments)?;
    if file_systems.is_empty() {
        file_systems = FILE_SYSTEMS.map(str::to_owned).to_vec();
    }
    setup::guest()?;
    run(command(&program.with_file_name("setup").to_string_lossy(), &[]))?;
    let server = built("dev")?;
    file_systems.iter().try_for_each(|file_system| life(&program, &server, file_system))
}

/// A short sample for every change; where no harness is named, it says so and boots nothing.
pub(crate) fn sample() -> Outcome {
    if std::env::var_os("LACUNA_HARNESS").is_none() {
        eprintln!("no guest is booted: LACUNA_HARNESS names no folder with a harness");
        return Ok(());
    }
    boot(&["ext4".to_owned()])?;
    power::sample()
}

/// The life of one file system, from making it to trimming it.
fn life(program: &Path, server: &Path, file_system: &str) -> Outcome {
    let folder = std::env::temp_dir().join(format!("lacuna-guest-{}", std::process::id()));
    std::fs::create_dir_all(&folder).map_err(|error| format!("no scratch folder: {error}"))?;
    let image = folder.join(format!("{file_system}.qcow2"));
    let lived = run_guest(program, server, file_system, &image);
    let removed = std::fs::remove_dir_all(&folder);
    let (most, left) = lived?;
    removed.map_err(|error| format!("{} stays behind: {error}", folder.display()))?;
    eprintln!("{file_system}: {} KiB at most, {} KiB left", most >> 10, left >> 10);
    match most.saturating_sub(left) >= GIVEN_BACK_BYTES {
        true => Ok(()),
        false => Err(format!("{file_system}: the file has not shrunk after the trim")),
    }
}

/// Returns the most that the image's file took on the host, and what it takes at the end, in bytes.
fn run_guest(
    program: &Path,
    server: &Path,
    file_system: &str,
    image: &Path,
) -> Outcome<(u64, u64)> {
    let image_name = image.to_string_lossy();
    run(command("qemu-img", &["create", "-q", "-f", "qcow2", &image_name, "1G"]))?;
    let script = program.with_file_name("scripts").join("fs-cycle.sh");
    let (script, of) = (script.to_string_lossy(), format!("FS={file_system}"));
    let mut guest = command(&program.to_string_lossy(), &["-i", &image_name, &script, &of, "--"]);
    guest.arg(server).args(["serve", "disk={image}", "-f", "qcow2", "-t", "-k", "{socket}"]);
    guest.args(["--discard=unmap", "--detect-zeroes=unmap"]);
    let (most, is_over) = (AtomicU64::new(0), AtomicBool::new(false));
    let ran = thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                most.fetch_max(allocated(image).unwrap_or(0), Ordering::Relaxed);
                thread::sleep(PERIOD);
            }
        });
        let ran = run(guest);
        is_over.store(true, Ordering::Relaxed);
        ran
    });
    ran?;
    Ok((most.into_inner(), allocated(image)?))
}
