//! Builds the disk of a chain, and remembers who is who in it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::below::{Below, Nothing};
use super::claims::{Purpose, Sharing};
use super::disk::{Disk, RawDisk};
use super::opener::Opener;
use super::policy::{ChainOptions, Format};
use super::walk::{Intent, Level, Reach, data_path, walk};
use crate::block::{DynLayer, Layer};
use crate::qcow2::{Access, Image, Parts, SnapshotChoice};
use crate::storage::{Claim, Permissions, Storage};
use crate::{Error, Result};

/// An opened disk with its backing chain.
///
/// ```
/// use std::path::Path;
/// use lacuna::chain::{self, ChainOptions, Format, MemoryOpener};
/// use lacuna::qcow2::Access;
/// use lacuna::storage::MemoryStorage;
///
/// let opener = MemoryOpener::default().with("disk", MemoryStorage::from(&[7; 4096][..]));
/// let options = ChainOptions::new(Format::Raw, Access::ReadOnly);
/// let chain = pollster::block_on(chain::open(&opener, Path::new("disk"), &options))?;
/// assert_eq!(chain.levels().len(), 1);
/// # Ok::<_, lacuna::Error>(())
/// ```
#[derive(Debug)]
pub struct Chain<S: Storage> {
    disk: Disk<S>,
    /// The levels below the top one, which that one reads as one layer.
    below: Vec<Disk<S>>,
    levels: Vec<LevelFacts>,
}

/// What is known of one level of an opened chain.
///
/// ```
/// # use lacuna::chain::{Format, LevelFacts};
/// let base = LevelFacts {
///     path: "/vm/base.raw".into(), format: Format::Raw, size_bytes: 4096, data_path: None,
/// };
/// assert_eq!(base.content_path(), std::path::Path::new("/vm/base.raw"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LevelFacts {
    /// The image file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// The size of its disk.
    pub size_bytes: u64,
    /// The external data file, where there is one.
    pub data_path: Option<PathBuf>,
}

impl LevelFacts {
    /// Returns the file in which guest data lies.
    #[must_use]
    pub fn content_path(&self) -> &Path {
        self.data_path.as_deref().unwrap_or(&self.path)
    }
}

impl<S: Storage> Chain<S> {
    /// Returns the disk as the guest sees it.
    pub const fn disk(&self) -> &Disk<S> {
        &self.disk
    }

    /// Returns the disk of one level, as if it ended the chain; nothing past the last one.
    pub fn level_disk(&self, level: usize) -> Option<&Disk<S>> {
        level.checked_sub(1).map_or(Some(&self.disk), |below| self.below.get(below))
    }

    /// Returns the chain with its disk as it was when a snapshot of the top image was made.
    ///
    /// # Errors
    /// As [`Disk::snapshot`].
    ///
    /// ```no_run
    /// # use std::path::Path;
    /// # use lacuna::chain::{self, ChainOptions, FileOpener, Format};
    /// # use lacuna::qcow2::{Access, SnapshotChoice};
    /// # pollster::block_on(async {
    /// let options = ChainOptions::new(Format::Qcow2, Access::ReadOnly);
    /// let chain = chain::open(&FileOpener::default(), Path::new("disk.qcow2"), &options).await?;
    /// let chain = chain.at_snapshot(&SnapshotChoice::Name("monday".into())).await?;
    /// # drop(chain);
    /// # Ok::<_, lacuna::Error>(())
    /// # });
    /// ```
    pub async fn at_snapshot(mut self, choice: &SnapshotChoice) -> Result<Self> {
        self.disk = self.disk.snapshot(choice).await?;
        if let Some(top) = self.levels.first_mut() {
            top.size_bytes = self.disk.size_bytes();
        }
        Ok(self)
    }

    /// Gives up what is known of the levels.
    pub fn into_disk(self) -> Disk<S> {
        self.disk
    }

    /// Returns the levels, top first.
    pub fn levels(&self) -> &[LevelFacts] {
        &self.levels
    }
}

/// Opens the image at `path` with everything below it that `options` allow.
///
/// # Errors
/// `InvalidRequest` where the image names a file that was not allowed or leaves out a format that
/// may not be guessed; `Unsupported` for names that are no plain file names, unknown formats and
/// more than [`MAX_LEVELS`](super::MAX_LEVELS) images; `Corrupt` for loops; else what opening
/// each image gives, with its path in front.
///
/// ```no_run
/// use std::path::Path;
/// use lacuna::chain::{self, Allow, ChainOptions, FileOpener, Format};
/// use lacuna::qcow2::Access;
///
/// # pollster::block_on(async {
/// let options = ChainOptions {
///     backing: Allow::asking(|named| named.path.starts_with("/vm")),
///     ..ChainOptions::new(Format::Qcow2, Access::ReadOnly)
/// };
/// let chain = chain::open(&FileOpener::default(), Path::new("/vm/top.qcow2"), &options).await?;
/// for level in chain.levels() {
///     println!("{} {}", level.format, level.path.display());
/// }
/// # Ok::<_, lacuna::Error>(())
/// # });
/// ```
pub async fn open<O: Opener>(
    opener: &O,
    path: &Path,
    options: &ChainOptions,
) -> Result<Chain<O::Storage>> {
    let found = walk(opener, path, options, Reach::Bottom, Intent::Use).await?;
    build(opener, found, options, options.data_path.as_ref()).await
}

/// A chain in two parts, each of which has a disk of its own.
///
/// See [`open_split`] for an example.
#[derive(Debug)]
pub struct SplitChain<S: Storage> {
    /// The top, and what is between it and the base. Its disk knows nothing of the base: what it
    /// leaves to that one reads as zeros, and is allocated nowhere.
    pub above: Chain<S>,
    /// The base, opened as the top is, and what is below it.
    pub base: Chain<S>,
}

impl<S: Storage> SplitChain<S> {
    /// Returns up to which offset the base shows where nothing above it decides: a level that is
    /// shorter hides what lies further down.
    pub fn shown_bytes(&self) -> u64 {
        let between = self.above.levels.iter().skip(1).map(|level| level.size_bytes);
        between.fold(u64::MAX, u64::min)
    }
}

/// Opens the image at `path` with everything below it, so that the image at `level` (1 is the one
/// right below the top) is written like the top.
///
/// # Errors
/// As [`open`]; `InvalidRequest` where there is no such level below the top.
///
/// ```no_run
/// use std::path::Path;
/// use lacuna::chain::{self, Allow, ChainOptions, FileOpener, Format};
/// use lacuna::qcow2::Access;
///
/// # pollster::block_on(async {
/// let options = ChainOptions {
///     backing: Allow::Named,
///     ..ChainOptions::new(Format::Qcow2, Access::ReadWrite)
/// };
/// let top = Path::new("/vm/top.qcow2");
/// let chain = chain::open_split(&FileOpener::default(), top, &options, 1).await?;
/// println!("{} goes into {}", top.display(), chain.base.levels()[0].path.display());
/// # Ok::<_, lacuna::Error>(())
/// # });
/// ```
pub async fn open_split<O: Opener>(
    opener: &O,
    path: &Path,
    options: &ChainOptions,
    level: usize,
) -> Result<SplitChain<O::Storage>> {
    let mut above = walk(opener, path, options, Reach::Bottom, Intent::Split(level)).await?;
    if level == 0 || level >= above.len() {
        return Err(Error::invalid(format!(
            "The chain has {} images below the top, none of which is number {level}",
            above.len() - 1
        )));
    }
    let base = above.split_off(level);
    let base = build(opener, base, options, None).await?;
    let above = build(opener, above, options, options.data_path.as_ref()).await?;
    Ok(SplitChain { above, base })
}

/// Makes the disks of levels that were found.
async fn build<O: Opener>(
    opener: &O,
    mut found: Vec<Level<O::Storage>>,
    options: &ChainOptions,
    data: Option<&PathBuf>,
) -> Result<Chain<O::Storage>> {
    let lower = found.split_off(1);
    let (mut levels, mut below) = (Vec::new(), Vec::new());
    let count = lower.len();
    for (index, level) in lower.into_iter().enumerate() {
        // Its own backing layers are asked by `Below`, not by the image.
        let nothing = level.names_backing().then(|| Arc::new(Nothing) as Arc<dyn DynLayer>);
        let mut options = options.clone();
        let tables = share_of_tables(options.image.table_bytes(), index, count);
        options.image = options.image.cache_bytes(tables);
        let (facts, disk) = open_level(opener, level, nothing, &options, None).await?;
        levels.push(facts);
        below.push(disk);
    }
    let top = found.pop().ok_or_else(|| Error::invalid("A chain has at least one image"))?;
    let backing = match below.is_empty() {
        false => Some(Arc::new(Below::new(below.clone())) as Arc<dyn DynLayer>),
        // Named, and left out.
        true => top.names_backing().then(|| Arc::new(Nothing) as Arc<dyn DynLayer>),
    };
    let (facts, disk) = open_level(opener, top, backing, options, data).await?;
    levels.insert(0, facts);
    Ok(Chain { disk, below, levels })
}

/// Returns how many bytes of tables a lower level may cache: all of them together have what the top
/// has, the lowest one half of it, as it mostly holds most.
const fn share_of_tables(bytes: u64, index: usize, count: usize) -> u64 {
    match (count, index + 1 == count) {
        (1, _) => bytes,
        (_, true) => bytes / 2,
        (_, false) => bytes / 2 / (count as u64 - 1),
    }
}

/// Makes a disk of one level; errors say which.
async fn open_level<O: Opener>(
    opener: &O,
    level: Level<O::Storage>,
    backing: Option<Arc<dyn DynLayer>>,
    options: &ChainOptions,
    given_data: Option<&PathBuf>,
) -> Result<(LevelFacts, Disk<O::Storage>)> {
    let path = level.path.clone();
    let opened = build_level(opener, level, backing, options, given_data).await;
    opened.map_err(|error| error.context(format!("Image {}", path.display())))
}

async fn build_level<O: Opener>(
    opener: &O,
    level: Level<O::Storage>,
    backing: Option<Arc<dyn DynLayer>>,
    options: &ChainOptions,
    given_data: Option<&PathBuf>,
) -> Result<(LevelFacts, Disk<O::Storage>)> {
    let data_path = data_path(opener, &level, options, given_data)?;
    let disk = match level.format {
        Format::Raw => Disk::Raw(RawDisk::open(level.storage, level.access, level.origin).await?),
        Format::Qcow2 => {
            let data = match &data_path {
                Some(data) => Some(open_data(opener, data, &level, options).await?),
                None => None,
            };
            let parts = Parts { storage: level.storage, data, backing };
            let image = options.image.clone().access(level.access);
            Disk::Qcow2(Image::open(parts, image).await?)
        }
    };
    let size_bytes = disk.size_bytes();
    Ok((LevelFacts { path: level.path, format: level.format, size_bytes, data_path }, disk))
}

/// Opens a data file, unless that is the image file itself under some name.
async fn open_data<O: Opener>(
    opener: &O,
    data: &Path,
    level: &Level<O::Storage>,
    options: &ChainOptions,
) -> Result<O::Storage> {
    if opener.identify(data).await? == opener.identify(&level.path).await? {
        return Err(Error::corrupt(format!(
            "The image names itself ({}) as its data file",
            data.display()
        )));
    }
    let opened = claimed_data(opener, data, level.access, options.sharing).await;
    opened.map_err(|error| error.context(format!("Data file {}", data.display())))
}

async fn claimed_data<O: Opener>(
    opener: &O,
    data: &Path,
    access: Access,
    sharing: Sharing,
) -> Result<O::Storage> {
    let storage = opener.open(data, access).await?;
    let claim = sharing.claim(Purpose::Data(access));
    // QEMU denies resizing first: whoever is refused hears of the same permission as there.
    let steady = Claim { shared: claim.shared | Permissions::RESIZE.complement(), ..Claim::NONE };
    opener.claim(&storage, steady).await?;
    opener.claim(&storage, claim).await?;
    Ok(storage)
}
