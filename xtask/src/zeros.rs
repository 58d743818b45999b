//! A cell of our own: an empty disk of 8 TiB copied onto an empty image.
//!
//! What counts is wall time, for the stock tool mostly waits for its tables, and how large the
//! target is afterwards. Ours runs under its own name: as `qemu-img` it makes QEMU's tables.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::Outcome;

/// The size of the disks.
const SIZE: &str = "8T";
/// How much faster ours is to be.
const TARGET: f64 = 500.0;

/// Runs the cell, stock and ours in turn, and prints a row.
pub(crate) fn run(ours: &Path) -> Outcome {
    let folder = std::env::temp_dir().join(format!("lacuna-zeros-{}", std::process::id()));
    std::fs::create_dir_all(&folder).map_err(|error| format!("cannot make a folder: {error}"))?;
    let row = measure(ours, &folder);
    std::fs::remove_dir_all(&folder)
        .map_err(|error| format!("{} stays behind: {error}", folder.display()))?;
    println!("{}", row?);
    Ok(())
}

fn measure(ours: &Path, folder: &Path) -> Outcome<String> {
    let create = ["create", "-q", "-f", "qcow2"];
    timed(Path::new("qemu-img"), folder, &[&create[..], &["source", SIZE]].concat())?;
    let side = |program: &Path, target: &str| {
        timed(Path::new("qemu-img"), folder, &[&create[..], &[target, SIZE]].concat())?;
        let convert = ["convert", "-n", "-f", "qcow2", "-O", "qcow2", "source", target];
        let seconds = timed(program, folder, &convert)?;
        let found = std::fs::metadata(folder.join(target));
        let bytes = found.map_err(|error| format!("cannot look at {target}: {error}"))?.len();
        Ok::<_, String>((seconds, bytes))
    };
    let (stock, ours) = (side(Path::new("qemu-img"), "stock")?, side(ours, "ours")?);
    let ratio = stock.0 / ours.0;
    let reached = if ratio >= TARGET { "reached" } else { "missed" };
    Ok(format!(
        "convert -n, empty {SIZE} onto empty: stock {:.2} s and {} bytes, ours {:.4} s and {} \
         bytes: {ratio:.0} times (target {TARGET}: {reached})",
        stock.0, stock.1, ours.0, ours.1
    ))
}

fn timed(program: &Path, folder: &Path, words: &[&str]) -> Outcome<f64> {
    let start = Instant::now();
    let status = Command::new(program)
        .args(words)
        .current_dir(folder)
        .stdin(Stdio::null())
        .status()
        .map_err(|error| format!("cannot run {}: {error}", program.display()))?;
    match status.success() {
        true => Ok(start.elapsed().as_secs_f64()),
        false => Err(format!("{} {} failed", program.display(), words.join(" "))),
    }
}
