//! The folder of a case: the files that it starts from, and what became of them.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use crate::Layout;
use crate::image::SparseBytes;
use crate::layout::{DATA_FILE, IMAGE};

/// Where the files of a case lie.
pub(crate) struct Folder {
    path: PathBuf,
    /// All files as they were at the start.
    before: BTreeMap<String, SparseBytes>,
}

impl Folder {
    /// Writes all files of a layout into a new folder.
    pub(crate) fn create(path: PathBuf, layout: &Layout) -> io::Result<Self> {
        std::fs::create_dir_all(&path)?;
        let path = path.canonicalize()?;
        let built = layout.image.build();
        let mut before = layout.beside.clone();
        if let Some(mut file) = built.data_file {
            file.set_len(layout.content().len());
            before.insert(DATA_FILE.to_owned(), file);
        }
        before.insert(IMAGE.to_owned(), built.bytes);
        for (name, bytes) in &before {
            bytes.write_to(&path.join(name))?;
        }
        Ok(Self { path, before })
    }

    pub(crate) fn image(&self) -> PathBuf {
        self.path.join(IMAGE)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the files that are not as they were, of those that are no one's to change or of all.
    pub(crate) fn changed(&self, which: Which) -> io::Result<Vec<String>> {
        let is_own = |name: &str| name == IMAGE || name == DATA_FILE;
        let mut changed = Vec::new();
        for (name, before) in &self.before {
            if which == Which::Beside && is_own(name) {
                continue;
            }
            if std::fs::read(self.path.join(name))? != before.to_vec() {
                changed.push(name.clone());
            }
        }
        Ok(changed)
    }

    /// Leaves the files as they were at the start beside what became of them, and texts.
    pub(crate) fn keep(&self, texts: &[(&str, String)], content: &SparseBytes) -> io::Result<()> {
        let before = self.path.join("before");
        std::fs::create_dir_all(&before)?;
        for (name, bytes) in &self.before {
            bytes.write_to(&before.join(name))?;
        }
        content.write_to(&self.path.join("expected.raw"))?;
        texts.iter().try_for_each(|(name, text)| std::fs::write(self.path.join(name), text))
    }
}

/// Which files are looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    All,
    /// Those that belong to somebody else: backing files.
    Beside,
}
