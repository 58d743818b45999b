//! What the stock tool makes of an image.

use std::fs;

use lacuna::qcow2::format::IncompatibleFeatures;
use testkit::SparseBytes;
use testkit::foreign::{QEMU_IMG, qemu_img_check};

/// The low byte of the incompatible features.
const FEATURES_AT: u64 = 79;

/// Returns what the disk reads as; what is found wrong, leaks but not, is an error.
pub(crate) fn look(image: &SparseBytes, below: Option<&[u8]>) -> Result<Vec<u8>, String> {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let (path, raw) = (folder.path().join("a.qcow2"), folder.path().join("a.raw"));
    image.save(&path);
    if let Some(below) = below {
        fs::write(folder.path().join("below.raw"), below).map_err(|error| error.to_string())?;
    }
    let dirty = IncompatibleFeatures::DIRTY.bits() as u8;
    let is_dirty =
        image.read_vec(4, 4) == [0, 0, 0, 3] && image.read_vec(FEATURES_AT, 1)[0] & dirty != 0;
    let found = qemu_img_check(&path);
    if !is_dirty && !found.is_safe() {
        return Err(found.text);
    }
    let words = ["convert", "-f", "qcow2", "-O", "raw", "a.qcow2", "a.raw"];
    QEMU_IMG.succeed_in(folder.path(), words);
    fs::read(&raw).map_err(|error| error.to_string())
}
