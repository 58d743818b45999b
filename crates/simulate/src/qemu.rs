//! What the stock tool makes of an image.

use std::iter;

use lacuna::chain::Format;
use testkit::foreign::{qemu_img_check, qemu_img_read};

use crate::files::{self, Files, NAMES, TOP, is_dirty};

/// Returns what the disk reads as. What is found wrong is an error, but for leaks, and where an image is
/// dirty.
pub(crate) fn look(left: &Files) -> Result<Vec<u8>, String> {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    for (name, file) in NAMES.iter().zip(left) {
        file.save(&folder.path().join(name));
    }
    let below = files::all_below(left)?.into_iter();
    let images = below.filter(|(_, format)| *format == Format::Qcow2).map(|(file, _)| file);
    for file in iter::once(TOP).chain(images) {
        let found = qemu_img_check(&folder.path().join(NAMES[file]));
        if !is_dirty(&left[file])? && !found.is_safe() {
            return Err(format!("{}: {}", NAMES[file], found.text));
        }
    }
    Ok(qemu_img_read(&folder.path().join(NAMES[TOP])).to_vec())
}
