//! Says what each level of a chain is, without opening data files or building disks.

use std::path::{Path, PathBuf};

use super::opener::Opener;
use super::policy::{ChainOptions, Format};
use super::walk::{Intent, Level, Reach, walk};
use crate::Result;
use crate::qcow2::format::Header;
use crate::storage::Storage;

/// How much of a chain to look at.
///
/// ```
/// assert_ne!(lacuna::chain::Levels::All, lacuna::chain::Levels::Top);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Levels {
    /// The image and all that is below it.
    All,
    /// The image alone; the names in it are not followed, allowed or not.
    Top,
}

/// One level of a chain, as its image file alone describes it.
///
/// ```
/// # use std::path::Path;
/// # use lacuna::chain::{self, ChainOptions, Format, Levels, MemoryOpener};
/// # use lacuna::{qcow2::Access, storage::MemoryStorage};
/// let opener = MemoryOpener::default().with("disk", MemoryStorage::from(&[7; 1000][..]));
/// let options = ChainOptions::new(Format::Raw, Access::ReadOnly);
/// let levels = chain::inspect(&opener, Path::new("disk"), &options, Levels::All);
/// let levels = pollster::block_on(levels)?;
/// assert_eq!(levels[0].size_bytes, 1024);
/// assert!(levels[0].header.is_none());
/// # Ok::<_, lacuna::Error>(())
/// ```
#[derive(Debug)]
pub struct LevelInfo<S> {
    /// The image file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// The size of its disk, as a multiple of 512.
    pub size_bytes: u64,
    /// What a qcow2 image says of itself.
    pub header: Option<Header>,
    /// The opened image file, for tables that the header points to.
    pub storage: S,
}

/// Describes the image at `path` and, if asked, those below it, top first.
///
/// Images are opened for reading whatever the options say; data files are not opened.
///
/// # Errors
/// As [`open`](super::open) gives for names, formats, loops and headers.
pub async fn inspect<O: Opener>(
    opener: &O,
    path: &Path,
    options: &ChainOptions,
    levels: Levels,
) -> Result<Vec<LevelInfo<O::Storage>>> {
    let options = ChainOptions { access: crate::qcow2::Access::ReadOnly, ..options.clone() };
    let reach = match levels {
        Levels::All => Reach::Bottom,
        Levels::Top => Reach::Top,
    };
    let mut described = Vec::new();
    for level in walk(opener, path, &options, reach, Intent::Describe).await? {
        described.push(describe(level).await?);
    }
    Ok(described)
}

async fn describe<S: Storage>(level: Level<S>) -> Result<LevelInfo<S>> {
    let Level { path, format, storage, header, .. } = level;
    let size_bytes = match &header {
        Some(header) => header.size_bytes / 512 * 512,
        None => storage.len().await?.next_multiple_of(512),
    };
    Ok(LevelInfo { path, format, size_bytes, header, storage })
}
