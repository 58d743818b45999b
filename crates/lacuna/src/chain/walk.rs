//! Follows the names from the top image down, opening the image files on the way.
//!
//! * Never opens a data file, nor builds a disk: that comes after the whole chain is known good.
//! * Never more than [`MAX_LEVELS`] levels, never the same object twice.

use std::path::{Path, PathBuf};

use super::claims::Purpose;
use super::disk::Origin;
use super::name::{quoted, resolve};
use super::opener::{Identity, Opener};
use super::policy::{
    ChainOptions, Format, FormatChoice, Instead, Reference, Role, StandIn, UnnamedFormat,
};
use super::probe::probe;
use crate::qcow2::format::Header;
use crate::qcow2::{Access, read_header};
use crate::storage::{Claim, Storage};
use crate::{Error, Result};

/// How many images may be stacked, the top one included. Each costs an open file.
pub const MAX_LEVELS: usize = 1024;

/// Where to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// All the way, or an error.
    Bottom,
    /// The top image alone.
    Top,
}

/// What the images are opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Intent {
    /// To say what they are.
    Describe,
    /// To use them as disks, the one at this level being written as the top is.
    Split(usize),
    /// To use them as disks.
    Use,
}

/// An image file of the chain, opened, with what it says of itself.
pub(super) struct Level<S> {
    pub(super) path: PathBuf,
    pub(super) format: Format,
    pub(super) origin: Origin,
    pub(super) access: Access,
    pub(super) storage: S,
    /// What a qcow2 image says.
    pub(super) header: Option<Header>,
}

impl<S> Level<S> {
    pub(super) fn names_backing(&self) -> bool {
        self.header.as_ref().is_some_and(|header| header.backing_name.is_some())
    }

    fn has_data_file(&self) -> bool {
        self.header.as_ref().is_some_and(Header::has_external_data_file)
    }
}

/// What is to be opened next.
struct Step {
    path: PathBuf,
    format: FormatChoice,
    access: Access,
}

/// Opens the image files from `path` down, top first.
pub(super) async fn walk<O: Opener>(
    opener: &O,
    path: &Path,
    options: &ChainOptions,
    reach: Reach,
    intent: Intent,
) -> Result<Vec<Level<O::Storage>>> {
    options.sharing.check(options.access)?;
    let mut levels = Vec::new();
    let mut seen: Vec<Identity> = Vec::new();
    let top = Step { path: path.to_owned(), format: options.format, access: options.access };
    let mut next = Some(top);
    while let Some(step) = next {
        let name = step.path.clone();
        check_new(opener, &name, &mut seen).await?;
        let purpose = |format, access| match intent {
            Intent::Describe => Purpose::Description(format),
            Intent::Split(_) | Intent::Use => Purpose::Image(format, access),
        };
        let sharing = if levels.is_empty() { options.sharing } else { options.sharing.below() };
        let claim = |format, access| sharing.claim(purpose(format, access));
        let level =
            open_level(opener, step, claim).await.map_err(|error| in_image(error, &name))?;
        let level = match intent == Intent::Split(levels.len()) {
            true => written(opener, level, claim).await.map_err(|error| in_image(error, &name))?,
            false => level,
        };
        next = match reach {
            Reach::Top => None,
            Reach::Bottom => {
                let instead = options.instead.get(levels.len());
                below(opener, &level, options, instead).map_err(|error| in_image(error, &name))?
            }
        };
        levels.push(level);
    }
    Ok(levels)
}

fn in_image(error: Error, path: &Path) -> Error {
    error.context(format!("Image {}", path.display()))
}

/// Refuses an object that is in the chain already, and one level too many.
async fn check_new<O: Opener>(opener: &O, path: &Path, seen: &mut Vec<Identity>) -> Result<()> {
    let identity = opener.identify(path).await?;
    if seen.contains(&identity) {
        return Err(Error::corrupt(format!(
            "The backing chain is a loop: {} is in it twice",
            path.display()
        )));
    }
    if seen.len() == MAX_LEVELS {
        return Err(Error::unsupported(format!(
            "The backing chain has more than {MAX_LEVELS} images; {} is one too many",
            path.display()
        )));
    }
    seen.push(identity);
    Ok(())
}

async fn open_level<O: Opener>(
    opener: &O,
    step: Step,
    claim: impl Fn(Format, Access) -> Claim,
) -> Result<Level<O::Storage>> {
    let storage = opener.open(&step.path, step.access).await?;
    let (format, origin) = match step.format {
        FormatChoice::Known(format) => (format, Origin::Told),
        FormatChoice::Probe => (probe(&storage).await?, Origin::Probed),
    };
    opener.claim(&storage, claim(format, step.access)).await?;
    let header = header_of(format, &storage).await?;
    Ok(Level { path: step.path, format, origin, access: step.access, storage, header })
}

async fn header_of<S: Storage>(format: Format, storage: &S) -> Result<Option<Header>> {
    match format {
        Format::Qcow2 => read_header(storage).await.map(Some),
        Format::Raw => Ok(None),
    }
}

/// Opens a level anew that is to be written: whoever lets nobody read it is told apart from whoever
/// lets nobody write to it.
async fn written<O: Opener>(
    opener: &O,
    level: Level<O::Storage>,
    claim: impl Fn(Format, Access) -> Claim,
) -> Result<Level<O::Storage>> {
    let access = Access::ReadWrite;
    let storage = opener.open(&level.path, access).await?;
    drop(level.storage);
    opener.claim(&storage, claim(level.format, access)).await?;
    // Nobody had to leave it alone in between.
    let header = header_of(level.format, &storage).await?;
    Ok(Level { access, storage, header, ..level })
}

/// What comes below an image: what the caller says, else what the image names.
fn below<O: Opener>(
    opener: &O,
    level: &Level<O::Storage>,
    options: &ChainOptions,
    instead: Option<&Instead>,
) -> Result<Option<Step>> {
    let named = Instead::default();
    let instead = instead.unwrap_or(&named);
    let Some(header) = &level.header else { return Ok(None) };
    let path = match &instead.backing {
        StandIn::At(path) => path.clone(),
        StandIn::Named => match named_below(opener, level, header, options)? {
            Some(path) => path,
            None => return Ok(None),
        },
        StandIn::Nothing => return Ok(None),
    };
    let format = match (instead.format, &instead.backing) {
        (Some(format), _) => format,
        // What the image says of one file says nothing of another.
        (None, StandIn::At(_)) => unnamed_format(options)?,
        (None, _) => backing_format(header, options)?,
    };
    let is_remote = opener.is_remote(path.as_os_str().as_encoded_bytes());
    if is_remote && format == FormatChoice::Probe && instead.backing == StandIn::Named {
        return unguessed().map(Some);
    }
    Ok(Some(Step { path, format, access: Access::ReadOnly }))
}

/// What the image names as its backing file, where it may be opened.
fn named_below<O: Opener>(
    opener: &O,
    level: &Level<O::Storage>,
    header: &Header,
    options: &ChainOptions,
) -> Result<Option<PathBuf>> {
    let Some(name) = &header.backing_name else { return Ok(None) };
    let path = resolve(name.as_bytes(), &level.path, opener)
        .map_err(|error| error.context("Backing file name"))?;
    options.backing.check(&Reference { role: Role::Backing, image: &level.path, path: &path })?;
    Ok(Some(path))
}

fn backing_format(header: &Header, options: &ChainOptions) -> Result<FormatChoice> {
    let Some(name) = &header.extensions.backing_format else { return unnamed_format(options) };
    match name.as_str() {
        Some(name) => name.parse().map(FormatChoice::Known),
        None => Err(Error::unsupported(format!(
            "Backing format {} is not known; raw and qcow2 are",
            quoted(name.as_bytes())
        ))),
    }
}

fn unnamed_format(options: &ChainOptions) -> Result<FormatChoice> {
    match options.unnamed_format {
        UnnamedFormat::Probe => Ok(FormatChoice::Probe),
        UnnamedFormat::Refuse => Err(Error::invalid(
            "The image does not say of which format its backing file is, and guessing is not \
             allowed; ChainOptions::unnamed_format can allow it, and storing the format in the \
             image (qemu-img rebase -u -F) makes it unnecessary",
        )),
    }
}

/// Whoever is on the way to a server chooses what a probe finds.
fn unguessed<T>() -> Result<T> {
    Err(Error::invalid(
        "The image does not say of which format its backing file is, and that of an export is \
         never guessed; storing the format in the image (qemu-img rebase -u -F) makes it known",
    ))
}

/// Where the external data file of the image lies, if it has one and it may be opened.
///
/// `given` is the file that the caller chose instead.
pub(super) fn data_path<O: Opener>(
    opener: &O,
    level: &Level<O::Storage>,
    options: &ChainOptions,
    given: Option<&PathBuf>,
) -> Result<Option<PathBuf>> {
    if given.is_some() && level.has_data_file() {
        return Ok(given.cloned());
    }
    let Some(path) = named_data_path(opener, level)? else { return Ok(None) };
    let reference = Reference { role: Role::Data, image: &level.path, path: &path };
    options.data_file.check(&reference)?;
    Ok(Some(path))
}

fn named_data_path<O: Opener>(opener: &O, level: &Level<O::Storage>) -> Result<Option<PathBuf>> {
    let Some(header) = level.header.as_ref().filter(|_| level.has_data_file()) else {
        return Ok(None);
    };
    let Some(name) = &header.extensions.data_file_name else {
        return Err(Error::corrupt(
            "Guest data lies in an external data file, but the image does not name it",
        ));
    };
    // What a guest writes goes there: nowhere but to this host, whoever made the image.
    if opener.is_remote(name.as_bytes()) {
        return Err(Error::unsupported(format!(
            "Data file name: {} leads to a server; only a local file may hold the data of an image",
            quoted(name.as_bytes())
        )));
    }
    let path = resolve(name.as_bytes(), &level.path, opener);
    path.map(Some).map_err(|error| error.context("Data file name"))
}
