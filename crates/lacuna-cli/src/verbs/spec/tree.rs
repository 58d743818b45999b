//! What a disk is made of, by options that QEMU's programs know: formats stand on storage, and
//! storage is a file or something that plays one.
//!
//! * Always by QEMU's rules: `driver` chooses, `file.`, `backing.` and `data-file.` lead on, and an
//!   option that nobody takes is refused.
//! * Never opens anything. Formats are only guessed for a disk that names none.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::debug::{DebugSpec, Limits};
use super::keys::{Keys, Scalar};
use super::runtime::{Common, Runtime};
use crate::error::{CliError, CliResult};
use crate::format::Format;

/// How deep descriptions may be nested: each level is opened within the one above.
const MAX_DEPTH: usize = 64;

/// A disk: its format, what it stands on, and how it is to be opened.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct DiskSpec {
    /// Nothing where the content is to say.
    pub(crate) format: Option<Format>,
    /// The name of what was asked for where that is no format: `file`, `null-co`.
    pub(crate) storage_name: Option<&'static str>,
    pub(crate) file: StorageSpec,
    pub(crate) common: Common,
    pub(crate) runtime: Runtime,
    pub(crate) window: Window,
    pub(crate) below: BelowSpec,
    /// The external data file, where not the one that the image names.
    pub(crate) data_file: Option<StorageSpec>,
    /// What is put on top, the lowest first.
    pub(crate) tops: Vec<TopSpec>,
}

/// A layer on top of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TopSpec {
    Compress,
    CopyOnRead,
    Limits(Limits),
}

impl TopSpec {
    /// Returns QEMU's name of the driver.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Compress => "compress",
            Self::CopyOnRead => "copy-on-read",
            Self::Limits(_) => "blkdebug",
        }
    }
}

/// The part of a file that a raw disk is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) offset: u64,
    /// All of the rest without.
    pub(crate) size: Option<u64>,
}

/// What stands in for the backing file that an image names.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum BelowSpec {
    /// Another disk, or the same one opened otherwise.
    Changed(Box<Changed>),
    #[default]
    Named,
    Nothing,
}

impl BelowSpec {
    /// Stands on a disk whose format is known by now.
    pub(crate) fn on(disk: &DiskSpec, format: Format) -> Self {
        let is_file = disk.window == Window::default() && disk.tops.is_empty();
        let (format, file, below) = match is_file && disk.data_file.is_none() {
            true => (format, disk.file.clone(), disk.below.clone()),
            false => {
                let disk = DiskSpec { format: Some(format), ..disk.clone() };
                (Format::Raw, StorageSpec::Disk(Box::new(disk)), Self::Nothing)
            }
        };
        let (format, file, first_key) = (Some(format), Some(file), String::new());
        Self::Changed(Box::new(Changed { format, file, below, first_key }))
    }
}

/// A backing layer as far as options describe it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Changed {
    pub(crate) format: Option<Format>,
    /// The one that the image names without.
    pub(crate) file: Option<StorageSpec>,
    pub(crate) below: BelowSpec,
    /// The first option, for who takes none.
    pub(crate) first_key: String,
}

/// Where bytes come from.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum StorageSpec {
    /// A storage whose requests fail or wait by rules.
    Debug(Box<(DebugSpec, Self)>),
    /// A disk whose guest bytes are what is seen.
    Disk(Box<DiskSpec>),
    File(FileSpec),
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
    size: Option<u64>,
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

impl DiskSpec {
    /// Reads options and, if given, the file name that stands beside them.
    pub(crate) fn read(keys: Keys, name: Option<&str>) -> CliResult<Self> {
        disk(keys, name, 0)
    }

    fn on(file: StorageSpec) -> Self {
        Self {
            format: None,
            storage_name: None,
            file,
            common: Common::default(),
            runtime: Runtime::default(),
            window: Window::default(),
            below: BelowSpec::default(),
            data_file: None,
            tops: Vec::new(),
        }
    }

    /// Returns the name to show: the file's where that says all, else `json:` and a description.
    pub(crate) fn shown(&self) -> String {
        let is_whole = self.window == Window::default();
        match &self.file {
            StorageSpec::File(file) if is_whole => file.path.display().to_string(),
            StorageSpec::Debug(debug) if is_whole && debug.0.has_only_config() => self.file.shown(),
            StorageSpec::Null(null) if is_whole && null.size.is_none() => null.shown(),
            _ => format!("json:{}", spaced(&self.json())),
        }
    }

    /// Returns what decides about the content, as an object.
    pub(crate) fn json(&self) -> Value {
        if self.storage_name.is_some() {
            return self.file.json();
        }
        let mut members = Map::new();
        let format = self.format.map_or_else(String::new, |format| format.name().to_owned());
        members.insert("driver".into(), format.into());
        if self.window.offset > 0 {
            members.insert("offset".into(), self.window.offset.into());
        }
        if let Some(size) = self.window.size {
            members.insert("size".into(), size.into());
        }
        members.insert("file".into(), self.file.json());
        Value::Object(members)
    }
}

impl StorageSpec {
    /// Makes the description of a plain file.
    pub(crate) fn file(path: &Path) -> Self {
        let (path, common) = (path.to_owned(), Common::default());
        Self::File(FileSpec { path, kind: FileKind::Regular, common })
    }

    /// Returns the file that all comes from, or a name for what comes from none.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Debug(debug) => debug.1.path(),
            Self::Disk(disk) => disk.file.path(),
            Self::File(file) => &file.path,
            Self::Null(_) => Path::new("null-co://"),
        }
    }

    /// Returns the file of the host that it comes down to.
    pub(crate) fn files(&self) -> Option<&FileSpec> {
        match self {
            Self::Debug(debug) => debug.1.files(),
            Self::Disk(disk) => disk.file.files(),
            Self::File(file) => Some(file),
            Self::Null(_) => None,
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
            Self::Null(null) => null.shown(),
            _ => format!("json:{}", spaced(&self.json())),
        }
    }

    fn json(&self) -> Value {
        match self {
            Self::Debug(debug) => json!({"driver": "blkdebug", "image": debug.1.json()}),
            Self::Disk(disk) => disk.json(),
            Self::File(file) => {
                json!({"driver": file.kind.name(), "filename": file.path.to_string_lossy()})
            }
            Self::Null(NullSpec { name, size: Some(size) }) => {
                json!({"driver": name, "size": size})
            }
            Self::Null(NullSpec { name, size: None }) => json!({"driver": name}),
        }
    }
}

/// Writes JSON on one line, with a space behind colons and commas.
fn spaced(value: &Value) -> String {
    match value {
        Value::Object(members) => {
            let members: Vec<String> = members
                .iter()
                .map(|(key, value)| format!("{}: {}", Value::from(&**key), spaced(value)))
                .collect();
            format!("{{{}}}", members.join(", "))
        }
        Value::Array(items) => {
            format!("[{}]", items.iter().map(spaced).collect::<Vec<_>>().join(", "))
        }
        scalar => scalar.to_string(),
    }
}

fn too_deep() -> CliError {
    CliError::new(format!("The description is nested more than {MAX_DEPTH} deep"))
}

fn disk(mut keys: Keys, name: Option<&str>, depth: usize) -> CliResult<DiskSpec> {
    if depth == MAX_DEPTH {
        return Err(too_deep());
    }
    let driver = keys.take_text("driver");
    match driver.as_deref() {
        None if name.is_none() && !has_file(&keys) => {
            Err(CliError::new("Must specify either driver or file"))
        }
        None => formatted(None, keys, name, depth),
        Some(driver) => match format_of(driver) {
            Some(format) => formatted(Some(format), keys, name, depth),
            None => match driver {
                "blkdebug" => limited(keys, name, depth),
                "compress" => topped(TopSpec::Compress, keys, name, depth),
                "copy-on-read" => topped(TopSpec::CopyOnRead, keys, name, depth),
                _ => bare(driver, keys, name, depth),
            },
        },
    }
}

/// A disk with a layer on top of it.
fn topped(top: TopSpec, mut keys: Keys, name: Option<&str>, depth: usize) -> CliResult<DiskSpec> {
    let common = Common::take(&mut keys)?;
    let mut below = disk_below(&mut keys, "file", name, depth)?;
    keys.none_for_format(top.name())?;
    if top == TopSpec::Compress && below.format != Some(Format::Qcow2) {
        let format = below.storage_name.or_else(|| below.format.map(Format::name)).unwrap_or("raw");
        let text = format!("Compression is not supported for underlying format: {format}");
        return Err(CliError::new(text));
    }
    below.common.add(common);
    below.tops.push(top);
    Ok(below)
}

/// A disk whose requests a debug driver cuts. Its rules are about storage, of which none is here.
fn limited(mut keys: Keys, name: Option<&str>, depth: usize) -> CliResult<DiskSpec> {
    let named = name.map(debug_name).transpose()?;
    let (config, name) = named.unzip();
    let common = Common::take(&mut keys)?;
    let debug = DebugSpec::take(&mut keys, config)?;
    let mut below = disk_below(&mut keys, "image", name.as_deref(), depth)?;
    keys.none_for_storage("blkdebug")?;
    if !debug.rules.is_empty() {
        return Err(CliError::new("Rules of blkdebug are not supported above a format")
            .with_hint("put it below: driver=qcow2,file.driver=blkdebug,file.image.filename=..."));
    }
    below.common.add(common);
    below.tops.push(TopSpec::Limits(debug.limits));
    Ok(below)
}

/// The disk that the options below `key` and `name` describe.
fn disk_below(keys: &mut Keys, key: &str, name: Option<&str>, depth: usize) -> CliResult<DiskSpec> {
    if let Some(reference) = keys.take_text(key) {
        return Err(no_such_node(&reference));
    }
    let below = keys.take_below(key);
    match below.is_empty() && name.is_none() {
        true => Err(CliError::new(format!("A block device must be specified for \"{key}\""))),
        // Plain options of a file are those of a disk on it.
        false if below.text("filename").is_some() && below.text("driver").is_none() => {
            Ok(DiskSpec::on(storage(below, None, depth + 1)?))
        }
        false => disk(below, name, depth + 1),
    }
}

/// Splits `blkdebug:CONFIG:IMAGE`.
fn debug_name(name: &str) -> CliResult<(String, String)> {
    let Some(rest) = name.strip_prefix("blkdebug:") else {
        // Whatever else it is, it is the image.
        return Ok((String::new(), name.to_owned()));
    };
    match rest.split_once(':') {
        Some((config, image)) if !image.is_empty() => Ok((config.to_owned(), image.to_owned())),
        _ => Err(CliError::new("blkdebug requires both config file and image path")),
    }
}

/// The names of formats proper: those that stand on a file.
fn format_of(driver: &str) -> Option<Format> {
    match driver {
        "qcow2" => Some(Format::Qcow2),
        "raw" => Some(Format::Raw),
        _ => None,
    }
}

fn has_file(keys: &Keys) -> bool {
    let mut keys = keys.clone();
    keys.take("file").is_some() || !keys.take_below("file").is_empty()
}

/// A disk of a format, known or not.
fn formatted(
    format: Option<Format>,
    mut keys: Keys,
    name: Option<&str>,
    depth: usize,
) -> CliResult<DiskSpec> {
    let file = child(&mut keys, "file", name, depth)?;
    let file =
        file.ok_or_else(|| CliError::new("A block device must be specified for \"file\""))?;
    let mut spec = DiskSpec { format, ..DiskSpec::on(file) };
    spec.common = Common::take(&mut keys)?;
    if format != Some(Format::Raw) {
        spec.runtime = Runtime::take(&mut keys)?;
        spec.below = below(&mut keys, depth)?;
        spec.data_file = child(&mut keys, "data-file", None, depth)?;
    }
    if format == Some(Format::Raw) {
        spec.window = Window {
            offset: keys.take_size("offset")?.unwrap_or(0),
            size: keys.take_size("size")?,
        };
    }
    keys.none_for_format(format.unwrap_or(Format::Qcow2).name())?;
    Ok(spec)
}

/// A disk whose bytes are those of a storage as they are.
fn bare(driver: &str, mut keys: Keys, name: Option<&str>, depth: usize) -> CliResult<DiskSpec> {
    let common = Common::take(&mut keys)?;
    keys.set("driver".to_owned(), Scalar::Text(driver.to_owned()));
    let file = storage(keys, name, depth)?;
    let storage_name = match &file {
        StorageSpec::File(file) => Some(file.kind.name()),
        StorageSpec::Null(null) => Some(null.name),
        StorageSpec::Debug(_) | StorageSpec::Disk(_) => None,
    };
    Ok(DiskSpec { format: Some(Format::Raw), storage_name, common, ..DiskSpec::on(file) })
}

/// The storage that the options below `key` and `name` describe, where any do.
fn child(
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
fn no_such_node(name: &str) -> CliError {
    CliError::new(format!("Cannot find device='{name}' nor node-name='{name}'"))
}

fn below(keys: &mut Keys, depth: usize) -> CliResult<BelowSpec> {
    let under = |error: CliError| error.under("Could not open backing file");
    match keys.take("backing") {
        Some(Scalar::Null) => return Ok(BelowSpec::Nothing),
        Some(Scalar::Text(text)) if text.is_empty() => return Ok(BelowSpec::Nothing),
        Some(Scalar::Text(text)) => return Err(under(no_such_node(&text))),
        None => {}
    }
    let below = keys.take_below("backing");
    match below.is_empty() {
        true => Ok(BelowSpec::Named),
        false => {
            let first_key = format!("backing.{}", below.first().unwrap_or_default());
            let changed = changed(below, depth + 1).map_err(under)?;
            Ok(BelowSpec::Changed(Box::new(Changed { first_key, ..changed })))
        }
    }
}

/// A backing layer that options describe, in part or whole.
fn changed(mut keys: Keys, depth: usize) -> CliResult<Changed> {
    let driver = keys.take_text("driver");
    let format = match driver.as_deref() {
        None => None,
        Some(driver) => match format_of(driver) {
            Some(format) => Some(format),
            None => return changed_to_storage(driver, keys, depth),
        },
    };
    let file = child(&mut keys, "file", None, depth)?;
    Common::take(&mut keys)?;
    let mut inner = BelowSpec::default();
    if format != Some(Format::Raw) {
        // What bounds caches and frees space is said for the whole chain.
        Runtime::take(&mut keys)?;
        inner = below(&mut keys, depth)?;
    }
    keys.none_for_format(format.unwrap_or(Format::Qcow2).name())?;
    Ok(Changed { format, file, below: inner, first_key: String::new() })
}

fn changed_to_storage(driver: &str, keys: Keys, depth: usize) -> CliResult<Changed> {
    let DiskSpec { format, file, below, .. } = bare(driver, keys, None, depth)?;
    Ok(Changed { format, file: Some(file), below, first_key: String::new() })
}

/// Reads what plays the file of a format.
fn storage(mut keys: Keys, name: Option<&str>, depth: usize) -> CliResult<StorageSpec> {
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
    let named = name.map(split_protocol).transpose()?;
    let driver = keys.take_text("driver");
    let driver = driver.as_deref().or_else(|| named.as_ref().and_then(|(driver, _)| *driver));
    let plain = named.map(|(_, plain)| plain);
    match driver {
        None | Some("file") => file(FileKind::Regular, keys, plain, driver.is_some()),
        Some("host_device") => file(FileKind::Device, keys, plain, true),
        Some("host_cdrom") => file(FileKind::CdRom, keys, plain, true),
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
