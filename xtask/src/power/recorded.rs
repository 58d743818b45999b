//! Losses made of a record of everything that reached the disk's storage.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::Stdio;

use super::boot::Writer;
use super::{Asked, DISK_BYTES, Loss, Rack};
use crate::Outcome;
use crate::run::{awaited, command};

/// Has a guest write to a recorded disk until it is done; returns what power losses leave of it.
pub(super) fn losses(
    rack: &Rack,
    asked: &Asked,
    file_system: &str,
    seed: u64,
) -> Outcome<Vec<Loss>> {
    let socket = rack.scratch.file("recorded");
    let (size, seeded) = (DISK_BYTES.to_string(), seed.to_string());
    let (states, folder) = (asked.states.to_string(), rack.scratch.file(""));
    let words = ["record", &size, &seeded, &states, &socket, &folder];
    let mut recorder = command(&rack.powerloss.to_string_lossy(), &words);
    recorder.args(asked.lies.then_some("lie")).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut recorder =
        recorder.spawn().map_err(|error| format!("cannot start the recorder: {error}"))?;
    let (mut marks, told) = match (recorder.stdin.take(), recorder.stdout.take()) {
        (Some(input), Some(output)) => (input, BufReader::new(output)),
        _ => return Err("the recorder cannot be talked to".into()),
    };
    awaited(&socket)?;
    let pid_file = rack.scratch.file("writer.pid");
    let disk = format!("nbd+unix:///disk?socket={socket}");
    let mut writer = Writer::start(rack, (file_system, asked.steps, seed), &disk, &pid_file)?;
    let mut last = None;
    while let Some(number) = writer.next() {
        writeln!(marks, "mark {number}").map_err(|error| format!("the recorder: {error}"))?;
        last = Some(number);
    }
    if !writer.ended()? || last != Some(asked.steps) {
        drop(marks);
        return Err(format!("{file_system}: the writing guest ended after {last:?}"));
    }
    drop(marks);
    let lines: Vec<String> = told.lines().map_while(Result::ok).collect();
    let status = recorder.wait().map_err(|error| format!("lost the recorder: {error}"))?;
    if !status.success() || lines.last().is_none_or(|line| line != "done") {
        return Err(format!("{file_system}: the recorder ended with {status}"));
    }
    std::fs::remove_file(&socket).or_else(gone).map_err(|error| error.to_string())?;
    let losses = lines.iter().filter(|line| line.starts_with("state "));
    losses.map(|line| loss(rack, file_system, line)).collect()
}

fn gone(error: std::io::Error) -> std::io::Result<()> {
    if error.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

/// Reads `state FILE acked N ...`.
fn loss(rack: &Rack, file_system: &str, line: &str) -> Outcome<Loss> {
    eprintln!("{file_system}: {line}");
    let words: Vec<&str> = line.split(' ').collect();
    let acked = words.get(3).and_then(|word| word.parse().ok());
    match (words.get(1), acked) {
        (Some(name), Some(acked)) => {
            let image = PathBuf::from(rack.scratch.file(name));
            Ok(Loss { image, acked, story: format!("{file_system}: {line}") })
        }
        _ => Err(format!("the recorder says {line:?}")),
    }
}
