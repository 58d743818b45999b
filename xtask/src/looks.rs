//! What stock tools and the host say of images and their files.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::Outcome;
use crate::run::{command, output};

/// The unit in which a host counts.
const BLOCK_BYTES: u64 = 512;

/// Refuses an image that `qemu-img check` finds fault with.
pub(crate) fn clean(image: &str) -> Outcome {
    output(command("qemu-img", &["check", "-q", "-f", "qcow2", image])).map(drop)
}

/// Refuses an image that does not read as a disk of some format does.
pub(crate) fn same(format: &str, disk: &str, image: &str) -> Outcome {
    let compare = ["compare", "-q", "-f", format, "-F", "qcow2", disk, image];
    output(command("qemu-img", &compare)).map(drop)
}

/// Returns the bytes that a file has on the host.
pub(crate) fn allocated(file: &Path) -> Outcome<u64> {
    found(file).map(|found| found.blocks() * BLOCK_BYTES)
}

/// Returns the bytes that all files below a folder have on the host. A file that goes away meanwhile has
/// none.
pub(crate) fn allocated_below(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let sizes = entries.filter_map(|entry| {
        let found = entry.metadata().ok()?;
        match found.is_dir() {
            true => Some(allocated_below(&entry.path())),
            false => Some(found.blocks() * BLOCK_BYTES),
        }
    });
    sizes.sum()
}

/// Returns how long a file is, in bytes.
pub(crate) fn length(file: &str) -> Outcome<u64> {
    found(Path::new(file)).map(|found| found.len())
}

fn found(file: &Path) -> Outcome<fs::Metadata> {
    fs::metadata(file).map_err(|error| format!("no {}: {error}", file.display()))
}
