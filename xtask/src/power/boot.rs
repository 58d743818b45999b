//! Boots that write to a disk, and boots that look at what is left of disks.

use std::io::{BufRead, BufReader};
use std::process::Child;

use super::{Loss, Rack, guest};
use crate::Outcome;

/// Seconds that a boot may take.
const LIMIT: &str = "900";

/// A guest that writes.
pub(super) struct Writer {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Writer {
    /// Boots it on an export; the emulator's process is named in `pid_file`.
    pub(super) fn start(
        rack: &Rack,
        (file_system, steps, seed): (&str, u64, u64),
        disk: &str,
        pid_file: &str,
    ) -> Outcome<Self> {
        let script = rack.script("write.sh", include_str!("write.sh"))?;
        let more = format!("-pidfile {pid_file}");
        let mut guest = guest(rack, &["-t", LIMIT, "-x", &more, disk, &script]);
        guest.arg(format!("FS={file_system}"));
        guest.arg(format!("STEPS={steps}")).arg(format!("SEED={seed}"));
        let mut child = guest.spawn().map_err(|error| format!("cannot boot: {error}"))?;
        let console = child.stdout.take().ok_or("the guest has no console")?;
        Ok(Self { child, lines: BufReader::new(console).lines() })
    }

    /// Returns the next step that it tells of; nothing once it has ended.
    pub(super) fn next(&mut self) -> Option<u64> {
        self.lines.by_ref().map_while(Result::ok).find_map(|line| {
            let number = line.split("@@ACK ").nth(1)?;
            number.trim().parse().ok()
        })
    }

    /// Waits for its end; says whether that was a good one.
    pub(super) fn ended(mut self) -> Outcome<bool> {
        while self.next().is_some() {}
        let status = self.child.wait().map_err(|error| format!("lost a guest: {error}"))?;
        Ok(status.success())
    }
}

/// Mounts each disk, compares what is there, checks it.
pub(super) fn look(
    rack: &Rack,
    file_system: &str,
    seed: u64,
    losses: &[Loss],
    socket: &str,
) -> Outcome {
    let script = rack.script("verify.sh", include_str!("verify.sh"))?;
    let more: Vec<String> = (1..losses.len()).map(|at| disk(at, socket)).collect();
    let more = more.join(" ");
    let first = format!("nbd+unix:///d0?socket={socket}");
    let mut guest = guest(rack, &["-t", LIMIT, "-x", &more, &first, &script]);
    let acked: Vec<String> = losses.iter().map(|loss| loss.acked.to_string()).collect();
    guest.arg(format!("FS={file_system}")).arg(format!("SEED={seed}"));
    guest.arg(format!("ACKS={}", acked.join(" ")));
    let said = guest.output().map_err(|error| format!("cannot boot: {error}"))?;
    let console = String::from_utf8_lossy(&said.stdout).into_owned();
    let good = console.lines().filter(|line| line.contains("@@GOOD /dev/")).count();
    match said.status.success() && good == losses.len() {
        true => Ok(()),
        false => Err(format!("{good} of {} disks are good:\n{console}", losses.len())),
    }
}

/// One more disk of QEMU's, in words without spaces in them.
fn disk(at: usize, socket: &str) -> String {
    format!(
        "-blockdev driver=nbd,node-name=more{at},export=d{at},server.type=unix,server.path={socket},\
         discard=unmap -device virtio-blk-pci,drive=more{at},discard=on,write-zeroes=on"
    )
}
