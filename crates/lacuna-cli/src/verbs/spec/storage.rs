//! What plays the file of a format: a file, a disk, nothing, or a test driver on one of them.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::debug::DebugSpec;
use super::keys::{Keys, Scalar};
use super::nbd::NbdSpec;
use super::runtime::Common;
use super::tree::{DiskSpec, MAX_DEPTH, disk, format_of, spaced, too_deep};
use crate::error::{CliError, CliResult};
use crate::objects::Objects;

/// Where bytes come from.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum StorageSpec {
    /// A storage whose requests fail or wait by rules.
    Debug(Box<(DebugSpec, Self)>),
    /// A disk whose guest bytes are what is seen.
    Disk(Box<DiskSpec>),
    File(FileSpec),
    /// An export of a server.
    Nbd(Box<NbdSpec>),
    /// No bytes at all: reads as zeros, writes go nowhere.
    Null(NullSpec),
}

/// A file or device of the host.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct FileSpec {
    pub(crate) path: PathBuf,
    pub(crate) kind: FileKind,
    pub(crate) common: Common,
}

/// What a file must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileKind {
    CdRom,
    Device,
    Regular,
}

impl FileKind {
    /// Returns QEMU's name of the driver.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::CdRom => "host_cdrom",
            Self::Device => "host_device",
            Self::Regular => "file",
        }
    }
}

/// A storage without content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NullSpec {
    pub(crate) name: &'static str,
    /// As given.
    pub(super) size: Option<u64>,
}

impl NullSpec {
    /// Returns the number of bytes.
    pub(crate) fn size_bytes(&self) -> u64 {
        /// The size of a disk that says none.
        const DEFAULT_BYTES: u64 = 1 << 30;
        self.size.unwrap_or(DEFAULT_BYTES)
    }

    pub(crate) fn shown(&self) -> String {
        format!("{}://", self.name)
    }
}

impl StorageSpec {
    /// Makes the description of a plain file.
    pub(crate) fn file(path: &Path) -> Self {
        let (path, common) = (path.to_owned(), Common::default());
        Self::File(FileSpec { path, kind: FileKind::Regular, common })
    }

    /// Describes a plain file that goes through the page cache, whatever else is asked for.
    pub(crate) fn buffered_file(path: &Path) -> Self {
        let mut common = Common::default();
        common.direct = Some(false);
        Self::File(FileSpec { path: path.to_owned(), kind: FileKind::Regular, common })
    }

    /// Makes the description of what an image names.
    pub(crate) fn named(path: &Path) -> CliResult<Self> {
        match path.to_str().filter(|name| NbdSpec::is_name(name)) {
            Some(name) => Ok(Self::Nbd(Box::new(NbdSpec::from_name(name)?))),
            None => Ok(Self::file(path)),
        }
    }

    /// Returns the file that all comes from, or a name for what comes from none.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Debug(debug) => debug.1.path(),
            Self::Disk(disk) => disk.file.path(),
            Self::File(file) => &file.path,
            Self::Nbd(nbd) => nbd.path(),
            Self::Null(_) => Path::new("null-co://"),
        }
    }

    /// Says whether it has a path of its own, by which it can be told from others.
    pub(crate) fn has_path(&self) -> bool {
        match self {
            Self::Debug(debug) => debug.1.has_path(),
            Self::Disk(disk) => disk.file.has_path(),
            Self::File(_) | Self::Nbd(_) => true,
            Self::Null(_) => false,
        }
    }

    /// Finds the certificates that exports are to be asked with.
    pub(super) fn find_certificates(&mut self, objects: &Objects) -> CliResult<()> {
        match self {
            Self::Debug(debug) => debug.1.find_certificates(objects),
            Self::Disk(disk) => disk.find_certificates(objects),
            Self::Nbd(nbd) => nbd.find_certificates(objects),
            Self::File(_) | Self::Null(_) => Ok(()),
        }
    }

    /// Returns the file of the host that it comes down to.
    pub(crate) fn files(&self) -> Option<&FileSpec> {
        match self {
            Self::Debug(debug) => debug.1.files(),
            Self::Disk(disk) => disk.file.files(),
            Self::File(file) => Some(file),
            Self::Nbd(_) | Self::Null(_) => None,
        }
    }
}

impl StorageSpec {
    /// Returns the name to show for a storage that stands alone.
    pub(crate) fn shown(&self) -> String {
        match self {
            Self::Debug(debug) if debug.0.has_only_config() => {
                format!("blkdebug:{}:{}", debug.0.config, debug.1.path().display())
            }
            Self::File(file) => file.path.display().to_string(),
            Self::Nbd(nbd) => nbd.path().display().to_string(),
            Self::Null(null) => null.shown(),
            _ => format!("json:{}", spaced(&self.json())),
        }
    }

    pub(super) fn json(&self) -> Value {
        match self {
            Self::Debug(debug) => json!({"driver": "blkdebug", "image": debug.1.json()}),
            Self::Disk(disk) => disk.json(),
            Self::File(file) => {
                json!({"driver": file.kind.name(), "filename": file.path.to_string_lossy()})
            }
            Self::Nbd(nbd) => nbd.json(),
            Self::Null(NullSpec { name, size: Some(size) }) => {
                json!({"driver": name, "size": size})
            }
            Self::Null(NullSpec { name, size: None }) => json!({"driver": name}),
        }
    }
}

/// The storage that the options below `key` and `name` describe, where any do.
pub(super) fn child(
    keys: &mut Keys,
    key: &str,
    name: Option<&str>,
    depth: usize,
) -> CliResult<Option<StorageSpec>> {
    if let Some(reference) = keys.take_text(key) {
        return Err(no_such_node(&reference));
    }
    let below = keys.take_below(key);
    match below.is_empty() && name.is_none() {
        true => Ok(None),
        false => storage(below, name, depth + 1).map(Some),
    }
}

/// There is never a second disk that a name could mean.
pub(super) fn no_such_node(name: &str) -> CliError {
    CliError::new(format!("Cannot find device='{name}' nor node-name='{name}'"))
}

/// Splits `blkdebug:CONFIG:IMAGE`.
pub(super) fn debug_name(name: &str) -> CliResult<(String, String)> {
    let Some(rest) = name.strip_prefix("blkdebug:") else {
        // Whatever else it is, it is the image.
        return Ok((String::new(), name.to_owned()));
    };
    match rest.split_once(':') {
        Some((config, image)) if !image.is_empty() => Ok((config.to_owned(), image.to_owned())),
        _ => Err(CliError::new("blkdebug requires both config file and image path")),
    }
}

/// Reads what plays the file of a format.
pub(super) fn storage(mut keys: Keys, name: Option<&str>, depth: usize) -> CliResult<StorageSpec> {
    if depth == MAX_DEPTH {
        return Err(too_deep());
    }
    let is_debug = name.is_some_and(|name| name.starts_with("blkdebug:"));
    if is_debug && keys.text("driver").is_none() {
        keys.set("driver".to_owned(), Scalar::Text("blkdebug".to_owned()));
    }
    if keys.text("driver") == Some("blkdebug") {
        keys.take("driver");
        return debugged(keys, name, depth);
    }
    let is_export = name.or_else(|| keys.text("filename")).is_some_and(NbdSpec::is_name);
    if is_export && keys.text("driver").is_none_or(|driver| driver == "nbd") {
        keys.take("driver");
        return Ok(StorageSpec::Nbd(Box::new(NbdSpec::read(keys, name)?)));
    }
    let named = match name {
        // What a format on a format stands on is told when its own storage is read.
        Some(name) if is_export => Some((None, name.to_owned())),
        name => name.map(split_protocol).transpose()?,
    };
    let driver = keys.take_text("driver");
    let driver = driver.as_deref().or_else(|| named.as_ref().and_then(|(driver, _)| *driver));
    let plain = named.map(|(_, plain)| plain);
    match driver {
        None | Some("file") => file(FileKind::Regular, keys, plain, driver.is_some()),
        Some("host_device") => file(FileKind::Device, keys, plain, true),
        Some("host_cdrom") => file(FileKind::CdRom, keys, plain, true),
        Some("nbd") => Ok(StorageSpec::Nbd(Box::new(NbdSpec::read(keys, name)?))),
        Some("null-co") => null("null-co", keys),
        Some("null-aio") => null("null-aio", keys),
        Some(driver) if format_of(driver).is_some() => {
            keys.set("driver".to_owned(), Scalar::Text(driver.to_owned()));
            Ok(StorageSpec::Disk(Box::new(disk(keys, name, depth)?)))
        }
        Some(driver) => Err(CliError::new(format!("Unknown driver '{driver}'"))),
    }
}

/// A storage whose requests fail or wait by rules.
fn debugged(mut keys: Keys, name: Option<&str>, depth: usize) -> CliResult<StorageSpec> {
    let (config, image) = name.map(debug_name).transpose()?.unzip();
    Common::take(&mut keys)?;
    let debug = DebugSpec::take(&mut keys, config)?;
    let below = child(&mut keys, "image", image.as_deref(), depth)?;
    let below =
        below.ok_or_else(|| CliError::new("A block device must be specified for \"image\""))?;
    keys.none_for_storage("blkdebug")?;
    Ok(StorageSpec::Debug(Box::new((debug, below))))
}

/// Splits a name into the driver that its protocol asks for, and the rest.
pub(crate) fn split_protocol(name: &str) -> CliResult<(Option<&'static str>, String)> {
    let head = name.split('/').next().unwrap_or_default();
    let Some((protocol, _)) = head.split_once(':') else { return Ok((None, name.to_owned())) };
    let rest = name[protocol.len() + 1..].to_owned();
    match protocol {
        "file" => Ok((Some("file"), without_protocol(&rest))),
        "host_device" => Ok((Some("host_device"), rest)),
        "host_cdrom" => Ok((Some("host_cdrom"), rest)),
        "null-co" => Ok((Some("null-co"), rest)),
        "null-aio" => Ok((Some("null-aio"), rest)),
        _ => Err(CliError::new(format!("Unknown protocol '{protocol}'"))
            .with_hint(format!("a file of that name can be given as ./{name}"))),
    }
}

/// A name that would again look like a protocol is given a folder, as QEMU shows it.
fn without_protocol(file: &str) -> String {
    let looks_like_one = file.split('/').next().is_some_and(|first| first.contains(':'));
    if looks_like_one { format!("./{file}") } else { file.to_owned() }
}

fn file(
    kind: FileKind,
    mut keys: Keys,
    plain: Option<String>,
    has_driver: bool,
) -> CliResult<StorageSpec> {
    let driver = kind.name();
    let path = match (keys.take_text("filename"), plain) {
        (Some(_), Some(_)) => {
            let text = "Can't specify 'file' and 'filename' options at the same time";
            return Err(CliError::new(text));
        }
        (Some(path), None) | (None, Some(path)) => path,
        (None, None) if has_driver => {
            let text = format!("The '{driver}' block driver requires a file name");
            return Err(CliError::new(text));
        }
        (None, None) => return Err(CliError::new("Must specify either driver or file")),
    };
    if path.is_empty() {
        let text = format!("The '{driver}' block driver requires a file name");
        return Err(CliError::new(text));
    }
    let mut common = Common::take(&mut keys)?;
    common.take_for_file(&mut keys)?;
    keys.none_for_storage(driver)?;
    Ok(StorageSpec::File(FileSpec { path: PathBuf::from(path), kind, common }))
}

fn null(name: &'static str, mut keys: Keys) -> CliResult<StorageSpec> {
    Common::take(&mut keys)?;
    let size = keys.take_size("size")?;
    // Reads give zeros in any case, and at once.
    keys.take_switch("read-zeroes")?;
    keys.take_number("latency-ns")?;
    keys.take_text("filename");
    keys.none_for_storage(name)?;
    Ok(StorageSpec::Null(NullSpec { name, size }))
}
