//! A file system image of the files at hand: ext4 by mke2fs, or FAT16 by our own hands.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use lacuna::block::is_zero;

use super::guest::{BLOCK as CLUSTER_BYTES, fingerprint};
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

/// The folder with the files, and the copy that the guest made of it.
const FOLDERS: [&str; 2] = ["files", "files (copy)"];
/// Blocks of ext4 as large disks have them, which begin where files do.
const BLOCK_BYTES: u64 = 4096;
const BLOCKS_OF_CLUSTER: u64 = CLUSTER_BYTES / BLOCK_BYTES;

/// Makes the image at `target`.
pub(super) fn make(target: &Path, scratch: &Scratch) -> DemoResult<Made> {
    let files = files::at_hand();
    let made = fill(target, scratch, &files)?;
    let missing = apart(target)?.map_or(0, |blocks| blocks.wrapping_neg() % BLOCKS_OF_CLUSTER);
    match missing {
        0 => Ok(made),
        blocks => fill(target, scratch, &files::evened_out(&files, blocks, BLOCK_BYTES)),
    }
}

fn fill(target: &Path, scratch: &Scratch, files: &[(String, Vec<u8>)]) -> DemoResult<Made> {
    let image = File::create(target)?;
    image.set_len(SIZE_BYTES)?;
    if by_mke2fs(target, &scratch.path("root"), files)? {
        return Ok(Made { kind: "ext4", files: files.len() * FOLDERS.len() });
    }
    // Its root folder holds no others; the copies follow the files.
    let stored = fat::build(&image, &[files, files].concat())?;
    Ok(Made { kind: "FAT16 (mke2fs is not here)", files: stored })
}

/// Returns how many blocks lie between a file and its copy, as most blocks that are there twice have it.
fn apart(image: &Path) -> DemoResult<Option<u64>> {
    let file = File::open(image)?;
    let mut block = vec![0; BLOCK_BYTES as usize];
    let (mut first_of, mut votes) = (HashMap::new(), HashMap::new());
    for number in 0..SIZE_BYTES / BLOCK_BYTES {
        file.read_exact_at(&mut block, number * BLOCK_BYTES)?;
        if is_zero(&block) {
            continue;
        }
        if let Some(first) = first_of.insert(fingerprint(&block), number) {
            *votes.entry(number - first).or_insert(0) += 1;
        }
    }
    Ok(votes.into_iter().max_by_key(|(_, votes)| *votes).map(|(blocks, _)| blocks))
}

/// Lets mke2fs fill the image from a folder; false where there is no mke2fs.
fn by_mke2fs(target: &Path, root: &Path, files: &[(String, Vec<u8>)]) -> DemoResult<bool> {
    let Some(program) = find("mke2fs") else { return Ok(false) };
    for folder in FOLDERS.map(|name| root.join(name)) {
        fs::create_dir_all(&folder)?;
        for (name, content) in files {
            fs::write(folder.join(name), content)?;
        }
    }
    let mut command = Command::new(program);
    // Tables written at once, so that the guest's first mount is already behind us.
    command.args(["-q", "-F", "-t", "ext4", "-b", &BLOCK_BYTES.to_string(), "-L", "lacuna"]);
    command.args(["-E", "lazy_itable_init=0", "-d"]);
    let output = command.arg(root).arg(target).output()?;
    fs::remove_dir_all(root)?;
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
