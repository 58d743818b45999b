//! What the stock tool makes of an image.

use std::fs;

use testkit::SparseBytes;
use testkit::foreign::{QEMU_IMG, qemu_img_check};

/// Returns what the disk reads as. What is found wrong is an error, but for leaks, and where the image is
/// dirty.
pub(crate) fn look(
    image: &SparseBytes,
    below: Option<&[u8]>,
    is_dirty: bool,
) -> Result<Vec<u8>, String> {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let (path, raw) = (folder.path().join("a.qcow2"), folder.path().join("a.raw"));
    image.save(&path);
    if let Some(below) = below {
        fs::write(folder.path().join("below.raw"), below).map_err(|error| error.to_string())?;
    }
    let found = qemu_img_check(&path);
    if !is_dirty && !found.is_safe() {
        return Err(found.text);
    }
    let words = ["convert", "-f", "qcow2", "-O", "raw", "a.qcow2", "a.raw"];
    QEMU_IMG.succeed_in(folder.path(), words);
    fs::read(&raw).map_err(|error| error.to_string())
}
