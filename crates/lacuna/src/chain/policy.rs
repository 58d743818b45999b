//! What may be guessed, and what may be opened because an image names it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use super::claims::Sharing;
use crate::qcow2::{Access, OpenOptions};
use crate::{Error, Result};

/// The formats a chain is made of.
///
/// ```
/// use lacuna::chain::Format;
/// assert_eq!("qcow2".parse::<Format>()?, Format::Qcow2);
/// assert_eq!(Format::Raw.to_string(), "raw");
/// # Ok::<_, lacuna::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// qcow2 of version 2 or 3.
    Qcow2,
    /// The bytes of the disk and nothing else.
    Raw,
}

impl Format {
    /// Returns the name that images and command lines use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        match name {
            "qcow2" => Ok(Self::Qcow2),
            // Old images name the protocol where QEMU then reads raw.
            "raw" | "file" | "host_device" => Ok(Self::Raw),
            _ => Err(Error::unsupported(format!(
                "Format {} is not known; raw and qcow2 are",
                super::name::quoted(name.as_bytes())
            ))),
        }
    }
}

/// Where the format of the top image comes from.
///
/// ```
/// use lacuna::chain::{Format, FormatChoice};
/// assert_ne!(FormatChoice::from(Format::Raw), FormatChoice::Probe);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FormatChoice {
    /// The caller knows.
    Known(Format),
    /// The content says: qcow2 where it starts with its magic, else raw. Writes that would change
    /// the answer are refused on such a raw disk.
    Probe,
}

impl From<Format> for FormatChoice {
    fn from(format: Format) -> Self {
        Self::Known(format)
    }
}

/// What to do with a backing file whose format the image does not name.
///
/// ```
/// use lacuna::chain::UnnamedFormat;
/// assert_eq!(UnnamedFormat::default(), UnnamedFormat::Refuse);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnnamedFormat {
    /// Not opened: a guest may have written what a probe would find (CVE-2008-2004).
    #[default]
    Refuse,
    /// Its content says.
    Probe,
}

/// A file that an image names and that is about to be opened.
///
/// ```
/// use std::path::Path;
/// use lacuna::chain::{Reference, Role};
/// let reference = Reference {
///     role: Role::Backing,
///     image: Path::new("/vm/top.qcow2"),
///     path: Path::new("/vm/base.raw"),
/// };
/// assert!(reference.path.starts_with("/vm"));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Reference<'a> {
    /// What it is for.
    pub role: Role,
    /// The image that names it.
    pub image: &'a Path,
    /// What it names, seen from where the image is. Links are not followed yet.
    pub path: &'a Path,
}

/// What a named file is for.
///
/// ```
/// assert_eq!(lacuna::chain::Role::Data.to_string(), "data file");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Supplies what the image does not hold. Opened for reading.
    Backing,
    /// Holds the guest data of the image. Opened like the image.
    Data,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Backing => "backing file",
            Self::Data => "data file",
        })
    }
}

/// Which files may be opened because an image names them.
///
/// ```
/// use lacuna::chain::Allow;
/// let below_vm = Allow::asking(|reference| reference.path.starts_with("/vm"));
/// assert!(matches!(below_vm, Allow::Asked(_)));
/// ```
#[derive(Clone, Default)]
pub enum Allow {
    /// None: images that name one are refused.
    #[default]
    None,
    /// Those for which the answer is true.
    Asked(Arc<dyn Fn(&Reference<'_>) -> bool + Send + Sync>),
    /// All that are named. For images whose maker is trusted.
    Named,
}

impl Allow {
    /// Lets `answer` decide.
    pub fn asking(answer: impl Fn(&Reference<'_>) -> bool + Send + Sync + 'static) -> Self {
        Self::Asked(Arc::new(answer))
    }

    /// Returns an error unless the file may be opened.
    pub(super) fn check(&self, reference: &Reference<'_>) -> Result<()> {
        let allowed = match self {
            Self::None => false,
            Self::Asked(answer) => answer(reference),
            Self::Named => true,
        };
        if allowed {
            return Ok(());
        }
        let option = match reference.role {
            Role::Backing => "ChainOptions::backing",
            Role::Data => "ChainOptions::data_file",
        };
        Err(Error::invalid(format!(
            "The {} {} is named by the image itself and was not allowed to be opened; {option} \
             can allow it",
            reference.role,
            super::name::quoted(reference.path.as_os_str().as_encoded_bytes()),
        )))
    }
}

impl fmt::Debug for Allow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Asked(_) => "Asked",
            Self::Named => "Named",
        })
    }
}

/// What the caller puts in the place of what an image says of its backing layer.
///
/// ```
/// use lacuna::chain::{Instead, StandIn};
/// assert_eq!(Instead::default().backing, StandIn::Named);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Instead {
    /// Which file.
    pub backing: StandIn,
    /// Its format; without it the image says, or what
    /// [`unnamed_format`](ChainOptions::unnamed_format) asks for is done.
    pub format: Option<FormatChoice>,
}

/// Which backing file an image gets.
///
/// ```
/// use lacuna::chain::StandIn;
/// assert_ne!(StandIn::At("base.raw".into()), StandIn::Nothing);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum StandIn {
    /// This one, whatever the image says; the caller's own choice, which [`Allow`] is not asked
    /// about.
    At(PathBuf),
    /// The one the image names, where [`ChainOptions::backing`] allows it.
    #[default]
    Named,
    /// None: what the image lacks reads as zeros.
    Nothing,
}

/// How to open an image with what it names. Nothing is guessed or followed unless said here.
///
/// ```
/// use lacuna::chain::{Allow, ChainOptions, Format};
/// use lacuna::qcow2::Access;
///
/// let options = ChainOptions { backing: Allow::Named, ..ChainOptions::new(Format::Qcow2, Access::ReadOnly) };
/// assert!(matches!(options.data_file, Allow::None));
/// ```
#[derive(Clone, Debug)]
pub struct ChainOptions {
    /// Whether the top image is written. Backing layers never are.
    pub access: Access,
    /// Which backing files may be opened.
    pub backing: Allow,
    /// Which external data files may be opened.
    pub data_file: Allow,
    /// The external data file of the top image, instead of the one that it names; the caller's
    /// own choice, which [`data_file`](Self::data_file) is not asked about.
    pub data_path: Option<PathBuf>,
    /// The format of the top image.
    pub format: FormatChoice,
    /// How qcow2 images are opened; its access is replaced by what each image of the chain gets.
    /// The table cache given here is that of the top image, and as much again is shared by all below
    /// it: half for the lowest, the rest in equal parts, of 16 KiB at least.
    pub image: OpenOptions,
    /// What stands in for the backing file of the top image, of the one below it, and so on;
    /// images further down get what they name.
    pub instead: Vec<Instead>,
    /// What others may do with the images meanwhile.
    pub sharing: Sharing,
    /// What to do with backing files of unnamed format.
    pub unnamed_format: UnnamedFormat,
}

impl ChainOptions {
    /// Opens one image of this format, alone.
    pub fn new(format: impl Into<FormatChoice>, access: Access) -> Self {
        Self {
            access,
            backing: Allow::default(),
            data_file: Allow::default(),
            data_path: None,
            format: format.into(),
            image: OpenOptions::new(access),
            instead: Vec::new(),
            sharing: Sharing::default(),
            unnamed_format: UnnamedFormat::default(),
        }
    }
}
