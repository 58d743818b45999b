//! Files of a disk read without mounting it, by the tools of its file system.

use std::fs;

use crate::Outcome;
use crate::run::{command, output};
use crate::scratch::Scratch;

/// A file system that we have tools for.
#[derive(Clone, Debug)]
pub(super) enum FileSystem {
    Ext4,
    Btrfs,
    /// Its tools list names only in part: these are known.
    Ntfs {
        files: Vec<String>,
    },
}

/// What is in a disk.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Content {
    /// A line for each file, with its hash.
    lines: Vec<String>,
}

impl Content {
    pub(super) fn files(&self) -> usize {
        self.lines.len()
    }
}

/// Lists and hashes what lies below a folder, symbolic links by what they lead to.
const HASH: &str = "cd \"$0\" && find . -type f -print0 | sort -z | xargs -0r sha256sum && \
                    find . -type l -printf '%p -> %l\\n' | sort";

impl FileSystem {
    pub(super) const fn word(&self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Btrfs => "btrfs",
            Self::Ntfs { .. } => "ntfs",
        }
    }

    /// Refuses a disk that its own checker finds fault with; returns hashes of all files.
    pub(super) fn content(&self, scratch: &Scratch, image: &str) -> Outcome<Content> {
        let raw = scratch.file("look.raw");
        output(command("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", image, &raw]))?;
        self.check(&raw)?;
        let lines = match self {
            Self::Ext4 => hashed(scratch, |folder| {
                command("debugfs", &["-R", &format!("rdump / {folder}"), &raw])
            }),
            Self::Btrfs => {
                hashed(scratch, |folder| command("btrfs", &["restore", "-S", &raw, folder]))
            }
            Self::Ntfs { files } => files.iter().map(|file| ntfs_line(&raw, file)).collect(),
        }?;
        fs::remove_file(&raw).map_err(|error| format!("{raw} stays behind: {error}"))?;
        match lines.is_empty() {
            true => Err(format!("{image} has no files, by the tools of {}", self.word())),
            false => Ok(Content { lines }),
        }
    }

    fn check(&self, raw: &str) -> Outcome {
        let checker = match self {
            Self::Ext4 => command("e2fsck", &["-fn", raw]),
            Self::Btrfs => command("btrfs", &["check", "--readonly", raw]),
            Self::Ntfs { .. } => command("ntfsfix", &["-n", raw]),
        };
        output(checker).map(drop)
    }
}

/// Lets a program copy all files into a folder, and hashes them there.
fn hashed(scratch: &Scratch, copy: impl Fn(&str) -> std::process::Command) -> Outcome<Vec<String>> {
    let folder = scratch.file("files");
    fs::create_dir_all(&folder).map_err(|error| format!("no folder for files: {error}"))?;
    output(copy(&folder))?;
    let said = output(command("bash", &["-c", HASH, &folder]))?;
    output(command("rm", &["-rf", &folder]))?;
    Ok(said.lines().map(str::to_owned).collect())
}

fn ntfs_line(raw: &str, file: &str) -> Outcome<String> {
    let hash = "set -o pipefail; ntfscat \"$0\" \"$1\" | sha256sum";
    let said = output(command("bash", &["-c", hash, raw, file]))?;
    Ok(format!("{} {file}", said.trim_end()))
}
