//! Where the demo keeps its images while it runs.

use std::fs;
use std::path::{Path, PathBuf};

use super::DemoResult;

/// A folder that goes away again, unless the user named it.
#[derive(Debug)]
pub(super) struct Scratch {
    folder: PathBuf,
    is_kept: bool,
}

impl Scratch {
    /// Makes `keep`, or a folder of our own among the temporary files.
    pub(super) fn new(keep: Option<&Path>) -> DemoResult<Self> {
        let own = || std::env::temp_dir().join(format!("lacuna-demo-{}", std::process::id()));
        let folder = keep.map_or_else(own, Path::to_path_buf);
        fs::create_dir_all(&folder)
            .map_err(|error| format!("Making the folder {}: {error}", folder.display()))?;
        Ok(Self { folder, is_kept: keep.is_some() })
    }

    /// Returns where a file of this name goes.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Says where the images are now.
    pub(super) fn farewell(&self) -> String {
        match self.is_kept {
            true => format!("The images are in {}. ", self.folder.display()),
            false => "The images are gone again (--keep DIR leaves them). ".to_owned(),
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.is_kept
            && let Err(error) = fs::remove_dir_all(&self.folder)
        {
            eprintln!("{} stays behind: {error}", self.folder.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_folder_goes_away_and_a_named_one_stays() {
        let scratch = Scratch::new(None).unwrap();
        let own = scratch.path("x");
        fs::write(&own, "x").unwrap();
        drop(scratch);
        assert!(!own.exists());

        let folder = tempfile::tempdir().unwrap();
        let named = folder.path().join("kept");
        drop(Scratch::new(Some(&named)).unwrap());
        assert!(named.exists());
    }
}
