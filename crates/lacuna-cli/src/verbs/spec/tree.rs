//! What a disk is made of, by options that QEMU's programs know: formats stand on storage, and
//! storage is a file or something that plays one.
//!
//! * Always by QEMU's rules: `driver` chooses, `file.`, `backing.` and `data-file.` lead on, and an
//!   option that nobody takes is refused.
//! * Never opens anything. Formats are only guessed for a disk that names none.

use serde_json::{Map, Value};

use super::debug::{DebugSpec, Limits, Rule};
use super::keys::{Keys, Scalar};
use super::runtime::{Common, Runtime};
use super::storage::{child, debug_name, no_such_node, storage};
use crate::error::{CliError, CliResult};
use crate::format::Format;
use crate::objects::Objects;

pub(crate) use super::storage::{FileKind, FileSpec, StorageSpec, split_protocol};

/// How deep descriptions may be nested: each level is opened within the one above.
pub(super) const MAX_DEPTH: usize = 64;

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
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum TopSpec {
    Compress,
    CopyOnRead,
    /// Cuts requests, and lets some of them fail or wait.
    Debug(Limits, Vec<Rule>),
    /// What was written is durable when the call returns.
    WriteThrough,
}

impl TopSpec {
    /// Returns QEMU's name of the driver.
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Compress => "compress",
            Self::CopyOnRead => "copy-on-read",
            Self::Debug(..) => "blkdebug",
            Self::WriteThrough => "write-through",
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

impl DiskSpec {
    /// Reads options and, if given, the file name that stands beside them.
    pub(crate) fn read(keys: Keys, name: Option<&str>) -> CliResult<Self> {
        disk(keys, name, 0)
    }

    /// Describes a disk on a storage whose content says the format.
    pub(crate) fn on(file: StorageSpec) -> Self {
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

    /// Finds the certificates that exports are to be asked with.
    pub(crate) fn find_certificates(&mut self, objects: &Objects) -> CliResult<()> {
        self.file.find_certificates(objects)?;
        if let Some(data) = &mut self.data_file {
            data.find_certificates(objects)?;
        }
        let mut below = &mut self.below;
        while let BelowSpec::Changed(changed) = below {
            if let Some(file) = &mut changed.file {
                file.find_certificates(objects)?;
            }
            below = &mut changed.below;
        }
        Ok(())
    }

    /// Returns the name to show: the file's where that says all, else `json:` and a description.
    pub(crate) fn shown(&self) -> String {
        let is_whole = self.window == Window::default();
        match &self.file {
            StorageSpec::File(file) if is_whole => file.path.display().to_string(),
            StorageSpec::Debug(debug) if is_whole && debug.0.has_only_config() => self.file.shown(),
            StorageSpec::Nbd(_) if is_whole => self.file.shown(),
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

/// Writes JSON on one line, with a space behind colons and commas.
pub(super) fn spaced(value: &Value) -> String {
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

pub(super) fn too_deep() -> CliError {
    CliError::new(format!("The description is nested more than {MAX_DEPTH} deep"))
}

pub(super) fn disk(mut keys: Keys, name: Option<&str>, depth: usize) -> CliResult<DiskSpec> {
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

/// A disk whose requests a debug driver cuts, and lets fail by rules.
fn limited(mut keys: Keys, name: Option<&str>, depth: usize) -> CliResult<DiskSpec> {
    let named = name.map(debug_name).transpose()?;
    let (config, name) = named.unzip();
    let common = Common::take(&mut keys)?;
    let debug = DebugSpec::take(&mut keys, config)?;
    let mut below = disk_below(&mut keys, "image", name.as_deref(), depth)?;
    keys.none_for_storage("blkdebug")?;
    below.common.add(common);
    below.tops.push(TopSpec::Debug(debug.limits, debug.rules));
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

/// The names of formats proper: those that stand on a file.
pub(super) fn format_of(driver: &str) -> Option<Format> {
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
        StorageSpec::Nbd(_) => Some("nbd"),
        StorageSpec::Null(null) => Some(null.name),
        StorageSpec::Debug(_) | StorageSpec::Disk(_) => None,
    };
    Ok(DiskSpec { format: Some(Format::Raw), storage_name, common, ..DiskSpec::on(file) })
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
