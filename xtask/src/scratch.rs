//! A folder for large files, on a disk and not in memory, removed at the end.

use std::fs;
use std::path::{Path, PathBuf};

use crate::Outcome;
use crate::run::{command, output, workspace};

/// The folder, in `target/`: a folder for temporary files may be in memory.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new(name: &str) -> Outcome<Self> {
        let name = format!("{name}-{}", std::process::id());
        let folder = workspace().join("target").join(name);
        fs::create_dir_all(&folder).map_err(|error| format!("cannot make a folder: {error}"))?;
        Ok(Self(folder))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Names a file in it.
    pub(crate) fn file(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    /// Refuses to begin what would fill the disk.
    pub(crate) fn require(&self, bytes: u64) -> Outcome {
        let said = output(command("df", &["--output=avail", "-B1", &self.file("")]))?;
        let free = said.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok());
        match free {
            None => Err(format!("df says what nobody knows: {said}")),
            Some(free) if free < bytes => Err(format!(
                "{} has {} MiB free, and {} MiB are needed",
                self.0.display(),
                free >> 20,
                bytes >> 20
            )),
            Some(_) => Ok(()),
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("{} stays behind: {error}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::looks::length;

    #[test]
    fn a_scratch_folder_goes_away_and_knows_what_is_free() {
        let scratch = Scratch::new("test-of-scratch").unwrap();
        let folder = scratch.path().to_owned();
        fs::write(folder.join("x"), vec![1; 1 << 16]).unwrap();
        assert!(scratch.require(1).is_ok());
        let reason = scratch.require(u64::MAX).unwrap_err();
        assert!(reason.contains("are needed"), "{reason}");
        assert_eq!(length(&scratch.file("x")), Ok(1 << 16));
        drop(scratch);
        assert!(!folder.exists());
    }
}
