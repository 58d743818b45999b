//! A file system image of the files at hand: ext4 by mke2fs, or FAT16 by our own hands.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use super::scratch::Scratch;
use super::{DemoResult, fat, files};

/// The size of the disk.
pub(super) const SIZE_BYTES: u64 = 256 << 20;

/// What was made.
#[derive(Debug)]
pub(super) struct Made {
    /// What the file system is called.
    pub(super) kind: &'static str,
    /// How many files are in it.
    pub(super) files: usize,
}

/// Makes the image at `target`.
pub(super) fn make(target: &Path, scratch: &Scratch) -> DemoResult<Made> {
    let files = files::at_hand();
    let image = File::create(target)?;
    image.set_len(SIZE_BYTES)?;
    if by_mke2fs(target, &scratch.path("files"), &files)? {
        return Ok(Made { kind: "ext4", files: files.len() });
    }
    let stored = fat::build(&image, &files)?;
    Ok(Made { kind: "FAT16 (mke2fs is not here)", files: stored })
}

/// Lets mke2fs fill the image from a folder; false where there is no mke2fs.
fn by_mke2fs(target: &Path, folder: &Path, files: &[(String, Vec<u8>)]) -> DemoResult<bool> {
    let Some(program) = find("mke2fs") else { return Ok(false) };
    fs::create_dir_all(folder)?;
    for (name, content) in files {
        fs::write(folder.join(name), content)?;
    }
    let mut command = Command::new(program);
    // Tables written at once, so that the guest's first mount is already behind us.
    command.args(["-q", "-F", "-t", "ext4", "-L", "lacuna", "-E", "lazy_itable_init=0", "-d"]);
    let output = command.arg(folder).arg(target).output()?;
    fs::remove_dir_all(folder)?;
    if output.status.success() {
        return Ok(true);
    }
    Err(format!("mke2fs: {}", String::from_utf8_lossy(&output.stderr).trim_end()).into())
}

/// Finds a program in PATH or where distributions put what administrators use.
pub(super) fn find(program: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let administrators = ["/usr/sbin", "/sbin"].map(std::path::PathBuf::from);
    std::env::split_paths(&path)
        .chain(administrators)
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
}
