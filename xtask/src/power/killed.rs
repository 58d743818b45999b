//! Losses of programs: the server or the guest's emulator is killed at a random moment.

use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use super::boot::Writer;
use super::{Asked, DISK_BYTES, Loss, Rack};
use crate::Outcome;
use crate::random::Random;
use crate::run::{command, output};

/// Losses of each round.
const KILLS: u64 = 4;
/// When the last one comes, at the latest.
const LONGEST: Duration = Duration::from_secs(8);

/// Kills the server and the emulator in turns.
pub(super) fn losses(
    rack: &Rack,
    asked: &Asked,
    file_system: &str,
    seed: u64,
) -> Outcome<Vec<Loss>> {
    let mut random = Random::new(seed);
    let kills = KILLS.min(asked.states as u64);
    (0..kills).map(|number| loss(rack, file_system, (seed, number), &mut random)).collect()
}

fn loss(
    rack: &Rack,
    file_system: &str,
    (seed, number): (u64, u64),
    random: &mut Random,
) -> Outcome<Loss> {
    let image = PathBuf::from(rack.scratch.file(&format!("killed-{number}.qcow2")));
    let (name, size) = (image.to_string_lossy().into_owned(), DISK_BYTES.to_string());
    output(command("qemu-img", &["create", "-q", "-f", "qcow2", &name, &size]))?;
    let socket = rack.scratch.file("killed");
    let pid_file = rack.scratch.file("killed.pid");
    let server = rack.serve(&[&image], &socket)?;
    let disk = format!("nbd+unix:///d0?socket={socket}");
    let mut writer = Writer::start(rack, (file_system, u64::MAX >> 1, seed), &disk, &pid_file)?;
    let first = writer.next().ok_or_else(|| format!("{file_system}: the guest wrote nothing"))?;
    let moment = random.part_of(LONGEST);
    let is_server = number.is_multiple_of(2);
    let told = thread::scope(|scope| {
        let read = scope.spawn(|| {
            let mut last = first;
            while let Some(number) = writer.next() {
                last = number;
            }
            last
        });
        thread::sleep(moment);
        let ended = match is_server {
            true => server.kill().and_then(|()| end_emulator(&pid_file)),
            false => end_emulator(&pid_file).and_then(|()| server.stop()),
        };
        let last = read.join().map_err(|_| "the console cannot be read".to_owned());
        ended.and(last)
    });
    let acked = told?;
    writer.ended()?;
    let what = if is_server { "server" } else { "emulator" };
    let story = format!("{file_system}: {what} killed after {moment:.1?}, acked {acked}");
    eprintln!("{story}");
    Ok(Loss { image, acked, story })
}

/// Ends the emulator at once: by itself it goes on with a disk that is gone. It may have ended.
fn end_emulator(pid_file: &str) -> Outcome {
    let Ok(pid) = std::fs::read_to_string(pid_file) else { return Ok(()) };
    let ended = command("kill", &["-9", pid.trim()]).status();
    ended.map(drop).map_err(|error| format!("cannot start kill: {error}"))
}
