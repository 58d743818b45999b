//! What the stock tool makes of an image.

use std::fs;

use lacuna::chain::Format;
use testkit::foreign::{QEMU_IMG, qemu_img_check};

use crate::files::{self, Files, NAMES, TOP, is_dirty};

/// Returns what the disk reads as. What is found wrong is an error, but for leaks, and where an image is
/// dirty.
pub(crate) fn look(left: &Files) -> Result<Vec<u8>, String> {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    for (name, file) in NAMES.iter().zip(left) {
        file.save(&folder.path().join(name));
    }
    let below = files::below(&files::header(left)?);
    let below = below.filter(|(_, format)| *format == Format::Qcow2).map(|(file, _)| file);
    for file in [Some(TOP), below].into_iter().flatten() {
        let found = qemu_img_check(&folder.path().join(NAMES[file]));
        if !is_dirty(&left[file])? && !found.is_safe() {
            return Err(format!("{}: {}", NAMES[file], found.text));
        }
    }
    let words = ["convert", "-f", "qcow2", "-O", "raw", NAMES[TOP], "seen"];
    QEMU_IMG.succeed_in(folder.path(), words);
    fs::read(folder.path().join("seen")).map_err(|error| error.to_string())
}
