//! What `serve --dedup=online` costs a client that writes nothing twice, and saves one that does.

use std::path::Path;
use std::thread;

use super::random;
use crate::cells::{mib, verdict};
use crate::looks::{allocated, clean, same};
use crate::run::{awaited, command, output};
use crate::scratch::Scratch;
use crate::watched::{Cost, summary, watch};
use crate::{Outcome, setup};

/// What is written once, in requests of 64 KiB; a half of it twice. The server takes about half a second of
/// CPU for it, which is counted in steps of 10 ms.
const MIB: u64 = 1024;
const RUNS: usize = 9;
/// CPU time of the server, above that without, that is too much.
const MOST_COST: f64 = 0.10;

pub(super) fn run(ours: &Path, scratch: &Scratch) -> Outcome<String> {
    setup::deduplicators()?;
    scratch.require((MIB * 5) << 20)?;
    let unique = random(scratch, "unique", MIB)?;
    let half = random(scratch, "half", MIB / 2)?;
    let twice = scratch.file("twice");
    output(command("bash", &["-c", "cat \"$0\" \"$0\" > \"$1\"", &half, &twice]))?;
    let mut lines = vec![
        format!("| {MIB} MiB in writes of 64 KiB, to | CPU of the server | wall | on the host | |"),
        "|---|---|---|---|---|".to_owned(),
    ];
    for (what, raw) in [("nothing alike", &unique), ("a half, and again", &twice)] {
        let [off, on] = contest(ours, scratch, raw)?;
        let more = on.0.cpu / off.0.cpu - 1.0;
        let judged = match raw == &unique {
            true => format!("{:+.1} % of CPU: {}", more * 100.0, verdict(more <= MOST_COST)),
            false => format!("{:.1} % saved", (1.0 - on.1 as f64 / off.1 as f64) * 100.0),
        };
        for (way, (cost, bytes), judged) in
            [("`serve`", off, ""), ("`serve --dedup=online`", on, judged.as_str())]
        {
            lines.push(format!(
                "| {way}, {what} | {:.2} s | {:.2} s | {} | {judged} |",
                cost.cpu,
                cost.wall,
                mib(bytes),
            ));
        }
    }
    Ok(lines.join("\n"))
}

/// Lets both servers be written to by turns; returns what they took and what is stored.
fn contest(ours: &Path, scratch: &Scratch, raw: &str) -> Outcome<[(Cost, u64); 2]> {
    let mut runs = [Vec::new(), Vec::new()];
    let mut stored = [0; 2];
    for _ in 0..RUNS {
        for (side, options) in [&[][..], &["--dedup=online"]].into_iter().enumerate() {
            let (cost, bytes) = once(ours, scratch, raw, options)?;
            runs[side].push(cost);
            stored[side] = bytes;
        }
    }
    let [off, on] = runs.map(|costs| summary(&costs));
    Ok([(off, stored[0]), (on, stored[1])])
}

fn once(ours: &Path, scratch: &Scratch, raw: &str, options: &[&str]) -> Outcome<(Cost, u64)> {
    let (image, socket) = (scratch.file("image"), scratch.file("socket"));
    let size = format!("{MIB}M");
    output(command("qemu-img", &["create", "-q", "-f", "qcow2", &image, &size]))?;
    let mut server = command(&ours.to_string_lossy(), &["serve", "-f", "qcow2", "-k", &socket]);
    server.args(options).arg(&image);
    let cost = thread::scope(|scope| {
        let client = scope.spawn(|| write(raw, &socket));
        let served = watch(&mut server, scratch.path());
        let wrote = client.join().unwrap_or_else(|_| Err("the client is lost".into()));
        wrote.and(served)
    })?;
    clean(&image)?;
    same("raw", raw, &image)?;
    Ok((cost.0, allocated(Path::new(&image))?))
}

/// Writes all to the server, once there is one; it ends when its client goes.
fn write(raw: &str, socket: &str) -> Outcome {
    awaited(socket)?;
    let uri = format!("nbd+unix:///?socket={socket}");
    let words = ["--connections=1", "--request-size=65536", "--flush", raw, &uri];
    output(command("nbdcopy", &words)).map(drop)
}
